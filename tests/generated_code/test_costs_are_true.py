"""What the prices say is what torch counts: FLOPs, saved bytes and workspace of every program."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runlora_gen.algebra.enumerate import Program, enumerate_programs
from runlora_gen.algebra.operations import SYMBOLS
from runlora_gen.cost.device import load_device
from runlora_gen.cost.price import DTYPES, Setting, price, saved_symbols
from torch.utils.flop_counter import FlopCounterMode

PROGRAMS = enumerate_programs(("dX", "dA", "dB", "db"))
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRADIENT_OF = {"x": "dX", "lora_A": "dA", "lora_B": "dB", "bias": "db"}
#: torch's CPU allocator rounds a block up to this.
ALIGNMENT = 64


@dataclass(frozen=True)
class Case:
    """A setting, and inputs to match."""

    setting: Setting
    seed: int

    def tensors(self) -> dict[str, Any]:
        """Arguments of ``lora_linear``."""
        dims, dtype = self.setting.dims, TORCH_DTYPES[self.setting.dtype.name]
        generator = torch.Generator().manual_seed(self.seed)
        shapes = {"x": "TI", "weight": "OI", "lora_A": "RI", "lora_B": "OR", "bias": "O"}
        tensors: dict[str, Any] = {
            name: torch.randn([dims[d] for d in shape], generator=generator).to(dtype) for name, shape in shapes.items()
        }
        for name, tensor in tensors.items():
            tensor.requires_grad_(GRADIENT_OF.get(name) in self.setting.gradients)
        if not self.setting.bias:
            tensors["bias"] = None
        return tensors


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[str, ...] = ("fp32", "bf16"), smallest: int = 1, largest: int = 64) -> Case:
    size = st.integers(smallest, largest)
    bias = draw(st.booleans())
    gradients = draw(st.frozensets(st.sampled_from(["dX", "dA", "dB"] + ["db"] * bias), min_size=1))
    setting = Setting(
        tokens=draw(size),
        in_features=draw(size),
        out_features=draw(size),
        rank=draw(st.integers(1, 16)),
        dtype=DTYPES[draw(st.sampled_from(dtypes))],
        bias=bias,
        gradients=gradients,
        device=load_device("h100"),
    )
    return Case(setting, draw(st.integers(0, 2**31)))


every_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.id)
few = settings(max_examples=5, deadline=None)


@every_program
@few
@given(case=cases())
def test_flops_are_what_torch_counts(everything: ModuleType, program: Program, case: Case) -> None:
    cost = price(program, case.setting)
    tensors = case.tensors()
    with FlopCounterMode(display=False) as counter:
        output = everything.lora_linear(**tensors, scaling=0.5, variant=program.id)
        forward = counter.get_total_flops()
        output.backward(torch.randn_like(output))
    assert forward == cost.forward.flops
    assert counter.get_total_flops() - forward == cost.backward.flops


@every_program
@few
@given(case=cases())
def test_saved_bytes_are_what_torch_saves(everything: ModuleType, program: Program, case: Case) -> None:
    tensors = case.tensors()
    parameters = {t.untyped_storage().data_ptr() for name, t in tensors.items() if name != "x" and t is not None}
    packed: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        everything.lora_linear(**tensors, scaling=0.5, variant=program.id)
    activations = [tensor for tensor in packed if tensor.untyped_storage().data_ptr() not in parameters]
    assert sum(tensor.nbytes for tensor in activations) == price(program, case.setting).saved_bytes
    # Parameters that no wanted gradient reads are not saved either.
    assert len(packed) == len(saved_symbols(program, case.setting.gradients))


def _peak(run: Any) -> tuple[int, int]:
    """Peak of bytes that torch's allocator hands out while ``run`` runs, above the start, and how many blocks."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak, sum(event.nbytes() > 0 for event in events)


@every_program
@settings(max_examples=2, deadline=None)
@given(case=cases(dtypes=("fp32",), smallest=16))
def test_workspace_bounds_the_measured_peak(everything: ModuleType, program: Program, case: Case) -> None:
    cost, dims = price(program, case.setting), case.setting.dims
    tensors = case.tensors()

    def size(names: Any) -> int:
        return sum(SYMBOLS[name].numel(dims) * case.setting.dtype.bytes for name in names)

    def run() -> torch.Tensor:
        output: torch.Tensor = everything.lora_linear(**tensors, scaling=0.5, variant=program.id)
        return output

    # A forward computes what it keeps even where no wanted gradient reads it.
    kept = size(str(symbol) for symbol in program.kept)
    peak, blocks = _peak(run)
    assert peak <= size(["Y"]) + kept + cost.forward.workspace_bytes + blocks * ALIGNMENT

    output = run()
    wanted = [tensor for tensor in tensors.values() if tensor is not None and tensor.requires_grad]
    grad_output = torch.randn_like(output)
    peak, blocks = _peak(lambda: torch.autograd.grad(output, wanted, grad_output))
    returned = size(case.setting.gradients)
    assert peak <= returned + cost.backward.workspace_bytes + blocks * ALIGNMENT


def test_workspace_is_no_idle_bound(everything: ModuleType) -> None:
    """With G the largest tensor of all, the measured peak comes close to what is predicted."""
    program = next(p for p in PROGRAMS if p.id == "base_first/merged-bt_g-g_at/keep-nothing")
    setting = Setting(8, 512, 512, 4, DTYPES["fp32"], False, frozenset({"dX", "dA", "dB"}), load_device("h100"))
    tensors = Case(setting, 0).tensors()
    output = everything.lora_linear(**tensors, scaling=0.5, variant=program.id)
    wanted = [tensors["x"], tensors["lora_A"], tensors["lora_B"]]
    peak, _ = _peak(lambda: torch.autograd.grad(output, wanted, torch.ones_like(output)))
    predicted = price(program, setting).backward.workspace_bytes
    assert predicted == 512 * 512 * 4  # G and M, one after the other
    assert 0.9 * predicted < peak
