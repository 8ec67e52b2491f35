"""THE TABLE of a group: linears that read one X, as q, k and v do, in one autograd function.

Y_j = X W_jᵀ + s_j X A_jᵀ B_jᵀ + b_j for every linear j, and dX = Σ_j dY_j W_j + P_j A_j: X is read once for all S_j and
once for all dA_j, and dX is summed where it is made, instead of by autograd.

It follows from the table of the lone linear: each of its symbols, arguments and rows there is for every linear j, with
j in the names of all but X and dX. A row says how all linears come to a symbol: one program computes each of them in
the same way. What gains nothing by company is left to the lone linear: merged weights, and the gradients of whole
weights; and products of float8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from ..request.bases import Form
from .derivation import Argument, Derivation, Row, derive, row
from .linear import LONE, lone_linear
from .operations import Fused, Operation, Symbol

#: What all linears have in common.
SHARED = ("X", "dX", "dropout")
#: What linears have: symbols, arguments, a scaling.
_NAMES = {
    *(name for lone in LONE for name in lone.symbols),
    *(argument.name for lone in LONE for argument in lone.arguments),
    "s",
}
#: What a group makes no use of.
_LEFT_OUT = frozenset({"M", "D", "G", "mX", "Xq", "mdY", "dYq", "Qt"})
#: What several linears are on, by the form of their bases.
ON_BASE: Mapping[Form, str] = {
    "plain": "",
    "codes": " on quantized bases",
    "scaled": " on bases of int8",
    "float8": " on bases of float8",
}
#: Kernels that do for all linears, in one, what a way of the lone linear does: by its target and its name the name of
#: the group's way, and the kernel.
_TOGETHER: Mapping[tuple[str, str], tuple[str, str]] = {
    ("S", "x_at"): ("one_pass", "x_ats"),  # one pass over X yields all
    ("S", "seeded"): ("seeded_one_pass", "x_ats_dropped"),
    ("Y", "fused"): ("in_one", "fused_gemms"),  # one persistent kernel, whose tiles are those of all outputs
    ("dX", "fused"): ("in_one", "fused_gemm_sum"),  # one persistent kernel, whose inner loop goes through all products
    ("dA", "pt_x"): ("one_pass", "pt_xs"),  # one pass over X yields all
    ("P dB", "one_pass"): ("one_launch", "p_dbs"),  # one launch for all, where there are few rows
    ("dX dA", "seeded"): ("seeded_one_pass", "dx_das"),
}


def group(linears: tuple[str, ...], *, dropout: bool = False, base: Form = "plain") -> Derivation:
    """The derivation of a group of two linears or more, by the letters or words that its symbols end with.

    ``dropout``: whether their adapters read what it leaves of X, each by a mask of its own, at one rate.
    ``base``: the form of their weights.
    """
    return _group(linears, dropout, base)


@lru_cache
def _group(linears: tuple[str, ...], dropout: bool, base: Form) -> Derivation:
    lone = lone_linear(dropout=dropout, base=base)
    arguments = dict.fromkeys(argument_of(argument, linear) for linear in linears for argument in lone.arguments)
    return derive(
        f"group of {', '.join(linears)}{ON_BASE[base]}{' with dropout' if dropout else ''}",
        symbols=symbols_of(lone, linears),
        facts=lone.facts,
        arguments=sorted(arguments, key=lambda argument: argument.once),  # after those of all linears
        outputs=_names(lone.outputs, linears, SHARED),
        output_gradients=_names(lone.output_gradients, linears, SHARED),
        form=base,
        base=[formula for operation in lone.base for formula in _formulas(_steps(operation), linears, SHARED)],
        table=list(rows_of(lone, linears)),
        evaluated=group(linears, base=base) if dropout else None,
    )


def symbols_of(lone: Derivation, linears: Sequence[str], shared: Sequence[str] = SHARED) -> Iterable[Symbol]:
    """The symbols of a lone linear's table for each of these, but for what they make no use of together."""
    symbols = [symbol for name, symbol in lone.symbols.items() if name not in _LEFT_OUT]
    return dict.fromkeys(_symbol(symbol, linear, shared) for linear in linears for symbol in symbols)


def rows_of(lone: Derivation, linears: Sequence[str], shared: Sequence[str] = SHARED) -> Iterator[Row]:
    """The rows of a lone linear's table, each for all of these linears; with them kernels that compute all in one.

    ``shared``: the symbols that are one of all.
    """
    left_out = {lone.symbols[name] for name in _LEFT_OUT & lone.symbols.keys()}
    for way in lone.table:
        if not {*way.targets, *way.reads}.isdisjoint(left_out):
            continue
        targets = " ".join(_names(way.targets, linears, shared))
        # A kernel of one linear does not add to what is there.
        if not any(isinstance(op, Fused) and set(map(str, op.outputs)) & {*shared} for op in way.operations):
            formulas = list(map(str, way.operations))
            yield row(targets, way.name, *_formulas(formulas, linears, shared), when=way.when)
        together = _TOGETHER.get((" ".join(map(str, way.targets)), way.name)) if len(linears) > 1 else None
        # What dropout leaves of X is another matrix for each.
        if together is not None and lone.symbols.get("H") not in way.reads:
            name, kernel = together
            steps = [step for operation in way.operations for step in _steps(operation)]
            yield row(targets, name, f"{kernel}: {'; '.join(_formulas(steps, linears, shared))}", when=way.when)


def argument_of(argument: Argument, linear: str, shared: Sequence[str] = SHARED) -> Argument:
    """An argument of a lone linear's function, of one of several."""
    gradient = None if argument.gradient is None else renamed(argument.gradient, linear, shared)
    return replace(argument, name=renamed(argument.name, linear, shared), gradient=gradient)


def _steps(operation: Operation) -> list[str]:
    """The formulas of its steps, those of what never leaves a kernel as such."""
    return str(operation).rpartition(": ")[2].split("; ")


def _formulas(formulas: Sequence[str], linears: Sequence[str], shared: Sequence[str]) -> list[str]:
    """Formulas for one linear after another; where any writes a sum, the first of each before the second of any."""
    sums = [name for name in shared if any(formula.startswith(f"{name} ") for formula in formulas)]
    if not sums:
        return [renamed(formula, linear, shared) for linear in linears for formula in formulas]
    found: list[str] = []
    for text in (renamed(formula, linear, shared) for formula in formulas for linear in linears):
        out = text.partition(" ")[0]
        begun = out in sums and any(before.startswith(f"{out} ") for before in found)
        found.append(re.sub(r" \+?= ", " += ", text, count=1) if begun else text)
    return found


def _names(symbols: Sequence[Symbol], linears: Sequence[str], shared: Sequence[str]) -> list[str]:
    """Of symbols, those of all linears one symbol after another; what they share once."""
    return list(dict.fromkeys(renamed(str(symbol), linear, shared) for symbol in symbols for linear in linears))


def _symbol(symbol: Symbol, linear: str, shared: Sequence[str]) -> Symbol:
    own = "OR" if "X" in shared else "IOR"
    shape = tuple(f"{index}_{linear}" if index in own else index for index in symbol.shape)
    return replace(symbol, name=renamed(symbol.name, linear, shared), shape=shape)


def renamed(text: str, linear: str, shared: Sequence[str] = SHARED) -> str:
    """A name, or a formula, with the linear in the names of its symbols and of its scaling, but for what is shared."""

    def named(word: re.Match[str]) -> str:
        return f"{word[0]}_{linear}" if word[0] in _NAMES and word[0] not in shared else word[0]

    return re.sub(r"\b[A-Za-z_]+\b", named, text)
