"""manifest.json and ``explain --json``: what the published schemas say, and numbers that agree."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from runlora_gen.emit import package, report
from runlora_gen.emit.style import Style

SCHEMAS = Path(package.__file__).parent
SMALL = ("--arch", "llama-9m", "--target-modules", "q_proj")
SPECS = {
    "llama": ("--arch", "llama-9m", "--rank", "8", "--adapter-dtype", "bf16"),
    "casts": (*SMALL, "--rank", "8", "--no-kernels", "--launch", "graph"),
    "gpt2": ("--arch", "gpt2", "--rank", "4", "--target-modules", "c_attn", "--train", "b", "--criterion", "memory"),
    "fp32": (*SMALL, "--rank", "16", "--dtype", "fp32", "--device", "cpu"),
    "first": (*SMALL, "--rank", "4", "--no-input-grad", "--train", "a", "--max-saved-bytes", "99999999"),
    "lossy": (*SMALL, "--rank", "64", "--no-kernels", "--train", "b", "--allow-lossy-merge", "--tokens", "100000"),
}


@functools.cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module", autouse=True)
def _unformatted() -> Iterator[None]:
    """Of the text of modules there are digests here, and black takes longest of all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Style, "format", lambda self, source: source)
        yield


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


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The manifest of a module that merges at many tokens: below the asked count it has another range."""
    out = tmp_path_factory.mktemp("merged")
    run(*SMALL, "--rank", "4", "--dtype", "fp32", "--device", "cpu", "--tokens", "65536", "-o", out).ok()
    manifest: dict[str, Any] = json.loads((out / "llama_9m_r4" / "manifest.json").read_text())
    first, last = manifest["layers"][0]["ranges"]
    assert first["programs"] == 0 < last["programs"] and last["chosen"] != last["on_16_bit_weights"]
    return manifest


def test_both_follow_their_schemas(both) -> None:
    _, manifest, explained = both
    validator("manifest").validate(manifest)
    validator("explain").validate(explained)
    assert manifest["schema_version"] == explained["schema_version"] == report.SCHEMA_VERSION
    assert package.MANIFEST_SCHEMA == "manifest.schema.json"


def test_gated_mlps_have_a_list_of_their_own(run, tmp_path: Path) -> None:
    """In both, with what is between; of the linears of one there is no group."""
    spec = ("--arch", "llama-13b", "--rank", "8", "--launch", "graph", "--device", "a100")
    run(*spec, "-o", tmp_path).ok()
    folder = tmp_path / "llama_13b_r8"
    manifest = json.loads((folder / "manifest.json").read_text())
    explained = json.loads(run("explain", *spec, "--json").ok().out)
    validator("manifest").validate(manifest)
    validator("explain").validate(explained)
    (made,), (said,) = manifest["mlps"], explained["mlps"]
    assert made["module"] == "mlp_5120x13824_r8" == f"{said['name']}_r8" and (folder / f"{made['module']}.py").is_file()
    for one in (made, said):
        assert one["activation"] == "silu_gated" and "linears" not in made and said["linears"] == ["gate", "up", "down"]
        assert (one["in_features"], one["intermediate_features"], one["out_features"]) == (5120, 13824, 5120)
        assert one["count"] == 40 and one["projections"] == [["gate_proj", "up_proj", "down_proj"]]
    assert said["chosen"] == made["ranges"][-1]["chosen"]
    assert [group["linears"] for group in manifest["groups"]] == [["q", "k", "v"]]
    assert [group["linears"] for group in explained["groups"]] == [["q", "k", "v"]]
    assert "mlps.py" in manifest["files"] and manifest["gated"]
    for document, name in ((manifest, "manifest"), (explained, "explain")):
        for key, value in (("activation", "none"), ("intermediate_features", 0), ("projections", [["gate", "up"]])):
            changed = copy.deepcopy(document)
            changed["mlps"][0][key] = value
            assert not validator(name).is_valid(changed), key
        del changed["mlps"][0]["activation"]
        assert not validator(name).is_valid(changed)
    shown = run(*spec, "-o", tmp_path, "--check", "--verbose")
    assert shown.code == 0
    assert f"mlp_5120x13824: {made['ranges'][-1]['chosen']}" in shown.err


def test_the_layout_is_in_the_command_alone(run, tmp_path: Path) -> None:
    found = []
    for layout in ("standalone", "folder"):
        run(*SMALL, "--rank", "4", "--no-kernels", "--layout", layout, "-o", tmp_path / layout).ok()
        found.append(json.loads((tmp_path / layout / "llama_9m_r4" / "manifest.json").read_text()))
        validator("manifest").validate(found[-1])
    standalone, folder = found
    assert folder["command"] == standalone["command"].replace(" -o .", " --layout folder -o .")
    assert folder["files"].keys() - standalone["files"].keys() == {"autograd.py", "base.py", "products.py"}
    for manifest in found:
        for key in ("command", "digest", "files", "rendered"):
            del manifest[key]
    assert standalone == folder


def test_dropout_is_in_the_command_and_in_the_workload(run, tmp_path: Path) -> None:
    """To the last digit, and not at all where there is none."""
    for dropout, words in (("0.123456789", " --dropout 0.123456789 "), ("1e-5", " --dropout 1e-05 "), ("0.0", "")):
        out = tmp_path / dropout
        run(*SMALL, "--rank", "4", "--no-kernels", "--dropout", dropout, "-o", out).ok()
        manifest = json.loads((out / "llama_9m_r4" / "manifest.json").read_text())
        validator("manifest").validate(manifest)
        assert manifest["workload"]["dropout"] == float(dropout)
        assert words in manifest["command"] and ("--dropout" in manifest["command"]) == bool(words)
        run(*manifest["command"].split()[1:-1], out, "--check").ok()
        text = run("explain", *SMALL, "--rank", "4", "--no-kernels", "--dropout", dropout, "--json").ok().out
        explained = json.loads(text)
        validator("explain").validate(explained)
        kept = {name for layer in explained["layers"] for each in layer["variants"] for name in each["keeps"]}
        assert kept == ({"S", "K", "H", "A", "B"} if words else {"S", "M", "D", "A", "B"})


@pytest.mark.parametrize(
    ("arch", "bias"), [("llama-9m", "lora_bias"), ("gpt2", "all"), ("gpt2", "lora_only"), ("gpt2", "none")]
)
def test_trained_biases_are_in_the_command_and_priced(run, tmp_path: Path, arch: str, bias: str) -> None:
    """Their gradient is one more pass over dY in every program; what is generated can give it in any case."""
    narrow = ("--rank", "4", "--no-kernels", "--adapter-dtype", "bf16")
    options = ("--arch", arch, *narrow, "--groups", "none")
    run(*options, "--bias", bias, "-o", tmp_path).ok()
    folder = tmp_path / f"{arch.replace('-', '_')}_r4"
    manifest = json.loads((folder / "manifest.json").read_text())
    validator("manifest").validate(manifest)
    assert manifest["workload"]["bias"] == bias
    assert (f" --bias {bias} " in manifest["command"]) == (bias != "none")
    run(*manifest["command"].split()[1:-1], tmp_path, "--check").ok()
    for module in folder.glob("linear_*.py"):
        assert ("db = Σₜ dY" in module.read_text(encoding="utf-8").replace("  ", " ")) == (bias != "none")
        assert re.search("^TRAINS = .*bias", module.read_text(encoding="utf-8"), re.M)
    frozen, trained = (
        json.loads(run("explain", *options, *more, "--json").ok().out) for more in ((), ("--bias", bias))
    )
    validator("explain").validate(trained)
    for before, layer in zip(frozen["layers"], trained["layers"], strict=True):
        costs = {variant["id"]: variant for variant in before["variants"]}
        bytes_of_bias = layer["out_features"] * 2
        more = 4096 * bytes_of_bias + bytes_of_bias if bias != "none" else 0
        more += bytes_of_bias if bias == "lora_bias" else 0  # these linears read none else
        for variant in layer["variants"]:
            assert variant["bytes_moved"] - costs[variant["id"]]["bytes_moved"] == more
            assert variant["launches"] - costs[variant["id"]]["launches"] == (bias != "none")
            assert (variant["time_us"] > costs[variant["id"]]["time_us"]) == (bias != "none")
        assert layer["chosen"] == before["chosen"]
    peft = [data["model"]["peft"]["device_us"] for data in (frozen, trained)]
    assert (peft[1] > peft[0]) == (bias != "none")
    text = run("explain", *options, "--bias", bias).ok().out
    assert ("biases trained" in text) == (bias != "none")


def test_ranges_follow_the_schema(generated_once: Path) -> None:
    manifest = json.loads((generated_once / "llama_9m_r4" / "manifest.json").read_text())
    validator("manifest").validate(manifest)
    (layer,) = manifest["layers"]
    assert len(layer["ranges"]) > 1 and len(layer["forwards"]) > 1
    for ranges in (layer["ranges"], layer["forwards"]):
        *ends, last = (part["last_tokens"] for part in ranges)
        assert last is None and ends == sorted(set(ends))
        for part, end in zip(ranges, ends, strict=False):
            assert part["tokens"] <= end


def test_below_the_asked_counts_only_the_winners_were_sought(merged: dict[str, Any], both) -> None:
    """They are named with their prices; that nothing else was priced is said, too."""
    for manifest in (merged, both[1]):
        asked, by_time = manifest["workload"]["tokens"], manifest["workload"]["criterion"] == "time"
        limited = manifest["workload"]["max_saved_bytes"] is not None
        for part in (part for layer in manifest["layers"] for part in layer["ranges"]):
            sought = part["tokens"] in asked or not by_time or limited
            assert (part["programs"] > 0) == (part["pareto"] > 0) == bool(part["reason"]) == sought
            assert (part["runner_up"] is not None) == sought
            if not sought:
                ids = {variant["id"] for variant in part["variants"]}
                assert ids == {part["chosen"], part["on_16_bit_weights"]}
                assert not any(variant["pareto"] for variant in part["variants"])


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every object below a value, one item of each list."""
    if isinstance(value, dict):
        yield path
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


@pytest.mark.parametrize("name", ["manifest", "explain"])
def test_schemas_are_strict(run, merged: dict[str, Any], name: str) -> None:
    """Nothing may be added anywhere, and nothing left out."""
    document = copy.deepcopy(merged)
    if name == "explain":
        document = json.loads(run("explain", "--json", *SMALL, "--rank", "4", "--dtype", "fp32").ok().out)
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
        if path and path[-1] in ("files", "rendered"):
            continue
        for key in list(target):
            kept = target.pop(key)
            assert not schema.is_valid(changed), (*path, key)
            target[key] = [kept]
            # The only lists of lists in here are none.
            assert not schema.is_valid(changed), (*path, key)
            target[key] = kept
        assert schema.is_valid(changed)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 1),
        (("workload", "adapter_dtype"), "fp64"),
        (("layers", 0, "ranges", -1, "host_share"), 1.5),
        (("layers", 0, "ranges", -1, "host_share"), -0.1),
        (("layers", 0, "ranges", -1, "reason"), ""),
        (("layers", 0, "ranges", -1, "pareto"), 0),
        (("layers", 0, "ranges", -1, "programs"), 0),
        (("layers", 0, "ranges", 0, "reason"), "x"),
        (("layers", 0, "ranges", 0, "pareto"), 1),
        (("layers", 0, "ranges", 0, "runner_up"), "a/b/keep-nothing"),
        (("layers", 0, "forwards"), []),
        (("layers", 0, "forwards", 0, "chosen"), "merged/merged"),
        (("layers", 0, "ranges", -1, "variants", 0, "host_us"), 0),
        (("layers", 0, "ranges", -1, "variants", 0, "device_us"), None),
        (("layers", 0, "ranges", -1, "variants", 0, "keeps"), ["lora_A"]),
        (("layers", 0, "ranges", -1, "variants", 0, "keeps"), ["A", "A"]),
    ],
    ids=str,
)
def test_what_no_manifest_may_hold(merged: dict[str, Any], path: tuple, value: object) -> None:
    document = copy.deepcopy(merged)
    *above, last = path
    target: Any = document
    for step in above:
        target = target[step]
    assert validator("manifest").is_valid(document) and target[last] != value
    target[last] = value
    assert not validator("manifest").is_valid(document)


def test_the_issue_s_fields_are_there(both) -> None:
    _, _, explained = both
    top = ["schema_version", "arch", "rank", "tokens", "dtype", "adapter_dtype", "base", "device"]
    top += ["launch", "model", "layers", "groups", "mlps", "experts"]
    assert list(explained) == top
    for layer in explained["layers"]:
        wanted = ["name", "in_features", "out_features", "rank", "count", "projections", "chosen", "variants"]
        assert [key for key in layer if key in wanted] == wanted
        assert set(layer) - set(wanted) == {"host_share", "on_16_bit_weights", "runner_up", "reason"}
        for variant in layer["variants"]:
            wanted = ["id", "forward", "backward", "paper", "flops", "saved_bytes", "workspace_bytes", "bytes_moved"]
            assert {*wanted, "launches", "time_us", "update_error", "pareto"} == set(variant) - {
                "keeps",
                "paper_labels",
                "by_kernel",
                "device_us",
                "host_us",
            }
            share = layer["host_share"]
            weighted = share * variant["host_us"] + (1 - share) * variant["device_us"]
            assert variant["time_us"] == pytest.approx(weighted, abs=2e-3)


def test_manifest_and_explain_agree(both) -> None:
    _, manifest, explained = both
    assert [layer["module"] for layer in manifest["layers"]] == [
        f"linear_{layer['name']}_r{layer['rank']}" for layer in explained["layers"]
    ]
    for made, said in zip(manifest["layers"], explained["layers"], strict=True):
        part = made["ranges"][-1]
        for key in ("chosen", "on_16_bit_weights", "runner_up", "reason", "host_share"):
            assert part[key] == said[key]
        for key in ("in_features", "out_features", "rank", "count", "projections"):
            assert made[key] == said[key]
        # Of all that explain lists the manifest has what mattered, and says how many there were.
        everything = {variant["id"]: variant for variant in said["variants"]}
        assert part["programs"] == len(everything) == len(said["variants"])
        front = {name for name, variant in everything.items() if variant["pareto"]}
        assert part["pareto"] == len(front)
        wanted = {*front, part["chosen"], part["on_16_bit_weights"], part["runner_up"]}
        assert {variant["id"]: variant for variant in part["variants"]} == {name: everything[name] for name in wanted}
        assert len(part["variants"]) == len(wanted)


def test_the_manifest_of_the_main_job_is_small(run, tmp_path: Path) -> None:
    """And holds what people ask it for: it had 800 KB, with everything in it."""
    run("--arch", "llama-13b", "--rank", "8", "-o", tmp_path).ok()
    path = tmp_path / "llama_13b_r8" / "manifest.json"
    assert path.stat().st_size <= 60_000
    manifest = json.loads(path.read_text())
    validator("manifest").validate(manifest)
    assert len(manifest["layers"]) == 3
    for layer in manifest["layers"]:
        part = layer["ranges"][-1]
        ids = [variant["id"] for variant in part["variants"]]
        assert {part["chosen"], part["on_16_bit_weights"], part["runner_up"]} <= set(ids)
        assert part["programs"] == 1180
        assert sum(variant["pareto"] for variant in part["variants"]) == part["pareto"] > 1


def test_one_is_chosen_and_it_is_on_the_front(both) -> None:
    _, manifest, explained = both
    for layer in explained["layers"]:
        ids = [variant["id"] for variant in layer["variants"]]
        assert len(ids) == len(set(ids)) and ids.count(layer["chosen"]) == 1
        assert next(v for v in layer["variants"] if v["id"] == layer["chosen"])["pareto"]
        for variant in layer["variants"]:
            kept = "-".join(s.lower() for s in variant["keeps"]) or "nothing"
            kernels = "-".join(s.lower() for s in variant["by_kernel"])
            suffix = f"/kernel-{kernels}" if kernels else ""
            assert variant["id"] == f"{variant['forward']}/{variant['backward']}/keep-{kept}{suffix}"
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
