"""THE TABLE of a gated MLP: gate and up of one X, what is between, and down, in one autograd function.

Y = X_down W_downᵀ + S_down B_downᵀ with X_down = activate(Y_gate, Y_up), that of gate and up being a group's. It
follows from the tables of the group and of the lone linear: each symbol and row of these is there, down's with an X and
a dX of its own. What is between then reads and writes nothing that the linears beside it do not as well:

X_down is made where S_down is, and need not be kept: it is made again of Y_gate and Y_up, in registers, where the
gradients of these are. In the same pass over dX_down, Y_gate and Y_up follow dA_down = P_downᵀ X_down, dY_gate and
dY_up, and of these P and dB of gate and up. Y_gate and Y_up themselves are kept, or made again of X.

Orders of a sum that cost the same, and casts of adapters that are made again, are left out: there would be too many
programs.
"""

from __future__ import annotations

from collections.abc import Iterator

from .derivation import SAVED, Row, derive, row
from .group import SHARED, argument_of, rows_of, symbols_of
from .linear import LINEAR

#: What its linears are called.
LINEARS = ("gate", "up", "down")
_PAIR, _LAST = LINEARS[:2], LINEARS[2:]
#: Ways of sums that only begin with another contribution, and kernels of one linear where there is one of both.
_LEFT_OUT = frozenset({("Y_down", "lowrank_first"), ("dX_down", "lowrank_first"), ("dX", "lowrank_first")})
_LEFT_OUT |= {("Y_gate Y_up", "lowrank_first"), ("Y_gate Y_up", "fused")}


def _rows() -> Iterator[Row]:
    # Casts, too, are those of gate and up, and of down: without dX a backward reads A of down alone.
    for linears, shared in ((_PAIR, SHARED), (_LAST, ())):
        yield from (way for way in rows_of(LINEAR, linears, shared) if (way.target, way.name) not in _LEFT_OUT)
    yield row("Y_gate Y_up", SAVED)
    yield row("X_down", "activate", "X_down = activate(Y_gate, Y_up)")
    yield row("X_down", SAVED)
    yield row(
        "X_down S_down",
        "one_pass",
        "mlp_activate: X_down = activate(Y_gate, Y_up); S_down = s_down * X_down @ A_down.T",
    )
    gradients = (
        "dY_gate = gate_gradient(dX_down, Y_gate, Y_up)",
        "dY_up = up_gradient(dX_down, Y_gate, Y_up)",
    )
    yield row("dY_gate dY_up", "activate_backward", *gradients)
    yield row(
        "dA_down dY_gate dY_up P_gate P_up dB_gate dB_up",
        "with_gradients",
        "mlp_activate_backward: X_down := activate(Y_gate, Y_up); dA_down = P_down.T @ X_down; "
        + "; ".join(gradients)
        + "; P_gate = s_gate * dY_gate @ B_gate; P_up = s_up * dY_up @ B_up; "
        "dB_gate = dY_gate.T @ S_gate; dB_up = dY_up.T @ S_up",
    )


MLP = derive(
    "gated MLP",
    symbols=dict.fromkeys((*symbols_of(LINEAR, _PAIR), *symbols_of(LINEAR, _LAST, ()))),
    facts=LINEAR.facts,
    arguments=dict.fromkeys(
        argument for linear in LINEARS for argument in (argument_of(each, linear) for each in LINEAR.arguments)
    ),
    outputs=("Y_down",),
    output_gradients=("dY_down",),
    base=(
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
    table=tuple(_rows()),
    kept=(f"{symbol}_{linear}" for symbol in ("A", "B", "S") for linear in LINEARS),
)
