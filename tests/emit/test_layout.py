"""The two layouts on disk: what is in which file, and what is left when one takes the place of the other."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from runlora_gen.emit.render import SHARED
from runlora_gen.generation import read_request
from runlora_gen.request.errors import SpecError

SPEC = ("--arch", "llama-9m", "--rank", "4", "--adapter-dtype", "bf16", "--launch", "graph", "--tokens", "65536")
LAYOUTS = ("standalone", "folder")
#: What modules of linears share on a base that is not quantized.
OF_LINEARS = [name for name in SHARED if name not in ("quantized", "routing")]


@pytest.fixture(scope="module")
def both(run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A package of three modules with kernels, in each layout."""
    out = tmp_path_factory.mktemp("layouts")
    for layout in LAYOUTS:
        run(*SPEC, "--layout", layout, "-o", out / layout).ok()
    return {layout: out / layout / "llama_9m_r4" for layout in LAYOUTS}


def definitions(path: Path) -> list[str]:
    """Classes and functions of a file, those within others and conditions too."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def test_what_is_shared_stands_once(both: dict[str, Path]) -> None:
    """All that the modules define stands in the folder, too; what is the same for all of them, once."""
    standalone, folder = both.values()
    names = sorted(path.name for path in standalone.glob("linear_*.py"))
    assert len(names) == 3 and names == sorted(path.name for path in folder.glob("linear_*.py"))
    shared = [name for file in OF_LINEARS for name in definitions(folder / f"{file}.py")]
    for name in names:
        own = definitions(folder / name)
        alone = definitions(standalone / name)
        assert set(alone) <= {*own, *shared}
        assert set(own) < set(alone) and not {"_guarded", "_mm_as", "_check_arguments", "_operator"} & set(own)
    assert {"_Launch", "_operator", "_fused_gemm_kernel"} <= set(definitions(folder / "kernels.py"))


def test_it_is_smaller(both: dict[str, Path]) -> None:
    lines = {
        layout: sum(len(path.read_text(encoding="utf-8").splitlines()) for path in place.glob("*.py"))
        for layout, place in both.items()
    }
    saved = lines["standalone"] - lines["folder"]
    files = [f"{name}.py" for name in OF_LINEARS]
    shared = sum(len((both["folder"] / file).read_text(encoding="utf-8").splitlines()) for file in files)
    assert saved > 1.5 * shared  # of three modules two are spared it, but for imports and a small class each


def test_the_default_is_standalone(run, both: dict[str, Path], tree: Callable, tmp_path: Path) -> None:
    run(*SPEC, "-o", tmp_path).ok()
    assert tree(tmp_path / "llama_9m_r4") == tree(both["standalone"])
    assert "--layout" not in json.loads((both["standalone"] / "manifest.json").read_text())["command"]


@pytest.mark.parametrize("first", LAYOUTS)
def test_one_takes_the_place_of_the_other(
    run, both: dict[str, Path], tree: Callable, tmp_path: Path, first: str
) -> None:
    """No stale file is left, foreign ones stay, and a check sees the difference."""
    (second,) = set(LAYOUTS) - {first}
    run(*SPEC, "--layout", first, "-o", tmp_path).ok()
    package = tmp_path / "llama_9m_r4"
    (package / "mine.txt").write_text("mine")
    assert run(*SPEC, "--layout", second, "-o", tmp_path, "--check").code == 1
    run(*SPEC, "--layout", second, "-o", tmp_path).ok()
    assert tree(package) == {**tree(both[second]), "mine.txt": b"mine"}
    run(*SPEC, "--layout", second, "-o", tmp_path, "--check").ok()


def test_a_file_of_the_folder_that_was_touched_is_stale(run, both: dict[str, Path], small, tmp_path: Path) -> None:
    run(*small, "--layout", "folder", "-o", tmp_path).ok()
    path = tmp_path / "llama_9m_r4" / "base.py"
    path.write_text(path.read_text().replace("_FEW = 128", "_FEW = 64"))
    outcome = run(*small, "--layout", "folder", "-o", tmp_path, "--check")
    assert outcome.code == 1 and "-_FEW = 64" in outcome.out and "+_FEW = 128" in outcome.out
    path.unlink()
    run(*small, "--layout", "folder", "-o", tmp_path).ok()
    run(*small, "--layout", "folder", "-o", tmp_path, "--check").ok()


def test_other_layouts_are_refused(run, small, tmp_path: Path) -> None:
    message = run(*small, "--layout", "flat", "-o", tmp_path).error()
    assert "--layout" in message and "flat" in message and "standalone" in message and "folder" in message
    assert not list(tmp_path.iterdir())
    for value in ("flat", None, 7, ["folder"]):
        with pytest.raises(SpecError, match=r"^layout: .* is not allowed; give one of standalone, folder$"):
            read_request("llama-9m", rank=4, layout=value)
