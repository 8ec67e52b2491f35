"""Templates are compiled once a user, and nothing depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jinja2
import pytest
from runlora_gen.emit import render
from runlora_gen.emit.render import Header


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the templates that are compiled."""
    names: list[str] = []
    real = jinja2.Environment._compile  # of what a cache holds the code, nothing is compiled

    def spied(environment: jinja2.Environment, source: str, filename: str) -> object:
        names.append(Path(filename).name)
        return real(environment, source, filename)

    monkeypatch.setattr(jinja2.Environment, "_compile", spied)
    yield names
    render._environment.cache_clear()


def text(place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a new process of a user whose cache is there renders."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    render._environment.cache_clear()
    return render.render("copies.py.jinja", {"header": Header("made so", "abc")})


def test_they_are_compiled_once(tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = text(tmp_path, monkeypatch)
    assert "copies.py.jinja" in compiled and "def " in first
    compiled.clear()
    assert text(tmp_path, monkeypatch) == first and compiled == []
    for file in (tmp_path / "runlora_gen" / "templates").iterdir():
        file.write_bytes(file.read_bytes()[:-20])
    assert text(tmp_path, monkeypatch) == first and "copies.py.jinja" in compiled


def test_a_template_that_changed_is_compiled_anew(
    tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "templates"
    folder.mkdir()
    monkeypatch.setattr(render, "_folders", lambda: {"": folder})
    for word in ("one", "two"):
        (folder / "copies.py.jinja").write_text(word, encoding="utf-8")
        assert text(tmp_path, monkeypatch) == word
    assert compiled == ["copies.py.jinja"] * 2


def test_without_a_place_for_them_they_are_compiled_each_time(
    tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "file"
    place.write_text("", encoding="utf-8")
    first = text(place, monkeypatch)
    assert text(place, monkeypatch) == first and compiled.count("copies.py.jinja") == 2

    def nowhere() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(render, "own_folder", nowhere)
    assert text(tmp_path, monkeypatch) == first
    monkeypatch.undo()
    monkeypatch.setattr(
        jinja2.FileSystemBytecodeCache, "dump_bytecode", lambda *_: (_ for _ in ()).throw(OSError("no space"))
    )
    assert text(tmp_path / "new", monkeypatch) == first
