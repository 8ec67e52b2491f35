"""Quantities and reasons as people write them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..cost.vector import DEVICE_BOUND, HOST_BOUND
from ..search.choose import Decision


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


@dataclass(frozen=True)
class Quantity:
    """A component of the cost vector in words."""

    title: str
    show: Callable[[float], str]


#: By their names in the search.
QUANTITIES: Mapping[str, Quantity] = {
    "time": Quantity("time", show_time),
    "device": Quantity("time on the device", show_time),
    "host": Quantity("time on the host", show_time),
    "memory": Quantity("saved + workspace", show_bytes),
    "saved": Quantity("saved", show_bytes),
    "flops": Quantity("FLOPs", show_count),
    "bytes": Quantity("bytes moved", show_bytes),
    "launches": Quantity("launches", lambda value: f"{value:.0f}"),
    "error": Quantity("update error", lambda value: f"{value:.2g}"),
}


def show_reason(decision: Decision) -> str:
    """One line on why the runner-up lost; empty where none was sought."""
    if not decision.programs:
        return ""
    if decision.runner_up is None:
        return "there is no other program"
    loser, found = decision.runner_up.program.id, decision.difference
    if found is None:
        return f"{loser} has the same price; the name decides"
    quantity = QUANTITIES[found.quantity]
    equal = f"equal in {QUANTITIES[found.criterion].title}, but " if found.quantity != found.criterion else ""
    best, other = quantity.show(found.better), quantity.show(found.worse)
    shown = f"{other} against {best}" if best != other else f"{best}, by {found.worse / found.better - 1:.1g} of it"
    return f"{loser} is {equal}worse in {quantity.title}: {shown}"
