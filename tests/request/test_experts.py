"""Stacks of experts: what they are called, which are kept, and how they are read from a manifest."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from runlora_gen.request.architecture import Architecture, load_architecture
from runlora_gen.request.errors import SpecError
from runlora_gen.request.experts import MAX_EXPERTS, MAX_TOP_K, UNASKED, Stack
from runlora_gen.request.workload import check_ranks, make_workload
from runlora_gen.search.limits import check_bias, check_request

GATE_UP = Stack("gate_up_proj", 8, 64, 48, True, 2, False, 3, module="mlp.experts")
DOWN = Stack("down_proj", 8, 24, 64, False, 2, False, 3, module="mlp.experts")
LEFT_OUT = {
    "embed_tokens": "embedding",
    "layers.*.mlp.experts.gate_up_proj": UNASKED,
    "layers.*.mlp.experts.down_proj": UNASKED,
}


def mixed(**changes: Any) -> Architecture:
    """Linears beside experts that can be asked for."""
    return replace(load_architecture("llama-9m"), **{"offered": (GATE_UP, DOWN), "left_out": LEFT_OUT, **changes})


def test_stacks_are_called_as_peft_calls_their_parameters() -> None:
    """By the name, or by an end of it that begins at a dot."""
    assert GATE_UP.parameter == "mlp.experts.gate_up_proj"
    for target in ("mlp.experts.gate_up_proj", "experts.gate_up_proj", "gate_up_proj"):
        assert GATE_UP.is_called(target) and not DOWN.is_called(target)
    for target in ("up_proj", "layers.mlp.experts.gate_up_proj", "mlp.experts", ""):
        assert not GATE_UP.is_called(target)
    alone = replace(GATE_UP, module="")
    assert alone.parameter == "gate_up_proj" and alone.is_called("gate_up_proj")


def test_what_was_asked_for_is_no_longer_left_out() -> None:
    kept = mixed().restricted(["q_proj"], ["gate_up_proj"])
    assert [p.name for p in kept.projections] == ["q_proj"]
    assert (kept.stacks, kept.offered) == ((GATE_UP,), (DOWN,))
    assert kept.left_out_lines() == [
        "left out: embed_tokens: embedding",
        f"left out: layers.*.mlp.experts.down_proj: {UNASKED}",
    ]
    alone = mixed().restricted([], ["mlp.experts.down_proj", "experts.gate_up_proj"])
    assert alone.projections == () and alone.stacks == (GATE_UP, DOWN)
    assert list(alone.left_out) == ["embed_tokens"]
    adapted = mixed(stacks=(GATE_UP,), offered=(DOWN,))
    assert adapted.restricted(["q_proj"]).stacks == (), "of linears alone there was talk"
    assert adapted.restricted([], ["down_proj"]).stacks == (DOWN,)


def test_unknown_stacks_are_refused() -> None:
    with pytest.raises(
        SpecError, match=r"^target_parameters: 'w1' is not in llama-9m, which has: mlp\.experts\.gate_up"
    ):
        mixed().restricted([], ["down_proj", "w1"])
    with pytest.raises(SpecError, match=r"'down_proj' is not in llama-9m, which has no experts that LoRA"):
        load_architecture("llama-9m").restricted(["q_proj"], ["down_proj"])
    with pytest.raises(SpecError, match="empty"):
        mixed().restricted([])


def test_ranks_and_biases_are_those_of_stacks_too() -> None:
    alone = mixed().restricted([], ["down_proj"])
    check_ranks((24,), alone)
    with pytest.raises(SpecError, match=r"25 is above min\(in, out\) of down_proj \(24x64\).* allowed is 24$"):
        check_ranks((25,), mixed().restricted(["q_proj"], ["down_proj"]))
    with pytest.raises(SpecError, match="needs a linear that has one"):
        check_bias([alone], make_workload(bias="all"))
    check_bias([replace(alone, stacks=(replace(DOWN, bias=True),))], make_workload(bias="all"))
    with pytest.raises(SpecError, match="no variant of the 24x64 experts saves at most 1 bytes at 4096 tokens"):
        check_request(alone, (8,), make_workload(max_saved_bytes=1))


# By a manifest


def manifest(**changes: Any) -> dict[str, Any]:
    architecture = mixed(stacks=(GATE_UP, replace(DOWN, layout="in_out", bias=True)))
    return {
        "generator": "runlora-gen",
        "arch": "mine",
        "model_type": "mixtral",
        "projections": [asdict(projection) for projection in architecture.projections],
        "stacks": [asdict(stack) for stack in architecture.stacks],
        **changes,
    }


def read(folder: Path, values: dict[str, Any]) -> Architecture:
    path = folder / "manifest.json"
    path.write_text(json.dumps(values))
    return load_architecture(str(path))


@pytest.mark.parametrize("missing", [(), ("projections",), ("stacks",)], ids=["both", "experts", "linears"])
def test_a_manifest_says_what_was_generated_for(tmp_path: Path, missing: tuple[str, ...]) -> None:
    values = manifest(**{name: [] for name in missing})
    found = read(tmp_path, values)
    assert [asdict(projection) for projection in found.projections] == values["projections"]
    assert [asdict(stack) for stack in found.stacks] == values["stacks"]
    assert found.offered == ()


def test_manifests_of_earlier_versions_have_no_stacks(tmp_path: Path) -> None:
    values = manifest()
    del values["stacks"]
    assert read(tmp_path, values).stacks == ()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a\nb"},
        {"name": None},
        {"experts": 0},
        {"experts": MAX_EXPERTS + 1},
        {"experts": True},
        {"in_features": 2**40},
        {"out_features": "64"},
        {"top_k": MAX_TOP_K + 1},
        {"top_k": 1.5},
        {"count": -1},
        {"module": "mlp/../experts"},
        {"module": ["mlp"]},
    ],
    ids=str,
)
def test_stacks_of_a_manifest_are_checked(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=r"^manifest\.json: stacks = ") as caught:
        read(tmp_path, manifest(stacks=[{**asdict(GATE_UP), **change}]))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("stacks", [None, {}, "gate_up_proj", ["gate_up_proj"]], ids=str)
def test_stacks_are_a_list_of_them(tmp_path: Path, stacks: object) -> None:
    with pytest.raises(SpecError, match=r"^manifest\.json: stacks = .*: expected a list of them"):
        read(tmp_path, manifest(stacks=stacks))


def test_a_manifest_of_nothing_is_refused(tmp_path: Path) -> None:
    for values in (manifest(projections=[], stacks=[]), {"generator": "runlora-gen", "arch": "a", "model_type": "b"}):
        with pytest.raises(SpecError, match=r"projections = .*: expected a list of them"):
            read(tmp_path, values)
