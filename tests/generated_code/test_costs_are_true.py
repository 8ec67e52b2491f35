"""What the prices say is what torch counts: FLOPs, launches, saved bytes and workspace of every phase of every program.

A program's costs are those of its forward and of its backward, so programs that together hold every phase stand for all
of them. Those with kernels run the same products through torch here: they are counted in ``test_kernels.py``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runlora_gen.algebra.derivation import CAST_ADAPTER, NO_FACTS
from runlora_gen.algebra.enumerate import Phase, Program, enumerate_programs, pair
from runlora_gen.algebra.experts import OF_EXPERTS
from runlora_gen.algebra.linear import DROPPED, LINEAR
from runlora_gen.algebra.liveness import saved_activations, saved_symbols
from runlora_gen.algebra.mlp import OF_MLPS
from runlora_gen.algebra.operations import Convert, Fused, Operation
from runlora_gen.cost.device import load_device
from runlora_gen.cost.measured import setting_at
from runlora_gen.cost.price import price
from runlora_gen.cost.roofline import roofline
from runlora_gen.cost.setting import DTYPES, Setting
from runlora_gen.kernels.registry import KERNELS
from runlora_gen.kernels.sites import WORKS, operations_of
from runlora_gen.measure.problem import TORCH_DTYPES
from runlora_gen.request.workload import Workload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

GRADIENT_OF = {"x": "dX", "lora_A": "dA", "lora_B": "dB", "bias": "db"}
#: torch's CPU allocator rounds a block up to this.
ALIGNMENT = 64


def covering(programs: Sequence[Program]) -> Iterator[Program]:
    """Programs that together hold every two ways that some phase has side by side."""

    def pairs(program: Program) -> set[frozenset[Any]]:
        phases = (program.forward.ways, program.backward.ways)
        return {frozenset(pair) for ways in phases for pair in itertools.combinations_with_replacement(ways, 2)}

    held = {program: pairs(program) for program in programs}
    missing = set().union(*held.values())
    while missing:
        best = max(programs, key=lambda program: len(held[program] & missing))
        missing -= held[best]
        yield best


def every_phase(programs: Sequence[Program]) -> Iterator[Program]:
    """Programs that together hold every forward and every backward."""
    by_kept: dict[Any, tuple[dict[Phase, None], dict[Phase, None]]] = {}
    for program in programs:
        forwards, backwards = by_kept.setdefault(program.kept, ({}, {}))
        forwards[program.forward] = backwards[program.backward] = None
    for forwards, backwards in by_kept.values():
        count = max(len(forwards), len(backwards))
        both = (itertools.islice(itertools.cycle(phases), count) for phases in (forwards, backwards))
        yield from itertools.starmap(pair, zip(*both, strict=True))


FACTS = {False: NO_FACTS, True: frozenset({CAST_ADAPTER})}


def enumerated(casts: bool) -> tuple[Program, ...]:
    return enumerate_programs(LINEAR, ("dX", "dA", "dB", "db"), table=LINEAR.rows(lambda _: False), facts=FACTS[casts])


#: Whether the adapter has a dtype of its own, and a program: that multiplies programs by four and changes none of them.
PROGRAMS = [
    *((False, program) for program in every_phase(enumerated(False))),
    *((True, program) for program in covering(enumerated(True))),
]
every_program = pytest.mark.parametrize(
    ("casts", "program"), PROGRAMS, ids=[f"{'casts' if casts else 'same'}-{p.id}" for casts, p in PROGRAMS]
)


@pytest.fixture(scope="module")
def module_of(load: Callable[..., ModuleType]) -> Callable[[bool], ModuleType]:
    """Every variant in plain torch, of an adapter in the activations' dtype or in its own."""
    made = {
        casts: load(Workload(kernels=False, adapter_dtype="fp32" if casts else "bf16"), all_variants=True)
        for casts in (False, True)
    }
    return made.__getitem__


@dataclass(frozen=True)
class Case:
    """A setting, and inputs to match."""

    setting: Setting
    seed: int

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # a device profile fills screens
        printer.text(f"Case({self.setting.dims}, {self.setting.dtype.name}, {sorted(self.setting.gradients)})")

    def tensors(self) -> dict[str, Any]:
        """Arguments of ``lora_linear``."""
        setting, generator = self.setting, torch.Generator().manual_seed(self.seed)
        shapes = {"x": "TI", "weight": "OI", "lora_A": "RI", "lora_B": "OR", "bias": "O"}
        tensors: dict[str, Any] = {
            name: torch.randn([setting.dims[d] for d in shape], generator=generator).to(dtype_of(setting, name))
            for name, shape in shapes.items()
        }
        for name, tensor in tensors.items():
            tensor.requires_grad_(GRADIENT_OF.get(name) in setting.gradients)
        if not setting.bias:
            tensors["bias"] = None
        return tensors


def dtype_of(setting: Setting, name: str) -> torch.dtype:
    return TORCH_DTYPES[(setting.adapter_dtype if name.startswith("lora") else setting.dtype).name]


@st.composite
def cases(draw: st.DrawFn, casts: bool, dtypes: tuple[str, ...] = ("fp32", "bf16"), smallest: int = 1) -> Case:
    size = st.integers(smallest, 64)
    bias = draw(st.booleans())
    gradients = draw(st.frozensets(st.sampled_from(["dX", "dA", "dB"] + ["db"] * bias), min_size=1))
    dtype = "bf16" if casts else draw(st.sampled_from(dtypes))
    setting = Setting(
        tokens=draw(size),
        in_features=draw(size),
        out_features=draw(size),
        rank=draw(st.integers(1, 16)),
        dtype=DTYPES[dtype],
        adapter_dtype=DTYPES["fp32" if casts else dtype],
        bias=bias,
        gradients=gradients,
        device=load_device("h100"),
    )
    return Case(setting, draw(st.integers(0, 2**31)))


@every_program
def test_flops_and_saved_bytes_are_what_torch_counts(
    module_of: Callable[[bool], ModuleType], casts: bool, program: Program
) -> None:
    module = module_of(casts)

    @settings(max_examples=5, deadline=None)
    @given(case=cases(casts))
    def run(case: Case) -> None:
        cost, tensors = price(program, case.setting), case.tensors()
        parameters = {t.untyped_storage().data_ptr() for name, t in tensors.items() if name != "x" and t is not None}
        packed: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            packed.append(tensor)
            return tensor

        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = module.lora_linear(**tensors, scaling=0.5, variant=program.id)
            forward = counter.get_total_flops()
            output.backward(torch.randn_like(output))
        assert forward == cost.forward.flops
        assert counter.get_total_flops() - forward == cost.backward.flops
        activations = [tensor for tensor in packed if tensor.untyped_storage().data_ptr() not in parameters]
        assert sum(tensor.nbytes for tensor in activations) == cost.saved_bytes
        assert len(activations) == len(saved_activations(program, case.setting.gradients))
        # Parameters that no wanted gradient reads are not saved either.
        assert len(packed) == len(saved_symbols(program, case.setting.gradients))

    run()


def test_fp32_adapters_keep_their_casts(module_of: Callable[[bool], ModuleType]) -> None:
    """By hand: X, S and both casts in two bytes, and not one byte less."""
    program = next(p for p in enumerated(True) if p.id.endswith("-pt_x-dyt_s/keep-s-a-b"))
    setting = Setting(
        16, 32, 48, 8, DTYPES["bf16"], DTYPES["fp32"], False, frozenset({"dX", "dA", "dB"}), load_device("h100")
    )
    assert price(program, setting).saved_bytes == 2 * (16 * 32 + 16 * 8 + 8 * 32 + 48 * 8)


class Launches(TorchDispatchMode):
    """Counts the operators that launch something: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or "empty" in str(func) or "detach" in str(func))
        return func(*args, **(kwargs or {}))


@every_program
def test_launches_are_the_operators_that_run(
    module_of: Callable[[bool], ModuleType], monkeypatch: pytest.MonkeyPatch, casts: bool, program: Program
) -> None:
    module = module_of(casts)
    real, launches = module._mm_as, Launches()

    def mm_as(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, scaling: float = 1.0) -> torch.Tensor:
        """As on a GPU, which writes a product in a wider dtype at once, and scales it by itself."""
        before = launches.count
        result: torch.Tensor = real(left, right, dtype, scaling)
        if dtype.itemsize > left.itemsize:
            launches.count = before + 1 + (scaling != 1)
        return result

    monkeypatch.setattr(module, "_mm_as", mm_as)

    @settings(max_examples=3, deadline=None)
    @given(case=cases(casts))
    def run(case: Case) -> None:
        cost, tensors = price(program, case.setting), case.tensors()
        launches.count = 0
        with launches:
            output = module.lora_linear(**tensors, scaling=0.5, variant=program.id)
            forward = launches.count
        grad_output = torch.randn_like(output)
        wanted = [tensor for tensor in tensors.values() if tensor is not None and tensor.requires_grad]
        with launches:
            torch.autograd.grad(output, wanted, grad_output)
        assert (forward, launches.count - forward) == (cost.forward.launches, cost.backward.launches)

    run()


def test_a_gpu_counts_the_launches_and_the_bytes_that_are_priced() -> None:
    """The counters of an H100: launches, where a library splits none; the fewest bytes, but for large products.

    Those read their operands once a band of tiles, more than once, which their arithmetic hides.
    """
    (path,) = (Path(__file__).parents[2] / "tools" / "results").glob("traffic_*.json")
    data = json.loads(path.read_text(encoding="utf-8"))

    def printed(operation: Operation) -> str:
        return f"{operation.kernel}: {operation.formula}" if isinstance(operation, Fused) else operation.formula

    others = {op for site in (*OF_EXPERTS, *OF_MLPS) for op in operations_of(site)} - {*operations_of(DROPPED)}
    operations = {
        printed(operation): operation
        for operation in WORKS.values()
        if not isinstance(operation, Convert)
        and operation not in others
        and not (isinstance(operation, Fused) and KERNELS[operation.kernel].float8)
    }
    not_counted = {
        "merge_stochastic: M = W + s B A",
        "K = draw(dropout)",
        "H = drop(X, K)",
        "x_at_dropped: K = draw(seed), H = drop(X, K), S = s H Aᵀ",
        "dx_da: K = draw(seed), H = drop(X, K), dA = Pᵀ H, dH = P A, dX = drop(dH, K) + dY W",
        "dequantize: W = dequantize(Q)",
        "dequantize_merged: W = dequantize(Q), M = W + s B A",
        "rescale: W = rescale(Q)",
        "rescale_merged: W = rescale(Q), M = W + s B A",
    }
    assert operations.keys() - {row["operation"] for row in data["rows"]} == not_counted
    setting = setting_at(data["at"], DTYPES[data["dtype"]], load_device("h100"))
    for row in data["rows"]:
        operation, counted = operations[row["operation"]], row["counted"]
        priced = roofline(operation, setting)
        split = operation.outputs[0].store == "adapter" and not row["kernel"]
        assert priced.launches <= counted["launches"] <= priced.launches + split, row["operation"]
        moved = (counted["read"] + counted["written"]) / priced.bytes_moved
        if priced.flops / setting.device.flops_per_s["bf16"] > priced.bytes_moved / setting.device.bytes_per_s:
            assert 1 < moved < 4, row["operation"]
        else:  # part of a small result is still in the cache when its kernel ends
            assert 0.35 < moved < 1.25, row["operation"]
            if priced.launches == 1:  # with two the first writes partial sums
                assert counted["read"] < 1.02 * priced.bytes_moved, row["operation"]


def _peak(run: Any) -> tuple[int, int]:
    """Peak of bytes that torch's allocator hands out while ``run`` runs, above the start, and how many blocks."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with pytest.MonkeyPatch.context() as patch, profile as profiler:
        # oneDNN, which multiplies 16 bits on some CPUs, has room of its own for a product. All of its flags, put back
        # together, warn of TF32.
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        result = run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak, sum(event.nbytes() > 0 for event in events)


@every_program
def test_workspace_bounds_the_measured_peak(
    module_of: Callable[[bool], ModuleType], casts: bool, program: Program
) -> None:
    module = module_of(casts)

    @settings(max_examples=2, deadline=None)
    @given(case=cases(casts, dtypes=("fp32",), smallest=16))
    def run(case: Case) -> None:
        setting, cost, tensors = case.setting, price(program, case.setting), case.tensors()

        def size(names: Any) -> int:
            return sum(setting.bytes_of(LINEAR[name]) for name in names)

        def forward() -> torch.Tensor:
            output: torch.Tensor = module.lora_linear(**tensors, scaling=0.5, variant=program.id)
            return output

        # A forward computes what it keeps even where no wanted gradient reads it.
        kept = size(str(symbol) for symbol in program.kept)
        peak, blocks = _peak(forward)
        assert peak <= size(["Y"]) + kept + cost.forward.workspace_bytes + blocks * ALIGNMENT
        if casts:  # a CPU writes no product in a wider dtype than its factors': it casts blocks of them
            return
        output = forward()
        wanted = [tensor for tensor in tensors.values() if tensor is not None and tensor.requires_grad]
        grad_output = torch.randn_like(output)
        peak, blocks = _peak(lambda: torch.autograd.grad(output, wanted, grad_output))
        returned = size(setting.gradients)
        assert peak <= returned + cost.backward.workspace_bytes + blocks * ALIGNMENT

    run()


def test_workspace_is_no_idle_bound(module_of: Callable[[bool], ModuleType]) -> None:
    """With G the largest tensor of all, the measured peak comes close to what is predicted."""
    module = module_of(False)
    name = "base_first/merged-bt_g-g_at/keep-nothing"
    program = next(p for p in enumerated(False) if p.id == name)
    wanted_gradients, fp32 = frozenset({"dX", "dA", "dB"}), DTYPES["fp32"]
    setting = Setting(8, 512, 512, 4, fp32, fp32, False, wanted_gradients, load_device("h100"))
    tensors = Case(setting, 0).tensors()
    output = module.lora_linear(**tensors, scaling=0.5, variant=program.id)
    wanted = [tensors["x"], tensors["lora_A"], tensors["lora_B"]]
    peak, _ = _peak(lambda: torch.autograd.grad(output, wanted, torch.ones_like(output)))
    predicted = price(program, setting).backward.workspace_bytes
    assert predicted == 512 * 512 * 4  # G and M, one after the other
    assert 0.9 * predicted < peak
