"""The programs that no other dominates, found without pricing all: part by part, conditioned on what parts share.

A site falls into parts, such as the linears of a group, that are tied only by what they share: symbols that several
outputs depend on, and rows that compute for several parts at once. For each choice of these, a *condition*, every part
is chosen by itself; a program is a condition with one choice for each part.

Costs add up over the parts, so that a choice is dropped where another of the same part and condition is no worse in
all of them: whatever the rest of a program is, that one is no worse with it. That is exact for what adds up (times,
FLOPs, bytes, launches) and for what is the worst of all parts (the update error). Memory is saved bytes and the larger
peak of temporaries of both phases, and peaks do neither:

- A phase without rows for several parts can run one part after the other. Nothing lives between parts, so its peak is
  the largest of theirs, beside what is held all the time, which adds up.
- Else the parts are entangled. Take the best order of a program with choice b and leave out what choice a does not do:
  no more lives at any time than with b. What a does otherwise is put where it can run, while all temporaries that it
  touches are taken to live throughout: a needs at most their size more than b.

In both, a choice that saves fewer bytes may need as many more for temporaries. So every program that is left out has
one that is left in and dominates it, and whichever of them is best under a criterion and constraints is left in. Of
those, memory is computed exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import or_
from typing import NamedTuple

from ..algebra.derivation import Derivation, Way
from ..algebra.enumerate import (
    Program,
    choices,
    given_to_backward,
    is_acyclic,
    pair,
    phase_of,
    reads_once,
    rows_that_hold,
)
from ..algebra.operations import Fused, Operation, Symbol
from ..algebra.schedule import independent_peaks, workspace
from ..cost.lower import with_kernels
from ..cost.price import price, price_in, update_error
from ..cost.setting import Setting
from ..cost.vector import DEVICE_BOUND, weighted
from ..kernels.sites import draws
from .criterion import Priced

#: Times are added up as whole numbers of this many a second: finer than the digits to which they are compared, and the
#: same in any order.
_TICKS = 1e17


def undominated(
    setting: Setting,
    goals: Sequence[str],
    table: Sequence[Way],
    kernels: tuple[Fused, ...] = (),
    host_share: float = DEVICE_BOUND,
) -> tuple[Priced, ...]:
    """Programs with their prices, among them one that dominates any other.

    Args:
        setting: the circumstances.
        goals: names of the gradients that can be given; those that the setting does not want cost nothing.
        table: the rows that can serve.
        kernels: what computes single products in torch's place.
        host_share: how much of the time is the host's.

    Raises:
        ValueError: a gradient that is not wanted shares symbols with one that is.
    """
    found = _Search(setting, tuple(goals), tuple(table), kernels, host_share).found()
    return tuple(Priced(program, price(program, setting, host_share)) for program in found)


class _Choice(NamedTuple):
    """What was chosen of one part, or of several, in one condition: its costs, and the ways.

    ``held``: bytes of casts that live throughout the forward. ``peaks``: bytes of temporaries of forward and backward
    where that phase can run part by part. ``events``: else what it does with temporaries, as bits. ``uses``: bits of
    what is shared; the choices of one part are only held against those that use the same.
    """

    time: int
    device: int
    host: int
    saved: int
    flops: int
    error: int
    held: int
    peaks: tuple[int, int]
    moved: int
    launches: int
    uses: int
    events: tuple[int, int]
    ways: tuple[tuple[Way, ...], tuple[Way, ...]]

    def joined(self, other: _Choice) -> _Choice:
        """Both together."""
        return _Choice(
            self.time + other.time,
            self.device + other.device,
            self.host + other.host,
            self.saved + other.saved,
            self.flops + other.flops,
            max(self.error, other.error),
            self.held + other.held,
            (max(self.peaks[0], other.peaks[0]), max(self.peaks[1], other.peaks[1])),
            self.moved + other.moved,
            self.launches + other.launches,
            self.uses | other.uses,
            (self.events[0] | other.events[0], self.events[1] | other.events[1]),
            (self.ways[0] + other.ways[0], self.ways[1] + other.ways[1]),
        )


class _Whole(NamedTuple):
    """A choice of all parts, with bytes saved and of the larger peak: at least, if parts are entangled, or exactly."""

    choice: _Choice
    at_least: int
    entangled: bool

    def order(self) -> tuple[int, ...]:
        """What is never after what it dominates."""
        return (*self.choice[:6], self.at_least, self.choice.moved, self.choice.launches)


@dataclass(frozen=True)
class _Part:
    """Results that depend on symbols of their own: what the table has of them.

    Attributes:
        outputs, gradients: the results, the parts of a sum in its place.
        symbols: the results, and all that they may need and no other part does.
        table: the rows that make them.
        wanted: whether its gradients are: else its backward costs nothing.
    """

    outputs: tuple[Symbol, ...]
    gradients: tuple[Symbol, ...]
    symbols: frozenset[Symbol]
    table: tuple[Way, ...]
    wanted: bool


@dataclass(frozen=True)
class _Condition:
    """What is chosen of what parts share: rows of the forward and of the backward.

    ``all_tied``: whether parts can't run one after another, even without them.
    """

    ways: tuple[tuple[Way, ...], tuple[Way, ...]]
    all_tied: bool

    @cached_property
    def made(self) -> tuple[frozenset[Symbol], frozenset[Symbol]]:
        """What the rows make or take from the forward, in either phase."""
        forward, backward = (frozenset(_targets(ways)) for ways in self.ways)
        return forward, backward

    @cached_property
    def computed(self) -> tuple[frozenset[Symbol], frozenset[Symbol]]:
        """What their operations make, in either phase."""
        forward, backward = (
            frozenset(out for way in ways for op in way.operations for out in op.outputs) for ways in self.ways
        )
        return forward, backward

    @cached_property
    def entangled(self) -> tuple[bool, bool]:
        """Whether the parts of a phase are tied."""
        return self.all_tied or bool(self.computed[0]), self.all_tied or bool(self.computed[1])

    @cached_property
    def kept(self) -> frozenset[Symbol]:
        """What they take from the forward."""
        return frozenset(_targets(way for way in self.ways[1] if way.saved))

    @cached_property
    def reads(self) -> tuple[frozenset[Symbol], frozenset[Symbol]]:
        """What they read, in either phase."""
        forward, backward = (frozenset(_reads(ways)) for ways in self.ways)
        return forward, backward


def _targets(ways: Iterable[Way]) -> set[Symbol]:
    return {target for way in ways for target in way.targets}


def _reads(ways: Iterable[Way]) -> set[Symbol]:
    return {read for way in ways for read in way.reads}


class _Search:
    def __init__(
        self,
        setting: Setting,
        goals: tuple[str, ...],
        table: tuple[Way, ...],
        kernels: tuple[Fused, ...],
        host_share: float,
    ) -> None:
        self.setting, self.host_share, self.kernels = setting, host_share, kernels
        self.site: Derivation = setting.derivation
        self.goals = tuple(self.site[goal] for goal in goals)
        self.table = tuple(rows_that_hold(self.site, table, setting.facts))
        given = (self.site.inputs(setting.facts), given_to_backward(self.site, setting.facts))
        self.given = (frozenset(given[0]), frozenset(given[1]))
        self.taken: Mapping[Operation, Operation] = {kernel.parts[0]: kernel for kernel in kernels}
        stochastic = any(map(draws, kernels))
        made: tuple[frozenset[Symbol], ...] = (frozenset(), self.site.deltas, self.site.lossy)
        self.errors = [update_error(symbols, setting, stochastic=stochastic) for symbols in made]
        self.sums = {part: goal for goal in self.goals for part in self.site.parts_of(goal)}
        self.costs: dict[tuple[Operation, bool], tuple[int, ...]] = {}  # of a forward, or not
        operations = dict.fromkeys(self.taken.get(op, op) for way in self.table for op in way.operations)
        #: Times of programs that differ by less may be equal: what they are rounded by, of the time of all rows twice.
        self.tie = sum(max(self._cost(op, False)[:3]) for op in operations) * 2 // 10**11
        self.parts, self.shared_rows = self._divided()
        own = frozenset[Symbol]().union(*(part.symbols for part in self.parts))
        self.shared = frozenset(_targets(self.shared_rows)) - own
        adding = [{out for way in part.table for op in way.operations for out in op.outputs} for part in self.parts]
        self.common_sums = frozenset(s for one, other in itertools.combinations(adding, 2) for s in one & other)
        self.bits: dict[tuple[object, ...], int] = {}

    def found(self) -> list[Program]:
        """The programs that are left."""
        left: list[_Whole] = []
        for condition in self._conditions():
            self.touches = _Touches(self.setting, self.common_sums)
            forward, backward = (self._choice(condition, None, p, condition.ways[p], frozenset()) for p in range(2))
            found = [forward.joined(backward)]
            parts = sorted((self._undominated(self._choices(part, condition)) for part in self.parts), key=len)
            for i, choices_of in enumerate(parts):
                found = [a.joined(b) for a in found for b in choices_of]
                # What is complete is held against all that is complete.
                if len(choices_of) > 1 and i < len(parts) - 1:
                    found = self._undominated(found)
            for whole in sorted(self._completed(found, condition), key=_Whole.order):
                if not self._is_dominated(whole, left):
                    exact = whole._replace(at_least=self._memory(whole))
                    if not self._is_dominated(exact, left):
                        left = [other for other in left if not self._is_dominated(other, [exact])]
                        left.append(exact)
        return [self._program(whole.choice) for whole in left]

    def _divided(self) -> tuple[tuple[_Part, ...], tuple[Way, ...]]:
        """The parts, and the rows of what they share."""
        results = [*self.site.outputs, *(part for goal in self.goals for part in self.site.parts_of(goal))]
        own = [way for way in self.table if len(way.targets) == 1]
        seeds = list(results)
        while True:
            needs = {seed: _closure(seed, own, self.given[1]) for seed in seeds}
            outputs = [needs[output] for output in self.site.outputs]
            shared = {s for first, second in itertools.combinations(outputs, 2) for s in first & second}
            groups: list[set[Symbol]] = []
            for seed in seeds:
                tied = [group for group in groups if group & (needs[seed] - shared)]
                groups = [group for group in groups if group not in tied]
                groups.append((needs[seed] - shared).union(*tied))
            known = shared.union(*groups)
            rest = [way for way in self.table if way not in own and known.issuperset(way.targets)]
            # What only a shared row reads, and rows for several symbols of one part.
            read = sorted(_reads(rest) - known - self.given[1])
            more = [way for way in rest if any(group.issuperset(way.targets) for group in groups)]
            if not (read or more):
                break
            seeds, own = seeds + read, own + more
        groups = [group for group in groups if group]
        wanted = self.setting.gradients
        parts = []
        for group in groups:
            gradients = tuple(result for result in results if result in group and result in self.sums)
            costly = {self.sums[gradient].name in wanted for gradient in gradients}
            if len(costly) > 1:
                raise ValueError(f"some gradients are wanted and some are not of {', '.join(map(str, gradients))}")
            table = tuple(way for way in self.table if group.issuperset(way.targets))
            outputs_of = tuple(output for output in self.site.outputs if output in group)
            parts.append(_Part(outputs_of, gradients, frozenset(group), table, costly != {False}))
        for symbol in self.site.once:
            if sum(symbol in _reads(part.table) for part in parts) > 1:
                raise ValueError(f"{symbol} is given once, and several parts read it")
        rows = (w for w in self.table if known.issuperset(w.targets) and not any(w in part.table for part in parts))
        return tuple(parts), tuple(rows)

    def _conditions(self) -> Iterator[_Condition]:
        """Every choice of the shared rows, of each symbol in each phase at most one."""
        computing = tuple(way for way in self.shared_rows if not way.saved)
        tied = not self._run_one_after_another()
        for forward, backward in itertools.product(_disjoint(computing), _disjoint(self.shared_rows)):
            condition = _Condition((forward, backward), tied)
            read = [reads & self.shared for reads in condition.reads]
            if condition.kept & self.shared <= condition.made[0] and all(map(frozenset.issubset, read, condition.made)):
                yield condition

    def _run_one_after_another(self) -> bool:
        """Whether parts can: no two begin sums that the other adds to."""
        after: dict[_Part, set[_Part]] = {part: set() for part in self.parts}
        for one, other in itertools.permutations(self.parts, 2):
            begun, added = (
                {out for way in part.table for op in way.operations for out in op.outputs if op.accumulate is adds}
                for part, adds in ((one, False), (other, True))
            )
            if begun & added:
                after[other].add(one)
        return is_acyclic(after)

    def _choices(self, part: _Part, condition: _Condition) -> list[_Choice]:
        """The choices of a part, of forwards and backwards those that are left of what keeps the same."""
        made = [made & part.symbols for made in condition.made]
        needed = [sorted(reads & part.symbols) for reads in condition.reads]
        backwards: dict[frozenset[Symbol], list[_Choice]] = {}
        wanted = (*part.gradients, *needed[1])
        for ways in choices(wanted, self.given[1] | condition.made[1], part.table):
            if made[1] <= _reads(ways).union(wanted):
                kept = frozenset(_targets(way for way in ways if way.saved)) | condition.kept & part.symbols
                backwards.setdefault(kept, []).append(self._choice(condition, part, 1, ways, frozenset()))
        computing = tuple(way for way in part.table if not way.saved)
        found = []
        for kept, after in backwards.items():
            wanted = (*part.outputs, *sorted(kept), *needed[0])
            before = [
                self._choice(condition, part, 0, ways, kept)
                for ways in choices(wanted, self.given[0] | condition.made[0], computing)
                if made[0] <= _reads(ways).union(wanted) and reads_once(self.site, (*ways, *condition.ways[0]))
            ]
            pairs = (self._undominated(before), self._undominated(after))
            found += [first.joined(second) for first, second in itertools.product(*pairs)]
        return found

    def _choice(
        self,
        condition: _Condition,
        part: _Part | None,
        phase: int,
        ways: tuple[Way, ...],
        kept: frozenset[Symbol],
    ) -> _Choice:
        """Ways in one phase, with their costs: of a part, or of the shared rows; ``kept``: what a forward keeps."""
        operations = [self.taken.get(op, op) for way in ways for op in way.operations]
        priced = part is None or part.wanted or phase == 0
        costs = [self._cost(op, phase == 0) for op in operations] if priced else []
        time, device, host, flops, moved, launches = map(sum, zip(*costs, strict=True)) if costs else (0,) * 6
        saved = sum(map(self.setting.bytes_of, _targets(way for way in ways if way.saved)))
        made = _targets(ways)
        casts = {out for op in operations for out in op.outputs if phase == 0 and out in self.site.casts}
        peaks, events = [0, 0], [0, 0]
        if part is not None:
            own = [op for op in operations if not casts.issuperset(op.outputs)]
            persistent = {*self.goals, *self.site.outputs, *kept, *condition.kept}
            tied = (condition.reads[phase] | condition.computed[phase]) & (part.symbols | self.shared)
            entangled = list(own) if condition.all_tied else []
            for group, peak in () if condition.all_tied else independent_peaks(own, persistent, self.setting.bytes_of):
                if any(tied.intersection((*op.reads, *op.outputs)) for op in group):
                    entangled += group
                else:
                    peaks[phase] = max(peaks[phase], peak)
            living = {out for op in entangled for out in op.outputs} | tied & condition.computed[phase]
            events[phase] = self.touches.events(phase, entangled, living - persistent)
        return _Choice(
            time=time,
            device=device,
            host=host,
            saved=saved if part is None or part.wanted else 0,
            flops=flops,
            error=2 if made & self.site.lossy else 1 if made & self.site.deltas else 0,
            held=sum(map(self.setting.bytes_of, casts - kept)),
            peaks=(peaks[0], peaks[1]),
            moved=moved,
            launches=launches,
            uses=self._uses(condition, part, phase, ways),
            events=(events[0], events[1]),
            ways=((), ways) if phase else (ways, ()),
        )

    def _uses(self, condition: _Condition, part: _Part | None, phase: int, ways: Sequence[Way]) -> int:
        """What of the shared a choice uses, as bits."""
        read = _reads(ways)
        uses: list[tuple[object, ...]] = [("used", phase, symbol) for symbol in read & self.shared]
        if phase and (part is None or part.wanted):
            uses += [("saved", symbol) for symbol in read & self.site.activations & self.given[1]]
        if phase == 0 and part is None:
            uses += [("used", 0, symbol) for symbol in condition.kept & self.shared]
        # Which shared rows have to wait for which others.
        for (i, row), (j, other) in itertools.product(enumerate(condition.ways[phase]), repeat=2):
            below = (
                set(row.reads)
                if part is None
                else set().union(*(_closure(read, ways, ()) for read in row.reads & part.symbols))
            )
            if below.intersection(other.targets):
                uses.append(("after", phase, i, j))
        return reduce(or_, (self._bit(use) for use in uses), 0)

    def _bit(self, use: tuple[object, ...]) -> int:
        return 1 << self.bits.setdefault(use, len(self.bits))

    def _cost(self, operation: Operation, forward: bool) -> tuple[int, ...]:
        """What adds up: ticks that count, of the device and of the host; FLOPs, bytes moved and launches."""
        if (operation, forward) not in self.costs:
            cost = price_in(operation, self.setting, forward)
            times = (weighted(cost.device_s, cost.host_s, self.host_share), cost.device_s, cost.host_s)
            self.costs[operation, forward] = (
                *(round(time * _TICKS) for time in times),
                cost.flops,
                cost.bytes_moved,
                cost.launches,
            )
        return self.costs[operation, forward]

    def _undominated(self, found: Iterable[_Choice]) -> list[_Choice]:
        """Those that no other dominates, whatever the rest of the program is."""
        groups: dict[int, list[_Choice]] = {}
        for choice in found:
            groups.setdefault(choice.uses, []).append(choice)
        left = []
        for group in groups.values():
            kept: list[_Choice] = []
            for choice in sorted(group, key=_order):
                if not any(self._is_no_worse(a, choice) and self._needs_no_more(a, choice) for a in kept):
                    kept.append(choice)
            left += kept
        return left

    def _is_no_worse(self, a: _Choice, b: _Choice) -> bool:
        """Whether a is before b or equal to it in all that adds up, and in the update error."""
        if a.time > b.time or a.saved > b.saved or a.flops > b.flops:
            return False
        # Device and host decide only where times are equal to the digits to which they are compared.
        if b.time - a.time <= self.tie and (
            a.device > b.device or (b.device - a.device <= self.tie and a.host > b.host)
        ):
            return False
        if a.error > b.error or self.errors[a.error] > self.errors[b.error]:
            return False
        # Where nothing that adds up differs, the rest of a program may make all equal: then ties decide.
        return a[:5] != b[:5] or (a.moved, a.launches) <= (b.moved, b.launches)

    def _needs_no_more(self, a: _Choice, b: _Choice) -> bool:
        """Whether a needs no more memory than b, whatever the rest of the program is."""
        spare = b.saved - a.saved
        for phase, more in enumerate((a.held - b.held, 0)):
            if more > spare or more + a.peaks[phase] - b.peaks[phase] > spare:
                return False
            if more + self.touches.more(a.events[phase], b.events[phase]) > spare:
                return False
        return True

    def _completed(self, found: Iterable[_Choice], condition: _Condition) -> Iterator[_Whole]:
        """Choices of all parts that are programs, with what is saved once, and what memory they need at least."""
        used = [(phase, s) for phase, made in enumerate(condition.made) for s in made & self.shared]
        for choice in found:
            if not all(choice.uses & self._bit(("used", phase, symbol)) for phase, symbol in used):
                continue
            if not all(self._have_an_order(choice, condition, phase) for phase in range(2)):
                continue
            saved = [s for s in self.site.activations if choice.uses & self._bit(("saved", s))]
            whole = choice._replace(saved=choice.saved + sum(map(self.setting.bytes_of, saved)))
            peaks = [max(choice.peaks[phase], self.touches.least(choice.events[phase])) for phase in range(2)]
            yield _Whole(whole, whole.saved + max(whole.held + peaks[0], peaks[1]), any(condition.entangled))

    def _is_dominated(self, found: _Whole, left: Sequence[_Whole]) -> bool:
        return any(a.at_least <= found.at_least and self._is_no_worse(a.choice, found.choice) for a in left)

    def _memory(self, found: _Whole) -> int:
        """Bytes saved and of the larger peak."""
        if not found.entangled:
            return found.at_least
        program = self._program(found.choice)
        phases = (program.forward, program.backward)
        return found.choice.saved + max(workspace(phase, self.setting.bytes_of) for phase in phases)

    def _have_an_order(self, choice: _Choice, condition: _Condition, phase: int) -> bool:
        """Whether no shared row waits for itself."""
        count = range(len(condition.ways[phase]))
        after = {i: {j for j in count if choice.uses & self._bit(("after", phase, i, j))} for i in count}
        return is_acyclic(after)

    def _program(self, choice: _Choice) -> Program:
        forward, backward = ({*ways} for ways in choice.ways)
        after = phase_of(self.site, self.goals, (), tuple(way for way in self.table if way in backward))
        before = phase_of(self.site, self.site.outputs, after.saved, tuple(way for way in self.table if way in forward))
        return with_kernels(pair(before, after), self.kernels)


class _Touches:
    """What operations do with temporaries, numbered: sets of it are integers with bits."""

    def __init__(self, setting: Setting, sums: frozenset[Symbol]) -> None:
        self._setting, self._sums = setting, sums  # those to which several parts add
        self._bits: dict[tuple[object, ...], int] = {}
        self._touched: list[frozenset[Symbol]] = []
        self._more: dict[int, int] = {}

    def events(self, phase: int, operations: Iterable[Operation], temporaries: Set[Symbol]) -> int:
        """That these temporaries are there, and what the operations read and write of them and begin."""
        operations = list(operations)
        adding = (op for op in operations if op.accumulate and not temporaries.isdisjoint(op.reads))
        sums = self._sums.union(*(op.outputs for op in adding))
        found: list[tuple[frozenset[Symbol], tuple[object, ...]]] = [
            (frozenset({symbol}), ("lives", phase, symbol)) for symbol in temporaries
        ]
        for operation in operations:
            read, written = (frozenset(s) & frozenset(temporaries) for s in (operation.reads, operation.outputs))
            if touched := read | written:
                found.append((touched, ("touches", phase, read, written)))
                if begun := sums.intersection(() if operation.accumulate else operation.outputs):
                    found.append((touched, ("begins", phase, read, begun)))  # what adds to it has to wait
        return reduce(or_, (self._bit(*event) for event in found), 0)

    def _bit(self, touched: frozenset[Symbol], event: tuple[object, ...]) -> int:
        if event not in self._bits:
            self._bits[event] = len(self._touched)
            self._touched.append(touched)
        return 1 << self._bits[event]

    def least(self, events: int) -> int:
        """Bytes that live at once, whatever the order is."""
        touched = (self._touched[i] for i in range(events.bit_length()) if events >> i & 1)
        return max((sum(map(self._setting.bytes_of, symbols)) for symbols in touched), default=0)

    def more(self, mine: int, others: int) -> int:
        """Bytes of the temporaries that the first touches otherwise than the second."""
        extra = mine & ~others
        if extra not in self._more:
            touched = (self._touched[i] for i in range(extra.bit_length()) if extra >> i & 1)
            self._more[extra] = sum(map(self._setting.bytes_of, frozenset[Symbol]().union(*touched)))
        return self._more[extra]


def _order(choice: _Choice) -> tuple[int, ...]:
    """What is never after what it dominates."""
    return (*choice[:7], *choice.peaks, choice.moved, choice.launches)


def _closure(symbol: Symbol, table: Iterable[Way], given: Collection[Symbol]) -> set[Symbol]:
    """A symbol, and all that may be needed for it."""
    rows = list(table)
    found, pending = {symbol}, [symbol]
    while pending:
        one = pending.pop()
        more = {read for way in rows if one in way.targets for read in way.reads} - found - set(given)
        found |= more
        pending += more
    return found


def _disjoint(rows: Sequence[Way]) -> Iterator[tuple[Way, ...]]:
    """Sets of rows without a common target."""
    for count in range(len(rows) + 1):
        for chosen in itertools.combinations(rows, count):
            targets = [target for way in chosen for target in way.targets]
            if len(targets) == len(set(targets)):
                yield chosen
