"""The table of a group, which follows from that of the lone linear."""

from __future__ import annotations

import re

import pytest
from runlora_gen.algebra.group import group
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.algebra.operations import Fused

QKV = group(("q", "k", "v"))


def test_one_derivation_of_one_group() -> None:
    assert group(("q", "k", "v")) is QKV is not group(("gate", "up"))


def test_rows_are_those_of_the_lone_linear_and_the_kernels_of_several() -> None:
    own = {(tuple(map(str, way.targets)), way.name) for way in LINEAR.table}
    stems = [
        (tuple(dict.fromkeys(re.sub(r"_[qkv]$", "", str(target)) for target in way.targets)), way.name)
        for way in QKV.table
    ]
    together = {(("S",), "one_pass"), (("Y",), "in_one"), (("dX",), "in_one"), (("dA",), "one_pass")}
    together |= {(("P", "dB"), "one_launch")}
    assert set(stems) - own == together and len(stems) == len(set(stems))
    # Beside what merges, and whole-weight gradients, a group lacks the kernel that writes dX of one linear.
    left = {key for key in own - set(stems) if not {"M", "D", "G"} & set(key[0])}
    assert left == {
        *((("Y",), name) for name in ("merged", "delta")),
        *((("dX",), name) for name in ("merged", "delta", "fused")),
        (("dA",), "bt_g"),
        (("dB",), "g_at"),
    }


@pytest.mark.parametrize(
    ("target", "name", "formulas"),
    [
        ("S_q", "x_at", [f"S_{j} = s_{j} * X @ A_{j}.T" for j in "qkv"]),
        ("Y_q", "fused", [f"fused_gemm: Y_{j} = S_{j} @ B_{j}.T + b_{j}; Y_{j} += X @ W_{j}.T" for j in "qkv"]),
        (
            "dX",
            "lowrank_first",
            ["dX = P_q @ A_q", *(f"dX += P_{j} @ A_{j}" for j in "kv"), *(f"dX += dY_{j} @ W_{j}" for j in "qkv")],
        ),
        ("dA_q", "one_pass", ["pt_xs: dA_q = P_q.T @ X; dA_k = P_k.T @ X; dA_v = P_v.T @ X"]),
        (
            "P_q",
            "one_launch",
            ["p_dbs: " + "; ".join(f"P_{j} = s_{j} * dY_{j} @ B_{j}; dB_{j} = dY_{j}.T @ S_{j}" for j in "qkv")],
        ),
    ],
)
def test_formulas(target: str, name: str, formulas: list[str]) -> None:
    (way,) = (way for way in QKV.table if str(way.targets[0]) == target and way.name == name)
    assert list(map(str, way.operations)) == formulas


def test_dx_is_one_sum() -> None:
    """Begun once in every way, and by the frozen linears."""
    for operations in (QKV.base, *(way.operations for way in QKV.table)):
        steps = [step for op in operations for step in (op.parts if isinstance(op, Fused) else (op,))]
        writers = [step for step in steps if str(step.out) == "dX"]
        assert [writer.accumulate for writer in writers] == [False, *[True] * (len(writers) - 1)][: len(writers)]
        assert len(writers) in (0, 3, 6)


def test_indices_are_each_linear_s_own() -> None:
    assert QKV["W_k"].shape == ("O_k", "I") and QKV["lora_A_v"].shape == ("R_v", "I") and QKV["X"].shape == ("T", "I")
    assert [argument.name for argument in QKV.arguments if argument.name.startswith("scaling")] == [
        "scaling_q",
        "scaling_k",
        "scaling_v",
    ]
    assert QKV.inputs()[0] == QKV["X"] and len(QKV.arguments) == 1 + 3 * (len(LINEAR.arguments) - 1)
