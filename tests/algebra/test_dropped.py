"""The linear with dropout: its mask is drawn once, by the forward, and nothing is merged."""

from __future__ import annotations

import pytest
from runlora_gen.algebra.derivation import CAST_ADAPTER, NO_FACTS
from runlora_gen.algebra.enumerate import Program, enumerate_programs
from runlora_gen.algebra.linear import DROPPED, LINEAR
from runlora_gen.algebra.liveness import saved_activations, wanted_operations
from runlora_gen.algebra.operations import Draw, Map
from runlora_gen.algebra.sites import DERIVATIONS

ALL = ("dX", "dA", "dB")
WIDE = frozenset({CAST_ADAPTER})
TORCH = DROPPED.rows(lambda _: False)


def programs(*goals: str, casts: bool = False) -> list[Program]:
    return list(enumerate_programs(DROPPED, goals or ALL, facts=WIDE if casts else NO_FACTS))


@pytest.mark.parametrize(
    ("goals", "count", "with_kernels"),
    [
        # Forwards × 2 ways of dA × dB (S kept, made again, or from G; with kernels two more, in one pass with P) × H,
        # which all of them read, kept or made again.
        (ALL, 2 * 2 * 3 * 2, 3 * 2 * 5 * 2),
        ((*ALL, "db"), 2 * 2 * 3 * 2, 3 * 2 * 5 * 2),
        (("dX", "dA"), 2 * 2 * 2, 3 * 2 * 2),
        # Nothing reads H where S is kept. P is wanted for dX alone here, too.
        (("dX", "dB"), 2 * (1 + 2 + 2), 3 * (1 + 2 + 2 + 1 + 2)),
        (("dA", "dB"), 2 * 2 * 3 * 2, None),
        # There is one way of dX: the mask comes first.
        (("dX",), 2, 3),
    ],
)
def test_exact_counts(goals: tuple[str, ...], count: int, with_kernels: int | None) -> None:
    assert len(enumerate_programs(DROPPED, goals, table=TORCH)) == count
    if with_kernels is not None:
        assert len(enumerate_programs(DROPPED, goals)) == with_kernels


@pytest.mark.parametrize("casts", [False, True])
def test_the_mask_is_drawn_by_the_forward_alone_and_kept_where_it_is_read(casts: bool) -> None:
    mask, left = DROPPED["K"], DROPPED["H"]
    found = programs(casts=casts)
    for program in found:
        assert [str(op) for op in program.forward.operations if isinstance(op, Draw)] == ["K = draw(dropout)"]
        assert not any(isinstance(operation, Draw) for operation in program.backward.operations)
        assert mask in program.kept, "dX goes through it"
        # H is kept, or made of X and the mask: a second mask would be another linear's.
        again = any(isinstance(op, Map) and op.out == left for op in program.backward.operations)
        assert again != (left in program.kept)
        assert DROPPED["dropout"] not in program.saved_inputs
    assert {left in program.kept for program in found} == {False, True}


@pytest.mark.parametrize("goals", [("dA", "dB"), ("dA",), ("dB",)])
def test_without_the_gradient_of_the_input_the_mask_is_kept_for_what_is_made_again(goals: tuple[str, ...]) -> None:
    found = programs(*goals)
    for program in found:
        again = any(isinstance(operation, Map) for operation in program.backward.operations)
        assert (DROPPED["K"] in program.kept) == again == (DROPPED["X"] in program.saved_inputs)
    assert {DROPPED["K"] in program.kept for program in found} == {False, True}


def test_of_gradients_that_are_not_wanted_no_mask_is_saved() -> None:
    """Generated for all of them, and run where the input wants none."""
    for program in programs():
        saved = set(saved_activations(program, frozenset({"dA", "dB"})))
        read = {symbol for op in wanted_operations(program.backward, frozenset({"dA", "dB"})) for symbol in op.reads}
        assert (DROPPED["K"] in saved) == (DROPPED["K"] in read) == (DROPPED["H"] not in program.kept)


@pytest.mark.parametrize("casts", [False, True])
def test_nothing_is_merged(casts: bool) -> None:
    assert not DROPPED.lossy and not DROPPED.deltas and not {"M", "D"} & DROPPED.symbols.keys()
    for program in programs(casts=casts):
        assert "merge" not in program.id and "delta" not in program.id


@pytest.mark.parametrize("casts", [False, True])
def test_ids_are_unique(casts: bool) -> None:
    found = programs(casts=casts)
    assert len({program.id for program in found}) == len(found)
    assert {program.id.partition("/")[0] for program in found} == {"base_first", "lowrank_first", "fused"}


def test_what_a_generator_gives_is_given_once() -> None:
    assert [str(symbol) for symbol in DROPPED.inputs()] == ["X", "W", "A", "B", "dropout"]
    assert [str(symbol) for symbol in DROPPED.inputs(again=True)] == ["X", "W", "A", "B"]
    assert LINEAR.inputs() == LINEAR.inputs(again=True)


def test_it_is_a_site_beside_the_linear() -> None:
    assert DERIVATIONS == (LINEAR, DROPPED) and len({site.site for site in DERIVATIONS}) == 2
    assert DROPPED.gradients == LINEAR.gradients and DROPPED.base == LINEAR.base
    assert set(map(str, DROPPED.casts)) == {"A", "B"}
