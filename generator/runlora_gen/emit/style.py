"""How generated Python is formatted: as black formats the repository that it lies in."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomllib

from ..request.errors import SpecError, shorten
from ..request.files import read_if_there
from .formatted import formatted_before, remember

if TYPE_CHECKING:
    from black import Mode

#: black's own, where neither the repository nor ``--line-length`` says otherwise.
DEFAULT_LINE_LENGTH = 88
MIN_LINE_LENGTH, MAX_LINE_LENGTH = 60, 320
_PYPROJECT = "pyproject.toml"
#: What of ``[tool.black]`` says how a text is formatted, and not which files.
_OPTIONS = frozenset(
    {
        "target_version",
        "enable_unstable_feature",
        "skip_string_normalization",
        "skip_magic_trailing_comma",
        "skip_source_first_line",
        "pyi",
        "preview",
        "unstable",
    }
)
_FLAGS = {
    **dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True),
    **dict.fromkeys(("0", "false", "f", "no", "n", "off"), False),
}
_MAX_PYPROJECT_BYTES = 1 << 20
#: Where a text is cut: before a function or a class at its top with two empty lines or more before it.
_CUT = re.compile(r"(?<=\S)\n{3,}(?=@|def |class |async def )")
#: So few parts are formatted here, by no other process.
_FEW = 16
#: Processes that format: more gain nothing.
_MOST = 8
#: What has threads that Python does not count.
_THREADED = frozenset({"numpy", "torch"})
#: Parts of texts in their formatted form, by what that follows from.
_FORMATTED: dict[tuple[str, ...], str] = {}


@dataclass(frozen=True)
class Style:
    """Options of black.

    Attributes:
        line_length: columns of a line, also of wrapped docstrings.
        options: others of the repository's ``[tool.black]``, with underscores in their names.
        project: its ``requires-python``, from which black takes the Python versions if ``[tool.black]`` names none.
    """

    line_length: int = DEFAULT_LINE_LENGTH
    options: Mapping[str, Any] = field(default_factory=dict)
    project: Mapping[str, Any] = field(default_factory=dict)

    def format(self, sources: Sequence[str]) -> list[str]:
        """Format Python texts: the one exit for them.

        The modules of a package have most of their functions in common, and each is formatted once: where the Python
        versions are known, black formats a function by itself as among others, and where empty lines stand before it,
        it leaves two. That holds for our templates (tested), and not in stubs.

        Raises:
            SpecError: the repository's options are none of black's.
        """
        mode = self._mode()
        texts = [[source] if mode.is_pyi else _CUT.split(source) for source in sources]
        # Each ends its last line: black formats twice what its first pass changes.
        tasks = [[(part.rstrip("\n") + "\n", _mode_of(parts, mode)) for part in parts] for parts in texts]

        def result(part: str, mode: Mode) -> tuple[str, ...]:
            return (part, self.key, *sorted(version.name for version in mode.target_versions))

        fresh = {result(*task): task for text in tasks for task in text if result(*task) not in _FORMATTED}
        _FORMATTED.update(formatted_before(fresh))
        fresh = {key: task for key, task in fresh.items() if key not in _FORMATTED}
        new = dict(zip(fresh, _formatted(list(fresh.values())), strict=True))
        if new:
            remember(new)
        _FORMATTED.update(new)
        return ["\n\n".join(_FORMATTED[result(*task)] for task in text) for text in tasks]

    def _mode(self) -> Mode:
        import black  # here, because an unchanged package needs no formatting: 0.1 s
        from black.files import infer_target_version
        from black.mode import Preview, TargetVersion

        try:
            versions = {TargetVersion[name.upper()] for name in self._names("target_version")}
            features = {Preview[name] for name in self._names("enable_unstable_feature")}
        except KeyError as error:
            raise SpecError(f"{_PYPROJECT}: tool.black: {shorten(error.args[0])} is unknown to black") from None
        return black.Mode(
            line_length=self.line_length,
            target_versions=versions or set(infer_target_version({"project": dict(self.project)}) or ()),
            enabled_features=features,
            string_normalization=not self._flag("skip_string_normalization"),
            magic_trailing_comma=not self._flag("skip_magic_trailing_comma"),
            skip_source_first_line=self._flag("skip_source_first_line"),
            is_pyi=self._flag("pyi"),
            preview=self._flag("preview"),
            unstable=self._flag("unstable"),
        )

    def _names(self, option: str) -> list[str]:
        names = self.options.get(option, [])
        if not isinstance(names, list):
            raise SpecError(f"{_option(option)}: {shorten(names)} is not allowed; give a list")
        return list(map(str, names))

    def _flag(self, option: str) -> bool:
        """As black takes it: also from text."""
        value = str(self.options.get(option, False)).lower()
        if value not in _FLAGS:
            raise SpecError(f"{_option(option)}: {shorten(value)} is not allowed; give true or false")
        return _FLAGS[value]

    @cached_property
    def key(self) -> str:
        """What the formatted form of a text depends on beside the text: black's version too."""
        version = importlib.metadata.version("black")
        return json.dumps([version, self.line_length, self.options, self.project], sort_keys=True, default=str)


def _mode_of(parts: Sequence[str], mode: Mode) -> Mode:
    """What black takes for the parts of a text."""
    from black.mode import TargetVersion

    if len(parts) == 1 or mode.target_versions:
        return mode
    # black infers them from all of a text: here, where annotations are strings, and nothing is newer.
    later = {version for version in TargetVersion if version.value >= TargetVersion.PY37.value}
    return replace(mode, target_versions=later)


def _formatted(tasks: Sequence[tuple[str, Mode]]) -> list[str]:
    """Parts as black formats them: on all cores, as it takes a second for a thousand lines.

    A process is forked where that is cheap and sure: on Linux, where no other thread may hold a lock.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    with_threads = threading.active_count() > 1 or not _THREADED.isdisjoint(sys.modules)
    if cores == 1 or with_threads or len(tasks) < _FEW:
        return list(map(_format_part, tasks))
    import multiprocessing

    quiet = (signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's matter, who ends them
    with multiprocessing.get_context("fork").Pool(min(cores, _MOST), signal.signal, quiet) as pool:
        return pool.map(_format_part, tasks, chunksize=4)


def _format_part(task: tuple[str, Mode]) -> str:
    import black

    part, mode = task
    return black.format_str(part, mode=mode)


def style_of(out: Path, line_length: int | None = None) -> Style:
    """The style of the repository that a folder lies in; the folder need not be there yet.

    Args:
        out: the folder.
        line_length: in place of the repository's.

    Raises:
        SpecError: its ``pyproject.toml`` is no TOML, or its line length none that is supported.
    """
    tables = _pyproject(out)
    black = _table(_table(tables, "tool"), "black")
    options = {str(key).replace("--", "").replace("-", "_"): value for key, value in black.items()}
    length = options.get("line_length", DEFAULT_LINE_LENGTH) if line_length is None else line_length
    if not str(length).isdecimal() or not MIN_LINE_LENGTH <= int(length) <= MAX_LINE_LENGTH:
        where = _option("line_length") if line_length is None else "--line-length"
        allowed = f"give a whole number from {MIN_LINE_LENGTH} to {MAX_LINE_LENGTH}"
        raise SpecError(f"{where}: {shorten(length)} is not allowed; {allowed}")
    requires = _table(tables, "project").get("requires-python")
    if requires is not None and not isinstance(requires, str):
        raise SpecError(f"{_PYPROJECT}: project.requires-python: {shorten(requires)} is not allowed; give text")
    options = {name: value for name, value in options.items() if name in _OPTIONS}
    return Style(int(length), options, {} if requires is None else {"requires-python": requires})


def _option(name: str) -> str:
    """An option of black, for errors."""
    return f"{_PYPROJECT}: tool.black.{name.replace('_', '-')}"


def _pyproject(out: Path) -> dict[str, Any]:
    """The ``pyproject.toml`` that black finds for a folder: that of the nearest folder with one for black, or a .git.

    Not a user's own, as that would format the same repository differently elsewhere.
    """
    place = Path(os.path.realpath(out))  # as black does: what lies there, lies where a link leads to
    tables: dict[str, Any] = {}
    for folder in (place, *place.parents):
        tables = _read_toml(folder / _PYPROJECT)
        if (folder / ".git").exists() or (folder / ".hg").is_dir() or "black" in _table(tables, "tool"):
            break
    return tables


def _table(tables: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise SpecError(f"{_PYPROJECT}: {name}: {shorten(table)} is not allowed; give a table")
    return table


def _read_toml(path: Path) -> dict[str, Any]:
    if not os.path.exists(path):  # also where the name is too long: what is written there is refused, in better words
        return {}
    label = shorten(str(path))
    data = read_if_there(path, label=label, limit=_MAX_PYPROJECT_BYTES, kind=_PYPROJECT)
    try:
        return tomllib.loads((data or b"").decode())
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{label}: not valid TOML: {' '.join(str(error).split())}") from None
