"""Any model from the command line: what is said of it, how its package is called, and that a check agrees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from runlora_gen.emit import package as emitted
from runlora_gen.emit.package import MANIFEST_SCHEMA, OF_MODELS
from runlora_gen.from_model import meta

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
FEW = ("--rank", "4", "--no-kernels", "--adapter-dtype", "bf16")
SCHEMA = jsonschema.Draft202012Validator(
    json.loads((Path(emitted.__file__).parent / MANIFEST_SCHEMA).read_text(encoding="utf-8"))
)
needs_transformers = pytest.mark.skipif(not meta.is_installed(), reason="needs torch and transformers")


def config(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**SIZES, **values}))
    return folder


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


@needs_transformers
def test_what_is_left_out_is_said_with_one_line_a_reason(run, tmp_path: Path) -> None:
    folder = config(tmp_path / "model", model_type="mixtral", num_local_experts=4)
    options = ("--arch", folder, *FEW, "--target-modules", "k_proj", "-o", tmp_path / "out")
    outcome = run(*options)
    assert outcome.code == 0
    assert outcome.err.splitlines() == [
        "left out: embed_tokens: embedding",
        "left out: layers.*.mlp.gate: 2-D parameters of MixtralTopKRouter, which is no linear",
        "left out: layers.*.mlp.experts.gate_up_proj, layers.*.mlp.experts.down_proj: "
        "experts: ask for them with target_parameters",
    ]
    assert outcome.out == f"{tmp_path / 'out' / 'model_r4'}: 1 modules, wrote {len(OF_MODELS) + 4} files\n"
    assert manifest(tmp_path / "out" / "model_r4")["model_type"] == "mixtral"
    assert run(*options, "--check", "-q").ok().out == ""
    explained = run("explain", "--arch", folder, *FEW, "--target-modules", "k_proj", "--json")
    assert json.loads(explained.out)["arch"] == "model" and "left out: " in explained.err


@needs_transformers
def test_experts_are_generated_for_where_they_are_asked_for(run, tmp_path: Path) -> None:
    """The command in the manifest names them, and makes the same from the manifest in the model's place."""
    folder = config(tmp_path / "model", model_type="mixtral", num_local_experts=4)
    options = ("--arch", folder, *FEW, "--target-modules", "k_proj")
    package = tmp_path / "out" / "model_r4"
    digests = set()
    for asked, names in (
        ((), []),
        (("experts.gate_up_proj",), ["gate_up_proj"]),
        (("down_proj,gate_up_proj",), ["gate_up_proj", "down_proj"]),
        (("mlp.experts.gate_up_proj", "down_proj"), ["gate_up_proj", "down_proj"]),
    ):
        words = [word for name in asked for word in ("--target-parameters", name)]
        outcome = run(*options, *words, "-o", tmp_path / "out")
        assert outcome.code == 0
        assert ("experts: ask for them with target_parameters" in outcome.err) == (len(names) < 2)
        found = manifest(package)
        SCHEMA.validate(found)
        digests.add(found["digest"])
        assert [stack["name"] for stack in found["stacks"]] == names
        parameters = [f"mlp.experts.{name}" for name in names]
        assert found["workload"]["target_parameters"] == parameters
        said = f" --target-parameters {','.join(parameters)} " if names else " --target-modules k_proj --adapter-dtype "
        assert said in found["command"]
        assert run(*options, *words, "-o", tmp_path / "out", "--check", "-q").ok().out == ""
    assert len(digests) == 3
    whole = ("--arch", package / "manifest.json", *FEW, "--name", "model", "-o", tmp_path / "again")
    run(*whole, "--target-parameters", "gate_up_proj,down_proj", "--target-modules", "all-linear").ok()
    again = manifest(tmp_path / "again" / "model_r4")
    assert [again[kind] for kind in ("projections", "stacks")] == [found[kind] for kind in ("projections", "stacks")]


def test_a_name_is_of_the_package_and_in_its_command(run, small: tuple[str, ...], tmp_path: Path) -> None:
    run(*small, "--name", "My-Model", "-o", tmp_path).ok()
    (folder,) = tmp_path.iterdir()
    assert folder.name == "my_model_r4"
    written = manifest(folder)
    assert written["arch"] == "my_model"
    assert written["command"].startswith(
        "runlora-gen --arch llama-9m --rank 4 --name my_model --target-modules q_proj "
    )
    words = written["command"].split()[1:-2]
    assert run(*words, "-o", tmp_path, "--check").ok().out == ""
    assert run(*small, "-o", tmp_path, "--check").code == 1  # without it, it is another package


def test_a_cached_model_is_recorded_by_its_name(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "hub" / "models--some-one--Tiny-2.5"
    config(model / "snapshots" / "abc", model_type="qwen2")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    options = ("--arch", "some-one/Tiny-2.5", *FEW, "--target-modules", "k_proj", "-o", tmp_path / "out")
    run(*options).ok()
    written = manifest(tmp_path / "out" / "tiny_2_5_r4")
    assert written["command"].startswith("runlora-gen --arch some-one/Tiny-2.5 --rank 4 ")
    run(*options, "--check").ok()
    assert f"Hugging Face cache {tmp_path / 'hub'}" in run("--arch", "some-one/Else", "--rank", "4").error()


def test_other_spellings_are_the_same_command(run, small: tuple[str, ...], tmp_path: Path) -> None:
    base = [word for word in small if word not in ("--target-modules", "q_proj")]
    run(*base, "--tokens", "2k,4096", "-o", tmp_path).ok()
    spelled = ("--tokens", "2048", "--tokens", "4K", "--dtype", "bfloat16", "--target-modules", "all-linear")
    assert run(*base, *spelled, "--adapter-dtype", "bfloat16", "-o", tmp_path, "--check").ok().out == ""
    command = manifest(tmp_path / "llama_9m_r4")["command"]
    assert "--tokens 2048,4096" in command and "all-linear" not in command and "bfloat16" not in command
