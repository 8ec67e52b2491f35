"""Which of two prices is better: the criteria, the Pareto front, the ranking and its ties."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..algebra.enumerate import Program
from ..cost.vector import Cost, rounded


@dataclass(frozen=True)
class Priced:
    """A program with its price in one setting."""

    program: Program
    cost: Cost


#: The components of the cost vector.
QUANTITIES: Mapping[str, Callable[[Cost], float]] = {
    "time": lambda cost: cost.time_s,
    "device": lambda cost: rounded(cost.device_s),
    "host": lambda cost: rounded(cost.host_s),
    "memory": lambda cost: cost.memory_bytes,
    "saved": lambda cost: cost.saved_bytes,
    "flops": lambda cost: cost.flops,
    "bytes": lambda cost: cost.bytes_moved,
    "launches": lambda cost: cost.launches,
    "error": lambda cost: cost.update_error,
}

#: What may be traded against each other. Bytes and launches are not here: they matter through the time.
PARETO = ("time", "saved", "memory", "flops", "error")
#: How times compare: of equal ones that is the better which takes the device less, then the host.
_TIME = ("time", "device", "host")
#: After the criterion, ties are broken by these in order, and at last by the program's id.
TIE_BREAK = (*_TIME, *PARETO[1:], "bytes", "launches")


def pareto_front(candidates: Iterable[Priced]) -> frozenset[str]:
    """Ids of the programs that no other beats in one of ``PARETO`` without losing in another.

    Programs of equal price dominate one another by the tie-break, so that each price appears once.
    """
    ordered = sorted(candidates, key=lambda candidate: _key(candidate, TIE_BREAK))
    front: list[tuple[tuple[float, ...], ...]] = []
    ids = []
    for candidate in ordered:
        vector = (_values(candidate, _TIME), *(_values(candidate, (name,)) for name in PARETO[1:]))
        # Sorted lexicographically, nothing that comes later can dominate what is on the front already.
        if not any(all(a <= b for a, b in zip(kept, vector, strict=True)) for kept in front):
            front.append(vector)
            ids.append(candidate.program.id)
    return frozenset(ids)


def ranked(candidates: Iterable[Priced], criterion: str) -> list[Priced]:
    """From the best to the worst."""
    return sorted(candidates, key=lambda candidate: _key(candidate, (criterion, *TIE_BREAK)))


@dataclass(frozen=True)
class Difference:
    """Why one program is better than another: the first quantity, in the order of the ranking, that differs.

    Attributes:
        criterion: by which they are ranked.
        quantity: of ``QUANTITIES``.
        better, worse: its two values.
    """

    criterion: str
    quantity: str
    better: float
    worse: float


def difference(better: Priced, worse: Priced, criterion: str) -> Difference | None:
    """Why the first of two is ranked before the other; None where the prices are the same and the id decides."""
    for name in (criterion, *TIE_BREAK):
        values = [QUANTITIES[name](candidate.cost) for candidate in (better, worse)]
        if values[0] != values[1]:
            return Difference(criterion, name, *values)
    return None


def _values(candidate: Priced, quantities: Sequence[str]) -> tuple[float, ...]:
    return tuple(QUANTITIES[name](candidate.cost) for name in quantities)


def _key(candidate: Priced, quantities: Sequence[str]) -> tuple[float | str, ...]:
    return (*_values(candidate, quantities), candidate.program.id)
