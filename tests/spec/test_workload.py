"""The workload's door: counts, factors and ranks from text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runlora_gen.spec.architecture import load_architecture
from runlora_gen.spec.errors import SpecError, nearest
from runlora_gen.spec.workload import check_ranks, parse_counts, parse_train


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


def test_rank_is_held_against_the_narrowest_projection() -> None:
    architecture = load_architecture("llama-3-8b")  # k_proj and v_proj: 4096 x 1024
    check_ranks((1, 1024), architecture)
    with pytest.raises(SpecError, match=r"1025 is above min\(in, out\) of k_proj \(4096x1024\).* allowed is 1024$"):
        check_ranks((8, 1025), architecture)
    check_ranks((1025,), architecture.restricted(["q_proj"]))


def test_nearest_suggests_only_what_is_near() -> None:
    assert "did you mean h100?" in nearest("H-100", ("a100", "h100"))
    assert nearest("zzz", ("a100", "h100")) == "'zzz' (known: a100, h100)"
