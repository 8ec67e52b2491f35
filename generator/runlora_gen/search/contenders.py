"""The programs that may win or come second, under any criterion and limit, found without pricing all.

A program is a forward with a backward that takes what it keeps. Of both every quantity adds up, or is the larger of
two, as the peak of temporaries and the update error are. So of the forwards that keep the same, one that two others
beat in everything is in no program that is first or second: both others make better ones with the same backward. It is
so with the backwards that take the same; and with what may be traded one against another, a front. Where a site has
too many of both to list, ``fronts.py`` finds the front alone.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..algebra.enumerate import Phase, Program, pair
from ..algebra.schedule import workspace, workspace_at_least
from ..cost.lower import phase_with_kernels, with_kernels
from ..cost.price import price, saved_bytes, sum_phase
from ..cost.setting import Setting
from ..cost.vector import DEVICE_BOUND, weighted
from ..kernels.sites import seeded
from ..request.workload import Workload
from .candidates import cheaper_for, paired_phases, positions_of
from .criterion import Priced

#: A phase is left out where so many of its class beat it: the winner and the runner-up are wanted.
_BEATEN_BY = 2
#: Times that differ by less, of the larger, may be equal with the rest of a program: they are compared to 12 digits.
_DIGITS = 1e-9


def contenders(workload: Workload, setting: Setting, host_share: float = DEVICE_BOUND) -> tuple[Priced, ...]:
    """Those of all programs, in their order, among which is the front, and what is first and second by any criterion.

    Also among programs that merge nothing, and among those that save no more than some number of bytes.
    """
    kernels = cheaper_for(workload, setting, host_share)
    found: list[tuple[int, int, Program]] = []
    at = positions_of(workload, setting)
    for forwards, backwards in paired_phases(workload, setting):
        if not forwards:
            continue
        rates = [
            [
                _Rated.of(phase_with_kernels(phase, kernels), place, saved, setting, host_share)
                for place, (phase, saved) in enumerate(phases)
            ]
            for phases in (
                [(forward, 0) for forward in forwards],
                [(backward, saved_bytes(pair(forwards[0], backward), setting)) for backward in backwards],
            )
        ]
        # What is less by so much is less in every program.
        tie = _DIGITS * sum(max(max(rated.times) for rated in rated_of) for rated_of in rates)
        left = [list(_unbeaten(rated_of, setting, tie)) for rated_of in rates]
        found += [
            (at[backwards[second.place]], first.place, pair(forwards[first.place], backwards[second.place]))
            for first, second in itertools.product(*left)
        ]
    programs = (with_kernels(program, kernels) for *_, program in sorted(found, key=lambda entry: entry[:2]))
    return tuple(Priced(program, price(program, setting, host_share)) for program in programs)


@dataclass(frozen=True)
class _Rated:
    """A phase with what decides on it, but for its peak of temporaries.

    Attributes:
        place: among those of its class.
        times: seconds that count, of the device and of the host.
        counts: what is a whole number, and adds up: bytes that a backward saves, FLOPs, bytes moved, launches.
        losses: what of an update it may lose, and whether at random.
    """

    phase: Phase
    place: int
    times: tuple[float, float, float]
    counts: tuple[int, int, int, int]
    losses: tuple[bool, bool, bool]

    @classmethod
    def of(cls, phase: Phase, place: int, saved: int, setting: Setting, host_share: float) -> _Rated:
        cost, derivation = sum_phase(phase, setting), setting.derivation
        return cls(
            phase,
            place,
            (weighted(cost.device_s, cost.host_s, host_share), cost.device_s, cost.host_s),
            (saved, cost.flops, cost.bytes_moved, cost.launches),
            (phase.lossy_in_16_bit, not phase.made.isdisjoint(derivation.deltas), seeded(phase)),
        )

    def beats(self, other: _Rated, tie: float) -> bool:
        """Whether it is before the other in every program, if it needs no more memory."""
        if self.losses != other.losses and any(self.losses):
            return False
        if not all(map(operator.le, self.counts[:2], other.counts[:2])):
            return False
        if other.times[0] - self.times[0] > tie:
            return True
        # Of equal times the rest decides; where all may be equal, the names.
        rest = zip((*self.times, *self.counts), (*other.times, *other.counts), strict=True)
        return self.counts != other.counts and all(mine <= others for mine, others in rest)


def _unbeaten(rated_of: Sequence[_Rated], setting: Setting, tie: float) -> Iterator[_Rated]:
    """Those that fewer than two of the others beat."""
    kept: list[tuple[_Rated, int]] = []
    # What beats another comes before it.
    for rated in sorted(rated_of, key=lambda rated: (rated.times, rated.counts)):
        rivals = [peak for other, peak in kept if other.beats(rated, tie)]
        if len(rivals) >= _BEATEN_BY:
            least = workspace_at_least(rated.phase, setting.bytes_of)
            if sum(peak <= least for peak in rivals) >= _BEATEN_BY:
                continue
            peak = workspace(rated.phase, setting.bytes_of)
            if sum(other <= peak for other in rivals) >= _BEATEN_BY:
                continue
        else:
            peak = workspace(rated.phase, setting.bytes_of)
        kept.append((rated, peak))
        yield rated
