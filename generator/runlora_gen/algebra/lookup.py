"""Programs asked for by what they do: how they compute which symbol, and what they keep."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from .derivation import Derivation, Way
from .enumerate import Program
from .operations import Symbol


@dataclass(frozen=True)
class Asked:
    """A program by what it does.

    Attributes:
        ways: names of ways, by the symbols that are computed in them; others follow, or are computed in their one way.
        keeps: the intermediates that the forward keeps for the backward, and no others.
    """

    ways: Mapping[str, str]
    keeps: Collection[str] = ()

    def rows(self, derivation: Derivation) -> tuple[Way, ...]:
        """The rows of these ways.

        Raises:
            ValueError: there is no such symbol, or no such row for one.
        """
        return tuple(self._row(derivation, symbol, name) for symbol, name in self.ways.items())

    def among(self, programs: Iterable[Program]) -> Program:
        """The one of these programs, of one derivation, that does this, with torch wherever there is a choice.

        Raises:
            ValueError: there is no such symbol or row; or none of the programs does this, or several.
        """
        programs = list(programs)
        asked = self._sought(programs[0].derivation) if programs else None
        found = [program for program in programs if asked and _does(program, *asked)]
        if len(found) != 1:
            ways = ", ".join(f"{symbol} by {name}" for symbol, name in self.ways.items())
            which = ", ".join(program.id for program in found) or "none"
            raise ValueError(f"one program must compute {ways} and keep {', '.join(self.keeps) or 'nothing'}: {which}")
        return found[0]

    def _sought(self, derivation: Derivation) -> tuple[set[Way], set[Symbol]]:
        """The rows, and what is kept."""
        return set(self.rows(derivation)), {_symbol(derivation, name) for name in self.keeps}

    @staticmethod
    def _row(derivation: Derivation, symbol: str, name: str) -> Way:
        target = _symbol(derivation, symbol)
        known = {way.name: way for way in derivation.table if target in way.targets and not way.saved}
        if name not in known:
            raise ValueError(f"{symbol} is computed by one of {', '.join(known)}, not by {name}")
        return known[name]


def _does(program: Program, rows: set[Way], kept: set[Symbol]) -> bool:
    return (
        not program.by_kernel and kept == set(program.kept) and rows <= {*program.forward.ways, *program.backward.ways}
    )


def _symbol(derivation: Derivation, name: str) -> Symbol:
    if name not in derivation.symbols:
        raise ValueError(f"there is no symbol {name}, only {', '.join(derivation.symbols)}")
    return derivation[name]
