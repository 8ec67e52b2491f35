"""How the files of a package stand to each other."""

from __future__ import annotations

from .errors import SpecError, shorten

#: Every module has all that it needs: copy one file, and it works.
STANDALONE = "standalone"
#: What the modules share stands once in the package: they are smaller, and their layers have one base class.
FOLDER = "folder"
LAYOUTS = (STANDALONE, FOLDER)


def parse_layout(option: str, value: object) -> str:
    """One of ``LAYOUTS``; ``option``: what errors call it.

    Raises:
        SpecError: anything else.
    """
    if value not in LAYOUTS:
        raise SpecError(f"{option}: {shorten(value)} is not allowed; give one of {', '.join(LAYOUTS)}")
    return str(value)
