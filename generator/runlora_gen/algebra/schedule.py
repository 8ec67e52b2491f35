"""The scheduler: the order of operations that needs the least memory for temporaries, and what to free on the way."""

from __future__ import annotations

import heapq
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce

from .enumerate import Phase
from .operations import Operation, Symbol

#: Of so many operations, which a lone linear has at most, all sets of finished ones are looked at: ties are decided by
#: the least peak of each beginning as well.
_FEW = 12

#: The size of a tensor, in bytes or in whatever is to be least.
Size = Callable[[Symbol], int]


@dataclass(frozen=True)
class Step:
    """One operation, and the temporaries to free right after it."""

    operation: Operation
    frees: tuple[Symbol, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Operations in running order.

    ``workspace`` is the peak size of temporaries: tensors that the phase allocates and neither returns nor saves.
    """

    steps: tuple[Step, ...]
    workspace: int


def schedule(phase: Phase, size: Size) -> Schedule:
    """The order with the smallest peak of temporaries, of these sizes; ties go to the order of the table.

    A temporary is freed early only where letting it live to the end would raise the peak, so that the emitted code
    holds no idle ``del``.
    """
    flow, sizes, held = _flow_of(phase, size)
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


def workspace(phase: Phase, size: Size) -> int:
    """The peak of :func:`schedule` alone."""
    flow, sizes, held = _flow_of(phase, size)
    return held + _least_peak(flow, tuple(sizes.values()))


def workspace_at_least(phase: Phase, size: Size) -> int:
    """What no order can do without: all that one operation touches lives while it runs."""
    flow, sizes, held = _flow_of(phase, size)
    return held + flow.most(flow.touched, tuple(sizes.values()))


def independent_peaks(
    operations: Sequence[Operation], persistent: Iterable[Symbol], size: Size
) -> Iterator[tuple[tuple[Operation, ...], int]]:
    """Operations in groups that share no temporary and can run one after another, with the least peak of each.

    ``persistent``: what is made and is no temporary.
    """
    flow = _flow(tuple((op.reads, op.outputs, op.accumulate) for op in operations), frozenset(persistent))
    sizes = tuple(map(size, flow.temporaries))
    for part in flow.parts:
        peak = _least_peak(part.flow, tuple(sizes[n] for n in part.temporaries))
        yield tuple(operations[i] for i in part.operations), peak


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

    @staticmethod
    def most(together: Iterable[Iterable[int]], numels: Sequence[int]) -> int:
        """The largest size of temporaries that are there together, by their numbers."""
        return max((sum(numels[n] for n in numbers) for numbers in together), default=0)

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

    @cached_property
    def parts(self) -> tuple[_Part, ...]:
        """Parts that share no temporary, in an order in which each can run after those before it."""
        parts = [1 << i for i in range(len(self.before))]

        def join(operations: int) -> None:
            joined = _union(part for part in parts if part & operations)
            parts[:] = sorted([joined, *(part for part in parts if not part & joined)], key=_lowest)

        for makers, readers in zip(self.makers, self.readers, strict=True):
            join(makers | readers)
        while True:
            earlier = {part: _union(self.before[i] for i in _numbers(part)) & ~part for part in parts}
            for middle, part in itertools.product(parts, parts):
                if middle & earlier[part]:
                    earlier[part] |= middle | earlier[middle]
            # What has to run both before and after another part is one with it.
            both = next((a | b for a, b in itertools.combinations(parts, 2) if a & earlier[b] and b & earlier[a]), 0)
            if not both:
                break
            join(both)
        found: list[int] = []
        done = 0
        while len(found) < len(parts):
            found.append(next(part for part in parts if not (part & done or earlier[part] & ~(done | part))))
            done |= found[-1]
        return tuple(_Part.of(self, _numbers(part)) for part in found)


def _union(sets: Iterable[int]) -> int:
    return reduce(operator.or_, sets, 0)


def _lowest(bits: int) -> int:
    return bits & -bits


def _numbers(bits: int) -> list[int]:
    """The numbers in a set that is an integer with their bits."""
    return [i for i in range(bits.bit_length()) if bits >> i & 1]


def _of(numbers: Iterable[int]) -> int:
    """The set of some numbers, each there once."""
    return sum(1 << i for i in numbers)


@dataclass(frozen=True, eq=False)
class _Part:
    """Some operations of a flow and all temporaries that they touch, by their numbers there, as a flow of their own."""

    operations: tuple[int, ...]
    temporaries: tuple[int, ...]
    flow: _Flow

    @classmethod
    def of(cls, whole: _Flow, operations: Sequence[int]) -> _Part:
        """A part that shares no temporary with the others."""
        place = {i: position for position, i in enumerate(operations)}
        temporaries = [n for n, makers in enumerate(whole.makers) if any(makers >> i & 1 for i in operations)]

        def within(bits: int) -> int:
            return sum(1 << place[i] for i in _numbers(bits) if i in place)

        numbers = {n: position for position, n in enumerate(temporaries)}
        flow = _Flow(
            temporaries=tuple(whole.temporaries[n] for n in temporaries),
            before=tuple(within(whole.before[i]) for i in operations),
            makers=tuple(within(whole.makers[n]) for n in temporaries),
            readers=tuple(within(whole.readers[n]) for n in temporaries),
            order=tuple(place[i] for i in whole.order if i in place),
            touched=tuple(tuple(numbers[n] for n in whole.touched[i]) for i in operations),
        )
        return cls(tuple(operations), tuple(temporaries), flow)


def _flow_of(phase: Phase, size: Size) -> tuple[_Flow, Mapping[Symbol, int], int]:
    """The flow of a phase's movable operations, the sizes of its temporaries, and that of what it always holds."""
    flow, held = _sizeless(phase)
    return flow, {symbol: size(symbol) for symbol in flow.temporaries}, sum(map(size, held))


@lru_cache(maxsize=65536)
def _sizeless(phase: Phase) -> tuple[_Flow, frozenset[Symbol]]:
    """What of that no size changes: the flow, and what is always held."""
    held = frozenset(phase.held)
    steps = tuple((op.reads, op.outputs, op.accumulate) for op in phase.operations if not held & set(op.outputs))
    return _flow(steps, frozenset({*phase.goals, *phase.keeps})), held.difference(phase.keeps)


@lru_cache(maxsize=4096)
def _flow(
    steps: tuple[tuple[tuple[Symbol, ...], tuple[Symbol, ...], bool], ...], persistent: frozenset[Symbol]
) -> _Flow:
    makers: dict[Symbol, int] = {}
    readers: dict[Symbol, int] = {}
    for i, (reads, outputs, _) in enumerate(steps):
        for symbol in outputs:
            makers[symbol] = makers.get(symbol, 0) | 1 << i
        for symbol in reads:
            readers[symbol] = readers.get(symbol, 0) | 1 << i
    adding = _of(i for i, (_, _, accumulate) in enumerate(steps) if accumulate)
    before = []
    for i, (reads, outputs, accumulate) in enumerate(steps):
        needed = 0
        # Makers of what is read, and what begins an accumulation: the rest of a sum has no order.
        for symbol in reads:
            needed |= makers.get(symbol, 0)
        for symbol in outputs if accumulate else ():
            needed |= makers[symbol] & ~adding & ((1 << i) - 1)
        before.append(needed)
    order: list[int] = []
    done = 0
    while len(order) < len(steps):
        order.append(next(i for i, needed in enumerate(before) if not (done >> i & 1 or needed & ~done)))
        done |= 1 << order[-1]
    temporaries = tuple(dict.fromkeys(s for _, outputs, _ in steps for s in outputs if s not in persistent))
    return _Flow(
        temporaries=temporaries,
        before=tuple(before),
        makers=tuple(makers[s] for s in temporaries),
        readers=tuple(readers.get(s, 0) for s in temporaries),
        order=tuple(order),
        touched=tuple(
            tuple(number for number, s in enumerate(temporaries) if s in reads or s in outputs)
            for reads, outputs, _ in steps
        ),
    )


@lru_cache(maxsize=65536)
def _best_order(flow: _Flow, numels: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """The smallest peak, and the first order that has it; ``numels`` are the sizes of the flow's temporaries."""
    peak = flow.most(flow.live, numels)
    if peak == flow.most(flow.touched, numels):
        return peak, flow.order
    if len(flow.before) <= _FEW:
        return _by_finished_sets(flow, numels)
    if len(flow.parts) == 1:
        return _by_peaks(flow, numels)
    found = [(part, _best_order(part.flow, tuple(numels[n] for n in part.temporaries))) for part in flow.parts]
    # Nothing lives between parts.
    order = tuple(part.operations[i] for part, (_, ordered) in found for i in ordered)
    return max(peak for _, (peak, _) in found), order


@lru_cache(maxsize=65536)
def _least_peak(flow: _Flow, numels: tuple[int, ...]) -> int:
    """The smallest peak alone, found sooner where ties are of no matter."""
    peak = flow.most(flow.live, numels)
    if peak == flow.most(flow.touched, numels):
        return peak
    if len(flow.parts) == 1:
        return _by_peaks(flow, numels)[0]
    return max(_least_peak(part.flow, tuple(numels[n] for n in part.temporaries)) for part in flow.parts)


def _by_finished_sets(flow: _Flow, numels: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """By all sets of finished operations, the smaller ones first: each is reached with the least peak of its own."""
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for done, i, live in flow.moves:
        peak, order = best[done]
        candidate = (max(peak, sum(numels[number] for number in live)), (*order, i))
        after = done | 1 << i
        if after not in best or candidate < best[after]:
            best[after] = candidate
    return best[(1 << len(flow.before)) - 1]


def _by_peaks(flow: _Flow, numels: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """By sets of finished operations as well, but those first that are reached with the least peak.

    An operation that makes no temporary beside those that live already runs as soon as it can: nothing lives longer for
    it, and some of what it reads may be free. Only where none is ready there is a choice, of what to make next. Of sets
    with equal peaks the last one found goes first, and of its choices the first in the table.
    """
    full = (1 << len(flow.before)) - 1
    makes = [_of(n for n in touched if flow.makers[n] >> i & 1) for i, touched in enumerate(flow.touched)]
    operations = [(i, 1 << i, needed, makes[i]) for i, needed in enumerate(flow.before)]

    touches = [[(1 << n, flow.readers[n], numels[n]) for n in touched] for touched in flow.touched]

    def after(done: int, live: int, size: int, ran: int) -> tuple[int, int]:
        """What still lives, and its size."""
        for bit, readers, numel in touches[ran]:
            if live & bit and not readers & ~done:
                live, size = live & ~bit, size - numel
        return live, size

    came: dict[int, tuple[int, int]] = {}  # from which set, by which operation
    # The peak, the order in which they were found; the set, what lives and its size; whence and by what.
    waiting = [(0, 0, 0, 0, 0, 0, -1)]
    found = 0
    while True:
        peak, _, done, live, size, whence, by = heapq.heappop(waiting)
        if done in came:
            continue
        came[done] = whence, by
        while idle := next(
            ((i, bit) for i, bit, b, m in operations if not (done & bit or b & ~done or m & ~live)), None
        ):
            i, bit = idle
            whence, done = done, done | bit
            live, size = after(done, live, size, i)
            if done in came:
                break
            came[done] = whence, i
        else:
            if done == full:
                break
            for i, bit, needed, made in reversed(operations):
                if not (done & bit or needed & ~done):
                    found -= 1
                    alive = size + sum(numel for number, _, numel in touches[i] if made & ~live & number)
                    entry = (done | bit, *after(done | bit, live | made, alive, i), done, i)
                    heapq.heappush(waiting, (max(peak, alive), found, *entry))
    order = []
    while done:
        done, by = came[done]
        order.append(by)
    return peak, tuple(reversed(order))


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
