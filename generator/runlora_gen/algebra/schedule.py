"""The scheduler: the order of operations that needs the least memory for temporaries, and what to free on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from .enumerate import Phase
from .operations import SYMBOLS, Dims, Operation, Symbol, products


@dataclass(frozen=True)
class Step:
    """One operation, and the temporaries to free right after it."""

    operation: Operation
    frees: tuple[Symbol, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Operations in running order.

    ``workspace`` is the peak number of elements in temporaries: tensors that the phase allocates and neither returns
    nor saves.
    """

    steps: tuple[Step, ...]
    workspace: int


def schedule(phase: Phase, dims: Dims) -> Schedule:
    """The order with the smallest peak of temporaries; ties go to the order of the table.

    A search over sets of finished operations (a phase has fewer than ten). A temporary is freed early only where
    letting it live to the end would raise the peak, so that the emitted code holds no idle ``del``.
    """
    operations = phase.operations
    persistent = {*phase.goals, *phase.keeps}
    temporaries = [
        symbol
        for operation in operations
        for symbol in operation.outputs
        if symbol not in persistent and not operation.accumulate
    ]
    before = [_predecessors(operations, i) for i in range(len(operations))]
    sizes = {symbol: symbol.numel(dims) for symbol in temporaries}
    makers = {s: [i for i, op in enumerate(operations) if s in op.outputs] for s in temporaries}
    readers = {s: [i for i, op in enumerate(operations) if s in op.reads] for s in temporaries}

    def live(done: frozenset[int], running: int) -> int:
        """Elements alive while ``running`` runs after ``done``."""
        return sum(
            sizes[s]
            for s in temporaries
            if any(i in done or i == running for i in makers[s])
            and (running in makers[s] or any(i not in done for i in readers[s]))
        )

    # best[done] = (peak, order): built by the number of finished operations.
    best: dict[frozenset[int], tuple[int, tuple[int, ...]]] = {frozenset(): (0, ())}
    for _ in operations:
        reached: dict[frozenset[int], tuple[int, tuple[int, ...]]] = {}
        for done, (peak, order) in best.items():
            for i in range(len(operations)):
                if i not in done and before[i] <= done:
                    key = done | {i}
                    candidate = (max(peak, live(done, i)), (*order, i))
                    if key not in reached or candidate < reached[key]:
                        reached[key] = candidate
        best = reached
    ((peak, order),) = best.values()
    ordered = [operations[i] for i in order]
    frees = _needed_frees(ordered, temporaries, sizes, peak)
    steps = tuple(
        Step(operation, tuple(s for s in temporaries if frees.get(s) == position))
        for position, operation in enumerate(ordered)
    )
    return Schedule(steps, peak)


def _predecessors(operations: Sequence[Operation], index: int) -> frozenset[int]:
    """Who must be finished first: makers of what is read, and the earlier steps of an accumulation."""
    operation = operations[index]
    needed = {i for i, op in enumerate(operations) if set(op.outputs) & set(operation.reads)}
    if operation.accumulate:
        needed |= {i for i in range(index) if set(operations[i].outputs) & set(operation.outputs)}
    return frozenset(needed)


def _needed_frees(
    ordered: Sequence[Operation], temporaries: Sequence[Symbol], sizes: dict[Symbol, int], peak: int
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


#: The gradients, in the order in which the emitted code returns them.
GRADIENTS = tuple(SYMBOLS[name] for name in ("dX", "dA", "dB", "db"))


@lru_cache(maxsize=65536)
def dependents(phase: Phase) -> Mapping[Symbol, frozenset[Symbol]]:
    """For each symbol that a backward reads or makes: the goals that need it.

    The emitted code computes and saves a symbol only if one of these gradients is wanted.
    """
    needed: dict[Symbol, set[Symbol]] = {goal: {goal} for goal in phase.goals}
    # By single products: where only one result of a fused kernel is wanted, its product runs alone.
    steps = [product for operation in phase.operations for product in products(operation)]
    changed = True
    while changed:
        changed = False
        for step in steps:
            goals = set().union(*(needed.get(out, set()) for out in step.outputs))
            for symbol in step.reads:
                known = needed.setdefault(symbol, set())
                if not goals <= known:
                    known |= goals
                    changed = True
    return MappingProxyType({symbol: frozenset(goals) for symbol, goals in needed.items()})
