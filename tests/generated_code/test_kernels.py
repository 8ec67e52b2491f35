"""The fused kernels against float64: ragged, tiny and strided operands, poisoned outputs, equal bits on every run.

Without a GPU they run in Triton's interpreter, whose products take float16 and float32 but not bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.cost.device import DeviceProfile
from runlora_gen.cost.lower import with_kernels
from runlora_gen.kernels.fused_gemm import KERNEL as FUSED_GEMM
from runlora_gen.kernels.sites import alternatives
from runlora_gen.request.workload import Workload
from runlora_gen.search import candidates
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..poison import poisoned

pytest.importorskip("triton", minversion="3.4")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALVES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]
DTYPES = [*HALVES, torch.float32]
DESCRIPTORS = not GPU or torch.cuda.get_device_capability()[0] in (9, 10)
LAYOUTS = ["contiguous", "aligned", "padded", "transposed"]

FUSED = "fused/fused-pt_x-one_pass/keep-s"
MERGED = "merged/merged-pt_x-one_pass/keep-nothing"


def with_all_kernels(load: Any, **options: Any) -> ModuleType:
    """Every variant of a layer, with our kernels wherever one computes a product, with the table's tiles."""
    workload = Workload(adapter_dtype="bf16", launch="graph", device="h200", allow_lossy_merge=True, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceProfile, "tiles_for", lambda *args: {})
        patch.setattr(candidates, "lowered", lambda program, *_: with_kernels(program, alternatives(LINEAR, "cheaper")))
        module: ModuleType = load(workload, in_features=40, out_features=24, rank=4, all_variants=True)
    assert module.KERNELS
    return module


@pytest.fixture(scope="module")
def kernels(load: Any) -> ModuleType:
    return with_all_kernels(load)


@pytest.fixture(scope="module")
def stochastic(load: Any) -> ModuleType:
    """The same with merged weights rounded stochastically."""
    return with_all_kernels(load, merge_rounding="stochastic")


def variant(module: ModuleType, name: str) -> str:
    """The id that continues a name with the products that our kernels compute."""
    return next(id for id in module.VARIANTS if id.startswith(f"{name}/kernel-"))


def lay(values: Tensor, layout: str) -> Tensor:
    """The values in a buffer that is NaN around them."""
    rows, columns = values.shape
    nan = float("nan")
    match layout:
        case "aligned":  # rows on 16 bytes: what tensor descriptors read
            view = values.new_full((rows + 1, -(-columns // 8) * 8 + 8), nan)[:rows, :columns]
        case "padded":
            view = values.new_full((rows + 2, columns + 3), nan)[1:-1, 1 : columns + 1]
        case "transposed":
            view = values.new_full((columns, rows + 5), nan)[:, :rows].t()
        case _:
            return values
    return view.copy_(values)


def draw(seed: int, rows: int, columns: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Random values."""
    return lay(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype), layout)


def draw_all(seed: int, dtype: torch.dtype, layout: tuple[str, ...], *shapes: tuple[int, int]) -> Iterator[Tensor]:
    for i, (shape, kind) in enumerate(zip(shapes, layout, strict=True)):
        yield draw(seed + i, *shape, dtype, kind)


def check(ours: Tensor, plain: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """|ours - exact| <= 2 |plain - exact| + tiny: two ulps of the summed magnitudes, eight of float32.

    On a GPU the products of float32 are sums of three of tf32, whose operands have 22 bits together.
    """
    assert ours.shape == exact.shape and ours.dtype == plain.dtype
    error, allowed = (ours.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    ulps = 8 if ours.dtype == torch.float32 else 2
    assert error <= 2 * allowed + ulps * torch.finfo(ours.dtype).eps * magnitude.max()


@pytest.fixture
def poison() -> Iterator[None]:
    with poisoned():
        yield


class Launches(list[tuple[str, dict[str, Any]]]):
    """The kernels that ran, with their compile-time constants."""

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self]

    def paths(self, kernel: str, *constants: str) -> set[tuple[Any, ...]]:
        return {tuple(values[c] for c in constants) for name, values in self if name == kernel}


class Spy:
    """A kernel that notes its launches.

    In the interpreter, which compiles nothing, it gives something to launch again as a compiler would: it runs on what
    Triton would have compiled it for, and on nothing else.
    """

    runs = True

    def __init__(self, name: str, kernel: Any, launches: Launches) -> None:
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **constants: Any) -> Any:
            self.launches.append((self.name, constants))
            if not self.runs:
                return None
            compiled = self.kernel[grid](*args, **constants)
            return Compiled(self, compiled, args, constants)

        return launch


class Shown(Spy):
    """The same where it is put into a graph: of tensors that are none Triton compiles nothing yet."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **constants: Any) -> Any:
            self.launches.append((self.name, constants))
            return self.kernel[grid](*args, **constants)

        return launch


class Compiled:
    """What Triton compiled for some arguments, launched again."""

    def __init__(self, spy: Spy, compiled: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.spy, self.compiled, self.constants = spy, compiled, constants
        self.kinds = [*self.kinds_of(args), *(v for k, v in constants.items() if not k.startswith("num_"))]

    def kinds_of(self, args: tuple[Any, ...]) -> list[Any]:
        """What Triton looks at, of what it may specialise on."""
        names = getattr(self.spy.kernel, "arg_names", [])
        free = getattr(self.spy.kernel, "do_not_specialize", None) or ()
        return [
            kind_of(arg, specialised=name not in free)
            for name, arg in zip([*names, *[""] * len(args)][: len(args)], args, strict=True)
        ]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert len(grid) == 3

        def launch(*args: Any) -> None:
            self.spy.launches.append((self.spy.name, self.constants))
            constants = [v for k, v in self.constants.items() if not k.startswith("num_")]
            operands, given = args[: len(args) - len(constants)], list(args[len(args) - len(constants) :])
            assert [*self.kinds_of(operands), *given] == self.kinds
            (self.spy.kernel if self.compiled is None else self.compiled)[grid](*args)

        return launch


def kind_of(argument: Any, *, specialised: bool) -> Any:
    """By what Triton tells arguments apart; of a descriptor, by what its address was encoded for."""
    match argument:
        case Tensor():
            return argument.dtype, argument.data_ptr() % 16, argument.device
        case bool() | None:
            return argument
        case int():
            wide = argument >= 2**31
            return ("int", wide, argument == 1, argument % 16 == 0) if specialised else ("int", wide)
        case float():
            return "float"
        case _:
            base = argument.base
            described, of_base = (
                zip(*sides, strict=True) for sides in ((argument.shape, argument.strides), (base.shape, base.stride()))
            )
            assert sorted(described) == sorted(of_base)  # itself or transposed
            assert base.data_ptr() % 16 == 0
            return base.dtype, tuple(argument.shape), tuple(argument.strides), tuple(argument.block_shape)


@pytest.fixture
def launches(kernels: ModuleType, stochastic: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Launches:
    noted = Launches()
    for module in (kernels, stochastic):
        monkeypatch.setattr(module, "_PLANS", {})
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Spy(name[1:].removesuffix("_kernel"), value, noted))
    # What is put into a graph is the kernel itself, noted as well.
    wrap = torch.library.wrap_triton
    monkeypatch.setattr(torch.library, "wrap_triton", lambda spy: Shown(spy.name, wrap(spy.kernel), noted))
    return noted


@pytest.fixture
def resize(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the number of multiprocessors that the launches divide their work for."""

    def set_to(count: int) -> None:
        monkeypatch.setattr(kernels, "_multiprocessors", lambda device: count)
        kernels._PLANS.clear()

    return set_to


# Below, at and above the sides of tiles. A GEMM writes multiples of 8 through a tensor descriptor.
sizes = st.integers(1, 300) if GPU else st.sampled_from([1, 7, 31, 32, 33, 63, 64, 65, 100, 129, 150])
multiples_of_8 = st.integers(1, 38).map(lambda n: 8 * n) if GPU else st.sampled_from([8, 32, 64, 72, 128, 136])
# On a GPU every rank is compiled anew: a few stand for all.
ranks = st.sampled_from([1, 5, 16, 33, 128]) if GPU else st.integers(1, 70)
machines = st.sampled_from([1, 3, 4, 132])
layouts = st.sampled_from(LAYOUTS)
pairs, triples, quadruples = (st.tuples(*[layouts] * n) for n in (2, 3, 4))
seeds = st.integers(0, 2**20)
property_test = settings(max_examples=15 if GPU else 6, deadline=None)

ALIGNED, PADDED = ("aligned",) * 4, ("padded",) * 4
BOTH = {(tma, whole) for tma in {DESCRIPTORS, False} for whole in (True, False)}


@pytest.mark.parametrize(
    ("rows", "columns", "sides", "warps"),
    [
        (1024, [2048], (128, 128), 4),
        (1024, [512, 512, 1024], (128, 128), 4),
        (512, [2048], (64, 128), 4),
        (1, [4096], (64, 128), 4),
        (1024, [2176], (128, 256), 8),  # 136 halves
        (4096, [4096], (128, 256), 8),
    ],
)
def test_few_tiles_are_small(
    kernels: ModuleType,
    resize: Callable[[int], None],
    rows: int,
    columns: list[int],
    sides: tuple[int, int],
    warps: int,
) -> None:
    """So small that all processors of an H200 have some; but only where even halves of large ones leave some idle."""
    resize(132)
    for changes in ({}, {"BN": 128, "SUBTILES": 1}):  # both that are tuned
        tiles = {**FUSED_GEMM.tiles, **changes}
        chosen = kernels._of_few_tiles(tiles, rows, columns, DEVICE)
        if warps == 8:
            assert chosen == tiles
            continue
        assert (chosen["BM"], chosen["BN"]) == sides and chosen["WARPS"] == warps
        assert (chosen["PARTS"], chosen["SUBTILES"], chosen["STAGES"]) == (1, 1, tiles["STAGES"] + 1)
        count = math.ceil(rows / chosen["BM"]) * sum(math.ceil(each / chosen["BN"]) for each in columns)
        assert count <= 132


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", HALVES)
def test_fused_gemm(kernels: ModuleType, launches: Launches, resize: Callable[[int], None], dtype: torch.dtype) -> None:
    @property_test
    @example(M=260, N=504, K=70, R=5, bias=True, machine=4, layout=ALIGNED, seed=0)  # 6 tiles: the last 2 are halved
    @example(M=260, N=504, K=70, R=5, bias=True, machine=1, layout=ALIGNED, seed=0)
    @example(M=260, N=504, K=70, R=5, bias=True, machine=4, layout=PADDED, seed=0)
    @given(
        M=sizes,
        N=multiples_of_8 | sizes,
        K=sizes,
        R=ranks,
        bias=st.booleans(),
        machine=machines,
        layout=quadruples,
        seed=seeds,
    )
    def run(M: int, N: int, K: int, R: int, bias: bool, machine: int, layout: tuple[str, ...], seed: int) -> None:
        resize(machine)
        operands = tuple(draw_all(seed, dtype, layout, (M, K), (N, K), (M, R), (N, R)))
        b = draw(seed + 4, 1, N, dtype, layout[0])[0] if bias else None

        def reference(*operands: Tensor, bias: Tensor | None) -> Tensor:
            x, w, s, low = operands
            return F.linear(x, w, bias) + F.linear(s, low)

        ours = kernels._launch_fused_gemm(*operands, b, "Y")
        exact = reference(*(t.double() for t in operands), bias=None if b is None else b.double())
        magnitude = reference(*(t.double().abs() for t in operands), bias=None if b is None else b.double().abs())
        check(ours, reference(*operands, bias=b), exact, magnitude)
        assert torch.equal(ours, kernels._launch_fused_gemm(*operands, b, "Y"))

    run()
    assert launches.paths("fused_gemm", "TMA", "PARTS") == {
        (DESCRIPTORS, 2 if DESCRIPTORS else 1),
        (DESCRIPTORS, 1),
        (False, 1),
    }


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", HALVES)
def test_one_pass_for_p_and_db(
    kernels: ModuleType, launches: Launches, resize: Callable[[int], None], dtype: torch.dtype
) -> None:
    @property_test
    @example(T=1100, O=300, R=5, machine=132, layout=ALIGNED[1:], wide=False, seed=0)
    @example(T=1100, O=300, R=5, machine=132, layout=PADDED[1:], wide=False, seed=0)
    @example(T=1060, O=30, R=5, machine=1, layout=ALIGNED[1:], wide=False, seed=0)
    @example(T=1060, O=30, R=5, machine=1, layout=PADDED[1:], wide=False, seed=0)
    @example(T=1024, O=130, R=16, machine=132, layout=PADDED[1:], wide=False, seed=0)
    @given(
        T=sizes | sizes.map(lambda size: 1024 + size),
        O=sizes,
        R=ranks.filter(lambda rank: rank <= 32),
        machine=machines,
        layout=triples,
        wide=st.booleans(),
        seed=seeds,
    )
    def run(T: int, O: int, R: int, machine: int, layout: tuple[str, ...], wide: bool, seed: int) -> None:  # noqa: E741
        resize(machine)
        dY, B, S = draw_all(seed, dtype, layout, (T, O), (O, R), (T, R))
        result = torch.float32 if wide else dtype
        P, dB = kernels._launch_p_db(dY, B, S, 0.75, result, "P, dB")
        d, b, s = dY.double(), B.double(), S.double()
        check(P, 0.75 * (dY @ B), 0.75 * d @ b, d.abs() @ b.abs())
        check(dB, (dY.float().t() @ S.float()).to(result), d.t() @ s, d.t().abs() @ s.abs())
        assert kernels._tma_serves(P)
        for first, second in zip((P, dB), kernels._launch_p_db(dY, B, S, 0.75, result, "P, dB"), strict=True):
            assert torch.equal(first, second)

    run()
    assert launches.paths("p_db", "TMA", "P_WHOLE") == BOTH
    # Few rows leave nothing to add up.
    assert launches.paths("p_db_apart", "ROWS") == {(16,)}


def test_few_blocks_are_one_program_s(kernels: ModuleType, launches: Launches, resize: Callable[[int], None]) -> None:
    """However idle the machine is: to add up parts takes another launch."""
    resize(132)
    X, A, S = draw_all(0, torch.float16, ("contiguous",) * 3, (2048, 16), (4, 16), (2048, 4))
    kernels._launch_pt_x(S, X, torch.float16, "dA")
    kernels._launch_x_at(X.reshape(16, 2048), A.reshape(4, 16).repeat(1, 128), 1.0, "S")
    assert launches.names == ["pt_x", "x_at"]
    kernels._launch_pt_x(S.repeat(2, 1), X.repeat(2, 1), torch.float16, "dA")
    assert launches.names[2:] == ["pt_x", "sum_parts"]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
def test_x_at(kernels: ModuleType, launches: Launches, resize: Callable[[int], None], dtype: torch.dtype) -> None:
    @property_test
    @example(T=5, I=2100, R=5, machine=132, layout=ALIGNED[2:], seed=0)
    @example(T=5, I=2100, R=5, machine=132, layout=PADDED[2:], seed=0)
    @example(T=5, I=2100, R=5, machine=1, layout=ALIGNED[2:], seed=0)
    @example(T=5, I=2100, R=5, machine=1, layout=PADDED[2:], seed=0)
    @example(T=70, I=2048, R=16, machine=132, layout=ALIGNED[2:], seed=0)
    @given(T=sizes, I=sizes, R=ranks, machine=machines, layout=pairs, seed=seeds)
    def run(T: int, I: int, R: int, machine: int, layout: tuple[str, ...], seed: int) -> None:  # noqa: E741
        resize(machine)
        X, A = draw_all(seed, dtype, layout, (T, I), (R, I))
        S = kernels._launch_x_at(X, A, 0.75, "S")
        x, a = X.double(), A.double()
        check(S, 0.75 * (X @ A.t()), 0.75 * x @ a.t(), x.abs() @ a.t().abs())
        assert kernels._tma_serves(S)
        assert torch.equal(S, kernels._launch_x_at(X, A, 0.75, "S"))

    run()
    assert launches.paths("x_at", "TMA", "WHOLE") == BOTH


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
def test_pt_x(kernels: ModuleType, launches: Launches, resize: Callable[[int], None], dtype: torch.dtype) -> None:
    @property_test
    @example(T=2100, I=5, R=5, machine=132, layout=ALIGNED[2:], wide=False, seed=0)
    @example(T=2100, I=5, R=5, machine=132, layout=PADDED[2:], wide=False, seed=0)
    @example(T=600, I=5, R=5, machine=1, layout=ALIGNED[2:], wide=False, seed=0)
    @example(T=600, I=5, R=5, machine=1, layout=PADDED[2:], wide=False, seed=0)
    @given(T=sizes, I=sizes, R=ranks, machine=machines, layout=pairs, wide=st.booleans(), seed=seeds)
    def run(T: int, I: int, R: int, machine: int, layout: tuple[str, ...], wide: bool, seed: int) -> None:  # noqa: E741
        resize(machine)
        P, X = draw_all(seed, dtype, layout, (T, R), (T, I))
        result = torch.float32 if wide else dtype
        dA = kernels._launch_pt_x(P, X, result, "dA")
        p, x = P.double(), X.double()
        check(dA, (P.float().t() @ X.float()).to(result), p.t() @ x, p.t().abs() @ x.abs())
        assert torch.equal(dA, kernels._launch_pt_x(P, X, result, "dA"))

    run()
    assert launches.paths("pt_x", "TMA", "WHOLE") == BOTH


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge(kernels: ModuleType, dtype: torch.dtype) -> None:
    @property_test
    @given(O=sizes, I=sizes, R=ranks, layout=triples, seed=seeds)
    def run(O: int, I: int, R: int, layout: tuple[str, ...], seed: int) -> None:  # noqa: E741
        W, A, B = draw_all(seed, dtype, layout, (O, I), (R, I), (O, R))
        M = kernels._launch_merge(W, A, B, 0.75, "M")
        w, a, b = W.double(), A.double(), B.double()
        check(M, torch.addmm(W, B, A, alpha=0.75), w + 0.75 * b @ a, w.abs() + b.abs() @ a.abs())
        assert torch.equal(M, kernels._launch_merge(W, A, B, 0.75, "M"))

    run()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("machine", [1, 132], ids=["whole", "split"])
def test_wide_gradients_come_from_the_float32_sums(
    kernels: ModuleType, resize: Callable[[int], None], machine: int, dtype: torch.dtype
) -> None:
    resize(machine)
    x, p, b = draw_all(0, dtype, ("contiguous",) * 3, (600, 40), (600, 4), (40, 4))
    dA = kernels._launch_pt_x(p, x, torch.float32, "dA")
    _, dB = kernels._launch_p_db(x, b, p, 1.0, torch.float32, "P, dB")
    exact = p.double().t() @ x.double()
    lost = (exact.to(dtype).double() - exact).abs().max()  # by rounding to the operands' dtype
    for ours in (dA, dB.t()):
        assert ours.dtype == torch.float32 and (ours.double() - exact).abs().max() < lost / 100


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_in_flight_fit_the_shared_memory(
    kernels: ModuleType, launches: Launches, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(Spy, "runs", False)  # what would be launched is all that matters
    for rank in (4, 32, 64, 128):
        x, s, b = draw_all(0, dtype, ("contiguous",) * 3, (4096, 8), (4096, rank), (8, rank))
        kernels._launch_x_at(x[:64], b.t(), 1.0, "S")
        kernels._launch_pt_x(s[:64], x[:64], dtype, "dA")
        if dtype != torch.float32:
            kernels._launch_p_db(x, b, s, 1.0, dtype, "P, dB")
    assert {"x_at", "pt_x"} <= set(launches.names)
    for name, c in launches:
        if name != "sum_parts":
            # What one stage loads of x or dY and of the rank-wide operand; p_db also keeps a tile of S.
            outer, inner = {"x_at": ("BT", "BI"), "pt_x": ("BI", "BT"), "p_db": ("BT", "BO")}[name]
            elements = c["num_stages"] * (c[outer] + c["BR"]) * c[inner] + (c["BT"] * c["BR"] if name == "p_db" else 0)
            assert elements * dtype.itemsize <= 227 * 1024, (name, c)


# Stochastic rounding.

Merge = Callable[..., Tensor]
ROUNDINGS = [
    *((dtype, True) for dtype in HALVES),
    *((dtype, False) for dtype in (torch.float16, torch.bfloat16)),
]


@pytest.fixture(params=ROUNDINGS, ids=lambda p: f"{str(p[0])[6:]}-{'kernel' if p[1] else 'torch'}")
def rounding(
    request: pytest.FixtureRequest, stochastic: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.dtype, Merge]:
    """A dtype, and W, A, B, seed → M by the kernel or by torch."""
    dtype, kernel = request.param
    monkeypatch.setattr(stochastic, "KERNELS", kernel)
    return dtype, merge_of(stochastic)


def merge_of(stochastic: ModuleType) -> Merge:
    def merge(W: Tensor, A: Tensor, B: Tensor, seed: int, scaling: float = 1.0) -> Tensor:
        M: Tensor = stochastic._merge_stochastic(W, A, B, scaling, torch.tensor([seed], device=DEVICE), tiles="M")
        return M

    return merge


def exact_operands(seed: int, rows: int, columns: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """W, A and B whose merge with a scaling of 1/2 is exact in float32: of few bits, and a rank of at most 32."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(2, (rows, columns), generator=generator) * 2 - 1
    W = sign * (0.5 + 1.5 * torch.rand(rows, columns, generator=generator))
    A, B = (torch.randint(-8, 9, shape, generator=generator) * 2**-9 for shape in ((rank, columns), (rows, rank)))
    return tuple(t.to(DEVICE, dtype) for t in (W, A, B))


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between the two numbers of a dtype around each exact value."""
    info = torch.finfo(dtype)
    return torch.ldexp(torch.full_like(exact, info.eps), exact.frexp().exponent - 1).clamp(min=info.tiny * info.eps)


def assert_neighbours(M: Tensor, exact: Tensor) -> None:
    """Each element is the next number below or above the exact value, or that value."""
    step = ulp(exact, M.dtype)
    below = (exact / step).floor() * step
    above = (exact / step).ceil() * step
    assert torch.all((M.double() == below) | (M.double() == above))


@pytest.mark.usefixtures("poison")
def test_stochastic_merge_gives_a_neighbour_of_the_exact_value(rounding: tuple[torch.dtype, Merge]) -> None:
    dtype, merge = rounding

    @property_test
    @given(O=sizes, I=sizes, R=ranks.filter(lambda rank: rank <= 32), layout=triples, seed=seeds)
    def run(O: int, I: int, R: int, layout: tuple[str, ...], seed: int) -> None:  # noqa: E741
        W, A, B = (lay(t, kind) for t, kind in zip(exact_operands(seed, O, I, R, dtype), layout, strict=True))
        M = merge(W, A, B, seed, 0.5)
        assert M.dtype == dtype
        assert_neighbours(M, W.double() + 0.5 * B.double() @ A.double())
        assert torch.equal(M, merge(W, A, B, seed, 0.5))

    run()


def test_stochastic_merge_draws_new_bits_for_every_seed_and_place(rounding: tuple[torch.dtype, Merge]) -> None:
    dtype, merge = rounding
    ones = torch.ones(64, 64, dtype=dtype, device=DEVICE)
    step = torch.finfo(dtype).eps
    column, half = ones[:, :1] * 2**-6, ones[:1] * step * 2**5  # W + B A is in the middle between two numbers
    up = [merge(ones, half, column, seed) > 1 for seed in (0, 1, 2**31 - 1)]
    for first, second in [(up[0], up[1]), (up[1], up[2]), (up[0], up[0].t()), (up[0][:-1], up[0][1:])]:
        assert 0.4 < (first == second).double().mean() < 0.6


def test_stochastic_merge_keeps_small_updates_on_average(rounding: tuple[torch.dtype, Merge]) -> None:
    dtype, merge = rounding
    info = torch.finfo(dtype)
    update = torch.arange(-31, 32, device=DEVICE) / 64  # in steps between two numbers: all below one half
    p = update.double().abs()
    places = torch.randint(1, 100, (64, len(update)), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    # bfloat16 has float32's exponents: there no product gets as small as its subnormal numbers.
    for base, step in [(1, info.eps), (0, info.tiny * info.eps)][: 2 if dtype == torch.float16 else 1]:
        W = (base + places * step).to(dtype)
        A, B = (update * step * 2**10)[None].to(dtype), torch.full((64, 1), 2**-10, dtype=dtype, device=DEVICE)
        assert torch.equal(torch.addmm(W, B, A), W)  # nearest loses all of them
        moves = torch.stack([(merge(W, A, B, seed).double() - W.double()) / step for seed in range(32)])
        for mean, samples in ((moves.mean((0, 1)), moves[:, :, 0].numel()), (moves.mean(0), len(moves))):
            assert torch.all((mean - update).abs() <= 5.5 * (p * (1 - p) / samples).sqrt())


def test_stochastic_merge_leaves_what_needs_no_rounding(
    stochastic: ModuleType, rounding: tuple[torch.dtype, Merge]
) -> None:
    dtype, merge = rounding
    info = torch.finfo(dtype)
    values = [float("nan"), float("inf"), 0.0, info.max, info.tiny, info.tiny * (1 + info.eps), 1.0, 3.0]
    if dtype == torch.float16:
        values += [2.0**-24, 3 * 2.0**-24, info.tiny - 2.0**-24]
    # A NaN of all ones, as GPUs make them, plus any bits would be a zero.
    nan = torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)
    assert stochastic._rounded_stochastically(nan, torch.tensor([2**16 - 1]), dtype).isnan()
    W = torch.tensor([values, [-value for value in values]], dtype=dtype, device=DEVICE)
    A = torch.ones(1, len(values), dtype=dtype, device=DEVICE)
    for seed in range(20):
        M = merge(W, A, torch.zeros(2, 1, dtype=dtype, device=DEVICE), seed)
        torch.testing.assert_close(M, W, rtol=0, atol=0, equal_nan=True)
        M = merge(W, A, torch.ones(2, 1, dtype=dtype, device=DEVICE), seed)
        assert torch.equal(M.isnan(), W.isnan()) and torch.equal(M.isinf(), W.isinf())


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_merge_is_the_same_through_torch(
    stochastic: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    merge = merge_of(stochastic)
    exact = exact_operands(0, 70, 140, 5, dtype)
    rounded = tuple(draw_all(0, dtype, ("contiguous",) * 3, (70, 140), (5, 140), (70, 5)))
    tiny = (rounded[0] * 1e-5, rounded[1] * 1e-2, rounded[2] * 1e-2)  # subnormal in float16
    by_kernel = [merge(*operands, seed=7) for operands in (exact, rounded, tiny)]
    monkeypatch.setattr(stochastic, "KERNELS", False)
    by_torch = [merge(*operands, seed=7) for operands in (exact, rounded, tiny)]
    assert torch.equal(by_kernel[0], by_torch[0])
    for ours, theirs in zip(by_kernel, by_torch, strict=True):  # float32 sums in another order: rarely another number
        ours, theirs = ours.double(), theirs.double()
        assert (ours == theirs).double().mean() >= 0.99
        assert torch.all((ours - theirs).abs() <= ulp(torch.maximum(ours.abs(), theirs.abs()), dtype))


def test_wide_weights_merge_without_rounding(stochastic: ModuleType, launches: Launches) -> None:
    for dtype in (torch.float32, torch.float64):
        W, A, B = draw_all(0, dtype, ("contiguous",) * 3, (9, 7), (2, 7), (9, 2))
        assert torch.equal(merge_of(stochastic)(W, A, B, 0, 0.5), torch.addmm(W, B, A, alpha=0.5))
    assert not launches


def merged_weights(function: Callable[..., Tensor], W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The M of the forward and the M of the backward, by unit matrices."""
    O, I = W.shape  # noqa: E741
    x = torch.eye(I, dtype=W.dtype, device=DEVICE, requires_grad=True)
    Y = function(x, W, A, B, scaling=0.5)
    (dX,) = torch.autograd.grad(Y, x, torch.eye(I, O, dtype=W.dtype, device=DEVICE))
    return Y.detach().t(), dX[:O]


def test_backward_merges_to_the_bits_of_the_forward(
    stochastic: ModuleType, rounding: tuple[torch.dtype, Merge]
) -> None:
    dtype, _ = rounding
    W, A, B = exact_operands(0, 24, 40, 4, dtype)
    nearest = torch.addmm(W, B, A, alpha=0.5)
    exact = W.double() + 0.5 * B.double() @ A.double()
    # One for each forward and what it keeps: the backward's other products are no matter here.
    merging = {(id.split("/")[0], id.split("/")[2]): id for id in stochastic.VARIANTS if "/merged-pt_x-" in id}
    names = list(merging.values())
    assert {id.split("/")[0] for id in names} == {"base_first", "lowrank_first", "merged", "fused", "delta"}
    for name in names:
        linear = partial(stochastic.lora_linear, variant=name)
        forward, backward = merged_weights(linear, W, A, B)
        assert_neighbours(backward, exact)
        assert not torch.equal(backward, nearest) and not torch.equal(backward, merged_weights(linear, W, A, B)[1])
        if name.startswith("merged/"):
            assert torch.equal(forward, backward)


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_recomputed_forwards_merge_to_the_same_bits(stochastic: ModuleType, launches: Launches, how: str) -> None:
    linear = partial(stochastic.lora_linear, variant=variant(stochastic, MERGED))
    if how == "checkpointed":
        linear = partial(checkpoint, linear, use_reentrant=False)
    else:
        torch.compiler.reset()
        linear = torch.compile(linear, fullgraph=True, backend="aot_eager")
    forward, backward = merged_weights(linear, *exact_operands(0, 24, 40, 4, torch.float16))
    assert torch.equal(forward, backward)
    if how == "checkpointed":  # torch.compile finds that it computes M twice, and keeps it
        assert launches.names.count("merge_stochastic") == 3


# Which kernels run.


def problem(
    tokens: int, dtype: torch.dtype = torch.float16, rank: int = 4, adapter: torch.dtype | None = None
) -> dict[str, Any]:
    shapes = {"x": (tokens, 40), "weight": (24, 40), "lora_A": (rank, 40), "lora_B": (24, rank)}
    tensors = {name: draw(i, *shape, dtype) / 4 for i, (name, shape) in enumerate(shapes.items())}
    for name in ("lora_A", "lora_B"):
        tensors[name] = tensors[name].to(adapter or dtype)
    for name in ("x", "lora_A", "lora_B"):
        tensors[name].requires_grad_()
    return tensors


def step(function: Callable[..., Tensor], tensors: dict[str, Any], name: str) -> list[Tensor]:
    """The output and all gradients."""
    Y = function(**tensors, scaling=0.5, variant=name)
    dY = draw(9, *Y.shape, Y.dtype)
    return [Y.detach(), *torch.autograd.grad(Y, [t for t in tensors.values() if t.requires_grad], dY)]


def test_a_fused_step_takes_five_kernels(kernels: ModuleType, launches: Launches) -> None:
    step(kernels.lora_linear, problem(5), variant(kernels, FUSED))
    assert launches.names == ["x_at", "fused_gemm", "p_db_apart", "fused_gemm", "pt_x"]


def test_a_merged_step_takes_five_kernels(kernels: ModuleType, launches: Launches) -> None:
    step(kernels.lora_linear, problem(5), variant(kernels, MERGED))
    assert sorted(launches.names) == ["merge", "merge", "p_db_apart", "pt_x", "x_at"]


@pytest.mark.parametrize(
    ("name", "expected"), [(FUSED, ["x_at", "pt_x"]), (MERGED, ["merge", "merge", "x_at", "pt_x"])]
)
def test_float32_goes_through_the_kernels_that_take_it(
    kernels: ModuleType, launches: Launches, name: str, expected: list[str]
) -> None:
    step(kernels.lora_linear, problem(5, torch.float32), variant(kernels, name))
    assert sorted(launches.names) == sorted(expected)


@pytest.mark.parametrize("rank", [3, 5])
def test_any_rank_goes_through_tensor_descriptors(
    kernels: ModuleType, launches: Launches, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 1)
    tensors = problem(1025, rank=rank)
    step(kernels.lora_linear, tensors, variant(kernels, FUSED))
    described = [constants["TMA"] for name, constants in launches if name != "sum_parts"]
    assert described == [DESCRIPTORS] * 5
    launches.clear()
    tensors["x"] = lay(tensors["x"].detach(), "padded").requires_grad_()
    step(kernels.lora_linear, tensors, variant(kernels, FUSED))
    described = [name for name, constants in launches if constants.get("TMA")]
    assert described == ["p_db", "fused_gemm"] * DESCRIPTORS  # dY, W


@pytest.mark.parametrize(
    ("name", "tokens", "dtype", "kernels_on"),
    [
        (FUSED, 0, torch.float16, True),
        (FUSED, 5, torch.float64, True),
        (MERGED, 5, torch.float64, True),
        (FUSED, 5, torch.float16, False),
        (MERGED, 5, torch.float16, False),
    ],
    ids=["no tokens", "float64, fused", "float64, merged", "switched off, fused", "switched off, merged"],
)
def test_what_kernels_do_not_take_goes_through_torch(
    kernels: ModuleType,
    launches: Launches,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    tokens: int,
    dtype: torch.dtype,
    kernels_on: bool,
) -> None:
    monkeypatch.setattr(kernels, "KERNELS", kernels_on)
    tensors = problem(tokens, dtype)
    ours = step(kernels.lora_linear, tensors, variant(kernels, name))
    assert not launches

    def plain(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float, variant: str) -> Tensor:
        return F.linear(x, weight) + scaling * F.linear(F.linear(x, lora_A), lora_B)

    for result, expected in zip(ours, step(plain, tensors, ""), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)


def test_a_strided_bias_is_copied_alone(kernels: ModuleType) -> None:
    x, w, s, b = draw_all(0, torch.float16, ALIGNED, (40, 64), (72, 64), (40, 8), (72, 8))
    bias = draw(7, 1, 144, torch.float16)[0]
    strided = kernels._launch_fused_gemm(x, w, s, b, bias[::2], "Y")
    assert torch.equal(strided, kernels._launch_fused_gemm(x, w, s, b, bias[::2].contiguous(), "Y"))


def test_dtensors_go_through_torch(kernels: ModuleType) -> None:
    """Their strides are those of the whole, and their memory that of a part."""
    matrix = torch.zeros(8, 8, dtype=torch.float16, device="cuda" if GPU else "cpu")
    assert kernels._kernels_serve(matrix)

    class Part(Tensor):
        device_mesh = None

    part = matrix.as_subclass(Part)
    assert not kernels._kernels_serve(matrix, part)
    with pytest.MonkeyPatch.context() as patch:  # the compiler shows its own tensors as plain ones
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not kernels._kernels_serve(matrix, part) and kernels._kernels_serve(matrix)


def test_offsets_beyond_32_bits_go_through_torch(kernels: ModuleType) -> None:
    def matrix(*shape: int, strides: tuple[int, int]) -> Tensor:
        return torch.empty(1, dtype=torch.float16, device="meta").as_strided(shape, strides)

    def serve(*shape: int, strides: tuple[int, int]) -> bool:
        return bool(kernels._kernels_serve(matrix(*shape, strides=strides)))

    if not GPU:  # on a GPU a meta tensor is refused for its device already
        assert serve(2, 8, strides=(2**30, 1)) and not serve(2, 8, strides=(2**31, 1))
    assert not serve(2**16, 2**15, strides=(2**15, 1))
    assert not serve(2**16, 2**15, strides=(0, 0))  # as of sum().backward(): a copy would be that large
    operands = (matrix(rows, 8, strides=(8, 1)) for rows in (2**16, 2**15, 2**16, 2**15))
    assert kernels._fused_gemm(*operands, None, tiles="Y").numel() == 2**31


def test_rows_that_overlap_or_are_not_contiguous_are_copied(kernels: ModuleType) -> None:
    """A GPU's tensor descriptors take no rows that overlap, such as the gradient of a sum over the tokens has."""
    whole = torch.arange(96.0).view(8, 12)
    for matrix in (whole, whole[:, 1:9]):
        (itself,) = kernels._with_rows(matrix)
        assert itself is matrix and kernels._has_rows(matrix)
    # Of one row or one column torch ignores the stride.
    for matrix in (
        whole[0].expand(5, 12),
        whole.t(),
        whole[:, ::2],
        whole[:, :1].t(),
        whole.as_strided((1, 8), (1, 1)),
    ):
        (copied,) = kernels._with_rows(matrix)
        assert not kernels._has_rows(matrix) and kernels._has_rows(copied) and torch.equal(copied, matrix)


@pytest.mark.parametrize("name", [FUSED, MERGED])
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [(torch.float16, torch.float16), (torch.float16, torch.float32), (torch.float32, torch.float32)],
    ids=["float16", "float32 adapters", "float32"],
)
def test_compile_goes_through_the_operators(
    kernels: ModuleType, launches: Launches, name: str, dtype: torch.dtype, adapter: torch.dtype
) -> None:
    torch.compiler.reset()
    compiled = torch.compile(kernels.lora_linear, fullgraph=True, backend="aot_eager")
    for tokens in (6, 9):  # the second number is compiled as an unknown
        tensors = problem(tokens, dtype, rank=3, adapter=adapter)
        expected = step(kernels.lora_linear, tensors, variant(kernels, name))
        in_eager = set(launches.names)
        launches.clear()
        ours = step(compiled, tensors, variant(kernels, name))
        assert [t.dtype for t in ours] == [dtype, dtype, adapter, adapter]
        assert set(launches.names) == in_eager
        launches.clear()
        torch.testing.assert_close(ours, expected)


@pytest.mark.skipif(not GPU, reason="in the interpreter a graph has no kernels")
@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # torch's own, as it begins
def test_what_cuda_graphs_replay_has_operators(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, replayed: bool
) -> None:
    """Their kernels have descriptors of the host's, which it makes once."""
    shown, wrap = [], torch.library.wrap_triton
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: (shown.append(kernel), wrap(kernel))[1])
    torch.compiler.reset()
    mode = "reduce-overhead" if replayed else None
    compiled = torch.compile(kernels.lora_linear, fullgraph=True, mode=mode)
    tensors = problem(64, torch.float16, rank=16, adapter=torch.float16)
    expected = step(kernels.lora_linear, tensors, variant(kernels, FUSED))
    for _ in range(3):  # warm up, record, replay
        torch.compiler.cudagraph_mark_step_begin()
        found = step(compiled, tensors, variant(kernels, FUSED))
        torch.testing.assert_close([tensor.clone() for tensor in found], expected)
    assert bool(shown) != replayed


def test_operators_are_well_formed(kernels: ModuleType, stochastic: ModuleType) -> None:
    x, w, s, b, a = (draw(i, *shape, torch.float16) for i, shape in enumerate([(5, 8), (6, 8), (5, 2), (6, 2), (2, 8)]))
    torch.library.opcheck(kernels._fused_gemm_operator, (x, w, s, b, None), {"tiles": "Y"})
    torch.library.opcheck(kernels._fused_gemm_operator, (x, w, s, b, draw(9, 1, 6, torch.float16)[0]), {"tiles": "Y"})
    torch.library.opcheck(kernels._x_at_operator, (x, a, 0.5), {"tiles": "S"})
    torch.library.opcheck(kernels._merge_operator, (w, a, b, 0.5), {"tiles": "M"})
    torch.library.opcheck(
        stochastic._merge_stochastic_operator, (w, a, b, 0.5, torch.tensor([3], device=DEVICE)), {"tiles": "M"}
    )
    for dtype in (torch.float16, torch.float32):
        torch.library.opcheck(kernels._pt_x_operator, (s, x, dtype), {"tiles": "dA"})
        torch.library.opcheck(kernels._p_db_operator, (x, a.t(), s, 0.5, dtype), {"tiles": "P, dB"})
