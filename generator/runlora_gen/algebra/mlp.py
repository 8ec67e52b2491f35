"""THE TABLE of a gated MLP: gate and up of one X, what is between, and down, in one autograd function.

Y_down = X_down W_downᵀ + S_down B_downᵀ with X_down = activate(Y_gate, Y_up), that of gate and up being a group's. It
follows from the tables of the group and of the lone linear: each symbol and row of these is there, down's with an X and
a dX of its own. What is between then reads and writes nothing that the linears beside it do not as well:

X_down is made where S_down is, and need not be kept: it is made again of Y_gate and Y_up, in registers, where the
gradients of these are. In the same pass over dX_down, Y_gate and Y_up follow dA_down = P_downᵀ X_down, dY_gate and
dY_up, and of these P and dB of gate and up. Y_gate and Y_up themselves are kept, or made again of X.

What is as wide as the rank is always kept, and so are adapters that are cast: to make these again saves next to
nothing, and there would be many times the programs. So it is with orders of a sum that cost the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from ..request.bases import Form
from .derivation import SAVED, Derivation, Row, derive, row
from .group import ON_BASE, SHARED, argument_of, renamed, rows_of, symbols_of
from .linear import lone_linear
from .operations import Convert

#: What its linears are called.
LINEARS = ("gate", "up", "down")
_PAIR, _LAST = LINEARS[:2], LINEARS[2:]
#: Ways of sums that only begin with another contribution, and kernels of one linear where there is one of both.
_LEFT_OUT = frozenset({("Y_down", "lowrank_first"), ("dX_down", "lowrank_first"), ("dX", "lowrank_first")})
_LEFT_OUT |= {("Y_gate Y_up", "lowrank_first"), ("Y_gate Y_up", "fused")}
#: What all linears come to in the same way.
_ALIKE = frozenset({"A", "B", "W"})
#: Ways by what they take, as names of programs have many of them: torch's products, or a kernel.
_TORCH, _FUSED = "torch", "fused"
_BRIEFLY = dict.fromkeys(("base_first", "x_at", "pt_x", "dyt_s", "dy_b"), _TORCH)
_BRIEFLY |= dict.fromkeys(("in_one", "one_pass"), _FUSED)


def mlp(*, base: Form = "plain") -> Derivation:
    """The derivation of a gated MLP; ``base``: the form of its linears' weights."""
    return _mlp(base)


@lru_cache
def _mlp(base: Form) -> Derivation:
    lone = lone_linear(base=base)
    arguments = (argument_of(argument, linear) for linear in LINEARS for argument in lone.arguments)
    return derive(
        f"gated MLP{ON_BASE[base]}",
        symbols=dict.fromkeys((*symbols_of(lone, _PAIR), *symbols_of(lone, _LAST, ()))),
        facts=lone.facts,
        arguments=dict.fromkeys(arguments),
        outputs=("Y_down",),
        output_gradients=("dY_down",),
        form=base,
        base=(
            *(weight for linear in LINEARS for weight in _weights(lone, linear)),
            "Y_gate = X @ W_gate.T + b_gate",
            "Y_up = X @ W_up.T + b_up",
            "X_down = activate(Y_gate, Y_up)",
            "Y_down = X_down @ W_down.T + b_down",
            "dX_down = dY_down @ W_down",
            "dY_gate = gate_gradient(dX_down, Y_gate, Y_up)",
            "dY_up = up_gradient(dX_down, Y_gate, Y_up)",
            "dX = dY_gate @ W_gate",
            "dX += dY_up @ W_up",
        ),
        table=tuple(_rows(lone)),
        kept=(f"{symbol}_{linear}" for symbol in ("A", "B", "S") for linear in LINEARS),
    )


def _weights(lone: Derivation, linear: str) -> Iterator[str]:
    """The formulas that make a linear's weight of codes."""
    for operation in lone.base:
        if isinstance(operation, Convert):
            yield renamed(str(operation), linear)


def _rows(lone: Derivation) -> Iterator[Row]:
    yield from (way for way in rows_of(lone, LINEARS) if _is_alike(way))
    for linears, shared in ((_PAIR, SHARED), (_LAST, ())):
        for way in rows_of(lone, linears, shared):
            if not _is_alike(way) and (way.target, way.name) not in _LEFT_OUT:
                yield replace(way, name=_BRIEFLY.get(way.name, way.name))
    yield row("Y_gate Y_up", SAVED)
    yield row("X_down", _TORCH, "X_down = activate(Y_gate, Y_up)")
    yield row("X_down", SAVED)
    yield row(
        "X_down S_down",
        _FUSED,
        "mlp_activate: X_down = activate(Y_gate, Y_up); S_down = s_down * X_down @ A_down.T",
    )
    gradients = (
        "dY_gate = gate_gradient(dX_down, Y_gate, Y_up)",
        "dY_up = up_gradient(dX_down, Y_gate, Y_up)",
    )
    yield row("dY_gate dY_up", _TORCH, *gradients)
    yield row(
        "dA_down dY_gate dY_up P_gate P_up dB_gate dB_up",
        "with_gradients",
        "mlp_activate_backward: X_down := activate(Y_gate, Y_up); dA_down = P_down.T @ X_down; "
        + "; ".join(gradients)
        + "; P_gate = s_gate * dY_gate @ B_gate; P_up = s_up * dY_up @ B_up; "
        "dB_gate = dY_gate.T @ S_gate; dB_up = dY_up.T @ S_up",
    )


def _is_alike(way: Row) -> bool:
    return way.target.partition("_")[0] in _ALIKE


MLP = mlp()
#: Those of all bases.
OF_MLPS: tuple[Derivation, ...] = (MLP, mlp(base="codes"), mlp(base="scaled"), mlp(base="float8"))
