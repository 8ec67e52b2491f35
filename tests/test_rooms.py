"""The rooms of the generator, and the one direction of the imports between them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import runlora_gen

ROOT = Path(runlora_gen.__file__).parent
#: Each may import those after it.
CHAIN = ("cli", "measure", "emit", "forecast", "search", "cost", "kernels", "algebra")
#: What stands beside them.
BESIDE = {
    "request": set[str](),
    "from_model": {"request"},
    "generation": {"request", "from_model", "emit", "search", "cost"},
    "into_model": {"request", "from_model", "generation", "emit"},
}
ALLOWED = {
    **{room: {*CHAIN[place + 1 :], "request"} for place, room in enumerate(CHAIN)},
    **BESIDE,
}
#: The command line is above all of them.
ALLOWED["cli"] |= {"generation", "from_model"}


def imported(path: Path) -> Iterator[str]:
    """The rooms, or modules of the top, from which a file imports, also within functions and for types."""
    parts = path.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = parts[: len(parts) - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((*above, *name.split("."))[0] for name in names)


def test_every_room_is_known() -> None:
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} == set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_go_one_way(room: str) -> None:
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for other in set(imported(path)) - {room, "__version__"}:
            assert other in ALLOWED[room], f"{path.relative_to(ROOT)} imports {other}"
