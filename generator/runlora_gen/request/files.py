"""Files that others wrote: looked at before they are opened, and read up to a limit."""

from __future__ import annotations

import errno
import os
import stat

from .errors import SpecError, reason

Name = str | os.PathLike[str]
#: What says that there is no such file. ValueError: no file's name holds a NUL or a lone surrogate.
_MISSING = (FileNotFoundError, NotADirectoryError, ValueError)


def read_text(path: Name, *, label: str, limit: int, kind: str, encoding: str = "utf-8") -> str:
    """The text of a file that must be there; arguments as of ``read_if_there``.

    Raises:
        SpecError: it is missing, can't be read, or is no text.
    """
    data = read_if_there(path, label=label, limit=limit, kind=kind)
    if data is None:
        raise SpecError(f"{label}: cannot be read: {os.strerror(errno.ENOENT)}")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise SpecError(f"{label}: not UTF-8 text (byte {error.start})") from None


def read_if_there(path: Name, *, label: str, limit: int, kind: str) -> bytes | None:
    """The bytes of a regular file, or of one that a link leads to; None if there is none.

    Args:
        path: the file.
        label: what errors call it.
        limit: the most bytes that it may have.
        kind: what it should be, for errors: "config".

    Raises:
        SpecError: it is no regular file, too large, or can't be read.
    """
    data = b""
    try:
        # Asked before opening: opening a FIFO waits for a writer, and a device may have no end.
        regular = stat.S_ISREG(os.stat(path).st_mode)
        if regular:
            with open(path, "rb") as stream:
                data = stream.read(limit + 1)  # whatever size it states: files in /proc state none
    except _MISSING:
        return None
    except OSError as error:
        raise SpecError(f"{label}: cannot be read: {reason(error)}") from None
    if not regular:
        raise SpecError(f"{label}: not a regular file")
    if len(data) > limit:
        raise SpecError(f"{label}: larger than {limit} bytes, which no {kind} is")
    return data


def is_plain(path: Name) -> bool | None:
    """Whether a name is a regular file itself and no link to one; None if there is nothing of that name.

    Raises:
        OSError: nobody can tell.
    """
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except _MISSING:
        return None
