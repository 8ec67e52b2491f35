"""A derivation: everything that can be computed of a site, and the function that the site becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from .kernels import KERNELS, runs
from .operations import Cast, Fused, Operation, Symbol, parse

#: The name of the ways that take what the forward saved, in place of computing it.
SAVED = "saved"


@dataclass(frozen=True)
class Way:
    """One row: a way to obtain its targets, as operations in order. No operations: the forward saved them."""

    targets: tuple[Symbol, ...]
    name: str
    operations: tuple[Operation, ...]
    paper: tuple[str, ...] = ()  # the paper's names for a forward that uses this row

    @property
    def saved(self) -> bool:
        """Whether the forward keeps the target for the backward instead of computing it again."""
        return not self.operations

    @property
    def reads(self) -> frozenset[Symbol]:
        """Symbols that must exist before this way runs."""
        read = {symbol for operation in self.operations for symbol in operation.reads}
        return frozenset(read - set(self.targets))


@dataclass(frozen=True)
class Row:
    """A way as the tables of the sites are written: by names and formulas.

    Attributes:
        target: the symbol, or several, separated by spaces.
        name: of the way.
        formulas: of its operations; none where the forward saved the target.
        paper: the paper's names for a forward that uses this row.
    """

    target: str
    name: str
    formulas: tuple[str, ...] = ()
    paper: tuple[str, ...] = ()


def row(target: str, name: str, *formulas: str, paper: tuple[str, ...] = ()) -> Row:
    """A row of a table."""
    return Row(target, name, formulas, paper)


@dataclass(frozen=True)
class Argument:
    """An argument of the autograd function that a site becomes.

    Attributes:
        name: of the argument; that of its symbol, if it has one.
        annotation: its type.
        gradient: the symbol of its gradient, if it may want one.
        activation: whether it is kept for the backward alone: parameters live anyway.
    """

    name: str
    annotation: str = "Tensor"
    gradient: str | None = None
    activation: bool = False


@dataclass(frozen=True, eq=False)  # made once a site: identity is equality
class Derivation:
    """What can be computed of a site, as a value: what enumerates and orders it knows no symbol.

    Attributes:
        site: what it is of.
        symbols: every symbol that a formula may name.
        arguments: of the function, in their order.
        output: what the function returns.
        output_gradient: what its backward starts from.
        base: what the site computes without adapters, forward and backward.
        table: all ways of all symbols.
        twins: kernels for single products of the table, beside torch's own: they make no other programs, the price
            decides which of the two computes the product.
        stochastic: what takes the place of products where a merged weight is rounded stochastically.
        lossy: rounding these to 16 bits drops updates smaller than half an ulp of the weight.
        deltas: updates that are made as a whole, and rounded.
        paper_backwards: the paper's names for the ways of the gradients that these label, in this order.
        paper_goals: those gradients.
    """

    site: str
    symbols: Mapping[str, Symbol]
    arguments: tuple[Argument, ...]
    output: Symbol
    output_gradient: Symbol
    base: tuple[Operation, ...]
    table: tuple[Way, ...]
    twins: Mapping[Operation, Fused]
    stochastic: Mapping[Operation, Fused]
    lossy: frozenset[Symbol]
    deltas: frozenset[Symbol]
    paper_goals: tuple[Symbol, ...]
    paper_backwards: Mapping[tuple[str, ...], str]

    def __getitem__(self, name: str) -> Symbol:
        return self.symbols[name]

    def parse(self, formula: str) -> Operation:
        """An operation of this site.

        Raises:
            ValueError: it is of another grammar, names an unknown symbol, or its shapes do not fit.
        """
        return parse(formula, self.symbols)

    def way(self, target: str, name: str, *formulas: str) -> Way:
        """A further row of the table."""
        return _way(row(target, name, *formulas), self.symbols)

    @cached_property
    def gradients(self) -> tuple[Symbol, ...]:
        """The gradients that the function may give, in the order in which it returns them."""
        return tuple(self[a.gradient] for a in self.arguments if a.gradient is not None)

    @cached_property
    def activations(self) -> frozenset[Symbol]:
        """Inputs that are no parameters."""
        return frozenset(self[argument.name] for argument in self.arguments if argument.activation)

    @cached_property
    def casts(self) -> Mapping[Symbol, Symbol]:
        """Parameters in the activations' dtype, and what they are cast from."""
        operations = (operation for way in self.table for operation in way.operations)
        return {operation.out: operation.operand for operation in operations if isinstance(operation, Cast)}

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """Every operation that a program may hold, each once."""
        rows = (operation for way in self.table for operation in way.operations)
        return tuple(dict.fromkeys((*rows, *self.twins.values(), *self.stochastic.values())))

    @cached_property
    def undecided(self) -> frozenset[Symbol]:
        """Symbols that the table has several ways to compute."""
        ways = [way for way in self.table if not way.saved]
        return frozenset(s for s in self.symbols.values() if sum(s in way.targets for way in ways) > 1)

    def inputs(self, *, casts: bool) -> tuple[Symbol, ...]:
        """What a forward starts from, in the order in which it is saved.

        ``casts``: the adapter has a dtype of its own, and is cast; else it is given as the products read it.
        """
        uncast = {source: result for result, source in self.casts.items()}
        read = {symbol for operation in self.operations for symbol in operation.reads}
        found = []
        for argument in self.arguments:
            symbol = self.symbols.get(argument.name)
            if symbol is not None and symbol in read and symbol not in self.casts:
                found.append(symbol if casts else uncast.get(symbol, symbol))
        return tuple(found)

    def rows(
        self, *, kernels: bool, dtype: str = "bf16", rank: int = 1, known: Callable[[Operation], bool] = lambda _: True
    ) -> tuple[Way, ...]:
        """The rows that are candidates: with or without fused kernels that take a dtype and a rank, and are known."""

        def serves(operation: Operation) -> bool:
            if not isinstance(operation, Fused):
                return True
            return kernels and runs(operation.kernel, dtype=dtype, rank=rank) and known(operation)

        return tuple(row for row in self.table if all(map(serves, row.operations)))

    def seeded(self, operation: Operation) -> bool:
        """Whether an operation draws random numbers."""
        return isinstance(operation, Fused) and KERNELS[operation.kernel].seeded


def derive(
    site: str,
    *,
    symbols: Iterable[Symbol],
    arguments: Iterable[Argument],
    output: str,
    output_gradient: str,
    base: Iterable[str] = (),
    table: Iterable[Row],
    twins: Iterable[str] = (),
    stochastic: Iterable[str] = (),
    lossy: Iterable[str] = (),
    deltas: Iterable[str] = (),
    paper_goals: Iterable[str] = (),
    paper_backwards: Mapping[tuple[str, ...], str] | None = None,
) -> Derivation:
    """The derivation of a site from its texts; see there for the arguments.

    Raises:
        ValueError: a formula that is of another grammar, names an unknown symbol, or whose shapes do not fit.
    """
    known = {symbol.name: symbol for symbol in symbols}

    def by_product(formulas: Iterable[str]) -> Mapping[Operation, Fused]:
        fused = (parse(formula, known) for formula in formulas)
        return {kernel.parts[0]: kernel for kernel in fused if isinstance(kernel, Fused)}

    return Derivation(
        site=site,
        symbols=known,
        arguments=tuple(arguments),
        output=known[output],
        output_gradient=known[output_gradient],
        base=tuple(parse(formula, known) for formula in base),
        table=tuple(_way(each, known) for each in table),
        twins=by_product(twins),
        stochastic=by_product(stochastic),
        lossy=frozenset(known[name] for name in lossy),
        deltas=frozenset(known[name] for name in deltas),
        paper_goals=tuple(known[name] for name in paper_goals),
        paper_backwards=paper_backwards or {},
    )


def _way(row: Row, symbols: Mapping[str, Symbol]) -> Way:
    targets = tuple(symbols[name] for name in row.target.split())
    return Way(targets, row.name, tuple(parse(formula, symbols) for formula in row.formulas), row.paper)
