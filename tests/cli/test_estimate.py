"""``estimate`` and ``devices``: what they print."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from runlora_gen.cost.device import device_names, load_device
from runlora_gen.request.errors import SpecError
from runlora_gen.request.workload import make_workload

STEP = ("--arch", "llama-13b", "--rank", "8", "--batch", "2", "--sequence", "2k", "--no-kernels")


@pytest.fixture(scope="module")
def data(run) -> dict:
    return json.loads(run("estimate", *STEP, "--json").ok().out)


def test_json_says_what_was_asked_and_what_came_out(data: dict) -> None:
    assert list(data)[:9] == [
        "arch",
        "rank",
        "batch",
        "sequence",
        "checkpointing",
        "dtype",
        "adapter_dtype",
        "base",
        "device",
    ]
    assert (data["batch"], data["sequence"], data["checkpointing"]) == (2, 2048, False)
    for way in ("frozen", "peft", "ours"):
        one = data[way]
        assert one["time_us"] == pytest.approx(max(one["start_us"] + one["device_us"], one["host_us"]))
        assert one["start_us"] == 2500
        assert one["peak_bytes"] == sum(one["memory"][key] for key in ("weights", "adapters", "kept", "transient"))
    times, peaks = ([data[way][key] for way in ("ours", "frozen", "peft")] for key in ("time_us", "peak_bytes"))
    assert times == sorted(times) and peaks[0] < peaks[2] > peaks[1]
    assert data["frozen"]["memory"]["weights"] == pytest.approx(13.02e9 * 2, rel=0.01)


def test_the_table_has_the_same(run, data: dict) -> None:
    lines = run("estimate", *STEP).ok().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "llama-13b, rank 8, 2 x 2048 tokens"
    frozen = data["frozen"]["time_us"]
    for line, way in zip(lines[4:7], ("frozen", "peft", "ours"), strict=True):
        one = data[way]
        assert line.split()[0] == {"peft": "PEFT"}.get(way, way)
        for text in (
            f"{one['time_us'] / 1e3:.0f} ms",
            f"{one['time_us'] / frozen:.2f}",
            f"{4096 / one['time_us'] * 1e6:,.0f}",
            f"{one['peak_bytes'] / 2**30:.4g} GiB",
        ):
            assert f" {text} " in line


@pytest.mark.parametrize(("base", "bits"), [("nf4", 4.5), ("int8", 8), ("fp8", 8), ("fp8-block", 8)])
def test_codes_are_what_weights_take(run, data: dict, base: str, bits: float) -> None:
    """But for embeddings and the head, which are never quantized; making weights of them takes time."""
    coded = json.loads(run("estimate", *STEP, "--base", base, "--json").ok().out)
    assert coded["base"] == base and data["base"] == "plain"
    ends = 2 * 32000 * 5120
    for way in ("frozen", "peft", "ours"):
        plain, less = (one[way]["memory"]["weights"] for one in (data, coded))
        assert less - 2 * ends == pytest.approx((plain - 2 * ends) * bits / 16, rel=1e-3)
        if way != "peft":  # whose adapters read their input as it is over some bases
            assert coded[way]["device_us"] > data[way]["device_us"]


def test_checkpointing_is_said(run) -> None:
    text = run("estimate", *STEP, "--checkpointing").ok().out
    assert text.startswith("llama-13b, rank 8, 2 x 2048 tokens, checkpointing\n")


def test_a_config_without_a_vocabulary_is_refused(run, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "model_type": "llama", "vocab_size": "many"}))
    error = run("estimate", "--arch", tmp_path, "--rank", "4", "-s", "16").error()
    assert "has no vocab_size" in error
    # What only the estimate needs keeps nobody from generating.
    run("--arch", tmp_path, "--rank", "4", "-o", tmp_path / "out", "--dry-run", "--no-kernels").ok()


def test_devices_are_listed(run) -> None:
    text = run("devices").ok().out
    assert max(map(len, text.splitlines())) <= 80
    listed = json.loads(run("devices", "--json").ok().out)
    assert [one["name"] for one in listed] == list(device_names())
    for one in listed:
        profile = load_device(one["name"])
        assert f"{one['name']} " in text and profile.title == one["title"] and profile.title in text
        assert " ".join(profile.source.split()) in " ".join(text.split())
    by_name = {one["name"]: one for one in listed}
    assert by_name["h100"]["measured_on"] == "h200" and by_name["h200"]["measured_on"] is None
    assert by_name["a100"]["measured_dtypes"] == [] and by_name["cpu"]["measured_dtypes"] == ["fp32"]


def test_a_mixture_with_adapters_on_experts_or_linears(run, tmp_path: Path) -> None:
    """Experts without adapters are frozen: their weights are there, and their time."""
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 256, "moe_intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "model_type": "qwen3_moe"}))
    step = ("estimate", "--arch", tmp_path, "--rank", "4", "-s", "1k", "--no-kernels", "--json")
    alone, linears = (
        json.loads(run(*step, *more).out) for more in (("--target-parameters", "gate_up_proj,down_proj"), ())
    )
    assert alone["frozen"] == linears["frozen"]
    assert alone["frozen"]["memory"]["weights"] > 2 * 2 * 16 * 3 * 256 * 96
    rows = {"experts": 2 * 16 * 4 * (256 + 192 + 96 + 256), "linears": 2 * 4 * (2 * (256 + 256) + 2 * (256 + 128))}
    assert alone["ours"]["memory"]["adapters"] == 8 * rows["experts"]
    assert linears["ours"]["memory"]["adapters"] == 8 * rows["linears"]
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "model_type": "gpt_oss", "num_local_experts": 4}))
    known = "of which only the linears are known; estimated are gemma, gemma3_text, llama, mistral, mixtral, "
    assert known in run(*step).err


PLANNED = ("estimate", *STEP, "--memory-budget", "33GiB")


def test_a_budget_has_a_plan(run, data: dict) -> None:
    planned = json.loads(run(*PLANNED, "--json").ok().out)
    plan = planned["plan"]
    assert planned["memory_budget"] == 33 * 2**30 >= plan["peak_bytes"]
    assert 0 < plan["checkpointed"] <= plan["layers"] == 40 and plan["remade"] == 0, "without kernels no MLP is whole"
    assert planned["ours"] == data["ours"] and plan["peak_bytes"] < data["ours"]["peak_bytes"]
    assert plan["time_us"] > data["ours"]["time_us"]
    lines = run(*PLANNED, "--front").ok().out.splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line.split() for line in lines if line.startswith("plan"))
    assert row[1] == f"{plan['time_us'] / 1e3:.0f}"
    text = " ".join(lines)
    assert f"The plan, for 33 GiB: in {plan['checkpointed']} of 40 layers the input alone is kept, in " in text
    assert f"in {plan['renormed']} more what norms give is made again. " in text
    assert re.search("16 of [0-9]+ plans that no other beats in both, and how many layers do what:", text)
    points = [line.split() for line in lines[-16:]]
    assert points[0][-4:] == ["0", "0", "0", "40"] and points[-1][-4:] == ["40", "0", "0", "0"]


def test_a_front_as_json(run) -> None:
    found = json.loads(run("estimate", *STEP, "--front", "--json").ok().out)
    points = found["front"]
    firsts = [point["checkpointed"] for point in points]
    assert firsts == sorted(firsts) and firsts[-1] == 40 and "plan" not in found
    assert all(point["remade"] == 0 for point in points) and any(point["renormed"] for point in points)
    assert [point["peak_bytes"] for point in points] == sorted((p["peak_bytes"] for p in points), reverse=True)


def test_a_front_is_drawn(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
        error = run("estimate", *STEP, "--picture", tmp_path / "front.png").error()
        assert error == "--picture: needs matplotlib: pip install matplotlib"
    pytest.importorskip("matplotlib", reason="needs matplotlib (the bench extra)")
    for name in ("front.png", "front.svg"):
        run(*PLANNED, "--picture", tmp_path / name).ok()
    assert (tmp_path / "front.png").read_bytes()[1:4] == b"PNG" and (tmp_path / "front.png").stat().st_size > 10_000
    drawn = (tmp_path / "front.svg").read_text()
    assert "<svg" in drawn and (tmp_path / "front.svg").stat().st_size > 10_000
    error = run("estimate", *STEP, "--picture", tmp_path / "missing" / "front.png").error()
    assert error.startswith("--picture: cannot write ") and not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--memory-budget", "12GiB"), "--memory-budget: 12288 MiB is too little for a step, which takes "),
        (("--memory-budget", "12 apples"), "--memory-budget: '12 apples' is not allowed; give bytes, or such as 38GiB"),
        (("--memory-budget", "0GiB"), "--memory-budget: '0GiB' is not allowed; give bytes, or such as 38GiB"),
        (("--memory-budget", "33GiB", "--checkpointing"), "--checkpointing: given beside a plan, which says itself"),
        (("--front", "--checkpointing"), "--checkpointing: given beside a plan, which says itself"),
        (
            ("--picture", "front.gif"),
            "--picture: 'front.gif' is not allowed; give a file that ends in .png, .svg, .pdf",
        ),
    ],
)
def test_what_is_no_plan(run, options: tuple[str, ...], said: str) -> None:
    assert run("estimate", *STEP, *options).error().startswith(said)


def test_budgets_and_sequences_go_together(run, tmp_path: Path) -> None:
    base = ("--arch", "llama-13b", "--rank", "8", "--no-kernels", "-o", tmp_path)
    for options, said in (
        (("--sequence", "2k"), "--sequence: given without a memory budget, which alone asks for it"),
        (("--memory-budget", "33GiB", "-s", "3000"), "--sequence: 3000 is not allowed; give one number that divides"),
        (("--memory-budget", "33GiB", "--launch", "compile"), "--memory-budget: needs --launch eager or graph"),
    ):
        assert run(*base, *options).error().startswith(said)
    assert not any(tmp_path.iterdir())
    error = run("explain", "--arch", "llama-13b", "--rank", "8", "--memory-budget", "33GiB").error()
    assert error.startswith("--memory-budget: explain tells of layers one by one; give it to estimate")


@pytest.mark.parametrize(
    ("text", "number"),
    [("1024", 1024), ("1KiB", 1024), ("1kb", 1000), ("1.5 GiB", 3 << 29), ("2TB", 2 * 10**12), ("7B", 7), (5, 5)],
)
def test_sizes_are_read(text: object, number: int) -> None:
    assert make_workload(memory_budget=text).memory_budget == number


@pytest.mark.parametrize("text", ["", "GiB", "1.5", "-1GiB", "1e3", "1 Gi", "9999TiB", True, 2.5, "١GiB"])
def test_other_sizes_are_not(text: object) -> None:
    with pytest.raises(SpecError, match=r"^memory_budget: .* is not allowed; give bytes, or such as 38GiB$"):
        make_workload(memory_budget=text)
