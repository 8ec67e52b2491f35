"""QLoRA under FSDP2: time and peak memory of layers whose codes are sharded over several GPUs.

    torchrun --nproc-per-node 2 tools/bench_sharded.py --json tools/results/sharded_h100.json

Layers of a Llama-3-70B-shaped model with random weights in NF4, stored in bf16 so that FSDP shards the codes with the
other parameters; a batch of its own in each process, activation checkpointing, rank 16. All contenders run in rounds,
in random order; reported are the ratio to the frozen step of the same round, and the peak of one process in a step with
its shards.

Needs bitsandbytes, PEFT and Transformers, and as many GPUs as processes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_linear import spread
from bench_model import Shape, layers_of
from contenders import CONTENDERS, FROZEN, Contender, Setup, fill_adapters
from runlora_gen.generation import profile_of
from runlora_gen.measure.clock import Run, interleaved
from runlora_gen.measure.machine import machine_name
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

SHAPE = Shape(8192, 28672, 64, 8, layers=2, batch=1, sequence=4096, rank=16)
NAMES = ("peft-bf16", "ours-bf16")


def step_of(model: Any, x: Tensor, grad_output: Tensor) -> Any:
    """Forward and backward, with fresh gradients."""

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        x.grad = None
        output = model(inputs_embeds=x).last_hidden_state
        torch.autograd.backward(output, grad_output)

    return step


def sharded(model: nn.Module, mesh: Any) -> nn.Module:
    """Its layers, each gathered where it is computed, and what is left."""
    inner: Any = model
    while not hasattr(inner, "layers"):
        inner = inner.base_model.model if hasattr(inner, "peft_config") else inner.model
    for layer in inner.layers:
        fully_shard(layer, mesh=mesh)
    whole: Any = fully_shard(model, mesh=mesh)
    return whole  # type: ignore[no-any-return]


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=SHAPE.layers)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = replace(SHAPE, layers=options.layers)
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    torch.manual_seed(rank)
    size = shape.batch, shape.sequence, shape.hidden
    x = torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad_output = torch.randn_like(x)
    runs: dict[str, Run] = {}
    results: dict[str, dict[str, Any]] = {}
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    frozen = Contender(FROZEN, lambda model, _: (model, {}))
    for contender in (frozen, *(CONTENDERS[name] for name in NAMES)):
        model: Any = layers_of(shape, device, torch.bfloat16, "nf4", storage=torch.bfloat16)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        setup = Setup(shape.rank, shape.tokens, Path(folder[0]), profile_of(model)[0])
        built, _ = contender.build(model, setup)
        fill_adapters(built)
        step = step_of(sharded(built, mesh), x, grad_output)
        torch.cuda.empty_cache()
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        parameters: list[Any] = list(built.parameters())
        shards = sum(parameter.to_local().nbytes for parameter in parameters)
        peak = torch.cuda.max_memory_allocated() - before + shards
        runs[contender.title], results[contender.title] = step, {"peak_bytes": peak, "shards_bytes": shards}
    times = interleaved(runs, options.rounds, device, warmups=1, eager=True)
    for title, values in times.items():
        results[title] |= {
            "median_ms": round(statistics.median(values) * 1e3, 3),
            "over_frozen": spread(values, times[FROZEN]),
        }
    if rank == 0:
        versions = ("torch", "triton", "transformers", "peft", "bitsandbytes")
        report = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{dist.get_world_size()} x {machine_name(device)}",
            "versions": {name: importlib.metadata.version(name) for name in versions},
            **vars(shape),
            "rounds": options.rounds,
            "results": results,
        }
        for title, result in results.items():
            ratio = "{median:.3f} ({min:.3f}-{max:.3f})".format(**result["over_frozen"])
            print(f"{title:<30} {result['median_ms']:9.2f} ms x {ratio}  {result['peak_bytes'] / 2**20:8.0f} MiB")
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
