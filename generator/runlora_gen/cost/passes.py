"""The price of what is no product: passes over tensors, which memory bounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .device import DeviceProfile
from .vector import Cost, PhaseCost, rounded, weighted

#: What passes that change the dtype reach of the bandwidth: X's four casts in PEFT's linears with float32 adapters took
#: 1.35 times as long as their bytes (tools/results/linear_h100_bf16_r16.json, against those with 16-bit adapters).
CAST = 0.74


@dataclass(frozen=True)
class Times:
    """Seconds that device and host need; they work side by side."""

    device_s: float = 0.0
    host_s: float = 0.0

    @classmethod
    def of(cls, cost: Cost | PhaseCost) -> Times:
        """Those of a price."""
        return cls(cost.device_s, cost.host_s)

    def weighted_s(self, host_share: float) -> float:
        """Seconds that count, of a step whose bound is the host's to this share."""
        return rounded(weighted(self.device_s, self.host_s, host_share))

    def __add__(self, other: Times) -> Times:
        return Times(self.device_s + other.device_s, self.host_s + other.host_s)

    def __mul__(self, factor: float) -> Times:
        return Times(self.device_s * factor, self.host_s * factor)


def price_passes(bytes_moved: Iterable[float], device: DeviceProfile, *, reach: float = 1.0) -> Times:
    """Passes, each given by the bytes that it reads and writes, each one operator call.

    ``reach``: the part of the bandwidth that they reach; on a CPU, where the caches hold much, all of it.
    """
    moved = tuple(bytes_moved)
    busy_s = (
        sum(moved) / device.bytes_per_s / (1.0 if device.multiprocessors is None else reach)
        + len(moved) * device.launch_s
    )
    return Times(busy_s, len(moved) * device.host_s)
