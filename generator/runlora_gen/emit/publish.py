"""From texts to files: compare, stage, publish all or nothing. Foreign files are never touched."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..request.architecture import GENERATOR
from ..request.errors import SpecError, reason, shorten
from ..request.files import is_plain, read_if_there
from .manifest import MANIFEST
from .render import MARKER, MAX_GENERATED_BYTES
from .stage import clear_stages, open_stage

if TYPE_CHECKING:
    from .package import Package

try:
    import fcntl
except ImportError:  # Windows: no advisory lock on folders; publication is still staged
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Change:
    """One file that publication would write (``text``) or remove (``text`` is None)."""

    path: Path
    text: str | None

    def diff(self) -> str:
        """A unified diff from what is on disk."""
        old = _read(self.path)
        before = f"{self.path} ({'missing' if old is None else 'on disk'})"
        after = f"{self.path} ({'obsolete' if self.text is None else 'generated now'})"
        lines = list(difflib.unified_diff(_lines(old), _lines(self.text), before, after))
        if not lines:  # an empty file that is missing
            lines = [f"--- {before}\n", f"+++ {after}\n"]
        return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def _lines(text: str | None) -> list[str]:
    """Lines with their ends; only a line feed ends one, so that every line of a diff is one."""
    return io.StringIO(text or "", newline="\n").readlines()


def plan_changes(out: Path, packages: Sequence[Package], *, force: bool = False) -> list[Change]:
    """What differs on disk from the packages, without touching anything.

    Raises:
        SpecError: something foreign is in the way and ``force`` is not given, or the folder can't be read.
    """
    try:
        return [change for package in packages for change in _package_changes(out, package, force)]
    except OSError as error:
        path = shorten(str(error.filename or out))
        raise SpecError(f"-o: cannot read {path}: {reason(error)}; give a folder that can be read") from None


def publish(out: Path, packages: Sequence[Package], *, force: bool = False) -> list[Change]:
    """Write what differs; returns what was changed.

    Every folder that changes is made anew and put into its place whole; a failure puts all old ones back. A run that is
    killed leaves each folder as it was or as it should be, and what else it leaves, the next run clears away.

    Raises:
        SpecError: the folder can't be written, holds something foreign, or another run is writing to it; then it is as
            it was.
    """
    folders = [out / package.folder for package in packages]
    try:
        with _made(out), contextlib.ExitStack() as locks:
            # A package's folder may be a link: then it is replaced where it is.
            for parent in dict.fromkeys([_real(out), *(_real(folder).parent for folder in folders if folder.is_dir())]):
                if locks.enter_context(_locked(parent)):
                    clear_stages(parent, _disposable)
            changes = plan_changes(out, packages, force=force)
            _apply(changes)
            return changes
    except OSError as error:
        raise SpecError(
            f"-o: cannot write to {shorten(str(out))}: {reason(error)}; give a folder that can be written"
        ) from None


def _apply(changes: Sequence[Change]) -> None:
    by_place: dict[Path, dict[str, str | None]] = {}
    for change in changes:
        by_place.setdefault(_real(change.path.parent), {})[change.path.name] = change.text
    with contextlib.ExitStack() as opened:
        parents = dict.fromkeys(place.parent for place in by_place)
        stages = {parent: opened.enter_context(open_stage(parent, _disposable)) for parent in parents}
        for place, changed in by_place.items():
            stages[place.parent].prepare(place.name, changed)
        for stage in stages.values():
            stage.put_in_place()


def _real(path: Path) -> Path:
    """Without links, and absolute: the working folder may be one that is replaced."""
    return Path(os.path.realpath(path))


def _package_changes(out: Path, package: Package, force: bool) -> Iterator[Change]:
    folder = out / package.folder
    for place in (out, folder):
        if (place.is_symlink() and not place.exists()) or (place.exists() and not place.is_dir()):
            raise SpecError(f"-o: {shorten(str(place))} is no folder; give a folder or a path that does not exist")
    for name in package.files:
        if is_plain(folder / name) is False:
            raise SpecError(f"-o: {shorten(str(folder / name))} is in the way and no plain file; move it away")
    listed = _listed(folder)
    if listed is None and not force and folder.is_dir() and any(folder.iterdir()):
        raise SpecError(
            f"-o: {shorten(str(folder))} is not empty and holds no {MANIFEST} of {GENERATOR}; "
            "give another folder, or --force to write into it"
        )
    for name, text in package.files.items():
        path = folder / name
        old = _read(path)
        if old == text:
            continue
        if old is not None and not force and not _ours(path, old):
            raise SpecError(f"-o: {shorten(str(path))} was not generated by {GENERATOR}; move it away or give --force")
        yield Change(path, text)
    for name in _ours_among(set(listed or ()) - set(package.files), folder):
        yield Change(folder / name, None)


def _listed(folder: Path) -> list[str] | None:
    """Plain file names that a former run listed; None if there is no manifest of ours."""
    manifest = _manifest(_read(folder / MANIFEST))
    if manifest is None:
        return None
    files = manifest.get("files")
    names = list(files) if isinstance(files, dict) else []
    return [name for name in names if Path(name).name == name and name not in ("", ".", "..")]


def _manifest(text: str | None) -> dict[str, Any] | None:
    """The data of a manifest of ours."""
    try:
        data = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) and data.get("generator") == GENERATOR else None


def _ours(path: Path, text: str) -> bool:
    """Whether a file on disk was generated: by its marker, or for the manifest by its generator."""
    if path.name == MANIFEST:
        return _manifest(text) is not None
    return MARKER in text[:1000] or (path.name == "py.typed" and not text)


def _ours_among(names: Collection[str], folder: Path) -> list[str]:
    """Those of these names, sorted, under which there still is what was generated."""
    found = []
    for name in sorted(names):
        if is_plain(folder / name):
            with contextlib.suppress(SpecError):  # what can't be read is not ours
                if _ours(folder / name, _read(folder / name) or ""):
                    found.append(name)
    return found


def _disposable(left: Path, place: Path) -> set[str]:
    """Of a folder that left its place for another one, the names that were generated."""
    return {MANIFEST, *(_listed(place) or ()), *_ours_among(_listed(left) or (), left)}


def _read(path: Path) -> str | None:
    """The text of a file; None if there is none. Bytes that are no text can't be ours."""
    label = f"-o: {shorten(str(path))}"
    data = read_if_there(path, label=label, limit=MAX_GENERATED_BYTES, kind="generated file")
    return None if data is None else data.decode(errors="replace")


class _Busy(SpecError):
    """Another run holds the folder: it is in use, whoever created it."""


@contextlib.contextmanager
def _made(out: Path) -> Iterator[None]:
    """Create the folder; on failure remove again what was created."""
    missing = []
    place = out
    while not place.exists() and place != place.parent:
        missing.append(place)
        place = place.parent
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except _Busy:
        raise
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder for one run, and say whether that is sure; the lock goes with the process, so none is stale."""
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _Busy(f"-o: another run is writing to {shorten(str(folder))}; wait until it has ended") from None
        yield True
    finally:
        os.close(handle)
