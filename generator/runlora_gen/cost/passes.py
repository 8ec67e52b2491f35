"""The price of what is no product: passes over tensors, which memory bounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .device import DeviceProfile
from .vector import Cost, OperationCost, PhaseCost, rounded, weighted

#: What passes that change the dtype reach of the bandwidth: X's four casts in PEFT's linears with float32 adapters took
#: 1.35 times as long as their bytes (tools/results/linear_h100_bf16_r16.json, against those with 16-bit adapters).
CAST = 0.74
#: What passes with operands that are broadcast or strided reach of it, where a profile does not say: so chosen, with
#: the constants of :mod:`~..forecast.estimate`, that the frozen models of the benchmark on an H100 come out, with
#: checkpointing and without (tools/results/model_h100.json). With adapters, or experts, nothing more is fitted.
#: An H200, whose memory is 1.4 times as fast, moves no more of these: what they wait for is not memory.
STRIDED = 0.58


@dataclass(frozen=True)
class Times:
    """Seconds that device and host need; they work side by side."""

    device_s: float = 0.0
    host_s: float = 0.0

    @classmethod
    def of(cls, cost: Cost | PhaseCost | OperationCost) -> Times:
        """Those of a price."""
        return cls(cost.device_s, cost.host_s)

    def weighted_s(self, host_share: float) -> float:
        """Seconds that count, of a step whose bound is the host's to this share."""
        return rounded(weighted(self.device_s, self.host_s, host_share))

    def __add__(self, other: Times) -> Times:
        return Times(self.device_s + other.device_s, self.host_s + other.host_s)

    def __mul__(self, factor: float) -> Times:
        return Times(self.device_s * factor, self.host_s * factor)


@dataclass(frozen=True)
class Passes:
    """Passes over tensors, by the bytes that each reads and writes.

    Attributes:
        straight: over tensors that lie together.
        strided: with operands that are broadcast or strided.
    """

    straight: tuple[int, ...] = ()
    strided: tuple[int, ...] = ()

    def price(self, device: DeviceProfile) -> Times:
        """What they take."""
        return price_passes(self.straight, device) + price_strided(self.strided, device)


def passes_of_activation(made: int, *, gated: bool, backward: bool = False, fused: bool = False) -> Passes:
    """Those of an activation as a model's own modules compute it: of a gate, act(gate) · up, and of halves of a row.

    ``made``: bytes of what it makes. In the backward the gradients of both halves are put side by side. ``fused``: as
    torch.compile does, in one.
    """
    if fused:
        return Passes(straight=((5 if backward else 3) * made if gated else (3 if backward else 2) * made,))
    if not gated:
        return Passes(straight=(3 * made if backward else 2 * made,))
    return Passes((4 * made,), (3 * made,) * 3) if backward else Passes(strided=(2 * made, 3 * made))


def passes_apart(function: str, made: int, *, fused: bool = False) -> Passes:
    """The same where gate and up are matrices of their own, which lie together, of a function of ``Map``.

    The model keeps act(gate), with which up's gradient is one product. Fused, both gradients are made in one pass.
    """
    found = {"activate": (3 * made,), "gate_gradient": (5 * made,), "up_gradient": ()}
    apart = {"activate": (2 * made, 3 * made), "gate_gradient": (3 * made,) * 2, "up_gradient": (3 * made,)}
    return Passes((found if fused else apart)[function])


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


def price_strided(bytes_moved: Iterable[float], device: DeviceProfile) -> Times:
    """The same of passes with operands that are broadcast or strided."""
    measured = device.strided_bytes_per_s
    return price_passes(bytes_moved, device, reach=STRIDED if measured is None else measured / device.bytes_per_s)
