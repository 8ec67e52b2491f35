"""What ``distributed_worker`` checks, on two processes; and a checkpoint of four that two load."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import runlora_gen
import torch
import torch.distributed as dist
from runlora_gen.forecast.estimate import Batch, Ways, steps_of
from runlora_gen.from_model.live import read_model
from runlora_gen.into_model.packages import imported
from runlora_gen.request.workload import make_workload
from torch import multiprocessing

from . import distributed_worker as worker
from .models import MLPS_PAY, RANK, STACKS, coded, in_float8, llama, qwen3_moe

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch's gloo")


def _work(rank: int, world: int, package: Path, names: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting_of_{world}", rank=rank, world_size=world)
    try:
        found = worker.check(package, names, "cpu", folder)
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))
    except BaseException:
        (folder / f"error_{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def found_by(world: int, package: Any, names: list[str], folder: Path) -> Any:
    """Processes are forked: to import torch and Transformers once more would take longer than the checks."""
    context = multiprocessing.get_context("fork")
    arguments = (world, package.shapes.FOLDER, names, folder)
    processes = [context.Process(target=_work, args=(rank, *arguments), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("error_*.txt")))
    assert not errors and [process.exitcode for process in processes] == [0] * world, errors
    return json.loads((folder / "found.json").read_text())


def test_two_processes_compute_what_one_does(package: Any, tmp_path: Path) -> None:
    of_others = (*worker.OF_EXPERTS, *worker.OF_MLPS, *worker.OF_PLANS)
    others = [name for name in worker.CHECKS if name not in of_others]
    names = [name for name in others if not name.endswith(("_distributed", "_alone"))]
    found = found_by(2, package, names, tmp_path)
    assert list(found) == names and all(found.values())


def test_groups_in_two_processes(with_groups: Any, tmp_path: Path) -> None:
    """Parameters that are whole in a linear's own forward alone, as where it is sharded by itself, can't be shared."""
    names = ["ddp", "fsdp", "groups", "fsdp_mixed_precision", "tensor_parallel_peft", "tensor_parallel_injected"]
    found = found_by(2, with_groups, names, tmp_path)
    assert list(found) == names
    for kind in ("PEFT", "injected"):
        assert found["groups"][f"{kind}, DDP"] == 4
        assert found["groups"][f"{kind}, FSDP2 checkpointed"] == 8
        assert found["groups"][f"{kind}, FSDP2 of each linear"] == 2


def test_mlps_in_two_processes(with_mlps: Any, tmp_path: Path) -> None:
    """A linear whose parameters are whole in its own forward alone is called, and its MLP is not one."""
    names = ["fsdp", "mlps", "fsdp_mixed_precision", "tensor_parallel_peft", "tensor_parallel_injected"]
    found = found_by(2, with_mlps, names, tmp_path)
    assert list(found) == names
    for kind in ("PEFT", "injected"):
        for case in ("DDP", "FSDP2", "FSDP2 of each MLP"):
            assert found["mlps"][f"{kind}, {case}"] == 2, case
        assert found["mlps"][f"{kind}, FSDP2 checkpointed"] == 4
        assert found["mlps"][f"{kind}, FSDP2 of each down_proj"] == 0


def test_plans_in_two_processes(tmp_path: Path) -> None:
    """A layer that makes gate and up again, and one that makes what norms give; the first norm has no gradient."""
    workload: dict[str, Any] = {**MLPS_PAY, "tokens": 36, "sequence": 9}
    steps = steps_of(read_model(llama()).architecture, RANK, make_workload(**workload, memory_budget=1), Batch(4, 9))
    budget = steps.ours(Ways(0, 1, 1)).memory.peak
    (folder,) = runlora_gen.generate(llama(), rank=RANK, output=tmp_path / "out", memory_budget=budget, **workload)
    assert found_by(2, imported(folder), ["plans"], tmp_path) == {"plans": {"DDP": 3, "FSDP2": 3}}


def test_experts_in_two_processes(tmp_path: Path) -> None:
    targets: dict[str, Any] = {"target_parameters": STACKS, "tokens": 64}
    (folder,) = runlora_gen.generate(qwen3_moe(), rank=RANK, output=tmp_path / "generated", **targets)
    found = found_by(2, imported(folder), list(worker.OF_EXPERTS), tmp_path)
    assert list(found) == list(worker.OF_EXPERTS) and len(found["experts"]) == 8


def test_shards_of_codes(tmp_path: Path) -> None:
    """Codes in the dtype of the other parameters are sharded with them, and gathered for a forward or a backward."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    (folder,) = runlora_gen.generate(coded(llama()), rank=RANK, tokens=64, output=tmp_path / "generated")
    found = found_by(2, imported(folder), ["ddp", "fsdp", "groups", "fsdp_adapter_files"], tmp_path)
    assert found["groups"]["PEFT, DDP"] == 4 and found["groups"]["PEFT, FSDP2 checkpointed"] == 8


def test_shards_of_float8(tmp_path: Path) -> None:
    """Codes and the scales of their blocks are sharded as other parameters are."""
    pytest.importorskip("transformers.integrations.finegrained_fp8", reason="needs Transformers with FP8Linear")
    model = in_float8(llama(), "fp8-block")
    (folder,) = runlora_gen.generate(model, rank=RANK, tokens=64, output=tmp_path / "generated")
    assert found_by(2, imported(folder), ["fsdp_alone"], tmp_path)["fsdp_alone"].keys() == {"PEFT", "injected"}


def test_a_checkpoint_of_four_ranks_is_loaded_on_two(package: Any, tmp_path: Path) -> None:
    assert found_by(4, package, ["save_distributed"], tmp_path) == {"save_distributed": {"ranks": 4}}
    assert found_by(2, package, ["load_distributed"], tmp_path) == {"load_distributed": {"ranks": 2}}
