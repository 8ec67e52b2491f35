"""``explain``: what is shown of the whole model and of each shape, and that it is true."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
from runlora_gen import emit
from runlora_gen.cost.device import load_device

SCHEMA = jsonschema.Draft202012Validator(
    json.loads((Path(emit.__file__).parent / "explain.schema.json").read_text(encoding="utf-8"))
)

SPEC = ("--arch", "llama-9m", "--target-modules", "q_proj", "--rank", "8", "--tokens", "4096")
#: With adapters in the activations' dtype, of which no casts are kept or not kept, there are fewer programs.
NARROW = ("--adapter-dtype", "bf16")


@pytest.fixture(scope="module")
def layer(run) -> dict:
    (layer,) = json.loads(run("explain", *SPEC, *NARROW, "--json").ok().out)["layers"]
    return layer


def rows(text: str) -> dict[str, str]:
    """Table rows by the variant's id."""
    return {match[2]: match[0] for match in re.finditer(r"^([→ ][* ]) +(\S+/\S+/keep-\S+).*$", text, re.M)}


def test_shows_the_front_the_paper_s_and_the_chosen(run, layer: dict) -> None:
    text = run("explain", *SPEC, *NARROW, "--variants").ok().out
    shown = rows(text)
    expected = {v["id"] for v in layer["variants"] if v["pareto"] or v["paper"] or v["id"] == layer["chosen"]}
    assert set(shown) == expected and len(expected) >= 24
    for variant in layer["variants"]:
        if variant["id"] in shown:
            row = shown[variant["id"]]
            assert (row[0] == "→") == (variant["id"] == layer["chosen"])
            assert (row[1] == "*") == variant["pareto"]
            assert f" {variant['launches']} " in row
            assert f"{variant['time_us']:,.1f}" in row
            if variant["paper"]:
                assert variant["paper"].replace("forward2/", "forward2|4/") in row
    assert f"→ chosen: {layer['chosen']} " in text
    assert text.count("→") == 2 and "the runner-up lost: " in text
    assert "128x128  rank 8  (q_proj; " in text and "4096 tokens, bf16, NVIDIA H100" in text


def test_all_shows_every_program_by_time(run, layer: dict) -> None:
    shown = rows(run("explain", *SPEC, *NARROW, "--all").ok().out)
    assert set(shown) == {v["id"] for v in layer["variants"]} and len(shown) == 310
    times = {v["id"]: v["time_us"] for v in layer["variants"]}
    assert [times[i] for i in shown] == sorted(times.values())


@pytest.fixture(scope="module")
def model(run) -> dict:
    return json.loads(
        run("explain", "--arch", "llama-13b", "--rank", "8", "--no-kernels", "--groups", "none", "--json").ok().out
    )


def test_starts_with_three_lines_for_the_whole_model(run, model: dict) -> None:
    arguments = ("explain", "--arch", "llama-13b", "--rank", "8", "--no-kernels", "--groups", "none")
    time, memory, decides, *rest = run(*arguments).ok().out.splitlines()
    found = model["model"]
    ours, frozen, peft = (found[name] for name in ("ours", "frozen", "peft"))
    assert time.startswith("time     ") and f": {ours['time_us'] / frozen['time_us']:.2f} × frozen (" in time
    assert f"), {ours['time_us'] / peft['time_us']:.2f} × PEFT (" in time
    assert f"({round(frozen['time_us'] / 1e3)} ms)" in time
    assert memory == (
        f"memory   {ours['kept_bytes'] / 2**30:.4g} GiB kept for the backward; "
        f"PEFT {peft['kept_bytes'] / 2**30:.4g} GiB, frozen 0 B"
    )
    assert decides == (
        f"decides  the device ({round(found['step']['device_us'] / 1e3)} ms a step; "
        f"the host {round(found['step']['host_us'] / 1e3)} ms): kernels in 0 of 3 shapes"
    )
    assert rest[0] == "" and rest[1].startswith("280 LoRA linears of llama-13b, rank 8, 4096 tokens, bf16, NVIDIA")


def test_then_a_line_a_shape(run, model: dict) -> None:
    lines = (
        run(*["explain", "--arch", "llama-13b", "--rank", "8", "--no-kernels", "--groups", "none"])
        .ok()
        .out.splitlines()[-3:]
    )
    assert "projections" not in lines[0]
    for line, layer, names in zip(lines, model["layers"], ("q,k,v,o_proj", "gate,up_proj", "down_proj"), strict=True):
        chosen = next(variant for variant in layer["variants"] if variant["id"] == layer["chosen"])
        count, shape, program, ratio, projections = line.split()
        assert (int(count), shape, projections) == (layer["count"], layer["name"], names)
        assert program == f"{chosen['forward']}/{chosen['backward']}" and 1 < float(ratio) < 2


def test_the_model_is_the_sum_of_its_linears(model: dict) -> None:
    """Inputs that several linears read are kept once: of a layer four, where seven linears read them."""
    kept = 0
    ours = {"device_us": 0.0, "host_us": 0.0}
    for layer in model["layers"]:
        chosen = next(variant for variant in layer["variants"] if variant["id"] == layer["chosen"])
        assert chosen["keeps"] == ["S", "A", "B"]
        for key in ours:
            ours[key] += layer["count"] * chosen[key]
        kept += layer["count"] * (chosen["saved_bytes"] - 4096 * layer["in_features"] * 2)
    for key, value in ours.items():
        assert model["model"]["ours"][key] == pytest.approx(value, rel=1e-4)
    assert model["model"]["ours"]["kept_bytes"] == kept + 40 * 4096 * 2 * (3 * 5120 + 13824)
    # PEFT casts X for each of them.
    assert model["model"]["peft"]["kept_bytes"] == kept + 40 * 4096 * 2 * (6 * 5120 + 13824)
    assert model["model"]["linears"] == 280


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("llama-9m", "--tokens", "128"), "decides  the host ("),
        (("llama-13b", "--launch", "graph"), " a step), under CUDA graphs: kernels in 3 of 3 shapes"),
        (("llama-13b", "--launch", "compile"), " compiled): kernels in 3 of 3 shapes"),
        (("llama-9m", "--launch", "compile", "--tokens", "128"), "decides  the host ("),
        (("llama-9m", "--criterion", "memory"), "decides  least memory; the host ("),
        (("llama-13b", "--tokens", "3072", "--dtype", "fp16", "--criterion", "flops"), "decides  fewest FLOPs; "),
        (("llama-13b", "--tokens", "768", "--adapter-dtype", "bf16"), "decides  device and host alike ("),
        (("llama-3.1-405b", "--tokens", "1048576"), "decides  the device ("),
        (("roberta-base", "--tokens", "512", "--no-kernels"), "decides  the host ("),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_fits_eighty_columns(run, arguments: tuple[str, ...], text: str) -> None:
    lines = run("explain", "--rank", "8", "--arch", *arguments).ok().out.splitlines()
    assert text in lines[2]
    assert ("PEFT unfused (" in lines[0]) == ("compile" in arguments)
    assert max(map(len, lines)) <= 80


def test_json_is_the_same_with_all(run) -> None:
    assert run("explain", *SPEC, "--json", "--all").ok().out == run("explain", *SPEC, "--json").ok().out


def test_says_what_runs_on_16_bit_weights(run) -> None:
    text = run("explain", *SPEC, "--dtype", "fp32", "--device", "cpu", "--variants").ok().out
    assert re.search(r"→ chosen: merged/.*\n.*\n.*\n  on 16-bit weights: (?!merged)\S+/keep-", text)


def test_no_line_is_cut_and_nothing_is_coloured_in_a_pipe(run) -> None:
    text = run("explain", "--arch", "llama-3.1-405b", "--rank", "8", "--all", "--groups", "none", *NARROW).ok().out
    assert "\x1b" not in text and "…" not in text
    programs = {name.split("/kernel-")[0] for name in rows(text)}
    assert len(programs) == 310  # the same for each shape, some with kernels for single products
    assert max(map(len, text.splitlines())) <= 180


@pytest.fixture(scope="module")
def grouped(run) -> dict:
    return json.loads(run("explain", "--arch", "llama-13b", "--rank", "8", "--json").ok().out)


def test_groups_have_lines_and_the_linears_in_them_none(run, grouped: dict) -> None:
    lines = run("explain", "--arch", "llama-13b", "--rank", "8").ok().out.splitlines()
    table = [line.split() for line in lines if "/" in line and re.match(r" *\d+ (\w+_)?\d+x\d+ ", line)]
    assert [(row[0], row[1]) for row in table] == [
        ("40", "qkv_5120x5120"),
        ("40", "mlp_5120x13824"),
        ("40", "5120x5120"),
    ]
    assert len(grouped["groups"]) == len(grouped["mlps"]) == 1
    for row, group in zip(table, (*grouped["groups"], *grouped["mlps"]), strict=False):
        chosen = next(variant for variant in group["variants"] if variant["id"] == group["chosen"])
        # Names that are too long go on in the next line, after a part of them.
        assert len(row[2]) > 10 and f"{chosen['forward']}/{chosen['backward']}".startswith(row[2])
        assert row[2][-1] in "/-"
        assert row[4] == ",".join(group["linears"])


def test_the_model_is_the_sum_of_its_groups_and_what_is_in_none(grouped: dict) -> None:
    """Less what the model is spared: three sums of gradients, of q, k and v and of gate and up, and what is between."""

    def chosen(site: dict) -> dict:
        return next(variant for variant in site["variants"] if variant["id"] == site["chosen"])

    device = load_device("h100")
    sums = (3 * 4096 * 5120 * 2 / device.bytes_per_s + device.launch_s) * 1e6
    # act(gate), times up; the gradients of gate in two passes, and of up.
    between = ((2 + 3 + 3 + 3 + 3) * 4096 * 13824 * 2 / device.bytes_per_s + 5 * device.launch_s) * 1e6
    ((qkv,), (mlp,)), (attention, *_) = (grouped["groups"], grouped["mlps"]), grouped["layers"]
    each = sum(chosen(site)["device_us"] for site in (qkv, mlp, attention))
    expected = 40 * (each - 3 * sums - between)
    assert grouped["model"]["ours"]["device_us"] == pytest.approx(expected, rel=1e-4)
    assert grouped["model"]["linears"] == 280


def test_no_groups_by_request(run) -> None:
    found = json.loads(run("explain", "--arch", "llama-13b", "--rank", "8", "--groups", "none", "--json").ok().out)
    assert found["groups"] == []


# Experts


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with a linear and 8 experts, by its manifest."""
    common = {"experts": 8, "top_k": 2, "bias": False, "count": 2, "layout": "out_in", "module": "mlp.experts"}
    values = {
        "generator": "runlora-gen",
        "arch": "mine",
        "model_type": "mixtral",
        "projections": [
            {
                "name": "q_proj",
                "in_features": 128,
                "out_features": 128,
                "bias": False,
                "count": 2,
                "input": "attn_in",
                "layout": "out_in",
            }
        ],
        "stacks": [
            {"name": "gate_up_proj", "in_features": 128, "out_features": 192, "gathers": True, **common},
            {"name": "down_proj", "in_features": 96, "out_features": 128, "gathers": False, **common},
        ],
    }
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "manifest.json").write_text(json.dumps(values))
    return folder / "manifest.json"


def test_experts_have_lines_beside_linears_and_alone(run, mixture: Path) -> None:
    """The whole model is their sum, too, and what decides is one step of all of them."""
    spec = ("explain", "--arch", mixture, "--rank", "4", "--target-parameters", "gate_up_proj,down_proj", *NARROW)
    for more, linears, counted in (
        ((), 0, "LoRA on 4 stacks of experts of mine"),
        (("--target-modules", "q_proj"), 2, "2 LoRA linears and 4 stacks of experts of mine"),
    ):
        found = json.loads(run(*spec, *more, "--json").ok().out)
        SCHEMA.validate(found)
        model, of_shapes = found["model"], [*found["layers"], *found["experts"]]
        assert (model["linears"], model["stacks"]) == (linears, 4) and len(found["layers"]) == bool(linears)
        assert [site["projections"] for site in found["experts"]] == [["gate_up_proj"], ["down_proj"]]
        chosen = [next(v for v in site["variants"] if v["id"] == site["chosen"]) for site in of_shapes]
        assert model["ours"]["device_us"] == pytest.approx(2 * sum(each["device_us"] for each in chosen), rel=1e-4)
        assert len({site["host_share"] for site in of_shapes} | {model["host_share"]}) == 1
        # What is combined to tokens is kept for the gradient of the router's weights by all but us.
        rows = 2 * 4096 * 2 * 128 * 2
        assert model["frozen"]["kept_bytes"] == rows and model["peft"]["kept_bytes"] > rows
        measured = run(*spec, *more).ok().out
        assert "roofline" not in measured, "this machine's profile holds times of experts"
        dropped = run(*spec, *more, "--dropout", "0.1").ok().out
        assert dropped.splitlines()[3] == "PEFT     has no dropout on experts: it is priced without"
        lines = run(*spec, *more, "--device", "h200").ok().out.splitlines()
        assert lines[3] == "experts  by the bare roofline, which flatters the frozen ones; tune measures"
        assert lines[5].startswith(f"{counted}, rank 4, 4096 tokens") and max(map(len, lines)) <= 80
        text = "\n".join(lines)
        assert "gathered_experts" in text and "combined_experts" in text and ("q_proj" in text) == bool(linears)


def test_modules_of_experts_claim_no_measurement(run, mixture: Path, tmp_path: Path) -> None:
    """As explain says: that profile holds no times of their products, though it holds those of linears."""
    spec = ("--arch", mixture, "--rank", "4", "--target-modules", "q_proj", "--device", "h200")
    run(*spec, "--target-parameters", "gate_up_proj,down_proj", "-o", tmp_path / "out").ok()
    said = {path.name: " ".join(path.read_text().split()) for path in (tmp_path / "out").rglob("*_r4.py")}
    assert len(said) == 3
    for name, text in said.items():
        assert "Priced at" in text and ("by what was measured on" in text) == name.startswith("linear"), name


def test_variants_of_experts(run, mixture: Path) -> None:
    spec = ("explain", "--arch", mixture, "--rank", "4", "--target-parameters", "down_proj", *NARROW)
    (site,) = json.loads(run(*spec, "--json").ok().out)["experts"]
    assert (site["experts"], site["top_k"], site["gathers"]) == (8, 2, False)
    text = run(*spec, "--variants").ok().out
    front = {variant["id"] for variant in site["variants"] if variant["pareto"]}
    assert set(rows(text)) == front | {site["chosen"]} and f"→ chosen: {site['chosen']} " in text


def test_a_manifest_is_not_estimated(run, mixture: Path) -> None:
    """It says nothing of what is around linears and experts."""
    outcome = run("estimate", "--arch", mixture, "--rank", "4", "--sequence", "2k", "--target-parameters", "down_proj")
    assert outcome.code == 2 and outcome.err.splitlines()[-1] == (
        "runlora-gen: error: estimate: not all is known of mine; give the config of a mixtral model with all sizes, "
        "whose layers are all alike"
    )
