"""Products of float8: rows that two facts allow, of which nothing is kept, and none of a group."""

from __future__ import annotations

import itertools

import pytest
from runlora_gen.algebra.count import count_programs
from runlora_gen.algebra.derivation import (
    CAST_ADAPTER,
    FLOAT8_BACKWARD,
    FLOAT8_FORWARD,
    KEEPS_WEIGHTS,
    NO_FACTS,
    Derivation,
    Facts,
)
from runlora_gen.algebra.enumerate import enumerate_forwards, enumerate_programs
from runlora_gen.algebra.group import group
from runlora_gen.algebra.linear import FLOAT8, FLOAT8_DROPPED, LINEAR, SCALED, SCALED_DROPPED
from runlora_gen.algebra.operations import BITS, Contract, Convert, Fused, Reduce, Symbol, parse
from runlora_gen.algebra.sites import DERIVATIONS

ALL = ("dX", "dA", "dB")
FORWARD, BOTH = frozenset({FLOAT8_FORWARD}), frozenset({FLOAT8_FORWARD, FLOAT8_BACKWARD})
SITES = (FLOAT8, FLOAT8_DROPPED)
#: What there is of float8 in a forward, and in a backward.
OURS = {FLOAT8_FORWARD: {"mX", "Xq"}, FLOAT8_BACKWARD: {"mdY", "dYq", "Qt"}}
every_site = pytest.mark.parametrize("site", SITES, ids=lambda site: site.site)


def symbols(*shapes: tuple[str, str]) -> dict[str, Symbol]:
    return {name: Symbol(name, tuple(shape)) for name, shape in shapes}


KNOWN = symbols(("U", "TI"), ("V", "TI"), ("v", "T"), ("w", "I"), ("Q", "IO"), ("R", "OI"), ("N", "TO"))


@pytest.mark.parametrize(
    ("formula", "kind", "reads"),
    [
        ("w = sum(U)", Reduce, "U"),
        ("v = largest(U)", Reduce, "U"),
        ("v = largest(U, Q)", Reduce, "U Q"),
        ("V = quantize(U, v)", Convert, "U v"),
        ("V = quantize(U, v, Q)", Convert, "U v Q"),
        ("R = transpose(Q)", Convert, "Q"),
    ],
)
def test_what_is_no_product_parses_back(formula: str, kind: type, reads: str) -> None:
    step = parse(formula, KNOWN)
    assert isinstance(step, kind) and str(step) == formula and parse(str(step), KNOWN) == step
    assert " ".join(map(str, step.reads)) == reads and not step.accumulate
    fused = parse(f"k: {formula}", KNOWN)
    assert isinstance(fused, Fused) and fused.parts == (step,) and not fused.products
    assert step.formula == ("w = Σₜ U" if "sum" in formula else formula)


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("w = largest(U)", "w has the shape"),
        ("v = sum(U)", "v has the shape"),
        ("N = quantize(U, v)", "N has the shape"),
        ("Q = transpose(Q)", "Q has the shape"),
        ("v = largest(U, Q, Q)", "largest takes 1 or 2 symbols, not 3"),
        ("V = quantize(U)", "quantize takes 2 or 3 symbols, not 1"),
        ("V = quantize(U, v, Q, Q)", "quantize takes 2 or 3 symbols, not 4"),
        ("R = transpose(Q, v)", "transpose takes 1 symbols, not 2"),
        ("v += largest(U)", "largest does not add"),
    ],
)
def test_what_does_not_fit_is_refused(formula: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(formula, KNOWN)


@pytest.mark.parametrize(
    ("facts", "goals", "counts"),
    [
        # Without a fact as on int8. In the forward there are two ways more for Y where there were four, one beside
        # dropout where there were three: mX is made with S or by itself.
        (NO_FACTS, ALL, (152, 72)),
        (FORWARD, ALL, (152 * 6 // 4, 72 * 4 // 3)),
        (FORWARD, ("dA", "dB"), (32 * 6 // 4, 48 * 4 // 3)),
        (BOTH, ("dA", "dB"), (32 * 6 // 4, 48 * 4 // 3)),
        # dX of float8 is one more way, and where one kernel makes P and dB, mdY comes with them or by itself.
        (BOTH, ("dX",), ((4 + 1) * 6, 4)),
        (BOTH, ALL, (312, 96)),
    ],
)
def test_exact_counts(facts: Facts, goals: tuple[str, ...], counts: tuple[int, int]) -> None:
    assert tuple(len(enumerate_programs(site, goals, facts=facts)) for site in SITES) == counts


FACTS = [frozenset(facts) for facts in itertools.product(*((fact, "") for fact in sorted(FLOAT8.facts)))]


@every_site
@pytest.mark.parametrize("facts", [facts - {""} for facts in FACTS], ids=lambda facts: ", ".join(sorted(facts)))
def test_counts_are_those_of_the_enumeration(site: Derivation, facts: Facts) -> None:
    for goals in (ALL, ("dX",), ("dA", "dB"), ("dX", "dB", "db"), ()):
        assert count_programs(site, goals, facts=facts) == len(enumerate_programs(site, goals, facts=facts))


@every_site
@pytest.mark.parametrize("facts", [NO_FACTS, FORWARD, BOTH], ids=["none", "forward", "both"])
def test_rows_are_there_under_their_facts(site: Derivation, facts: Facts) -> None:
    made = {str(symbol) for program in enumerate_programs(site, ALL, facts=facts) for symbol in program.made}
    for fact, names in OURS.items():
        assert names & made == (names & site.symbols.keys() if fact in facts else set())
    allowed = {program.id for program in enumerate_programs(site, ALL)}
    assert allowed <= {program.id for program in enumerate_programs(site, ALL, facts=facts)}, "a fact adds alone"
    other = SCALED_DROPPED if site is FLOAT8_DROPPED else SCALED
    assert allowed == {program.id for program in enumerate_programs(other, ALL)}


def test_an_id_is_of_one_program() -> None:
    """It is the key of a module's variants."""
    found = enumerate_programs(FLOAT8, ALL, facts=BOTH)
    assert len({program.id for program in found}) == len(found)


def test_dropout_leaves_the_backward_as_it_is() -> None:
    """There dX begins with what is dropped, to which a product of float8 can't be added."""
    assert not OURS[FLOAT8_BACKWARD] & FLOAT8_DROPPED.symbols.keys()
    assert OURS[FLOAT8_FORWARD] < FLOAT8_DROPPED.symbols.keys()
    for facts in (FORWARD, BOTH):
        found = enumerate_programs(FLOAT8_DROPPED, ALL, facts=facts)
        assert {way.name for p in found for way in p.backward.ways if "dX" in map(str, way.targets)} == {
            "lowrank_first",
            "seeded",
        }


@every_site
def test_nothing_of_float8_is_kept(site: Derivation) -> None:
    """What the backward reads is what it reads without: X in 16 bits, since dA and dB are not of float8."""
    for facts in (BOTH, BOTH | {KEEPS_WEIGHTS, CAST_ADAPTER}):
        for program in enumerate_programs(site, ALL, facts=facts):
            kept = {str(symbol) for symbol in program.kept}
            assert not kept & set().union(*OURS.values())
            saved = {str(symbol) for symbol in program.saved_inputs}
            # The codes, where W or M is made of them again or where they are multiplied; the scales, for dYq.
            reads = {str(symbol) for operation in program.backward.operations for symbol in operation.reads}
            assert ("Q" in saved) == ("Q" in reads)
            assert "X" in saved or "dA" not in ALL or "H" in kept


def test_a_product_of_float8_is_of_two_coded_operands() -> None:
    """Nothing else is: what the adapter multiplies and what trains it is of the activations' dtype."""
    for site in DERIVATIONS:
        for operation in site.operations:
            parts = operation.products if isinstance(operation, Fused) else (operation,)
            for part in parts:
                if isinstance(part, Contract):
                    coded = [part.left.symbol.coded, part.right.symbol.coded]
                    ours = isinstance(operation, Fused) and operation.kernel == "fused_gemm_8" and part.accumulate
                    assert coded == [ours, ours], operation
    for name in ("mX", "mdY"):
        assert FLOAT8[name].store == "acc32" and FLOAT8[name].shape == ("T",)
    assert {BITS[FLOAT8[name].store] for name in ("Xq", "dYq", "Qt", "Q")} == {8}


def test_merged_weights_lose_updates_on_float8_alone() -> None:
    """A number of float8 times one scale falls on few places between two numbers of 16 bits."""
    assert FLOAT8.lossy == {FLOAT8["M"]} and not SCALED.lossy and not FLOAT8_DROPPED.lossy
    assert LINEAR.lossy == {LINEAR["M"]}
    for program in enumerate_programs(FLOAT8, ALL, facts=BOTH):
        assert program.lossy_in_16_bit == (FLOAT8["M"] in program.made)
    of_float8 = [f for f in enumerate_forwards(FLOAT8, facts=BOTH) if FLOAT8["Xq"] in f.made]
    assert of_float8 and not any(forward.lossy_in_16_bit for forward in of_float8)


@pytest.mark.parametrize("dropout", [False, True])
def test_a_group_has_none(dropout: bool) -> None:
    site = group(("q", "k"), dropout=dropout, base="float8")
    assert site.form == "float8" and site.site.startswith("group of q, k on bases of float8")
    assert not any(name.startswith(("m", "Xq", "dYq", "Qt", "M")) for name in site.symbols)
    goals = ("dX", "dA_q", "dA_k", "dB_q", "dB_k")
    assert count_programs(site, goals, facts=BOTH) == count_programs(site, goals) > 0
    of_int8 = group(("q", "k"), dropout=dropout, base="scaled")
    assert [str(op) for op in site.operations] == [str(op) for op in of_int8.operations]
