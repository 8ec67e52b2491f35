"""THE TABLE of a gated MLP: gate and up of one X, what is between, and down, in one autograd function.

Y_down = X_down W_downᵀ + S_down B_downᵀ with X_down = activate(Y_gate, Y_up), that of gate and up being a group's. It
follows from the tables of the group and of the lone linear: each symbol and row of these is there, down's with an X and
a dX of its own. What is between then reads and writes nothing that the linears beside it do not as well:

X_down is made where S_down is, and need not be kept: it is made again of Y_gate and Y_up, in registers, where the
gradients of these are. In the same pass over dX_down, Y_gate and Y_up follow dA_down = P_downᵀ X_down, dY_gate and
dY_up, and of these P and dB of gate and up. Y_gate and Y_up themselves are kept, or made again of X.

With dropout each adapter reads what a mask of its own leaves of X, or of X_down. Where kernels draw the masks, the
pass over dX_down begins with dV_down = dY_down W_down, and adds K_down ∘ P_down A_down / (1 - p) to it.

What is as wide as the rank is always kept, and so are adapters that are cast: to make these again saves next to
nothing, and there would be many times the programs. So it is with orders of a sum that cost the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from ..request.bases import Form
from ..request.mlps import Mlp
from .derivation import SAVED, Derivation, Row, derive, row
from .group import ON_BASE, SHARED, argument_of, renamed, rows_of, symbols_of
from .linear import lone_linear
from .operations import Convert, Symbol

#: What its linears are called.
LINEARS = Mlp.linears
_PAIR, _LAST = LINEARS[:2], LINEARS[2:]
_SHARED_BY_ALL = ("dropout",)
#: Ways of sums that only begin with another contribution, and kernels of one linear where there is one of several.
_LEFT_OUT = frozenset({("Y_down", "lowrank_first"), ("Y_gate Y_up", "lowrank_first"), ("Y_gate Y_up", "fused")})
#: Further ones without dropout, and with it: what it leaves of X is made again, too.
_LEFT_OUT_PLAIN = frozenset({("dX_down", "lowrank_first"), ("dX", "lowrank_first")})
_LEFT_OUT_DROPPED = frozenset(
    {
        *((target, SAVED) for target in ("H_gate H_up", "H_down")),
        *((target, "seeded") for target in ("S_gate S_up", "S_down", "dX_down dA_down")),
    }
)
#: What all linears come to in the same way; not to adapters that are cast: without dX a backward reads A of down alone.
_ALIKE = frozenset({"W", "K", "seed"})
#: Ways by what they take, as names of programs have many of them: torch's products, or a kernel.
_TORCH, _FUSED = "torch", "fused"
_BRIEFLY = dict.fromkeys(("base_first", "lowrank_first", "x_at", "pt_x", "dyt_s", "dy_b", "p_a", "drop"), _TORCH)
_BRIEFLY |= dict.fromkeys(("in_one", "one_pass"), _FUSED) | {"seeded_one_pass": "seeded"}


def mlp(*, dropout: bool = False, base: Form = "plain") -> Derivation:
    """The derivation of a gated MLP.

    ``dropout``: of what its adapters read, at one rate; ``base``: the form of its linears' weights.
    """
    return _mlp(dropout, base)


@lru_cache
def _mlp(dropout: bool, base: Form) -> Derivation:
    lone = lone_linear(dropout=dropout, base=base)
    arguments = (argument_of(argument, linear) for linear in LINEARS for argument in lone.arguments)
    return derive(
        f"gated MLP{ON_BASE[base]}{' with dropout' if dropout else ''}",
        symbols=dict.fromkeys(
            (
                *symbols_of(lone, _PAIR),
                *symbols_of(lone, _LAST, _SHARED_BY_ALL),
                # dX_down without what the adapter adds to it, and that.
                *(Symbol(f"d{name}_down", ("T", "I_down")) for name in ("V", "Z") if dropout),
            )
        ),
        facts=lone.facts,
        arguments=sorted(dict.fromkeys(arguments), key=lambda argument: argument.once),
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
        table=tuple(_rows(lone, dropout)),
        evaluated=mlp(base=base) if dropout else None,
        kept=(f"{symbol}_{linear}" for symbol in ("A", "B", "S") for linear in LINEARS),
    )


def _weights(lone: Derivation, linear: str) -> Iterator[str]:
    """The formulas that make a linear's weight of codes."""
    for operation in lone.base:
        if isinstance(operation, Convert):
            yield renamed(str(operation), linear)


def _rows(lone: Derivation, dropout: bool) -> Iterator[Row]:
    yield from (way for way in rows_of(lone, LINEARS) if _is_alike(way))
    left_out = _LEFT_OUT | (_LEFT_OUT_DROPPED if dropout else _LEFT_OUT_PLAIN)
    for linears, shared in ((_PAIR, SHARED), (_LAST, _SHARED_BY_ALL)):
        for way in rows_of(lone, linears, shared):
            if not _is_alike(way) and (way.target, way.name) not in left_out:
                yield replace(way, name=_BRIEFLY.get(way.name, way.name))
    yield row("Y_gate Y_up", SAVED)
    yield row("X_down", _TORCH, "X_down = activate(Y_gate, Y_up)")
    yield row("X_down", SAVED)
    gradients = (
        "dY_gate = gate_gradient(dX_down, Y_gate, Y_up)",
        "dY_up = up_gradient(dX_down, Y_gate, Y_up)",
    )
    yield row("dY_gate dY_up", _TORCH, *gradients)
    mark, name, dropped, adapted, summed = "", "", "", "X_down", ""
    if dropout:
        mark, name, adapted = "_dropped", "seeded", "H_down"
        dropped = "K_down := draw(seed_down); H_down := drop(X_down, K_down); "
        summed = "dH_down := P_down @ A_down; dZ_down := drop(dH_down, K_down); dX_down := plus(dV_down, dZ_down); "
        yield row("dV_down", _TORCH, "dV_down = dY_down @ W_down")
    yield row(
        "X_down S_down",
        name or _FUSED,
        f"mlp_activate{mark}: X_down = activate(Y_gate, Y_up); {dropped}" f"S_down = s_down * {adapted} @ A_down.T",
    )
    yield row(
        "dA_down dY_gate dY_up P_gate P_up dB_gate dB_up",
        f"with_gradients{'_seeded' if dropout else ''}",
        f"mlp_activate_backward{mark}: X_down := activate(Y_gate, Y_up); {dropped}"
        + f"dA_down = P_down.T @ {adapted}; {summed}"
        + "; ".join(gradients)
        + "; P_gate = s_gate * dY_gate @ B_gate; P_up = s_up * dY_up @ B_up; "
        "dB_gate = dY_gate.T @ S_gate; dB_up = dY_up.T @ S_up",
    )


def _is_alike(way: Row) -> bool:
    return way.target.partition("_")[0] in _ALIKE


MLP = mlp()
#: Those of all bases, with dropout and without.
OF_MLPS: tuple[Derivation, ...] = tuple(
    mlp(dropout=dropout, base=base) for base in ON_BASE for dropout in (False, True)
)
