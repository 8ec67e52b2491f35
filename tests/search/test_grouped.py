"""Which groups are chosen, and that theirs is a choice by the prices."""

from __future__ import annotations

from dataclasses import replace

import pytest
from runlora_gen.algebra.enumerate import enumerate_programs
from runlora_gen.algebra.operations import Draw
from runlora_gen.cost.passes import Times
from runlora_gen.cost.price import price
from runlora_gen.request.architecture import load_architecture
from runlora_gen.request.groups import Group, groups
from runlora_gen.request.layers import layers
from runlora_gen.request.workload import Workload
from runlora_gen.search import grouped as module
from runlora_gen.search.candidates import goals, rows_for, setting_of
from runlora_gen.search.choose import decide
from runlora_gen.search.grouped import alone, decide_groups, decide_groups_of_step, sums_by_autograd
from runlora_gen.search.ranges import decide_step

ARCHITECTURE = load_architecture("llama-3-8b")
QKV, GATE_UP = groups(ARCHITECTURE)
#: Adapters in the layers' dtype: fewer programs, and the same questions.
WORKLOAD = Workload(adapter_dtype="bf16", tokens=(4096,))


def test_none_where_nobody_wants_them() -> None:
    workload = replace(WORKLOAD, groups="none")
    assert decide_groups(workload, ARCHITECTURE, 8) == ()
    assert decide_groups_of_step(workload, ARCHITECTURE, 8, 4096) == ()


def test_groups_with_dropout_draw_a_mask_for_each_linear() -> None:
    choices, others = (decide_groups(replace(WORKLOAD, dropout=rate), ARCHITECTURE, 8) for rate in (0.1, 0.0))
    assert [choice.layer for choice in choices] == [choice.layer for choice in others] != []
    for choice in choices:
        for part in choice.ranges:
            drawn = [op for op in part.decision.chosen.program.forward.operations if isinstance(op, Draw)]
            assert len(drawn) == len({op.out for op in drawn}) == len(choice.layer.linears)
        for forward in choice.forwards:
            assert not any(isinstance(op, Draw) for op in forward.decision.chosen.operations), "in evaluation"


def test_none_of_a_model_without_any() -> None:
    assert decide_groups(WORKLOAD, load_architecture("gpt2"), 8) == ()


@pytest.mark.parametrize("factor", [0.5, 0.99, 1.01])
def test_a_group_is_chosen_where_it_takes_no_longer(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """What its linears take one by one stands for a factor of what the group takes."""
    cost = decide_step(WORKLOAD, (QKV, *alone(ARCHITECTURE, [QKV])), 8, 4096)[0].chosen.cost
    apart = Times(cost.device_s / factor, cost.host_s / factor)
    monkeypatch.setattr(module, "_one_by_one", lambda group, by_shape, setting: apart)
    chosen = [group for group, _ in decide_groups_of_step(WORKLOAD, ARCHITECTURE, 8, 4096)]
    assert (QKV in chosen) is (factor < 1)


def test_one_by_one_counts_the_linears_and_the_sums() -> None:
    lone = layers(ARCHITECTURE)
    decisions = decide_step(WORKLOAD, lone, 8, 4096)
    by_shape = {(layer.in_features, layer.out_features): d for layer, d in zip(lone, decisions, strict=True)}
    setting = setting_of(WORKLOAD, QKV, 8, 4096)
    apart = module._one_by_one(QKV, by_shape, setting)
    costs = [by_shape[4096, width].chosen.cost for width in (4096, 1024, 1024)]
    moved = 2 * 3 * 4096 * 4096 * 2  # two sums: two read, one written
    device = setting.device
    assert apart.device_s == pytest.approx(
        sum(cost.device_s for cost in costs) + moved / device.bytes_per_s + 2 * device.launch_s
    )
    assert apart.host_s == pytest.approx(sum(cost.host_s for cost in costs) + 2 * device.host_s)


def test_without_an_input_gradient_there_are_no_sums() -> None:
    assert sums_by_autograd(setting_of(replace(WORKLOAD, input_grad=False), QKV, 8, 4096)) == Times()


def test_what_is_left_alone() -> None:
    left = {layer.name: (layer.count, layer.projections) for layer in alone(ARCHITECTURE, [QKV])}
    assert left == {
        "4096x4096": (32, ("o_proj",)),
        "4096x14336": (64, ("gate_proj", "up_proj")),
        "14336x4096": (32, ("down_proj",)),
    }


def test_a_limit_on_saved_bytes_is_one_for_each_linear() -> None:
    setting = setting_of(WORKLOAD, GATE_UP, 8, 4096)
    kept = decide(WORKLOAD, setting).chosen.cost.saved_bytes
    within = decide(replace(WORKLOAD, max_saved_bytes=kept // 2), setting).chosen.cost
    assert within.saved_bytes <= kept
    below = decide(replace(WORKLOAD, max_saved_bytes=kept // 2 - 1), setting).chosen.cost
    assert below.saved_bytes < kept


@pytest.mark.parametrize("group", [QKV, GATE_UP], ids=lambda group: group.kind)
@pytest.mark.parametrize("adapter_dtype", ["bf16", "fp32"])
def test_the_best_of_all_programs_is_chosen(group: Group, adapter_dtype: str) -> None:
    """By pricing each; single products by kernels where these are cheaper."""
    workload = replace(WORKLOAD, adapter_dtype=adapter_dtype)
    setting = setting_of(workload, group, 8, 4096)
    decision = decide(workload, setting)
    programs = enumerate_programs(
        setting.derivation, goals(workload, setting.derivation), table=rows_for(workload, setting), facts=setting.facts
    )
    assert len(decision.candidates) == len(programs) == len({program.id for program in programs})
    assert decision.chosen.cost.time_s <= min(price(program, setting).time_s for program in programs)
    # The sizes are the group's own.
    assert {name: setting.dims[name] for name in setting.dims if name.startswith("O_")} == {
        f"O_{linear}": width for linear, width in zip(group.linears, group.out_features, strict=True)
    }
