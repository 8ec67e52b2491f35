"""Folders that are replaced whole: whoever looks finds the old one or the new one, also after a kill at any moment.

The new folder is made on a stage, a folder beside its place, and complete there: what is kept of the old one is linked
into it. Then both are exchanged in one step. Where the system has no such step it takes two, the old folder away and
the new one into place; after a kill between them the next run puts the old one back. A stage holds

- ``runlora-gen.stage``, made first and removed last: a stage without it is empty, or none of ours;
- ``coming/NAME``, a new folder that is being filled;
- ``going/NAME``, a whole folder without a place: the new one just before the exchange, the old one after it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from ..request.errors import SpecError, reason, shorten

_PREFIX = ".runlora-gen-"
_NAME = re.compile(re.escape(_PREFIX) + "[a-z0-9_]{8}")
_MARK, _COMING, _GOING, _DONE = "runlora-gen.stage", "coming", "going", "done"
#: By which a system says that it has no such call, or not here.
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
#: By which it refuses a hard link: none here, none to another user's file, not one more.
_NO_LINK = {*_UNSUPPORTED, errno.EPERM, errno.EMLINK}

#: The names in a folder that left its place, given both, that need not be brought back: what was generated.
Disposable = Callable[[Path, Path], Collection[str]]


class Stage:
    """New folders on their way to their places; ``open_stage`` makes one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / _MARK).touch()
        for name in (_COMING, _GOING):
            (folder / name).mkdir()
        sync(folder)
        self._one_step = False
        with contextlib.suppress(OSError):  # tried on two empty folders of our own: what refuses that, refuses all
            self._one_step = exchange(folder / _COMING, folder / _GOING)
        self._inodes: dict[str, int] = {}  # of the new folders, by their names

    def _paths(self, name: str) -> tuple[Path, Path, Path]:
        """Where a folder belongs, where it is filled, where it waits without a place."""
        return self._folder.parent / name, self._folder / _COMING / name, self._folder / _GOING / name

    def prepare(self, name: str, changes: Mapping[str, str | None]) -> None:
        """Make a new folder: the one in its place with these files, by name, written or (None) left out.

        Raises:
            OSError: there is no room, or no permission.
            SpecError: something that is in the old folder can't be kept.
        """
        place, coming, _ = self._paths(name)
        coming.mkdir()
        self._inodes[name] = coming.stat().st_ino
        if place.is_dir():
            _make_alike(place, coming)
            for entry in _entries(place):
                if entry.name not in changes:
                    try:
                        _link(entry, coming / entry.name)
                    except OSError as error:
                        raise SpecError(
                            f"-o: cannot keep {shorten(entry.path)}: {reason(error)}; move it away"
                        ) from None
        for file, text in changes.items():
            if text is not None:
                with (coming / file).open("x", encoding="utf-8", newline="") as stream:
                    stream.write(text)
                    stream.flush()
                    os.fsync(stream.fileno())
        sync(coming)

    def put_in_place(self) -> None:
        """Replace each folder by the prepared one.

        Raises:
            OSError: they are there, but might not survive a power failure.
            SpecError: one can't be moved.
        """
        for name in self._inodes:
            place, coming, going = self._paths(name)
            try:
                if not place.exists():
                    os.rename(coming, place)
                elif self._one_step:
                    os.rename(coming, going)
                    exchange(going, place)
                else:
                    os.rename(place, going)
                    os.rename(coming, place)
            except OSError as error:
                raise SpecError(
                    f"-o: cannot replace {shorten(str(place))}: {reason(error)}; move it away or give another folder"
                ) from None
        sync(self._folder.parent)

    def put_back(self) -> None:
        """Undo what was done, by looking: an interrupt may have come after any step."""
        for name in reversed(self._inodes):
            place, coming, going = self._paths(name)
            with contextlib.suppress(OSError):
                done = place.exists() and place.stat().st_ino == self._inodes[name]
                if done and going.exists() and self._one_step:
                    exchange(going, place)
                    continue
                if done:
                    os.rename(place, coming)
                if going.exists() and not place.exists():
                    os.rename(going, place)


@contextlib.contextmanager
def open_stage(parent: Path, disposable: Disposable) -> Iterator[Stage]:
    """A stage in a folder; on an exception everything there is as it was."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    try:
        stage = Stage(folder)
        try:
            yield stage
        except BaseException:
            stage.put_back()
            raise
    finally:
        _clear(folder, disposable)


def clear_stages(parent: Path, disposable: Disposable) -> None:
    """Clear away the stages of runs that were killed; only for a run that knows that it is alone here."""
    for folder in parent.glob(f"{_PREFIX}*"):
        if _NAME.fullmatch(folder.name) and _is_folder(folder):
            if (folder / _MARK).exists():
                _clear(folder, disposable)
            else:  # killed before it made the mark, or after it removed it: empty
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _clear(stage: Path, disposable: Disposable) -> None:
    """Bring back what has no place but the stage, then remove it; what can't be cleared now is left to the next run."""
    with contextlib.suppress(OSError, SpecError):
        going, done = stage / _GOING, stage / _DONE
        if going.exists():
            for folder in going.iterdir():
                place = stage.parent / folder.name
                if place.exists():
                    names = set(os.listdir(folder)) - set(disposable(folder, place))
                    _bring_back(folder, place, names)
                else:
                    os.rename(folder, place)
            os.rename(going, done)  # half removed it must not pass for whole
        for entry in stage.iterdir():
            if entry.name != _MARK:
                _remove(entry)
        (stage / _MARK).unlink(missing_ok=True)
        stage.rmdir()


def _bring_back(left: Path, place: Path, names: Iterable[str]) -> None:
    """Move to a folder what its links do not hold: what came after they were made, and what could not be linked."""
    pairs = [(left / name, place / name) for name in names]
    for source, target in pairs:
        if not os.path.lexists(target):
            os.rename(source, target)
        elif _is_folder(source) and _is_folder(target):
            pairs += [(path, target / path.name) for path in source.iterdir()]
        else:
            came, there = source.lstat(), target.lstat()
            # Written anew by an editor meanwhile, or copied because it could not be linked.
            if not os.path.samestat(came, there) and came.st_mtime_ns >= there.st_mtime_ns:
                os.replace(source, target)


def _link(entry: os.DirEntry[str], target: Path) -> None:
    """Make the same thing at another place: a folder is made anew, everything else is linked."""
    pairs = [(entry, target)]
    folders: list[tuple[Path, Path]] = []
    for source, copy in pairs:
        if source.is_dir(follow_symlinks=False):
            _check_removable(Path(source.path))
            copy.mkdir()
            folders.append((Path(source.path), copy))
            pairs += [(inner, copy / inner.name) for inner in _entries(Path(source.path))]
        else:
            _link_file(source, copy)
    for original, copy in reversed(folders):  # the innermost first: to write into a folder changes its time
        _make_alike(original, copy)
        sync(copy)


def _link_file(source: os.DirEntry[str], copy: Path) -> None:
    try:
        os.link(source.path, copy, follow_symlinks=False)
        return
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in _NO_LINK:  # EXDEV among others: what is mounted here is not ours to move
            raise
    if source.is_file(follow_symlinks=False):
        shutil.copy2(source.path, copy)
        sync(copy)
    elif source.is_symlink():
        shutil.copy2(source.path, copy, follow_symlinks=False)
    # A FIFO or the like is moved when the folders have changed places.


def _check_removable(folder: Path) -> None:
    """Refuse a folder that could be made anew, but not be removed afterwards.

    Raises:
        OSError: another file system is mounted there, or the folder is another user's and can't be written.
    """
    status = folder.stat()
    if status.st_dev != folder.parent.stat().st_dev:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid() and not os.access(folder, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def _make_alike(original: Path, copy: Path) -> None:
    """Give a folder the owner, mode, times and attributes of another one."""
    status = original.stat()
    if hasattr(os, "chown"):
        with contextlib.suppress(PermissionError):
            os.chown(copy, status.st_uid, status.st_gid)
    shutil.copystat(original, copy)


def _remove(path: Path) -> None:
    """Remove a tree, read-only folders too."""
    if not _is_folder(path):
        path.unlink()
        return
    folders = [path]
    for folder in folders:
        with contextlib.suppress(PermissionError):  # of a user who lets us write
            folder.chmod(stat.S_IRWXU)
        for entry in _entries(folder):
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            else:
                os.unlink(entry.path)
    for folder in reversed(folders):
        folder.rmdir()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def sync(folder: Path) -> None:
    """Make the entries of a folder survive a power failure, where the system can."""
    if os.name == "nt":  # no folder can be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(handle)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two paths in one step; False where the system has none.

    Raises:
        OSError: it has, and refuses.
    """
    call = _renameat2()
    if call is None:
        return False
    number = call(os.fsencode(first), os.fsencode(second))
    if number in _UNSUPPORTED:
        return False
    if number:
        raise OSError(number, os.strerror(number), os.fspath(first), None, os.fspath(second))
    return True


@functools.cache
def _renameat2() -> Callable[[bytes, bytes], int] | None:
    """Linux's call, as one that returns an error's number; None on other systems and with old C libraries."""
    import ctypes  # here, because an unchanged package needs no exchange

    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, TypeError, AttributeError):  # TypeError: of Windows
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    at_working_folder, rename_exchange = -100, 2

    def error_of(first: bytes, second: bytes) -> int:
        failed = call(at_working_folder, first, at_working_folder, second, rename_exchange)
        return ctypes.get_errno() if failed else 0

    return error_of
