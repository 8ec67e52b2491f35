"""The linear on a quantized base: W is made of its codes where it is read, and kept where memory for it is named."""

from __future__ import annotations

import pytest
from runlora_gen.algebra.count import count_programs
from runlora_gen.algebra.derivation import CAST_ADAPTER, KEEPS_WEIGHTS, NO_FACTS, Derivation, Facts
from runlora_gen.algebra.enumerate import enumerate_programs
from runlora_gen.algebra.group import group
from runlora_gen.algebra.linear import DROPPED, LINEAR, QUANTIZED, QUANTIZED_DROPPED, lone_linear
from runlora_gen.algebra.operations import Convert, Fused, Operation
from runlora_gen.algebra.sites import DERIVATIONS

ALL = ("dX", "dA", "dB")
WIDE = frozenset({CAST_ADAPTER})
KEPT = frozenset({KEEPS_WEIGHTS})
SITES = (QUANTIZED, QUANTIZED_DROPPED)
every_site = pytest.mark.parametrize("site", SITES, ids=lambda site: site.site)


def makes_weights(operation: Operation) -> bool:
    """Whether it reads the codes."""
    return any(symbol.store == "code" for symbol in operation.reads)


@pytest.mark.parametrize(
    ("facts", "goals", "count"),
    [
        # Forwards (in either order, or merged) × those of dX × (S kept or made again, or dA and dB by way of G).
        (NO_FACTS, ALL, 152),
        (NO_FACTS, ("dX",), 16),
        (NO_FACTS, ("dA", "dB"), 32),
        # What dX reads is kept or made again: twice as many. Without dX nothing in the backward reads a weight.
        (KEPT, ALL, 304),
        (KEPT, ("dX",), 32),
        (KEPT, ("dA", "dB"), 32),
        # A and B cast by the forward are kept or cast again.
        (WIDE, ALL, 608),
    ],
)
def test_exact_counts(facts: Facts, goals: tuple[str, ...], count: int) -> None:
    found = enumerate_programs(QUANTIZED, goals, facts=facts)
    assert len(found) == count == count_programs(QUANTIZED, goals, facts=facts)
    assert len({program.id for program in found}) == count


@every_site
@pytest.mark.parametrize("facts", [NO_FACTS, KEPT, WIDE, WIDE | KEPT], ids=lambda facts: " ".join(sorted(facts)))
@pytest.mark.parametrize("goals", [ALL, ("dX",), ("dA", "dB"), ("dA",), (*ALL, "db")])
def test_counts_are_those_of_the_enumeration(site: Derivation, facts: Facts, goals: tuple[str, ...]) -> None:
    assert count_programs(site, goals, facts=facts) == len(enumerate_programs(site, goals, facts=facts))


@every_site
def test_a_weight_is_made_in_the_forward_and_again_in_the_backward(site: Derivation) -> None:
    for program in enumerate_programs(site, ALL):
        for phase in (program.forward, program.backward):
            (made,) = filter(makes_weights, phase.operations)
            assert isinstance(made, Convert) or (isinstance(made, Fused) and made.kernel == "dequantize_merged")
        assert site["Q"] in program.saved_inputs and not any(symbol.store == "weight" for symbol in program.kept)
    for program in enumerate_programs(site, ("dA", "dB")):
        assert not any(map(makes_weights, program.backward.operations)) and site["Q"] not in program.saved_inputs


@every_site
def test_where_weights_may_be_kept_they_are_kept_or_made_again(site: Derivation) -> None:
    found = enumerate_programs(site, ALL, facts=KEPT)
    weights = {name: site[name] for name in ("W", "M") if name in site.symbols}
    seen = set()
    for program in found:
        held = [name for name, symbol in weights.items() if symbol in program.kept]
        assert len(held) <= 1
        assert any(map(makes_weights, program.backward.operations)) == (not held) == (site["Q"] in program.saved_inputs)
        seen.update(held or [None])
    assert seen == {*weights, None}
    free = {program.id for program in enumerate_programs(site, ALL)}
    assert free == {p.id for p in found if not set(weights.values()) & set(p.kept)}, "the fact adds programs alone"


def test_the_update_is_merged_before_the_one_rounding() -> None:
    """absmax · code lies on no grid of 16 bits: what is merged in the same pass is rounded as W itself would be."""
    assert not QUANTIZED.lossy and not QUANTIZED.deltas and "D" not in QUANTIZED.symbols and LINEAR.lossy
    found = enumerate_programs(QUANTIZED, ALL, facts=KEPT)
    merged = [program for program in found if QUANTIZED["M"] in program.made]
    assert merged and not any(program.lossy_in_16_bit for program in found)
    for program in merged:
        kernels = [operation for operation in program.operations if QUANTIZED["M"] in operation.outputs]
        # Made once where it is kept, or where one phase alone reads it.
        assert 1 <= len(kernels) <= 2
        for kernel in kernels:
            assert isinstance(kernel, Fused) and kernel.inner == (QUANTIZED["W"],), "W is never written"
            assert str(kernel) == "dequantize_merged: W := dequantize(Q); M = W + s * B @ A"


def test_sites_by_what_is_asked_for() -> None:
    assert lone_linear() is LINEAR and lone_linear(dropout=True) is DROPPED
    assert lone_linear(quantized=True) is QUANTIZED and lone_linear(dropout=True, quantized=True) is QUANTIZED_DROPPED
    assert set(SITES) < set(DERIVATIONS) and QUANTIZED_DROPPED.evaluated is QUANTIZED
    assert [str(operation) for operation in QUANTIZED.base] == [
        "W = dequantize(Q)",
        *map(str, LINEAR.base),
    ]
    assert [str(symbol) for symbol in QUANTIZED.inputs()] == ["X", "Q", "A", "B"]
    assert "M" not in QUANTIZED_DROPPED.symbols


def rows(site: Derivation, *targets: str) -> dict[str, list[str]]:
    """Ways of some symbols, by their names."""
    sought = tuple(site[target] for target in targets)
    return {way.name: [str(operation) for operation in way.operations] for way in site.table if way.targets == sought}


@pytest.mark.parametrize("dropout", [False, True])
def test_rows_of_a_group(dropout: bool) -> None:
    site = group(("q", "k"), dropout=dropout, quantized=True)
    assert site.site.startswith("group of q, k on quantized bases")
    made = ["W_q = dequantize(Q_q)", "W_k = dequantize(Q_k)"]
    assert rows(site, "W_q", "W_k")["dequantize"] == made and [str(op) for op in site.base][:2] == made
    assert rows(site, "Y_q", "Y_k").keys() == {"base_first", "lowrank_first", "fused", "in_one"}
    assert not any(name.startswith(("M", "D")) for name in site.symbols), "a group merges nothing"
    assert site.evaluated == (group(("q", "k"), quantized=True) if dropout else None)
    assert site is not group(("q", "k"), dropout=dropout)
    goals = ("dX", "dA_q", "dA_k", "dB_q", "dB_k")
    for facts in (NO_FACTS, KEPT):
        found = enumerate_programs(site, goals, facts=facts)
        assert len(found) == count_programs(site, goals, facts=facts) > 0
        kept = {symbol for program in found for symbol in program.kept if symbol.store == "weight"}
        assert kept == ({site["W_q"], site["W_k"]} if facts else set())
