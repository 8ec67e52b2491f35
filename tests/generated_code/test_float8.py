"""Products of float8: modules that have them on a CPU, and each of their kernels against torch.

Without a GPU the kernels run in Triton's interpreter, which takes float16 and float32 but not bfloat16: what is of
bfloat16 here is torch's, as on a GPU that multiplies no float8.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runlora_gen.request.workload import Workload
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .test_kernels import draw, lay

pytest.importorskip("triton", minversion="3.4")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
HALF = torch.bfloat16 if GPU else torch.float16
E4M3 = torch.float8_e4m3fn
NAN, INF = float("nan"), float("inf")
GRADIENTS = ("x", "lora_A", "lora_B", "bias")
WISHES = [wish for count in range(1, 5) for wish in itertools.combinations(GRADIENTS, count)]
#: Below, at and above the sides of tiles; odd ones, of whose rows none but the first starts on 16 bytes.
SHAPES = [(1, 2), (7, 9), (33, 62), (24, 40), (64, 64), (17, 512), (40, 513)]
LAYOUTS = ["contiguous", "aligned", "padded", "transposed"]

few = settings(max_examples=20 if GPU else 6, deadline=None)
shapes, layouts, scales_of = st.sampled_from(SHAPES), st.sampled_from(LAYOUTS), st.sampled_from(["rows", "one", "none"])
every_module = pytest.mark.parametrize("name", ["plain", "dropped"])


@pytest.fixture(scope="module")
def modules(load: Any, multiplies_float8: Path) -> dict[str, ModuleType]:
    """Those that are chosen for many tokens, without dropout and with it: their one program is of float8."""
    made = {}
    for name, dropout in (("plain", 0.0), ("dropped", 0.25)):
        workload = Workload(base="fp8", device=str(multiplies_float8), launch="graph", tokens=(8192,), dropout=dropout)
        made[name] = load(workload, in_features=4096, out_features=4096, rank=8)
        (variant,) = made[name].VARIANTS
        assert made[name].KERNELS and [part[:6] == "float8" for part in variant.split("/")[:2]] == [True, not dropout]
    return made


@pytest.fixture(scope="module")
def module(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["plain"]


@pytest.fixture(scope="module", autouse=True)
def _mended() -> Iterator[None]:
    """Triton's interpreter loses the carry of what rounds up to a power of two of float8: let it round as torch."""
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            from triton.runtime import interpreter

            convert = interpreter._convert_float

            def converted(values: Any, given: Any, wanted: Any, rounding: Any) -> Any:
                if (str(given), str(wanted)) != ("fp32", "fp8e4nv"):
                    return convert(values, given, wanted, rounding)
                return torch.from_numpy(values.view("float32").copy()).to(E4M3).view(torch.uint8).numpy()

            patch.setattr(interpreter, "_convert_float", converted)
        yield


@pytest.fixture(params=["torch", "kernels"])
def path(request: pytest.FixtureRequest, modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes: torch alone, or our kernels wherever they serve."""
    for each in modules.values():
        monkeypatch.setattr(each, "KERNELS", request.param == "kernels")
    return str(request.param)


def coded(module: ModuleType, shape: tuple[int, int], dtype: torch.dtype, scales: str = "rows", seed: int = 1) -> Any:
    """Codes of normal values, with a scale for each row or one for all, or with none that is told."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(shape, generator=generator).mul(64).to(E4M3)
    count = shape[0] if scales == "rows" else 1
    scale = (torch.rand(count, 1, generator=generator) + 0.5) / 64 / shape[1] ** 0.5
    block = (1 if scales == "rows" else shape[0], shape[1])
    return module.Quantized(codes.to(DEVICE), scale.to(DEVICE), block, 1.0, dtype)


def drops(module: ModuleType) -> bool:
    """Whether its adapter reads what dropout leaves."""
    return "dropout" in inspect.signature(module.lora_linear).parameters


class Problem:
    """Operands of a linear, and the gradient of its output."""

    def __init__(
        self,
        module: ModuleType,
        *leading: int,
        dtype: torch.dtype = torch.bfloat16,
        adapter: torch.dtype | None = None,
        sides: tuple[int, int] = (64, 48),
        rank: int = 4,
        scales: str = "rows",
    ) -> None:
        self.module, (fan_in, fan_out) = module, sides
        self.Q = coded(module, (fan_out, fan_in), dtype, scales)
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*shape, generator=generator) * std).to(DEVICE, dtype)

        self.leaves = {
            "x": normal(*leading, fan_in),
            "lora_A": normal(rank, fan_in, std=fan_in**-0.5, dtype=adapter or dtype),
            "lora_B": normal(fan_out, rank, std=0.5, dtype=adapter or dtype),
            "bias": normal(fan_out, std=0.5),
        }
        self.dY = normal(*leading, fan_out)

    def run(self, wanted: tuple[str, ...] = GRADIENTS, function: Any = None, **changed: Tensor) -> dict[str, Tensor]:
        """Output and gradients; ``function``: that is called in the place of the module's."""
        given = {**self.leaves, **changed}
        # Views stay as they are laid out.
        leaves = {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in given.items()}
        options = {"dropout": 0.25} if drops(self.module) else {}
        torch.manual_seed(7)
        x, *rest = leaves.values()
        called = function or self.module.lora_linear
        Y = called(x, self.Q, *rest, scaling=0.5, **options)
        found = {"Y": Y.detach()}
        if wanted:
            gradients = torch.autograd.grad(Y, [leaves[name] for name in wanted], self.dY)
            found |= dict(zip(wanted, gradients, strict=True))
        return found

    def exact(self) -> dict[str, Tensor]:
        """The same in float64, of nothing that is rounded but what the operands are stored in."""
        W = (self.Q.codes.double() * self.Q.scale.double()).to(DEVICE)
        leaves = {name: leaf.double().requires_grad_() for name, leaf in self.leaves.items()}
        x, A, B, bias = leaves.values()
        Y = F.linear(x, W, bias) + 0.5 * F.linear(F.linear(x, A), B)
        gradients = torch.autograd.grad(Y, [*leaves.values()], self.dY.double())
        return {"Y": Y.detach(), **dict(zip(leaves, gradients, strict=True))}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal to the bit, of one dtype."""
    assert first.keys() == second.keys()
    assert {n: t.dtype for n, t in first.items()} == {n: t.dtype for n, t in second.items()}
    assert not [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for the order in which products were added up: to a place of the largest, in what P and S are in."""
    for name, tensor in found.items():
        places = expected[name].abs().max().item() * max(torch.finfo(t.dtype).eps for t in (tensor, found["Y"]))
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=places)


def off(found: Tensor, exact: Tensor) -> float:
    """The relative root mean square of an error."""
    return float((found.double() - exact).norm() / exact.norm())


# How exact they are


@pytest.mark.parametrize("scales", ["rows", "one"])
@pytest.mark.parametrize(
    ("dtype", "adapter", "gradients"),
    [
        (torch.bfloat16, torch.bfloat16, 5e-3),
        (torch.bfloat16, torch.float32, 5e-3),
        (torch.float16, torch.float16, 1e-3),
        (torch.float32, torch.float32, 1e-6),
    ],
    ids=str,
)
def test_they_are_off_by_what_rounding_to_float8_takes(
    module: ModuleType, dtype: torch.dtype, adapter: torch.dtype, gradients: float, scales: str
) -> None:
    """2.65e-2 of normal values, of the large products alone: the factors' gradients read X and dY as they are."""
    problem = Problem(module, 256, dtype=dtype, adapter=adapter, sides=(256, 192), rank=8, scales=scales)
    found, exact = problem.run(), problem.exact()
    errors = {name: off(found[name], exact[name]) for name in exact}
    assert 0.01 < errors["Y"] < 0.03 and 0.01 < errors["x"] < 0.03, errors
    assert max(errors["lora_A"], errors["lora_B"], errors["bias"]) < gradients, errors
    assert {name: tensor.dtype for name, tensor in found.items() if "lora" in name} == {
        "lora_A": adapter,
        "lora_B": adapter,
    }


def test_normal_rows_lose_as_much_as_is_said(module: ModuleType) -> None:
    X = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    Xq = module._quantized(X, module._largest_of(X))
    assert off(Xq.codes.float() * Xq.scale, X.double()) == pytest.approx(2.65e-2, rel=0.03)
    # The largest of each row is a code's largest, so that it is lost nothing of.
    assert (Xq.codes.float().abs().amax(1) == 448).all()


def test_under_dropout_the_forward_alone_is_of_float8(modules: dict[str, ModuleType]) -> None:
    """In dX the weight is that of the codes, as exact as it is anywhere."""
    module, plain = modules["dropped"], Problem(modules["plain"], 128, dtype=torch.float32, sides=(128, 96))
    problem, exact = Problem(module, 128, dtype=torch.float32, sides=(128, 96)), plain.exact()
    x, *rest = (leaf.clone().requires_grad_() for leaf in problem.leaves.values())
    Y = module.lora_linear(x, problem.Q, *rest, scaling=0.5, dropout=0.0)
    (dX,) = torch.autograd.grad(Y, [x], problem.dY)
    assert 0.01 < off(Y.detach(), exact["Y"]) < 0.03 and off(dX, exact["x"]) < 1e-6
    dropped = problem.run()
    assert not torch.equal(dropped["Y"], Y) and not torch.equal(dropped["x"], dX), "a quarter is dropped"
    same(problem.run(), dropped)


# What is wanted of a backward


@pytest.mark.parametrize("wish", WISHES, ids="+".join)
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32], ids=["same", "wide"])
def test_each_gradient_is_what_it_is_beside_all(
    module: ModuleType, wish: tuple[str, ...], adapter: torch.dtype
) -> None:
    """One kernel of three results where all three are wanted; else each by itself, and each only where it is read."""
    problem = Problem(module, 5, 3, adapter=adapter)
    every, found = problem.run(), problem.run(wish)
    assert found.keys() == {"Y", *wish}
    if GPU:  # by kernels there: one of three results adds up in another order than one of one
        close(found, every)
    else:
        same(found, {name: every[name] for name in found})


@pytest.mark.parametrize("wish", WISHES, ids="+".join)
def test_each_gradient_beside_the_kernel_s(module: ModuleType, wish: tuple[str, ...]) -> None:
    problem = Problem(module, 33, dtype=HALF)
    every, found = problem.run(), problem.run(wish)
    assert found.keys() == {"Y", *wish}
    close(found, every)


def test_nothing_is_computed_that_is_not_wanted(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest magnitudes of dY, its codes and the transposed ones are dX's alone."""
    called: list[str] = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            called.append(name)
            return real(*args, **options)

        return call

    for name in ("_p_db_largest", "_largest_of", "_quantize", "_transpose", "_fused_gemm_8", "_mm_as", "_scaled_mm"):
        monkeypatch.setattr(module, name, noted(name, vars(module)[name]))
    problem = Problem(module, 8)
    problem.run(())
    forward = len(called)
    expected = {
        ("lora_B",): {"_mm_as"},
        ("lora_A",): {"_scaled_mm", "_mm_as"},
        ("bias",): set(),
        ("x",): {"_scaled_mm", "_largest_of", "_quantize", "_transpose", "_fused_gemm_8"},
        ("lora_A", "lora_B"): {"_scaled_mm", "_mm_as"},
    }
    for wish, names in expected.items():
        called.clear()
        problem.run(wish)
        assert set(called[forward:]) == names, wish


# Odd operands


def test_rows_of_zeros_stay_zeros(modules: dict[str, ModuleType], path: str) -> None:
    dtype = HALF if path == "kernels" else torch.bfloat16
    problem = Problem(modules["plain"], 6, dtype=dtype)
    x, dY = problem.leaves["x"].clone(), problem.dY.clone()
    x[2], dY[2], x[4], dY[5] = 0, 0, 0, 0
    problem.dY = dY
    found = problem.run(x=x)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert torch.equal(found["Y"][2], problem.leaves["bias"]) and not found["x"][2].any() and not found["x"][5].any()
    others = Problem(modules["plain"], 6, dtype=dtype).run()
    assert torch.equal(found["Y"][0], others["Y"][0]) and torch.equal(found["x"][0], others["x"][0])
    nothing = problem.run(x=torch.zeros_like(x))
    assert torch.equal(nothing["Y"], problem.leaves["bias"].expand(6, -1))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_what_is_no_number_is_not_lost(modules: dict[str, ModuleType], path: str, value: float) -> None:
    """In X or in dY it makes its own row's results no numbers, whatever the largest is then; and no other row's."""
    problem = Problem(modules["plain"], 6, dtype=HALF if path == "kernels" else torch.bfloat16)
    clean = problem.run()
    x, problem.dY = problem.leaves["x"].clone(), problem.dY.clone()
    x[2, 5] = problem.dY[3, 7] = value
    found = problem.run(x=x)
    for name, row in (("Y", 2), ("x", 3)):
        assert not found[name][row].isfinite().any(), name
        others = [i for i in range(6) if i != row]
        assert torch.equal(found[name][others], clean[name][others]), name
    assert not found["lora_A"].isfinite().all() and not found["lora_B"].isfinite().all()


@every_module
@pytest.mark.parametrize("leading", [(1,), (0,), (2, 0), (2, 3, 1), (3, 7)], ids=str)
def test_few_tokens_and_none(modules: dict[str, ModuleType], path: str, name: str, leading: tuple[int, ...]) -> None:
    problem = Problem(modules[name], *leading, dtype=HALF if path == "kernels" else torch.bfloat16)
    found = problem.run()
    assert found["Y"].shape == (*leading, 48) and found["x"].shape == (*leading, 64)
    assert all(tensor.isfinite().all() for tensor in found.values())
    if 0 in leading:
        assert not any(found[gradient].any() for gradient in ("lora_A", "lora_B", "bias"))
    else:
        alone = problem.run(())  # nothing wants a gradient
        if name == "plain":
            torch.testing.assert_close(alone["Y"], found["Y"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layout", ["padded", "aligned", "transposed"])
def test_other_layouts_are_the_same(modules: dict[str, ModuleType], path: str, layout: str) -> None:
    """Of a buffer that is NaN around them."""
    problem = Problem(modules["plain"], 12, dtype=HALF if path == "kernels" else torch.bfloat16)
    expected = problem.run()
    problem.dY = lay(problem.dY, layout)
    found = problem.run(x=lay(problem.leaves["x"], layout))
    # Products of 16 bits may be added up in another order for another layout: codes are the same.
    close(found, expected)


@pytest.mark.parametrize(("sides", "rank"), [((65, 33), 3), ((130, 7), 1), ((16, 16), 33), ((96, 80), 70)], ids=str)
def test_what_kernels_do_not_take_torch_computes(
    modules: dict[str, ModuleType], path: str, sides: tuple[int, int], rank: int
) -> None:
    """Odd sizes, and ranks that are too large for one of the kernels: as near to float64 as any."""
    dtype = HALF if path == "kernels" else torch.bfloat16
    problem = Problem(modules["plain"], 40, dtype=dtype, sides=sides, rank=rank)
    found, exact = problem.run(), problem.exact()
    for name, most in {"Y": 0.035, "x": 0.035, "lora_A": 5e-3, "lora_B": 5e-3}.items():
        assert off(found[name], exact[name]) < most, name


# What wraps them


def test_autocast_decides_on_the_dtype(modules: dict[str, ModuleType]) -> None:
    wide = Problem(modules["plain"], 16, dtype=torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = wide.run(())
    narrow = {name: leaf.bfloat16() for name, leaf in wide.leaves.items() if name in ("x", "bias")}
    assert found["Y"].dtype == torch.bfloat16
    same(found, wide.run((), **narrow))


@every_module
def test_checkpointed_it_is_the_same_to_the_bit(modules: dict[str, ModuleType], path: str, name: str) -> None:
    """Rounded again in the backward, by scales that are made again."""
    problem = Problem(modules[name], 9, dtype=HALF if path == "kernels" else torch.bfloat16)

    def again(*operands: Any, **options: Any) -> Any:
        return checkpoint(partial(modules[name].lora_linear, **options), *operands, use_reentrant=False)

    same(problem.run(function=again), problem.run())


@every_module
def test_compiled_it_is_one_graph_and_the_same(modules: dict[str, ModuleType], path: str, name: str) -> None:
    """With operators where a kernel serves, which trace by their fake results."""
    problem = Problem(modules[name], 16, dtype=HALF if path == "kernels" else torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(modules[name].lora_linear, fullgraph=True, backend="aot_eager")
    found, expected = problem.run(function=compiled), problem.run()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape
        if name == "plain":  # masks are drawn in another way there
            torch.testing.assert_close(found[key], tensor, rtol=1e-2, atol=1e-2)
    assert all(tensor.isfinite().all() for tensor in found.values())


# Each kernel by itself

Sides = tuple[int, int]


@pytest.fixture
def resize(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Set the number of multiprocessors that launches divide their work for."""

    def set_to(count: int) -> None:
        monkeypatch.setattr(module, "_multiprocessors", lambda device: count)
        module._PLANS.clear()

    yield set_to
    module._PLANS.clear()


def scales_for(module: ModuleType, columns: int, scales: str) -> Any:
    """What holds the scales of columns, as a weight does those of its rows; None where there are none."""
    return None if scales == "none" else coded(module, (columns, 4), HALF, scales)


def near(ours: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """Off by what one rounding may be, and sums of float32."""
    allowed = torch.finfo(ours.dtype).eps * exact.abs().max() + 8 * torch.finfo(torch.float32).eps * magnitude.max()
    assert ours.shape == exact.shape and (ours.double() - exact).abs().max() <= allowed


@given(shape=shapes, scales=scales_of, layout=layouts, seed=st.integers(0, 99))
@example(shape=(33, 62), scales="one", layout="contiguous", seed=6)  # of which one is on a tie
@example(shape=(40, 513), scales="rows", layout="padded", seed=0)
@example(shape=(33, 62), scales="one", layout="transposed", seed=0)
@example(shape=(17, 512), scales="none", layout="aligned", seed=0)
@few
def test_the_largest_of_rows_and_their_codes(
    modules: dict[str, ModuleType], shape: Sides, scales: str, layout: str, seed: int
) -> None:
    """To the bit as torch has them: where one kernel serves and another does not, that makes no difference."""
    module = modules["dropped"]
    values = draw(seed, *shape, HALF)
    values[0] *= 0
    X, Q = lay(values, layout), scales_for(module, shape[1], scales)
    scale = None if Q is None else Q.scale
    most = module._launch_largest(X, scale, "mX")
    assert most is not None and most.dtype == torch.float32 and torch.equal(most, module._largest_of(X, scale))
    assert torch.equal(module._largest(X, scale, tiles="mX"), most)
    codes, rows = module._launch_quantize(X, most, scale, "Xq")
    expected = module._quantized(X, most, scale)
    assert torch.equal(codes.view(torch.uint8), expected.codes.view(torch.uint8)) and torch.equal(rows, expected.scale)
    assert codes.is_contiguous() and codes.dtype == E4M3 and rows.shape == (shape[0], 1)
    whole = module._quantize(X, most, scale, tiles="Xq")
    assert isinstance(whole, module.Quantized) and whole.block == (1, shape[1]) and whole.dtype == HALF
    # What is made of the codes is off by half a place of float8 at most, of what is no smaller than its smallest.
    made, wide = module._dequantized(whole, torch.float32), module._scaled_by(X, scale)
    assert ((made - wide).abs() <= wide.abs() / 16 + most[:, None] / 448 / 2**10 + 1e-30).all()


@pytest.mark.parametrize("layout", ["transposed", "columns"])
def test_one_column_whose_rows_are_apart(module: ModuleType, layout: str) -> None:
    """Of rank 1 the factors have one: its stride is that of a view, as a copy for the kernel has not."""
    problem = Problem(module, 16, dtype=HALF, rank=1)
    expected = problem.run()
    B = problem.leaves["lora_B"]
    view = B.new_empty(1, 48).copy_(B.t()).t() if layout == "transposed" else B.repeat(1, 2)[:, ::2]
    assert view.stride(1) != 1
    same(problem.run(lora_B=view), expected)


@given(shape=shapes, seed=st.integers(0, 99))
@example(shape=(130, 257), seed=0)
@few
def test_the_transposed_codes(module: ModuleType, shape: Sides, seed: int) -> None:
    Q = coded(module, shape, HALF, seed=seed)
    found = module._launch_transpose(Q.codes, "Qt")
    assert found is not None and found.is_contiguous() and found.dtype == E4M3
    assert torch.equal(found.view(torch.uint8), Q.codes.t().contiguous().view(torch.uint8))
    assert torch.equal(module._transpose(Q.codes, tiles="Qt").view(torch.uint8), found.view(torch.uint8))


@pytest.mark.parametrize("machine", [1, 132], ids=["whole", "split"])
@pytest.mark.parametrize("layout", ["aligned", "padded"])
def test_one_pass_for_s_and_the_largest(
    module: ModuleType, resize: Callable[[int], None], machine: int, layout: str
) -> None:
    """Of rows that are split over programs the largest of all parts."""
    resize(machine)
    for shape, rank in (((5, 600), 5), ((70, 33), 16)):
        X, A = draw(0, *shape, HALF, layout), draw(1, rank, shape[1], HALF, layout)
        S, most = module._launch_x_at_largest(X, A, 0.75, "S, mX")
        x, a = X.double(), A.double()
        near(S, 0.75 * x @ a.t(), x.abs() @ a.t().abs())
        assert torch.equal(most, module._largest_of(X))


@pytest.mark.parametrize("machine", [1, 132], ids=["whole", "split"])
@pytest.mark.parametrize("scales", ["rows", "one"])
@pytest.mark.parametrize("layout", ["aligned", "padded"])
def test_one_pass_for_p_and_db_and_the_largest(
    module: ModuleType, resize: Callable[[int], None], machine: int, layout: str, scales: str
) -> None:
    resize(machine)
    for shape, rank, result in (((100, 300), 5, HALF), ((33, 70), 8, torch.float32)):
        Q = scales_for(module, shape[1], scales)
        dY, B, S = (
            draw(i, *sides, HALF, layout) for i, sides in enumerate((shape, (shape[1], rank), (shape[0], rank)))
        )
        P, dB, most = module._launch_p_db_largest(dY, B, S, Q.scale, 0.75, result, "P, dB, mdY")
        d, b, s = dY.double(), B.double(), S.double()
        near(P, 0.75 * d @ b, d.abs() @ b.abs())
        near(dB, d.t() @ s, d.t().abs() @ s.abs())
        assert dB.dtype == result and torch.equal(most, module._largest_of(dY, Q.scale))


@pytest.mark.parametrize(
    ("sides", "rank", "machine", "scales", "bias", "transposed"),
    [
        # Rows, columns and what is summed over. The last wave of four programs has parts of tiles.
        ((260, 528, 80), 5, 4, "rows", True, False),
        ((260, 528, 80), 16, 1, "one", False, True),
        ((33, 48, 64), 40, 132, "none", False, True),
        ((33, 48, 64), 64, 132, "rows", True, False),
        # Rows that start off 16 bytes are read by pointers.
        ((40, 62, 33), 5, 3, "rows", True, False),
        ((40, 62, 33), 7, 3, "none", False, True),
        ((1, 7, 513), 1, 132, "one", True, False),
    ],
    ids=str,
)
def test_the_product(
    module: ModuleType,
    resize: Callable[[int], None],
    sides: tuple[int, int, int],
    rank: int,
    machine: int,
    scales: str,
    bias: bool,
    transposed: bool,
) -> None:
    """Against float64 of the codes and scales: sums of float32 are rounded once."""
    resize(machine)
    M, N, K = sides
    X = draw(0, M, K, HALF)
    left = module._quantized(X, module._largest_of(X))
    Q = coded(module, (N, K), HALF, "one" if scales == "none" else scales)
    right = Q.codes if scales == "none" else Q
    low, factor = draw(1, M, rank, HALF), draw(2, *((rank, N) if transposed else (N, rank)), HALF)
    other = factor.t() if transposed else factor
    b = draw(3, 1, N, HALF)[0] if bias else None
    unit = 1.0 if scales == "none" else Q.scale.double()
    if scales == "none":  # codes alone are as large as they are: so is what they are multiplied with
        left = left._replace(scale=left.scale / 64)
    wide = (left.codes.double() * left.scale.double(), Q.codes.double() * unit, low.double(), other.double())
    exact = wide[0] @ wide[1].t() + wide[2] @ wide[3].t() + (0 if b is None else b.double())
    magnitude = wide[0].abs() @ wide[1].t().abs() + wide[2].abs() @ wide[3].t().abs()
    scale = None if scales == "none" else Q.scale
    found = module._launch_fused_gemm_8(left.codes, Q.codes, low, other, b, left.scale, scale, "Y")
    assert found is not None and found.dtype == HALF
    near(found, exact, magnitude)
    assert torch.equal(module._fused_gemm_8(left, right, low, other, b, tiles="Y"), found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "KERNELS", False)
        by_torch = module._fused_gemm_8(left, right, low, other, b, tiles="Y")
    assert off(by_torch, exact) < 4 * torch.finfo(HALF).eps


def test_a_replayed_plan_reads_other_operands(modules: dict[str, ModuleType]) -> None:
    """A launch is planned once for a geometry: that of scales is part of it, since they may be one for all."""
    module = modules["dropped"]
    module._PLANS.clear()
    for scales, seed in itertools.product(("rows", "one", "none"), range(2)):
        X, Q = draw(seed, 24, 40, HALF), scales_for(module, 40, scales)
        scale = None if Q is None else Q.scale
        most = module._launch_largest(X, scale, "mX")
        assert torch.equal(most, module._largest_of(X, scale))
        codes, _ = module._launch_quantize(X, most, scale, "Xq")
        assert torch.equal(codes.view(torch.uint8), module._quantized(X, most, scale).codes.view(torch.uint8))


def test_what_kernels_refuse(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    module, dropped = modules["plain"], modules["dropped"]
    X, Q = draw(0, 24, 40, HALF), coded(module, (48, 40), HALF)
    most, low, B = module._largest_of(X), draw(1, 24, 4, HALF), draw(2, 48, 4, HALF)
    codes, scale = module._quantized(X, most)[:2]
    gaps, far = torch.stack((codes, codes), 1)[:, 0], torch.stack((most, most), 1)[:, 0]
    wide = draw(3, 24, 65, HALF), draw(4, 48, 65, HALF)

    def product(codes: Tensor = codes, low: Tensor = low, B: Tensor = B, scale: Tensor = scale) -> Tensor | None:
        made: Tensor | None = module._launch_fused_gemm_8(codes, Q.codes, low, B, None, scale, Q.scale, "Y")
        return made

    assert product() is not None and dropped._launch_largest(X, None, "mX") is not None
    assert product(gaps) is None and product(low=wide[0], B=wide[1]) is None
    assert product(low=low.float(), B=B.float()) is None
    assert product(scale=torch.stack((scale, scale), 1)[:, 0]) is None
    assert module._launch_quantize(X, far, None, "Xq") is None
    assert module._launch_quantize(X.float(), most, None, "Xq") is None
    assert dropped._launch_largest(X.float(), None, "mX") is None
    assert module._launch_transpose(gaps, "Qt") is None and module._launch_transpose(codes[:0], "Qt") is None
    dY, S = draw(5, 24, 48, HALF), low
    spread = torch.stack((Q.scale, Q.scale), 1)[:, 0]
    assert module._launch_p_db_largest(dY, B, S, spread, 1.0, HALF, "P, dB, mdY") is None
    B, S = draw(6, 48, 33, HALF), draw(6, 24, 33, HALF)
    assert module._launch_p_db_largest(dY, B, S, Q.scale, 1.0, HALF, "P, dB, mdY") is None
    # Nothing that needs products of float8 is launched where a GPU has none.
    monkeypatch.setattr(module, "_INTERPRETED", False)
    for capability, able in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert module._multiplies_float8(X) == able


def test_operators_are_what_is_compiled(modules: dict[str, ModuleType]) -> None:
    """With fake results of the right shape, layout and dtype: the schema's other tests compare no float8."""
    module, dropped = modules["plain"], modules["dropped"]
    X, Q, A = draw(0, 24, 40, HALF), coded(module, (48, 40), HALF), draw(1, 4, 40, HALF)
    dY, B, S = draw(2, 24, 48, HALF), draw(3, 48, 4, HALF), draw(4, 24, 4, HALF)
    most = module._largest_of(X)
    codes, scale = module._quantized(X, most)[:2]
    for operator, operands, tiles in (
        (dropped._largest_operator, (X, None), "mX"),
        (dropped._largest_operator, (dY, Q.scale), "mX"),
        (module._quantize_operator, (X, most, None), "Xq"),
        (module._quantize_operator, (dY, most, Q.scale), "dYq"),
        (module._transpose_operator, (Q.codes,), "Qt"),
        (module._x_at_largest_operator, (X, A, 0.5), "S, mX"),
        (module._p_db_largest_operator, (dY, B, S, Q.scale, 0.5, torch.float32), "P, dB, mdY"),
        (module._fused_gemm_8_operator, (codes, Q.codes, S, B, None, scale, Q.scale), "Y"),
        (module._fused_gemm_8_operator, (codes, Q.codes, S, B, None, scale, None), "Y"),
    ):
        torch.library.opcheck(operator, operands, {"tiles": tiles}, test_utils="test_faketensor")
