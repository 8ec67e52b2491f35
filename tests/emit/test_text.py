"""The emitted text: valid, stable under black, nothing of the machine in it, and reproducible from its own header."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import black
import pytest
from runlora_gen.cost import device
from runlora_gen.cost.device import load_device
from runlora_gen.emit.package import OF_EXPERTS, OF_KERNELS, OF_MODELS
from runlora_gen.emit.render import MARKER, OUTPUT_LICENCE, SHARED, template_folder
from runlora_gen.emit.style import DEFAULT_LINE_LENGTH, Style
from runlora_gen.request.architecture import Projection
from runlora_gen.request.experts import Stack

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
SMALL = ("--arch", "llama-9m", "--target-modules", "q_proj")
NARROW, HALF = ("--adapter-dtype", "bf16"), ("--dtype", "fp16", "--criterion", "memory")
SPECS = {
    "plain": SMALL,
    "ranges": (*SMALL, "--tokens", "16,65536", "--dtype", "fp32", "--device", "cpu"),
    "compiled": (*SMALL, "--launch", "compile", "--tokens", "65536", *NARROW),
    "kernels": (*SMALL, "--launch", "graph", "--tokens", "65536", "--adapter-dtype", "bf16"),
    "frozen": ("--arch", "gpt2", "--target-modules", "c_attn", "--train", "b", "--no-input-grad", *HALF),
    "lossy": (*SMALL, "--allow-lossy-merge", "--max-saved-bytes", "99999999", "--train", "a", "--no-kernels"),
    "every variant": (*SMALL, "--all-variants", "--train", "b", "--no-input-grad", "--adapter-dtype", "bf16"),
    "config": (
        "--arch",
        "my.model/config.json",
        "--device",
        "a100",
        "--no-kernels",
        "--target-modules",
        "k_proj,down_proj",
    ),
    "folder": ("--arch", "my.model/config.json", "--layout", "folder", *NARROW, "--no-kernels"),
    "folder with kernels": (
        *("--arch", "llama-9m", "--launch", "graph", "--tokens", "65536", "--layout", "folder", *NARROW),
        *("--all-variants", "--no-input-grad", "--train", "b", "--target-modules", "q_proj,up_proj"),
    ),
    "dropout": (*SMALL, "--dropout", "0.05", "--no-kernels"),
    "dropout with kernels": (
        *(*SMALL, "--dropout", "0.05", "--launch", "graph", "--tokens", "65536", *NARROW),
        *("--all-variants", "--layout", "folder"),
    ),
    "model type": ("--arch", "llama-3-8b", "--model-type", "mistral", "--target-modules", "v_proj, q_proj", *NARROW),
}
SPECS |= {
    f"experts{in_folder}": (
        *("--arch", "my.model/manifest.json", "--target-modules", "q_proj"),
        *("--target-parameters", "gate_up_proj,down_proj", *NARROW, "--launch", "graph", "--tokens", "4096", *options),
    )
    for in_folder, options in (("", ()), (" in a folder", ("--layout", "folder")))
}
#: A model that is asked for by the manifest of a former package.
MANIFEST: dict[str, Any] = {
    "generator": "runlora-gen",
    "arch": "mixed",
    "model_type": "mixtral",
    "projections": [asdict(Projection("q_proj", 64, 64, False, 2, "attention"))],
    "stacks": [
        asdict(Stack("gate_up_proj", 4, 64, 48, True, 2, False, 2, module="mlp.experts")),
        asdict(Stack("down_proj", 4, 24, 64, False, 2, True, 2, layout="in_out", module="mlp.experts")),
    ],
}
#: What files beside modules and tests import, within the functions that need it.
MORE = {"adapters.py": {"safetensors"}, "experts.py": {"transformers"}, "inject_experts.py": {"transformers"}}
EVERYWHERE = {"__future__", "collections.abc", "typing"}


@pytest.fixture(scope="module", params=SPECS)
def made(request: pytest.FixtureRequest, run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated package; the folder above it is where it was generated."""
    place = tmp_path_factory.mktemp("text")
    (place / "my.model").mkdir()
    (place / "my.model" / "config.json").write_text(json.dumps(CONFIG))
    (place / "my.model" / "manifest.json").write_text(json.dumps(MANIFEST))
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


def is_folder(made: Path) -> bool:
    """Whether it has the layout in which modules share files."""
    return "--layout folder" in json.loads((made / "manifest.json").read_text())["command"]


#: What proves a package.
TESTS = ("test_equivalence.py", "test_experts.py")
#: Of norms and of rotary embeddings.
KERNELS = {f"{name}.py" for name in OF_KERNELS}


def shared_files(made: Path) -> set[str]:
    """Of a package the names of files that modules may take something from."""
    return {name for name in SHARED if (made / f"{name}.py").exists()}


def test_files_are_those_of_the_contract(made: Path) -> None:
    modules = {path.name for path in made.glob("linear_*.py")}
    assert modules and all(re.fullmatch(r"linear_\d+x\d+_r4\.py", name) for name in modules)
    manifest = json.loads((made / "manifest.json").read_text())
    groups, experts = manifest["groups"], [stack["module"] for stack in manifest["experts"]]
    assert all(re.fullmatch(r"(gathered|combined)_experts_\d+x\d+x\d+_r4", name) for name in experts)
    modules |= {f"{name}.py" for name in experts}
    modules |= {f"{group['module']}.py" for group in groups}
    assert all(re.fullmatch(r"[a-z][a-z_]*_\d+x\d+(_\d+)*_r4", group["module"]) for group in groups)
    rest = {"manifest.json", "py.typed", "test_equivalence.py", *(f"{name}.py" for name in OF_MODELS)}
    workload = manifest["workload"]
    if workload["kernels"] and load_device(workload["device"]).kernels:
        rest |= KERNELS
    if groups:
        rest.add("groups.py")
    if experts:
        rest |= {"test_experts.py", *(f"{name}.py" for name in OF_EXPERTS)}
    if is_folder(made):
        has_kernels = any("@triton.jit" in text for name, text in sources(made).items() if name not in KERNELS)
        has = {"kernels": has_kernels, "quantized": False, "routing": bool(experts)}
        rest |= {f"{name}.py" for name in SHARED if has.get(name, True)}
    assert {path.name for path in made.iterdir()} == modules | rest
    assert (made / "py.typed").read_bytes() == b""


@cache
def formatted(part: str) -> str:
    """By black: packages have most of their functions in common."""
    return black.format_str(part, mode=black.Mode(line_length=DEFAULT_LINE_LENGTH))


def test_black_changes_nothing(made: Path) -> None:
    """What stands between functions, it leaves as well: see ``test_style.py``, which formats files as a whole."""
    for name, text in sources(made).items():
        ast.parse(text)
        assert all(formatted(part + "\n") == part + "\n" for part in text.rstrip("\n").split("\n\n\n")), name


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
        extra = {"pytest", "hypothesis"} if name in TESTS else MORE.get(name, set())
        assert found - set(sys.stdlib_module_names) <= {"torch", "triton"} | extra
        if "triton" in found:  # guarded: without it everything runs through torch
            assert "except ImportError:\n        triton = None" in text
        if name.startswith(("linear_", "gathered_", "combined_")) or name.removesuffix(".py") in SHARED:
            assert siblings <= shared_files(made)  # usable alone where there is none
        elif name in ("__init__.py", "shapes.py", "test_equivalence.py"):
            assert siblings >= {path.stem for path in made.glob("linear_*.py")}
        elif name == "test_experts.py":
            assert siblings >= {path.stem for path in made.glob("*_experts_*.py")}
        assert siblings <= {path.stem for path in made.glob("*.py")}


def test_what_is_imported_is_there_and_used(made: Path) -> None:
    trees = {name: ast.parse(text) for name, text in sources(made).items()}
    defined = {name.removesuffix(".py"): names_of(tree) for name, tree in trees.items()}
    for name, tree in trees.items():
        read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        read |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}  # __all__
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "module", "") != "__future__":
                for alias in node.names:
                    bound = (alias.asname or alias.name).partition(".")[0]
                    assert bound in read or alias.asname == alias.name, (name, bound)
                    if isinstance(node, ast.ImportFrom) and node.level:
                        known = defined[node.module] if node.module else defined.keys()
                        assert alias.name in known, (name, node.module, alias.name)


def names_of(tree: ast.Module) -> set[str]:
    """What a file defines or imports, under whatever condition."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_what_only_some_need_is_imported_within_functions(made: Path) -> None:
    for name, text in sources(made).items():
        top = {n.module for n in ast.parse(text).body if isinstance(n, ast.ImportFrom) and not n.level}
        assert not any(str(module).startswith(("safetensors", "peft", "transformers")) for module in top), name


def test_docstrings_are_the_derivation(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    for layer in manifest["layers"]:
        text = (made / f"{layer['module']}.py").read_text()
        assert f"\nIN_FEATURES = {layer['in_features']}\nOUT_FEATURES = {layer['out_features']}\n" in text
        assert "\nRANK = 4\n" in (made / ("base.py" if is_folder(made) else f"{layer['module']}.py")).read_text()
        for part in {part["chosen"]: part for part in reversed(layer["ranges"])}.values():
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
            said = " ".join(doc.split())
            assert (f"The runner-up lost: {part['reason']}." in said) == bool(part["reason"])
            assert f"Priced at {part['tokens']} tokens in {manifest['workload']['dtype']}" in said
            casts = manifest["workload"]["adapter_dtype"] != manifest["workload"]["dtype"]
            assert ("the adapter in fp32" in said) == casts == ("cast(lora_" in said)
            bound = {0: "the device", 1: "the host"}.get(part["host_share"], "device and host alike")
            launched = {
                "eager": "Launched eagerly it takes the host ",
                "compile": "Under torch.compile it takes the host ",
                "graph": "Launches cost nothing: they are replayed as a graph.",
            }
            for launch, words in launched.items():
                assert (words in said) == (manifest["workload"]["launch"] == launch)
            assert (f"a step of the whole model is bound by {bound}" in said) == ("it takes the host" in said)


def load(path: Path, name: str) -> ModuleType:
    """Import a file under a name, or where it shares others its folder; Triton wants its kernels in files."""
    pytest.importorskip("torch")
    if shared_files(path.parent):
        package = ModuleType(name)
        package.__path__ = [str(path.parent)]
        sys.modules[name] = package
        try:
            return importlib.import_module(f"{name}.{path.stem}")
        finally:
            for found in [found for found in sys.modules if found.partition(".")[0] == name]:
                del sys.modules[found]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def test_every_module_says_what_it_is(made: Path, request: pytest.FixtureRequest) -> None:
    """The same names in all of them, and what they say is true."""
    manifest = json.loads((made / "manifest.json").read_text())
    workload = manifest["workload"]
    trains = [
        name
        for name, wanted in (
            ("x", workload["input_grad"]),
            ("lora_A", "a" in workload["train"]),
            ("lora_B", "b" in workload["train"]),
            ("bias", True),
        )
        if wanted
    ]
    for layer in manifest["layers"]:
        path = made / f"{layer['module']}.py"
        module = load(path, f"says_{request.node.callspec.id}_{path.stem}".replace(" ", "_"))
        names = {"IN_FEATURES", "KERNELS", "LOSSY_MERGE", "OUT_FEATURES", "RANK", "TRAINS", "VARIANTS"}
        assert set(module.__all__) == {*names, "LoRALinear", "lora_linear"}
        assert list(module.TRAINS) == trains
        listed = " and ".join([", ".join(trains[:-1]), trains[-1]])
        assert f"\n    Differentiable in {listed}.\n" in module.lora_linear.__doc__
        doc = next(kind.__doc__ for kind in reversed(module.LoRALinear.__mro__) if kind.__name__ == "LoRALinear")
        for name, frozen in (("lora_A", "lora_A" not in trains), ("lora_B", "lora_B" not in trains)):
            (line,) = re.findall(rf"^ +{name}: \((?:r, in|out)_features.*$", doc, re.M)
            assert ("frozen" in line) == frozen
        assert module.LOSSY_MERGE is workload["allow_lossy_merge"]
        wanted = {name for part in layer["ranges"] for name in (part["chosen"], part["on_16_bit_weights"])}
        assert wanted <= set(module.VARIANTS)
        assert (wanted == set(module.VARIANTS)) == ("--all-variants" not in manifest["command"])
        parameter = inspect.signature(module.lora_linear).parameters["variant"]
        assert parameter.kind is parameter.KEYWORD_ONLY and parameter.default is None
        text = path.read_text(encoding="utf-8")
        has_kernels = "@triton.jit" in text
        assert has_kernels == ("RUNLORA_KERNELS" in text) == ("triton" in text)
        if is_folder(made):
            assert not has_kernels
            has_kernels = "\nfrom .kernels import KERNELS, _" in text
        assert ("#: Whether fused kernels run: this module has none.\nKERNELS = False\n" in text) == (not has_kernels)
        assert isinstance(module.KERNELS, bool) and (has_kernels or not module.KERNELS)
        wide = workload["adapter_dtype"] == "fp32"
        assert ("by default float32 over a 16-bit base" in " ".join(doc.split())) == wide


def test_the_specs_have_kernels_and_have_none(made: Path, request: pytest.FixtureRequest) -> None:
    text = "".join(text for name, text in sources(made).items() if name not in KERNELS)
    if request.node.callspec.id in ("kernels", "folder with kernels", "plain"):
        assert ("@triton.jit" in text) == (request.node.callspec.id != "plain")


def test_the_adapter_s_dtype_is_in_the_command_where_it_is_no_default(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    narrow = manifest["workload"]["adapter_dtype"] != "fp32"
    assert (f" --adapter-dtype {manifest['workload']['adapter_dtype']} " in manifest["command"]) == narrow
    assert ("--adapter-dtype" in manifest["command"]) == narrow


@pytest.fixture(scope="module")
def with_kernels(run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton", minversion="3.4")
    place = tmp_path_factory.mktemp("with_kernels")
    run(*SPECS["kernels"], "--rank", "4", "-o", place).ok()
    return place / "llama_9m_r4" / "linear_128x128_r4.py"


def test_two_modules_never_share_operators(with_kernels: Path) -> None:
    """Torch refuses a second operator of one name: the same file may be loaded as two modules of any names."""
    spaces = [
        load(with_kernels, name)._NAMESPACE
        for name in ("models.llama_mlp", "models_llama.mlp", "models.llama.mlp", "models_llama_mlp", "modéls.llama_mlp")
    ]
    assert len(set(spaces)) == len(spaces)
    assert all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", space) for space in spaces)


def test_no_two_names_give_one_namespace(with_kernels: Path) -> None:
    (value,) = (
        statement.value
        for statement in ast.walk(ast.parse(with_kernels.read_text(encoding="utf-8")))
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "_NAMESPACE"
    )
    namespace = compile(ast.Expression(value), "namespace", "eval")
    # What a name may hold, and what may stand for it.
    parts = ("", ".", "_", "é", "a", "2e", "5f", "e9", "_2e_", "_5f_")
    names = {"".join(chosen) for chosen in itertools.product(parts, repeat=3)}
    assert len({eval(namespace, {"__name__": name}) for name in names}) == len(names) > 500


def test_modules_have_no_effects_at_import(made: Path) -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If)
    modules = (*made.glob("linear_*.py"), *made.glob("*_experts_*_r4.py"))
    for path in (*modules, *(made / f"{name}.py" for name in shared_files(made))):
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
    if f"{made.name}/manifest.json" in command:  # no file says more of the model
        (tmp_path / made.name).mkdir()
        shutil.copy(made / "manifest.json", tmp_path / made.name)
    monkeypatch.chdir(tmp_path)
    run(*command[1:]).ok()
    there = {name: data for name, data in tree(made).items() if "__pycache__" not in name}  # others import it
    assert tree(tmp_path / made.name) == there
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["my.model", made.name])


def test_digest_follows_spec_and_templates(run, small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(*options: str) -> str:
        run(*small, *options, "-o", tmp_path).ok()
        return json.loads((tmp_path / "llama_9m_r4" / "manifest.json").read_text())["digest"]

    variations = (
        (),
        ("--tokens", "8"),
        ("--train", "a"),
        ("--criterion", "flops"),
        ("--device", "a100"),
        ("--adapter-dtype", "fp32"),
        ("--launch", "graph"),
        ("--all-variants", "--train", "b", "--no-input-grad"),
        ("--train", "b", "--no-input-grad"),
        ("--layout", "folder"),
    )
    monkeypatch.setattr(Style, "format", lambda self, source: source)
    digests = [digest(*options) for options in variations]
    assert len(set(digests)) == len(variations)
    assert digest() == digests[0]
    monkeypatch.setattr("runlora_gen.emit.manifest.template_digest", lambda: "other")
    assert digest() not in digests


def test_digest_follows_a_profile_s_content(run, small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name stays, and with it the command: what was generated is stale all the same."""
    monkeypatch.setattr(Style, "format", lambda self, source: source)
    profile = (Path(device.__file__).parent / "devices" / "a100.toml").read_text(encoding="utf-8")
    assert "\nhost_us = 64\n" in profile
    found = []
    for folder, text in (
        ("a", profile),
        ("b", profile.replace("\nhost_us = 64\n", "\nhost_us = 65\n")),
        ("c", profile),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.toml").write_text(text, encoding="utf-8")
        run(*small, "--device", tmp_path / folder / "mine.toml", "-o", tmp_path / folder / "out").ok()
        found.append(json.loads((tmp_path / folder / "out" / "llama_9m_r4" / "manifest.json").read_text()))
    commands = {manifest["command"] for manifest in found}
    assert len(commands) == 1 and "--device mine.toml" in commands.pop()
    first, second, third = (manifest["digest"] for manifest in found)
    assert first == third != second
    # The text of the modules may stay, but not their headers.
    assert (
        run(*small, "--device", tmp_path / "b" / "mine.toml", "-o", tmp_path / "a" / "out", "--check", "-q").code == 1
    )
    assert (
        run(*small, "--device", tmp_path / "c" / "mine.toml", "-o", tmp_path / "a" / "out", "--check", "-q").code == 0
    )
