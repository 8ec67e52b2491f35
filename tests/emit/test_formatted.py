"""What was formatted once is kept for later processes, and nothing depends on it."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import black
import pytest
from runlora_gen.emit import formatted as module
from runlora_gen.emit import style
from runlora_gen.emit.style import Style

SOURCES = ["def f(a, b = 1):\n  return [a, b]\n\n\ndef g():\n  return 'x'\n"]
FORMATTED = ['def f(a, b=1):\n    return [a, b]\n\n\ndef g():\n    return "x"\n']


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "runlora_gen" / "formatted.sqlite"


@pytest.fixture
def by_black(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that black was given."""
    asked: list[str] = []
    real = black.format_str
    monkeypatch.setattr(black, "format_str", lambda source, *, mode: asked.append(source) or real(source, mode=mode))
    return asked


def anew(monkeypatch: pytest.MonkeyPatch, sources: Sequence[str], **options: int) -> list[str]:
    """As another process formats them."""
    monkeypatch.setattr(style, "_FORMATTED", {})
    return Style(**options).format(sources)


def test_another_process_formats_nothing_again(monkeypatch: pytest.MonkeyPatch, by_black: list[str]) -> None:
    assert anew(monkeypatch, SOURCES) == FORMATTED and len(by_black) == 2
    assert anew(monkeypatch, SOURCES) == FORMATTED and len(by_black) == 2
    assert anew(monkeypatch, [SOURCES[0] + "\n\ndef h(): pass\n"])[0].startswith(FORMATTED[0]) and len(by_black) == 3


def test_another_style_or_black_is_another_key(monkeypatch: pytest.MonkeyPatch, by_black: list[str]) -> None:
    anew(monkeypatch, SOURCES)
    anew(monkeypatch, SOURCES, line_length=100)
    assert len(by_black) == 4
    monkeypatch.setattr(style.importlib.metadata, "version", lambda name: f"{name} of another year")
    anew(monkeypatch, SOURCES)
    assert len(by_black) == 6


@pytest.mark.parametrize("content", [b"no database" * 100, b"SQLite format 3\0" + b"\xff" * 2000])
def test_a_broken_file_is_replaced(
    monkeypatch: pytest.MonkeyPatch, by_black: list[str], cache: Path, content: bytes
) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content)
    for _ in range(3):
        assert anew(monkeypatch, SOURCES) == FORMATTED
    assert len(by_black) < 6 and cache.read_bytes() != content


def test_without_a_place_for_it_everything_is_formatted(
    monkeypatch: pytest.MonkeyPatch, by_black: list[str], cache: Path
) -> None:
    cache.parent.write_text("no folder")
    assert anew(monkeypatch, SOURCES) == anew(monkeypatch, SOURCES) == FORMATTED and len(by_black) == 4
    assert cache.parent.read_text() == "no folder"


def test_without_a_home_or_sqlite_everything_is_formatted(
    monkeypatch: pytest.MonkeyPatch, by_black: list[str], cache: Path
) -> None:
    monkeypatch.setattr(module, "own_folder", lambda: Path("~nobody-of-this-name").expanduser())
    assert anew(monkeypatch, SOURCES) == FORMATTED
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    assert anew(monkeypatch, SOURCES) == FORMATTED and len(by_black) == 4 and not cache.exists()


def test_another_process_that_holds_it_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, by_black: list[str], cache: Path
) -> None:
    anew(monkeypatch, SOURCES)
    monkeypatch.setattr(module, "_SECONDS_FOR_ANOTHER_PROCESS", 0.01)
    with closing(sqlite3.connect(cache)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert anew(monkeypatch, SOURCES) == FORMATTED and len(by_black) == 4
    assert anew(monkeypatch, SOURCES) == FORMATTED and len(by_black) == 4


def test_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 3)
    keys = [(str(number),) for number in range(5)]
    for key in keys:
        module.remember({key: f"text of {key}"})
    assert list(module.formatted_before(keys)) == keys[2:]
