"""Reuse of an earlier run's files: only where nobody touched them and the same text would be formatted."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import black
import pytest
from runlora_gen.emit.package import OF_MODELS, Package, build_package
from runlora_gen.emit.publish import publish
from runlora_gen.emit.style import Style
from runlora_gen.request.architecture import load_architecture
from runlora_gen.request.workload import Workload

ARCHITECTURE = load_architecture("llama-9m").restricted(["q_proj"])
WORKLOAD = Workload(adapter_dtype="bf16", kernels=False)
MODULE = "linear_128x128_r4.py"
FORMATTED = len(OF_MODELS) + 2  # and the module and the test


def build(out: Path, workload: Workload = WORKLOAD, **options: Any) -> Package:
    return build_package(ARCHITECTURE, 4, workload, out=out, **options)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    publish(tmp_path, [build(tmp_path)])
    return tmp_path


@pytest.fixture
def formatted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that were formatted."""
    texts: list[str] = []
    real = Style.format
    monkeypatch.setattr(Style, "format", lambda self, sources: texts.extend(sources) or real(self, sources))
    return texts


def test_nothing_is_formatted_twice(out: Path, formatted: list[str]) -> None:
    fresh = build(out, reuse=False)
    assert len(formatted) == FORMATTED
    again = build(out)
    assert len(formatted) == FORMATTED and again.files == fresh.files


def test_what_was_edited_is_written_anew(out: Path, formatted: list[str]) -> None:
    module = out / "llama_9m_r4" / MODULE
    good = module.read_text()
    module.write_text(good.replace("\nRANK = 4\n", "\nRANK = 5\n"))
    assert module.read_text() != good
    assert build(out).files[MODULE] == good
    assert len(formatted) == 1


def test_another_workload_reuses_only_what_is_the_same(out: Path) -> None:
    other = Workload(adapter_dtype="bf16", kernels=False, criterion="memory")
    assert build(out, other).files == build(out, other, reuse=False).files


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that would have been formatted; here they stay as they are."""
    texts: list[str] = []
    monkeypatch.setattr(Style, "format", lambda self, sources: texts.extend(sources) or sources)
    return texts


def test_another_line_length_reuses_nothing(out: Path, asked: list[str]) -> None:
    build(out)
    assert not asked
    build(out, line_length=120)
    assert len(asked) == FORMATTED


@pytest.mark.parametrize(
    "text",
    [
        "line-length = 100",
        "skip-string-normalization = true",
        "skip-magic-trailing-comma = true",
        'target-version = ["py313"]',
        "preview = true",
    ],
)
def test_another_style_reuses_nothing(out: Path, asked: list[str], text: str) -> None:
    (out / "pyproject.toml").write_text(f"[tool.black]\n{text}\n")
    build(out)
    assert len(asked) == FORMATTED


def new_black(monkeypatch: pytest.MonkeyPatch, version: str, *, ends_in: str) -> None:
    """Another version of black, by what it is called and by what it does."""
    real_version, real_format = importlib.metadata.version, black.format_str
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "black" else real_version(name))
    monkeypatch.setattr(black, "format_str", lambda source, *, mode: real_format(source, mode=mode) + ends_in)


def test_another_black_reuses_nothing(run, small, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else generating would leave what --check, which trusts nothing, finds stale for ever."""
    before = {path.name: path.read_text() for path in (fresh / "llama_9m_r4").iterdir()}
    new_black(monkeypatch, "99.1", ends_in="# formatted by another black\n")
    assert run(*small, "-o", fresh, "--check", "-q").code == 1
    run(*small, "-o", fresh).ok()
    after = {path.name: path.read_text() for path in (fresh / "llama_9m_r4").iterdir()}
    assert all(after[name] != text for name, text in before.items() if text)
    assert run(*small, "-o", fresh, "--check").ok().out == ""
    assert "up to date" in run(*small, "-o", fresh).ok().out


def test_a_black_that_formats_alike_changes_the_manifest_alone(
    run, small, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_black(monkeypatch, "99.2", ends_in="")
    assert "wrote 1 file\n" in run(*small, "-o", fresh).ok().out
    assert run(*small, "-o", fresh, "--check").ok().out == ""


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "null", '{"generator": "runlora-gen"}', '{"rendered": 1}'])
def test_a_broken_manifest_is_nothing_to_reuse(out: Path, text: str) -> None:
    (out / "llama_9m_r4" / "manifest.json").write_text(text)
    assert build(out).files == build(out, reuse=False).files


@pytest.mark.parametrize("name", ["manifest.json", MODULE])
def test_what_is_no_file_is_nothing_to_reuse(out: Path, name: str, odd: Callable[[Path], None]) -> None:
    fresh = build(out, reuse=False).files
    (out / "llama_9m_r4" / name).unlink()
    odd(out / "llama_9m_r4" / name)
    assert build(out).files == fresh


@pytest.mark.parametrize("name", ["manifest.json", MODULE])
def test_what_is_huge_is_nothing_to_reuse(out: Path, name: str) -> None:
    fresh = build(out, reuse=False).files
    os.truncate(out / "llama_9m_r4" / name, 2**40)  # of which the disk holds nothing
    assert build(out).files == fresh


def test_an_unchanged_run_does_not_import_black(fresh: Path, small: tuple[str, ...]) -> None:
    manifest = json.loads((fresh / "llama_9m_r4" / "manifest.json").read_text())
    assert set(manifest["rendered"]) == set(manifest["files"]) - {"py.typed"}
    arguments = ["runlora-gen", *small, "-o", str(fresh)]
    code = f"import sys; sys.modules['black'] = None; sys.argv = {arguments!r}; import runlora_gen.__main__"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "up to date" in done.stdout, done.stderr
