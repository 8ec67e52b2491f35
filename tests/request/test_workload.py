"""The workload's door: counts, factors and ranks from text."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runlora_gen.request.architecture import LIVE, load_architecture
from runlora_gen.request.errors import SpecError, nearest
from runlora_gen.request.workload import (
    check_ranks,
    make_workload,
    parse_counts,
    parse_dropout,
    parse_dtype,
    parse_name,
    parse_targets,
    parse_train,
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("8",), (8,)),
        (("8,16", "4"), (4, 8, 16)),
        ((" 8 , 8 ", "008"), (8,)),
        (("1", "100"), (1, 100)),
    ],
)
def test_counts(values: tuple[str, ...], expected: tuple[int, ...]) -> None:
    assert parse_counts("--rank", values, maximum=100) == expected


@pytest.mark.parametrize(
    "value", ["", ",", "8,", "0", "-1", "+1", "1.5", "1e3", "0x8", "1_0", "101", "٨", "²", "9" * 30, "8 8", "nan"]
)
def test_bad_counts(value: str) -> None:
    with pytest.raises(SpecError, match=r"^--rank: .* give whole numbers from 1 to 100$") as caught:
        parse_counts("--rank", (value,), maximum=100)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 160


def test_no_counts() -> None:
    with pytest.raises(SpecError, match="--rank: no value given"):
        parse_counts("--rank", (), maximum=100)


@given(st.sets(st.integers(1, 100), min_size=1), st.randoms(use_true_random=False))
def test_counts_ascend_without_repeats(counts: set[int], random) -> None:
    drawn = [*counts, *random.choices(sorted(counts), k=3)]
    random.shuffle(drawn)
    assert parse_counts("--rank", (",".join(map(str, drawn)),), maximum=100) == tuple(sorted(counts))


@pytest.mark.parametrize(
    ("value", "expected"),
    [("a,b", ("a", "b")), ("b,a", ("a", "b")), (" A ", ("a",)), ("b", ("b",)), ("a,a", ("a",)), ("B,b,A", ("a", "b"))],
)
def test_train(value: str, expected: tuple[str, ...]) -> None:
    assert parse_train(value) == expected


@pytest.mark.parametrize("value", ["", ",", "a,", "ab", "a b", "c", "a,b,c", "lora_A", "a\nb"])
def test_bad_train(value: str) -> None:
    with pytest.raises(SpecError, match=r"^--train: .* give a,b or a or b$"):
        parse_train(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", 0.0), (0, 0.0), (-0.0, 0.0), ("0.05", 0.05), (".5", 0.5), ("1e-3", 0.001), (" 0.1 ", 0.1), (0.1, 0.1),
        (0.9999999999999999, 0.9999999999999999),
    ],
)  # fmt: skip
def test_dropout(value: object, expected: float) -> None:
    found = parse_dropout("--dropout", value)
    assert type(found) is float and str(found) == str(expected)
    assert parse_dropout("--dropout", str(found)) == found


@pytest.mark.parametrize(
    "value",
    [
        1, "1", "1.0", 1.5, -0.1, "-0.1", -1e-300, float("nan"), "nan", "inf", "x", "", "0.1 0.2", "0,1", "1/2", "10%",
        "0_1", "0.0_5", "٠.٥", "1e-", "..", "1e999", "0x0", "9" * 5000, True, False, None, 0j, b"0.1", (0.1,),
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_bad_dropout(value: object) -> None:
    with pytest.raises(SpecError, match=r"^--dropout: .* give a number from 0 up to but not 1$") as caught:
        parse_dropout("--dropout", value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 160
    if value is not None:  # which there is as good as not given
        with pytest.raises(SpecError, match=r"^dropout: "):
            make_workload(dropout=value)


def test_rank_is_held_against_the_narrowest_projection() -> None:
    architecture = load_architecture("llama-3-8b")  # k_proj and v_proj: 4096 x 1024
    check_ranks((1, 1024), architecture)
    with pytest.raises(SpecError, match=r"1025 is above min\(in, out\) of k_proj \(4096x1024\).* allowed is 1024$"):
        check_ranks((8, 1025), architecture)
    check_ranks((1025,), architecture.restricted(["q_proj"]))


def test_nearest_suggests_only_what_is_near() -> None:
    assert "did you mean h100?" in nearest("H-100", ("a100", "h100"))
    assert nearest("zzz", ("a100", "h100")) == "'zzz' (known: a100, h100)"


def test_thousands_of_tokens_are_powers_of_two() -> None:
    assert parse_counts("--tokens", ("2k,16k", "4096", "4K"), maximum=10**6, kilo=True) == (2048, 4096, 16384)
    for value in ("k", "4kk", "0k", "-1k", "1.5k", "٤k", "977k"):
        with pytest.raises(SpecError, match=r"--tokens: .* or such as 4k for 4096"):
            parse_counts("--tokens", (value,), maximum=10**6, kilo=True)


def test_torch_s_names_of_dtypes_are_understood() -> None:
    names = ("bf16", "fp16", "fp32", "bfloat16", "float16", "float32")
    assert [parse_dtype("--dtype", name) for name in names] == ["bf16", "fp16", "fp32"] * 2
    with pytest.raises(SpecError, match="--dtype: 'float64' is not allowed; give one of bf16, fp16, fp32, bfloat16"):
        parse_dtype("--dtype", "float64")


def test_all_linear_is_no_restriction() -> None:
    assert parse_targets(("all-linear",)) == parse_targets((" All-Linear ",)) == parse_targets(()) == ()
    assert parse_targets(("q_proj, v_proj", "up_proj")) == ("q_proj", "v_proj", "up_proj")


def test_names_are_those_of_packages() -> None:
    assert [parse_name("--name", name) for name in ("mine", "My-Llama_3.1")] == ["mine", "my_llama_3_1"]
    for value in ("", "1x", "_x", "x_", "a b", "a/b", "..", "a\n", "for", "ü", "x" * 65):
        with pytest.raises(SpecError, match=r"^--name: "):
            parse_name("--name", value)


def test_a_live_model_may_have_adapters_on_what_is_narrower() -> None:
    """PEFT puts them on gates to one number, too: a rank is refused that is above all linears."""
    architecture = replace(load_architecture("llama-3-8b"), source=LIVE)
    check_ranks((1025, 4096), architecture)
    with pytest.raises(SpecError, match=r"4097 is above min\(in, out\) of q_proj \(4096x4096\).* allowed is 4096$"):
        check_ranks((4097,), architecture)


def test_gates_to_one_number_are_left_out() -> None:
    architecture = load_architecture("llama-3-8b")
    gate = replace(architecture.projections[0], name="shared_expert_gate", out_features=1)
    with_gate = replace(architecture, projections=(gate, *architecture.projections))
    assert with_gate.without_gates() == architecture
    said = "left out: shared_expert_gate: 4096x1, which no rank is below"
    assert with_gate.without_gates().left_out_lines() == [said]
    assert architecture.without_gates() is architecture
    alone = replace(architecture, projections=(gate,))
    assert alone.without_gates() is alone, "there is nothing else"
