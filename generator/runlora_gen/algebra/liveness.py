"""What runs, and what is saved for it, when only some of a backward's gradients are wanted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import TypeGuard

from .enumerate import Phase, Program
from .operations import Fused, Operation, Symbol, biases, products
from .work import work


@lru_cache(maxsize=65536)
def dependents(phase: Phase) -> Mapping[Symbol, frozenset[Symbol]]:
    """For each symbol that a backward reads or makes: the goals that need it.

    The emitted code computes and saves a symbol only if one of these gradients is wanted.
    """
    # Sets of goals as integers with their bits.
    needed = {goal: 1 << position for position, goal in enumerate(phase.goals)}
    steps = [
        (outs, (*step.reads, *biases(step), *step.outputs)) for op in phase.operations for outs, step in _apart(op)
    ]
    changed = True
    while changed:
        changed = False
        for outputs, touched in reversed(steps):
            goals = 0
            for out in outputs:
                goals |= needed.get(out, 0)
            for symbol in touched:
                known = needed.get(symbol)
                if known is None or goals & ~known:
                    needed[symbol] = goals | (known or 0)
                    changed = True
    return MappingProxyType({symbol: _goals_of(phase.goals, bits) for symbol, bits in needed.items()})


@lru_cache(maxsize=4096)
def _goals_of(goals: tuple[Symbol, ...], bits: int) -> frozenset[Symbol]:
    return frozenset(goal for position, goal in enumerate(goals) if bits >> position & 1)


def _apart(operation: Operation) -> tuple[tuple[tuple[Symbol, ...], Operation], ...]:
    """What runs alone where it alone is wanted: of a fused kernel with several results the product of each.

    Each with the results for which it runs: it may make others on the way.

    But one that does the same for several linears yields all where any is wanted: the pass over what they read is its
    price.
    """
    if is_told(operation):
        of_a_kind: dict[object, list[Symbol]] = {}
        for out in operation.outputs:
            of_a_kind.setdefault((out.store, *(index[0] for index in out.shape)), []).append(out)
        return tuple((tuple(outs), _part_of(operation, outs)) for outs in of_a_kind.values())
    steps = products(operation)
    alike = len(operation.outputs) == len(steps) > 1 and len(set(map(work, steps))) == 1
    return tuple((step.outputs, step) for step in ((operation,) if alike else steps))


def _part_of(operation: Fused, outs: Iterable[Symbol]) -> Fused:
    """What a kernel does for some of its results."""
    needed, parts = set(outs), []
    for part in reversed(operation.parts):
        if part.out in needed:
            needed.update(part.reads)
            parts.append(part)
    return replace(operation, parts=tuple(parts[::-1]), inner=tuple(out for out in operation.inner if out in needed))


def is_told(operation: Operation) -> TypeGuard[Fused]:
    """Whether a kernel is told which of its results are wanted: its products read what is never written."""
    return isinstance(operation, Fused) and bool(operation.inner) and len(operation.outputs) > 1


@lru_cache(maxsize=65536)
def wanted_operations(phase: Phase, gradients: frozenset[str]) -> tuple[Operation, ...]:
    """The operations of a phase that run when only some of its gradients are wanted; a forward runs whole.

    Of a fused operation with an unwanted result the wanted products run alone, or it is told what is.
    """
    if phase.is_forward:
        return phase.operations
    needed_by = dependents(phase)

    def wanted(out: Symbol) -> bool:
        return any(goal.name in gradients for goal in needed_by[out])

    running: list[Operation] = []
    for operation in phase.operations:
        found = [wanted(out) for out in operation.outputs]
        if all(found) or (is_told(operation) and any(found)):
            running.append(operation)
        elif not is_told(operation):
            running += [step for step in products(operation) if wanted(step.out)]
    return tuple(running)


def saved_symbols(program: Program, gradients: Collection[str]) -> tuple[Symbol, ...]:
    """What the forward hands to the backward when these gradients are wanted: inputs, then kept intermediates."""
    needed_by = dependents(program.backward)
    return tuple(
        symbol
        for symbol in (*program.saved_inputs, *program.kept)
        if any(goal.name in gradients for goal in needed_by[symbol])
    )


@lru_cache(maxsize=65536)
def saved_activations(program: Program, gradients: frozenset[str]) -> tuple[Symbol, ...]:
    """Those of the saved symbols that are no parameters, which live anyway."""
    parameters = set(program.saved_inputs) - program.derivation.activations
    return tuple(symbol for symbol in saved_symbols(program, gradients) if symbol not in parameters)
