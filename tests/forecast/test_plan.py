"""Plans for a budget of memory: the best there is, and what a model then takes."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runlora_gen
import torch
from runlora_gen.cost.device import load_device
from runlora_gen.forecast import estimate
from runlora_gen.forecast.estimate import Batch, Steps, Ways, steps_of
from runlora_gen.forecast.plan import MIB, Plan, every_plan, front, plan_for, plan_within
from runlora_gen.measure.memory import peak_bytes
from runlora_gen.request.architecture import Architecture, load_architecture
from runlora_gen.request.errors import SpecError
from runlora_gen.request.workload import Workload, make_workload

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from check_estimate import RESULTS_OF_PLANS, planned, table

#: Where MLPs are computed as a whole.
WORKLOAD = Workload(tokens=(4096,), device="a100", launch="graph", adapter_dtype="bf16")
BATCH = Batch(2, 2048)


@pytest.fixture(scope="module")
def steps() -> Steps:
    return steps_of(load_architecture("llama-13b"), 16, WORKLOAD, BATCH)


@pytest.fixture(scope="module")
def plans(steps: Steps) -> list[Plan]:
    return every_plan(steps)


def of_layers(count: int) -> Architecture:
    """A model of so few layers that all that they could do can be tried, whose loss takes little beside them."""
    architecture = load_architecture("llama-13b")
    assert architecture.decoder is not None
    linears = tuple(replace(p, count=count) for p in architecture.projections)
    return replace(
        architecture,
        projections=linears,
        decoder=replace(architecture.decoder, layers=count, projections=linears, vocab=64),
    )


def test_all_triples_are_plans(plans: list[Plan], steps: Steps) -> None:
    assert steps.layers == 40 and len(plans) == 41 * 42 * 43 // 6 == len({plan.ways for plan in plans})
    for plan in plans:
        assert plan.ways.checkpointed + plan.ways.remade + plan.ways.renormed <= plan.layers == 40


def test_ends_are_the_steps_that_are_known(steps: Steps) -> None:
    """Nothing kept less is the plain step, all checkpointed the one with checkpointing."""
    assert steps.ours(Ways()) == steps.ours()
    checkpointed = steps_of(load_architecture("llama-13b"), 16, WORKLOAD, replace(BATCH, checkpointing=True)).ours()
    every = steps.ours(Ways(checkpointed=40))
    assert every.memory == checkpointed.memory
    assert every.times.device_s == pytest.approx(checkpointed.times.device_s)


def test_an_mlp_that_keeps_less_takes_two_products_more(steps: Steps) -> None:
    assert steps.remade is not None and steps.renormed is not None
    decision, less = steps.remade
    assert {str(symbol) for symbol in decision.chosen.program.kept}.isdisjoint({"Y_gate", "Y_up", "X_down"})
    assert less.spared == 2 * 4096 * 13824 * 2
    more = steps.ours(Ways(remade=1)).times.device_s - steps.ours(Ways(renormed=1)).times.device_s
    assert more == pytest.approx(less.forward.device_s + less.backward.device_s)
    flops = 2 * 2 * 4096 * 5120 * 13824  # of gate and up
    device = decision.setting.device
    assert 0.9 * flops / device.flops_per_s["bf16"] < more < 2 * flops / device.flops_per_s["bf16"]


def test_what_norms_give_is_a_pass_for_each_that_reads_it(steps: Steps) -> None:
    """What q, k and v read, and what gate and up read, of every layer."""
    assert steps.renormed is not None
    assert steps.renormed.spared == 2 * 4096 * 5120 * 2
    more = steps.ours(Ways(renormed=1)).times.device_s - steps.ours().times.device_s
    passes = 2 * 2 * 4096 * 5120 * 2 / load_device("a100").bytes_per_s
    assert passes < more < 2 * passes


def test_what_else_reads_a_norm_keeps_what_it_gives() -> None:
    """Lone linears read for themselves; q and v alone are no group here that has all of an input."""
    architecture = load_architecture("llama-13b")
    whole = steps_of(architecture, 16, replace(WORKLOAD, groups="none"), BATCH)
    assert whole.renormed is None and whole.remade is None
    assert steps_of(architecture, 16, replace(WORKLOAD, norms="none"), BATCH).renormed is None
    wide = replace(WORKLOAD, dtype="fp32", adapter_dtype="fp32")
    assert steps_of(architecture, 16, wide, BATCH).renormed is None, "norms of float32 are as they were"
    down = steps_of(architecture.restricted(("down_proj",)), 16, WORKLOAD, BATCH)
    assert down.renormed is None and [plan.ways for plan in every_plan(down)] == [Ways(n) for n in range(41)]


@pytest.mark.parametrize("norms", ["auto", "none"])
def test_no_order_of_layers_takes_less(norms: str) -> None:
    """Every sequence of five layers by what they do, its peak summed up step by step."""
    count, workload = 5, replace(WORKLOAD, norms=norms)
    steps = steps_of(of_layers(count), 16, workload, BATCH)
    assert steps.remade is not None and (steps.renormed is None) == (norms == "none")
    hidden, inner, logits = 4096 * 5120, 4096 * 13824 * 2, 4096 * 64
    given = 0 if norms == "none" else 2 * 2 * hidden  # what both norms of a layer give
    ends = steps.ours().memory
    keeps = {"all": ends.forward - steps_of(of_layers(count - 1), 16, workload, BATCH).ours().memory.forward}
    keeps["norms"] = keeps["all"] - given
    keeps["less"] = keeps["norms"] - 2 * inner
    keeps["input"] = 2 * hidden
    for kind, ways in {"norms": Ways(0, 0, count), "less": Ways(0, count), "input": Ways(count)}.items():
        assert steps.ours(ways).memory.forward == ends.forward - count * (keeps["all"] - keeps[kind])
    fixed = ends.forward - count * keeps["all"]  # the last norm's input, and what the loss keeps
    output = 2 * (hidden + logits)
    # Of an MLP's backward, where the gradients of gate and up take their place: parts of 128 columns or 1024 rows.
    parts = 4 * 16 * (4096 * 2 * (13824 // 128) + 13824 * 3 * 4)
    beside = output + 2 * hidden + inner + parts
    # What is there then of what was not kept. A norm that keeps its input as it is has the layer's.
    again = {"all": 0, "norms": given // 2, "less": given // 2 + 2 * inner, "input": keeps["all"]}
    again["input"] -= 0 if norms == "none" else keeps["input"]
    last = 20 * hidden if norms == "none" else 2 * hidden

    def peak(kinds: tuple[str, ...]) -> int:
        kept = sum(keeps[kind] for kind in kinds)
        most = max(kept + fixed + output + 8 * logits, kept + fixed - 4 * logits + output + last)
        for place in range(count, 0, -1):
            alive = sum(keeps[kind] for kind in kinds[:place])
            most = max(most, alive + again[kinds[place - 1]] + beside)
        return most

    possible = [kind for kind in keeps if kind != "norms" or norms == "auto"]
    by_counts: dict[Ways, list[int]] = {}
    for kinds in itertools.product(possible, repeat=count):
        ways = Ways(kinds.count("input"), kinds.count("less"), kinds.count("norms"))
        by_counts.setdefault(ways, []).append(peak(kinds))
    found = every_plan(steps)
    assert {plan.ways for plan in found} == by_counts.keys()
    for plan in found:
        assert plan.estimate.memory.step == min(by_counts[plan.ways]), plan.ways
    assert any(min(peaks) < max(peaks) for peaks in by_counts.values()), "the order matters"


def test_the_front_is_what_nothing_beats(plans: list[Plan]) -> None:
    points = front(plans)
    peaks = [point.estimate.memory.peak for point in points]
    assert peaks == sorted(set(peaks), reverse=True) and 80 < len(points) < len(plans)
    assert points[-1].ways == Ways(checkpointed=40) and points[0].ways == Ways()
    for plan in plans[::7]:
        assert any(
            point.estimate.time_s <= plan.estimate.time_s and point.estimate.memory.peak <= plan.estimate.memory.peak
            for point in points
        )


def test_a_plan_fits_and_no_faster_one_does(plans: list[Plan]) -> None:
    peaks = sorted(plan.estimate.memory.peak for plan in plans)
    for budget in (peaks[0], peaks[0] + 1, *peaks[:: len(peaks) // 7], peaks[-1], 2 * peaks[-1]):
        plan = plan_within(plans, budget)
        assert plan.estimate.memory.peak <= budget
        assert not any(
            other.estimate.memory.peak <= budget and other.estimate.time_s < plan.estimate.time_s for other in plans
        )
    assert plan_within(plans, 2 * peaks[-1]).ways == Ways()


def test_what_is_named_as_the_least_is_enough(plans: list[Plan]) -> None:
    least = min(plan.estimate.memory.peak for plan in plans)
    with pytest.raises(
        SpecError, match=r"^--memory-budget: 1000 MiB is too little .* takes (\d+) MiB at least"
    ) as error:
        plan_within(plans, 1000 * MIB)
    named = int(str(error.value).partition("takes ")[2].split()[0])
    assert 0 <= named * MIB - least < MIB
    assert plan_within(plans, named * MIB).ways == Ways(checkpointed=40)


def test_without_mlps_as_a_whole_no_product_is_made_again() -> None:
    architecture = replace(load_architecture("llama-13b"), gated=())
    found = every_plan(steps_of(architecture, 16, WORKLOAD, BATCH))
    assert [plan.ways for plan in found] == [Ways(n, 0, more) for n in range(41) for more in range(41 - n)]
    times = [plan.estimate.time_s for plan in found if not plan.ways.renormed]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"launch": "compile"}, "^--memory-budget: needs --launch eager or graph"),
        ({"arch": "gpt2"}, "^--memory-budget: gpt2 is of model type gpt2, of which only the linears are known"),
    ],
)
def test_what_has_no_plan(options: dict[str, Any], said: str) -> None:
    architecture = load_architecture(options.pop("arch", "llama-13b"))
    workload = make_workload(tokens=4096, memory_budget="1TiB", **options)
    with pytest.raises(SpecError, match=said):
        plan_for(architecture, 8, workload)


SIZES = {"hidden_size": 96, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 56}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("budget", "ways", "dtype", "family"),
    [
        ("20MiB", Ways(), "bfloat16", "Llama"),
        ("7MiB", Ways(0, 2, 1), "bfloat16", "Llama"),
        ("6MiB", Ways(0, 4), "bfloat16", "Llama"),
        ("5MiB", Ways(1, 4, 1), "bfloat16", "Llama"),
        ("4MiB", Ways(), "float16", "Llama"),
        ("3MiB", Ways(0, 5), "float16", "Llama"),
        ("8MiB", Ways(0, 2, 1), "bfloat16", "Gemma3Text"),
        ("6MiB", Ways(0, 4), "bfloat16", "Gemma"),
    ],
)
def test_the_peak_of_a_planned_step(
    budget: str, ways: Ways, dtype: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model of Transformers, as torch's allocator sees it."""
    if dtype == "bfloat16":  # whose kernels run on no CPU: there gradients take the place of nothing that was kept
        monkeypatch.setattr(estimate, "spending", lambda decision: None)
    else:
        pytest.importorskip("triton", minversion="3.4")
    sequences = 4 if dtype == "bfloat16" else 1  # Triton's interpreter is slow
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **HEADS, use_cache=False, attn_implementation="sdpa")
    kind = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    model = kind(config).to(getattr(torch, dtype))
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=False
    ).train()
    options = {"tokens": 64 * sequences, "sequence": 64, "device": "a100", "launch": "graph"}
    report = runlora_gen.accelerate(model, tmp_path, memory_budget=budget, **options)
    assert report.planned.endswith(f" of {budget[:-3]} MiB at {64 * sequences} tokens, without the optimizer")
    (folder,) = report.folders
    package = runlora_gen.into_model.packages.imported(folder)
    plan = package.plan
    assert (ways.checkpointed, ways.remade) == (plan.CHECKPOINTED, plan.REMADE)
    ids = torch.randint(SIZES["vocab_size"], (sequences, 64))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()

    step()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    model.zero_grad(set_to_none=True)
    measured = peak_bytes(step, torch.device("cpu")) + parameters
    assert gradients < measured
    assert pytest.approx(measured, rel=0.05) == plan.PEAK
    assert plan.PEAK <= plan.BUDGET == int(budget[:-3]) * MIB


def test_the_documented_step_is_that_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    from runlora_gen import cli

    document = (Path(__file__).parents[2] / "docs" / "memory-budget.md").read_text(encoding="utf-8")
    step = (
        "--arch",
        "llama-3-8b",
        "--rank",
        "16",
        "--adapter-dtype",
        "bf16",
        "--device",
        "h200",
        "-b",
        "4",
        "-s",
        "4k",
    )
    words = [*step, "--memory-budget", "64GiB"]
    cli.main.main(["estimate", *words], standalone_mode=False)
    assert capsys.readouterr().out.rstrip() in document


def test_the_documented_plans_are_those_of_the_result_file() -> None:
    """And they hold: peaks within 5 %, and none above its plan's."""
    document = (Path(__file__).parents[2] / "docs" / "memory-budget.md").read_text(encoding="utf-8")
    report = json.loads(RESULTS_OF_PLANS.read_text(encoding="utf-8"))
    rows = list(planned(report))
    assert table(rows) in document and len(rows) == 8
    time_off, peak_off = (max(abs(getattr(row, off)) for row in rows) for off in ("time_off", "peak_off"))
    last = rows[-1].measured_ms / rows[1].measured_ms
    said = " ".join(document.split())
    assert (
        f"peaks are at most {peak_off * 100:.1f} % off, and never above the plan's; "
        f"times at most {time_off * 100:.1f} %" in said
        and time_off < 0.05
    )
    assert f"takes {last:.2f} of the frozen step under checkpointing, at a peak that is no higher." in said
    assert rows[-1].measured_bytes <= rows[1].measured_bytes and peak_off < 0.05
    assert all(row.measured_bytes <= row.estimated_bytes for row in rows if row.contender.startswith("plan"))
