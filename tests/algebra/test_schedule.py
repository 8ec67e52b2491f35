"""The scheduler against all permutations, and what the emitted guards rest on."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runlora_gen.algebra.enumerate import Phase, enumerate_programs
from runlora_gen.algebra.operations import SYMBOLS, Operation
from runlora_gen.algebra.schedule import dependents, schedule

PROGRAMS = enumerate_programs(("dX", "dA", "dB"))
PHASES = list(dict.fromkeys([p.forward for p in PROGRAMS] + [p.backward for p in PROGRAMS]))

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
    return True


def _peak(order: tuple[Operation, ...], phase: Phase, sizes: dict[str, int]) -> int:
    """Replay an order, freeing every temporary right after its last use."""
    returned = {*phase.goals, *phase.keeps}
    live: set = set()
    peak = 0
    for i, operation in enumerate(order):
        live |= {out for out in operation.outputs if out not in returned}
        peak = max(peak, sum(s.numel(sizes) for s in live))
        later = {s for other in order[i + 1 :] for s in (*other.reads, *other.outputs)}
        live &= later
    return peak


@cache
def _valid_orders(phase: Phase) -> tuple[tuple[Operation, ...], ...]:
    return tuple(order for order in itertools.permutations(phase.operations) if _valid(order, phase))


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name())
@settings(max_examples=5, deadline=None)
@given(sizes=dims)
def test_no_permutation_needs_less(phase: Phase, sizes: dict[str, int]) -> None:
    found = schedule(phase, sizes)
    order = tuple(step.operation for step in found.steps)
    assert _valid(order, phase)
    assert found.workspace == min(_peak(order, phase, sizes) for order in _valid_orders(phase))


@given(sizes=dims, phase=st.sampled_from(PHASES))
def test_the_frees_that_are_written_are_enough(sizes: dict[str, int], phase: Phase) -> None:
    found = schedule(phase, sizes)
    live: set = set()
    peak = 0
    for step in found.steps:
        live |= set(step.operation.outputs) - {*phase.goals, *phase.keeps}
        peak = max(peak, sum(symbol.numel(sizes) for symbol in live))
        assert set(step.frees) <= live
        live -= set(step.frees)
    assert peak == found.workspace


def test_dependents_name_the_gradients_that_need_a_symbol() -> None:
    program = next(p for p in PROGRAMS if p.id == "lowrank_first/lowrank_first-pt_x-dyt_s/keep-s")
    needed = {str(s): {str(g) for g in goals} for s, goals in dependents(program.backward).items()}
    assert needed["P"] == {"dX", "dA"} and needed["S"] == {"dB"} and needed["X"] == {"dA"} and needed["W"] == {"dX"}
    recompute = next(p for p in PROGRAMS if p.id == "lowrank_first/lowrank_first-pt_x-dyt_s/keep-nothing")
    needed = {str(s): {str(g) for g in goals} for s, goals in dependents(recompute.backward).items()}
    assert needed["X"] == {"dA", "dB"} and needed["A"] == {"dX", "dB"}
    assert SYMBOLS["dY"] in dependents(recompute.backward)
