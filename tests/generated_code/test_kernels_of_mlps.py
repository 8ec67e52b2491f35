"""The kernels of what is between the linears of an MLP against float64, by themselves.

As those of experts: without a GPU in Triton's interpreter, with small tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from runlora_gen.kernels.registry import KERNELS
from runlora_gen.request.activations import ACTIVATIONS
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from .alone import kernels_alone
from .test_kernels import Launches, check, draw, poison, property_test
from .test_kernels_of_groups import launches, resize
from .test_mlps import BETWEEN as MADE

pytest.importorskip("triton", minversion="3.4")

__all__ = ["launches", "poison", "resize"]

GPU = torch.cuda.is_available()
HALF = torch.bfloat16 if GPU else torch.float16
DTYPES = [torch.float32, HALF]
NAMES = ("mlp_activate", "mlp_activate_backward", "mlp_activate_dropped", "mlp_activate_backward_dropped")
#: How much dropout takes, with a seed for whose bits in both halves there is a mask.
RATE, SEED = 0.3, torch.tensor([2**40 + 12345])
BETWEEN = [name for name, activation in ACTIVATIONS.items() if activation.of_mlps]
#: Small chunks, so that there are several; few columns a program, so that there are parts to add up.
TILES = {
    "forward": {"BT": 16, "BI": 32, "WARPS": 4, "STAGES": 2},
    "backward": {"BT": 16, "BI": 32, "CHUNK": 32, "WARPS": 4, "STAGES": 2},
}
#: Of all ranks that there are: one, odd, of a tile, above one.
ranks = st.sampled_from([1, 3, 5, 16, 40])
sizes = st.integers(1, 100)
layouts = st.sampled_from(["contiguous", "aligned", "padded"])
RESULTS = ("dA", "dgate", "dup", "P gate", "P up", "dB gate", "dB up")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return kernels_alone(tmp_path_factory.mktemp("alone") / "mlps_alone.py", NAMES, BETWEEN, tiles=TILES)


def plain(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """What torch's own functions make, as models have them."""
    made: Tensor = MADE[activation](gate, up)
    return made


@dataclass(frozen=True)
class Problem:
    """Operands of both kernels; ``R``: of down, of gate and of up."""

    T: int = 70
    I: int = 45  # noqa: E741
    R: tuple[int, int, int] = (5, 3, 16)
    activation: str = "silu_gated"
    layout: str = "padded"
    seed: int = 0

    def operands(self, dtype: torch.dtype) -> dict[str, Any]:
        def of(place: int, rows: int, columns: int) -> Tensor:
            return draw(self.seed + place, rows, columns, dtype, self.layout)

        down, *others = self.R
        return {
            "gradient": of(0, self.T, self.I),
            "gate": of(1, self.T, self.I),
            "up": of(2, self.T, self.I),
            "P": of(3, self.T, down),
            "B": [of(4 + at, self.I, rank) for at, rank in enumerate(others)],
            "S": [of(6 + at, self.T, rank) for at, rank in enumerate(others)],
            "A": of(8, down, self.I),
        }


SCALINGS = (0.75, -2.0)


def backward(kernels: ModuleType, problem: Problem, of: dict[str, Any], **options: Any) -> tuple[Any, ...]:
    """All results, or those that are needed, of the wrapper that is emitted."""
    result = options.get("result", of["gate"].dtype)
    needs = options.get("needs", (True,) * 7)
    names = ("gradient", "gate", "up", "P", "B", "S")
    given = (*(of[name] for name in names), SCALINGS, (result,) * 3, needs, problem.activation)
    found: tuple[Any, ...] = kernels._mlp_activate_backward(*given, tiles="backward")
    return found


def expected(problem: Problem, of: dict[str, Any], *, rounded: torch.dtype | None = None) -> list[Tensor]:
    """In the operands' dtype; ``rounded``: what is made on the way is, as where it is written."""

    def kept(value: Tensor) -> Tensor:
        return value if rounded is None else value.to(rounded).to(value.dtype)

    gate, up = (of[name].detach().requires_grad_() for name in ("gate", "up"))
    X = plain(gate, up, problem.activation)
    dgate, dup = map(kept, torch.autograd.grad(X, (gate, up), of["gradient"]))
    both = (dgate, dup)
    down = [scale * dy @ b for scale, dy, b in zip(SCALINGS, both, of["B"], strict=True)]
    return [of["P"].t() @ kept(X.detach()), *both, *down, *(dy.t() @ s for dy, s in zip(both, of["S"], strict=True))]


def doubles(of: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [t.double() for t in value] if isinstance(value, list) else value.double() for name, value in of.items()
    }


def magnitudes(problem: Problem, of: dict[str, Any]) -> list[Tensor]:
    """Of the sums: products of absolute values."""
    wide = doubles(of)
    _, dgate, dup, *_ = expected(problem, wide)
    X = plain(wide["gate"], wide["up"], problem.activation).abs()
    both = (dgate.abs(), dup.abs())
    down = [abs(scale) * dy @ b.abs() for scale, dy, b in zip(SCALINGS, both, wide["B"], strict=True)]
    return [wide["P"].abs().t() @ X, *both, *down, *(dy.t() @ s.abs() for dy, s in zip(both, wide["S"], strict=True))]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_activate(
    kernels: ModuleType, launches: Launches, resize: Callable[[int], None], dtype: torch.dtype
) -> None:
    @property_test
    @example(T=33, I=300, R=40, machine=132, activation="silu_gated", layout="padded", seed=0)
    @example(T=70, I=45, R=3, machine=1, activation="gelu_gated", layout="contiguous", seed=0)
    @example(T=17, I=65, R=16, machine=4, activation="gelu_tanh_gated", layout="aligned", seed=0)
    @given(
        T=sizes,
        I=st.integers(1, 200),
        R=ranks,
        machine=st.sampled_from([1, 4, 132]),
        activation=st.sampled_from(BETWEEN),
        layout=layouts,
        seed=st.integers(0, 100),
    )
    def run(T: int, I: int, R: int, machine: int, activation: str, layout: str, seed: int) -> None:  # noqa: E741
        resize(machine)
        problem = Problem(T, I, (R, 1, 1), activation, layout, seed)
        of = problem.operands(dtype)
        given = (of["gate"], of["up"], of["A"], 0.75, activation)
        X, S = kernels._mlp_activate(*given, tiles="forward")
        again = kernels._mlp_activate(*given, tiles="forward")
        assert torch.equal(X, again[0]) and torch.equal(S, again[1]) and X.is_contiguous()
        wide = doubles(of)
        made = plain(wide["gate"], wide["up"], activation)
        check(X, plain(of["gate"], of["up"], activation), made, made.abs())
        # What is multiplied is what is written.
        x, a = X.double(), wide["A"]
        check(S, 0.75 * X @ of["A"].t(), 0.75 * x @ a.t(), 0.75 * x.abs() @ a.abs().t())

    run()
    assert launches.paths("mlp_activate", "WHOLE") == {(True,), (False,)}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_activate_backward(
    kernels: ModuleType, launches: Launches, resize: Callable[[int], None], dtype: torch.dtype
) -> None:
    """Of ranks of their own, of rows in several chunks, of columns in several programs; in both dtypes of adapters."""

    @property_test
    @example(T=70, I=45, R=(5, 3, 16), activation="silu_gated", layout="padded", wide=True, seed=0)
    @example(T=97, I=33, R=(40, 16, 3), activation="gelu_gated", layout="aligned", wide=False, seed=0)
    @example(T=20, I=17, R=(3, 40, 5), activation="gelu_tanh_gated", layout="contiguous", wide=True, seed=0)
    @example(T=33, I=100, R=(16, 5, 40), activation="silu_gated", layout="padded", wide=False, seed=1)
    @given(
        T=sizes,
        I=sizes,
        R=st.tuples(ranks, ranks, ranks),
        activation=st.sampled_from(BETWEEN),
        layout=layouts,
        wide=st.booleans(),
        seed=st.integers(0, 100),
    )
    def run(
        T: int,
        I: int,  # noqa: E741
        R: tuple[int, int, int],
        activation: str,
        layout: str,
        wide: bool,
        seed: int,
    ) -> None:
        resize(132)
        problem = Problem(T, I, R, activation, layout, seed)
        of = problem.operands(dtype)
        result = torch.float32 if wide else dtype
        found = backward(kernels, problem, of, result=result)
        again = backward(kernels, problem, of, result=result)
        exact, magnitude = expected(problem, doubles(of)), magnitudes(problem, of)
        # What torch makes of the same, rounded where it writes.
        halves = {name: [t.float() for t in v] if isinstance(v, list) else v.float() for name, v in of.items()}
        usual = expected(problem, halves, rounded=dtype)
        for name, ours, same, torchs, right, most in zip(RESULTS, found, again, usual, exact, magnitude, strict=True):
            own = result if name.startswith(("dA", "dB")) else dtype
            assert torch.equal(ours, same), name
            if ours.dtype == torch.float32 and dtype == HALF:
                # Sums of what was rounded once: by its ulp, not by that of float32.
                error = (ours.double() - right).abs().max()
                assert ours.dtype == own and error <= 4 * torch.finfo(dtype).eps * most.max(), name
            else:
                check(ours, torchs.to(own), right, most)

    run()
    # Several programs and one; several chunks and one.
    assert launches.paths("mlp_activate_backward", "P_WHOLE") == {(True,), (False,)}
    assert {constants["CHUNK"] for name, constants in launches if name == "mlp_activate_backward"} == {32}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_drops_between(
    kernels: ModuleType, launches: Launches, resize: Callable[[int], None], dtype: torch.dtype
) -> None:
    """S and dA are of what a mask leaves of X, and the same mask is over what P A adds to the gradient of X."""
    seed = SEED.to("cuda" if GPU else "cpu")

    @property_test
    @example(T=70, I=45, R=(5, 3, 16), machine=132, layout="padded", number=0)
    @example(T=33, I=100, R=(40, 16, 3), machine=1, layout="aligned", number=1)
    @example(T=17, I=65, R=(3, 40, 5), machine=4, layout="contiguous", number=2)
    @given(
        T=sizes,
        I=sizes,
        R=st.tuples(ranks, ranks, ranks),
        machine=st.sampled_from([1, 4, 132]),
        layout=layouts,
        number=st.integers(0, 100),
    )
    def run(T: int, I: int, R: tuple[int, int, int], machine: int, layout: str, number: int) -> None:  # noqa: E741
        resize(machine)
        problem = Problem(T, I, R, layout=layout, seed=number)
        of, drawn = problem.operands(dtype), seed + number
        kept = kernels._kept(drawn, of["gate"], RATE).double() / (1 - RATE)

        forward = (of["gate"], of["up"], of["A"], 0.75, drawn, RATE, problem.activation)
        X, S = kernels._mlp_activate_dropped(*forward, tiles="forward")
        assert torch.equal(X, kernels._mlp_activate(*forward[:4], problem.activation, tiles="forward")[0])
        H, A = kept * X.double(), of["A"].double()
        check(S, 0.75 * H.to(dtype) @ of["A"].t(), 0.75 * H @ A.t(), 0.75 * H.abs() @ A.abs().t())

        def found() -> list[Tensor]:
            given = (of["gradient"], of["gate"], of["up"], of["P"], of["A"], of["B"], of["S"], SCALINGS, drawn, RATE)
            more = ((dtype,) * 3, (True,) * 7, problem.activation)
            return list(kernels._mlp_activate_backward_dropped(*given, *more, tiles="backward"))

        made, again = found(), found()
        added = kept * (of["P"].double() @ A)

        def right(wide: dict[str, Any], added: Tensor) -> list[Tensor]:
            _, *others = expected(problem, {**wide, "gradient": wide["gradient"] + added})
            return [wide["P"].t() @ (kept.to(added.dtype) * X.to(added.dtype)), *others]

        exact, usual = right(doubles(of), added), right(of, added.to(dtype))
        magnitude = magnitudes(problem, {**of, "gradient": of["gradient"].double().abs() + added.abs()})
        magnitude[0] = of["P"].double().abs().t() @ H.abs()
        for name, ours, same, torchs, value, most in zip(RESULTS, made, again, usual, exact, magnitude, strict=True):
            assert torch.equal(ours, same), name
            check(ours, torchs, value, most)

    run()
    assert set(launches.names) >= {"mlp_activate_dropped", "mlp_activate_backward_dropped"}
    assert launches.paths("mlp_activate_dropped", "WHOLE") == {(True,), (False,)}


@pytest.mark.parametrize("place", range(7), ids=RESULTS)
def test_what_is_wanted_alone_drops_by_torch(kernels: ModuleType, launches: Launches, place: int) -> None:
    """The same mask, drawn as a whole."""
    problem = Problem()
    of = problem.operands(torch.float32)
    given = (
        of["gradient"],
        of["gate"],
        of["up"],
        of["P"],
        of["A"],
        of["B"],
        of["S"],
        SCALINGS,
        SEED.to(of["P"].device),
    )
    more = ((torch.float32,) * 3, problem.activation)
    whole = kernels._mlp_activate_backward_dropped(*given, RATE, more[0], (True,) * 7, more[1], tiles="backward")
    launches.clear()
    needs = tuple(at == place for at in range(7))
    found = kernels._mlp_activate_backward_dropped(*given, RATE, more[0], needs, more[1], tiles="backward")
    torch.testing.assert_close(found[place], whole[place], rtol=1e-5, atol=1e-4)
    assert launches.names == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_backward_makes_is_of_what_it_writes(kernels: ModuleType, dtype: torch.dtype) -> None:
    """P and dB of the gradients as they are rounded, dA of X as the forward wrote it."""
    problem = Problem(40, 30, (5, 3, 16))
    of = problem.operands(dtype)
    dA, dgate, dup, *rest = backward(kernels, problem, of, result=torch.float32)
    X, _ = kernels._mlp_activate(of["gate"], of["up"], of["A"], 1.0, problem.activation, tiles="forward")
    expected_of = [of["P"].float().t() @ X.float()]
    expected_of += [s * dy.float() @ b.float() for s, dy, b in zip(SCALINGS, (dgate, dup), of["B"], strict=True)]
    expected_of += [dy.float().t() @ s.float() for dy, s in zip((dgate, dup), of["S"], strict=True)]
    for made, right in zip((dA, *rest), expected_of, strict=True):
        rounding = 1e-5 if made.dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(made.float(), right, rtol=rounding, atol=1e-4)


@pytest.mark.parametrize("place", range(7), ids=RESULTS)
def test_what_is_wanted_alone_is_torch_s(kernels: ModuleType, launches: Launches, place: int) -> None:
    """Whoever wants less kept less: nothing but that is computed, and what is missing is not looked at."""
    problem = Problem()
    of = problem.operands(torch.float32)
    # What each of the results is made of.
    reads = [{"P", "gate", "up"}, {"gradient", "gate", "up"}, {"gradient", "gate", "up"}]
    needed = (*reads, *({"gradient", "gate", "up", "B"},) * 2, *({"gradient", "gate", "up", "S"},) * 2)[place]
    lacking = {
        name: (value if name in needed else [None, None] if name in ("B", "S") else None) for name, value in of.items()
    }
    needs = tuple(at == place for at in range(7))
    found = backward(kernels, problem, lacking, needs=needs)
    assert [made is not None for made in found[3:]] == list(needs[3:]) and (found[0] is not None) == needs[0]
    right = expected(problem, doubles(of))[place]
    torch.testing.assert_close(found[place].double(), right, rtol=1e-5, atol=1e-4)
    assert launches.names == []


@pytest.mark.parametrize("highest", [0, 1, 2])
def test_above_the_largest_rank_torch_runs(kernels: ModuleType, launches: Launches, highest: int) -> None:
    """Whichever of the three it is."""
    R = tuple(65 if at == highest else 4 for at in range(3))
    problem = Problem(R=(R[0], R[1], R[2]))
    of = problem.operands(torch.float32)
    found = backward(kernels, problem, of)
    for made, right in zip(found, expected(problem, doubles(of)), strict=True):
        torch.testing.assert_close(made.double(), right, rtol=1e-5, atol=1e-4)
    assert launches.names == []
    low = Problem(R=(64, 4, 4))
    backward(kernels, low, low.operands(torch.float32))
    assert "mlp_activate_backward" in launches.names


@pytest.mark.parametrize(("rank", "runs"), [(128, True), (129, False)])
def test_the_largest_rank_of_the_forward(kernels: ModuleType, launches: Launches, rank: int, runs: bool) -> None:
    of = Problem(R=(rank, 1, 1)).operands(torch.float32)
    X, S = kernels._mlp_activate(of["gate"], of["up"], of["A"], 0.5, "silu_gated", tiles="forward")
    torch.testing.assert_close(S, 0.5 * X @ of["A"].t())
    assert ("mlp_activate" in launches.names) is runs


def test_an_activation_that_is_not_there_is_refused(kernels: ModuleType) -> None:
    """By torch, where no kernel runs: a module holds its own alone."""
    of = Problem().operands(torch.float64)
    for call in (kernels._gated, lambda *given: kernels._gate_gradient(of["gradient"], *given)):
        with pytest.raises(ValueError, match="no activation 'tanh' here"):
            call(of["gate"], of["up"], "tanh")


class Between(torch.autograd.Function):
    """Between gate, up and down, as a module's backward has it: gate and up are its own, and kept."""

    @staticmethod
    def forward(ctx: Any, of: dict[str, Any], gate: Tensor, up: Tensor, backward: Callable[..., Any]) -> Tensor:
        ctx.save_for_backward(gate.clone(), up.clone())
        ctx.of, ctx.backward = of, backward
        return gate * up

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        gradient = ctx.of["gradient"].clone()
        return None, *ctx.backward({**ctx.of, "gradient": gradient, "gate": gate, "up": up}), None


@pytest.mark.parametrize("name", ["mlp_activate_backward", "mlp_activate_backward_dropped"])
def test_gradients_take_the_place_of_what_is_freed(
    kernels: ModuleType, launches: Launches, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of gate and up, where the graph is not kept, else one of that of what both give; the same numbers anyway."""
    problem = Problem(layout="contiguous")
    of = problem.operands(torch.float32)
    places: list[list[bool]] = []
    fails = [False]

    def backward(read: dict[str, Any]) -> list[Tensor]:
        given = [read[key] for key in ("gradient", "gate", "up", "P")]
        if name.endswith("dropped"):
            more = [read["A"], read["B"], read["S"], SCALINGS, SEED.to(given[0].device), RATE]
        else:
            more = [read["B"], read["S"], SCALINGS]
        rest = ((torch.float32,) * 3, (True,) * 7, problem.activation)
        found = getattr(kernels, f"_{name}")(*given, *more, *rest, tiles="backward", spend=True)
        held = {tensor.data_ptr() for tensor in given[:3]}
        places.append([tensor.data_ptr() in held for tensor in found[1:3]])
        assert found[1].data_ptr() != found[2].data_ptr()
        if fails[0]:
            raise RuntimeError("interrupted")
        return [tensor.clone() for tensor in found[1:3]]

    leaves = [of[key].clone().requires_grad_() for key in ("gate", "up")]
    apart = backward({**of, "gradient": of["gradient"].clone()})  # within no backward
    y = Between.apply(of, *leaves, backward)
    kept, again = (torch.autograd.grad(y.sum(), leaves, retain_graph=True) for _ in range(2))
    freed = torch.autograd.grad(y.sum(), leaves)
    assert places == [[True, False]] * 3 + [[True, True]] and len(launches.names) >= 4
    for gradients in (kept, again, freed):
        assert all(map(torch.equal, gradients, apart))
    fails[0] = True
    y = Between.apply(of, *leaves, backward)
    for error in ("interrupted", "modified by an inplace operation"):
        with pytest.raises(RuntimeError, match=error):
            torch.autograd.grad(y.sum(), leaves)
    # Where torch cannot say whether the graph is kept, it may be.
    fails[0] = False
    monkeypatch.setattr(kernels, "_keeps_graph", lambda: True)
    torch.autograd.grad(Between.apply(of, *leaves, backward).sum(), leaves)
    assert places[-1] == [True, False]


def test_what_has_rows_apart_stays(kernels: ModuleType) -> None:
    """Gradients are contiguous: the large products read them."""
    problem = Problem(layout="padded")
    of = problem.operands(torch.float32)
    before = {name: of[name].clone() for name in ("gradient", "gate", "up")}
    given = [of[name] for name in ("gradient", "gate", "up", "P", "B", "S")]
    rest = (SCALINGS, (torch.float32,) * 3, (True,) * 7, problem.activation)
    found = kernels._mlp_activate_backward(*given, *rest, tiles="backward", spend=True)
    assert all(torch.equal(of[name], value) for name, value in before.items())
    assert all(tensor.is_contiguous() for tensor in found[1:3])


@pytest.mark.parametrize("layout", ["contiguous", "padded"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["mlp_activate_backward", "mlp_activate_backward_dropped"])
def test_compiled_one_takes_the_place_of_the_gradient(
    kernels: ModuleType, launches: Launches, name: str, backend: str, layout: str
) -> None:
    """Without a copy; and what was kept stays: the graph does not say whether it is freed."""
    problem = Problem(layout=layout)
    of = problem.operands(torch.float32)
    before = {key: of[key].clone() for key in ("gradient", "gate", "up")}

    def run(given: Tensor, gate: Tensor, up: Tensor, seed: Tensor) -> Any:
        gradient = given * 2
        more: list[Any] = [of["B"], of["S"], SCALINGS]
        if name.endswith("dropped"):
            more = [of["A"], *more, seed, RATE]
        rest = ((torch.float32,) * 3, (True,) * 7, problem.activation)
        return getattr(kernels, f"_{name}")(gradient, gate, up, of["P"], *more, *rest, tiles="backward", spend=True)

    given = (of["gradient"], of["gate"], of["up"], SEED.to(of["P"].device))
    torch._dynamo.reset()
    found, sources = run_and_get_code(torch.compile(run, fullgraph=True, backend=backend), *given)
    assert name in launches.names
    launches.clear()
    for ours, wanted in zip(found, run(*given), strict=True):
        assert torch.equal(ours, wanted)
    assert all(torch.equal(of[key], value) for key, value in before.items())
    assert len(sources) == (backend == "inductor")
    for source in sources:
        assert f".{name}.default(" in source and "clone" not in source and "copy_" not in source


@pytest.mark.parametrize("layout", ["contiguous", "padded"])
def test_the_operators_are_well_formed(kernels: ModuleType, layout: str) -> None:
    """And what they leave in the gradient's place is gate's, however its rows lie."""
    torch.compiler.reset()
    problem = Problem(layout=layout)
    of = problem.operands(torch.float32)
    wanted = backward(kernels, problem, of)
    read = [of[key] for key in ("gradient", "gate", "up", "P")]
    more = ([*SCALINGS], *(torch.float32,) * 3, "silu_gated")
    tiles = {"tiles": "backward"}
    torch.library.opcheck(kernels._mlp_activate_backward_operator, (*read, of["B"], of["S"], *more), tiles)
    seeded = (of["A"], of["B"], of["S"], [*SCALINGS], SEED.to(of["P"].device), RATE, *more[1:])
    torch.library.opcheck(kernels._mlp_activate_backward_dropped_operator, (*read, *seeded), tiles)
    dA, *others = kernels._mlp_activate_backward_operator(*read, of["B"], of["S"], *more, **tiles)
    assert all(map(torch.equal, (dA, of["gradient"], *others), wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "I", "rank"), [(70, 300, 16), (97, 45, 40), (33, 64, 3)])
def test_sums_in_parts_take_what_the_record_says(
    kernels: ModuleType, T: int, I: int, rank: int, dtype: torch.dtype  # noqa: E741
) -> None:
    """By which budgets of memory are planned."""
    of = Problem(T, I, (rank,) * 3, layout="contiguous").operands(dtype)
    read = [of[key] for key in ("gradient", "gate", "up", "P")]
    planned = kernels._plan_mlp_activate_backward(*read, *of["B"], *of["S"], *(dtype,) * 3, "silu_gated", "backward")
    _, (_, down), (_, sums) = planned
    allocated = sum(4 * math.prod(shape) for shape in (*down, *sums))
    record = KERNELS["mlp_activate_backward"]
    constants = {**record.tiles, **TILES["backward"]}
    assert record.parts_bytes(constants, T, I, rank, dtype.itemsize) == allocated
