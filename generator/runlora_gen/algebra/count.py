"""How many programs a derivation has, without listing them.

A program is a solution of an AND/OR graph: one way for every symbol of the forward and of the backward that is needed,
where what the backward takes as saved needs it of the forward. The graph is followed from the results down. What was
chosen above matters below only by what it needs there, so that of all choices with the same needs only the number is
carried on; and parts of the graph that have no needs in common are counted apart, as factors.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from .derivation import NO_FACTS, Derivation, Facts, Way
from .enumerate import given_to_backward, rows_of_backward, rows_that_hold
from .operations import Symbol

#: A symbol, or a ticket to read one, in the forward or in the backward.
_Node: TypeAlias = tuple[bool, Symbol | tuple[Symbol | Way, ...]]


@dataclass(frozen=True)
class _Option:
    """A way in one phase: what it makes, and what it needs that is not given; sets of numbers, as bits."""

    makes: int
    needs: int


def count_programs(
    derivation: Derivation, goals: Sequence[str], *, table: Sequence[Way] | None = None, facts: Facts = NO_FACTS
) -> int:
    """The number of programs that :func:`~.enumerate.iterate_programs` yields for the same arguments."""
    serving = rows_that_hold(derivation, table, facts)
    wanted = [(False, symbol) for symbol in derivation.outputs]
    wanted += [(True, part) for goal in goals for part in derivation.parts_of(derivation[goal])]
    given = {False: set(derivation.inputs(facts)), True: set(given_to_backward(derivation, facts))}
    numbers: dict[_Node, int] = {}

    def bits(nodes: Iterable[_Node]) -> int:
        return sum(1 << numbers.setdefault(node, len(numbers)) for node in dict.fromkeys(nodes))

    options = []
    computing = [way for way in serving if not way.saved]
    phases = ((False, computing), (True, rows_of_backward(derivation, serving)))
    for backward, way in ((backward, way) for backward, ways in phases for way in ways):
        makes = bits((backward, target) for target in way.targets)
        if way.saved:
            options.append(_Option(makes, bits((False, target) for target in way.targets)))
        else:
            needs = bits((backward, read) for read in way.reads if read not in given[backward])
            for read in way.reads & derivation.once:
                # It needs a ticket of its own, which is made with the one that there is for all.
                ticket = bits([(backward, (read,)), (backward, (read, way))])
                options.append(_Option(ticket, 0))
                needs |= ticket
            options.append(_Option(makes, needs))
    # What is given is made by nothing.
    options += [_Option(1 << number, 0) for (phase, symbol), number in numbers.items() if symbol in given[phase]]
    return _count(options, bits(node for node in wanted if node[1] not in given[node[0]]), len(numbers))


def _count(options: Sequence[_Option], goals: int, size: int) -> int:
    """The number of choices of options that make all goals and what is needed for them, nothing else, in no circle."""
    groups = _groups(options, size)
    # Tables of what is needed of groups to come, and in how many ways that came about: one for each goal, at first.
    tables: list[Counter[int]] = [Counter([1 << number]) for number in _numbers(goals)]
    while groups:
        ready = [
            group for group in groups if not any(other.reached & group.nodes for other in groups if other != group)
        ]
        group = min(ready, key=partial(_work, tables))
        groups.remove(group)
        if together := [table for table in tables if group.is_needed_in(table)]:
            tables = [table for table in tables if not group.is_needed_in(table)]
            tables.append(group.resolved(_product(together)))
    return math.prod(table[0] for table in tables)


def _work(tables: Sequence[Mapping[int, int]], group: _Group) -> int:
    return math.prod(len(table) for table in tables if group.is_needed_in(table))


def _product(tables: Sequence[Mapping[int, int]]) -> Mapping[int, int]:
    """The table of all together: what is needed by one or the other, and the product of the numbers."""
    joined: Mapping[int, int] = {0: 1}
    for table in tables:
        both: Counter[int] = Counter()
        for (first, ways), (second, others) in itertools.product(joined.items(), table.items()):
            both[first | second] += ways * others
        joined = both
    return joined


@dataclass(frozen=True, eq=False)
class _Group:
    """What has to be decided together: what one option makes at once, and what could be needed in a circle.

    ``reached``: all that may be needed for it.
    """

    nodes: int
    reached: int
    options: tuple[_Option, ...]

    def is_needed_in(self, table: Mapping[int, int]) -> bool:
        """Whether something of a table needs it."""
        return any(needed & self.nodes for needed in table)

    def resolved(self, table: Mapping[int, int]) -> Counter[int]:
        """The table after the choice of the ways in this group."""
        result: Counter[int] = Counter()
        found: dict[int, Counter[int]] = {}
        for needed, ways in table.items():
            mine = needed & self.nodes
            if mine not in found:
                found[mine] = Counter(self._choices(mine))
            for further, choices in found[mine].items():
                result[needed & ~self.nodes | further] += ways * choices
        return result

    def _choices(self, needed: int) -> Iterator[int]:
        """What each choice that makes what is needed, and nothing else, needs outside the group."""

        def expand(pending: int, chosen: tuple[_Option, ...]) -> Iterator[tuple[_Option, ...]]:
            if not pending:
                yield chosen
                return
            made = _union(option.makes for option in chosen)
            for option in self.options:
                if option.makes & pending & -pending and not option.makes & made:
                    after = (pending | option.needs & self.nodes) & ~(made | option.makes)
                    yield from expand(after, (*chosen, option))

        for chosen in expand(needed, ()):
            needs = _union(option.needs for option in chosen)
            if not _union(option.makes for option in chosen) & ~(needed | needs) and self._acyclic(chosen):
                yield needs & ~self.nodes

    def _acyclic(self, chosen: Sequence[_Option]) -> bool:
        waiting = list(chosen)
        while waiting:
            missing = _union(option.makes for option in waiting)
            still = [option for option in waiting if option.needs & missing]
            if len(still) == len(waiting):
                return False
            waiting = still
        return True


def _groups(options: Sequence[_Option], size: int) -> list[_Group]:
    reached = [0] * size
    for option in options:
        for number in _numbers(option.makes):
            reached[number] |= option.makes | option.needs
    for middle, number in itertools.product(range(size), range(size)):
        if reached[number] >> middle & 1:
            reached[number] |= reached[middle]
    groups = []
    for number in range(size):
        nodes = _union(1 << n for n in _numbers(reached[number]) if reached[n] >> number & 1) | 1 << number
        if nodes & -nodes == 1 << number:
            mine = tuple(option for option in options if option.makes & nodes)
            groups.append(_Group(nodes, reached[number], mine))
    return groups


def _numbers(bits: int) -> Iterator[int]:
    return (number for number in range(bits.bit_length()) if bits >> number & 1)


def _union(sets: Iterable[int]) -> int:
    union = 0
    for each in sets:
        union |= each
    return union
