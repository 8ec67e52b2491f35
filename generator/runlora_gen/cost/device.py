"""Devices: machines as the prices see them, read from their profiles (``devices/*.toml`` and users' files)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..request.errors import SpecError, nearest, shorten
from ..request.files import read_if_there
from ..request.workload import Workload
from .profile import MAX_PROFILE_BYTES, Constants, Size, parse_toml, read_profile

_FOLDER = Path(__file__).parent / "devices"

#: Sizes of a measured operation, and what was measured.
Times = Mapping[str, tuple[tuple[Size, float], ...]]
Tiles = Mapping[str, tuple[tuple[Size, Constants], ...]]


@dataclass(frozen=True, eq=False)  # one object a name: compared and hashed by identity
class DeviceProfile:
    """A machine as the prices see it.

    Attributes:
        name: the name or path given to ``--device``.
        title: how people call it.
        source: where the figures come from.
        flops_per_s: peak dense matrix rate by dtype (fp32, bf16, fp16).
        bytes_per_s: memory bandwidth.
        launch_s: time that one launch adds on the device (on a CPU: one operator call).
        host_s: time that the host needs for one operator call from Python; bounds eager mode.
        kernel_host_s: the same for one Triton kernel, descriptors included; None where there are no Triton kernels.
        function_host_s: that an autograd function takes the host beside what it calls; 0 where that was not measured.
        compiled_host_s, compiled_kernel_host_s: both under torch.compile; None where that was not measured.
        multiprocessors: of a GPU: how many tiles of a kernel run at once; None where that is not known.
        compute_capability: of a GPU of NVIDIA; None where that is not known.
        strided_bytes_per_s: what passes whose operands are broadcast or strided move; None where that was not measured.
        throttle: the share of products in a step's time from which they take longer, as the limit of power lowers the
            clock, and by how much of what is above it; None where that was not measured.
        digest: of all its data, also of what it takes from another profile.
        times: seconds by dtype and work, at the sizes where it was measured, in their order.
        tiles: the best constants of kernels, likewise.
        measured_on: the profile whose ``times`` and ``tiles`` hold, if not this one's.
    """

    name: str
    title: str
    source: str
    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    launch_s: float
    host_s: float
    kernel_host_s: float | None
    digest: str
    compiled_host_s: float | None = None
    compiled_kernel_host_s: float | None = None
    function_host_s: float = 0.0
    multiprocessors: int | None = None
    compute_capability: tuple[int, int] | None = None
    strided_bytes_per_s: float | None = None
    throttle: tuple[float, float] | None = None
    times: Mapping[str, Times] = field(default_factory=dict, repr=False)
    tiles: Mapping[str, Tiles] = field(default_factory=dict, repr=False)
    measured_on: DeviceProfile | None = field(default=None, repr=False)

    @property
    def kernels(self) -> bool:
        """Whether fused Triton kernels run on it."""
        return self.kernel_host_s is not None

    @property
    def meter(self) -> DeviceProfile:
        """The profile that holds the measurements."""
        return self.measured_on or self

    def throttled_s(self, products_s: float, step_s: float) -> float:
        """Seconds that a step takes longer than its parts alone, so much of which are products."""
        if self.throttle is None or not step_s:
            return 0.0
        first, more = self.throttle
        return products_s * more * max(0.0, products_s / step_s - first)

    def times_for(self, dtype: str) -> Times:
        """Measured times for a dtype; 16-bit dtypes have the same size and rate, so one stands for the other."""
        return _of_dtype(self.times, dtype)

    def tiles_for(self, dtype: str) -> Tiles:
        """The best constants of kernels, likewise."""
        return _of_dtype(self.tiles, dtype)


def _of_dtype(by_dtype: Mapping[str, Any], dtype: str) -> Mapping[str, Any]:
    halves = ("bf16", "fp16")
    stand_in = halves[1 - halves.index(dtype)] if dtype in halves else dtype
    found: Mapping[str, Any] = by_dtype.get(dtype, by_dtype.get(stand_in, {}))
    return found


def device_names() -> tuple[str, ...]:
    """Names of the profiles that come with the package, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


@lru_cache
def load_device(name: str) -> DeviceProfile:
    """Read a profile by its name, or by the path of a file that ends in ``.toml``.

    Raises:
        SpecError: there is no such profile, or its file is not what a profile must be.
    """
    if name.endswith(".toml"):
        path = Path(name)
    elif name in device_names():
        path = _FOLDER / f"{name}.toml"
    else:
        raise SpecError(
            f"--device: unknown device {nearest(name, device_names())}, or the path of a profile that ends in .toml"
        )
    label = f"--device: {shorten(name)}"
    data = read_if_there(path, label=label, limit=MAX_PROFILE_BYTES, kind="profile")
    if data is None:
        raise SpecError(f"--device: there is no file {shorten(name)}")
    try:
        return device_of(name, parse_toml(data))
    except ValueError as error:
        raise SpecError(f"{label}: not a device profile: {error}") from None


def device_for(workload: Workload) -> DeviceProfile:
    """The device that a workload's prices are of: ``host_s`` and ``kernel_host_s`` are those of its launch mode.

    Under CUDA graphs, where the host counts for nothing, they stay the eager ones.

    Raises:
        SpecError: there is no such profile, or it does not know what launches cost in this mode.
    """
    device = load_device(workload.device)
    return _compiled(device) if workload.launch == "compile" else device


def has_kernels(workload: Workload) -> bool:
    """Whether fused kernels are wished, and the workload's device runs them; raises as :func:`device_for`."""
    return workload.kernels and device_for(workload).kernels


def turns(workload: Workload) -> bool:
    """Whether packages make rotary embeddings of 16 bits in one kernel."""
    return workload.rotary == "auto" and has_kernels(workload)


@lru_cache
def _compiled(device: DeviceProfile) -> DeviceProfile:
    if device.compiled_host_s is None:
        raise SpecError(
            f"--launch: compile is not allowed with --device {shorten(device.name)}, which has no compiled_host_us; "
            "give eager or graph, or let `runlora-gen tune -o FILE.toml` add it on that machine"
        )
    return replace(
        device, host_s=device.compiled_host_s, kernel_host_s=device.compiled_kernel_host_s, function_host_s=0.0
    )


def nearest_profile(name: str, capability: tuple[int, int]) -> tuple[str, str]:
    """The profile of the package for a GPU: its own, else the one of the nearest compute capability.

    Args:
        name: as the driver calls it, such as "NVIDIA H100 80GB HBM3".
        capability: its compute capability.

    Returns:
        The profile's name, and what is to be said if it is another GPU's; else an empty text.
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    known = {
        profile: found for profile in device_names() if (found := load_device(profile).compute_capability) is not None
    }
    for profile in known:
        if profile.replace("-", "") in plain:
            return profile, ""
    major, minor = capability

    def gap(profile: str) -> tuple[int, str]:
        return abs(10 * (known[profile][0] - major) + known[profile][1] - minor), profile

    profile = min(known, key=gap)
    title = load_device(profile).title
    return profile, f"priced for another GPU, {title}: {shorten(name)} has no profile; `runlora-gen tune` makes one"


def device_of(name: str, data: Mapping[str, Any]) -> DeviceProfile:
    """A device from the data of its profile's file.

    Raises:
        ValueError: it is not what a profile must be; one line that names what is wrong.
    """
    profile = read_profile(data)
    meter = _meter(profile.measured_on) if profile.measured_on is not None else None
    major, _, minor = (profile.compute_capability or "").partition(".")
    return DeviceProfile(
        name=name,
        digest=_digest(data, meter),
        title=profile.title,
        source=profile.source,
        flops_per_s={dtype: rate * 1e12 for dtype, rate in profile.tflops.items()},
        bytes_per_s=profile.memory_gb_per_s * 1e9,
        launch_s=profile.launch_us * 1e-6,
        host_s=profile.host_us * 1e-6,
        kernel_host_s=_seconds(profile.kernel_host_us),
        compiled_host_s=_seconds(profile.compiled_host_us),
        compiled_kernel_host_s=_seconds(profile.compiled_kernel_host_us),
        function_host_s=_seconds(profile.function_host_us) or 0.0,
        multiprocessors=profile.multiprocessors,
        compute_capability=(int(major), int(minor)) if profile.compute_capability is not None else None,
        times={
            dtype: {key: tuple((size, time * 1e-6) for size, time in times.items()) for key, times in by_work.items()}
            for dtype, by_work in profile.times.items()
        },
        tiles={
            dtype: {key: tuple(tiles.items()) for key, tiles in by_work.items()}
            for dtype, by_work in profile.tiles.items()
        },
        measured_on=meter,
        strided_bytes_per_s=None if profile.strided_gb_per_s is None else profile.strided_gb_per_s * 1e9,
        throttle=(
            None
            if profile.throttle_from is None or profile.throttle is None
            else (profile.throttle_from, profile.throttle)
        ),
    )


def _seconds(microseconds: float | None) -> float | None:
    return None if microseconds is None else microseconds * 1e-6


def _digest(data: Mapping[str, Any], meter: DeviceProfile | None) -> str:
    text = json.dumps([data, meter.digest if meter else None], sort_keys=True, default=str)
    text = re.sub(" +", " ", text)  # however the columns of tables are set
    return hashlib.sha256(text.encode()).hexdigest()


def _meter(name: str) -> DeviceProfile:
    """The profile that another one names for its measurements: one of the package, that has its own."""
    if name not in device_names():
        raise ValueError(f"measured_on: unknown device {nearest(name, device_names())}")
    if "measured_on" in (_FOLDER / f"{name}.toml").read_text(encoding="utf-8"):
        raise ValueError(f"measured_on: {name} was not measured itself")
    return load_device(name)
