"""The scheduler against all permutations, and its shortcut against its search."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runlora_gen.algebra import schedule as module
from runlora_gen.algebra.derivation import CAST_ADAPTER
from runlora_gen.algebra.enumerate import Phase, enumerate_programs
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.algebra.operations import Convert, Operation, Symbol
from runlora_gen.algebra.schedule import Size, schedule, workspace

WIDE = frozenset({CAST_ADAPTER})
PROGRAMS = enumerate_programs(LINEAR, ("dX", "dA", "dB"))
WITH_CASTS = enumerate_programs(LINEAR, ("dX", "dA", "dB"), facts=WIDE)
WITH_BIAS = enumerate_programs(LINEAR, ("dX", "dA", "dB", "db"), facts=WIDE)


def _phases(programs) -> list[Phase]:
    return list(dict.fromkeys(phase for p in programs for phase in (p.forward, p.backward)))


PHASES = [*_phases(PROGRAMS), *_phases(WITH_CASTS), *_phases(WITH_BIAS)]
#: Those without a sum over tokens, whose place is of no matter, and of so few operations that all orders can be tried.
SHORT = [phase for phase in _phases((*PROGRAMS, *WITH_CASTS)) if len(phase.operations) < 8]


def elements(sizes: dict[str, int]) -> Size:
    return lambda symbol: symbol.numel(sizes)


dims = st.fixed_dictionaries({name: st.integers(1, 10**5) for name in "TIOR"})


def _valid(order: tuple[Operation, ...], phase: Phase) -> bool:
    """Makers run before readers, and the steps of one way in their order."""
    position = {id(operation): i for i, operation in enumerate(order)}
    for chosen in phase.ways:
        steps = [position[id(operation)] for operation in chosen.operations]
        if steps != sorted(steps):
            return False
        for operation in chosen.operations:
            for other in phase.operations:
                if set(other.outputs) & set(operation.reads) and position[id(other)] > position[id(operation)]:
                    return False
    return len(order) == len(phase.operations)


@cache
def _valid_orders(phase: Phase) -> tuple[tuple[Operation, ...], ...]:
    """Every valid permutation, grown from the front."""
    before: dict[Operation, set[Operation]] = {}
    for chosen in phase.ways:
        for i, operation in enumerate(chosen.operations):
            makers = {o for o in phase.operations if set(o.outputs) & set(operation.reads)}
            before[operation] = makers - {operation} | set(chosen.operations[:i])

    def grow(done: tuple[Operation, ...]) -> Iterator[tuple[Operation, ...]]:
        if len(done) == len(phase.operations):
            yield done
        for operation in phase.operations:
            if operation not in done and before[operation] <= set(done):
                yield from grow((*done, operation))

    return tuple(grow(()))


@cache
def _live(phase: Phase) -> tuple[frozenset[frozenset[Symbol]], ...]:
    """For every order the sets of temporaries that live at once, if each is freed right after its last use.

    But what a forward casts, which lives from its beginning to its end.
    """
    returned = {*phase.goals, *phase.keeps}
    held = {op.out for op in phase.operations if isinstance(op, Convert)} if LINEAR["Y"] in phase.goals else set()
    reads = {op: {*op.reads, *op.outputs} for op in phase.operations}
    found = []
    for order in _valid_orders(phase):
        later: set[Symbol] = set()
        used_later = []
        for operation in reversed(order):
            used_later.append(frozenset(later))
            later |= reads[operation]
        live: set[Symbol] = held - returned
        at_once = []
        for operation, used in zip(order, reversed(used_later), strict=True):
            live |= set(operation.outputs) - returned
            at_once.append(frozenset(live))
            live &= used | held
        found.append(frozenset(at_once))
    return tuple(dict.fromkeys(found))


def _least_peak(phase: Phase, sizes: dict[str, int]) -> int:
    orders = _live(phase)
    totals = {live: sum(s.numel(sizes) for s in live) for order in orders for live in order}
    return min(max(totals[live] for live in order) for order in orders)


@settings(max_examples=5, deadline=None)
@given(sizes=dims)
def test_no_permutation_needs_less(sizes: dict[str, int]) -> None:
    assert len(SHORT) > 350
    for phase in SHORT:
        found = schedule(phase, elements(sizes))
        assert _valid(tuple(step.operation for step in found.steps), phase)
        assert found.workspace == _least_peak(phase, sizes)


@settings(max_examples=3, deadline=None)
@given(sizes=dims)
def test_the_peak_alone_is_that_of_the_schedule(sizes: dict[str, int]) -> None:
    for phase in PHASES:
        assert workspace(phase, elements(sizes)) == schedule(phase, elements(sizes)).workspace


@settings(max_examples=3, deadline=None)
@given(sizes=dims)
def test_the_shortcut_finds_what_the_search_finds(sizes: dict[str, int]) -> None:
    """The order nearest to the table's is taken where nothing can do with less: the search knows no better one."""
    for phase in PHASES:
        flow, by_symbol, _ = module._flow_of(phase, elements(sizes))
        numels = tuple(by_symbol.values())
        peak, order = module._best_order(flow, numels)
        # Without its lower bound the search has to run.
        searched, found = module._best_order(replace(flow, touched=()), numels)
        assert peak == searched and sorted(order) == sorted(found)
        if order != found:
            assert order == flow.order  # as good, and nearer to the table


def test_the_shortcut_is_taken_often_and_not_always() -> None:
    """So that the test above compares both."""
    sizes = {"T": 4096, "I": 512, "O": 2048, "R": 8}
    taken = {True: 0, False: 0}
    for phase in PHASES:
        flow, by_symbol, _ = module._flow_of(phase, elements(sizes))
        if by_symbol:
            numels = tuple(by_symbol.values())
            peaks = [max(sum(numels[n] for n in numbers) for numbers in sets) for sets in (flow.live, flow.touched)]
            taken[peaks[0] == peaks[1]] += 1
    assert min(taken.values()) > 20


def test_casts_of_a_forward_are_held_from_its_beginning_to_its_end() -> None:
    sizes = {"T": 64, "I": 24, "O": 40, "R": 4}
    held = (24 + 40) * 4
    for program in WITH_CASTS:
        steps = [step.operation for step in schedule(program.forward, elements(sizes)).steps]
        assert all(isinstance(operation, Convert) for operation in steps[:2])
        kept = sum(s.numel(sizes) for s in program.forward.held if s in program.kept)
        ways = tuple(way for way in program.forward.ways if not set(way.targets) & set(program.forward.held))
        keeps = tuple(symbol for symbol in program.forward.keeps if symbol not in program.forward.held)
        plain = next(p.forward for p in PROGRAMS if (p.forward.keeps, p.forward.ways) == (keeps, ways))
        assert workspace(program.forward, elements(sizes)) == held - kept + workspace(plain, elements(sizes))


@given(sizes=dims, phase=st.sampled_from(PHASES))
def test_the_frees_that_are_written_are_enough(sizes: dict[str, int], phase: Phase) -> None:
    found = schedule(phase, elements(sizes))
    live: set = set()
    peak = 0
    for step in found.steps:
        live |= set(step.operation.outputs) - {*phase.goals, *phase.keeps}
        peak = max(peak, sum(symbol.numel(sizes) for symbol in live))
        assert set(step.frees) <= live and not set(step.frees) & set(phase.held)
        live -= set(step.frees)
    assert peak == found.workspace


def test_what_is_added_after_the_first_has_no_order() -> None:
    """r = x, then r += b and r += c in either order: what makes c leaves no room for b."""
    x, b, c, large, r = (Symbol(name, ("T",)) for name in ("x", "b", "c", "large", "r"))
    steps = (
        ((x,), (r,), False),
        ((x,), (b,), False),
        ((b,), (r,), True),
        ((x,), (large,), False),
        ((large,), (c,), False),
        ((c,), (r,), True),
    )
    flow = module._flow(steps, frozenset({r}))
    assert flow.before == (0, 0, 0b000011, 0, 0b001000, 0b010001)
    sizes = tuple({b: 5, large: 9, c: 1}[symbol] for symbol in flow.temporaries)
    assert _peak(flow, sizes, (0, 3, 4, 5, 1, 2)) == _peak(flow, sizes, module._best_order(flow, sizes)[1]) == 10


@st.composite
def flows(draw: st.DrawFn) -> tuple[module._Flow, tuple[int, ...]]:
    """Operations with any dependencies, in twos and threes: results that are returned, and summed, and temporaries."""
    results, temporaries = [], [Symbol("X", ("T",))]
    steps = []
    for number in range(draw(st.integers(1, 10))):
        reads = tuple(draw(st.lists(st.sampled_from(temporaries[-5:]), min_size=1, max_size=3, unique=True)))
        if results and draw(st.booleans()):
            steps.append((reads, (draw(st.sampled_from(results)),), True))
            continue
        made = tuple(Symbol(f"t{number}_{i}", ("T",)) for i in range(draw(st.integers(1, 2))))
        (results if draw(st.integers(0, 3)) == 0 else temporaries).extend(made)
        steps.append((reads, made, False))
    flow = module._flow(tuple(steps), frozenset(results))
    return flow, tuple(draw(st.sampled_from([1, 2, 3, 10, 100])) for _ in flow.temporaries)


def _peak(flow: module._Flow, numels: tuple[int, ...], order: tuple[int, ...]) -> int:
    """Of a valid order."""
    peak = done = 0
    for i in order:
        assert not flow.before[i] & ~done and not done >> i & 1
        peak = max(peak, sum(numels[number] for number in flow.alive(done, i)))
        done |= 1 << i
    assert done == (1 << len(flow.before)) - 1
    return peak


@settings(max_examples=200, deadline=None)
@given(flows())
def test_all_searches_find_the_least_peak(found: tuple[module._Flow, tuple[int, ...]]) -> None:
    """By all sets of finished operations; by those of the least peaks; part by part."""
    flow, numels = found
    least, order = module._by_finished_sets(flow, numels)
    assert _peak(flow, numels, order) == least
    if numels:
        peak, order = module._by_peaks(flow, numels)
        assert peak == least == _peak(flow, numels, order)
    parts = [(part, tuple(numels[n] for n in part.temporaries)) for part in flow.parts]
    found_in_parts = [(part, *module._by_finished_sets(part.flow, sizes)) for part, sizes in parts]
    joined = tuple(part.operations[i] for part, _, order in found_in_parts for i in order)
    assert max(peak for _, peak, _ in found_in_parts) == least == _peak(flow, numels, joined)


def test_a_lone_linear_is_searched_as_a_whole() -> None:
    """Ties are broken by the sets of finished operations there, and what is emitted depends on them."""
    assert max(len(phase.operations) for phase in PHASES) <= module._FEW


def _group(count: int, *, one_pass: bool) -> module._Flow:
    """The backwards of some linears on one X, ten operations each; ``one_pass``: with one S and one dA for all."""

    def symbols(name: str) -> tuple[Symbol, ...]:
        return tuple(Symbol(f"{name}{j}", ("T",)) for j in range(count))

    x, dx = Symbol("X", ("T",)), Symbol("dX", ("T",))
    a, b, s, p, g, da, db = map(symbols, ("A", "B", "S", "P", "G", "dA", "dB"))
    steps = [((x, *a), s, False), ((*p, x), da, False)] if one_pass else []
    for j, first in enumerate([True] + [False] * (count - 1)):
        steps += [((), (a[j],), False), ((), (b[j],), False)]
        if not one_pass:
            steps += [((x, a[j]), (s[j],), False), ((p[j], x), (da[j],), False)]
        steps += [
            ((b[j],), (p[j],), False),
            ((x,), (g[j],), False),
            ((), (dx,), not first),
            ((p[j], a[j]), (dx,), True),
            ((s[j],), (db[j],), False),
            ((g[j], a[j]), (Symbol(f"E{j}", ("T",)),), False),
        ]
    results = {dx, *da, *db, *(Symbol(f"E{j}", ("T",)) for j in range(count))}
    return module._flow(tuple(steps), frozenset(results))


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_a_group_is_scheduled_soon(count: int, one_pass: bool) -> None:
    """Thirty operations: sets of finished ones would be a thousand million; it takes some tens of milliseconds."""
    flow = _group(count, one_pass=one_pass)
    assert len(flow.before) == 10 * count - (2 * count - 2 if one_pass else 0)
    shuffler = random.Random(0)
    for _ in range(20):
        numels = tuple(shuffler.choice([1, 2, 10, 100, 1000]) for _ in flow.temporaries)
        start = time.process_time()
        peak, order = module._best_order(flow, numels)
        assert time.process_time() - start < 1
        assert _peak(flow, numels, order) == peak == module._least_peak(flow, numels)
