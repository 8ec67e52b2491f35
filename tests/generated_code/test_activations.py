"""The kernels of experts' activation against float64, by themselves; without a GPU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from runlora_gen.request.activations import ACTIVATIONS
from torch import Tensor

from .alone import kernels_alone

pytest.importorskip("triton", minversion="3.4")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float16
NAMES = ("experts_activate", "experts_activate_backward")
#: Small chunks, so that experts have several; and few columns a program, so that there are parts to add up.
TILES = {
    "forward": {"BT": 16, "BI": 32, "WARPS": 4, "STAGES": 2},
    "backward": {"BT": 16, "BI": 32, "CHUNK": 32, "WARPS": 4, "STAGES": 2},
}


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return kernels_alone(tmp_path_factory.mktemp("alone") / "activations_alone.py", NAMES, tiles=TILES)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors are full of NaN: what a kernel does not write shows."""

    def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def new(*args: Any, **options: Any) -> Tensor:
            tensor = empty(*args, **options)
            if tensor.is_floating_point():
                tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,)).fill_(torch.nan)
            return tensor

        return new

    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, poisoned(getattr(Tensor, name)))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@dataclass(frozen=True)
class Problem:
    """Random operands. ``load`` says whom the router chooses, ``apart`` whether rows lie unaligned and apart."""

    activation: str = "silu_gated"
    E: int = 5
    I: int = 40  # noqa: E741
    O: int = 24  # noqa: E741
    R: int = 8
    RB: int = 8
    tokens: int = 20
    top_k: int = 2
    load: str = "any"
    bias: bool = True
    apart: bool = False
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype = torch.float32
    wide_weights: bool = True
    index: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        drawn = torch.randint(self.E, (self.tokens, self.top_k), generator=torch.Generator().manual_seed(1))
        chosen = {"any": drawn, "one": torch.full_like(drawn, self.E - 1), "few": drawn % max(1, self.E - 3)}[self.load]
        object.__setattr__(self, "index", chosen.to(DEVICE))

    def operands(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Exact in the dtype that they are drawn for, in another one if it is given."""
        E, rows, generator = self.E, self.tokens * self.top_k, torch.Generator().manual_seed(0)
        F = self.I * ACTIVATIONS[self.activation].widths
        shapes: dict[str, tuple[int, ...]] = {
            "gradient": (rows, self.I),
            "weights": (self.tokens, self.top_k),
            "U": (rows, F),
            "dY": (self.tokens, self.O),
            "bias": (E, self.O),
            "P": (rows, self.R),
            "B": (E, F, self.RB),
            "S": (rows, self.RB),
            "A": (E, self.R, self.I),
        }
        found = {}
        for name, shape in shapes.items():
            drawn = self.dtype if name != "weights" or not self.wide_weights else torch.float32
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(drawn).to(DEVICE, dtype or drawn)
            if name == "U":
                values[0, 0], values[-1, -1] = 9.0, -9.0  # beyond what gpt-oss clamps
            if self.apart and len(shape) == 2:
                wide = torch.full((shape[0] + 2, shape[1] + 3), torch.nan, dtype=values.dtype, device=DEVICE)
                values = wide[1:-1, 1 : shape[1] + 1].copy_(values)
            if self.apart and len(shape) == 3:
                values = values.mT.contiguous().mT
            found[name] = values
        return found


def forward(module: ModuleType, problem: Problem, of: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    routing = module.route(problem.index, problem.E)
    X, S = module._experts_activate(of["U"], of["A"], 0.7, problem.activation, routing, tiles="forward")
    return X, S


def backward(
    module: ModuleType, problem: Problem, of: dict[str, Any], needs: tuple[bool, ...] = (True,) * 5, wide: bool = False
) -> tuple[Tensor | None, ...]:
    routing = module.route(problem.index, problem.E)
    dtype = torch.float64 if wide else problem.adapter_dtype
    found: tuple[Tensor | None, ...] = module._experts_activate_backward(
        *(of[name] for name in ("gradient", "weights", "U", "dY")),
        of["bias"] if problem.bias else None,
        *(of[name] for name in ("P", "B", "S")),
        0.7,
        dtype,
        dtype,
        needs,
        problem.activation,
        routing,
        tiles="backward",
    )
    return found


def launched(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of wrappers whose kernels ran."""
    ran: list[str] = []
    for name in NAMES:
        real = getattr(module, f"_launch_{name}")

        def launch(*args: Any, real: Any = real, name: str = name) -> Any:
            found = real(*args)
            ran.extend([] if found is None else [name])
            return found

        monkeypatch.setattr(module, f"_launch_{name}", launch)
    return ran


PROBLEMS = [
    *(Problem(activation) for activation in ACTIVATIONS),
    *(Problem("gpt_oss", load=load, I=24) for load in ("one", "few")),
    *(Problem(load=load, tokens=70, bias=False) for load in ("one", "few")),
    Problem(I=24, R=4, RB=16, E=1),
    Problem(I=72, R=16, RB=4, bias=False, apart=True),
    Problem("gpt_oss", I=72, R=5, RB=3, apart=True),
    Problem("gelu", I=200, R=40, RB=8, tokens=9, apart=True),
    Problem("gpt_oss", I=35, R=8, RB=40, O=270, top_k=3, wide_weights=False),
    Problem(tokens=1, top_k=1, I=1, R=1, RB=1),
    Problem(dtype=HALF, adapter_dtype=HALF, wide_weights=False),
    Problem("gpt_oss", dtype=HALF, tokens=50, I=72),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_kernels_equal_torch(module: ModuleType, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """And give the same bits again."""
    of, exact = problem.operands(), problem.operands(torch.float64)
    expected = (*forward(module, problem, exact), *backward(module, problem, exact, wide=True))
    ran = launched(module, monkeypatch)
    found, again = ((*forward(module, problem, of), *backward(module, problem, of)) for _ in range(2))
    assert ran == [*NAMES, *NAMES]
    adapter = problem.adapter_dtype
    dtypes = [problem.dtype, problem.dtype, adapter, problem.dtype, of["weights"].dtype, problem.dtype, adapter]
    # Of 16 bits, X and dU are rounded before they are multiplied.
    tolerance = 1e-5 if problem.dtype == torch.float32 else 0.01
    for ours, twice, wanted, dtype in zip(found, again, expected, dtypes, strict=True):
        assert ours is not None and twice is not None and wanted is not None
        assert torch.equal(ours, twice) and ours.shape == wanted.shape and ours.dtype == dtype
        scale = float(wanted.abs().max())
        torch.testing.assert_close(ours.double(), wanted, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_torch_s_path_equals_autograd(module: ModuleType, activation: str) -> None:
    """An expert's rows written out."""
    problem = Problem(activation)
    of = problem.operands(torch.float64)
    routing = module.route(problem.index, problem.E)
    experts = problem.index.flatten()[routing.rows]
    U, g = of["U"].requires_grad_(), of["weights"].requires_grad_()
    A, B = torch.zeros_like(of["A"]).requires_grad_(), torch.zeros_like(of["B"]).requires_grad_()
    # B's product is added to U, where its own factor is S; A's to a loss, whose gradient there is P.
    pre = U + torch.einsum("tr,tfr->tf", of["S"], B[experts])
    X = module._activated(pre, activation)
    weight = g.flatten()[routing.rows]
    dYr = of["dY"][routing.rows // problem.top_k]
    loss = (X * of["gradient"]).sum(1) + (dYr * of["bias"][experts]).sum(1)
    loss = loss + (torch.einsum("ti,tri->tr", X.detach(), A[experts]) * of["P"]).sum(1)
    dA, dU, dg, dB = torch.autograd.grad((loss * weight).sum(), (A, U, g, B))
    P = 0.7 * torch.einsum("tf,tfr->tr", dU, of["B"][experts])
    found = backward(module, problem, {name: value.detach() for name, value in of.items()}, wide=True)
    for ours, expected in zip(found, (dA, dU, dg, P, dB), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("activation", ["gpt_oss", "relu2"])
@pytest.mark.parametrize("wanted", range(5))
def test_what_is_wanted_alone(module: ModuleType, activation: str, wanted: int) -> None:
    """And what was not kept for the others is none."""
    problem = Problem(activation)
    of: dict[str, Any] = problem.operands()
    whole = backward(module, problem, of)
    needs = tuple(place == wanted for place in range(5))
    _, _, _, need_P, need_dB = needs
    of |= {"B": of["B"] if need_P else None, "S": of["S"] if need_dB else None}
    if wanted == 0:
        of["gradient"] = None
    else:
        of["P"] = None
    torch.testing.assert_close(backward(module, problem, of, needs)[wanted], whole[wanted])


def test_rows_of_no_expert(module: ModuleType) -> None:
    """What they make of others' is right, and dU of them no number that anybody reads."""
    problem = Problem(tokens=40)
    object.__setattr__(problem, "index", problem.index.clone())
    problem.index[3, 0], problem.index[5, 1] = problem.E, -1
    of, exact = problem.operands(), problem.operands(torch.float64)
    routing = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        routing = module.route(problem.index, problem.E)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "route", lambda *_: routing)
        found = (*forward(module, problem, of), *backward(module, problem, of))
        expected = (*forward(module, problem, exact), *backward(module, problem, exact, wide=True))
    lost = torch.zeros(problem.tokens, problem.top_k, dtype=torch.bool, device=DEVICE)
    lost[3, 0] = lost[5, 1] = True
    lost_rows = lost.flatten()[routing.rows]
    of_rows = [ours is not None and ours.shape[0] == len(lost_rows) for ours in found]
    assert of_rows == [True, True, False, True, False, True, False]
    for ours, wanted, rows in zip(found, expected, of_rows, strict=True):
        kept: Any = ~lost_rows if rows else ~lost if ours.shape == lost.shape else slice(None)
        torch.testing.assert_close(ours[kept].double(), wanted[kept], rtol=1e-5, atol=1e-4)


def test_a_graph_has_the_torch_path(module: ModuleType) -> None:
    """Of it, not of the operators: those are proved where experts are emitted."""
    U = torch.randn(6, 8, device=DEVICE)

    def both(U: Tensor) -> tuple[Tensor, Tensor]:
        return module._activated(U, "gpt_oss"), module._activate_backward(U[:, :4], U, "gpt_oss")

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(compiled(U), both(U), strict=True):
        torch.testing.assert_close(ours, expected)
