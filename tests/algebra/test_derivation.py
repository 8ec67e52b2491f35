"""A site is a value: what enumerates, orders and emits knows no symbols of its own."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from runlora_gen.algebra.derivation import (
    CAST_ADAPTER,
    SAVED,
    Argument,
    Derivation,
    Row,
    Term,
    derive,
    row,
    rows_of_sum,
)
from runlora_gen.algebra.enumerate import enumerate_forwards, enumerate_programs
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.algebra.operations import Contract, Convert, Fused, Operand, Symbol, parse
from runlora_gen.algebra.paper import paper_labels
from runlora_gen.algebra.schedule import schedule
from runlora_gen.algebra.sites import DERIVATIONS

WIDE = frozenset({CAST_ADAPTER})


@pytest.fixture(scope="module")
def chain() -> Derivation:
    """Z = (U V) Q, another site than any that is generated for."""
    return derive(
        "chain",
        symbols=(
            *(Symbol("U", ("T", "I")), Symbol("V", ("I", "R")), Symbol("q", ("R", "O"), store="adapter")),
            *(Symbol("Q", ("R", "O")), Symbol("Z", ("T", "O")), Symbol("H", ("T", "R")), Symbol("N", ("I", "O"))),
            *(Symbol("dZ", ("T", "O")), Symbol("dU", ("T", "I")), Symbol("dq", ("R", "O"), store="adapter")),
            Symbol("dH", ("T", "R")),
        ),
        facts=(CAST_ADAPTER,),
        arguments=(
            Argument("q", gradient="dq", when=(CAST_ADAPTER,)),
            Argument("U", gradient="dU", activation=True),
            Argument("V"),
            Argument("Q", when=(f"not {CAST_ADAPTER}",)),
        ),
        outputs=("Z",),
        output_gradients=("dZ",),
        table=(
            row("H", "u_v", "H = U @ V"),
            row("H", SAVED),
            row("N", "v_q", "N = V @ Q"),
            row("Q", "cast", "Q = cast(q)", when=(CAST_ADAPTER,)),
            row("Z", "left", "Z = H @ Q"),
            row("Z", "right", "Z = U @ N"),
            row("dH", "dz_q", "dH = dZ @ Q.T"),
            row("dU", "dh_v", "dU = dH @ V.T"),
            row("dq", "h_dz", "dq = H.T @ dZ"),
        ),
        lossy=("N",),
    )


def test_a_site_s_programs(chain: Derivation) -> None:
    programs = enumerate_programs(chain, ("dU", "dq"))
    # H is saved, or made again, beside either order of Z; what leaves no choice is in no name.
    assert {program.id for program in programs} == {
        "left//keep-h",
        "right//keep-h",
        "left//keep-nothing",
        "right//keep-nothing",
    }
    for program in programs:
        assert program.derivation is chain and not paper_labels(program)
        assert program.lossy_in_16_bit == program.id.startswith("right")
        assert set(map(str, program.saved_inputs)) <= {"U", "V", "Q"}
        assert len(schedule(program.backward, lambda symbol: len(symbol.shape)).steps) >= 3


def test_its_function(chain: Derivation) -> None:
    """Gradients come in the order of the arguments, inputs as the arguments have them."""
    assert [str(gradient) for gradient in chain.gradients] == ["dq", "dU"]
    assert [str(symbol) for symbol in chain.inputs(WIDE)] == ["q", "U", "V"]
    assert [str(symbol) for symbol in chain.inputs()] == ["U", "V", "Q"]
    assert {str(symbol) for symbol in chain.activations} == {"U"}
    assert {str(cast): str(source) for cast, source in chain.casts.items()} == {"Q": "q"}
    held = [forward.held for forward in enumerate_forwards(chain, facts=WIDE)]
    assert held == [(chain["Q"],), (chain["Q"],)]


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("Y = U @ V", "unknown symbol 'Y'"),
        ("H = V @ U", "inner dimensions differ"),
        ("N = U @ V", "has the shape"),
        ("H = U * V", "not a formula"),
        ("H = sum(U)", "has the shape"),
        ("k: H = sum(U)", "has the shape"),
        ("H = cast(U, V)", "takes 1 symbols"),
        ("H = largest(U, V, Q)", "largest takes 1 or 2 symbols, not 3"),
        ("H = quantize(U)", "quantize takes 2 or 3 symbols, not 1"),
        ("H = transpose(U, V)", "transpose takes 1 symbols, not 2"),
        ("H = largest(U)", "has the shape"),
        ("H = transpose(H)", "has the shape"),
        ("V = quantize(U, Q)", "has the shape"),
        ("H = flip(U)", "unknown function"),
        ("H = U[t] @ V", "has the shape|inner"),
        ("H = U[o] @ V", "no index"),
    ],
)
def test_a_wrong_formula_is_refused(chain: Derivation, formula: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chain.parse(formula)
    with pytest.raises(ValueError, match=message):
        derive(
            "x",
            symbols=chain.symbols.values(),
            arguments=(),
            outputs=("Z",),
            output_gradients=("dZ",),
            table=[row("H", "x", formula)],
        )


@pytest.mark.parametrize("derivation", DERIVATIONS, ids=lambda derivation: derivation.site)
def test_what_is_printed_parses_back(derivation: Derivation) -> None:
    for operation in derivation.operations:
        assert derivation.parse(str(operation)) == operation
    for way in derivation.table:
        again = derivation.way(" ".join(map(str, way.targets)), way.name, *map(str, way.operations))
        assert (again.targets, again.operations) == (way.targets, way.operations)


def test_every_product_parses_back(chain: Derivation) -> None:
    """All that fit, with all that a product may have."""
    count = 0
    bias = Symbol("b", ("O",))
    symbols = {**chain.symbols, "b": bias}
    choices = itertools.product(symbols.values(), (False, True), symbols.values(), (False, True), symbols.values())
    for left, turned, right, turned_too, out in choices:
        for scaling, accumulate, addend, added in itertools.product(
            (None, "s", "s_q"), (False, True), (None, out), (None, bias)
        ):
            try:
                product = Contract(
                    out, Operand(left, turned), Operand(right, turned_too), scaling, accumulate, addend, added
                )
            except (ValueError, IndexError):
                continue
            assert parse(str(product), symbols) == product and parse(f"k: {product}", symbols) == Fused("k", (product,))
            count += 1
    assert count > 100


def refused(message: str, *rows: Row, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        derive("x", symbols=(Symbol("U", ("T", "I")),), outputs=("U",), output_gradients=("U",), table=rows, **options)


def test_a_condition_on_an_unknown_fact_is_refused() -> None:
    refused(
        "unknown fact 'wet'.*known are cold, dry", row("U", "x", when=("wet",)), facts=("dry", "cold"), arguments=()
    )
    refused("unknown fact 'wet'.*known are none", row("U", "x", when=("not wet",)), arguments=())
    refused("unknown fact 'wet'", facts=("dry",), arguments=(Argument("U", when=("not wet",)),))


def test_rows_and_inputs_are_there_where_their_conditions_hold() -> None:
    """H has a way that each of two facts allows, one that both forbid, one that needs the first without the other."""
    matrix = ("T", "T")
    site = derive(
        "conditional",
        symbols=[Symbol(name, matrix) for name in ("U", "V", "H", "dH", "dU")],
        facts=("dry", "cold"),
        arguments=(Argument("U", gradient="dU"), Argument("V", when=("cold",))),
        outputs=("H",),
        output_gradients=("dH",),
        table=(
            row("V", "made", "V = U @ U", when=("not cold",)),
            row("H", "dry", "H = U @ V", when=("dry",)),
            row("H", "cold", "H = V @ U", when=("cold",)),
            row("H", "neither", "H = U @ U", when=("not dry", "not cold")),
            row("H", "only_dry", "H = V @ V", when=("dry", "not cold")),
        ),
    )
    expected = {
        (): {"neither"},
        ("dry",): {"dry", "only_dry"},
        ("cold",): {"cold"},
        ("dry", "cold"): {"dry", "cold"},
    }
    for facts, names in expected.items():
        forwards = enumerate_forwards(site, facts=frozenset(facts))
        assert {forward.way_of(site["H"]).name for forward in forwards} == names
        assert [str(symbol) for symbol in site.inputs(frozenset(facts))] == ["U", *["V"] * ("cold" in facts)]
        for forward in forwards:
            made_here = {str(symbol) for symbol in forward.made}
            assert ("V" in made_here) == ("cold" not in facts and forward.name != "neither")
    assert [str(symbol) for symbol in site.possible_inputs] == ["U", "V"]


def test_a_sum_has_a_way_for_each_contribution_that_may_come_first() -> None:
    terms = (Term("U @ V", first="u", paper=("forward1",)), Term("V @ U", first="v"), Term("V @ V"))
    rows = rows_of_sum("H", *terms, bias="b", when=("dry",))
    assert rows == (
        row("H", "u", "H = U @ V + b", "H += V @ U", "H += V @ V", paper=("forward1",), when=("dry",)),
        row("H", "v", "H = V @ U + b", "H += U @ V", "H += V @ V", when=("dry",)),
    )
    assert rows_of_sum("H", Term("U @ V"), Term("V @ U", first="v")) == (row("H", "v", "H = V @ U", "H += U @ V"),)


def test_a_kernel_reads_what_it_does_not_make_and_writes_what_is_not_within_it() -> None:
    """W is made from its codes in the kernel, which never writes it."""
    symbols = {
        symbol.name: symbol
        for symbol in (
            *(Symbol("Q", ("O", "I"), "code"), Symbol("W", ("O", "I"), "weight"), Symbol("M", ("O", "I"), "weight")),
            *(Symbol("A", ("R", "I")), Symbol("B", ("O", "R"))),
        )
    }
    text = "merge: W := dequantize(Q); M = W + s * B @ A"
    merge = parse(text, symbols)
    assert isinstance(merge, Fused) and str(merge) == text and merge.inner == (symbols["W"],)
    assert [str(symbol) for symbol in merge.reads] == ["Q", "B", "A"]
    assert merge.outputs == (symbols["M"],)
    assert merge.formula == "W = dequantize(Q), M = W + s B A"
    assert [str(product) for product in merge.products] == ["M = W + s * B @ A"]
    written = parse(text.replace(":=", "="), symbols)
    assert written.outputs == (symbols["W"], symbols["M"]) and written != merge


def test_products_of_stacks_by_the_rows_that_belong_to_each_matrix() -> None:
    """Tokens sorted by experts: a row is multiplied by one matrix, and a matrix's gradient sums over its rows."""
    symbols = {
        symbol.name: symbol
        for symbol in (
            *(Symbol("X", ("T", "I")), Symbol("W", ("E", "O", "I"), "weight"), Symbol("Y", ("T", "O"))),
            *(Symbol("G", ("E", "O", "I")), Symbol("V", ("F", "O", "I"))),
        )
    }
    dims = {"T": 7, "I": 5, "O": 3, "E": 4, "F": 2}
    forward, gradient = (parse(text, symbols) for text in ("Y = X @ W[e].T", "G[e] = Y.T @ X"))
    assert isinstance(forward, Contract) and isinstance(gradient, Contract)
    assert forward.formula == "Y = X W[e]ᵀ" and gradient.formula == "G[e] = Yᵀ X"
    assert forward.mnk(dims) == (7, 3, 5) and gradient.mnk(dims) == (3, 5, 7)
    assert symbols["W"].numel(dims) == 4 * 3 * 5
    for wrong in ("Y = X @ W.T", "G = Y.T @ X", "Y = X @ W[f].T", "G[e] = X.T @ Y", "X = Y @ W[e].T"):
        with pytest.raises(ValueError, match=r"inner|shape|no index"):
            parse(wrong, symbols)
    with pytest.raises(ValueError, match="belong to E and F"):
        parse("G[e] = V[f] @ X.T", {**symbols, "G": Symbol("G", ("E", "O", "T"))})


def test_the_linear_site() -> None:
    assert LINEAR.site == "linear" and LINEAR in DERIVATIONS
    assert [str(gradient) for gradient in LINEAR.gradients] == ["dX", "dA", "dB", "db"]
    assert {operation.out for operation in LINEAR.operations if isinstance(operation, Convert)} == set(LINEAR.casts)
    for way in LINEAR.table:
        assert all(symbol in LINEAR.symbols.values() for symbol in (*way.targets, *way.reads))
