"""What Inductor gets of a step: the kernels themselves, and operators where that would be slower or wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", minversion="3.4")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

#: In a process of its own, since Triton's interpreter shows no kernels: traces operators as AOTAutograd does, with fake
#: tensors of a GPU that need not be there.
SCRIPT = """
import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._inductor.config
import triton
from runlora_gen.measure.modules import module_of_everything
from runlora_gen.request.workload import Workload
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.torch_version import TorchVersion
from triton.backends.compiler import GPUTarget

torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=132)
target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
triton.runtime.driver.set_active(target)
workload = Workload(device="h100", launch="graph", dtype="bf16", adapter_dtype="bf16")
module = module_of_everything(workload, Path("made"))
torch.__version__, known = TorchVersion("2.10.0"), torch.__version__
older = module_of_everything(workload, Path("older"))
torch.__version__ = known


def traced(module, tokens, rank, width=512, dynamic=False):
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        def empty(*shape):
            tensor = torch.empty(*shape, device="cuda", dtype=torch.bfloat16)
            if not dynamic:
                return tensor
            return mode.from_tensor(tensor, static_shapes=False) if shape[0] == tokens else tensor

        X, W, A, B = empty(tokens, width), empty(768, width), empty(rank, width), empty(768, rank)
        S, dY = empty(tokens, rank), empty(tokens, 768)
        calls = {
            "x_at": (lambda X, A: (module._x_at_operator(X, A, 2.0, tiles="S"),), (X, A)),
            "fused_gemm": (lambda *t: (module._fused_gemm_operator(*t, None, tiles="Y"),), (X, W, S, B)),
            "p_db": (lambda *t: module._p_db_operator(*t, 2.0, torch.bfloat16, tiles="P, dB"), (dY, B, S)),
            "pt_x": (lambda *t: (module._pt_x_operator(*t, torch.bfloat16, tiles="dA"),), (S, X)),
            "merge": (lambda W, A, B: (module._merge_operator(W, A, B, 2.0, tiles="M"),), (W, A, B)),
        }
        found = {}
        for name, (call, operands) in calls.items():
            if dynamic and name == "merge":
                continue
            graph = aot_export_joint_simple(call, operands, trace_joint=False).graph
            nodes = [node for node in graph.nodes if node.op == "call_function"]
            found[name] = [str(node.target) for node in nodes]
            for node in nodes:
                given = [v for v in node.kwargs.get("kwargs", {}).values() if isinstance(v, torch.fx.Node)]
                found[name] += ["repeated"] * (len(given) - len(set(given)))
        return found


with torch._inductor.config.patch({"triton.cudagraphs": True}):  # as with mode="reduce-overhead"
    replayed = traced(module, 256, 16)
print(json.dumps({
    "known": str(known) >= "2.11",
    "static": traced(module, 256, 16),
    "dynamic": traced(module, 257, 16, dynamic=True),
    "rank of 5": traced(module, 256, 5),
    "large": traced(module, 2**17, 16),
    "older torch": traced(older, 256, 16),
    "replayed": replayed,
}))
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        cwd=tmp_path_factory.mktemp("traced"),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout)


def operators(targets: list[str]) -> list[str]:
    return [target for target in targets if target.startswith("runlora")]


def kernels(targets: list[str]) -> list[str]:
    return [target for target in targets if target.startswith("triton_kernel_wrapper")]


@pytest.mark.parametrize("tokens", ["static", "dynamic"])
def test_no_operator_is_left(traced: Any, tokens: str) -> None:
    for name, targets in traced[tokens].items():
        assert kernels(targets) and not operators(targets), name


def test_a_launch_is_one_kernel(traced: Any) -> None:
    """So few rows leave no parts to add up."""
    counts = {name: len(kernels(targets)) for name, targets in traced["static"].items()}
    assert counts == {"x_at": 1, "fused_gemm": 1, "p_db": 1, "pt_x": 1, "merge": 1}
    # What is written comes from empty tensors, of which none is copied.
    for targets in traced["static"].values():
        assert not any("clone" in target or "copy" in target for target in targets)
        assert "repeated" not in targets  # under two names a tensor would be two


def test_ranks_whose_rows_are_apart_stay_operators(traced: Any) -> None:
    """Inductor moves rows that are apart, and a kernel would read and write beside them."""
    for name, targets in traced["rank of 5"].items():
        assert bool(operators(targets)) == (name != "merge"), name


def test_large_operands_stay_operators(traced: Any) -> None:
    """Descriptors that a kernel makes cost it time, and the launches of kernels that take long are hidden."""
    for name, targets in traced["large"].items():
        assert bool(operators(targets)) == (name != "merge"), name


def test_what_cuda_graphs_replay_stays_operators(traced: Any) -> None:
    """Launches cost the host nothing there, and descriptors of the host's the kernels nothing."""
    for name, targets in traced["replayed"].items():
        assert operators(targets) and not kernels(targets), name


def test_an_older_torch_keeps_operators(traced: Any) -> None:
    for name, targets in traced["older torch"].items():
        assert operators(targets) and not kernels(targets), name


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Of all kernels."""
    from runlora_gen.measure.modules import module_of_everything
    from runlora_gen.request.workload import Workload

    workload = Workload(launch="graph", device="h200", dtype="fp16", adapter_dtype="fp16")
    return module_of_everything(workload, tmp_path_factory.mktemp("everything") / "made")


@pytest.mark.parametrize("shape", [(70, 136, 200, 8), (33, 72, 136, 16), (300, 64, 40, 24)])
def test_descriptors_that_a_kernel_makes_give_the_same_bits(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int]
) -> None:
    T, inner, outer, R = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).half().to(DEVICE)

    X, W, A, B, S, dY = draw(T, inner), draw(outer, inner), draw(R, inner), draw(outer, R), draw(T, R), draw(T, outer)
    describing: list[bool] = []
    if DEVICE.type == "cuda":  # where kernels put what they make
        triton = pytest.importorskip("triton")
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=DEVICE))
    monkeypatch.setattr(module, "_p_db_in_one", lambda *_: False)  # which needs no descriptors

    class Describing(module._Launch):  # type: ignore[name-defined, misc]
        def __init__(self, *args: Any, **constants: Any) -> None:
            if constants.get("TMA"):
                describing.append(True)
                *args, _ = args  # type: ignore[assignment]
                constants["DESCRIBE"] = True
            super().__init__(*args, **constants)

    def results() -> list[Tensor]:
        monkeypatch.setattr(module, "_PLANS", {})
        return [
            module._launch_x_at(X, A, 0.5, "S"),
            module._launch_fused_gemm(X, W, S, B, None, "Y"),
            module._launch_fused_gemm(dY, W.t(), S, A.t(), None, "dX"),
            *module._launch_p_db(dY, B, S, 0.5, torch.float16, "P, dB"),
            module._launch_pt_x(S, X, torch.float16, "dA"),
        ]

    expected = results()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_Launch", Describing)
        made = results()
    monkeypatch.setattr(module, "_PLANS", {})
    assert len(describing) == 5
    assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))
