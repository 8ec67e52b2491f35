"""Generated text is formatted as black formats the repository that it is generated into."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import black
import pytest
from black.files import find_project_root, infer_target_version, parse_pyproject_toml
from runlora_gen.algebra.operations import Fused
from runlora_gen.emit import style
from runlora_gen.emit.kernel_notes import KernelCall
from runlora_gen.emit.nodes import module_node
from runlora_gen.emit.package import OF_KERNELS, OF_MODELS
from runlora_gen.emit.render import Header, render
from runlora_gen.emit.style import DEFAULT_LINE_LENGTH, MAX_LINE_LENGTH, MIN_LINE_LENGTH, Style, style_of
from runlora_gen.kernels.registry import KERNELS
from runlora_gen.kernels.sites import operations_of
from runlora_gen.request.activations import ACTIVATIONS
from runlora_gen.request.errors import SpecError
from runlora_gen.request.experts import Experts
from runlora_gen.request.groups import Group
from runlora_gen.request.layers import Layer
from runlora_gen.request.mlps import Mlp
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import setting_for, setting_of
from runlora_gen.search.ranges import decide_model

#: One module with kernels, whose text has strings in both quotes, trailing commas and long lines; few programs.
SPEC = ("--arch", "llama-9m", "--target-modules", "q_proj", "--rank", "4", "--launch", "graph", "--tokens", "65536")
SPEC += ("--train", "b", "--no-input-grad", "--adapter-dtype", "bf16")
PACKAGE = "llama_9m_r4"

FILES = len(OF_MODELS) + 2  # and a module, and the test; with kernels some more
HUNDRED = "[tool.black]\nline-length = 100"
#: Repositories: their files by path, and the columns of a line that follow. OUT is ``sub/out``.
REPOSITORIES: dict[str, tuple[Mapping[str, str], int]] = {
    "none": ({}, 88),
    "line length": ({"pyproject.toml": HUNDRED}, 100),
    "as text": ({"pyproject.toml": "[tool.black]\nline_length = '100'"}, 100),
    "strings": ({"pyproject.toml": f"{HUNDRED}\nskip-string-normalization = true\ntarget-version = ['py312']"}, 100),
    "commas": ({"pyproject.toml": "[tool.black]\nskip-magic-trailing-comma = true"}, 88),
    "versions": ({"pyproject.toml": "[tool.black]\ntarget-version = ['py310', 'py313']"}, 88),
    "preview": ({"pyproject.toml": "[tool.black]\nline-length = 79\npreview = true"}, 79),
    "unstable": ({"pyproject.toml": "[tool.black]\npreview = true\nunstable = true"}, 88),
    "requires-python": ({".git/HEAD": "", "pyproject.toml": "[project]\nrequires-python = '>=3.13'"}, 88),
    "git without black": ({".git/HEAD": "", "../pyproject.toml": HUNDRED}, 88),
    "git file": ({".git": "gitdir: elsewhere", "../pyproject.toml": HUNDRED}, 88),
    "mercurial": ({".hg/store": "", "../pyproject.toml": HUNDRED}, 88),
    "no black below one": (
        {"sub/pyproject.toml": "[tool.ruff]\nline-length = 70", "pyproject.toml": HUNDRED},
        100,
    ),
    "nearest": (
        {"sub/pyproject.toml": "[tool.black]\nline-length = 110", "pyproject.toml": HUNDRED},
        110,
    ),
    "in OUT": ({"sub/out/pyproject.toml": "[tool.black]\nline-length = 110", ".git/HEAD": ""}, 110),
    "in the package": ({f"sub/out/{PACKAGE}/pyproject.toml": "[tool.black]\nline-length = 110", ".git/HEAD": ""}, 110),
}


def make(place: Path, files: Mapping[str, str]) -> Path:
    """A repository in a folder of its own; returns OUT, which need not be there."""
    root = place / "root"
    root.mkdir()
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return root / "sub" / "out"


def black_s_mode(folder: Path) -> black.Mode:
    """What black itself finds for a folder, as its command line does."""
    root, _ = find_project_root((str(folder),))
    path = root / "pyproject.toml"
    config = parse_pyproject_toml(str(path)) if path.is_file() else {}

    def flag(name: str) -> bool:
        return str(config.get(name, False)).lower() == "true"

    return black.Mode(
        line_length=int(config.get("line_length", 88)),
        target_versions={black.TargetVersion[name.upper()] for name in config.get("target_version", [])},
        string_normalization=not flag("skip_string_normalization"),
        magic_trailing_comma=not flag("skip_magic_trailing_comma"),
        preview=flag("preview"),
        unstable=flag("unstable"),
    )


@pytest.fixture
def nothing_known(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was formatted yet, and what is here is for nobody else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch, nothing_known: None) -> list[black.Mode]:
    """The modes in which black was asked to format, and did not."""
    asked: list[black.Mode] = []
    monkeypatch.setattr(style, "_FORMATTED", {})
    monkeypatch.setattr(style, "_FEW", sys.maxsize)  # in this process
    monkeypatch.setattr(black, "format_str", lambda source, *, mode: asked.append(mode) or source)
    return asked


@pytest.mark.parametrize("name", REPOSITORIES)
def test_it_is_what_black_finds(tmp_path: Path, modes: list[black.Mode], name: str) -> None:
    files, line_length = REPOSITORIES[name]
    package = make(tmp_path, files) / PACKAGE
    style = style_of(package)
    assert style.line_length == line_length
    style.format(["x = 1\n"])
    package.mkdir(parents=True, exist_ok=True)  # black looks from folders that are there
    assert modes == [black_s_mode(package)]
    assert modes[0].line_length == line_length
    assert style_of(package) == style


def test_the_cases_are_worth_it(tmp_path: Path, modes: list[black.Mode]) -> None:
    """Each option reaches black."""
    found = {}
    for name, (files, _) in REPOSITORIES.items():
        (tmp_path / name).mkdir()
        style_of(make(tmp_path / name, files) / PACKAGE).format([name])
        found[name] = modes.pop()
    assert not found["strings"].string_normalization and found["line length"].string_normalization
    assert not found["commas"].magic_trailing_comma
    assert {v.name for v in found["versions"].target_versions} == {"PY310", "PY313"}
    assert found["preview"].preview and not found["preview"].unstable and found["unstable"].unstable
    newest = {v for v in black.TargetVersion if v.value >= black.TargetVersion.PY313.value}
    assert found["requires-python"].target_versions == newest and not found["none"].target_versions
    assert newest == set(infer_target_version({"project": {"requires-python": ">=3.13"}}) or ())


def test_several_processes_format_as_one_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = [f"def f{i}(a, b = {i}):\n  return [a, b,]" for i in range(2 * style._FEW)]
    sources, mode = ["\n\n\n".join(parts), "x = 'last'"], black.Mode()
    whole = [black.format_str(source, mode=mode) for source in sources]
    monkeypatch.setattr(style, "_THREADED", frozenset())
    monkeypatch.setattr(style.threading, "active_count", lambda: 1)
    for cores in ({0, 1, 2}, {0}):
        monkeypatch.setattr(style, "_FORMATTED", {})
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(len(cores))))
        monkeypatch.setattr(style.os, "sched_getaffinity", lambda _, cores=cores: cores, raising=False)
        assert Style().format(sources) == whole


def test_functions_are_formatted_as_in_the_whole() -> None:
    """Also of kernels that are seldom chosen; black infers the Python versions."""
    workload = Workload(adapter_dtype="bf16", kernels=False)
    (choice,) = decide_model(workload, (Layer(128, 128, False, 1, ("q_proj",)),), 4)
    helpers = frozenset[str]().union(*(kernel.helpers for kernel in KERNELS.values()))
    node = module_node(choice, 4, workload, width=DEFAULT_LINE_LENGTH)
    setting = choice.ranges[-1].decision.setting
    group = Group(("q", "k"), 128, (128, 128), False, 1, (("q_proj", "k_proj"),))
    settings = [setting, *(setting_of(replace(workload, dropout=rate), group, 4, 4096) for rate in (0.0, 0.1))]
    of_one = [replace(workload, dropout=0.1), replace(workload, base="nf4"), replace(workload, base="fp8-block")]
    settings += [setting_for(each, 128, 128, 4, False, 4096) for each in of_one]
    stacks = [Experts(4, 128, 128, gathers, 2, False, 1, ("up_proj",)) for gathers in (True, False)]
    stacks.append(replace(stacks[1], activation="silu_gated"))
    settings += [
        setting_of(each, stack, 4, 4096) for stack in stacks for each in (workload, replace(workload, dropout=0.1))
    ]
    mlp = Mlp(128, 128, 128, "silu_gated", False, 1, ())
    settings += [setting_of(replace(workload, dropout=rate), mlp, 4, 4096) for rate in (0.0, 0.1)]
    calls = tuple(KernelCall(op, of) for of in settings for op in operations_of(of.derivation) if isinstance(op, Fused))
    node = replace(node, calls=calls, helpers=node.helpers | helpers, activations=tuple(ACTIVATIONS.values()))
    assert [kernel.name for kernel in node.kernels] == list(KERNELS)
    source = render("linear.py.jinja", {"header": Header("command", "digest"), "module": node})
    assert len(style._CUT.split(source)) > 40
    assert Style().format([source]) == [black.format_str(source, mode=black.Mode())]


@pytest.mark.parametrize(
    ("name", "kernels"), [("none", False), ("strings", True), ("unstable", False), ("requires-python", False)]
)
def test_black_accepts_every_generated_file(
    run, small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kernels: bool
) -> None:
    """In a process of its own, in the repository, and makes the same of what was rendered, as a whole; --check too.

    Of what it made itself black changes nothing: that it takes ours as they are is seen once.
    """
    rendered: dict[str, str] = {}
    format_ = Style.format

    def record(self: Style, sources: Sequence[str]) -> list[str]:
        texts = format_(self, sources)
        rendered.update(zip(texts, sources, strict=True))
        return texts

    monkeypatch.setattr(Style, "format", record)
    out = make(tmp_path, REPOSITORIES[name][0])
    spec = SPEC if kernels else small
    run(*spec, "-o", out).ok()
    folder = out / PACKAGE
    texts = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert ("triton.jit" in texts["linear_128x128_r4.py"]) == kernels
    assert len(texts) == FILES + kernels * len(OF_KERNELS)
    whole = out / "whole"
    whole.mkdir()
    for file, text in texts.items():
        (whole / file).write_text(rendered[text])
    checked = [folder] if name == "none" else []
    command = [sys.executable, "-m", "black", "--fast", "--verbose", "--workers", "1", *map(str, [*checked, whole])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for file, text in texts.items():
        assert (folder / file).read_text() == text and (whole / file).read_text() == text
        assert not checked or f"{folder / file} already well formatted" in done.stderr
    assert run(*spec, "-o", out, "--check").ok().out == ""
    assert "up to date" in run(*spec, "-o", out).ok().out


def test_docstrings_have_the_repository_s_width(run, tmp_path: Path, modes: list[black.Mode]) -> None:
    """Which no black would wrap."""
    widths = {}
    for length in (72, 88, 120):
        out = tmp_path / str(length)
        run(*SPEC, "-o", out, "--line-length", str(length)).ok()
        text = (out / PACKAGE / "linear_128x128_r4.py").read_text()
        start = text.index('"""Variant ')
        prose = re.search(r"\n\n(    Saved for the backward.*?)\n\n", text[start:].replace('"""', "\n\n"), re.S)
        widths[length] = max(map(len, prose[1].splitlines()))
        assert length - 20 < widths[length] <= length
    assert widths[72] < widths[88] < widths[120]
    assert {mode.line_length for mode in modes} == {72, 88, 120}


def test_a_line_length_of_its_own_is_in_the_command(run, small, tree: Callable, tmp_path: Path) -> None:
    """Over a repository's: the header's command makes the same bytes again, and --check knows."""
    out = make(tmp_path, {"pyproject.toml": f"[tool.black]\nline-length = {DEFAULT_LINE_LENGTH}"})
    run(*small, "-o", out, "--line-length", "120").ok()
    command = json.loads((out / PACKAGE / "manifest.json").read_text())["command"]
    assert command.endswith(" --line-length 120 -o .")
    assert run(*small, "-o", out, "--line-length", "120", "--check").ok().out == ""
    assert run(*small, "-o", out, "--check", "-q").code == 1
    again = tmp_path / "again"
    again.mkdir()
    run(*shlex.split(command)[1:-1], again).ok()
    assert tree(again) == tree(out)
    command = [sys.executable, "-m", "black", "--check", "--line-length", "120", "--workers", "1", "-q", str(out)]
    assert subprocess.run(command, timeout=120).returncode == 0


@pytest.mark.parametrize("name", ["line length", "nearest", "in OUT", "in the package"])
def test_a_run_takes_what_is_found(run, tmp_path: Path, modes: list[black.Mode], name: str) -> None:
    files, line_length = REPOSITORIES[name]
    run(*SPEC, "-o", make(tmp_path, files), "--force").ok()
    assert {mode.line_length for mode in modes} == {line_length} and len(modes) > FILES


def test_a_repository_s_line_length_is_not_in_the_command(run, tmp_path: Path, modes: list[black.Mode]) -> None:
    """It is the repository's, wherever that lies."""
    out = make(tmp_path, REPOSITORIES["strings"][0])
    run(*SPEC, "-o", out).ok()
    assert "--line-length" not in json.loads((out / PACKAGE / "manifest.json").read_text())["command"]
    assert {mode.line_length for mode in modes} == {100}


def test_a_link_leads_to_the_repository_that_it_leads_to(tmp_path: Path) -> None:
    out = make(tmp_path, {"pyproject.toml": HUNDRED})
    out.mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pyproject.toml").write_text("[tool.black]\nline-length = 70\n")
    (tmp_path / "other" / "link").symlink_to(out)
    assert style_of(tmp_path / "other" / "link").line_length == 100


def test_a_path_may_lead_out_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder's repository is not that of ``../out``."""
    make(tmp_path, {"pyproject.toml": "[tool.black]\nline-length = 70"})
    (tmp_path / "pyproject.toml").write_text("[tool.black]\nline-length = 100\n")
    monkeypatch.chdir(tmp_path / "root")
    assert style_of(Path("out")).line_length == 70
    assert style_of(Path("../out")).line_length == 100
    assert style_of(Path("..")).line_length == 100


def test_a_user_s_own_configuration_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would format the same repository differently elsewhere."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "black").write_text("[tool.black]\nline-length = 70\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    assert style_of(tmp_path / "out") == Style(DEFAULT_LINE_LENGTH)


def test_which_files_black_takes_is_no_matter(tmp_path: Path) -> None:
    """What is generated does not go stale by it."""
    out = make(tmp_path, {"pyproject.toml": HUNDRED})
    before = style_of(out)
    more = "[tool.black]\nline-length = 100\nextend-exclude = 'x'\nworkers = 2\n[tool.ruff]\nline-length = 90\n"
    (tmp_path / "root" / "pyproject.toml").write_text(more)
    assert style_of(out) == before and style_of(out).key == before.key


#: Text of a pyproject.toml, and what its error must say.
BAD = {
    "no TOML": ("[tool.black\n", "not valid TOML"),
    "no text": ("\udcff", "not valid TOML"),
    "nested": ("x = " + "[" * 100_000, "not valid TOML"),
    "too short": ("[tool.black]\nline-length = 59", "tool.black.line-length: 59 is not allowed; give a whole number"),
    "too long": ("[tool.black]\nline-length = 321", "321 is not allowed; give a whole number from 60 to 320"),
    "no number": ('[tool.black]\nline-length = "x\\u001b"', r"'x\x1b' is not allowed"),
    "a fraction": ("[tool.black]\nline-length = 88.0", "88.0 is not allowed"),
    "negative": ("[tool.black]\nline-length = -88", "-88 is not allowed"),
    "a flag for a length": ("[tool.black]\nline-length = true", "True is not allowed"),
    "unknown version": ("[tool.black]\ntarget-version = ['py3x']", "tool.black: 'PY3X' is unknown to black"),
    "no list": ("[tool.black]\ntarget-version = 'py311'", "target-version: 'py311' is not allowed; give a list"),
    "unknown feature": ("[tool.black]\nenable-unstable-feature = ['x']", "tool.black: 'x' is unknown to black"),
    "no flag": ("[tool.black]\npreview = 'perhaps'", "tool.black.preview: 'perhaps' is not allowed"),
    "no table": ("[tool]\nblack = 3", "black: 3 is not allowed; give a table"),
    "no tools": ("tool = 3", "tool: 3 is not allowed; give a table"),
    "no project": ("project = 3\n[tool.black]", "project: 3 is not allowed; give a table"),
    "no version": ("[project]\nrequires-python = 3\n[tool.black]", "requires-python: 3 is not allowed"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_pyproject_is_named(run, tmp_path: Path, name: str) -> None:
    text, said = BAD[name]
    out = make(tmp_path, {".git/HEAD": ""})
    (tmp_path / "root" / "pyproject.toml").write_bytes(text.encode(errors="surrogateescape"))
    for extra in ((), ("--check",)):
        message = run(*SPEC, "-o", out, *extra).error()
        assert "pyproject.toml" in message and said in message
    assert not out.exists()


def test_a_huge_pyproject_is_named(run, tmp_path: Path) -> None:
    out = make(tmp_path, {"pyproject.toml": "#" * (1 << 20)})
    assert "larger than 1048576 bytes, which no pyproject.toml is" in run(*SPEC, "-o", out).error()


@pytest.mark.parametrize("length", ["0", "59", "321", "x", "88.5", "-88", "", "1e2", "60,400"])
def test_a_bad_line_length_is_named(run, tmp_path: Path, length: str) -> None:
    message = run(*SPEC, "-o", tmp_path / "out", f"--line-length={length}").error()
    assert message.startswith("--line-length: ") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [MIN_LINE_LENGTH, MAX_LINE_LENGTH])
def test_the_least_and_the_most_columns(run, small, tmp_path: Path, modes: list[black.Mode], length: int) -> None:
    run(*small, "-o", tmp_path / "out", "--line-length", str(length)).ok()
    assert {mode.line_length for mode in modes} == {length}
    assert run(*small, "-o", tmp_path / "out", "--line-length", str(length), "--check").ok().out == ""


def test_a_given_length_goes_before_a_bad_one_of_the_repository(tmp_path: Path) -> None:
    out = make(tmp_path, {"pyproject.toml": "[tool.black]\nline-length = 1000"})
    assert style_of(out, 100).line_length == 100
    with pytest.raises(SpecError, match="1000"):
        style_of(out)
