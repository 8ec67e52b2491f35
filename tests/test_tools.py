"""The tools that measure run: small shapes on this CPU; and their report is the one in the documents."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]


def tool(name: str, *arguments: object) -> str:
    """What a tool prints; in this process, which has imported torch."""
    path = str(ROOT / "tools" / f"{name}.py")
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        patch.setattr(sys, "argv", [path, *map(str, arguments)])
        patch.syspath_prepend(str(ROOT / "tools"))
        warnings.simplefilter("default")  # what others warn of is printed, as in a process of its own
        runpy.run_path(path, run_name="__main__")
    return printed.getvalue()


def imported(name: str) -> Any:
    """A tool as a module."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def table(text: str) -> list[str]:
    """Rows of a Markdown table whose first cell begins with a token count."""
    return [line for line in text.splitlines() if re.match(r"\| \d+, \d+→\d+, \d+ ", line)]


def test_all_variants_are_measured_and_judged(tmp_path: Path) -> None:
    path = tmp_path / "variants.json"
    shapes = "24:16x40:4 24:40x16:4"
    tool("validate_cost_model", "measure", "--device", "cpu", "--rounds", 2, "--shapes", shapes, "-o", path)
    data = json.loads(path.read_text())
    assert [row["shape"] for row in data["rows"]] == shapes.split()
    assert len(data["names"]) == 144 + 1 and all(time > 0 for row in data["rows"] for time in row["us"])
    lines = table(tool("validate_cost_model", "report", path, "--profile", "cpu"))
    assert len(lines) == 2
    for line in lines:
        spearman, regret = float(line.split(" | ")[2]), float(line.split(" | ")[4])
        assert -1 <= spearman <= 1 <= regret


def test_linears_of_one_input_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "group.json"
    options = ("--dtype", "fp32", "--profile", "cpu", "--launch", "eager", "--rank", "2", "--rounds", "2")
    printed = tool("bench_group", "--groups", "8:16x16+8+8,8:16x24+24", *options, "--json", path)
    rows = json.loads(path.read_text())["rows"]
    assert [row["group"] for row in rows] == ["8:16x16+8+8", "8:16x24+24"]
    for row in rows:
        assert set(row["results"]) == {"frozen", "peft", "ours, one by one", "ours"}
        assert row["results"]["frozen"]["eager"]["over_frozen"]["max"] == 1
        assert all(result["eager"]["median_us"] > 0 for result in row["results"].values())
        # One X, not three; of PEFT's own intermediates there is none.
        assert row["results"]["ours"]["saved_bytes"] <= row["results"]["peft"]["saved_bytes"]
    assert len(printed.splitlines()) == 2 * 5


def test_what_the_host_needs_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    shape = ("--tokens", 4, "--width", 64, "--rank", 2, "--rounds", 1)
    printed = tool("bench_host", "--device", "cpu", *shape, "--no-compile", "--json", path)
    data = json.loads(path.read_text())
    assert data["launch"]["addmm(out=)"]["over addmm(out=)"]["median"] == 1
    assert {"fused_gemm", "fused_gemm, through Triton"} <= data["launch"].keys()
    assert data["eager"]["frozen"]["over frozen"]["max"] == 1 and len(data["eager"]) == 6
    assert all(row["us"] > 0 for part in ("launch", "eager") for row in data[part].values())
    assert len(printed.splitlines()) == len(data["launch"]) + len(data["eager"])


def test_a_perfect_prediction_has_no_regret(tmp_path: Path) -> None:
    validate = imported("validate_cost_model")
    from runlora_gen.cost.price import price
    from runlora_gen.search.candidates import enumerated, setting_for

    workload = validate.workload_for("fp32", "cpu")
    setting = setting_for(workload, 768, 2560, 8, False, 1024)
    times = {p.id: price(p, setting).time_s * 1e6 for p in enumerated(workload, setting)}
    judged = validate.judge({**times, validate.FROZEN: 1.0}, "1024:768x2560:8", "fp32", "cpu")
    assert judged["time"] == 1 and judged["spearman"] == pytest.approx(1)
    worst = {**{name: 1 / time for name, time in times.items()}, validate.FROZEN: 1.0}
    judged = validate.judge(worst, "1024:768x2560:8", "fp32", "cpu")
    assert judged["spearman"] == pytest.approx(-1) and judged["time"] > 1.5
    assert validate.ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1, 3.5, 2]


@pytest.mark.parametrize(("results", "profile"), [("variants_h200_bf16", "h200"), ("variants_cpu_fp32", "cpu")])
def test_the_documented_report_is_that_of_the_prices(results: str, profile: str) -> None:
    """A change of the prices or of a profile shows here: run the report anew and see what it did."""
    report = tool("validate_cost_model", "report", ROOT / "tools" / "results" / f"{results}.json", "--profile", profile)
    document = (ROOT / "docs" / "cost-model.md").read_text(encoding="utf-8")
    assert len(table(report)) > 5 and set(table(report)) <= set(table(document))
    median, worst = re.search(r"regret by time: median ([\d.]+), worst ([\d.]+)", report).groups()
    flops, torch_flops = (
        re.search(rf"regret by {kind}: median ([\d.]+), worst ([\d.]+)", report).groups()
        for kind in ("flops", "torch_flops")
    )
    said = " ".join(document.split())
    if profile == "h200":
        assert f"| regret, median | 1.02 | {median} |" in document and f"| regret, worst | 1.10 | {worst} |" in document
        slower = [f"{100 * (float(regret) - 1):.1f} %" for regret in (median, worst)]
        assert f"off by {flops[0]} (median) and {flops[1]} (worst)" in said
        assert f"by {torch_flops[0]} and {torch_flops[1]} among torch's programs alone" in said
        choosing = " ".join((ROOT / "docs/choosing.md").read_text(encoding="utf-8").split())
        assert f"{slower[0]} slower than the fastest (median), {slower[1]} at worst" in choosing
    else:
        assert f"median regret {median}, worst {worst}" in said


def test_the_ablation_runs(tmp_path: Path) -> None:
    path = tmp_path / "ablation.json"
    text = tool("ablation", "--device", "cpu", "--rank", 4, "--shapes", "24:16x40", "--json", path)
    rows = json.loads(path.read_text())["rows"]["24:16x40"]
    assert "split, S kept" in text and rows["split, S kept"]["saved_bytes"] > rows["split, S recomputed"]["saved_bytes"]
    assert rows["frozen linear"]["over_frozen"] == 1


def test_the_model_benchmark_runs(tmp_path: Path) -> None:
    """On two tiny layers; what is not on this machine is left out, and said."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    path = tmp_path / "model.json"
    options = ("--device", "cpu", "--shapes", "tiny", "--rounds", 1, "--json", path)
    text = tool("bench_model", *options, "--contenders", "peft-fp32,ours,axolotl", "--modes", "eager,checkpointing")
    assert "tiny checkpointing: frozen" in text
    (row,) = json.loads(path.read_text())["rows"]
    results = row["results"]
    peft, ours = "PEFT, fp32 adapters without autocast", "ours"
    assert set(results) == {"frozen", peft, ours}
    assert results[ours]["layers"] == 14
    kinds = [module.partition("_")[0] for module in results[ours]["chosen"]]
    assert kinds == ["linear"] * 4 + ["qkv", "gate"]
    assert all(0 < results[ours]["deviation"][name] < 0.02 for name in ("output", "dX", "dA", "dB"))
    for title in results:
        for mode in ("eager", "checkpointing"):
            result = results[title][mode]
            assert result["over_frozen"]["min"] <= result["over_frozen"]["median"] <= result["over_frozen"]["max"]
            assert result["peak_total_bytes"] > result["peak_bytes"] > 0
        assert results[title]["checkpointing"]["peak_bytes"] < results[title]["eager"]["peak_bytes"]


def test_plans_are_measured(tmp_path: Path) -> None:
    """On two tiny layers: peaks are about what they were predicted to be, and fall with the plans'."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    path = tmp_path / "plans.json"
    options = ("--device", "cpu", "--shape", "tiny", "--points", 3, "--rounds", 1, "--json", path)
    text = tool("bench_plans", *options)
    report = json.loads(path.read_text())
    assert list(report["results"]) == ["frozen", "frozen, checkpointing", "plan 1", "plan 2", "plan 3"]
    for title, row in report["results"].items():
        assert title in text and row["median_ms"] > 0
        assert row["peak_bytes"] == pytest.approx(row["predicted"]["peak_bytes"], rel=0.1)
    assert report["results"]["frozen"]["over_frozen"]["median"] == 1
    assert report["results"]["plan 3"]["checkpointed"] == 2 and report["results"]["plan 1"]["norms"] == 5


def test_runs_of_the_model_benchmark_are_put_together() -> None:
    pytest.importorskip("transformers")
    merged = imported("bench_model").merged
    former = {"shape": "8b", "rounds": 3, "alone": 1, "results": {"frozen": {"eager": 1}, "peft": {"eager": 2}}}
    row = {"shape": "8b", "rounds": 5, "results": {"frozen": {"compiled": 3}, "ours": {"compiled": 4}}}
    results = {"frozen": {"eager": 1, "compiled": 3}, "peft": {"eager": 2}, "ours": {"compiled": 4}}
    assert merged(former, row) == {"shape": "8b", "rounds": 5, "alone": 1, "results": results}
    assert merged(None, row) == row


def test_what_was_measured_on_another_day_says_so(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    bench = imported("bench_model")
    path, report = tmp_path / "model.json", {"date": "2026-01-01", "machine": "one"}
    results = {"peft": {"eager": {"over_frozen": {}}, "host_ms": 1}, "alone": {"host_ms": 2}}
    path.write_text(json.dumps({**report, "rows": [{"shape": "8b", "results": results}]}))
    assert bench.measured_before(path, report) == {"8b": {"shape": "8b", "results": results}}
    former = bench.measured_before(path, {**report, "date": "2026-02-02"})["8b"]
    dated = {"peft": {"eager": {"over_frozen": {}, "date": "2026-01-01"}, "host_ms": 1}}
    assert former["results"] == {**dated, "alone": {"host_ms": 2, "date": "2026-01-01"}}
    anew = bench.merged(former, {"shape": "8b", "results": {"peft": {"eager": {"over_frozen": {"median": 1}}}}})
    assert anew["results"]["peft"]["eager"] == {"over_frozen": {"median": 1}}
    assert bench.measured_before(path, {**report, "machine": "other"}) == {}


def test_the_model_benchmark_finds_what_computes_something_else() -> None:
    pytest.importorskip("transformers")
    import torch

    bench_model = imported("bench_model")
    theirs = {"output": [torch.ones(4), torch.zeros(2)]}
    off = bench_model.deviation({"output": [torch.ones(4), torch.ones(2)]}, theirs)
    assert off == {"output": pytest.approx(2**0.5 / 2, abs=1e-5)}
    row = {"shape": "tiny", "results": {"ours": {"deviation": {"from": "PEFT", **off}, "eager": {"failed": "out of"}}}}
    assert len(bench_model.wrong(row)) == 2
    row["results"]["ours"] = {"deviation": {"from": "PEFT", "output": float("nan")}}
    assert len(bench_model.wrong(row)) == 1


@pytest.fixture
def _one_row(tmp_path: Path) -> Any:
    """A row of the paper's on one tiny layer."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    paper = imported("paper_table")
    options = ["--device", "cpu", "--tiny", "--rows", "12", "--rounds", "2", "--packages", str(tmp_path / "packages")]
    return paper, [*options, "--profile", "cpu"]


#: What PEFT still asks of newer Transformers.
PEFTS_WARNINGS = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@PEFTS_WARNINGS
def test_a_row_of_the_paper_is_measured(
    _one_row: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With packages that were generated before, from a model without weights."""
    paper, options = _one_row
    monkeypatch.setattr(sys, "argv", ["paper_table.py", *options, "--prepare"])
    paper.main()
    assert "generating" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["paper_table.py", *options, "--json", str(tmp_path / "paper.json")])
    paper.main()
    captured = capsys.readouterr()
    assert "generating" not in captured.err and "paper 11.9 %" in captured.out
    (row,) = json.loads((tmp_path / "paper.json").read_text())["rows"]
    result = row["results"]["same"]
    assert result["layers"] == 7 and result["batch"] == 2 and result["loss_deviation"] < 1e-4
    assert result["saved_mb"] == pytest.approx(
        (result["peak_bytes"]["peft-fp32"] - result["peak_bytes"]["ours"]) / 1e6, abs=0.05
    )


@PEFTS_WARNINGS
def test_a_batch_without_room_is_cut_by_eighths(_one_row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    paper, options = _one_row
    parsed = paper.parsed(options)
    (row,) = parsed.rows
    pair = paper.Pair(row, "same", paper.base_model(row, torch.device("cpu"), small=True), parsed)

    def run(key: str) -> Any:
        def step() -> None:
            if len(pair.inputs["labels"]) > 12:
                raise torch.OutOfMemoryError

        return step

    monkeypatch.setattr(pair, "run", run)
    assert pair.fitted(17) == 11 and len(pair.inputs["labels"]) == 11


def test_the_training_example_learns_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    path = tmp_path / "losses.json"
    options = ("--device", "cpu", "--steps", 20, "--pretrain", 10, "--sequence", 64, "--hidden", 64)
    text = tool("train_example", *options, "--json", path)
    assert "generated modules  loss" in text
    runs = json.loads(path.read_text())["runs"]
    peft, ours = runs["peft"]["losses"], runs["ours"]["losses"]
    assert len(ours) == 20 and sum(ours[-5:]) < sum(ours[:5]) and ours == pytest.approx(peft, rel=1e-3)
    assert runs["ours"]["tokens_per_s"] > 0 and runs["ours"]["peak_bytes"] > 0
    pytest.importorskip("matplotlib")
    assert not tool("train_example", "--plot", tmp_path / "losses.png", path)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_the_training_example_trains_experts(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    path = tmp_path / "losses.json"
    options = ("--device", "cpu", "--steps", 10, "--pretrain", 5, "--sequence", 32, "--hidden", 64)
    text = tool("train_example", *options, "--experts", 4, "--top-k", 2, "--json", path)
    assert re.search(r"^loss of the last 10 steps .* and .*, .* apart at most in a step$", text, re.M)
    runs = json.loads(path.read_text())["runs"]
    assert runs["ours"]["losses"] == pytest.approx(runs["peft"]["losses"], rel=1e-3)


def test_the_training_example_s_text_is_true() -> None:
    example = imported("train_example")
    lines = example.corpus("products", 2000, seed=1).decode().splitlines()
    assert example.corpus("products", 2000, seed=1).decode().splitlines() == lines
    numbers = {example.words(number): number for number in range(1000)}
    assert len(numbers) == 1000 and numbers["nine hundred and ninety-nine"] == 999
    for line in lines:
        left, product = line.removesuffix(".").split(" is ")
        a, b = left.split(" times ")
        assert numbers[a] * numbers[b] == numbers[product]


def test_peft_s_tests_are_told_apart() -> None:
    """By what became of them with our layers, and without."""
    told = imported("peft_tests").summary
    case = "Tests::test_it[True-Vanilla MLP 1 LoRA-MLP-LoraConfig-config_kwargs6]"
    record = {"outcome": "passed", "calls": 0, "accelerated": 0, "left": [], "watches": False}
    failed = {**record, "outcome": "failed", "reason": "OSError: no Hub"}
    ours = {
        case: {**record, "calls": 2, "accelerated": 1},
        "Tests::saved": {**record, "accelerated": 1},
        "Tests::dora": {**record, "left": ["DoRA is not covered"]},
        "Tests::broken": failed,
        "Tests::hub": failed,
        "Tests::counts[org/tiny-MoE-LoraConfig-config_kwargs6]": {**failed, "watches": True},
        case.replace("True", "False"): {**record, "outcome": "skipped", "reason": "no GPU"},
    }
    found = told({**dict.fromkeys(ours, record), "Tests::hub": failed}, ours)
    assert found == {
        "tests": 7,
        "passed_on_ours": 1,
        "passed_without_a_call": 1,
        "broken": 1,
        "fails_without_ours": 1,
        "left_out": 3,
        "calls_of_ours": 2,
        "reasons": {
            "left_out": {
                "DoRA is not covered": {"Tests::dora": 1},
                "it watches PEFT's _LoraFactorsProxy, which ours does not call": {"org/tiny-MoE": 1},
                "PEFT skips it: no GPU": {"Vanilla MLP 1 LoRA": 1},
            },
            "broken": {"OSError: no Hub": {"Tests::broken": 1}},
            "fails_without_ours": {"OSError: no Hub": {"Tests::hub": 1}},
        },
    }


@pytest.mark.parametrize("options", [(), ("--warmup", "--own-lines")], ids=["plain", "warmup"])
def test_the_first_step_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]) -> None:
    """The process of one row, on tiny layers whose modules have nothing to compile here."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    row = ("--worker", "--device", "cpu", "--shapes", "tiny", "--packages", tmp_path)
    result = json.loads(tool("bench_first_step", *row, *options))
    assert result.pop("first_step_s") > 0 and result.pop("second_step_s") > 0 and result.pop("compiled") == 0
    assert set(result) == ({"warmup_s", "compiled_ahead"} if options else set())
