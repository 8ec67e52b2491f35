"""Which groups are chosen, and that theirs is a choice by the prices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from runlora_gen.algebra.enumerate import enumerate_programs
from runlora_gen.algebra.operations import Draw
from runlora_gen.cost.passes import Times
from runlora_gen.cost.price import price, spares
from runlora_gen.request.architecture import Architecture, load_architecture
from runlora_gen.request.groups import Group, groups
from runlora_gen.request.layers import layers
from runlora_gen.request.mlps import Mlp, mlps
from runlora_gen.request.workload import Workload
from runlora_gen.search import grouped as module
from runlora_gen.search.candidates import goals, rows_for, setting_of
from runlora_gen.search.choose import decide
from runlora_gen.search.grouped import alone, decide_groups, decide_groups_of_step
from runlora_gen.search.ranges import decide_step

ARCHITECTURE = load_architecture("llama-3-8b")
QKV, GATE_UP = groups(ARCHITECTURE)
#: Adapters in the layers' dtype: fewer programs, and the same questions.
WORKLOAD = Workload(adapter_dtype="bf16", tokens=(4096,))


#: Where kernels are priced by the roofline, those of an MLP are candidates; under graphs the host does not count.
ON_A100 = replace(WORKLOAD, device="a100", launch="graph")
(MLP,) = mlps(ARCHITECTURE)


def each_alone(architecture: Architecture, workload: Workload = WORKLOAD) -> dict[tuple[int, int], Times]:
    """What a linear of each shape takes."""
    lone = layers(architecture)
    return {
        (layer.in_features, layer.out_features): Times.of(decision.chosen.cost)
        for layer, decision in zip(lone, decide_step(workload, lone, 8, 4096), strict=True)
    }


def test_none_where_nobody_wants_them() -> None:
    workload = replace(WORKLOAD, groups="none")
    assert decide_groups(workload, ARCHITECTURE, 8) == ()
    assert decide_groups_of_step(workload, ARCHITECTURE, 8, 4096) == ()


def test_groups_with_dropout_draw_a_mask_for_each_linear() -> None:
    choices, others = (decide_groups(replace(WORKLOAD, dropout=rate), ARCHITECTURE, 8) for rate in (0.1, 0.0))
    assert [choice.layer for choice in choices] == [choice.layer for choice in others] == [QKV, MLP]
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
    monkeypatch.setattr(module, "_apart", lambda group, by_shape: apart)
    monkeypatch.setattr(module, "_spared", lambda decision: Times())
    chosen = [group for group, _ in decide_groups_of_step(WORKLOAD, ARCHITECTURE, 8, 4096)]
    assert (QKV in chosen) is (factor < 1)


def test_one_by_one_counts_the_linears_and_the_sums() -> None:
    by_shape = each_alone(ARCHITECTURE)
    setting = setting_of(WORKLOAD, QKV, 8, 4096)
    apart = module._apart(QKV, by_shape) + sum(spares(setting), Times())
    costs = [by_shape[4096, width] for width in (4096, 1024, 1024)]
    moved = 2 * 3 * 4096 * 4096 * 2  # two sums: two read, one written
    device = setting.device
    assert apart.device_s == pytest.approx(
        sum(cost.device_s for cost in costs) + moved / device.bytes_per_s + 2 * device.launch_s
    )
    assert apart.host_s == pytest.approx(sum(cost.host_s for cost in costs) + 2 * device.host_s)


def test_without_an_input_gradient_there_are_no_sums() -> None:
    assert spares(setting_of(replace(WORKLOAD, input_grad=False), QKV, 8, 4096)) == (Times(), Times())


def test_an_mlp_is_chosen_in_place_of_its_group() -> None:
    """At every count that is asked for, or not at all."""
    chosen = dict(decide_groups_of_step(ON_A100, ARCHITECTURE, 8, 4096))
    assert list(chosen) == [QKV, MLP]
    assert [choice.layer for choice in decide_groups(ON_A100, ARCHITECTURE, 8)] == [QKV, MLP]


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"base": "nf4"}, {"base": "int8"}, {"base": "fp8-block"}])
def test_an_mlp_is_chosen_with_dropout_and_of_any_base(changes: dict[str, Any]) -> None:
    """Where the device has what multiplies such weights."""
    for device in ("a100", "h200"):
        if device != "a100" or not changes.get("base", "").startswith("fp8"):
            workload = replace(ON_A100, device=device, **changes)
            assert MLP in dict(decide_groups_of_step(workload, ARCHITECTURE, 8, 4096)), device


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": "none"},
        {"max_saved_bytes": 10**9},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_where_no_mlp_is_tried(changes: dict[str, Any]) -> None:
    """Their group is as it was."""
    workload = replace(ON_A100, **changes)
    found = [site for site, _ in decide_groups_of_step(workload, ARCHITECTURE, 8, 4096)]
    assert not any(isinstance(site, Mlp) for site in found)
    assert found == [site for site, _ in decide_groups_of_step(workload, without_mlps(), 8, 4096)]
    assert not any(isinstance(choice.layer, Mlp) for choice in decide_groups(workload, ARCHITECTURE, 8))


def without_mlps() -> Architecture:
    """The same, of which nobody says what is between."""
    return replace(ARCHITECTURE, gated=())


def test_an_mlp_s_rivals_are_its_group_and_down_and_what_the_model_does_between() -> None:
    """By hand: what is read and written between, and the sum of both gradients of the input."""
    group, mlp = (
        dict(decide_groups_of_step(ON_A100, architecture, 8, 4096))[site]
        for architecture, site in ((without_mlps(), GATE_UP), (ARCHITECTURE, MLP))
    )
    device, inner, outer = mlp.setting.device, 4096 * 14336 * 2, 4096 * 4096 * 2
    assert Times.of(mlp.chosen.cost).device_s <= (
        group.chosen.cost.device_s
        + each_alone(ARCHITECTURE, ON_A100)[14336, 4096].device_s
        + (2 + 3) * inner / device.bytes_per_s  # act(gate), times up
        + 3 * 3 * inner / device.bytes_per_s
        + 5 * device.launch_s
    )
    forward, backward = spares(mlp.setting)
    # silu and its gradient; the products; up's gradient. gate and up's gradients of the input are added.
    assert forward.device_s == pytest.approx(5 * inner / device.bytes_per_s + 2 * device.launch_s)
    moved = 9 * inner + 3 * outer
    assert backward.device_s == pytest.approx(moved / device.bytes_per_s + 4 * device.launch_s)
    assert (forward.host_s, backward.host_s) == pytest.approx((2 * device.host_s, 4 * device.host_s))
    without = spares(setting_of(replace(ON_A100, input_grad=False), MLP, 8, 4096))[1]
    assert without.device_s == pytest.approx(9 * inner / device.bytes_per_s + 3 * device.launch_s)


@pytest.mark.parametrize("factor", [0.5, 0.99, 1.01])
@pytest.mark.parametrize("grouped", [True, False])
def test_an_mlp_is_chosen_where_it_takes_no_longer(
    monkeypatch: pytest.MonkeyPatch, factor: float, grouped: bool
) -> None:
    """Than its group and down where the group is chosen, else than its three linears: the group is then left as it is.

    What the three take stands for a factor of what the MLP takes.
    """
    cost = decide_step(ON_A100, (MLP, *alone(ARCHITECTURE, [MLP])), 8, 4096)[0].chosen.cost
    whole = Times(cost.device_s / factor, cost.host_s / factor)
    pair = decide_step(ON_A100, (GATE_UP, *alone(ARCHITECTURE, [GATE_UP])), 8, 4096)[0].chosen.cost
    monkeypatch.setattr(module, "_spared", lambda decision: Times())
    # The group is chosen where its two linears take much longer than it; then it and down are what the MLP is held
    # against, and the linears no more.
    of_pair = Times(1.0, 1.0) if grouped else Times()
    down = whole + Times.of(pair) * -1

    def apart(site: Group | Mlp, known: dict[tuple[int, int], Times]) -> Times:
        if isinstance(site, Mlp):
            return Times(1.0, 1.0) if grouped else whole
        known[14336, 4096] = down
        return of_pair

    monkeypatch.setattr(module, "_apart", apart)
    chosen = [site for site, _ in decide_groups_of_step(ON_A100, ARCHITECTURE, 8, 4096)]
    assert (MLP in chosen) is (factor < 1)
    assert (GATE_UP in chosen) is (grouped and factor > 1)


@pytest.mark.parametrize("criterion", ["time", "memory"])
def test_an_mlp_that_takes_longer_is_chosen_for_its_memory(monkeypatch: pytest.MonkeyPatch, criterion: str) -> None:
    """A group keeps what its linears keep: it is chosen by time all the same."""
    monkeypatch.setattr(module, "_spared", lambda decision: Times())
    monkeypatch.setattr(module, "_apart", lambda *_: Times())
    workload = replace(ON_A100, criterion=criterion)
    chosen = [site for site, _ in decide_groups_of_step(workload, ARCHITECTURE, 8, 4096)]
    assert chosen == ([MLP] if criterion == "memory" else [])
    assert [choice.layer for choice in decide_groups(workload, ARCHITECTURE, 8)] == chosen


def test_of_gate_and_up_in_one_linear() -> None:
    """Its rivals are that linear and down; with dropout, and on codes, it is not tried."""
    model = load_architecture("phi-3-mini")
    (mlp,) = mlps(model)
    assert mlp.fused and [site for site, _ in decide_groups_of_step(ON_A100, model, 8, 4096)] == [mlp]
    known = each_alone(model, ON_A100)
    wide, down = mlp.held
    assert module._apart(mlp, known) == known[wide] + known[down]
    for changes in ({"dropout": 0.1}, {"base": "nf4"}):
        assert decide_groups_of_step(replace(ON_A100, **changes), model, 8, 4096) == ()


def test_what_pays_at_some_counts_alone_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLP must pay at all of them; where it does not, its group is kept, which did as well at every one."""
    workload = replace(ON_A100, tokens=(2048, 4096))
    real = module.decide_groups_of_step

    def at(workload: Workload, architecture: Architecture, rank: int, tokens: int, decided: Any) -> Any:
        return real(workload, ARCHITECTURE if tokens == 4096 else without_mlps(), rank, tokens, decided)

    monkeypatch.setattr(module, "decide_groups_of_step", at)
    assert [choice.layer for choice in decide_groups(workload, ARCHITECTURE, 8)] == [QKV, GATE_UP]
    assert [choice.layer for choice in decide_groups(replace(workload, tokens=(4096,)), ARCHITECTURE, 8)] == [QKV, MLP]


def test_an_mlp_of_the_shapes_of_another_s_is_left() -> None:
    """Files are called by shapes: two that differ in what is between would be one."""
    with_gelu = replace(
        ARCHITECTURE,
        projections=(
            *ARCHITECTURE.projections,
            *(replace(p, name=f"other_{p.name}") for p in ARCHITECTURE.projections if "mlp" in p.input),
        ),
        gated=(
            *ARCHITECTURE.gated,
            *(
                replace(g, projections=tuple(f"other_{name}" for name in g.projections), activation="gelu_gated")
                for g in ARCHITECTURE.gated
            ),
        ),
    )
    assert [mlp.activation for mlp in mlps(with_gelu)] == ["silu_gated", "gelu_gated"]
    assert not any(isinstance(site, Mlp) for site, _ in decide_groups_of_step(ON_A100, with_gelu, 8, 4096))


def test_what_an_mlp_leaves_alone() -> None:
    left = {layer.name: (layer.count, layer.projections) for layer in alone(ARCHITECTURE, [QKV, MLP])}
    assert left == {"4096x4096": (32, ("o_proj",))}
    left = {layer.name: (layer.count, layer.projections) for layer in alone(ARCHITECTURE, [MLP])}
    assert left == {"4096x4096": (64, ("q_proj", "o_proj")), "4096x1024": (64, ("k_proj", "v_proj"))}


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


@pytest.mark.parametrize("group", [QKV, GATE_UP, MLP], ids=lambda group: group.kind)
@pytest.mark.parametrize("adapter_dtype", ["bf16", "fp32"])
def test_the_best_of_all_programs_is_chosen(group: Group | Mlp, adapter_dtype: str) -> None:
    """By pricing each; single products by kernels where these are cheaper."""
    workload = replace(ON_A100 if isinstance(group, Mlp) else WORKLOAD, adapter_dtype=adapter_dtype)
    setting = setting_of(workload, group, 8, 4096)
    decision = decide(workload, setting)
    programs = enumerate_programs(
        setting.derivation, goals(workload, setting.derivation), table=rows_for(workload, setting), facts=setting.facts
    )
    assert len(decision.candidates) == len(programs) == len({program.id for program in programs})
    assert decision.chosen.cost.time_s <= min(price(program, setting).time_s for program in programs)
    # The sizes are the group's own.
    widths = group.out_features if isinstance(group, Group) else tuple(width for _, width in group.shapes)
    assert {name: setting.dims[name] for name in setting.dims if name.startswith("O_")} == {
        f"O_{linear}": width for linear, width in zip(group.linears, widths, strict=True)
    }
    assert setting.dims.get("I_down") == (group.intermediate_features if isinstance(group, Mlp) else None)
