"""The generic enumerator: choose one way for every symbol that the choice needs, share what is shared.

Nothing here knows of LoRA: the table says what exists, the goals say what is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from .operations import SYMBOLS, Fused, Operation, Symbol
from .table import INPUTS, KERNELS, LOSSY_IN_16_BIT, PAPER_BACKWARDS, TABLE, Way


@dataclass(frozen=True, eq=False)  # made once by the cached enumeration: identity is equality, and cheap to hash
class Phase:
    """One computation graph: a forward or a backward.

    Attributes:
        goals: what must be there at its end (Y, or the wanted gradients).
        keeps: forward only: intermediates that it saves for the backward.
        ways: the chosen way of every symbol, in the order of the table.
    """

    goals: tuple[Symbol, ...]
    keeps: tuple[Symbol, ...]
    ways: tuple[Way, ...]

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """All operations, in the order of the table (the scheduler finds the order to run them in)."""
        return tuple(operation for way in self.ways for operation in way.operations)

    @cached_property
    def reads(self) -> frozenset[Symbol]:
        """Symbols that come from outside: inputs, and what the forward saved."""
        made = {symbol for operation in self.operations for symbol in operation.outputs}
        return frozenset({s for operation in self.operations for s in operation.reads} - made)

    @cached_property
    def saved(self) -> tuple[Symbol, ...]:
        """Backward only: the intermediates that it takes from the forward."""
        return tuple(symbol for way in self.ways if way.saved for symbol in way.targets)

    def way_of(self, symbol: Symbol) -> Way:
        """The chosen way of a symbol."""
        return next(way for way in self.ways if symbol in way.targets)

    @lru_cache(maxsize=65536)  # noqa: B019  # phases live as long as the cached enumeration
    def name(self, table: tuple[Way, ...] = TABLE) -> str:
        """The ways of the goals, and of every other symbol where the table leaves a choice beside saving it."""
        names = [self.way_of(goal).name for goal in self.goals if goal.name != "db"]
        for chosen in self.ways:
            rivals = [way for way in table if way.targets == chosen.targets and not way.saved]
            if not chosen.saved and len(rivals) > 1 and not set(chosen.targets) & set(self.goals):
                names.append(chosen.name)
        return "-".join(names)


@dataclass(frozen=True, eq=False)
class Program:
    """A forward and a backward that fit together: what one autograd function does.

    ``by_kernel``: symbols whose single product a kernel of ours computes where torch could.
    """

    forward: Phase
    backward: Phase
    by_kernel: tuple[Symbol, ...] = ()

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
        """Inputs of the forward that the backward reads, in the order X, W, A, B."""
        return tuple(SYMBOLS[name] for name in ("X", "W", "A", "B") if SYMBOLS[name] in self.backward.reads)

    @cached_property
    def id(self) -> str:
        """A stable name: ``forward/backward/keep-…[/kernel-…]``, unique within one enumeration."""
        kernels = "".join(f"-{str(symbol).lower()}" for symbol in self.by_kernel)
        return f"{self.plain_id}/kernel{kernels}" if kernels else self.plain_id

    @cached_property
    def plain_id(self) -> str:
        """The id with torch's products in place of kernels for single ones."""
        kept = "-".join(str(symbol).lower() for symbol in self.kept) or "nothing"
        return f"{self.forward.name()}/{self.backward.name()}/keep-{kept}"

    @cached_property
    def kernels(self) -> frozenset[str]:
        """Names of the fused kernels that it uses."""
        return frozenset(operation.kernel for operation in self.operations if isinstance(operation, Fused))

    @cached_property
    def seeded(self) -> bool:
        """Whether it draws random numbers."""
        return any(KERNELS[kernel].seeded for kernel in self.kernels)

    @cached_property
    def lossy_in_16_bit(self) -> bool:
        """Whether it rounds a merged weight, which in 16 bits drops small updates."""
        made = {s for phase in (self.forward, self.backward) for way in phase.ways for s in way.targets}
        return bool(made & LOSSY_IN_16_BIT)

    @cached_property
    def paper(self) -> tuple[str, ...]:
        """The paper's labels, like ``forward1/backward5``; empty for a program that it left out."""
        goals = {goal.name: self.backward.way_of(goal).name for goal in self.backward.goals}
        backward = PAPER_BACKWARDS.get((goals.get("dX", ""), goals.get("dA", ""), goals.get("dB", "")))
        if backward is None or self.kept:
            return ()
        return tuple(f"{forward}/{backward}" for forward in self.forward.way_of(SYMBOLS["Y"]).paper)


def enumerate_phases(
    goals: Sequence[Symbol], inputs: Iterable[Symbol], table: Sequence[Way], keeps: Sequence[Symbol] = ()
) -> Iterator[Phase]:
    """Every way to reach the goals (and the keeps) from the inputs.

    A row with several targets is taken only where all of them are wanted.
    """
    given = frozenset(inputs)
    wanted = (*goals, *keeps)

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

    for chosen in expand(wanted, {}):
        used = set(wanted).union(*(way.reads for way in chosen.values()))
        if used >= chosen.keys() and _acyclic(chosen):
            yield Phase(tuple(goals), tuple(keeps), tuple(way for way in table if way in chosen.values()))


def _acyclic(chosen: dict[Symbol, Way]) -> bool:
    done: set[Symbol] = set()
    while len(done) < len(chosen):
        ready = {s for s, way in chosen.items() if s not in done and not (way.reads & chosen.keys()) - done}
        if not ready:
            return False
        done |= ready
    return True


@lru_cache
def enumerate_programs(goals: tuple[str, ...], *, table: tuple[Way, ...] = TABLE) -> tuple[Program, ...]:
    """Every forward paired with every backward that gives the wanted gradients.

    Args:
        goals: wanted gradients, of ``dX``, ``dA``, ``dB``, ``db``.
        table: rows to choose from.

    Returns:
        The programs in a fixed order. A symbol is saved only if the backward uses it; a forward that does not need a
        saved symbol itself computes it for the backward.
    """
    gradients = tuple(SYMBOLS[goal] for goal in goals)
    computing = [way for way in table if not way.saved]
    programs = []
    forwards: dict[tuple[Symbol, ...], list[Phase]] = {}
    for backward in enumerate_phases(gradients, INPUTS | {SYMBOLS["dY"]}, table):
        if backward.saved not in forwards:
            found = enumerate_phases((SYMBOLS["Y"],), INPUTS, computing, keeps=backward.saved)
            forwards[backward.saved] = list(found)
        programs += [Program(forward, backward) for forward in forwards[backward.saved]]
    return tuple(programs)
