"""Device profiles: data files with what the roofline needs to know of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import tomllib

from ..spec.errors import SpecError, nearest

_FOLDER = Path(__file__).parent / "devices"


@dataclass(frozen=True, eq=False)  # one object a name: compared and hashed by identity
class DeviceProfile:
    """A machine as the roofline sees it.

    Attributes:
        name: the name given to ``--device``.
        title: how people call it.
        source: where the figures come from.
        flops_per_s: peak dense matrix rate by dtype (fp32, bf16, fp16).
        bytes_per_s: memory bandwidth.
        launch_s: time that one launch adds on the device (on a CPU: one operator call).
        host_s: time that the host needs for one operator call from Python; bounds eager mode.
        kernel_host_s: the same for one Triton kernel, descriptors included; None where there are no Triton kernels.
    """

    name: str
    title: str
    source: str
    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    launch_s: float
    host_s: float
    kernel_host_s: float | None

    @property
    def kernels(self) -> bool:
        """Whether fused Triton kernels run on it."""
        return self.kernel_host_s is not None


def device_names() -> tuple[str, ...]:
    """Names of the profiles that come with the package, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


@lru_cache
def load_device(name: str) -> DeviceProfile:
    """Read a profile by its name.

    Raises:
        SpecError: there is no profile of that name.
    """
    if name not in device_names():
        raise SpecError(f"--device: unknown device {nearest(name, device_names())}")
    data = tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    return DeviceProfile(
        name=name,
        title=data["title"],
        source=data["source"],
        flops_per_s={dtype: float(rate) * 1e12 for dtype, rate in data["tflops"].items()},
        bytes_per_s=float(data["memory_gb_per_s"]) * 1e9,
        launch_s=float(data["launch_us"]) * 1e-6,
        host_s=float(data["host_us"]) * 1e-6,
        kernel_host_s=float(data["kernel_host_us"]) * 1e-6 if "kernel_host_us" in data else None,
    )
