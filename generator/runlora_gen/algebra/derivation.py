"""A derivation: everything that can be computed of a site, and the function that the site becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from ..request.bases import Form
from .operations import Convert, Fused, Once, Operation, Symbol, biases, parse

#: The name of the ways that take what the forward saved, in place of computing it.
SAVED = "saved"
#: What is so of a setting, by name, such as ``CAST_ADAPTER``. A derivation says which it knows.
Facts: TypeAlias = frozenset[str]
NO_FACTS: Facts = frozenset()
#: The adapter has another dtype than the activations.
CAST_ADAPTER = "cast adapter"
#: Weights that are made of codes may be kept for the backward: all of them are the model in 16 bits, so that this is
#: where the memory for it was named.
KEEPS_WEIGHTS = "keeps weights"
#: Activations may be rounded to float8 for the product with the base's codes, and likewise gradients.
FLOAT8_FORWARD, FLOAT8_BACKWARD = "float8 forward", "float8 backward"


def holds(when: tuple[str, ...], facts: Facts) -> bool:
    """Whether all conditions hold, each a fact or ``not`` one."""
    return all((name.removeprefix("not ") in facts) is not name.startswith("not ") for name in when)


@dataclass(frozen=True, eq=False)
class Way(Once):
    """One row: a way to obtain its targets, as operations in order. No operations: the forward saved them."""

    targets: tuple[Symbol, ...]
    name: str
    operations: tuple[Operation, ...]
    paper: tuple[str, ...] = ()  # the paper's names for a forward that uses this row
    when: tuple[str, ...] = ()  # the conditions under which it is one

    @property
    def saved(self) -> bool:
        """Whether the forward keeps the target for the backward instead of computing it again."""
        return not self.operations

    @cached_property
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
        when: the conditions under which it is one, see :func:`holds`: what is invalid is never enumerated.
    """

    target: str
    name: str
    formulas: tuple[str, ...] = ()
    paper: tuple[str, ...] = ()
    when: tuple[str, ...] = ()


def row(target: str, name: str, *formulas: str, paper: tuple[str, ...] = (), when: tuple[str, ...] = ()) -> Row:
    """A row of a table."""
    return Row(target, name, formulas, paper, when)


@dataclass(frozen=True)
class Term:
    """A contribution to a sum.

    Attributes:
        product: as a formula has it, right of the sign.
        first: the name of the way that begins with it, and adds the others to it; None if none does.
        paper: the paper's names for a forward of that way.
    """

    product: str
    first: str | None = None
    paper: tuple[str, ...] = ()


def rows_of_sum(target: str, *terms: Term, bias: str | None = None, when: tuple[str, ...] = ()) -> tuple[Row, ...]:
    """The rows of a sum, whose contributions have no order: one for each that may be written first.

    What comes after the first is accumulated, and costs the same in any order. ``bias`` is added by the first.
    """
    rows = []
    for term in terms:
        if term.first is not None:
            others = (f"{target} += {other.product}" for other in terms if other is not term)
            begun = f"{target} = {term.product}" + ("" if bias is None else f" + {bias}")
            rows.append(row(target, term.first, begun, *others, paper=term.paper, when=when))
    return tuple(rows)


@dataclass(frozen=True)
class Argument:
    """An argument of the autograd function that a site becomes.

    Attributes:
        name: of the argument; that of its symbol, if it has one.
        annotation: its type.
        gradient: the symbol of its gradient, if it may want one.
        left: what its gradient is called where another site's function makes it, of what this one hands over.
        activation: whether it is kept for the backward alone: parameters live anyway.
        when: the conditions under which its symbol is what a forward starts from.
        once: whether it gives the forward what it gives nobody again, as a generator that goes on: one row at most
            reads it.
    """

    name: str
    annotation: str = "Tensor"
    gradient: str | None = None
    left: str | None = None
    activation: bool = False
    once: bool = False
    when: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)  # made once a site: identity is equality
class Derivation:
    """What can be computed of a site, as a value: what enumerates and orders it knows no symbol.

    Attributes:
        site: what it is of.
        symbols: every symbol that a formula may name.
        facts: what the conditions of its rows and arguments may name.
        arguments: of the function, in their order.
        outputs: what the function returns.
        output_gradients: what its backward starts from.
        sums: gradients that are sums over several linears, each with symbols that stand for their parts: the table has
            the ways of every part, whose operations write the sum, so that each linear's is chosen by itself.
        base: what the site computes without adapters, forward and backward.
        table: all ways of all symbols.
        lossy: rounding these to 16 bits drops updates smaller than half an ulp of the weight.
        deltas: updates that are made as a whole, and rounded.
        paper_backwards: the paper's names for the ways of the gradients that these label, in this order.
        paper_goals: those gradients.
        form: of its frozen weights.
        evaluated: what the site computes in evaluation, where that is something else.
        kept: what a backward never makes again, as that saves next to nothing, and doubles the programs.
    """

    site: str
    symbols: Mapping[str, Symbol]
    facts: Facts
    arguments: tuple[Argument, ...]
    outputs: tuple[Symbol, ...]
    output_gradients: tuple[Symbol, ...]
    sums: Mapping[Symbol, tuple[Symbol, ...]]
    base: tuple[Operation, ...]
    table: tuple[Way, ...]
    lossy: frozenset[Symbol]
    deltas: frozenset[Symbol]
    paper_goals: tuple[Symbol, ...]
    paper_backwards: Mapping[tuple[str, ...], str]
    form: Form = "plain"
    evaluated: Derivation | None = None
    kept: frozenset[Symbol] = frozenset()

    def __getitem__(self, name: str) -> Symbol:
        return self.symbols[name]

    def parse(self, formula: str) -> Operation:
        """An operation of this site.

        Raises:
            ValueError: it is of another grammar, names an unknown symbol, or its shapes do not fit.
        """
        return parse(formula, self.symbols)

    def parts_of(self, goal: Symbol) -> tuple[Symbol, ...]:
        """What the table has ways of: the parts of a sum, else the goal itself."""
        return self.sums.get(goal, (goal,))

    def way(self, target: str, name: str, *formulas: str) -> Way:
        """A further row of the table."""
        return _way(row(target, name, *formulas), self.symbols)

    @cached_property
    def gradients(self) -> tuple[Symbol, ...]:
        """The gradients that the function may give, in the order in which it returns them."""
        return tuple(self[a.gradient] for a in self.arguments if a.gradient is not None)

    @cached_property
    def left(self) -> tuple[str, ...]:
        """What is left to another site's function: no symbols of this one."""
        return tuple(argument.left for argument in self.arguments if argument.left is not None)

    @property
    def coded(self) -> bool:
        """Whether it is given codes, of which weights are made."""
        return self.form != "plain"

    @cached_property
    def activations(self) -> frozenset[Symbol]:
        """Inputs that are no parameters."""
        return frozenset(self[argument.name] for argument in self.arguments if argument.activation)

    @cached_property
    def once(self) -> frozenset[Symbol]:
        """Inputs that one row at most may read."""
        return frozenset(self[argument.name] for argument in self.arguments if argument.once)

    @cached_property
    def casts(self) -> Mapping[Symbol, Symbol]:
        """Parameters in the activations' dtype, and what they are cast from."""
        operations = (operation for way in self.table for operation in way.operations)
        return {
            operation.out: operation.operands[0]
            for operation in operations
            if isinstance(operation, Convert) and operation.function == "cast"
        }

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """Every operation of the table, each once."""
        return tuple(dict.fromkeys(operation for way in self.table for operation in way.operations))

    @cached_property
    def undecided(self) -> frozenset[Symbol]:
        """Symbols that the table has several ways to compute."""
        ways = [way for way in self.table if not way.saved]
        return frozenset(s for s in self.symbols.values() if sum(s in way.targets for way in ways) > 1)

    def inputs(self, facts: Facts = NO_FACTS, *, again: bool = False) -> tuple[Symbol, ...]:
        """What a forward starts from where these facts hold, in the order in which it is saved.

        ``again``: what a backward starts from, too.
        """
        given = ((a, symbol) for a, symbol in self._given if holds(a.when, facts))
        return tuple(symbol for argument, symbol in given if not (again and argument.once))

    @cached_property
    def possible_inputs(self) -> tuple[Symbol, ...]:
        """What a backward may read of what a forward is given, whatever holds: biases, too, of what it makes again."""
        added = {bias for operation in self.operations for bias in biases(operation)}
        return tuple(symbol for _, symbol in self._arguments_in(self._read | added))

    @cached_property
    def _given(self) -> tuple[tuple[Argument, Symbol], ...]:
        """Arguments with the symbols that products read of them; a bias is optional, and none."""
        return self._arguments_in(self._read)

    @cached_property
    def _read(self) -> frozenset[Symbol]:
        return frozenset(symbol for operation in self.operations for symbol in operation.reads)

    def _arguments_in(self, symbols: frozenset[Symbol]) -> tuple[tuple[Argument, Symbol], ...]:
        pairs = ((argument, self.symbols.get(argument.name)) for argument in self.arguments)
        return tuple((argument, symbol) for argument, symbol in pairs if symbol is not None and symbol in symbols)

    def rows(self, serves: Callable[[Fused], bool]) -> tuple[Way, ...]:
        """The rows that are candidates, by whether the kernels serve that compute several products."""
        return tuple(row for row in self.table if all(serves(op) for op in row.operations if isinstance(op, Fused)))


def derive(
    site: str,
    *,
    symbols: Iterable[Symbol],
    facts: Iterable[str] = (),
    arguments: Iterable[Argument],
    outputs: Iterable[str],
    output_gradients: Iterable[str],
    sums: Mapping[str, Iterable[str]] | None = None,
    base: Iterable[str] = (),
    table: Iterable[Row],
    lossy: Iterable[str] = (),
    deltas: Iterable[str] = (),
    paper_goals: Iterable[str] = (),
    paper_backwards: Mapping[tuple[str, ...], str] | None = None,
    form: Form = "plain",
    evaluated: Derivation | None = None,
    kept: Iterable[str] = (),
) -> Derivation:
    """The derivation of a site from its texts; see there for the arguments.

    Raises:
        ValueError: a formula that is of another grammar, names an unknown symbol, or whose shapes do not fit; a
            condition on an unknown fact.
    """
    known = {symbol.name: symbol for symbol in symbols}
    rows, given, facts = tuple(table), tuple(arguments), frozenset(facts)
    conditions = (*(each.when for each in rows), *(each.when for each in given))
    for name in (name.removeprefix("not ") for when in conditions for name in when):
        if name not in facts:
            raise ValueError(f"unknown fact {name!r} in a condition; known are {', '.join(sorted(facts)) or 'none'}")

    return Derivation(
        site=site,
        symbols=known,
        facts=facts,
        arguments=given,
        outputs=tuple(known[name] for name in outputs),
        output_gradients=tuple(known[name] for name in output_gradients),
        sums={known[name]: tuple(known[part] for part in parts) for name, parts in (sums or {}).items()},
        base=tuple(parse(formula, known) for formula in base),
        table=tuple(_way(each, known) for each in rows),
        lossy=frozenset(known[name] for name in lossy),
        deltas=frozenset(known[name] for name in deltas),
        paper_goals=tuple(known[name] for name in paper_goals),
        paper_backwards=paper_backwards or {},
        form=form,
        evaluated=evaluated,
        kept=frozenset(known[name] for name in kept),
    )


def _way(row: Row, symbols: Mapping[str, Symbol]) -> Way:
    targets = tuple(symbols[name] for name in row.target.split())
    operations = tuple(parse(formula, symbols) for formula in row.formulas)
    return Way(targets, row.name, operations, row.paper, row.when)
