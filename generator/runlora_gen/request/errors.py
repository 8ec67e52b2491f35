"""The one error of the door: what is wrong with an input, on one line."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence

SHORTEN_LIMIT = 60
#: Characters of a message on the terminal, and of one word in it.
LINE_LIMIT = 500
WORD_LIMIT = 100

_repr = reprlib.Repr()
_repr.maxlevel = 2
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 3
_repr.maxstring = _repr.maxother = 48


class SpecError(ValueError):
    """Bad input: one clear line naming the field, the value and what is allowed."""


def shorten(value: object) -> str:
    """Return a repr that is safe on one terminal line: no control characters, at most 60 long."""
    try:
        text = _repr.repr(value)
    except (ValueError, RecursionError):  # e.g. integers too long for Python to print
        text = f"<{type(value).__name__}>"
    # Only the repr of a foreign object can still hold such characters.
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= SHORTEN_LIMIT else f"{text[: SHORTEN_LIMIT - 3]}..."


def one_line(message: str) -> str:
    """A message for the terminal, whoever wrote it: on one line, printable, not longer than anybody reads."""
    words = (_middle_out(_printable(word), WORD_LIMIT) for word in message.split())
    return _middle_out(" ".join(words), LINE_LIMIT)


def reason(error: OSError) -> str:
    """Why the system refused, without the path."""
    return error.strerror or one_line(str(error))


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _middle_out(text: str, limit: int) -> str:
    """Both ends of what is too long: one names the field, the other says what is allowed."""
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


def nearest(name: str, known: Sequence[str]) -> str:
    """What to say of an unknown name: the name, the nearest known one if there is any, and all that are known."""
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{shorten(name)}{hint} (known: {', '.join(known)})"
