"""The choice in one setting: the best program under a criterion and constraints, and why the runner-up lost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..algebra.derivation import Derivation, Way
from ..algebra.enumerate import Phase, Program, enumerate_backwards, enumerate_forwards, enumerate_programs, pair
from ..algebra.operations import Fused, Symbol
from ..cost.device import load_device, on_16_bytes
from ..cost.lower import (
    available,
    lowered,
    lowered_phase,
    phase_time,
    phase_with_kernels,
    subsets,
    with_kernels,
)
from ..cost.price import (
    DEVICE_BOUND,
    DTYPES,
    HOST_BOUND,
    Cost,
    Setting,
    is_priced,
    price,
    price_phase,
    rounded,
    weighted,
)
from ..request.architecture import Architecture
from ..request.errors import SpecError
from ..request.layers import layers
from ..request.workload import Workload, check_ranks


@dataclass(frozen=True)
class Priced:
    """A program with its price in one setting."""

    program: Program
    cost: Cost


@dataclass(frozen=True)
class Quantity:
    """A component of the cost vector, with how people write it."""

    title: str
    of: Callable[[Cost], float]
    show: Callable[[float], str]


def show_count(value: float, unit: str = "") -> str:
    """A count in SI steps, such as 1.09 T."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.4g} {prefix}{unit}".rstrip()
        value /= 1000
    return f"{value:.4g} P{unit}"


def show_bytes(value: float) -> str:
    """Bytes in binary steps, such as 40 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def show_time(seconds: float) -> str:
    """Microseconds."""
    return f"{seconds * 1e6:,.1f} µs"


def show_duration(seconds: float) -> str:
    """Three digits, in seconds, milliseconds or microseconds."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 0.9995:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds * 1e6)} µs"


def _three_digits(value: float) -> str:
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{decimals}f}"


def show_bound(host_share: float) -> str:
    """What a step waits for, which is what counts as time."""
    alike = f"device and host alike (of time {host_share:.0%} is the host's)"
    return {DEVICE_BOUND: "the device", HOST_BOUND: "the host"}.get(host_share, alike)


QUANTITIES: Mapping[str, Quantity] = {
    "time": Quantity("time", lambda cost: cost.time_s, show_time),
    "device": Quantity("time on the device", lambda cost: rounded(cost.device_s), show_time),
    "host": Quantity("time on the host", lambda cost: rounded(cost.host_s), show_time),
    "memory": Quantity("saved + workspace", lambda cost: cost.memory_bytes, show_bytes),
    "saved": Quantity("saved", lambda cost: cost.saved_bytes, show_bytes),
    "flops": Quantity("FLOPs", lambda cost: cost.flops, show_count),
    "bytes": Quantity("bytes moved", lambda cost: cost.bytes_moved, show_bytes),
    "launches": Quantity("launches", lambda cost: cost.launches, lambda value: f"{value:.0f}"),
    "error": Quantity("update error", lambda cost: cost.update_error, lambda value: f"{value:.2g}"),
}

#: What may be traded against each other. Bytes and launches are not here: they matter through the time.
PARETO = ("time", "saved", "memory", "flops", "error")
#: How times compare: of equal ones that is the better which takes the device less, then the host.
_TIME = ("time", "device", "host")
#: After the criterion, ties are broken by these in order, and at last by the program's id.
TIE_BREAK = (*_TIME, *PARETO[1:], "bytes", "launches")

CRITERIA = ("time", "flops", "memory")


@dataclass(frozen=True)
class Decision:
    """What was chosen in one setting, and why.

    Attributes:
        setting: the circumstances.
        host_share: how much of the time is the host's: see :func:`~.cost.price.weighted`.
        candidates: every program with its price, in the order of the enumeration.
        front: ids of those on the Pareto front.
        chosen: the winner under the criterion and the constraints.
        fallback: the winner among programs that merge nothing; differs from ``chosen`` where that would lose small
            updates if it met 16-bit weights.
        runner_up: the next best, or None.
        reason: one line on why the runner-up lost.
    """

    setting: Setting
    host_share: float
    candidates: tuple[Priced, ...]
    front: frozenset[str]
    chosen: Priced
    fallback: Priced
    runner_up: Priced | None
    reason: str


def goals(workload: Workload) -> tuple[str, ...]:
    """The gradients that a module of this workload can give: the bias may always be trained."""
    wanted = {"dX": workload.input_grad, "dA": "a" in workload.train, "dB": "b" in workload.train, "db": True}
    return tuple(name for name, needed in wanted.items() if needed)


@lru_cache(maxsize=65536)
def setting_for(workload: Workload, in_features: int, out_features: int, rank: int, bias: bool, tokens: int) -> Setting:
    """The setting in which a layer shape of this workload is priced: the bias frozen."""
    return Setting(
        tokens=tokens,
        in_features=in_features,
        out_features=out_features,
        rank=rank,
        dtype=DTYPES[workload.dtype],
        adapter_dtype=DTYPES[workload.adapter_dtype],
        bias=bias,
        gradients=frozenset(goals(workload)) - {"db"},
        device=load_device(workload.device),
    )


def enumerated(workload: Workload, setting: Setting) -> tuple[Program, ...]:
    """Every program that can serve, its single products computed by torch."""
    programs = enumerate_programs(
        setting.derivation, goals(workload), table=_table(workload, setting), casts=setting.casts
    )
    if workload.merge_rounding == "stochastic":
        programs = tuple(with_kernels(p, _replaced(workload, setting), replacing=True) for p in programs)
    return programs


def _table(workload: Workload, setting: Setting) -> tuple[Way, ...]:
    """The rows that can serve.

    With fused kernels where the device has them and the workload allows them, and where they were measured if
    torch's products were. In fp32 only if they were measured: the roofline takes them for as fast as cuBLAS. Not
    where rows of X, W or Y would start off 16 bytes: the kernels run then, but without tensor descriptors, slower
    than torch.
    """
    dtype = setting.dtype
    return setting.derivation.rows(
        kernels=_kernels(workload, setting),
        dtype=dtype.name,
        rank=setting.rank,
        known=lambda operation: is_priced(operation, dtype, setting.device),
    )


def _replaced(workload: Workload, setting: Setting) -> tuple[Fused, ...]:
    """What takes the place of merges that round to the nearest."""
    return tuple(setting.derivation.stochastic.values()) if workload.merge_rounding == "stochastic" else ()


def _kernels(workload: Workload, setting: Setting) -> bool:
    device, dtype = setting.device, setting.dtype
    aligned = on_16_bytes(dtype.bytes, setting.in_features, setting.out_features)
    measured = dtype.half or bool(device.meter.times_for(dtype.name))
    return workload.kernels and device.kernels and aligned and measured


def programs_for(workload: Workload, setting: Setting, host_share: float = DEVICE_BOUND) -> tuple[Program, ...]:
    """Every program that can serve, each with those kernels for single products that make it fastest."""
    programs = enumerated(workload, setting)
    return tuple(lowered(p, setting, host_share) for p in programs) if _kernels(workload, setting) else programs


def decide(workload: Workload, setting: Setting, host_share: float = DEVICE_BOUND) -> Decision:
    """Price every program and choose.

    Raises:
        SpecError: no program meets ``max_saved_bytes``; the message names the closest feasible value.
    """
    candidates = tuple(Priced(p, price(p, setting, host_share)) for p in programs_for(workload, setting, host_share))
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
        front=front,
        chosen=order[0],
        fallback=fallback,
        runner_up=runner_up,
        reason=_why(order[0], runner_up, workload.criterion),
    )


def fastest(workload: Workload, setting: Setting, host_share: float = DEVICE_BOUND, *, merging: bool = True) -> Priced:
    """What ``decide`` chooses by time and without a limit on saved bytes, found without pricing every program.

    Times add up: for what is kept, and for kernels in place of single products, the fastest program is the fastest
    forward with the fastest backward. ``merging``: whether programs that lose updates in 16 bits may win.
    """

    def timed(phases: Sequence[Phase], kernels: tuple[Fused, ...]) -> list[tuple[float, Phase]]:
        times = [
            (weighted(*phase_time(phase, kernels, setting), host_share), phase)
            for phase in phases
            if merging or not phase.lossy_in_16_bit
        ]
        return sorted(times, key=lambda pair: pair[0])

    twins = available(setting) if _kernels(workload, setting) else ()
    pairs = [
        (timed(forwards, kernels), timed(backwards, kernels))
        for forwards, backwards in _by_kept(workload, setting, _table(workload, setting))
        for kernels in subsets(twins)
    ]
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
                program = pair(forward, backward)
                program = lowered(program, setting, host_share) if twins else program
                tied.setdefault(program.id, program)
    return ranked([Priced(p, price(p, setting, host_share)) for p in tied.values()], "time")[0]


def _by_kept(
    workload: Workload, setting: Setting, table: tuple[Way, ...]
) -> Iterable[tuple[tuple[Phase, ...], tuple[Phase, ...]]]:
    """The forwards and the backwards of all programs, by what is kept: every pair of both is a program."""
    return _paired(setting.derivation, goals(workload), table, setting.casts, _replaced(workload, setting))


@lru_cache
def _paired(
    derivation: Derivation, goals: tuple[str, ...], table: tuple[Way, ...], casts: bool, replaced: tuple[Fused, ...]
) -> tuple[tuple[tuple[Phase, ...], tuple[Phase, ...]], ...]:
    backwards: dict[tuple[Symbol, ...], list[Phase]] = {}
    for phase in enumerate_backwards(derivation, goals, table=table, casts=casts):
        backwards.setdefault(phase.saved, []).append(phase_with_kernels(phase, replaced))
    return tuple(
        (
            tuple(
                phase_with_kernels(forward, replaced)
                for forward in enumerate_forwards(derivation, table=table, casts=casts, keeps=kept)
            ),
            tuple(phases),
        )
        for kept, phases in backwards.items()
    )


@dataclass(frozen=True)
class ForwardDecision:
    """The fastest way to compute Y alone, where no gradient is wanted, and on 16-bit weights if that differs."""

    setting: Setting
    host_share: float
    chosen: Phase
    fallback: Phase


def decide_forward(workload: Workload, setting: Setting, host_share: float = DEVICE_BOUND) -> ForwardDecision:
    """Choose the fastest forward, whatever the criterion is for training: nothing is kept."""

    def key(phase: Phase) -> tuple[float | str, ...]:
        cost = price_phase(phase, setting)
        return cost.weighted_s(host_share), cost.device_s, cost.workspace_bytes, cost.launches, phase.name

    phases = enumerate_forwards(setting.derivation, table=_table(workload, setting), casts=setting.casts)
    if workload.merge_rounding == "stochastic":
        phases = tuple(phase_with_kernels(phase, _replaced(workload, setting)) for phase in phases)
    if _kernels(workload, setting):
        phases = tuple(lowered_phase(phase, setting, host_share) for phase in phases)
    lossless = [phase for phase in phases if not phase.lossy_in_16_bit]
    fallback = min(lossless, key=key)
    chosen = fallback if setting.dtype.half and not workload.allow_lossy_merge else min(phases, key=key)
    if workload.allow_lossy_merge:
        fallback = chosen
    return ForwardDecision(setting, host_share, chosen, fallback)


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


def _values(candidate: Priced, quantities: Sequence[str]) -> tuple[float, ...]:
    return tuple(QUANTITIES[name].of(candidate.cost) for name in quantities)


def _key(candidate: Priced, quantities: Sequence[str]) -> tuple[float | str, ...]:
    return (*_values(candidate, quantities), candidate.program.id)


def ranked(candidates: Iterable[Priced], criterion: str) -> list[Priced]:
    """From the best to the worst."""
    return sorted(candidates, key=lambda candidate: _key(candidate, (criterion, *TIE_BREAK)))


def within(candidates: Sequence[Priced], workload: Workload, setting: Setting) -> list[Priced]:
    """Those that keep to the limit on saved bytes.

    Raises:
        SpecError: there are none; the message names the closest feasible value.
    """
    limit = workload.max_saved_bytes
    if limit is None:
        return list(candidates)
    fitting = [c for c in candidates if c.cost.saved_bytes <= limit]
    if not fitting:
        raise _infeasible(limit, min(c.cost.saved_bytes for c in candidates), setting)
    return fitting


def check_saved_limit(architecture: Architecture, ranks: Sequence[int], workload: Workload) -> None:
    """Refuse a ``max_saved_bytes`` that some layer can't meet at some rank and token count.

    Raises:
        SpecError: naming the smallest value that all of them can meet.
    """
    if workload.max_saved_bytes is None:
        return

    def least_saved(setting: Setting) -> int:
        # Only what merges nothing: there is always such a variant that keeps as little as any other.
        programs = [p for p in enumerated(workload, setting) if not p.lossy_in_16_bit]
        return min(price(program, setting).saved_bytes for program in programs)

    least, setting = max(
        (
            (least_saved(setting), setting)
            for layer, rank, tokens in itertools.product(layers(architecture), ranks, workload.tokens)
            for setting in [setting_for(workload, layer.in_features, layer.out_features, rank, layer.bias, tokens)]
        ),
        key=lambda need: need[0],
    )
    if least > workload.max_saved_bytes:
        raise _infeasible(workload.max_saved_bytes, least, setting)


def check_request(architecture: Architecture, ranks: Sequence[int], workload: Workload) -> None:
    """Refuse what can't be generated, before anything is.

    Raises:
        SpecError: a rank, a device, a rounding or a limit, named in one line.
    """
    check_ranks(ranks, architecture)
    load_device(workload.device)
    check_merge_rounding(workload)
    check_saved_limit(architecture, ranks, workload)


def check_merge_rounding(workload: Workload) -> None:
    """Refuse stochastic rounding where nothing would be rounded so.

    Raises:
        SpecError: naming what it needs.
    """
    if workload.merge_rounding != "stochastic":
        return
    if not workload.allow_lossy_merge:
        needs = "--allow-lossy-merge: without it nothing is merged into 16 bits"
    elif not DTYPES[workload.dtype].half:
        needs = "--dtype bf16 or fp16: fp32 keeps small updates"
    elif not (workload.kernels and load_device(workload.device).kernels):
        needs = "fused kernels: a --device that has them, and no --no-kernels"
    else:
        return
    raise SpecError(f"--merge-rounding: stochastic needs {needs}")


def _infeasible(limit: int, least: int, setting: Setting) -> SpecError:
    return SpecError(
        f"--max-saved-bytes: no variant of the {setting.in_features}x{setting.out_features} linear saves at most "
        f"{limit} bytes at {setting.tokens} tokens; the smallest feasible value is {least}"
    )


def _why(chosen: Priced, runner_up: Priced | None, criterion: str) -> str:
    if runner_up is None:
        return "there is no other program"
    for position, name in enumerate((criterion, *TIE_BREAK)):
        quantity = QUANTITIES[name]
        best, other = quantity.of(chosen.cost), quantity.of(runner_up.cost)
        if best != other:
            equal = f"equal in {QUANTITIES[criterion].title}, but " if position else ""
            shown = f"{quantity.show(other)} against {quantity.show(best)}"
            if quantity.show(other) == quantity.show(best):
                shown = f"{quantity.show(best)}, by {other / best - 1:.1g} of it"
            return f"{runner_up.program.id} is {equal}worse in {quantity.title}: {shown}"
    return f"{runner_up.program.id} has the same price; the name decides"
