"""Gated MLPs: read off an architecture, said by families' files, and read from a manifest."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from runlora_gen.emit.package import build_package
from runlora_gen.request import architecture as data
from runlora_gen.request.architecture import (
    Architecture,
    Gated,
    Projection,
    architecture_names,
    architecture_of,
    load_architecture,
)
from runlora_gen.request.errors import SpecError
from runlora_gen.request.groups import ungrouped
from runlora_gen.request.mlps import Mlp, mlps
from runlora_gen.request.workload import make_workload

NAMES = ("gate_proj", "up_proj", "down_proj")
OTHER_NAMES = ("w1", "w3", "w2")
#: Of the catalogue, those without a gate.
WITHOUT = {"gpt2", "opt-350m", "roberta-base", "roberta-large", "vit-base"}


def triple(
    sizes: tuple[int, int, int] = (16, 24, 16),
    *,
    names: tuple[str, str, str] = NAMES,
    read: str = "mlp",
    counts: tuple[int, int, int] = (4, 4, 4),
) -> list[Projection]:
    width, between, out = sizes
    shapes = ((width, between, read), (width, between, read), (between, out, f"{read} hidden"))
    return [
        Projection(name, i, o, False, count, of) for name, (i, o, of), count in zip(names, shapes, counts, strict=True)
    ]


def architecture(*projections: Projection, gated: tuple[Gated, ...] = (Gated(NAMES, "silu_gated"),)) -> Architecture:
    return Architecture("model", "llama", "live", projections, gated=gated)


@pytest.mark.parametrize(
    ("arch", "mlp"),
    [
        ("llama-13b", Mlp(5120, 13824, 5120, "silu_gated", False, 40, (NAMES,))),
        ("mistral-7b", Mlp(4096, 14336, 4096, "silu_gated", False, 32, (NAMES,))),
        ("qwen2.5-7b", Mlp(3584, 18944, 3584, "silu_gated", False, 28, (NAMES,))),
        ("qwen3-8b", Mlp(4096, 12288, 4096, "silu_gated", False, 36, (NAMES,))),
        ("gemma-2-9b", Mlp(3584, 14336, 3584, "gelu_tanh_gated", False, 42, (NAMES,))),
    ],
)
def test_of_models(arch: str, mlp: Mlp) -> None:
    assert mlps(load_architecture(arch)) == (mlp,)


def fused(*, wide: int = 48, between: int = 24) -> list[Projection]:
    both, down = ("gate_up_proj", 16, wide, "mlp"), ("down_proj", between, 16, "mlp hidden")
    return [Projection(name, i, o, False, 4, read) for name, i, o, read in (both, down)]


HALVES = ("gate_up_proj", "gate_up_proj", "down_proj")


def test_gate_and_up_may_be_the_halves_of_one_linear() -> None:
    gated = (Gated(HALVES, "silu_gated"),)
    model = architecture(*fused(), gated=gated)
    (mlp,) = mlps(model)
    assert mlp == Mlp(16, 24, 16, "silu_gated", False, 4, (HALVES,), fused=True)
    assert mlp.shapes == ((16, 24), (16, 24), (24, 16)) and mlp.held == ((16, 48), (24, 16))
    assert all(map(mlp.has, model.projections)) and list(map(mlp.reads, model.projections)) == [True, False]
    assert ungrouped(model, [mlp]) == {(16, 48): 0, (24, 16): 0}
    assert mlps(architecture(*fused(wide=24), gated=gated)) == mlps(architecture(*fused(wide=46), gated=gated)) == ()
    assert mlps(replace(model, gated=(Gated(HALVES, "silu_gated", (16, 24, 16)),))) == (mlp,)
    assert mlps(replace(model, gated=(Gated(HALVES, "silu_gated", (16, 48, 16)),))) == ()
    (apart,) = mlps(architecture(*triple()))
    assert apart.held == apart.shapes


def test_the_rest_of_the_catalogue() -> None:
    assert {name for name in architecture_names() if not mlps(load_architecture(name))} == WITHOUT


def test_what_they_are_called() -> None:
    (mlp,) = mlps(load_architecture("llama-13b"))
    assert (mlp.kind, mlp.linears, mlp.name) == ("mlp", ("gate", "up", "down"), "mlp_5120x13824")
    assert replace(mlp, out_features=8).name == "mlp_5120x13824x8"


@pytest.mark.parametrize("left", ["gate_proj", "up_proj", "down_proj"])
def test_of_a_model_with_fewer_targets(left: str) -> None:
    model = load_architecture("llama-9m")
    assert mlps(model.restricted(NAMES)) == mlps(model)
    without = model.restricted([p.name for p in model.projections if p.name != left])
    assert mlps(without) == () and without.gated == ()
    # Also where nobody has restricted it.
    assert mlps(replace(model, projections=tuple(p for p in model.projections if p.name != left))) == ()


def test_gates_of_experts_change_nothing() -> None:
    model = architecture(*triple(), Projection("shared_expert_gate", 16, 1, False, 4, "mlp"))
    assert model.without_gates().gated == model.gated and mlps(model.without_gates()) == mlps(model) != ()
    one = architecture(*triple((16, 1, 16)), Projection("q_proj", 16, 16, False, 4, "attention"))
    assert one.without_gates().gated == ()


def test_biases_and_layouts_of_one_are_of_all() -> None:
    gate, up, down = triple()
    (mlp,) = mlps(architecture(gate, replace(up, bias=True), replace(down, layout="in_out")))
    assert mlp == Mlp(16, 24, 16, "silu_gated", True, 4, (NAMES,), ("down_proj",))


def test_alike_ones_of_several_names_are_one() -> None:
    gated = (Gated(NAMES, "silu_gated"), Gated(OTHER_NAMES, "silu_gated"))
    model = architecture(*triple(), *triple(names=OTHER_NAMES, read="other", counts=(3, 3, 3)), gated=gated)
    (mlp,) = mlps(model)
    assert (mlp.count, mlp.projections) == (7, (NAMES, OTHER_NAMES))
    apart = replace(model, gated=(gated[0], Gated(OTHER_NAMES, "gelu_gated")))
    assert [(m.activation, m.count, m.projections) for m in mlps(apart)] == [
        ("silu_gated", 4, (NAMES,)),
        ("gelu_gated", 3, (OTHER_NAMES,)),
    ]


def test_sizes_of_one_name_are_kept_apart() -> None:
    """As of the first layers of some mixtures, and of experts that are shared."""
    model = architecture(*triple(), *triple((16, 32, 16), read="shared", counts=(2, 2, 2)), *triple((8, 28, 8)))
    assert [(mlp.name, mlp.count) for mlp in mlps(model)] == [("mlp_16x24", 4), ("mlp_16x32", 2), ("mlp_8x28", 4)]
    one = replace(model, gated=(Gated(NAMES, "silu_gated", (16, 32, 16)),))
    assert [mlp.name for mlp in mlps(one)] == ["mlp_16x32"]
    several = replace(model, gated=(*one.gated, Gated(NAMES, "gelu_gated", (8, 28, 8))))
    assert [(mlp.name, mlp.activation) for mlp in mlps(several)] == [
        ("mlp_16x32", "silu_gated"),
        ("mlp_8x28", "gelu_gated"),
    ]


def test_whose_is_a_last_that_fits_two_is_said_by_the_sizes() -> None:
    model = architecture(*triple(), *triple((8, 24, 8)))
    assert mlps(model) == ()
    gated = tuple(Gated(NAMES, "silu_gated", (width, 24, width)) for width in (16, 8))
    assert [mlp.name for mlp in mlps(replace(model, gated=gated))] == ["mlp_16x24", "mlp_8x24"]
    crossed = (*gated, Gated(NAMES, "silu_gated", (16, 24, 8)))
    assert mlps(replace(model, gated=crossed)) == ()


def test_rows_of_one_shape_are_counted_together() -> None:
    first = triple(read="layers")
    second = [replace(p, bias=True) for p in triple(read="encoder", counts=(2, 2, 2))]
    (mlp,) = mlps(architecture(*first, *second))
    assert (mlp.count, mlp.bias) == (6, True)


@pytest.mark.parametrize(
    "projections",
    [
        pytest.param(triple(counts=(4, 4, 3)), id="some layers lack the last"),
        pytest.param(triple(counts=(4, 3, 4)), id="some layers lack one"),
        pytest.param([*triple()[:1], *triple(read="other")[1:]], id="other inputs"),
        pytest.param([*triple()[:2], *triple((16, 25, 16))[2:]], id="other widths between"),
        pytest.param([*triple()[:1], *triple((17, 24, 16))[1:]], id="other widths"),
        pytest.param([*triple()[:1], *triple((16, 25, 16))[1:]], id="gate and up differ"),
        pytest.param([*triple(), *triple((16, 24, 8))], id="two lasts of one width"),
        pytest.param([*triple(), triple(read="else")[0]], id="one more that is no MLP's"),
        pytest.param(triple(names=OTHER_NAMES), id="other names"),
        pytest.param([], id="none"),
    ],
)
def test_what_is_none(projections: list[Projection]) -> None:
    assert mlps(architecture(*projections)) == ()


@pytest.mark.parametrize(
    "gated",
    [
        (),
        (Gated(NAMES, "gpt_oss"),),
        (Gated(NAMES, "silu"),),
        (Gated(NAMES, "no_such"),),
        (Gated(NAMES, "silu_gated"), Gated(NAMES, "gelu_gated")),
        (Gated(NAMES, "silu_gated"), Gated(NAMES, "gelu_gated", (16, 24, 16))),
        (Gated(NAMES, "silu_gated", (16, 24, 17)),),
    ],
    ids=["none", "interleaved", "not gated", "unknown", "two", "two of a size", "another size"],
)
def test_what_is_said_of_none(gated: tuple[Gated, ...]) -> None:
    assert mlps(architecture(*triple(), gated=gated)) == ()


def test_what_is_said_twice_is_there_once() -> None:
    gated = (Gated(NAMES, "silu_gated"), Gated(NAMES, "silu_gated", (16, 24, 16)))
    (mlp,) = mlps(architecture(*triple(), gated=gated))
    assert mlp.count == 4


# By a config

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def activations(model_type: str, **fields: object) -> list[str]:
    return [mlp.activation for mlp in mlps(architecture_of({**SMALL, "model_type": model_type, **fields}))]


@pytest.mark.parametrize(
    ("model_type", "fields", "activation"),
    [
        ("llama", {}, "silu_gated"),
        ("llama", {"hidden_act": None}, "silu_gated"),
        ("llama", {"hidden_act": "swish"}, "silu_gated"),
        ("granite", {"hidden_act": "gelu"}, "gelu_gated"),
        ("olmo2", {"hidden_act": "gelu_new"}, "gelu_tanh_gated"),
        ("qwen2", {"hidden_act": "quick_gelu"}, None),
        ("qwen3", {"hidden_act": "relu"}, None),
        ("qwen3", {"hidden_act": ""}, None),
        ("gemma2", {}, "gelu_tanh_gated"),
        ("gemma2", {"hidden_act": "silu"}, "gelu_tanh_gated"),  # is not looked at
        ("gemma2", {"hidden_activation": "gelu"}, "gelu_gated"),
        ("gemma", {"hidden_act": "gelu"}, "gelu_tanh_gated"),
        ("gemma", {"hidden_act": "silu"}, "silu_gated"),
        ("gemma3_text", {"hidden_activation": "silu"}, "silu_gated"),
        ("phi3", {"hidden_act": "silu"}, "silu_gated"),
        ("phi3", {"hidden_act": "relu"}, None),
        ("starcoder2", {"hidden_act": "silu"}, None),
    ],
)
def test_configs_name_the_function(model_type: str, fields: dict[str, object], activation: str | None) -> None:
    assert activations(model_type, **fields) == ([] if activation is None else [activation])


@pytest.mark.parametrize("value", [1, True, ["silu"], {"name": "silu"}], ids=str)
def test_functions_are_names(value: object) -> None:
    with pytest.raises(SpecError, match=r"^config: hidden_act = .*: expected the name of an activation$"):
        activations("llama", hidden_act=value)


def read_as(folder: Path, model_type: str, values: dict[str, object]) -> Architecture:
    path = folder / "config.json"
    path.write_text(json.dumps({**SMALL, "head_dim": 16, **values}))
    return load_architecture(str(path), model_type=model_type)


def test_what_is_read_as_another_type_must_do_the_same_there(tmp_path: Path) -> None:
    assert read_as(tmp_path, "llama", {"model_type": "mistral"}).gated
    assert read_as(tmp_path, "llama", {"model_type": "mistral", "hidden_act": "gelu"}).gated
    # Its field has another name: Llama's default would be wrong.
    assert read_as(tmp_path, "llama", {"model_type": "gemma2"}).gated == ()
    (said,) = read_as(tmp_path, "llama", {"model_type": "unheard_of", "hidden_act": "gelu"}).gated
    assert said.activation == "gelu_gated"


@pytest.mark.parametrize("model_type", sorted(data._families()))
def test_families_with_gate_and_up_say_what_is_between(model_type: str) -> None:
    family = data._families()[model_type]
    names = {rule.name for rule in family.projections}
    gates = {"gate_proj", "up_proj"} <= names or "gate_up_proj" in names
    rules = [rule for rule in family.gated if not rule.model_types or model_type in rule.model_types]
    assert len(rules) == gates
    assert {name for rule in family.gated for name in rule.model_types} <= set(family.model_types)


# By a manifest


def manifest(model: Architecture, **changes: Any) -> dict[str, Any]:
    projections = [asdict(projection) for projection in model.projections]
    gated = [asdict(mlp) for mlp in model.gated]
    named = {"generator": "runlora-gen", "arch": "mine", "model_type": "llama"}
    return {**named, "projections": projections, "gated": gated, **changes}


def read(folder: Path, values: dict[str, Any]) -> Architecture:
    path = folder / "manifest.json"
    path.write_text(json.dumps(values))
    return load_architecture(str(path))


def test_a_manifest_carries_them(tmp_path: Path) -> None:
    model = architecture(*triple(), gated=(Gated(NAMES, "silu_gated", (16, 24, 16)), Gated(OTHER_NAMES, "gelu_gated")))
    found = read(tmp_path, manifest(model))
    assert found.gated == model.gated and mlps(found) == mlps(model)


def test_a_package_says_them(tmp_path: Path) -> None:
    model = load_architecture("llama-9m")
    values = json.loads(build_package(model, 4, make_workload(), out=tmp_path).files["manifest.json"])
    assert read(tmp_path, values).gated == model.gated != ()


def test_manifests_of_earlier_versions_have_none(tmp_path: Path) -> None:
    values = manifest(architecture(*triple()))
    del values["gated"]
    assert read(tmp_path, values).gated == ()


def test_activations_of_later_versions_are_left(tmp_path: Path) -> None:
    model = architecture(*triple(), gated=(Gated(NAMES, "of_later"),))
    assert read(tmp_path, manifest(model)).gated == ()


@pytest.mark.parametrize(
    "change",
    [
        {"projections": None},
        {"projections": "abc"},
        {"projections": ["gate_proj", "up_proj"]},
        {"projections": ["gate_proj", "up_proj", "a\nb"]},
        {"projections": ["gate_proj", "up_proj", 3]},
        {"sizes": [16, 24]},
        {"sizes": [16, 24, 0]},
        {"sizes": [16, True, 16]},
        {"sizes": [16, 24, 2**40]},
        {"sizes": {"a": 1}},
    ],
    ids=str,
)
def test_those_of_a_manifest_are_checked(tmp_path: Path, change: dict[str, object]) -> None:
    row = asdict(Gated(NAMES, "silu_gated", (16, 24, 16)))
    with pytest.raises(SpecError, match=r"^manifest\.json: gated = ") as caught:
        read(tmp_path, manifest(architecture(*triple()), gated=[{**row, **change}]))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("gated", [None, {}, "gate_proj", ["gate_proj"]], ids=str)
def test_they_are_a_list(tmp_path: Path, gated: object) -> None:
    with pytest.raises(SpecError, match=r"^manifest\.json: gated = .*: expected a list of them"):
        read(tmp_path, manifest(architecture(*triple()), gated=gated))
