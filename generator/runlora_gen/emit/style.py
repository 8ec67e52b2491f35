"""How generated Python is formatted: as black formats the repository that it lies in."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tomllib

from ..spec.errors import SpecError, shorten
from ..spec.files import read_if_there

#: black's own, where neither the repository nor ``--line-length`` says otherwise.
DEFAULT_LINE_LENGTH = 88
MIN_LINE_LENGTH, MAX_LINE_LENGTH = 60, 320
_PYPROJECT = "pyproject.toml"
_MAX_PYPROJECT_BYTES = 1 << 20


@dataclass(frozen=True)
class Style:
    """Options of black.

    Attributes:
        line_length: columns of a line, also of wrapped docstrings.
        options: the repository's ``[tool.black]``, with underscores in its names.
        project: its ``requires-python``, from which black takes the Python versions if ``[tool.black]`` names none.
    """

    line_length: int = DEFAULT_LINE_LENGTH
    options: Mapping[str, Any] = field(default_factory=dict)
    project: Mapping[str, Any] = field(default_factory=dict)

    def format(self, source: str) -> str:
        """Format Python text: the one exit for it.

        Raises:
            SpecError: the repository's options are none of black's.
        """
        import black  # here, because an unchanged package needs no formatting: 0.1 s
        from black.files import infer_target_version
        from black.mode import Preview, TargetVersion

        options = self.options
        try:
            versions = {TargetVersion[str(name).upper()] for name in options.get("target_version", ())}
            features = {Preview[str(name)] for name in options.get("enable_unstable_feature", ())}
        except (KeyError, TypeError) as error:
            raise SpecError(f"{_PYPROJECT}: tool.black: {shorten(error.args[0])} is unknown to black") from None
        mode = black.Mode(
            line_length=self.line_length,
            target_versions=versions or set(infer_target_version({"project": dict(self.project)}) or ()),
            enabled_features=features,
            string_normalization=not options.get("skip_string_normalization", False),
            magic_trailing_comma=not options.get("skip_magic_trailing_comma", False),
            skip_source_first_line=bool(options.get("skip_source_first_line", False)),
            preview=bool(options.get("preview", False)),
            unstable=bool(options.get("unstable", False)),
        )
        return black.format_str(source, mode=mode)

    @cached_property
    def key(self) -> str:
        """What the formatted form of a text depends on beside the text: black's version too."""
        version = importlib.metadata.version("black")
        return json.dumps([version, self.line_length, self.options, self.project], sort_keys=True, default=str)


def style_of(out: Path, line_length: int | None = None) -> Style:
    """The style of the repository that a folder lies in; the folder need not be there yet.

    Args:
        out: the folder.
        line_length: in place of the repository's.

    Raises:
        SpecError: its ``pyproject.toml`` is no TOML, or its line length none that is supported.
    """
    tables = _pyproject(out)
    black = tables.get("tool", {}).get("black", {})
    options = {str(key).replace("--", "").replace("-", "_"): value for key, value in black.items()}
    length = options.pop("line_length", DEFAULT_LINE_LENGTH) if line_length is None else line_length
    options.pop("line_length", None)
    if not str(length).isdecimal() or not MIN_LINE_LENGTH <= int(length) <= MAX_LINE_LENGTH:
        where = f"{_PYPROJECT}: tool.black.line-length" if line_length is None else "--line-length"
        allowed = f"give a whole number from {MIN_LINE_LENGTH} to {MAX_LINE_LENGTH}"
        raise SpecError(f"{where}: {shorten(length)} is not allowed; {allowed}")
    requires = tables.get("project", {}).get("requires-python")
    return Style(int(length), options, {} if requires is None else {"requires-python": requires})


def _pyproject(out: Path) -> dict[str, Any]:
    """The ``pyproject.toml`` that black finds for a folder: that of the nearest folder with one for black, or a .git.

    Not a user's own, as that would format the same repository differently elsewhere.
    """
    place = out.absolute()
    for folder in (place, *place.parents):
        tables = _read_toml(folder / _PYPROJECT)
        if (folder / ".git").exists() or (folder / ".hg").is_dir() or "black" in tables.get("tool", {}):
            return tables
    return {}


def _read_toml(path: Path) -> dict[str, Any]:
    label = shorten(str(path))
    data = read_if_there(path, label=label, limit=_MAX_PYPROJECT_BYTES, kind=_PYPROJECT)
    try:
        return tomllib.loads((data or b"").decode())
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{label}: not valid TOML: {' '.join(str(error).split())}") from None
