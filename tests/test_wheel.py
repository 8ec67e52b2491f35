"""The wheel: what is in it, and that it generates the same bytes outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import runlora_gen

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "generator" / "runlora_gen"

#: Finds the dependencies, but not the editable install: site is off, so no .pth file is read.
INSTALLED = """
import sys
sys.path[:0] = [{wheel!r}, {dependencies!r}]
import runlora_gen
assert runlora_gen.__file__.startswith({wheel!r}), runlora_gen.__file__
assert not any({root!r} in path for path in sys.path), sys.path
from runlora_gen.emit.render import template_folder
assert str(template_folder()).startswith({wheel!r}), template_folder()
sys.argv[0] = "runlora-gen"
from runlora_gen.cli import run
run()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; build_wheel({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as an installer lays it out: a pure wheel is a folder for sys.path."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def from_wheel(unpacked: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    dependencies = sysconfig.get_path("purelib")
    code = INSTALLED.format(wheel=str(unpacked), dependencies=dependencies, root=str(ROOT / "generator"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-I", "-S", "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        package = {name: archive.read(name) for name in names if name.startswith("runlora_gen/")}
    files = [path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in files} >= {".py", ".toml", ".json"}
    expected = {f"runlora_gen/{path.relative_to(SOURCE).as_posix()}": path.read_bytes() for path in files}
    folder = ROOT / "templates"
    templates = {
        f"runlora_gen/templates/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert len(templates) >= 4
    assert package == {**expected, **templates}
    for name in ("emit/manifest.schema.json", "emit/explain.schema.json", "request/architectures/llama-13b.toml"):
        assert f"runlora_gen/{name}" in package


def test_metadata(wheel: Path) -> None:
    info = f"runlora_gen-{runlora_gen.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist() if name.startswith(info)}
        others = {name for name in archive.namelist() if not name.startswith((info, "runlora_gen/"))}
    assert not others  # no tests, tools or generated code at the top level
    entry_points = texts[f"{info}/entry_points.txt"].split()
    assert entry_points == ["[console_scripts]", "runlora-gen", "=", "runlora_gen.cli:run"]
    for name in ("LICENSE", "LICENSE-OUTPUT"):
        assert texts[f"{info}/licenses/{name}"] == (ROOT / name).read_text()
    metadata = texts[f"{info}/METADATA"].splitlines()
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Python: >=3.11" in metadata
    required = [line.split()[1] for line in metadata if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert sorted(name.split(">")[0] for name in required) == ["black", "click", "jinja2", "rich"]


@pytest.mark.parametrize(
    "options",
    [
        ("--arch", "llama-9m", "--rank", "4", "--target-modules", "q_proj", "--launch", "graph", "--tokens", "65536"),
        ("--arch", "gpt2", "--rank", "4", "--target-modules", "c_attn", "--train", "b", "--no-kernels"),
    ],
    ids=["with kernels", "without"],
)
def test_generates_what_the_checkout_generates(
    unpacked: Path, run, tree: Callable, tmp_path: Path, options: tuple[str, ...]
) -> None:
    (tmp_path / "empty").mkdir()
    done = from_wheel(unpacked, *options, "--line-length", "120", "-o", "out", cwd=tmp_path / "empty")
    assert (done.returncode, done.stderr) == (0, "")
    run(*options, "--line-length", "120", "-o", tmp_path / "checkout").ok()
    made = tree(tmp_path / "empty" / "out")
    assert made == tree(tmp_path / "checkout") and len(made) >= 6
    (module,) = (text for name, text in made.items() if "/linear_" in name)
    assert (b"triton.jit" in module) == ("--no-kernels" not in options)


def test_an_unchanged_run_chooses_nothing(unpacked: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    """Its version says what it is: nothing of the search is needed, nor black."""
    first, again = (from_wheel(unpacked, *small, "-o", "out", "-q", cwd=tmp_path) for _ in range(2))
    assert (first.returncode, again.returncode) == (0, 0)
    manifest = (tmp_path / "out" / "llama_9m_r4" / "manifest.json").stat()
    done = from_wheel(unpacked, *small, "-o", "out", cwd=tmp_path)
    assert done.stdout == f"{Path('out') / 'llama_9m_r4'}: 1 modules, up to date\n" and not done.stderr
    assert (tmp_path / "out" / "llama_9m_r4" / "manifest.json").stat() == manifest


def test_the_other_commands_work(unpacked: Path, run, tmp_path: Path) -> None:
    for arguments in (("archs", "--json"), ("explain", "--arch", "vit-base", "--rank", "4", "--json")):
        done = from_wheel(unpacked, *arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == run(*arguments).ok().out
    done = from_wheel(unpacked, "--arch", "lama-13b", "--rank", "8", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
