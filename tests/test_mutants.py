"""The catalogue of mutants: all still apply, the committed results are of them, and a sample is judged anew."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
NAMED = (
    "the descriptor loop multiplies the left tile by itself",
    "the descriptor loop forgets its sum",
    "the sum of the parts left out",
    "every tile is the first one",
    "wrong above 64 tokens",
    "wrong above 9 ranks",
    "the forward forgets autocast",
    "arguments unchecked",
    "a negative scaling wrong",
    "the gradient of adapters of another dtype wrong",
    "the fallback for 16-bit weights lost",
    "second derivatives are silently wrong",
)
CATEGORIES = {
    *("torch", "dropout", "triton", "launch", "strides", "guards", "casts", "saved", "selection"),
    *("templates", "prices", "biases", "groups", "masks", "schedule", "search", "files", "codes", "eights"),
    *("experts", "mlps", "norms", "plans", "rotary"),
}
#: Quick ones: of the text that torch runs, of a kernel, of a source file.
SAMPLE = ("a negative scaling wrong", "every tile is the first one", "a product has half its FLOPs")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    pytest.importorskip("torch")
    sys.path.insert(0, str(TOOLS))
    try:
        import mutants
    finally:
        sys.path.pop(0)
    return mutants


def test_every_mutant_applies(tool: ModuleType) -> None:
    modules, mutants = tool.catalogue()
    for mutant in mutants:
        source = tool.source_of(mutant, modules)
        assert mutant.apply(source) != source
    assert len(mutants) >= 60
    assert {mutant.name for mutant in mutants} >= {*NAMED, *SAMPLE}
    assert {mutant.category for mutant in mutants} == CATEGORIES


def test_the_results_are_of_this_catalogue_and_none_survived(tool: ModuleType) -> None:
    _, mutants = tool.catalogue()
    report = json.loads((TOOLS / "results" / "mutants.json").read_text(encoding="utf-8"))
    rows = report["mutants"]
    assert [(row["name"], row["category"]) for row in rows] == [(m.name, m.category) for m in mutants]
    for row, mutant in zip(rows, mutants, strict=True):
        assert row["verdict"] == (tool.EQUIVALENT if mutant.equivalent else tool.KILLED) and row["by"]
    assert report["counts"] == Counter(row["verdict"] for row in rows)
    # Everything that killed one had passed on what was not changed.
    assert report["unchanged"].keys() == {m.where if m.of_module else m.killed_by for m in mutants if not m.equivalent}


def test_a_sample_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("triton", minversion="3.4")
    path = tmp_path / "results.json"
    names = [word for name in SAMPLE for word in ("--name", name)]
    command = [sys.executable, str(TOOLS / "mutants.py"), *names, "--jobs", "1", "--json", str(path), "--unproved"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text(encoding="utf-8"))
    assert {row["name"]: row["verdict"] for row in report["mutants"]} == dict.fromkeys(SAMPLE, "killed")
    assert report["unchanged"] == {}


def test_what_survives_fails_the_run(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an edit that changes nothing does: the tests that should find it are really run."""
    where, selection = "generator/runlora_gen/cost/vector.py", "tests/cost/test_price.py -k phases_add_up"
    old = "self.saved_bytes + self.workspace_bytes"
    new = "self.workspace_bytes + self.saved_bytes"
    harmless = tool.Mutant("harmless", "prices", where, old, new, killed_by=selection)
    monkeypatch.setattr(tool, "catalogue", lambda: ({}, (harmless,)))
    monkeypatch.setattr(sys, "argv", ["mutants.py", "--jobs", "1", "--unproved"])
    for name in ("OMP_NUM_THREADS", "TRITON_INTERPRET"):  # which the tool sets
        monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit) as end:
        tool.main()
    out = capsys.readouterr().out
    assert end.value.code == 1 and "SURVIVED" in out and "1 mutants: 1 SURVIVED" in out


@pytest.mark.parametrize(
    ("old", "within", "said"), [("nothing", "", "found 0 times"), ("b", "def f", "2 lines begin with")]
)
def test_a_stale_mutant_is_named(tool: ModuleType, old: str, within: str, said: str) -> None:
    mutant = tool.Mutant("m", "torch", "sample", old, "x", within)
    with pytest.raises(tool.StaleError, match=said):
        mutant.apply("def f():\n    b\n\n\ndef f2():\n    a\n")
