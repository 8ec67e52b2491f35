"""The tools that measure run: small shapes on this CPU; and their report is the one in the documents."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]


def tool(name: str, *arguments: object) -> str:
    """What a tool prints; in this process, which has imported torch."""
    path = str(ROOT / "tools" / f"{name}.py")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [path, *map(str, arguments)])
        patch.syspath_prepend(str(ROOT / "tools"))
        runpy.run_path(path, run_name="__main__")
    return printed.getvalue()


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


def test_a_perfect_prediction_has_no_regret(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import validate_cost_model as validate
    finally:
        sys.path.pop(0)
    from runlora_gen.choose import enumerated, setting_for
    from runlora_gen.cost.price import price

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
        readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
        assert f"{slower[0]} slower than the fastest (median), {slower[1]} at worst" in readme
    else:
        assert f"median regret {median}, worst {worst}" in said


def test_the_ablation_runs(tmp_path: Path) -> None:
    path = tmp_path / "ablation.json"
    text = tool("ablation", "--device", "cpu", "--rank", 4, "--shapes", "24:16x40", "--json", path)
    rows = json.loads(path.read_text())["rows"]["24:16x40"]
    assert "split, S kept" in text and rows["split, S kept"]["saved_bytes"] > rows["split, S recomputed"]["saved_bytes"]
    assert rows["frozen linear"]["over_frozen"] == 1
