"""The emitted text: valid, stable under black, nothing of the machine in it, and reproducible from its own header."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import black
import pytest
from runlora_gen.emit.render import LINE_LENGTH, MARKER, OUTPUT_LICENCE, template_folder

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
SPECS = {
    "plain": ("--arch", "llama-9m"),
    "ranges": ("--arch", "llama-9m", "--tokens", "16,65536", "--dtype", "fp32", "--device", "cpu"),
    "frozen": ("--arch", "gpt2", "--train", "b", "--no-input-grad", "--criterion", "memory", "--dtype", "fp16"),
    "lossy": ("--arch", "llama-9m", "--allow-lossy-merge", "--max-saved-bytes", "99999999", "--train", "a"),
    "every variant": ("--arch", "llama-9m", "--target-modules", "q_proj", "--all-variants"),
    "config": ("--arch", "my.model/config.json", "--device", "a100"),
    "model type": ("--arch", "llama-3-8b", "--model-type", "mistral", "--target-modules", "v_proj, q_proj"),
}
EVERYWHERE = {"__future__", "collections.abc", "typing"}


@pytest.fixture(scope="module", params=SPECS)
def made(request: pytest.FixtureRequest, run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated package; the folder above it is where it was generated."""
    place = tmp_path_factory.mktemp("text")
    (place / "my.model").mkdir()
    (place / "my.model" / "config.json").write_text(json.dumps(CONFIG))
    former = Path.cwd()
    os.chdir(place)
    try:
        run(*SPECS[request.param], "--rank", "4", "-o", place).ok()
    finally:
        os.chdir(former)
    (folder,) = (path for path in place.iterdir() if path.name != "my.model")
    return folder


def sources(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}


def test_files_are_those_of_the_contract(made: Path) -> None:
    modules = {path.name for path in made.glob("linear_*.py")}
    assert modules and all(re.fullmatch(r"linear_\d+x\d+_r4\.py", name) for name in modules)
    rest = {"__init__.py", "manifest.json", "py.typed", "test_equivalence.py"}
    assert {path.name for path in made.iterdir()} == modules | rest
    assert (made / "py.typed").read_bytes() == b""


def test_black_changes_nothing(made: Path) -> None:
    mode = black.Mode(line_length=LINE_LENGTH)
    for name, text in sources(made).items():
        ast.parse(text)
        assert black.format_str(text, mode=mode) == text, name


def test_headers(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    for text in sources(made).values():
        lines = text.splitlines()
        assert lines[0] == f"# SPDX-License-Identifier: {OUTPUT_LICENCE}" and OUTPUT_LICENCE == "MIT-0"
        assert lines[1] == f"# {MARKER}: do not edit."
        assert lines[2] == f"# Regenerate in the folder above this one: {manifest['command']}"
        assert lines[3] == f"# Digest of spec and templates: {manifest['digest']}"
        assert re.fullmatch(r"sha256:[0-9a-f]{64}", manifest["digest"])


def test_nothing_of_the_machine(made: Path) -> None:
    for path in made.iterdir():
        text = path.read_text(encoding="utf-8")
        for foreign in (str(made.parent), str(Path.home()) + "/", str(template_folder()), "/tmp"):
            assert foreign not in text
        assert not re.search(rf"(?<![\w-]){re.escape(socket.gethostname())}(?![\w-])", text)
        assert not re.search(r"\b20\d\d-\d\d-\d\d\b|\d\d:\d\d:\d\d", text)
        assert not re.search(r"(?<![\w.|/])/(home|root|usr|var|tmp|work|Users)\b", text)
        assert "{{" not in text and "{%" not in text and "\r" not in text and "\t" not in text


def test_imports(made: Path) -> None:
    for name, text in sources(made).items():
        found = set()
        siblings = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                if node.level:
                    siblings |= {node.module} if node.module else {alias.name for alias in node.names}
                else:
                    found.add(str(node.module).partition(".")[0])
        extra = {"pytest", "hypothesis"} if name == "test_equivalence.py" else set()
        assert found - set(sys.stdlib_module_names) <= {"torch", "triton"} | extra
        if "triton" in found:  # guarded: without it everything runs through torch
            assert "except ImportError:\n        triton = None" in text
        if name.startswith("linear_"):
            assert not siblings  # usable alone
        else:
            assert siblings == {path.stem for path in made.glob("linear_*.py")}


def test_docstrings_are_the_derivation(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    for layer in manifest["layers"]:
        text = (made / f"{layer['module']}.py").read_text()
        assert f"IN_FEATURES = {layer['in_features']}\nOUT_FEATURES = {layer['out_features']}\nRANK = 4\n" in text
        for part in layer["ranges"]:
            start = text.index(f'"""Variant {part["chosen"]}.')
            doc = text[start : text.index('"""', start + 3)]
            for expected in (
                "Forward::",
                "Backward::",
                "Y ",
                "FLOP",
                "iB",
                " µs",
                "Saved for the backward",
                "Temporaries",
            ):
                assert expected in doc
            if part is layer["ranges"][0]:
                assert f"The runner-up lost: {part['reason']}." in " ".join(doc.split())
                assert f"Priced at {part['tokens']} tokens" in doc


def test_modules_have_no_effects_at_import(made: Path) -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If)
    for path in made.glob("linear_*.py"):
        body = ast.parse(path.read_text()).body
        assert isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        assert all(isinstance(statement, allowed) for statement in body[1:])
        # Conditions stand only around Triton's import and what needs it.
        conditions = {ast.unparse(statement.test) for statement in body if isinstance(statement, ast.If)}
        assert conditions <= {"TYPE_CHECKING", "triton is not None"}


def test_header_command_reproduces_the_folder(
    made: Path, run, tree: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = shlex.split(json.loads((made / "manifest.json").read_text())["command"])
    assert command[0] == "runlora-gen" and command[-2:] == ["-o", "."]
    shutil.copytree(made.parent / "my.model", tmp_path / "my.model")
    monkeypatch.chdir(tmp_path)
    run(*command[1:]).ok()
    assert tree(tmp_path / made.name) == tree(made)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["my.model", made.name])


def test_digest_follows_spec_and_templates(run, small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(*options: str) -> str:
        run(*small, *options, "-o", tmp_path).ok()
        return json.loads((tmp_path / "llama_9m_r4" / "manifest.json").read_text())["digest"]

    variations = ((), ("--tokens", "8"), ("--train", "a"), ("--criterion", "flops"), ("--device", "a100"))
    digests = [digest(*options) for options in variations]
    assert len(set(digests)) == len(variations)
    assert digest() == digests[0]
    monkeypatch.setattr("runlora_gen.emit.package.template_digest", lambda: "other")
    assert digest() not in digests
