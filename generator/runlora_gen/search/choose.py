"""The choice in one setting: the best program under a criterion and constraints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from ..algebra.enumerate import Phase, Program, pair
from ..algebra.operations import Fused
from ..cost.lower import phase_time, with_kernels
from ..cost.price import price, price_phase
from ..cost.setting import Setting
from ..cost.vector import DEVICE_BOUND, rounded, weighted
from ..request.workload import Workload
from .candidates import cheaper_for, forwards_for, paired_phases, programs_for
from .contenders import contenders
from .criterion import Difference, Priced, difference, pareto_front, ranked
from .limits import within


@dataclass(frozen=True)
class Decision:
    """What was chosen in one setting, and why.

    Attributes:
        setting: the circumstances.
        host_share: how much of the time is the host's: see :func:`~.cost.vector.weighted`.
        candidates: programs with their prices, in the order of the enumeration: all, or those that matter; none where
            the winners alone were sought.
        whole: whether they are all.
        programs: how many there are; 0 where the winners alone were sought.
        front: ids of those on the Pareto front.
        chosen: the winner under the criterion and the constraints.
        fallback: the winner among programs that merge nothing; differs from ``chosen`` where that would lose small
            updates if it met 16-bit weights.
        runner_up: the next best, or None.
        difference: why the runner-up lost; None where there is none, or where its price is the same.
    """

    setting: Setting
    host_share: float
    candidates: tuple[Priced, ...]
    whole: bool
    programs: int
    front: frozenset[str]
    chosen: Priced
    fallback: Priced
    runner_up: Priced | None
    difference: Difference | None


@lru_cache(maxsize=256)  # a linear is asked for by itself, and where it is held against a group
def decide(workload: Workload, setting: Setting, host_share: float = DEVICE_BOUND, *, every: bool = True) -> Decision:
    """Price programs and choose.

    Args:
        workload, setting, host_share: what to choose for.
        every: price all, and have them all in the decision; else those alone that matter, in half the time.

    Raises:
        SpecError: no program meets ``max_saved_bytes``; the message names the closest feasible value.
    """
    if every:
        programs = programs_for(workload, setting, host_share)
        candidates, count = tuple(Priced(p, price(p, setting, host_share)) for p in programs), len(programs)
    else:
        candidates = contenders(workload, setting, host_share)
        count = sum(len(before) * len(after) for before, after in paired_phases(workload, setting))
    front = pareto_front(candidates)
    lossless = [c for c in candidates if not c.program.lossy_in_16_bit]
    allowed = lossless if setting.dtype.half and not workload.allow_lossy_merge else candidates
    order = ranked(within(allowed, workload, setting), workload.criterion)
    fallback = order[0]
    if fallback.program.lossy_in_16_bit and not workload.allow_lossy_merge:
        fallback = ranked(within(lossless, workload, setting), workload.criterion)[0]
    runner_up = order[1] if len(order) > 1 else None
    return Decision(
        setting=setting,
        host_share=host_share,
        candidates=candidates,
        whole=every,
        programs=count,
        front=front,
        chosen=order[0],
        fallback=fallback,
        runner_up=runner_up,
        difference=None if runner_up is None else difference(order[0], runner_up, workload.criterion),
    )


def fastest(workload: Workload, setting: Setting, host_share: float = DEVICE_BOUND, *, merging: bool = True) -> Priced:
    """What ``decide`` chooses by time and without a limit on saved bytes, found without pricing every program.

    Times add up: for what is kept, the fastest program is the fastest forward with the fastest backward.
    ``merging``: whether programs that lose updates in 16 bits may win.
    """
    kernels = cheaper_for(workload, setting, host_share)

    def timed(phases: Sequence[_Timed]) -> list[tuple[float, Phase]]:
        times = [
            (weighted(device_s, host_s, host_share), phase)
            for device_s, host_s, phase in phases
            if merging or not phase.lossy_in_16_bit
        ]
        return sorted(times, key=lambda pair: pair[0])

    pairs = [(timed(forwards), timed(backwards)) for forwards, backwards in _timed_pairs(workload, setting, kernels)]
    pairs = [(forwards, backwards) for forwards, backwards in pairs if forwards and backwards]
    least = rounded(min(forwards[0][0] + backwards[0][0] for forwards, backwards in pairs))
    tied: dict[str, Program] = {}
    for forwards, backwards in pairs:
        for first_s, forward in forwards:
            if rounded(first_s + backwards[0][0]) > least:
                break  # they are sorted
            for second_s, backward in backwards:
                if rounded(first_s + second_s) > least:
                    break
                program = with_kernels(pair(forward, backward), kernels)
                tied.setdefault(program.id, program)
    return ranked([Priced(p, price(p, setting, host_share)) for p in tied.values()], "time")[0]


#: Seconds of device and host, and of which phase.
_Timed: TypeAlias = tuple[float, float, Phase]


@lru_cache(maxsize=4096)
def _timed_pairs(
    workload: Workload, setting: Setting, kernels: tuple[Fused, ...]
) -> tuple[tuple[Sequence[_Timed], Sequence[_Timed]], ...]:
    """The times of all phases, by what is kept: they are weighted anew for every share of the host."""

    def timed(phases: Sequence[Phase]) -> Sequence[_Timed]:
        return [(*phase_time(phase, kernels, setting), phase) for phase in phases]

    return tuple((timed(forwards), timed(backwards)) for forwards, backwards in paired_phases(workload, setting))


@dataclass(frozen=True)
class ForwardDecision:
    """The fastest way to compute Y alone, where no gradient is wanted, and on 16-bit weights if that differs."""

    setting: Setting
    host_share: float
    chosen: Phase
    fallback: Phase


def decide_forward(workload: Workload, setting: Setting, host_share: float = DEVICE_BOUND) -> ForwardDecision:
    """Choose the fastest forward, whatever the criterion is for training: nothing is kept, and nothing dropped."""
    setting = setting.in_evaluation

    def key(phase: Phase) -> tuple[float | str, ...]:
        cost = price_phase(phase, setting)
        return cost.weighted_s(host_share), cost.device_s, cost.workspace_bytes, cost.launches, phase.name

    phases = forwards_for(workload, setting, host_share)
    lossless = [phase for phase in phases if not phase.lossy_in_16_bit]
    fallback = min(lossless, key=key)
    chosen = fallback if setting.dtype.half and not workload.allow_lossy_merge else min(phases, key=key)
    if workload.allow_lossy_merge:
        fallback = chosen
    return ForwardDecision(setting, host_share, chosen, fallback)
