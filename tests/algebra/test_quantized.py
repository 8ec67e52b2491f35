"""The linear on a quantized base: W is made of its codes where it is read, and kept where memory for it is named."""

from __future__ import annotations

import pytest
from runlora_gen.algebra.count import count_programs
from runlora_gen.algebra.derivation import CAST_ADAPTER, KEEPS_WEIGHTS, NO_FACTS, Derivation, Facts
from runlora_gen.algebra.enumerate import enumerate_programs
from runlora_gen.algebra.experts import OF_EXPERTS
from runlora_gen.algebra.group import group
from runlora_gen.algebra.linear import (
    DROPPED,
    FLOAT8,
    FLOAT8_DROPPED,
    LINEAR,
    QUANTIZED,
    QUANTIZED_DROPPED,
    SCALED,
    SCALED_DROPPED,
    lone_linear,
)
from runlora_gen.algebra.mlp import OF_MLPS
from runlora_gen.algebra.operations import BITS, Convert, Fused, Operation
from runlora_gen.algebra.sites import DERIVATIONS
from runlora_gen.request.bases import BASES, Form

ALL = ("dX", "dA", "dB")
WIDE = frozenset({CAST_ADAPTER})
KEPT = frozenset({KEEPS_WEIGHTS})
SITES = (QUANTIZED, QUANTIZED_DROPPED, SCALED, SCALED_DROPPED, FLOAT8, FLOAT8_DROPPED)
#: The function that makes a weight of its codes, by the form of those.
MADE: dict[Form, str] = {"codes": "dequantize", "scaled": "rescale", "float8": "rescale"}
every_site = pytest.mark.parametrize("site", SITES, ids=lambda site: site.site)
every_form = pytest.mark.parametrize("form", MADE)
MERGING = {f"{made}_merged" for made in MADE.values()}


def makes_weights(operation: Operation) -> bool:
    """Whether it reads the codes."""
    return any(symbol.coded for symbol in operation.reads)


@every_form
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
def test_exact_counts(facts: Facts, goals: tuple[str, ...], count: int, form: Form) -> None:
    site = lone_linear(base=form)
    found = enumerate_programs(site, goals, facts=facts)
    assert len(found) == count == count_programs(site, goals, facts=facts)
    assert len({program.id for program in found}) == count


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("facts", [NO_FACTS, WIDE | KEPT], ids=lambda facts: " ".join(sorted(facts)))
def test_numbers_of_8_bits_have_the_programs_of_4_bits(dropout: bool, facts: Facts) -> None:
    """Forms differ in how a weight is made of its codes, and in nothing that a choice is about: not without a fact."""

    def texts(form: Form) -> list[list[str]]:
        site = lone_linear(dropout=dropout, base=form)
        programs = enumerate_programs(site, ALL, facts=facts)
        return [[str(op).replace(MADE[form], "make") for op in program.operations] for program in programs]

    assert texts("codes") == texts("scaled") == texts("float8")
    ids = [[p.id for p in enumerate_programs(lone_linear(dropout=dropout, base=form), ALL)] for form in MADE]
    assert ids[0] == ids[1] == ids[2]


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
            assert isinstance(made, Convert) or (isinstance(made, Fused) and made.kernel in MERGING)
        assert site["Q"] in program.saved_inputs and not any(symbol.store == "weight" for symbol in program.kept)
    for program in enumerate_programs(site, ("dA", "dB")):
        assert not any(map(makes_weights, program.backward.operations)) and site["Q"] not in program.saved_inputs


@every_site
def test_where_weights_may_be_kept_they_are_kept_or_made_again(site: Derivation) -> None:
    found = enumerate_programs(site, ALL, facts=KEPT)
    weights = {name: site[name] for name in ("W", "M") if name in site.symbols}
    seen = set[str | None]()
    for program in found:
        held = [name for name, symbol in weights.items() if symbol in program.kept]
        assert len(held) <= 1
        assert any(map(makes_weights, program.backward.operations)) == (not held) == (site["Q"] in program.saved_inputs)
        seen.add(held[0] if held else None)
    assert seen == {*weights, None}
    free = {program.id for program in enumerate_programs(site, ALL)}
    assert free == {p.id for p in found if not set(weights.values()) & set(p.kept)}, "the fact adds programs alone"


@every_form
def test_the_update_is_merged_before_the_one_rounding(form: Form) -> None:
    """scale · code lies on no grid of 16 bits: what is merged in the same pass is rounded as W itself would be.

    But numbers of float8 have three bits, and one scale takes them to few places between two of 16: they dither too
    little, so that a merge of theirs must be allowed.
    """
    site, make = lone_linear(base=form), MADE[form]
    assert site.lossy == ({site["M"]} if form == "float8" else set()) and LINEAR.lossy
    assert not site.deltas and "D" not in site.symbols
    found = enumerate_programs(site, ALL, facts=KEPT)
    merged = [program for program in found if site["M"] in program.made]
    assert merged and [p for p in found if p.lossy_in_16_bit] == (merged if form == "float8" else [])
    for program in merged:
        kernels = [operation for operation in program.operations if site["M"] in operation.outputs]
        # Made once where it is kept, or where one phase alone reads it.
        assert 1 <= len(kernels) <= 2
        for kernel in kernels:
            assert isinstance(kernel, Fused) and kernel.inner == (site["W"],), "W is never written"
            assert str(kernel) == f"{make}_merged: W := {make}(Q); M = W + s * B @ A"


def test_sites_by_what_is_asked_for() -> None:
    assert lone_linear() is LINEAR and lone_linear(dropout=True) is DROPPED
    assert lone_linear(base="plain") is LINEAR and lone_linear(dropout=True, base="plain") is DROPPED
    assert lone_linear(base="codes") is QUANTIZED and lone_linear(dropout=True, base="codes") is QUANTIZED_DROPPED
    assert lone_linear(base="scaled") is SCALED and lone_linear(dropout=True, base="scaled") is SCALED_DROPPED
    assert lone_linear(base="float8") is FLOAT8 and lone_linear(dropout=True, base="float8") is FLOAT8_DROPPED
    assert {LINEAR, DROPPED, *SITES, *OF_EXPERTS, *OF_MLPS} == set(DERIVATIONS)
    assert len({site.site for site in DERIVATIONS}) == len(DERIVATIONS)


@every_form
def test_what_a_site_is_given(form: Form) -> None:
    site, dropped = lone_linear(base=form), lone_linear(dropout=True, base=form)
    assert dropped.evaluated is site and site.coded and dropped.coded and not LINEAR.coded
    assert [str(operation) for operation in site.base] == [f"W = {MADE[form]}(Q)", *map(str, LINEAR.base)]
    assert [str(symbol) for symbol in site.inputs()] == ["X", "Q", "A", "B"]
    assert "M" not in dropped.symbols
    codes = {name for name, symbol in site.symbols.items() if symbol.coded}
    assert codes == {"Q", *(("Xq", "dYq", "Qt") if form == "float8" else ())}
    assert {BITS[site[name].store] for name in codes} == {4 if form == "codes" else 8}
    assert {site.form, dropped.form} == {form} and LINEAR.form == "plain"


def test_every_base_has_a_form_of_its_own_kind() -> None:
    """What generated code knows by one name is of one form, and what a linear's class says is of one kind, or two."""
    assert list(BASES) == [base.name for base in BASES.values()] and BASES["plain"].form == "plain"
    for base in BASES.values():
        assert (base.form == "plain") == (not base.forwards) == (not base.takes)
        assert (base.form in ("scaled", "float8")) == bool(base.codes)
        assert (base.form == "float8") == base.codes.startswith("torch.float8")
        assert {other.form for other in BASES.values() if other.kind == base.kind} == {base.form}
        assert base.bits >= {"plain": 16, "codes": 4, "scaled": 8, "float8": 8}[base.form]
    assert [base.name for base in BASES.values() if base.rows] == ["fp8"], "blocks have more scales than rows"
    shared = {base.kind for base in BASES.values() if any("FP8Linear" in forward for forward in base.forwards)}
    assert shared == {"fp8", "fp8-block"}, "their class does not tell them apart: its block_size does"


def rows(site: Derivation, *targets: str) -> dict[str, list[str]]:
    """Ways of some symbols, by their names."""
    sought = tuple(site[target] for target in targets)
    return {way.name: [str(operation) for operation in way.operations] for way in site.table if way.targets == sought}


@every_form
@pytest.mark.parametrize("dropout", [False, True])
def test_rows_of_a_group(dropout: bool, form: Form) -> None:
    site = group(("q", "k"), dropout=dropout, base=form)
    on = {"codes": "quantized bases", "scaled": "bases of int8", "float8": "bases of float8"}[form]
    assert site.site == f"group of q, k on {on}{' with dropout' if dropout else ''}"
    made = [f"W_q = {MADE[form]}(Q_q)", f"W_k = {MADE[form]}(Q_k)"]
    assert site["Q_q"].coded and site["Q_q"].store == lone_linear(base=form)["Q"].store
    assert rows(site, "W_q", "W_k")["dequantize"] == made and [str(op) for op in site.base][:2] == made
    assert rows(site, "Y_q", "Y_k").keys() == {"base_first", "lowrank_first", "fused", "in_one"}
    assert not any(name.startswith(("M", "D")) for name in site.symbols), "a group merges nothing"
    assert site.evaluated == (group(("q", "k"), base=form) if dropout else None)
    assert site is not group(("q", "k"), dropout=dropout)
    goals = ("dX", "dA_q", "dA_k", "dB_q", "dB_k")
    for facts in (NO_FACTS, KEPT):
        found = enumerate_programs(site, goals, facts=facts)
        assert len(found) == count_programs(site, goals, facts=facts) > 0
        kept = {symbol for program in found for symbol in program.kept if symbol.store == "weight"}
        assert kept == ({site["W_q"], site["W_k"]} if facts else set())
