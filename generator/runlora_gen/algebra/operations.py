"""Symbols and operations: the vocabulary in which the table of identities is written.

An operation is written as the formula that it computes, in a small fixed grammar::

    OUT  =  [ADDEND +] [s *] LEFT[.T] @ RIGHT[.T] [+ b]     a product, optionally scaled, added to, or biased
    OUT +=  LEFT[.T] @ RIGHT[.T]                            a product accumulated into OUT
    OUT  =  sum(LEFT)                                       a sum over tokens
    OUT  =  cast(LEFT)                                      the same in the activations' dtype
    KERNEL: FORMULA; FORMULA; …                             several products in one pass of a fused kernel

FLOPs, bytes, launches, lifetimes, the formula in a docstring and the line of code are all derived from this one object.
``str`` of an operation is its formula in this grammar, which parses back to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Literal

#: Dimensions of one linear: T tokens, I in_features, O out_features, R rank.
Dims = Mapping[str, int]
#: What elements are stored as: activations, what has the base weight's dtype, and the trained adapter. A setting gives
#: each its dtype.
Store = Literal["act", "weight", "adapter"]


class _Hashed:
    """A frozen dataclass whose hash is computed once: symbols and operations are keys of many caches."""

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))  # type: ignore[arg-type]

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, order=True)
class Symbol(_Hashed):
    """A tensor of the derivation: its name, its shape in named dimensions, and what its elements are stored as."""

    name: str
    shape: tuple[str, ...]
    store: Store = "act"

    def numel(self, dims: Dims) -> int:
        """Number of elements for concrete dimensions."""
        count = 1
        for dim in self.shape:
            count *= dims[dim]
        return count

    __hash__ = _Hashed.__hash__

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Operand(_Hashed):
    """A symbol as an operation reads it, possibly transposed (a view: it costs nothing)."""

    symbol: Symbol
    transposed: bool = False

    @property
    def shape(self) -> tuple[str, ...]:
        """Shape in named dimensions, after the transposition."""
        return self.symbol.shape[::-1] if self.transposed else self.symbol.shape

    __hash__ = _Hashed.__hash__

    def __str__(self) -> str:
        return f"{self.symbol}{'.T' if self.transposed else ''}"

    @property
    def formula(self) -> str:
        """As docstrings and documentation print it."""
        return f"{self.symbol}{'ᵀ' if self.transposed else ''}"


@dataclass(frozen=True)
class Matmul(_Hashed):
    """``out = [addend +] [s] left @ right [+ bias]``, or ``out += left @ right`` when it accumulates."""

    out: Symbol
    left: Operand
    right: Operand
    scaled: bool = False
    accumulate: bool = False
    addend: Symbol | None = None
    bias: Symbol | None = None

    def __post_init__(self) -> None:
        if len(self.left.shape) != 2 or len(self.right.shape) != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ValueError(f"inner dimensions differ in {self.formula}")
        if self.out.shape != (self.left.shape[0], self.right.shape[1]):
            raise ValueError(f"{self.out} has the shape {self.out.shape}, not that of {self.formula}")
        if self.addend is not None and self.addend.shape != self.out.shape:
            raise ValueError(f"{self.addend} has not the shape of {self.out} in {self.formula}")

    __hash__ = _Hashed.__hash__

    @property
    def outputs(self) -> tuple[Symbol, ...]:
        """What it writes."""
        return (self.out,)

    @property
    def reads(self) -> tuple[Symbol, ...]:
        """Symbols read, without the accumulator and without the bias, which is optional at run time."""
        return (self.left.symbol, self.right.symbol) + (() if self.addend is None else (self.addend,))

    @property
    def formula(self) -> str:
        """The formula as docstrings and documentation print it."""
        return self._text(f"{self.left.formula} {self.right.formula}", "s")

    def __str__(self) -> str:
        return self._text(f"{self.left} @ {self.right}", "s *")

    def _text(self, product: str, scaling: str) -> str:
        if self.scaled:
            product = f"{scaling} {product}"
        if self.addend is not None:
            product = f"{self.addend} + {product}"
        if self.bias is not None:
            product = f"{product} + {self.bias}"
        return f"{self.out} {'+=' if self.accumulate else '='} {product}"

    def mnk(self, dims: Dims) -> tuple[int, int, int]:
        """Rows, columns and inner length of the product."""
        return dims[self.out.shape[0]], dims[self.out.shape[1]], dims[self.left.shape[1]]


@dataclass(frozen=True)
class SumTokens(_Hashed):
    """``out = sum of operand over its first dimension``."""

    out: Symbol
    operand: Symbol

    __hash__ = _Hashed.__hash__

    @property
    def outputs(self) -> tuple[Symbol, ...]:
        """What it writes."""
        return (self.out,)

    @property
    def reads(self) -> tuple[Symbol, ...]:
        """What it reads."""
        return (self.operand,)

    @property
    def accumulate(self) -> bool:
        """Never adds to what its output held."""
        return False

    @property
    def formula(self) -> str:
        """The formula as docstrings and documentation print it."""
        return f"{self.out} = Σₜ {self.operand}"

    def __str__(self) -> str:
        return f"{self.out} = sum({self.operand})"


@dataclass(frozen=True)
class Cast(_Hashed):
    """``out = operand in the activations' dtype``."""

    out: Symbol
    operand: Symbol

    __hash__ = _Hashed.__hash__

    @property
    def outputs(self) -> tuple[Symbol, ...]:
        """What it writes."""
        return (self.out,)

    @property
    def reads(self) -> tuple[Symbol, ...]:
        """What it reads."""
        return (self.operand,)

    @property
    def accumulate(self) -> bool:
        """Never adds to what its output held."""
        return False

    @property
    def formula(self) -> str:
        """The formula as docstrings and documentation print it."""
        return f"{self.out} = cast({self.operand})"

    def __str__(self) -> str:
        return self.formula


@dataclass(frozen=True)
class Fused(_Hashed):
    """Several products computed together by one kernel: what it reads, it reads once; what it writes, it writes once.

    ``parts`` are also what the torch path runs where the kernel does not apply.
    """

    kernel: str
    parts: tuple[Matmul, ...]

    __hash__ = _Hashed.__hash__

    @property
    def outputs(self) -> tuple[Symbol, ...]:
        """What it writes, each once."""
        return tuple(dict.fromkeys(part.out for part in self.parts))

    @property
    def reads(self) -> tuple[Symbol, ...]:
        """What it reads, each once."""
        return tuple(dict.fromkeys(symbol for part in self.parts for symbol in part.reads))

    @property
    def accumulate(self) -> bool:
        """Never adds to what its outputs held before it."""
        return False

    @property
    def bias(self) -> Symbol | None:
        """The bias that one of its parts adds."""
        return next((part.bias for part in self.parts if part.bias is not None), None)

    @property
    def formula(self) -> str:
        """The formulas of its parts, accumulations written as one sum."""
        texts: dict[Symbol, str] = {}
        for part in self.parts:
            product = part.formula.split("= ", 1)[1]
            texts[part.out] = f"{texts[part.out]} + {product}" if part.accumulate else f"{part.out} = {product}"
        return ", ".join(texts.values())

    def __str__(self) -> str:
        return f"{self.kernel}: {'; '.join(map(str, self.parts))}"


Operation = Matmul | SumTokens | Cast | Fused


def products(operation: Operation) -> tuple[Matmul | SumTokens | Cast, ...]:
    """The single steps of an operation: the parts of a fused one, else itself."""
    return operation.parts if isinstance(operation, Fused) else (operation,)


@lru_cache(maxsize=4096)
def signature(operation: Operation) -> str:
    """What is the same for operations that do the same work: the formula, with M and D, which have W's shape, as W."""
    result, _, value = operation.formula.partition("= ")
    text = result + "= " + re.sub(r"\b[MD](?=ᵀ|\b)", "W", value)
    return f"{operation.kernel}: {text}" if isinstance(operation, Fused) else text


@lru_cache(maxsize=4096)
def dimensions(operation: Operation) -> tuple[str, ...]:
    """The dimensions that an operation has, in the order T, I, O, R."""
    used = {dim for symbol in (*operation.reads, *operation.outputs) for dim in symbol.shape}
    return tuple(dim for dim in "TIOR" if dim in used)


_PRODUCT = re.compile(
    r"(?P<out>\w+) (?P<assign>\+?=) (?:(?P<addend>\w+) \+ )?(?P<scaled>s \* )?"
    r"(?P<left>\w+)(?P<lt>\.T)? @ (?P<right>\w+)(?P<rt>\.T)?(?: \+ (?P<bias>b))?"
)
_FUSED = re.compile(r"(?P<kernel>\w+): (?P<parts>.+)")
_UNARY = re.compile(r"(?P<out>\w+) = (?P<kind>sum|cast)\((?P<operand>\w+)\)")


def parse(formula: str, symbols: Mapping[str, Symbol]) -> Operation:
    """Read one formula of the grammar in the module's docstring; ``symbols``: what it may name.

    Raises:
        ValueError: the text is not of that grammar, names an unknown symbol, or its shapes do not fit.
    """
    if match := _FUSED.fullmatch(formula):
        parts = tuple(parse(part, symbols) for part in match["parts"].split("; "))
        if not all(isinstance(part, Matmul) for part in parts):
            raise ValueError(f"a fused kernel computes products only: {formula!r}")
        return Fused(match["kernel"], tuple(part for part in parts if isinstance(part, Matmul)))

    def symbol(name: str) -> Symbol:
        try:
            return symbols[name]
        except KeyError:
            raise ValueError(f"unknown symbol {name!r} in {formula!r}") from None

    if match := _UNARY.fullmatch(formula):
        kind = SumTokens if match["kind"] == "sum" else Cast
        return kind(symbol(match["out"]), symbol(match["operand"]))
    match = _PRODUCT.fullmatch(formula)
    if match is None:
        raise ValueError(f"not a formula of the table's grammar: {formula!r}")
    return Matmul(
        out=symbol(match["out"]),
        left=Operand(symbol(match["left"]), match["lt"] is not None),
        right=Operand(symbol(match["right"]), match["rt"] is not None),
        scaled=match["scaled"] is not None,
        accumulate=match["assign"] == "+=",
        addend=None if match["addend"] is None else symbol(match["addend"]),
        bias=None if match["bias"] is None else symbol(match["bias"]),
    )
