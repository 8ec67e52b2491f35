"""Reuse of an earlier run's files: only where nobody touched them and the same text would be formatted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runlora_gen.emit import package as package_module
from runlora_gen.emit.package import build_package
from runlora_gen.emit.publish import publish
from runlora_gen.spec.architecture import load_architecture
from runlora_gen.spec.workload import Workload

ARCHITECTURE = load_architecture("llama-9m").restricted(["q_proj"])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    publish(tmp_path, [build_package(ARCHITECTURE, 4, Workload())])
    return tmp_path


@pytest.fixture
def formatted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that were formatted."""
    texts: list[str] = []
    real = package_module.format_python
    monkeypatch.setattr(package_module, "format_python", lambda source: texts.append(source) or real(source))
    return texts


def test_nothing_is_formatted_twice(out: Path, formatted: list[str]) -> None:
    fresh = build_package(ARCHITECTURE, 4, Workload())
    assert len(formatted) == 3
    again = build_package(ARCHITECTURE, 4, Workload(), former=out)
    assert len(formatted) == 3 and again.files == fresh.files


def test_what_was_edited_is_written_anew(out: Path, formatted: list[str]) -> None:
    module = out / "llama_9m_r4" / "linear_128x128_r4.py"
    good = module.read_text()
    module.write_text(good.replace("(P.t() @ X)", "(-P.t() @ X)"))
    assert build_package(ARCHITECTURE, 4, Workload(), former=out).files[module.name] == good
    assert len(formatted) == 1


def test_another_workload_reuses_only_what_is_the_same(out: Path) -> None:
    other = Workload(criterion="memory")
    assert build_package(ARCHITECTURE, 4, other, former=out).files == build_package(ARCHITECTURE, 4, other).files


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "null", '{"generator": "runlora-gen"}', '{"rendered": 1}'])
def test_a_broken_manifest_is_nothing_to_reuse(out: Path, text: str) -> None:
    (out / "llama_9m_r4" / "manifest.json").write_text(text)
    assert (
        build_package(ARCHITECTURE, 4, Workload(), former=out).files == build_package(ARCHITECTURE, 4, Workload()).files
    )


@pytest.mark.parametrize("name", ["manifest.json", "linear_128x128_r4.py"])
def test_what_is_no_file_is_nothing_to_reuse(out: Path, name: str, odd: Callable[[Path], None]) -> None:
    fresh = build_package(ARCHITECTURE, 4, Workload()).files
    (out / "llama_9m_r4" / name).unlink()
    odd(out / "llama_9m_r4" / name)
    assert build_package(ARCHITECTURE, 4, Workload(), former=out).files == fresh


@pytest.mark.parametrize("name", ["manifest.json", "linear_128x128_r4.py"])
def test_what_is_huge_is_nothing_to_reuse(out: Path, name: str) -> None:
    fresh = build_package(ARCHITECTURE, 4, Workload()).files
    os.truncate(out / "llama_9m_r4" / name, 2**40)  # of which the disk holds nothing
    assert build_package(ARCHITECTURE, 4, Workload(), former=out).files == fresh


def test_an_unchanged_run_does_not_import_black(out: Path) -> None:
    manifest = json.loads((out / "llama_9m_r4" / "manifest.json").read_text())
    assert set(manifest["rendered"]) == set(manifest["files"]) - {"py.typed"}
    options = ["--arch", "llama-9m", "--rank", "4", "--target-modules", "q_proj", "-o", str(out)]
    arguments = ["runlora-gen", *options]
    code = f"import sys; sys.modules['black'] = None; sys.argv = {arguments!r}; import runlora_gen.__main__"
    subprocess.run([sys.executable, "-m", "runlora_gen", *options], check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "up to date" in done.stdout, done.stderr
