"""The choice: the best program under a criterion and constraints, from the Pareto front, and why the runner-up lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .algebra.enumerate import Program, enumerate_programs
from .algebra.table import STOCHASTIC_MERGE, rows
from .cost.device import load_device, on_16_bytes
from .cost.lower import lowered, with_kernels
from .cost.price import DTYPES, Cost, Setting, is_priced, price
from .spec.architecture import Architecture
from .spec.errors import SpecError
from .spec.layers import layers
from .spec.workload import Workload


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


def show_count(value: float) -> str:
    """A count in SI steps, such as 1.09 T."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.4g} {unit}".rstrip()
        value /= 1000
    return f"{value:.4g} P"


def show_bytes(value: float) -> str:
    """Bytes in binary steps, such as 40 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


def show_time(seconds: float) -> str:
    """Microseconds."""
    return f"{seconds * 1e6:,.1f} µs"


QUANTITIES: Mapping[str, Quantity] = {
    # The same operations summed in another order differ in the last bits: that is a tie.
    "time": Quantity("time", lambda cost: float(f"{cost.time_s:.12g}"), show_time),
    "device": Quantity("time on the device", lambda cost: float(f"{cost.device_s:.12g}"), show_time),
    "memory": Quantity("saved + workspace", lambda cost: cost.memory_bytes, show_bytes),
    "saved": Quantity("saved", lambda cost: cost.saved_bytes, show_bytes),
    "flops": Quantity("FLOPs", lambda cost: cost.flops, show_count),
    "bytes": Quantity("bytes moved", lambda cost: cost.bytes_moved, show_bytes),
    "launches": Quantity("launches", lambda cost: cost.launches, lambda value: f"{value:.0f}"),
    "error": Quantity("update error", lambda cost: cost.update_error, lambda value: f"{value:.2g}"),
}

#: What may be traded against each other. Bytes and launches are not here: they matter through the time.
PARETO = ("time", "saved", "memory", "flops", "error")
#: After the criterion, ties are broken by these in order, and at last by the program's id.
TIE_BREAK = (*PARETO, "device", "bytes", "launches")

CRITERIA = ("time", "flops", "memory")


@dataclass(frozen=True)
class Decision:
    """What was chosen in one setting, and why.

    Attributes:
        setting: the circumstances.
        candidates: every program with its price, in the order of the enumeration.
        front: ids of those on the Pareto front.
        chosen: the winner under the criterion and the constraints.
        fallback: the winner among programs that merge nothing; differs from ``chosen`` where that would lose small
            updates if it met 16-bit weights.
        runner_up: the next best, or None.
        reason: one line on why the runner-up lost.
    """

    setting: Setting
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


def setting_for(workload: Workload, in_features: int, out_features: int, rank: int, bias: bool, tokens: int) -> Setting:
    """The setting in which a layer shape of this workload is priced: the bias frozen."""
    return Setting(
        tokens=tokens,
        in_features=in_features,
        out_features=out_features,
        rank=rank,
        dtype=DTYPES[workload.dtype],
        bias=bias,
        gradients=frozenset(goals(workload)) - {"db"},
        device=load_device(workload.device),
        launch=workload.launch,
    )


def enumerated(workload: Workload, setting: Setting) -> tuple[Program, ...]:
    """Every program that can serve, its single products computed by torch.

    With fused kernels where the device has them and the workload allows them, and where they were measured if
    torch's products were. In fp32 only if they were measured: the roofline takes them for as fast as cuBLAS. Not
    where rows of X, W or Y would start off 16 bytes: the kernels run then, but without tensor descriptors, slower
    than torch.
    """
    dtype = setting.dtype
    table = rows(
        kernels=_kernels(workload, setting),
        dtype=dtype.name,
        rank=setting.rank,
        known=lambda operation: is_priced(operation, dtype, setting.device),
    )
    programs = enumerate_programs(goals(workload), table=table)
    if workload.merge_rounding == "stochastic":
        merges = tuple(STOCHASTIC_MERGE.values())
        programs = tuple(with_kernels(program, merges, replacing=True) for program in programs)
    return programs


def _kernels(workload: Workload, setting: Setting) -> bool:
    device, dtype = setting.device, setting.dtype
    aligned = on_16_bytes(dtype.bytes, setting.in_features, setting.out_features)
    measured = dtype.half or bool(device.meter.times_for(dtype.name))
    return workload.kernels and device.kernels and aligned and measured


def programs_for(workload: Workload, setting: Setting) -> tuple[Program, ...]:
    """Every program that can serve, each with those kernels for single products that make it fastest."""
    programs = enumerated(workload, setting)
    return tuple(lowered(p, setting) for p in programs) if _kernels(workload, setting) else programs


def decide(workload: Workload, setting: Setting) -> Decision:
    """Price every program and choose.

    Raises:
        SpecError: no program meets ``max_saved_bytes``; the message names the closest feasible value.
    """
    candidates = tuple(Priced(p, price(p, setting)) for p in programs_for(workload, setting))
    front = pareto_front(candidates)
    lossless = [c for c in candidates if not c.program.lossy_in_16_bit]
    allowed = lossless if setting.dtype.half and not workload.allow_lossy_merge else candidates
    ranked = _rank(_within(allowed, workload, setting), workload.criterion)
    fallback = ranked[0]
    if fallback.program.lossy_in_16_bit and not workload.allow_lossy_merge:
        fallback = _rank(_within(lossless, workload, setting), workload.criterion)[0]
    runner_up = ranked[1] if len(ranked) > 1 else None
    return Decision(
        setting=setting,
        candidates=candidates,
        front=front,
        chosen=ranked[0],
        fallback=fallback,
        runner_up=runner_up,
        reason=_why(ranked[0], runner_up, workload.criterion),
    )


def pareto_front(candidates: Iterable[Priced]) -> frozenset[str]:
    """Ids of the programs that no other beats in one of ``PARETO`` without losing in another.

    Programs of equal price dominate one another by the tie-break, so that each price appears once.
    """
    ordered = sorted(candidates, key=lambda candidate: _key(candidate, (*PARETO, *TIE_BREAK)))
    front: list[tuple[float, ...]] = []
    ids = []
    for candidate in ordered:
        vector = _values(candidate, PARETO)
        # Sorted lexicographically, nothing that comes later can dominate what is on the front already.
        if not any(all(a <= b for a, b in zip(kept, vector, strict=True)) for kept in front):
            front.append(vector)
            ids.append(candidate.program.id)
    return frozenset(ids)


def _values(candidate: Priced, quantities: Sequence[str]) -> tuple[float, ...]:
    return tuple(QUANTITIES[name].of(candidate.cost) for name in quantities)


def _key(candidate: Priced, quantities: Sequence[str]) -> tuple[float | str, ...]:
    return (*_values(candidate, quantities), candidate.program.id)


def _rank(candidates: Iterable[Priced], criterion: str) -> list[Priced]:
    return sorted(candidates, key=lambda candidate: _key(candidate, (criterion, *TIE_BREAK)))


def _within(candidates: Sequence[Priced], workload: Workload, setting: Setting) -> list[Priced]:
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


@dataclass(frozen=True)
class Range:
    """One decision and the token counts for which it stands: up to ``last_tokens``, or without an end if None."""

    decision: Decision
    last_tokens: int | None


def decide_ranges(workload: Workload, setting: Setting) -> tuple[Range, ...]:
    """The best variant for each range of tokens, with thresholds at the computed crossovers.

    Between two wanted token counts with different winners (chosen, fallback) the threshold is the last count at
    which the first winner is still at least as good, found by bisection. Neighbours with the same winner become one
    range, also where they differ only in kernels for single products and the price hardly tells them apart.
    """
    decisions = [decide(workload, replace(setting, tokens=tokens)) for tokens in sorted(set(workload.tokens))]
    ranges: list[Range] = []
    current = decisions[0]
    for following in decisions[1:]:
        if _winners(following) != _winners(current) and not _nearly_the_same(current, following):
            ranges.append(Range(current, _crossover(workload, current, following)))
            current = following
    return (*ranges, Range(current, None))


#: Between measured sizes prices are no finer than this: two runs of ``tune`` agree within 3 % on single operations.
_RESOLUTION = 0.01


def _nearly_the_same(low: Decision, high: Decision) -> bool:
    """Whether the winners differ only in which single products are a kernel's, and that makes no difference at high."""
    pairs = ((low.chosen, high.chosen), (low.fallback, high.fallback))
    return all(
        first.program.plain_id == second.program.plain_id
        and price(first.program, high.setting).time_s <= second.cost.time_s * (1 + _RESOLUTION)
        for first, second in pairs
    )


def _winners(decision: Decision) -> tuple[str, str]:
    return decision.chosen.program.id, decision.fallback.program.id


def _crossover(workload: Workload, low: Decision, high: Decision) -> int:
    """The last token count, from low's on and below high's, at which low's winner still ranks before high's.

    Where a limit on saved bytes is given: and at which it still keeps to that limit.
    """
    criterion = workload.criterion
    first, last = low.setting.tokens, high.setting.tokens
    pair = (low.chosen.program, high.chosen.program)
    if pair[0] == pair[1]:
        pair = (low.fallback.program, high.fallback.program)
    while last - first > 1:
        middle = (first + last) // 2
        setting = replace(low.setting, tokens=middle)
        priced = [Priced(program, price(program, setting)) for program in pair]
        best = _rank(_within(priced, workload, setting), criterion)[0]  # high's fits: fewer tokens save fewer bytes
        first, last = (middle, last) if best.program == pair[0] else (first, middle)
    return first
