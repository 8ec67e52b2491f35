"""What a price is: vectors of FLOPs, bytes, launches, memory, seconds and rounding error, of an operation upwards."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

#: How much of a program's time is the host's: 0 where the whole step of the model waits for the device, 1 where it
#: waits for the host.
DEVICE_BOUND, HOST_BOUND = 0.0, 1.0


def weighted(device_s: float, host_s: float, host_share: float) -> float:
    """Seconds that count, of a step whose bound is the host's to this share."""
    return host_share * host_s + (1 - host_share) * device_s


def rounded(seconds: float) -> float:
    """To 12 digits: the same operations summed in another order differ in the last bits, and that is a tie."""
    return float(f"{seconds:.12g}")


@dataclass(frozen=True)
class PhaseCost:
    """Price of a forward or of a backward: FLOPs, bytes read and written, launches, bytes of temporaries, seconds.

    ``device_s`` and ``host_s`` are what each of the two needs; they work side by side.
    """

    flops: int
    bytes_moved: int
    launches: int
    workspace_bytes: int
    device_s: float
    host_s: float

    def weighted_s(self, host_share: float) -> float:
        """Seconds that count, as :func:`weighted` has them; the last bits, which the order of a sum makes, cut off."""
        return rounded(weighted(self.device_s, self.host_s, host_share))


@dataclass(frozen=True)
class Cost:
    """Price of a program.

    ``saved_bytes`` are kept from the forward to the backward, without the parameters, which live anyway.
    ``update_error`` is the relative error of the adapter's contribution through rounding W-sized intermediates.
    ``host_share`` is that of :func:`weighted`.
    """

    forward: PhaseCost
    backward: PhaseCost
    saved_bytes: int
    update_error: float
    host_share: float = DEVICE_BOUND

    @property
    def flops(self) -> int:
        """FLOPs of forward and backward."""
        return self.forward.flops + self.backward.flops

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written in forward and backward."""
        return self.forward.bytes_moved + self.backward.bytes_moved

    @property
    def launches(self) -> int:
        """Launches of forward and backward."""
        return self.forward.launches + self.backward.launches

    @property
    def workspace_bytes(self) -> int:
        """Peak of temporaries: forward and backward do not run at once."""
        return max(self.forward.workspace_bytes, self.backward.workspace_bytes)

    @property
    def memory_bytes(self) -> int:
        """Saved bytes and workspace together."""
        return self.saved_bytes + self.workspace_bytes

    @property
    def device_s(self) -> float:
        """Seconds of forward and backward on the device."""
        return self.forward.device_s + self.backward.device_s

    @property
    def host_s(self) -> float:
        """Seconds that the host needs to launch forward and backward, as its setting's device has it."""
        return self.forward.host_s + self.backward.host_s

    @cached_property
    def time_s(self) -> float:
        """What it adds to a step of the whole model: the device's seconds or the host's, whichever bounds the step."""
        return self.weighted_s(self.host_share)

    def weighted_s(self, host_share: float) -> float:
        """The same under another share."""
        return rounded(weighted(self.device_s, self.host_s, host_share))

    def as_dict(self) -> dict[str, object]:
        """The vector as JSON shows it; times in microseconds."""
        return {
            "flops": {"forward": self.forward.flops, "backward": self.backward.flops},
            "saved_bytes": self.saved_bytes,
            "workspace_bytes": self.workspace_bytes,
            "bytes_moved": self.bytes_moved,
            "launches": self.launches,
            "time_us": round(self.time_s * 1e6, 3),
            "device_us": round(self.device_s * 1e6, 3),
            "host_us": round(self.host_s * 1e6, 3),
            "update_error": float(f"{self.update_error:.4g}"),
        }


@dataclass(frozen=True)
class OperationCost:
    """Price of one operation: FLOPs (2·m·n·k), bytes, launches, seconds on the device and on the host."""

    flops: int
    bytes_moved: int
    launches: int
    device_s: float
    host_s: float

    def __add__(self, other: OperationCost) -> OperationCost:
        return OperationCost(
            self.flops + other.flops,
            self.bytes_moved + other.bytes_moved,
            self.launches + other.launches,
            self.device_s + other.device_s,
            self.host_s + other.host_s,
        )
