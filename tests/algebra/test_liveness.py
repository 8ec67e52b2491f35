"""Which gradients need what: what the emitted guards rest on, and what runs and is saved for some of them alone."""

from __future__ import annotations

import itertools

import pytest
from runlora_gen.algebra.derivation import CAST_ADAPTER
from runlora_gen.algebra.enumerate import enumerate_programs
from runlora_gen.algebra.experts import ACTIVATED
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.algebra.liveness import dependents, is_told, saved_activations, saved_symbols, wanted_operations
from runlora_gen.algebra.operations import Operation, Symbol, products

ALL = ("dX", "dA", "dB", "db")
WIDE = frozenset({CAST_ADAPTER})
PROGRAMS = enumerate_programs(LINEAR, ("dX", "dA", "dB"))
WITH_CASTS = enumerate_programs(LINEAR, ("dX", "dA", "dB"), facts=WIDE)
WITH_BIAS = enumerate_programs(LINEAR, ALL, facts=WIDE)
SOME = [frozenset(some) for count in range(5) for some in itertools.combinations(ALL, count)]


def test_dependents_name_the_gradients_that_need_a_symbol() -> None:
    program = next(p for p in PROGRAMS if p.id == "lowrank_first/lowrank_first-pt_x-dyt_s/keep-s")
    needed = {str(s): {str(g) for g in goals} for s, goals in dependents(program.backward).items()}
    assert needed["P"] == {"dX", "dA"} and needed["S"] == {"dB"} and needed["X"] == {"dA"} and needed["W"] == {"dX"}
    recompute = next(p for p in PROGRAMS if p.id == "lowrank_first/lowrank_first-pt_x-dyt_s/keep-nothing")
    needed = {str(s): {str(g) for g in goals} for s, goals in dependents(recompute.backward).items()}
    assert needed["X"] == {"dA", "dB"} and needed["A"] == {"dX", "dB"}
    assert LINEAR["dY"] in dependents(recompute.backward)


def test_a_cast_is_needed_for_what_reads_it() -> None:
    program = next(p for p in WITH_CASTS if p.id == "lowrank_first/lowrank_first-pt_x-dyt_s/keep-s-a")
    needed = {str(s): {str(g) for g in goals} for s, goals in dependents(program.backward).items()}
    assert needed["A"] == {"dX"} and needed["B"] == needed["lora_B"] == {"dX", "dA"} and "lora_A" not in needed


def reached(phase_operations: tuple[Operation, ...], goals: set[Symbol]) -> set[Symbol]:
    """What is made or read for some goals, walking back from them one product at a time."""
    steps = [step for operation in phase_operations for step in products(operation)]
    found = set(goals)
    while True:
        read = {symbol for step in steps if set(step.outputs) & found for symbol in step.reads}
        if read <= found:
            return found
        found |= read


@pytest.mark.parametrize("gradients", SOME, ids=lambda some: "-".join(sorted(some)) or "none")
def test_what_runs_and_is_saved_is_what_the_wanted_gradients_are_made_of(gradients: frozenset[str]) -> None:
    for program in WITH_BIAS:
        backward = program.backward
        live = reached(backward.operations, {goal for goal in backward.goals if goal.name in gradients})
        running = wanted_operations(backward, gradients)
        steps = [step for operation in running for step in products(operation)]
        every = [step for operation in backward.operations for step in products(operation)]
        assert steps == [step for step in every if step.out in live]
        assert set(saved_symbols(program, gradients)) == {*program.saved_inputs, *program.kept} & live
        inputs = {LINEAR[name] for name in ("W", "lora_A", "lora_B")}
        assert set(saved_activations(program, gradients)) == set(saved_symbols(program, gradients)) - inputs
        assert wanted_operations(program.forward, gradients) == program.forward.operations


def test_of_a_kernel_whose_results_are_not_all_wanted_the_product_runs_alone() -> None:
    table = LINEAR.rows(lambda kernel: True)
    (program,) = (
        program
        for program in enumerate_programs(LINEAR, ("dX", "dA", "dB"), table=table)
        if program.id == "base_first/base_first-pt_x-one_pass/keep-s"
    )

    def running(*gradients: str) -> set[str]:
        return {str(operation) for operation in wanted_operations(program.backward, frozenset(gradients))}

    assert "p_db: P = s * dY @ B; dB = dY.T @ S" in running("dA", "dB")
    assert running("dB") == {"dB = dY.T @ S"}
    assert running("dA") == {"P = s * dY @ B", "dA = P.T @ X"}


def test_what_a_told_kernel_makes_on_the_way_needs_no_more() -> None:
    """dU is made for dBU, whose other factor it does not need."""
    program = next(
        program
        for program in enumerate_programs(ACTIVATED, tuple(map(str, ACTIVATED.gradients)))
        if any(is_told(op) and len(op.outputs) == 5 for op in program.backward.operations)
    )
    needed = {str(s): {str(g) for g in goals} for s, goals in dependents(program.backward).items()}
    assert needed["SU"] == {"dBU"} and needed["BU"] == {"PU"}
    assert needed["dU"] == {"dU", "PU", "dBU"} and needed["P"] >= {"dA", "dU", "dg"}
