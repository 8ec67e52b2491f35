"""The main job in real processes: without torch, the same bytes everywhere, nothing written twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runlora_gen.emit.package import OF_KERNELS, OF_MODELS

#: Runs the command with everything beyond the generator's own dependencies refused.
WITHOUT_TORCH = """
import sys
BLOCKED = {"torch", "triton", "numpy", "hypothesis", "pytest", "peft", "transformers"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
try:
    import torch
except ModuleNotFoundError:
    pass
else:
    sys.exit("torch was not blocked")
from runlora_gen.cli import run
run()
"""
OPTIONS = ("--arch", "llama-9m", "--rank", "8", "--tokens", "16,65536", "--dtype", "fp32", "--device", "cpu")
#: So wide that black need not format twice what it changes: templates are formatted so.
WIDE = ("--line-length", "120")


def process(*arguments: str, cwd: Path, code: str | None = None, seed: str = "random") -> subprocess.CompletedProcess:
    start = ["-m", "runlora_gen"] if code is None else ["-c", code]
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    return subprocess.run(
        [sys.executable, *start, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("--arch", "llama-13b", "--rank", "8", "--target-modules", "q_proj", *WIDE, "-o", "out"),
            f"out/llama_13b_r8: 1 modules, wrote {len(OF_MODELS) + len(OF_KERNELS) + 4} files",
        ),
        (("explain", "--arch", "llama-13b", "--rank", "8"), "decides  the device ("),
        (("archs",), "llama-13b"),
    ],
    ids=["generate", "explain", "archs"],
)
def test_works_without_torch(arguments: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    done = process(*arguments, cwd=tmp_path, code=WITHOUT_TORCH)
    assert (done.returncode, done.stderr) == (0, "")
    assert expected in done.stdout


def test_verify_without_torch_says_what_to_install(tmp_path: Path) -> None:
    done = process("verify", ".", cwd=tmp_path, code=WITHOUT_TORCH)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("runlora-gen: error: verify: needs ") and done.stderr.count("\n") == 1
    assert "pip install torch" in done.stderr


def test_second_run_writes_nothing(run, small, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert f"wrote {len(OF_MODELS) + 4} files" in run(*small, "-o", out).ok().out
    before = {path: path.stat() for path in [out, *out.rglob("*")]}
    assert run(*small, "-o", out).ok().out == f"{out / 'llama_9m_r4'}: 1 modules, up to date\n"
    after = {path: path.stat() for path in [out, *out.rglob("*")]}
    assert {p: (s.st_mtime_ns, s.st_ino) for p, s in before.items()} == {
        p: (s.st_mtime_ns, s.st_ino) for p, s in after.items()
    }


def test_only_stale_files_are_written(run, small, fresh: Path) -> None:
    package = fresh / "llama_9m_r4"
    kept = {path: path.stat().st_mtime_ns for path in package.iterdir() if path.name != "__init__.py"}
    init = (package / "__init__.py").read_text()
    (package / "__init__.py").write_text(init + "# edited\n")
    assert "wrote 1 file\n" in run(*small, "-o", fresh).ok().out
    assert (package / "__init__.py").read_text() == init
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_same_bytes_for_every_seed_folder_and_output_path(tmp_path: Path, tree: Callable) -> None:
    places = [("0", "b/deeper", "../elsewhere/é x"), ("4242", "c", str(tmp_path / "absolute"))]
    trees = []
    for seed, folder, out in places:
        cwd = tmp_path / folder
        cwd.mkdir(parents=True)
        done = process(*OPTIONS, "--target-modules", "q_proj,down_proj", *WIDE, "-o", out, cwd=cwd, seed=seed)
        assert (done.returncode, done.stderr) == (0, "")
        trees.append(tree(cwd / out))
    assert trees[0] == trees[1]
    assert len(trees[0]) == len(OF_MODELS) + 6


def test_explain_json_is_the_same_for_every_seed(tmp_path: Path) -> None:
    arguments = ("explain", "--json", "--arch", "gpt2", "--rank", "4", "--target-modules", "c_attn,c_proj")
    texts = {process(*arguments, cwd=tmp_path, seed=seed).stdout for seed in ("0", "7")}
    (text,) = texts
    assert json.loads(text)["arch"] == "gpt2"


def test_output_streams_that_cannot_take_the_text(tmp_path: Path) -> None:
    """ASCII terminals get escapes; a full disk behind stdout gets one line."""
    command = [sys.executable, "-m", "runlora_gen", "explain", "--arch", "llama-9m", "--rank", "4"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"") and rb"\xd7 frozen" in done.stdout
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command[:3], "archs"], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(b"runlora-gen: error: cannot write the output: ") and done.stderr.count(b"\n") == 1
