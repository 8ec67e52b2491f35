"""The generic enumerator: choose one way for every symbol that the choice needs, share what is shared.

Nothing here knows of LoRA: the derivation says what exists, the goals say what is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar
from weakref import WeakValueDictionary

from .derivation import NO_FACTS, Derivation, Facts, Way, holds
from .operations import Fused, Operation, Symbol, biases


@dataclass(frozen=True, eq=False)  # made once by ``phase_of``: identity is equality, and cheap to hash
class Phase:
    """One computation graph: a forward or a backward; made by :func:`phase_of`.

    Attributes:
        derivation: of the site that it computes.
        goals: what must be there at its end (the outputs, or the wanted gradients).
        keeps: forward only: intermediates that it saves for the backward.
        ways: the chosen way of every symbol, in the order of the table.
    """

    derivation: Derivation
    goals: tuple[Symbol, ...]
    keeps: tuple[Symbol, ...]
    ways: tuple[Way, ...]

    @cached_property
    def is_forward(self) -> bool:
        """Whether it computes outputs."""
        return any(output in self.goals for output in self.derivation.outputs)

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """All operations, in the order of the table (the scheduler finds the order to run them in)."""
        return tuple(operation for way in self.ways for operation in way.operations)

    @cached_property
    def held(self) -> tuple[Symbol, ...]:
        """Forward only: casts of the adapter, which live from its beginning to its end."""
        casts = self.derivation.casts
        return tuple(op.outputs[0] for op in self.operations if self.is_forward and op.outputs[0] in casts)

    @cached_property
    def reads(self) -> frozenset[Symbol]:
        """Symbols that come from outside: inputs, and what the forward saved."""
        made = {symbol for operation in self.operations for symbol in operation.outputs}
        return frozenset({s for op in self.operations for s in (*op.reads, *biases(op))} - made)

    @cached_property
    def kernels(self) -> frozenset[str]:
        """Names of the fused kernels that it uses."""
        return frozenset(operation.kernel for operation in self.operations if isinstance(operation, Fused))

    @cached_property
    def made(self) -> frozenset[Symbol]:
        """Everything that it computes or takes from the forward."""
        return frozenset(symbol for way in self.ways for symbol in way.targets)

    @cached_property
    def lossy_in_16_bit(self) -> bool:
        """Whether it rounds a merged weight, which in 16 bits drops small updates."""
        return bool(self.made & self.derivation.lossy)

    @cached_property
    def saved(self) -> tuple[Symbol, ...]:
        """Backward only: the intermediates that it takes from the forward."""
        return tuple(symbol for way in self.ways if way.saved for symbol in way.targets)

    def way_of(self, symbol: Symbol) -> Way:
        """The chosen way of a symbol."""
        return next(way for way in self.ways if symbol in way.targets)

    @cached_property
    def name(self) -> str:
        """The ways of all symbols where the table leaves a choice beside saving them, those of the goals first."""
        undecided = self.derivation.undecided
        first = dict.fromkeys(self.way_of(goal) for goal in self.goals if goal in undecided)
        names = [way.name for way in first]
        for chosen in self.ways:
            rivals = [way for way in self.derivation.table if way.targets == chosen.targets and not way.saved]
            named = len(rivals) > 1 or (len(chosen.targets) > 1 and not undecided.isdisjoint(chosen.targets))
            if named and not chosen.saved and not set(chosen.targets) & set(self.goals):
                names.append(chosen.name)
        return "-".join(names)


@dataclass(frozen=True, eq=False)
class Program:
    """A forward and a backward that fit together: what one autograd function does; made by :func:`pair`.

    ``by_kernel``: symbols whose single product a kernel of ours computes where torch could.
    """

    forward: Phase
    backward: Phase
    by_kernel: tuple[Symbol, ...] = ()

    @property
    def derivation(self) -> Derivation:
        """Of the site that it computes."""
        return self.forward.derivation

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """The operations of both phases."""
        return (*self.forward.operations, *self.backward.operations)

    @cached_property
    def kept(self) -> tuple[Symbol, ...]:
        """Intermediates kept from the forward to the backward."""
        return self.backward.saved

    @cached_property
    def saved_inputs(self) -> tuple[Symbol, ...]:
        """Inputs of the forward that the backward reads."""
        taken = self.backward.reads.difference(self.kept)
        return tuple(symbol for symbol in self.derivation.possible_inputs if symbol in taken)

    @cached_property
    def id(self) -> str:
        """A stable name: ``forward/backward/keep-…[/kernel-…]``, unique within one enumeration."""
        kernels = "".join(f"-{str(symbol).lower()}" for symbol in self.by_kernel)
        return f"{self.plain_id}/kernel{kernels}" if kernels else self.plain_id

    @cached_property
    def plain_id(self) -> str:
        """The id with torch's products in place of kernels for single ones."""
        always = self.derivation.kept
        saved = [way.targets for way in self.backward.ways if way.saved and always.isdisjoint(way.targets)]
        # Of a group all linears keep the same: S_q, S_k and S_v are one word.
        names = [str(targets[0]).partition("_")[0] if len(targets) > 1 else str(targets[0]) for targets in saved]
        kept = "-".join(names).lower() or "nothing"
        return f"{self.forward.name}/{self.backward.name}/keep-{kept}"

    @cached_property
    def made(self) -> frozenset[Symbol]:
        """Everything that it computes or keeps."""
        return self.forward.made | self.backward.made

    @cached_property
    def kernels(self) -> frozenset[str]:
        """Names of the fused kernels that it uses."""
        return self.forward.kernels | self.backward.kernels

    @cached_property
    def lossy_in_16_bit(self) -> bool:
        """Whether it rounds a merged weight, which in 16 bits drops small updates."""
        return self.forward.lossy_in_16_bit or self.backward.lossy_in_16_bit


def enumerate_phases(
    derivation: Derivation,
    goals: Sequence[Symbol],
    given: Iterable[Symbol],
    table: Sequence[Way],
    keeps: Sequence[Symbol] = (),
) -> Iterator[Phase]:
    """Every way to reach the goals (and the keeps) from what is given."""
    wanted = (*(part for goal in goals for part in derivation.parts_of(goal)), *keeps)
    for ways in choices(wanted, given, table):
        if reads_once(derivation, ways):
            yield phase_of(derivation, tuple(goals), tuple(keeps), ways)


def reads_once(derivation: Derivation, ways: Iterable[Way]) -> bool:
    """Whether no two ways read what is given once: two draws are two masks."""
    read = [symbol for way in ways for symbol in way.reads & derivation.once]
    return len(read) == len(set(read))


def choices(wanted: Sequence[Symbol], given: Iterable[Symbol], table: Sequence[Way]) -> Iterator[tuple[Way, ...]]:
    """Every choice of ways that makes what is wanted from what is given, and nothing that is not used.

    A row with several targets is taken only where all of them are wanted.
    """
    given = frozenset(given)

    def expand(pending: tuple[Symbol, ...], chosen: dict[Symbol, Way]) -> Iterator[dict[Symbol, Way]]:
        if not pending:
            yield chosen
            return
        symbol, rest = pending[0], pending[1:]
        if symbol in chosen or symbol in given:
            yield from expand(rest, chosen)
            return
        for way in table:
            if symbol in way.targets and not any(target in chosen for target in way.targets):
                needs = tuple(sorted(way.reads))
                yield from expand(needs + rest, {**chosen, **dict.fromkeys(way.targets, way)})

    for chosen in expand(tuple(wanted), {}):
        used = set(wanted).union(*(way.reads for way in chosen.values()))
        if used >= chosen.keys() and is_acyclic({symbol: way.reads for symbol, way in chosen.items()}):
            taken = set(map(id, chosen.values()))  # rows of the table itself: comparing them took half of all this
            yield tuple(way for way in table if id(way) in taken)


Node = TypeVar("Node")


def is_acyclic(after: Mapping[Node, frozenset[Node] | set[Node]]) -> bool:
    """Whether there is an order in which each comes after all of these that it has to."""
    left = dict(after)
    while ready := [node for node, others in left.items() if others.isdisjoint(left)]:
        for node in ready:
            del left[node]
    return not left


@lru_cache
def enumerate_programs(
    derivation: Derivation, goals: tuple[str, ...], *, table: tuple[Way, ...] | None = None, facts: Facts = NO_FACTS
) -> tuple[Program, ...]:
    """Every forward paired with every backward that gives the wanted gradients.

    Args:
        derivation: of the site.
        goals: names of the wanted gradients.
        table: rows to choose from; None for all of the derivation's.
        facts: what is so of the setting, on which rows and inputs have conditions.

    Returns:
        The programs in a fixed order. A symbol is saved only if the backward uses it; a forward that does not need a
        saved symbol itself computes it for the backward.
    """
    return tuple(
        pair(forward, backward)
        for backward in enumerate_backwards(derivation, goals, table=table, facts=facts)
        for forward in enumerate_forwards(derivation, table=table, facts=facts, keeps=backward.saved)
    )


def iterate_programs(
    derivation: Derivation, goals: Sequence[str], *, table: Sequence[Way] | None = None, facts: Facts = NO_FACTS
) -> Iterator[Program]:
    """The programs of :func:`enumerate_programs`, in its order, one by one: none is kept."""
    serving = rows_that_hold(derivation, table, facts)
    computing = [way for way in serving if not way.saved]
    wanted = tuple(derivation[goal] for goal in goals)
    given = given_to_backward(derivation, facts)
    for backward in enumerate_phases(derivation, wanted, given, rows_of_backward(derivation, serving)):
        given = derivation.inputs(facts)
        for forward in enumerate_phases(derivation, derivation.outputs, given, computing, keeps=backward.saved):
            yield pair(forward, backward)


#: Phases and programs that somebody holds, by what they are made of: each is one object, as they are compared by
#: identity.
_PHASES: WeakValueDictionary[tuple[object, ...], Phase] = WeakValueDictionary()
_PROGRAMS: WeakValueDictionary[tuple[object, ...], Program] = WeakValueDictionary()


def phase_of(
    derivation: Derivation, goals: tuple[Symbol, ...], keeps: tuple[Symbol, ...], ways: tuple[Way, ...]
) -> Phase:
    """The phase of these ways: always the same object, from whichever table they were taken."""
    key = (derivation, goals, keeps, ways)
    phase = _PHASES.get(key)
    if phase is None:
        phase = _PHASES[key] = Phase(*key)
    return phase


def pair(forward: Phase, backward: Phase, by_kernel: tuple[Symbol, ...] = ()) -> Program:
    """The program of a forward and a backward: always the same object, as programs are compared by identity."""
    key = (forward, backward, by_kernel)
    program = _PROGRAMS.get(key)
    if program is None:
        program = _PROGRAMS[key] = Program(*key)
    return program


@lru_cache
def enumerate_backwards(
    derivation: Derivation, goals: tuple[str, ...], *, table: tuple[Way, ...] | None = None, facts: Facts = NO_FACTS
) -> tuple[Phase, ...]:
    """Every way to compute the wanted gradients, also from what a forward can keep."""
    given = given_to_backward(derivation, facts)
    wanted = tuple(derivation[goal] for goal in goals)
    serving = rows_of_backward(derivation, rows_that_hold(derivation, table, facts))
    return tuple(enumerate_phases(derivation, wanted, given, serving))


@lru_cache
def enumerate_forwards(
    derivation: Derivation,
    *,
    table: tuple[Way, ...] | None = None,
    facts: Facts = NO_FACTS,
    keeps: tuple[Symbol, ...] = (),
) -> tuple[Phase, ...]:
    """Every way to compute the outputs and what is to be kept beside them."""
    computing = [way for way in rows_that_hold(derivation, table, facts) if not way.saved]
    return tuple(enumerate_phases(derivation, derivation.outputs, derivation.inputs(facts), computing, keeps=keeps))


def given_to_backward(derivation: Derivation, facts: Facts) -> tuple[Symbol, ...]:
    """What a backward starts from, beside what the forward saved of its intermediates."""
    return (*derivation.inputs(facts, again=True), *derivation.output_gradients)


def rows_of_backward(derivation: Derivation, table: Sequence[Way]) -> list[Way]:
    """The rows that a backward has: what is always kept it takes."""
    return [way for way in table if way.saved or derivation.kept.isdisjoint(way.targets)]


def rows_that_hold(derivation: Derivation, table: Sequence[Way] | None, facts: Facts) -> list[Way]:
    """The rows whose conditions hold."""
    return [way for way in (derivation.table if table is None else table) if holds(way.when, facts)]
