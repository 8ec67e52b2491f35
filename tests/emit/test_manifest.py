"""manifest.json and ``explain --json``: what the published schemas say, and numbers that agree."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from runlora_gen.emit import package, report

SCHEMAS = Path(package.__file__).parent
SPECS = {
    "llama": ("--arch", "llama-9m", "--rank", "8"),
    "gpt2": ("--arch", "gpt2", "--rank", "4", "--target-modules", "c_attn", "--train", "b", "--criterion", "memory"),
    "fp32": (
        "--arch",
        "roberta-base",
        "--rank",
        "16",
        "--target-modules",
        "query",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
    ),
    "first": ("--arch", "vit-base", "--rank", "4", "--no-input-grad", "--train", "a", "--max-saved-bytes", "99999999"),
    "lossy": ("--arch", "qwen2.5-7b", "--rank", "64", "--target-modules", "v_proj", "--allow-lossy-merge"),
}


def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module", params=SPECS)
def both(request: pytest.FixtureRequest, run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict]:
    """A package's folder, its manifest, and what explain says of the same spec."""
    spec = SPECS[request.param]
    out = tmp_path_factory.mktemp(request.param)
    run(*spec, "-o", out).ok()
    (folder,) = out.iterdir()
    return (
        folder,
        json.loads((folder / "manifest.json").read_text()),
        json.loads(run("explain", *spec, "--json").ok().out),
    )


def test_both_follow_their_schemas(both) -> None:
    _, manifest, explained = both
    validator("manifest").validate(manifest)
    validator("explain").validate(explained)
    assert manifest["schema_version"] == explained["schema_version"] == report.SCHEMA_VERSION
    assert package.MANIFEST_SCHEMA == "manifest.schema.json"


def test_ranges_follow_the_schema(generated_once: Path) -> None:
    manifest = json.loads((generated_once / "llama_9m_r4" / "manifest.json").read_text())
    validator("manifest").validate(manifest)
    (layer,) = manifest["layers"]
    assert len(layer["ranges"]) > 1


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every object below a value, one item of each list."""
    if isinstance(value, dict):
        yield path
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


@pytest.mark.parametrize("name", ["manifest", "explain"])
def test_schemas_are_strict(run, generated_once: Path, name: str) -> None:
    """Nothing may be added anywhere, and nothing left out."""
    if name == "manifest":
        document = json.loads((generated_once / "llama_9m_r4" / "manifest.json").read_text())
    else:
        arguments = ("explain", "--json", "--arch", "llama-9m", "--target-modules", "q_proj", "--rank", "4")
        document = json.loads(run(*arguments).ok().out)
    for layer in document["layers"]:
        for part in layer.get("ranges", [layer]):
            del part["variants"][3:]
    schema = validator(name)
    assert schema.is_valid(document)
    found = list(places(document))
    assert len(found) >= 4
    for path in found:
        changed = copy.deepcopy(document)
        target = changed
        for step in path:
            target = target[step]
        target["surprise"] = 1
        assert not schema.is_valid(changed), path
        del target["surprise"]
        if path and path[-1] == "files":
            continue
        for key in list(target):
            kept = target.pop(key)
            assert not schema.is_valid(changed), (*path, key)
            target[key] = kept
        assert schema.is_valid(changed)


def test_the_issue_s_fields_are_there(both) -> None:
    _, _, explained = both
    assert list(explained) == ["schema_version", "arch", "rank", "tokens", "dtype", "device", "layers"]
    for layer in explained["layers"]:
        wanted = ["name", "in_features", "out_features", "rank", "count", "projections", "chosen", "variants"]
        assert list(layer) == wanted
        for variant in layer["variants"]:
            wanted = ["id", "forward", "backward", "paper", "flops", "saved_bytes", "workspace_bytes", "bytes_moved"]
            assert {*wanted, "launches", "time_us", "update_error", "pareto"} == set(variant) - {
                "keeps",
                "paper_labels",
                "by_kernel",
            }


def test_manifest_and_explain_agree(both) -> None:
    _, manifest, explained = both
    assert [layer["module"] for layer in manifest["layers"]] == [
        f"linear_{layer['name']}_r{layer['rank']}" for layer in explained["layers"]
    ]
    for made, said in zip(manifest["layers"], explained["layers"], strict=True):
        (part,) = made["ranges"]
        assert part["variants"] == said["variants"]
        assert part["chosen"] == said["chosen"]
        for key in ("in_features", "out_features", "rank", "count", "projections"):
            assert made[key] == said[key]


def test_one_is_chosen_and_it_is_on_the_front(both) -> None:
    _, manifest, explained = both
    for layer in explained["layers"]:
        ids = [variant["id"] for variant in layer["variants"]]
        assert len(ids) == len(set(ids)) and ids.count(layer["chosen"]) == 1
        assert next(v for v in layer["variants"] if v["id"] == layer["chosen"])["pareto"]
        for variant in layer["variants"]:
            kept = "-".join(s.lower() for s in variant["keeps"]) or "nothing"
            assert variant["id"] == f"{variant['forward']}/{variant['backward']}/keep-{kept}"
            assert variant["paper"] == (variant["paper_labels"] or [None])[0]
    for layer in manifest["layers"]:
        for part in layer["ranges"]:
            assert {part["chosen"], part["on_16_bit_weights"]} <= {variant["id"] for variant in part["variants"]}


def test_files_are_listed_with_their_digests(both) -> None:
    folder, manifest, _ = both
    found = {p.name: f"sha256:{hashlib.sha256(p.read_bytes()).hexdigest()}" for p in folder.iterdir()}
    del found["manifest.json"]
    assert manifest["files"] == found


def test_gpt2_says_that_its_weights_are_transposed(run, tmp_path: Path) -> None:
    run(*SPECS["gpt2"], "-o", tmp_path).ok()
    folder = tmp_path / "gpt2_r4"
    manifest = json.loads((folder / "manifest.json").read_text())
    (layer,) = manifest["layers"]
    assert layer["transposed_weight"] == ["c_attn"] and layer["bias"]
    assert "pass weight.t()" in (folder / f"{layer['module']}.py").read_text()
