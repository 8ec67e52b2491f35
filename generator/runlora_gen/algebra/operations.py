"""Symbols and operations: the vocabulary in which the table of identities is written.

An operation is written as the formula that it computes, in a small fixed grammar::

    OUT  =  [ADDEND +] [s *] LEFT[.T] @ RIGHT[.T] [+ BIAS]  a product, optionally scaled, added to, or biased
    OUT +=  LEFT[.T] @ RIGHT[.T]                            a product accumulated into OUT
    OUT  =  FUNCTION(SYMBOL, …)                             one of ``FUNCTIONS``: a sum, a conversion, a map, a draw
    OUT +=  FUNCTION(SYMBOL, …)                             a map accumulated into OUT
    KERNEL: FORMULA; FORMULA; …                             several of them in one pass of a fused kernel

In a product ``W[e]`` is the matrix, of a stack of them over the index E, that belongs to each row: rows are sorted by
E, as tokens are by experts; likewise ``b[e]`` as a bias. ``OUT[e] =`` sums over the rows of each; of two stacks it is
the product of each with each. A scaling is ``s``, or ``s_NAME`` where a site has several. In a kernel ``OUT :=`` makes
what stays within it, and is never written.

FLOPs, bytes, launches, lifetimes, the formula in a docstring and the line of code are all derived from this one object.
``str`` of an operation is its formula in this grammar, which parses back to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, assert_never

#: Sizes of indices by their names: T tokens, I in_features, O out_features, R rank; where a site has several of them,
#: O_q and the like. Where experts have them, T are rows, one for each expert of each of N tokens, and E the experts.
Dims = Mapping[str, int]
#: What elements are stored as. A setting gives activations, what has the base weight's dtype and the trained adapter
#: each its dtype; the others are of ``BITS``: sums in float32, bytes and bits of masks, codes of a quantized weight
#: (two to a byte, or one: numbers of 8 bits), and the state of a generator of random numbers.
Store = Literal["act", "weight", "adapter", "acc32", "byte", "bit", "code", "code8", "seed"]
#: Bits of an element whose size no dtype decides.
BITS: Mapping[Store, int] = {"acc32": 32, "byte": 8, "bit": 1, "code": 4, "code8": 8, "seed": 64}


class _Once(type):
    """Makes one object of all that have the same fields."""

    if not TYPE_CHECKING:  # a checker sees the constructors as they are

        def __call__(cls, *arguments, **named):
            made = super().__call__(*arguments, **named)
            return _ONCE.setdefault((cls, *vars(made).values()), made)


class Once(metaclass=_Once):
    """Made once of equal fields, so that identity is equality: as keys of many caches they cost no time.

    A generation of llama-13b hashes and compares them three million times: written in Python, that was a seventh of it.
    """

    def __reduce__(self) -> tuple[type[Once], tuple[Any, ...]]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]


_ONCE: dict[tuple[Any, ...], Once] = {}


@dataclass(frozen=True, eq=False)
class Symbol(Once):
    """A tensor of the derivation: its name, its shape in named indices, and what its elements are stored as."""

    name: str
    shape: tuple[str, ...]
    store: Store = "act"

    def numel(self, dims: Dims) -> int:
        """Number of elements for concrete dimensions."""
        count = 1
        for dim in self.shape:
            count *= dims[dim]
        return count

    def __lt__(self, other: Symbol) -> bool:
        return (self.name, self.shape, self.store) < (other.name, other.shape, other.store)

    @property
    def coded(self) -> bool:
        """Whether it is codes, with their scales, and no tensor."""
        return self.store in ("code", "code8")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Operand(Once):
    """A symbol as a product reads it, possibly transposed (a view: it costs nothing), or a matrix of a stack a row."""

    symbol: Symbol
    transposed: bool = False
    stacked: bool = False

    @property
    def shape(self) -> tuple[str, ...]:
        """Shape in named indices, of one matrix of a stack, after the transposition."""
        shape = self.symbol.shape[1:] if self.stacked else self.symbol.shape
        return shape[::-1] if self.transposed else shape

    def __str__(self) -> str:
        return f"{_stacked(self.symbol, self.stacked)}{'.T' if self.transposed else ''}"

    @property
    def formula(self) -> str:
        """As docstrings and documentation print it."""
        return f"{_stacked(self.symbol, self.stacked)}{'ᵀ' if self.transposed else ''}"


def _stacked(symbol: Symbol, stacked: bool) -> str:
    return f"{symbol}[{symbol.shape[0].lower()}]" if stacked else str(symbol)


@dataclass(frozen=True, eq=False)
class Contract(Once):
    """``out = [addend +] [s] left @ right [+ bias]``, or ``out += left @ right`` when it accumulates.

    ``stacked``: out is a stack of matrices, each the sum over the rows that belong to it.
    """

    out: Symbol
    left: Operand
    right: Operand
    scaling: str | None = None
    accumulate: bool = False
    addend: Symbol | None = None
    bias: Symbol | None = None
    stacked: bool = False

    def __post_init__(self) -> None:
        left, right, out = self.left.shape, self.right.shape, Operand(self.out, stacked=self.stacked).shape
        if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
            raise ValueError(f"inner dimensions differ in {self.formula}")
        if out != (left[0], right[1]):
            raise ValueError(f"{self.out} has the shape {self.out.shape}, not that of {self.formula}")
        if self.addend is not None and self.addend.shape != self.out.shape:
            raise ValueError(f"{self.addend} has not the shape of {self.out} in {self.formula}")
        if self.bias is not None and self.bias.shape[-1:] != out[1:]:
            raise ValueError(f"{self.bias} has not the shape of a row of {self.out} in {self.formula}")
        if len(stacks := {symbol.shape[0] for symbol in self._stacks}) > 1:
            raise ValueError(f"rows of {self.formula} belong to {' and '.join(sorted(stacks))}")

    @property
    def coded(self) -> bool:
        """Whether both operands are codes: then it is of float8."""
        return self.left.symbol.coded and self.right.symbol.coded

    @property
    def _stacks(self) -> tuple[Symbol, ...]:
        operands = tuple(operand.symbol for operand in (self.left, self.right) if operand.stacked)
        biases = () if self.bias is None or len(self.bias.shape) == 1 else (self.bias,)
        return (*operands, *biases, self.out) if self.stacked else (*operands, *biases)

    @property
    def scaled(self) -> bool:
        """Whether a scaling multiplies it."""
        return self.scaling is not None

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
        return self._text(f"{self.left.formula} {self.right.formula}", " ")

    def __str__(self) -> str:
        return self._text(f"{self.left} @ {self.right}", " * ")

    def _text(self, product: str, times: str) -> str:
        if self.scaling is not None:
            product = f"{self.scaling}{times}{product}"
        if self.addend is not None:
            product = f"{self.addend} + {product}"
        if self.bias is not None:
            product = f"{product} + {_stacked(self.bias, len(self.bias.shape) > 1)}"
        return f"{_stacked(self.out, self.stacked)} {'+=' if self.accumulate else '='} {product}"

    def mnk(self, dims: Dims) -> tuple[int, int, int]:
        """Rows, columns and inner length of the product; over all of a stack, each row is multiplied once."""
        left, right = self.left.shape, self.right.shape
        stacks = dims[self.out.shape[0]] if self.left.stacked and self.right.stacked else 1
        return stacks * dims[left[0]], dims[right[1]], dims[left[1]]


@dataclass(frozen=True, eq=False)
class _Applied(Once):
    """``out = function(operands)``."""

    out: Symbol
    function: str
    operands: tuple[Symbol, ...]

    @property
    def outputs(self) -> tuple[Symbol, ...]:
        """What it writes."""
        return (self.out,)

    @property
    def reads(self) -> tuple[Symbol, ...]:
        """What it reads."""
        return self.operands

    @property
    def accumulate(self) -> bool:
        """Never adds to what its output held, but for a map."""
        return False

    @property
    def formula(self) -> str:
        """The formula as docstrings and documentation print it."""
        return str(self)

    def __str__(self) -> str:
        return f"{self.out} {'+=' if self.accumulate else '='} {self.function}({', '.join(map(str, self.operands))})"

    def _check(self, fits: bool) -> None:
        if not fits:
            raise ValueError(f"{self.out} has the shape {self.out.shape}, not that of {self}")


@dataclass(frozen=True, eq=False)
class Reduce(_Applied):
    """``out = sum(operand)`` over the operand's first index.

    Or ``out = largest(operand)``, the largest magnitude, over its last; ``largest(operand, codes)``: of the operand
    with each column times the scale that the codes have for it; ``dot(operand, other)``, of each row with the other's;
    ``dot(operand, other, more, bias)``, and of each row of a third with its expert's bias.
    """

    def __post_init__(self) -> None:
        shape = self.operands[0].shape
        self._check(self.out.shape == (shape[1:] if self.function == "sum" else shape[:1]))

    @property
    def formula(self) -> str:
        """The formula as docstrings and documentation print it."""
        return f"{self.out} = Σₜ {self.operands[0]}" if self.function == "sum" else str(self)


@dataclass(frozen=True, eq=False)
class Convert(_Applied):
    """``out = cast(operand)``, in the dtype of the activations.

    Likewise ``out = dequantize(codes)``, of codes that name elements of a table, and ``out = rescale(codes)``, of codes
    that are numbers; ``out = quantize(operand, largest)``, in float8, each row divided by a scale that its largest
    magnitude gives, and first each column multiplied by the scale that codes have for it, if those are given, too;
    ``out = transpose(codes)``, as they are multiplied.
    """

    def __post_init__(self) -> None:
        shape = self.operands[0].shape
        self._check(self.out.shape == (shape[::-1] if self.function == "transpose" else shape))


#: What is between the projections of experts and of an MLP, and its gradients.
_ACTIVATES = frozenset({"activate", "activate_backward", "gate_gradient", "up_gradient"})


@dataclass(frozen=True, eq=False)
class Map(_Applied):
    """A function of elements: ``out = drop(operand, mask)``, which also divides by the rate of what is kept.

    Or ``out = weigh(operand, weights)``, each row times its weight; ``out = activate(operand)``, of rows that may hold
    a gate beside what it is multiplied with; ``out = activate_backward(gradient, operand)``, that one's gradient. Where
    the gate is a matrix of its own: ``activate(gate, up)``, ``gate_gradient(gradient, gate, up)``, ``up_gradient(…)``.
    ``out = plus(operand, other)`` within a kernel.
    ``adds``: to what its output held.
    """

    adds: bool = False

    def __post_init__(self) -> None:
        first, *others = self.operands
        if self.activates:
            rows = {operand.shape[0] for operand in (self.out, *self.operands)}
            alike = self.function != "activate_backward" or others[0].shape == self.out.shape
            self._check(len(rows) == 1 and alike)
            return
        shape = self.out.shape[:1] if self.function == "weigh" else self.out.shape
        self._check(first.shape == self.out.shape and all(operand.shape == shape for operand in others))

    @property
    def accumulate(self) -> bool:
        """Whether it adds to what its output held."""
        return self.adds

    @property
    def activates(self) -> bool:
        """Whether it is what lies between linears, or a gradient of that."""
        return self.function in _ACTIVATES

    @property
    def apart(self) -> bool:
        """Whether it is that of a gate and an up which are matrices of their own."""
        return self.activates and len(self.operands) - (self.function != "activate") > 1


@dataclass(frozen=True, eq=False)
class Draw(_Applied):
    """``out = draw(seed)``: random bits, the same whenever they are drawn from the same seed."""

    def __post_init__(self) -> None:
        self._check(self.operands[0].store == "seed")


@dataclass(frozen=True, eq=False)
class Route(_Applied):
    """Between tokens and rows sorted by expert: ``out = gather(tokens)``, a row for each expert of each token.

    ``out = combine(rows)``, of each token the sum of its rows; ``combine(rows, weights)``, each times its weight.
    """

    def __post_init__(self) -> None:
        rows, *weights = self.operands
        fits = rows.shape[1:] == self.out.shape[1:] and rows.shape[0] != self.out.shape[0]
        self._check(fits and all(weight.shape == rows.shape[:1] for weight in weights))


#: One step of arithmetic.
Step: TypeAlias = Contract | Reduce | Convert | Map | Draw | Route
#: What a formula may apply, and to how many symbols.
FUNCTIONS: Mapping[str, tuple[type[Reduce | Convert | Map | Draw | Route], tuple[int, ...]]] = {
    "sum": (Reduce, (1,)),
    "dot": (Reduce, (2, 4)),
    "largest": (Reduce, (1, 2)),
    "cast": (Convert, (1,)),
    "dequantize": (Convert, (1,)),
    "rescale": (Convert, (1,)),
    "quantize": (Convert, (2, 3)),
    "transpose": (Convert, (1,)),
    "drop": (Map, (2,)),
    "weigh": (Map, (2,)),
    "activate": (Map, (1, 2)),
    "activate_backward": (Map, (2,)),
    "gate_gradient": (Map, (3,)),
    "up_gradient": (Map, (3,)),
    "plus": (Map, (2,)),
    "draw": (Draw, (1,)),
    "gather": (Route, (1,)),
    "combine": (Route, (1, 2)),
}


@dataclass(frozen=True, eq=False)
class Fused(Once):
    """Several steps computed together by one kernel: what it reads, it reads once; what it writes, it writes once.

    ``parts`` are also what the torch path runs where the kernel does not apply. ``inner``: results that later parts
    read and nothing else does: the kernel never writes them.
    """

    kernel: str
    parts: tuple[Step, ...]
    inner: tuple[Symbol, ...] = ()

    @cached_property
    def outputs(self) -> tuple[Symbol, ...]:
        """What it writes, each once."""
        return tuple(dict.fromkeys(part.out for part in self.parts if part.out not in self.inner))

    @cached_property
    def reads(self) -> tuple[Symbol, ...]:
        """What it reads, each once: not what an earlier part of it made."""
        made: set[Symbol] = set()
        found: dict[Symbol, None] = {}
        for part in self.parts:
            found.update(dict.fromkeys(symbol for symbol in part.reads if symbol not in made))
            made.add(part.out)
        return tuple(found)

    @property
    def accumulate(self) -> bool:
        """Never adds to what its outputs held before it."""
        return False

    @cached_property
    def products(self) -> tuple[Contract, ...]:
        """Those of its parts that are products."""
        return tuple(part for part in self.parts if isinstance(part, Contract))

    @property
    def formula(self) -> str:
        """The formulas of its parts, accumulations written as one sum."""
        texts: dict[Symbol, str] = {}
        for part in self.parts:
            value = part.formula.split("= ", 1)[1]
            texts[part.out] = f"{texts[part.out]} + {value}" if part.accumulate else part.formula
        return ", ".join(texts.values())

    def __str__(self) -> str:
        texts = (
            str(part).replace(" = ", " := ", 1) if part.out in self.inner and not part.accumulate else str(part)
            for part in self.parts
        )
        return f"{self.kernel}: {'; '.join(texts)}"


Operation: TypeAlias = Step | Fused


def products(operation: Operation) -> tuple[Step, ...]:
    """The single steps of an operation: the parts of a fused one, else itself."""
    return operation.parts if isinstance(operation, Fused) else (operation,)


def biases(operation: Operation) -> tuple[Symbol, ...]:
    """The biases that it adds, which are optional at run time."""
    match operation:
        case Fused():
            return tuple(dict.fromkeys(bias for product in operation.products for bias in biases(product)))
        case Contract():
            return () if operation.bias is None else (operation.bias,)
        case Reduce() | Convert() | Map() | Draw() | Route():
            return ()
        case _:
            assert_never(operation)


@lru_cache(maxsize=4096)
def dimensions(operation: Operation) -> tuple[str, ...]:
    """The indices that an operation has, in the order T, I, O, R; after them others."""
    used = {dim for symbol in (*operation.reads, *operation.outputs) for dim in symbol.shape}
    return tuple(sorted(used, key=lambda dim: ("TIOR".find(dim[0]) % 5, dim)))


_PRODUCT = re.compile(
    r"(?P<out>\w+)(?P<stacked>\[\w+\])? (?P<assign>\+?=) (?:(?P<addend>\w+) \+ )?(?:(?P<scaling>s(?:_\w+)?) \* )?"
    r"(?P<left>\w+)(?P<ls>\[\w+\])?(?P<lt>\.T)? @ (?P<right>\w+)(?P<rs>\[\w+\])?(?P<rt>\.T)?"
    r"(?: \+ (?P<bias>\w+)(?P<bs>\[\w+\])?)?"
)
_FUSED = re.compile(r"(?P<kernel>\w+): (?P<parts>.+)")
_APPLIED = re.compile(r"(?P<out>\w+) (?P<assign>\+?=) (?P<function>\w+)\((?P<operands>\w+(?:, \w+)*)\)")
_INNER = re.compile(r"(\w+) := ")


def parse(formula: str, symbols: Mapping[str, Symbol]) -> Operation:
    """Read one formula of the grammar in the module's docstring; ``symbols``: what it may name.

    Raises:
        ValueError: the text is not of that grammar, names an unknown symbol, or its shapes do not fit.
    """
    match = _FUSED.fullmatch(formula)
    if match is None:
        return _parse_step(formula, symbols)
    texts = match["parts"].split("; ")
    inner = tuple(_named(found[1], symbols, formula) for text in texts if (found := _INNER.match(text)))
    parts = tuple(_parse_step(_INNER.sub(r"\1 = ", text, count=1), symbols) for text in texts)
    return Fused(match["kernel"], parts, inner)


def _parse_step(formula: str, symbols: Mapping[str, Symbol]) -> Step:
    if match := _APPLIED.fullmatch(formula):
        function, operands = match["function"], match["operands"].split(", ")
        kind, counts = FUNCTIONS.get(function, (None, ()))
        if kind is None:
            raise ValueError(f"unknown function {function!r} in {formula!r}; known are {', '.join(FUNCTIONS)}")
        if len(operands) not in counts:
            taken = " or ".join(map(str, counts))
            raise ValueError(f"{function} takes {taken} symbols, not {len(operands)}, in {formula!r}")
        out, given = _named(match["out"], symbols, formula), tuple(_named(name, symbols, formula) for name in operands)
        if match["assign"] == "=":
            return kind(out, function, given)
        if kind is not Map:
            raise ValueError(f"{function} does not add to what is there, in {formula!r}")
        return Map(out, function, given, adds=True)
    match = _PRODUCT.fullmatch(formula)
    if match is None:
        raise ValueError(f"not a formula of the table's grammar: {formula!r}")

    def optional(group: str) -> Symbol | None:
        return None if match[group] is None else _named(match[group], symbols, formula)

    def stacked(symbol: Symbol, index: str | None) -> bool:
        if index is not None and index != f"[{symbol.shape[0].lower()}]":
            raise ValueError(f"{symbol} has no index {index} in {formula!r}")
        return index is not None

    def operand(group: str) -> Operand:
        symbol = _named(match[group], symbols, formula)
        return Operand(symbol, match[f"{group[0]}t"] is not None, stacked(symbol, match[f"{group[0]}s"]))

    out, bias = _named(match["out"], symbols, formula), optional("bias")
    if bias is not None and stacked(bias, match["bs"]) != (len(bias.shape) > 1):
        raise ValueError(f"{bias} is a stack, and is read as none, in {formula!r}")
    return Contract(
        out=out,
        left=operand("left"),
        right=operand("right"),
        scaling=match["scaling"],
        accumulate=match["assign"] == "+=",
        addend=optional("addend"),
        bias=bias,
        stacked=stacked(out, match["stacked"]),
    )


def _named(name: str, symbols: Mapping[str, Symbol], formula: str) -> Symbol:
    try:
        return symbols[name]
    except KeyError:
        raise ValueError(f"unknown symbol {name!r} in {formula!r}") from None
