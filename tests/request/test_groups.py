"""Which linears share an input: read off an architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
from runlora_gen.request.architecture import Architecture, Projection, load_architecture
from runlora_gen.request.groups import Group, groups, ungrouped


def architecture(*projections: Projection) -> Architecture:
    return Architecture("model", "llama", "live", projections)


def projection(name: str, read: str = "x", out_features: int = 8, **fields: object) -> Projection:
    return replace(Projection(name, 16, out_features, False, 4, read), **fields)


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("llama-13b", ["qkv_5120x5120", "gate_up_5120x13824"]),
        ("llama-3-8b", ["qkv_4096x4096_1024_1024", "gate_up_4096x14336"]),
        ("qwen2.5-7b", ["qkv_3584x3584_512_512", "gate_up_3584x18944"]),
        ("roberta-base", ["qkv_768x768"]),
        ("gpt2", []),  # one linear has all three
    ],
)
def test_of_models(arch: str, names: list[str]) -> None:
    assert [group.name for group in groups(load_architecture(arch))] == names


def test_of_a_model_with_fewer_targets() -> None:
    (group,) = groups(load_architecture("llama-3-8b").restricted(["q_proj", "v_proj", "o_proj", "up_proj"]))
    assert group == Group(("q", "v"), 4096, (4096, 1024), False, 32, (("q_proj", "v_proj"),))
    assert (group.kind, group.name) == ("qv", "qv_4096x4096_1024")


def test_kinds_of_one_shape_are_one_group() -> None:
    model = architecture(
        *(projection(name, "encoder") for name in ("q_proj", "k_proj")),
        *(projection(name, "decoder") for name in ("wq", "wk")),
    )
    (group,) = groups(model)
    assert group.count == 8 and group.projections == (("q_proj", "k_proj"), ("wq", "wk"))
    assert all(map(group.has, model.projections))
    assert not group.has(projection("q_proj", out_features=9)) and not group.has(projection("v_proj"))


def test_a_bias_and_a_layout_of_one_are_of_the_group() -> None:
    (group,) = groups(architecture(projection("query", bias=True, layout="in_out"), projection("key")))
    assert group.bias and group.transposed_weight == ("query",)


@pytest.mark.parametrize(
    "projections",
    [
        pytest.param([projection("q_proj"), projection("k_proj", count=3)], id="some layers lack one"),
        pytest.param([projection("q_proj"), projection("k_proj", "y")], id="other inputs"),
        pytest.param([projection("q_proj"), projection("k_proj", in_features=17)], id="other widths"),
        pytest.param([projection("q_proj"), projection("q_lin")], id="one short name"),
        pytest.param([projection(name) for name in "abcd"], id="more than three"),
        pytest.param([projection("q_proj")], id="one"),
    ],
)
def test_what_is_no_group(projections: list[Projection]) -> None:
    assert groups(architecture(*projections)) == ()


def test_what_is_left() -> None:
    model = load_architecture("llama-3-8b")
    assert ungrouped(model, groups(model)) == {(4096, 4096): 32, (4096, 1024): 0, (4096, 14336): 0, (14336, 4096): 32}
    assert ungrouped(model, ()) == {(4096, 4096): 64, (4096, 1024): 64, (4096, 14336): 64, (14336, 4096): 32}
