"""The scheduler: the order of operations that needs the least memory for temporaries, and what to free on the way."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from .enumerate import Phase
from .operations import Dims, Operation, Symbol


@dataclass(frozen=True)
class Step:
    """One operation, and the temporaries to free right after it."""

    operation: Operation
    frees: tuple[Symbol, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Operations in running order.

    ``workspace`` is the peak number of elements in temporaries: tensors that the phase allocates and neither returns
    nor saves. All of them have the activations' dtype.
    """

    steps: tuple[Step, ...]
    workspace: int


def schedule(phase: Phase, dims: Dims) -> Schedule:
    """The order with the smallest peak of temporaries; ties go to the order of the table.

    A temporary is freed early only where letting it live to the end would raise the peak, so that the emitted code
    holds no idle ``del``.
    """
    flow, sizes, held = _flow_of(phase, dims)
    peak, order = _best_order(flow, tuple(sizes.values()))
    # What is held all the time comes first, and is no matter of order.
    first = [operation for operation in phase.operations if set(operation.outputs) & set(phase.held)]
    movable = [operation for operation in phase.operations if operation not in first]
    ordered = [movable[i] for i in order]
    frees = _needed_frees(ordered, flow.temporaries, sizes, peak)
    steps = tuple(
        Step(operation, tuple(s for s in flow.temporaries if frees.get(s) == position))
        for position, operation in enumerate(ordered)
    )
    return Schedule((*map(Step, first), *steps), held + peak)


def workspace(phase: Phase, dims: Dims) -> int:
    """The peak of :func:`schedule` alone."""
    flow, sizes, held = _flow_of(phase, dims)
    return held + _best_order(flow, tuple(sizes.values()))[0]


@dataclass(frozen=True, eq=False)  # made once by a cache: identity is equality
class _Flow:
    """What the order of some operations depends on, whatever the dimensions are.

    Operations and temporaries are numbered; a set of operations is an integer with their bits.

    Attributes:
        temporaries: what they make and neither return nor save.
        before: for each operation, those that must be finished first.
        makers, readers: of each temporary.
        order: the valid order that is nearest to the table's.
        touched: the temporaries that each operation reads and writes: no order can do with fewer at once.
    """

    temporaries: tuple[Symbol, ...]
    before: tuple[int, ...]
    makers: tuple[int, ...]
    readers: tuple[int, ...]
    order: tuple[int, ...]
    touched: tuple[tuple[int, ...], ...]

    def alive(self, done: int, running: int) -> tuple[int, ...]:
        """Temporaries that live while ``running`` runs after ``done``."""
        now = done | 1 << running
        return tuple(
            number
            for number, (makers, readers) in enumerate(zip(self.makers, self.readers, strict=True))
            if makers & now and (makers >> running & 1 or readers & ~done)
        )

    @cached_property
    def live(self) -> tuple[tuple[int, ...], ...]:
        """The temporaries that live while each operation of ``order`` runs."""
        done = itertools.accumulate((1 << i for i in self.order), initial=0)
        return tuple(map(self.alive, done, self.order))

    @cached_property
    def moves(self) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        """Every operation after every set of operations that it can follow, small sets first, and what lives then."""
        moves = []
        reached = [0]
        for _ in self.before:
            ready = [
                (done, i)
                for done in reached
                for i, needed in enumerate(self.before)
                if not (done >> i & 1 or needed & ~done)
            ]
            moves += [(done, i, self.alive(done, i)) for done, i in ready]
            reached = list(dict.fromkeys(done | 1 << i for done, i in ready))
        return tuple(moves)


def _flow_of(phase: Phase, dims: Dims) -> tuple[_Flow, Mapping[Symbol, int], int]:
    """The flow of a phase's movable operations, the sizes of its temporaries, and the elements that it always holds."""
    held = frozenset(phase.held)
    steps = tuple((op.reads, op.outputs, op.accumulate) for op in phase.operations if not held & set(op.outputs))
    flow = _flow(steps, frozenset({*phase.goals, *phase.keeps}))
    sizes = {symbol: symbol.numel(dims) for symbol in flow.temporaries}
    return flow, sizes, sum(symbol.numel(dims) for symbol in held.difference(phase.keeps))


@lru_cache(maxsize=4096)
def _flow(
    steps: tuple[tuple[tuple[Symbol, ...], tuple[Symbol, ...], bool], ...], persistent: frozenset[Symbol]
) -> _Flow:
    def of(numbers: Iterable[int]) -> int:
        return sum(1 << i for i in numbers)

    makers: dict[Symbol, list[int]] = {}
    readers: dict[Symbol, list[int]] = {}
    before = []
    for i, (reads, outputs, accumulate) in enumerate(steps):
        for symbol in outputs:
            makers.setdefault(symbol, []).append(i)
        for symbol in reads:
            readers.setdefault(symbol, []).append(i)
        # Makers of what is read, and the earlier steps of an accumulation.
        needed = {j for j, step in enumerate(steps) if set(step[1]) & set(reads)}
        before.append(of(needed | {j for j in range(i) if accumulate and set(steps[j][1]) & set(outputs)}))
    order: list[int] = []
    while len(order) < len(steps):
        order.append(next(i for i, needed in enumerate(before) if i not in order and not needed & ~of(order)))
    temporaries = tuple(dict.fromkeys(s for _, outputs, _ in steps for s in outputs if s not in persistent))
    return _Flow(
        temporaries=temporaries,
        before=tuple(before),
        makers=tuple(of(makers[s]) for s in temporaries),
        readers=tuple(of(readers.get(s, ())) for s in temporaries),
        order=tuple(order),
        touched=tuple(
            tuple(number for number, s in enumerate(temporaries) if s in reads or s in outputs)
            for reads, outputs, _ in steps
        ),
    )


@lru_cache(maxsize=65536)
def _best_order(flow: _Flow, numels: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """The smallest peak, and the first order that has it; ``numels`` are the sizes of the flow's temporaries."""

    def size(numbers: Iterable[int]) -> int:
        return sum(numels[number] for number in numbers)

    peak = max(map(size, flow.live), default=0)
    if peak == max(map(size, flow.touched), default=0):
        return peak, flow.order
    # A search over sets of finished operations, the smaller ones first (a phase has fewer than ten operations).
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for done, i, live in flow.moves:
        peak, order = best[done]
        candidate = (max(peak, size(live)), (*order, i))
        after = done | 1 << i
        if after not in best or candidate < best[after]:
            best[after] = candidate
    return best[(1 << len(flow.before)) - 1]


def _needed_frees(
    ordered: Sequence[Operation], temporaries: Sequence[Symbol], sizes: Mapping[Symbol, int], peak: int
) -> dict[Symbol, int]:
    """The positions after which a temporary must be freed for the peak to hold; others live to the end."""
    last_use = {s: max(i for i, op in enumerate(ordered) if s in (*op.reads, *op.outputs)) for s in temporaries}
    first = {s: min(i for i, op in enumerate(ordered) if s in op.outputs) for s in temporaries}
    end = len(ordered)

    def peak_with(frees: dict[Symbol, int]) -> int:
        return max(sum(sizes[s] for s in temporaries if first[s] <= i <= frees.get(s, end)) for i in range(end))

    frees = dict(last_use)
    for symbol in temporaries:
        fewer = {s: i for s, i in frees.items() if s != symbol}
        if peak_with(fewer) <= peak:
            frees = fewer
    return frees
