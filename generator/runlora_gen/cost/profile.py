"""The file of a device profile: what ``--device`` reads and ``runlora-gen tune`` writes. TOML::

    format = 2                        # of the tables below; a file of figures alone needs none
    title = "NVIDIA H200 141GB SXM"
    source = "…"                      # where the figures come from
    compute_capability = "9.0"        # of a GPU of NVIDIA
    memory_gb_per_s = 4275.8
    launch_us = 0.84                  # of the device
    host_us = 37.03                   # of one operator call
    function_host_us = 88.58          # of an autograd function that does nothing, forward and backward; may be absent
    multiprocessors = 132             # of a GPU
    kernel_host_us = 57.69            # of one Triton kernel; absent where none run
    compiled_host_us = 29.75          # of one operator call under torch.compile
    compiled_kernel_host_us = 42.59   # of one Triton kernel there; absent where none run
    strided_gb_per_s = 1417           # of passes whose operands are broadcast or strided; may be absent
    throttle_from = 0.65              # the share of products in a step's time from which they take longer than alone,
    throttle = 0.5                    # by this times what is above it; both may be absent: no limit of power is known
    measured_on = "h200"              # another profile whose tables stand in, as ratios to that machine's roofline

    [tflops]                          # by dtype; fp8 only where it is multiplied
    bf16 = 806.1
    …

    [times.bf16]                      # by dtype and work, in microseconds
    "TI,RI->TR scaled" = '''
    T      512   512  2048
    R        8    16     8
    512  3.306   4.2     -
    1024 3.884  4.61  5.02
    '''

    [tiles.bf16."x_at: TI,RI->TR scaled"]
    constants = [{}, {BI = 128}]      # of a kernel, in place of its own
    best = '''…'''                    # which of them, counted from 0

The host's figures are of two kinds: of steps that Python runs operator by operator, and of those that the code of
torch.compile runs, where there are no autograd functions. The latter may be absent: profiles of earlier versions have
none, and where there is no compiler ``tune`` can't measure any. Nothing stands in for them, as no ratio to the eager
ones holds from one machine to the next: ``--launch compile`` is refused with such a profile, and ``tune`` adds them to
its file.

What a key says is in ``algebra/work.py``. A table has a column for every token count T and rank R, as far as the work
has them, and a line for every other size, I x O as far as it has them; ``-`` is where nothing was measured.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import tomllib

from ..algebra.operations import Fused, dimensions
from ..kernels.registry import KERNELS
from ..kernels.sites import WORKS
from ..request.errors import shorten
from ..request.workload import DTYPE_NAMES

#: What the rate of products of float8 is called.
FLOAT8 = "fp8"
#: What files with tables say in ``format``; those of format 1 said nothing.
FORMAT = 2
#: A hundred times the largest profile that was measured.
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
#: What a profile's title may be: it stands in docstrings and comments of generated code.
_TITLE = re.compile(r"[A-Za-z0-9 ()@.,:+/_-]{1,60}")
_SIZE = re.compile(r"[1-9][0-9]{0,9}")
_FIGURE = re.compile(r"[0-9]{1,13}(?:\.[0-9]{1,24})?(?:e-?[0-9]{1,2})?")
_PLACE = re.compile(r"[0-9]{1,3}")
#: Where nothing was measured.
_NOTHING = "-"

#: Sizes, in the order of ``dimensions``.
Size = tuple[int, ...]
Constants = Mapping[str, int]
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Profile:
    """What a file holds, in its units.

    Attributes:
        times: microseconds by dtype, work and size.
        tiles: the best constants of kernels, likewise.
    """

    title: str
    source: str
    memory_gb_per_s: float
    launch_us: float
    host_us: float
    tflops: Mapping[str, float]
    date: str | None = None
    compute_capability: str | None = None
    multiprocessors: int | None = None
    function_host_us: float | None = None
    kernel_host_us: float | None = None
    compiled_host_us: float | None = None
    compiled_kernel_host_us: float | None = None
    measured_on: str | None = None
    strided_gb_per_s: float | None = None
    throttle_from: float | None = None
    throttle: float | None = None
    times: dict[str, dict[str, dict[Size, float]]] = field(default_factory=dict)
    tiles: dict[str, dict[str, dict[Size, Constants]]] = field(default_factory=dict)


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


def read_profile(data: Mapping[str, Any]) -> Profile:
    """A profile from the data of its file.

    Raises:
        ValueError: it is not what a profile must be; one line that names what is wrong.
    """
    try:
        _check_format(data)
        return _profile(data)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(" ".join(what.split())) from None


def _check_format(data: Mapping[str, Any]) -> None:
    found = data.get("format", 1)
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise ValueError(f"format: {shorten(found)} is not allowed; this version reads {FORMAT}")
    if found < FORMAT and ("times" in data or "tiles" in data):
        raise ValueError(
            "its tables are of an older version of runlora-gen; measure the machine again, into another file: "
            "runlora-gen tune -o FILE.toml"
        )


def _rates(found: Mapping[str, Any]) -> tuple[str, ...]:
    """The dtypes that a device has rates of: those of every one, and of float8 where it multiplies that."""
    return (*DTYPE_NAMES, FLOAT8) if FLOAT8 in found else DTYPE_NAMES


def _profile(data: Mapping[str, Any]) -> Profile:
    profile = Profile(
        title=check_title(data["title"]),
        source=str(data["source"]),
        memory_gb_per_s=_positive("memory_gb_per_s", data["memory_gb_per_s"]),
        launch_us=_positive("launch_us", data["launch_us"]),
        host_us=_positive("host_us", data["host_us"]),
        tflops={dtype: _positive(f"tflops.{dtype}", data["tflops"][dtype]) for dtype in _rates(data["tflops"])},
        date=str(data["date"]) if "date" in data else None,
        compute_capability=_capability(data["compute_capability"]) if "compute_capability" in data else None,
        multiprocessors=_count(data["multiprocessors"]) if "multiprocessors" in data else None,
        function_host_us=_optional("function_host_us", data),
        kernel_host_us=_optional("kernel_host_us", data),
        compiled_host_us=_optional("compiled_host_us", data),
        compiled_kernel_host_us=_optional("compiled_kernel_host_us", data),
        measured_on=str(data["measured_on"]) if "measured_on" in data else None,
        strided_gb_per_s=_optional("strided_gb_per_s", data),
        throttle_from=_share(data["throttle_from"]) if "throttle_from" in data else None,
        throttle=_optional("throttle", data),
        times={
            _dtype("times", dtype): {key: _times(key, table) for key, table in by_work.items()}
            for dtype, by_work in data.get("times", {}).items()
        },
        tiles={
            _dtype("tiles", dtype): {key: _tiles(key, table) for key, table in by_work.items()}
            for dtype, by_work in data.get("tiles", {}).items()
        },
    )
    # With one of two, kernels would be free under torch.compile, or never chosen there.
    both = profile.kernel_host_us is not None and profile.compiled_host_us is not None
    if (profile.compiled_kernel_host_us is not None) != both:
        raise ValueError(
            "compiled_kernel_host_us: give it where there are kernel_host_us and compiled_host_us, and nowhere else"
        )
    if (profile.throttle_from is None) != (profile.throttle is None):
        raise ValueError("throttle: give it where there is throttle_from, and nowhere else")
    return profile


def _positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 <= value <= 1e12:
        raise ValueError(f"{key}: {shorten(value)} is not allowed; give a number from 1e-6 to 1e12")
    return float(value)


def _optional(key: str, data: Mapping[str, Any]) -> float | None:
    return _positive(key, data[key]) if key in data else None


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"throttle_from: {shorten(value)} is not allowed; give a number from 0, below 1")
    return float(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value <= 4096:
        raise ValueError(f"multiprocessors: {shorten(value)} is not allowed; give a whole number from 1 to 4096")
    return value


def _capability(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,2}\.[0-9]", value):
        raise ValueError(f"compute_capability: {shorten(value)} is not allowed; give a text such as 9.0")
    return value


def check_title(title: object) -> str:
    """A profile's title, if it may stand in generated code.

    Raises:
        ValueError: it holds other characters than letters, digits and some punctuation, or is longer than 60.
    """
    if not isinstance(title, str) or not _TITLE.fullmatch(title):
        raise ValueError(f"title: {shorten(title)} is not allowed; give up to 60 letters, digits and ()@.,:+/_-")
    return title


def _dtype(kind: str, name: str) -> str:
    if name not in DTYPE_NAMES:
        raise ValueError(f"{kind}: {shorten(name)} is not allowed; give one of {', '.join(DTYPE_NAMES)}")
    return name


def _times(key: str, table: Any) -> dict[Size, float]:
    name = f"times of {shorten(key)}"

    def time(cell: str) -> float:
        figure = float(cell) if _FIGURE.fullmatch(cell) else 0.0
        if not 1e-6 <= figure <= 1e12:
            raise ValueError(f"{name}: {shorten(cell)} is not allowed; give a number from 1e-6 to 1e12, or {_NOTHING}")
        return figure

    return _cells(name, key, table, time)


def _tiles(key: str, table: Any) -> dict[Size, Constants]:
    name = f"tiles of {shorten(key)}"
    if not isinstance(table, Mapping):
        raise ValueError(f"{name}: {shorten(table)} is not allowed; give constants and best")
    operation = WORKS.get(key)
    if operation is not None and not isinstance(operation, Fused):
        raise ValueError(f"{name}: no kernel does this work")
    constants = [] if operation is None else [_constants(name, operation.kernel, each) for each in table["constants"]]

    def best(cell: str) -> Constants:
        if not _PLACE.fullmatch(cell) or int(cell) >= len(constants):
            what = f"give the place of one of {len(constants)} constants, counted from 0, or {_NOTHING}"
            raise ValueError(f"{name}: {shorten(cell)} is not allowed; {what}")
        return constants[int(cell)]

    return _cells(name, key, table["best"], best)


def _constants(name: str, kernel: str, constants: Mapping[str, Any]) -> Constants:
    """A kernel's best constants: only what its record allows."""
    try:
        KERNELS[kernel].check(constants)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return dict(constants)


def _axes(key: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The dimensions that the columns and the lines of a table differ in; a line begins with a size."""
    dims = dimensions(WORKS[key])
    across = tuple(dim for dim in dims if dim in "TRN")
    if len(across) == len(dims):  # of the rank's width alone
        across = across[:1]
    return across, tuple(dim for dim in dims if dim not in across)


def _cells(name: str, key: str, table: Any, value: Callable[[str], _Value]) -> dict[Size, _Value]:
    """The figures of a table by their sizes, in the order of the sizes."""
    if key not in WORKS:
        raise ValueError(f"there is no operation {shorten(key)}")
    if not isinstance(table, str):
        raise ValueError(f"{name}: {shorten(table)} is not allowed; give a table as text, in ''' and '''")
    across, down = _axes(key)
    lines = [line.split() for line in table.splitlines() if line.strip()]
    head, body = lines[: len(across)], lines[len(across) :]
    if tuple(line[0] for line in head) != across:
        raise ValueError(f"{name}: its first lines are not those of {' and '.join(across)}")
    for line in lines:
        if len(line) != len(lines[0]):
            raise ValueError(
                f"{name}: {len(line) - 1} columns at {shorten(line[0])}, {len(lines[0]) - 1} at {across[0]}"
            )
    columns = list(zip(*(_sizes(name, line[1:]) for line in head), strict=True)) if across else [()]
    rows = [_sizes(name, line[0].split("x")) for line in body]
    if any(len(row) != len(down) for row in rows):
        raise ValueError(f"{name}: a line does not begin with {' x '.join(down)}")
    _once(name, columns, across)
    _once(name, rows, down)
    order = [(*across, *down).index(dim) for dim in dimensions(WORKS[key])]
    found = {}
    for row, line in zip(rows, body, strict=True):
        for column, cell in zip(columns, line[1:], strict=True):
            if cell != _NOTHING:
                sizes = (*column, *row)
                found[tuple([sizes[i] for i in order])] = value(cell)
    if not found:
        raise ValueError(f"{name}: there is no figure in it")
    return {size: found[size] for size in sorted(found)}


def _sizes(name: str, words: Sequence[str]) -> Size:
    for word in words:
        if not _SIZE.fullmatch(word) or int(word) > 2**31:
            raise ValueError(f"{name}: {shorten(word)} is not allowed; give a size from 1 to 2^31")
    return tuple(map(int, words))


def _once(name: str, sizes: Sequence[Size], dims: Sequence[str]) -> None:
    for size, count in Counter(sizes).items():
        if count > 1:
            raise ValueError(f"{name}: {', '.join(dims)} = {', '.join(map(str, size))} stands there twice")


def render_profile(profile: Profile) -> str:
    """The file of a profile; what is read from it is that profile."""
    scalars: dict[str, str | float | None] = {
        "format": FORMAT,
        "title": profile.title,
        "source": profile.source,
        "date": profile.date,
        "compute_capability": profile.compute_capability,
        "memory_gb_per_s": profile.memory_gb_per_s,
        "launch_us": profile.launch_us,
        "host_us": profile.host_us,
        "function_host_us": profile.function_host_us,
        "multiprocessors": profile.multiprocessors,
        "kernel_host_us": profile.kernel_host_us,
        "compiled_host_us": profile.compiled_host_us,
        "compiled_kernel_host_us": profile.compiled_kernel_host_us,
        "strided_gb_per_s": profile.strided_gb_per_s,
        "throttle_from": profile.throttle_from,
        "throttle": profile.throttle,
        "measured_on": profile.measured_on,
    }
    parts = [
        "".join(f"{name} = {_scalar(value)}\n" for name, value in scalars.items() if value is not None),
        "[tflops]\n" + "".join(f"{dtype} = {_scalar(profile.tflops[dtype])}\n" for dtype in _rates(profile.tflops)),
    ]
    comment = "# Microseconds, by tokens and rank across and by I x O down.\n"
    for dtype, times in profile.times.items():
        tables = (f"{_scalar(key)} = {_table(key, times[key], _scalar)}" for key in sorted(times))
        parts.append(f"{comment}[times.{dtype}]\n" + "".join(tables))
        comment = ""
    comment = "# The best constants of kernels, each by its place in the list.\n"
    for dtype, tiles in profile.tiles.items():
        for key in sorted(tiles):
            texts = {size: _inline(constants) for size, constants in tiles[key].items()}
            known = sorted(set(texts.values()), key=lambda text: (len(text), text))
            best = _table(key, {size: known.index(each) for size, each in texts.items()}, str)
            parts.append(f"{comment}[tiles.{dtype}.{_scalar(key)}]\nconstants = [{', '.join(known)}]\nbest = {best}")
            comment = ""
    return "\n".join(parts)


def _scalar(value: str | float) -> str:
    return json.dumps(value, ensure_ascii=False).removesuffix(".0")


def _inline(constants: Constants) -> str:
    return "{" + ", ".join(f"{name} = {value}" for name, value in constants.items()) + "}"


def _table(key: str, cells: Mapping[Size, _Value], text: Callable[[_Value], str]) -> str:
    """A table of figures as it stands in a file, its columns under each other."""
    across, down = _axes(key)
    dims = dimensions(WORKS[key])

    def part(size: Size, of: Sequence[str]) -> Size:
        return tuple(size[dims.index(dim)] for dim in of)

    by_place = {(part(size, down), part(size, across)): text(value) for size, value in cells.items()}
    rows, columns = (sorted({place[i] for place in by_place}) for i in range(2))
    lines = [[dim, *(str(column[i]) for column in columns)] for i, dim in enumerate(across)]
    lines += [["x".join(map(str, row)), *(by_place.get((row, c), _NOTHING) for c in columns)] for row in rows]
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    padded = (
        " ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], widths, strict=True))])
        for line in lines
    )
    return "'''\n" + "\n".join(padded) + "\n'''\n"
