"""Which of two prices is better: the criteria, the Pareto front, the ranking and its ties."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..algebra.enumerate import Program
from ..cost.vector import Cost, rounded


@dataclass(frozen=True)
class Priced:
    """A program with its price in one setting."""

    program: Program
    cost: Cost

    @cached_property
    def ties(self) -> tuple[float | str, ...]:
        """What breaks ties: by these the better of two comes first."""
        return (*(QUANTITIES[name](self.cost) for name in TIE_BREAK), self.program.id)


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
    front: list[tuple[float | str, ...]] = []
    ids = []
    for candidate in sorted(candidates, key=lambda candidate: candidate.ties):
        # Sorted lexicographically, nothing that comes later can dominate what is on the front already, nor be faster.
        rest = candidate.ties[len(_TIME) : len(_TIME) + len(PARETO) - 1]
        if not any(all(map(operator.le, kept, rest)) for kept in front):
            front.append(rest)
            ids.append(candidate.program.id)
    return frozenset(ids)


def ranked(candidates: Iterable[Priced], criterion: str) -> list[Priced]:
    """From the best to the worst."""
    return sorted(candidates, key=lambda candidate: (QUANTITIES[criterion](candidate.cost), candidate.ties))


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
