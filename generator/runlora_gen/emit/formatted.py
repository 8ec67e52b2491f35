"""Formatted parts of texts, kept in the user's cache: a package has most of its functions in common with the last one.

Formatting is most of what a package takes. Without the file, or where it can't be used, everything is formatted anew.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from ..request.cache import own_folder

if TYPE_CHECKING:
    from sqlite3 import Connection

#: What a formatted part follows from: its text as rendered, and all else that decides its form.
Key = tuple[str, ...]
Result = TypeVar("Result")
_FILE = "formatted.sqlite"
#: The most parts that are kept, the newest: those of some 70 packages.
_MOST = 20_000
_SECONDS_FOR_ANOTHER_PROCESS = 5.0
_TABLE = "CREATE TABLE IF NOT EXISTS parts (id INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, text TEXT NOT NULL)"


def formatted_before(keys: Iterable[Key]) -> dict[Key, str]:
    """Those parts of these that were formatted before, in any process of this user."""

    def find(parts: Connection) -> dict[Key, str]:
        query = "SELECT text FROM parts WHERE key = ?"
        rows = ((key, parts.execute(query, (_digest(key),)).fetchone()) for key in keys)
        return {key: row[0] for key, row in rows if row is not None}

    return _within_file(find, {})


def remember(formatted: Mapping[Key, str]) -> None:
    """Keep these for later processes too."""

    def add(parts: Connection) -> None:
        rows = [(_digest(key), text) for key, text in formatted.items()]
        parts.executemany("INSERT OR IGNORE INTO parts (key, text) VALUES (?, ?)", rows)
        parts.execute("DELETE FROM parts WHERE id <= (SELECT MAX(id) FROM parts) - ?", (_MOST,))

    _within_file(add, None)


def _digest(key: Key) -> str:
    return hashlib.sha256("\0".join(key).encode()).hexdigest()


def _within_file(act: Callable[[Connection], Result], otherwise: Result) -> Result:
    try:
        import sqlite3
    except ImportError:  # a Python that was built without it
        return otherwise
    try:
        folder = own_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(folder / _FILE, timeout=_SECONDS_FOR_ANOTHER_PROCESS)) as parts, parts:
            parts.execute(_TABLE)
            return act(parts)
    except (OSError, RuntimeError, sqlite3.OperationalError):
        pass  # no home, no right, no space, another process that holds it
    except sqlite3.DatabaseError:
        with contextlib.suppress(OSError):  # broken, or none of ours: the next one begins anew
            (folder / _FILE).unlink()
    return otherwise
