"""Device profiles: data files with what the prices need to know of a machine.

Keys of a file: ``title``, ``source``, ``compute_capability`` (of a GPU),
``memory_gb_per_s``, ``launch_us``, ``host_us``, ``kernel_host_us`` (absent
where no Triton kernels run), ``multiprocessors`` (of a GPU), ``[tflops]`` by dtype. A file that ``runlora-gen tune``
wrote has more: ``[times.DTYPE]``, by the signature of an operation rows of its dimensions (in the order T, I, O, R)
and measured microseconds, and ``[tiles.DTYPE]``, rows of dimensions and a kernel's best constants. ``measured_on``
names another profile whose measurements stand in, as ratios to that machine's roofline.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import tomllib

from ..algebra.operations import dimensions, signature
from ..kernels.registry import KERNELS
from ..kernels.sites import OPERATIONS
from ..request.errors import SpecError, nearest, shorten
from ..request.files import read_if_there
from ..request.workload import DTYPE_NAMES

_FOLDER = Path(__file__).parent / "devices"
#: Thirty times the largest profile that was measured.
MAX_PROFILE_BYTES = 4 << 20
#: A key of more parts than any here: tomllib's time and memory grow with their square. Searched for outside of strings,
#: which end where tomllib ends them, or where it will stop with an error.
_DEEP_KEY = re.compile(r"(?:\.[ \t]*+[A-Za-z0-9_-]++[ \t]*+){4}")
_STRING_OR_COMMENT = re.compile(
    r'"""(?:[^"\\]|\\.|"(?!""))*+(?:"{3,5})?'
    r"|'''(?:[^']|'(?!''))*+(?:'{3,5})?"
    r'|"(?:[^"\\\n]|\\.)*+"?'
    r"|'[^'\n]*+'?"
    r"|#[^\n]*+",
    re.DOTALL,
)

#: Dimensions of a measured operation, and what was measured.
Times = Mapping[str, tuple[tuple[tuple[int, ...], float], ...]]
Tiles = Mapping[str, tuple[tuple[tuple[int, ...], Mapping[str, int]], ...]]


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
        multiprocessors: of a GPU: how many tiles of a kernel run at once; None where that is not known.
        compute_capability: of a GPU of NVIDIA; None where that is not known.
        digest: of all its data, also of what it takes from another profile.
        times: seconds by dtype and signature of an operation, at the dimensions where it was measured.
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
    multiprocessors: int | None = None
    compute_capability: tuple[int, int] | None = None
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
        return parse_profile(name, parse_toml(data))
    except ValueError as error:
        raise SpecError(f"{label}: not a device profile: {error}") from None


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


def parse_toml(data: bytes) -> dict[str, Any]:
    """The data of a profile's file.

    Raises:
        ValueError: it is no TOML, or TOML that no profile needs; one line.
    """
    text = data.decode("utf-8")
    if _DEEP_KEY.search(_STRING_OR_COMMENT.sub("s", text)):
        raise ValueError("a key of more than four parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_profile(name: str, data: Mapping[str, Any]) -> DeviceProfile:
    """A profile from the data of its file.

    Raises:
        ValueError: it is not what a profile must be; one line that names what is wrong.
    """
    try:
        return _profile(name, data)
    except SpecError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(" ".join(what.split())) from None


def _profile(name: str, data: Mapping[str, Any]) -> DeviceProfile:
    def positive(key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 <= value <= 1e12:
            raise ValueError(f"{key}: {shorten(value)} is not allowed; give a number from 1e-6 to 1e12")
        return float(value)

    rates = {dtype: positive(f"tflops.{dtype}", data["tflops"][dtype]) * 1e12 for dtype in DTYPE_NAMES}
    times = {
        dtype: {
            name: tuple((_dimensions(name, row[:-1]), positive(f"times of {name}", row[-1]) * 1e-6) for row in rows)
            for name, rows in by_signature.items()
        }
        for dtype, by_signature in data.get("times", {}).items()
    }
    meter = _meter(str(data["measured_on"])) if "measured_on" in data else None
    return DeviceProfile(
        name=name,
        digest=_digest(data, meter),
        title=check_title(data["title"]),
        source=str(data["source"]),
        flops_per_s=rates,
        bytes_per_s=positive("memory_gb_per_s", data["memory_gb_per_s"]) * 1e9,
        launch_s=positive("launch_us", data["launch_us"]) * 1e-6,
        host_s=positive("host_us", data["host_us"]) * 1e-6,
        kernel_host_s=positive("kernel_host_us", data["kernel_host_us"]) * 1e-6 if "kernel_host_us" in data else None,
        multiprocessors=(_count(data["multiprocessors"]) if "multiprocessors" in data else None),
        compute_capability=(check_capability(data["compute_capability"]) if "compute_capability" in data else None),
        times=times,
        tiles={
            dtype: {
                name: tuple((_dimensions(name, row[:-1]), _constants(name, row[-1])) for row in rows)
                for name, rows in by_signature.items()
            }
            for dtype, by_signature in data.get("tiles", {}).items()
        },
        measured_on=meter,
    )


def _digest(data: Mapping[str, Any], meter: DeviceProfile | None) -> str:
    text = json.dumps([data, meter.digest if meter else None], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _meter(name: str) -> DeviceProfile:
    """The profile that another one names for its measurements: one of the package, that has its own."""
    if name not in device_names():
        raise ValueError(f"measured_on: unknown device {nearest(name, device_names())}")
    if "measured_on" in (_FOLDER / f"{name}.toml").read_text(encoding="utf-8"):
        raise ValueError(f"measured_on: {name} was not measured itself")
    return load_device(name)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value <= 4096:
        raise ValueError(f"multiprocessors: {shorten(value)} is not allowed; give a whole number from 1 to 4096")
    return value


def check_capability(value: object) -> tuple[int, int]:
    """A compute capability such as "9.0".

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,2}\.[0-9]", value):
        raise ValueError(f"compute_capability: {shorten(value)} is not allowed; give a text such as 9.0")
    major, _, minor = value.partition(".")
    return int(major), int(minor)


#: What a profile's title may be: it stands in docstrings and comments of generated code.
_TITLE = re.compile(r"[A-Za-z0-9 ()@.,:+/_-]{1,60}")


def check_title(title: object) -> str:
    """A profile's title, if it may stand in generated code.

    Raises:
        ValueError: it holds other characters than letters, digits and some punctuation, or is longer than 60.
    """
    if not isinstance(title, str) or not _TITLE.fullmatch(title):
        raise ValueError(f"title: {shorten(title)} is not allowed; give up to 60 letters, digits and ()@.,:+/_-")
    return title


_DIMENSIONS = {signature(operation): dimensions(operation) for operation in OPERATIONS}


def _dimensions(name: str, values: list[Any]) -> tuple[int, ...]:
    if name not in _DIMENSIONS:
        raise ValueError(f"there is no operation {shorten(name)}")
    if len(values) != len(_DIMENSIONS[name]) or not all(type(value) is int and 0 < value <= 2**31 for value in values):
        raise ValueError(
            f"{name}: {shorten(values)} is not allowed; give {', '.join(_DIMENSIONS[name])} from 1 to 2^31"
        )
    return tuple(values)


def _constants(name: str, constants: Mapping[str, Any]) -> Mapping[str, int]:
    """A kernel's best constants: only what its record allows."""
    try:
        KERNELS[name.split(":")[0]].check(constants)
    except ValueError as error:
        raise ValueError(f"tiles of {name}: {error}") from None
    return dict(constants)
