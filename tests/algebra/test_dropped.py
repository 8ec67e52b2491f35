"""The linear with dropout: its mask is drawn once, by the forward, or from a seed of it, and nothing is merged."""

from __future__ import annotations

import pytest
from runlora_gen.algebra.count import count_programs
from runlora_gen.algebra.derivation import CAST_ADAPTER, NO_FACTS, Derivation, Way
from runlora_gen.algebra.enumerate import Program, enumerate_programs, reads_once
from runlora_gen.algebra.group import group
from runlora_gen.algebra.linear import DROPPED, LINEAR
from runlora_gen.algebra.liveness import dependents, saved_activations, wanted_operations
from runlora_gen.algebra.operations import Draw, Fused, Map
from runlora_gen.algebra.sites import DERIVATIONS

ALL = ("dX", "dA", "dB")
WIDE = frozenset({CAST_ADAPTER})
TORCH = DROPPED.rows(lambda _: False)


def programs(*goals: str, casts: bool = False) -> list[Program]:
    return list(enumerate_programs(DROPPED, goals or ALL, facts=WIDE if casts else NO_FACTS))


def seeded(program: Program) -> bool:
    """Whether its mask is drawn by kernels, from a seed."""
    return DROPPED["seed"] in program.made


@pytest.mark.parametrize(
    ("goals", "count", "with_kernels"),
    [
        # Forwards × 2 ways of dA × dB (S kept, made again, or from G; with kernels two more, in one pass with P) × H,
        # which all of them read, kept or made again. With kernels likewise from a seed, where one gives dA and dX, and
        # there is no G.
        (ALL, 2 * 2 * 3 * 2, 3 * 2 * 5 * 2 + 3 * 4),
        ((*ALL, "db"), 2 * 2 * 3 * 2, 3 * 2 * 5 * 2 + 3 * 4),
        (("dX", "dA"), 2 * 2 * 2, 3 * 2 * 2 + 3),
        # Nothing reads H where S is kept. P is wanted for dX alone here, too. From a seed there is no dX alone.
        (("dX", "dB"), 2 * (1 + 2 + 2), 3 * (1 + 2 + 2 + 1 + 2)),
        (("dA", "dB"), 2 * 2 * 3 * 2, None),
        # There is one way of dX: the mask comes first.
        (("dX",), 2, 3),
    ],
)
def test_exact_counts(goals: tuple[str, ...], count: int, with_kernels: int | None) -> None:
    assert len(enumerate_programs(DROPPED, goals, table=TORCH)) == count == count_programs(DROPPED, goals, table=TORCH)
    if with_kernels is not None:
        assert len(enumerate_programs(DROPPED, goals)) == with_kernels == count_programs(DROPPED, goals)


@pytest.mark.parametrize("casts", [False, True])
def test_a_mask_is_drawn_by_the_forward_alone_and_kept_where_it_is_read(casts: bool) -> None:
    mask, left, seed = DROPPED["K"], DROPPED["H"], DROPPED["seed"]
    found = programs(casts=casts)
    for program in found:
        drawn = "seed" if seeded(program) else "K"
        assert [str(op) for op in program.forward.operations if isinstance(op, Draw)] == [f"{drawn} = draw(dropout)"]
        assert not any(isinstance(operation, Draw) for operation in program.backward.operations)
        assert (mask in program.kept) != (seed in program.kept), "dX goes through the one or the other"
        # H is kept, or made of X and the mask: a second mask would be another linear's. Kernels never write it.
        again = any(isinstance(op, Map) and op.out == left for op in program.backward.operations)
        assert again == (left not in program.kept and not seeded(program))
        assert DROPPED["dropout"] not in program.saved_inputs
    assert {left in program.kept for program in found if not seeded(program)} == {False, True}
    assert {seeded(program) for program in found} == {False, True}


def test_what_draws_from_a_seed_reads_no_other_mask() -> None:
    """Two draws are two masks: none of both kinds is enumerated."""
    read = {op: {str(symbol) for symbol in op.reads} for program in programs() for op in program.operations}
    for program in programs():
        assert not any("K" in read[op] or "H" in read[op] for op in program.operations) or not seeded(program)
    both = [way for way in DROPPED.table if way.name == "draw"]
    assert len(both) == 2 and not reads_once(DROPPED, both) and all(reads_once(DROPPED, [way]) for way in both)


@pytest.mark.parametrize("goals", [("dA", "dB"), ("dA",), ("dB",)])
def test_without_the_gradient_of_the_input_the_mask_is_kept_for_what_is_made_again(goals: tuple[str, ...]) -> None:
    found = [program for program in programs(*goals) if not seeded(program)]
    for program in found:
        again = any(isinstance(operation, Map) for operation in program.backward.operations)
        assert (DROPPED["K"] in program.kept) == again == (DROPPED["X"] in program.saved_inputs)
    assert {DROPPED["K"] in program.kept for program in found} == {False, True}


def test_of_gradients_that_are_not_wanted_no_mask_is_saved() -> None:
    """Generated for all of them, and run where the input wants none."""
    for program in programs():
        saved = set(saved_activations(program, frozenset({"dA", "dB"})))
        read = {symbol for op in wanted_operations(program.backward, frozenset({"dA", "dB"})) for symbol in op.reads}
        assert (
            (DROPPED["K"] in saved) == (DROPPED["K"] in read) == (not (seeded(program) or DROPPED["H"] in program.kept))
        )
        assert (DROPPED["seed"] in saved) == seeded(program)


def test_a_kernel_is_told_what_is_wanted_of_it() -> None:
    """The mask is of the shape of X, and not of what it holds: dX alone needs no X."""
    program = next(program for program in programs() if seeded(program) and DROPPED["S"] in program.kept)
    for wanted, needed in ((("dX", "dA"), True), (("dX",), False), (("dA",), True), (("dB",), False)):
        saved = set(map(str, saved_activations(program, frozenset(wanted))))
        assert ("X" in saved) == needed and ("seed" in saved) == (wanted != ("dB",))
        running = [op.kernel for op in wanted_operations(program.backward, frozenset(wanted)) if isinstance(op, Fused)]
        assert ("dx_da" in running) == (wanted != ("dB",))


def test_of_a_group_what_is_left_of_x_is_read_by_its_own_linear() -> None:
    site = group(("q", "k"), dropout=True)
    kernels = {op.kernel for way in site.table for op in way.operations if isinstance(op, Fused)}
    assert kernels == {"x_at_dropped", "x_ats_dropped", "dx_das", "fused_gemm", "fused_gemms", "p_db", "p_dbs"}
    assert site.evaluated is group(("q", "k")) and DROPPED.evaluated is LINEAR
    assert str(site.way("dX dA_q dA_k", "x", *map(str, _row(site, "dx_das").operations)).operations[0]) == (
        "dx_das: K_q := draw(seed_q); K_k := draw(seed_k); H_q := drop(X, K_q); H_k := drop(X, K_k); "
        "dA_q = P_q.T @ H_q; dA_k = P_k.T @ H_k; dH_q := P_q @ A_q; dH_k := P_k @ A_k; "
        "dX = drop(dH_q, K_q); dX += drop(dH_k, K_k); dX += dY_q @ W_q; dX += dY_k @ W_k"
    )


def _row(site: Derivation, kernel: str) -> Way:
    return next(
        way for way in site.table if any(isinstance(op, Fused) and op.kernel == kernel for op in way.operations)
    )


def test_a_kernel_of_several_gives_all_gradients_of_lora_a_or_none() -> None:
    site = group(("q", "k"), dropout=True)
    found = enumerate_programs(site, ("dX", "dA_q", "dA_k", "dB_q", "dB_k"))
    program = next(program for program in found if "dx_das" in program.kernels and site["S_q"] in program.kept)
    needed = {str(symbol): set(map(str, goals)) for symbol, goals in dependents(program.backward).items()}
    assert needed["P_q"] >= {"dX", "dA_q", "dA_k"} and needed["seed_k"] == {"dX", "dA_q", "dA_k"}
    assert needed["X"] == {"dA_q", "dA_k"} and needed["W_q"] == needed["A_q"] == {"dX"}


@pytest.mark.parametrize("casts", [False, True])
def test_nothing_is_merged(casts: bool) -> None:
    assert not DROPPED.lossy and not DROPPED.deltas and not {"M", "D"} & DROPPED.symbols.keys()
    for program in programs(casts=casts):
        assert "merge" not in program.id and "delta" not in program.id


@pytest.mark.parametrize("casts", [False, True])
def test_ids_are_unique(casts: bool) -> None:
    found = programs(casts=casts)
    assert len({program.id for program in found}) == len(found)
    assert {program.id.partition("/")[0] for program in found} == {
        f"{way}-{of}" for way in ("base_first", "lowrank_first", "fused") for of in ("x_at", "seeded")
    }


def test_what_a_generator_gives_is_given_once() -> None:
    assert [str(symbol) for symbol in DROPPED.inputs()] == ["X", "W", "A", "B", "dropout"]
    assert [str(symbol) for symbol in DROPPED.inputs(again=True)] == ["X", "W", "A", "B"]
    assert LINEAR.inputs() == LINEAR.inputs(again=True)


def test_it_is_a_site_beside_the_linear() -> None:
    assert {LINEAR, DROPPED} < set(DERIVATIONS) and len({site.site for site in DERIVATIONS}) == len(DERIVATIONS)
    assert DROPPED.gradients == LINEAR.gradients and DROPPED.base == LINEAR.base
    assert set(map(str, DROPPED.casts)) == {"A", "B"}
