"""A site is a value: what enumerates, orders and emits knows no symbols of its own."""

from __future__ import annotations

import itertools

import pytest
from runlora_gen.algebra.derivation import SAVED, Argument, Derivation, derive, row
from runlora_gen.algebra.enumerate import enumerate_forwards, enumerate_programs
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.algebra.operations import Cast, Fused, Matmul, Operand, Symbol, parse
from runlora_gen.algebra.schedule import schedule
from runlora_gen.algebra.sites import DERIVATIONS, OPERATIONS


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
        arguments=(
            Argument("q", gradient="dq"),
            Argument("U", gradient="dU", activation=True),
            Argument("V"),
            Argument("Q"),
        ),
        output="Z",
        output_gradient="dZ",
        table=(
            row("H", "u_v", "H = U @ V"),
            row("H", SAVED),
            row("N", "v_q", "N = V @ Q"),
            row("Q", "cast", "Q = cast(q)"),
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
        assert program.derivation is chain and not program.paper
        assert program.lossy_in_16_bit == program.id.startswith("right")
        assert set(map(str, program.saved_inputs)) <= {"U", "V", "Q"}
        assert len(schedule(program.backward, {"T": 4, "I": 3, "R": 2, "O": 5}).steps) >= 3


def test_its_function(chain: Derivation) -> None:
    """Gradients come in the order of the arguments, inputs as the arguments have them."""
    assert [str(gradient) for gradient in chain.gradients] == ["dq", "dU"]
    assert [str(symbol) for symbol in chain.inputs(casts=True)] == ["q", "U", "V"]
    assert [str(symbol) for symbol in chain.inputs(casts=False)] == ["Q", "U", "V"]
    assert {str(symbol) for symbol in chain.activations} == {"U"}
    assert {str(cast): str(source) for cast, source in chain.casts.items()} == {"Q": "q"}
    held = [forward.held for forward in enumerate_forwards(chain, casts=True)]
    assert held == [(chain["Q"],), (chain["Q"],)]


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("Y = U @ V", "unknown symbol 'Y'"),
        ("H = V @ U", "inner dimensions differ"),
        ("N = U @ V", "has the shape"),
        ("H = U * V", "not a formula"),
        ("k: H = sum(U)", "products only"),
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
            output="Z",
            output_gradient="dZ",
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
        for scaled, accumulate, addend, added in itertools.product(
            (False, True), (False, True), (None, out), (None, bias)
        ):
            try:
                product = Matmul(
                    out, Operand(left, turned), Operand(right, turned_too), scaled, accumulate, addend, added
                )
            except (ValueError, IndexError):
                continue
            assert parse(str(product), symbols) == product and parse(f"k: {product}", symbols) == Fused("k", (product,))
            count += 1
    assert count > 100


def test_the_linear_site() -> None:
    assert LINEAR.site == "linear" and LINEAR in DERIVATIONS
    assert [str(gradient) for gradient in LINEAR.gradients] == ["dX", "dA", "dB", "db"]
    assert len(OPERATIONS) == len(set(OPERATIONS)) and set(LINEAR.operations) <= set(OPERATIONS)
    assert {operation.out for operation in LINEAR.operations if isinstance(operation, Cast)} == set(LINEAR.casts)
    for way in LINEAR.table:
        assert all(symbol in LINEAR.symbols.values() for symbol in (*way.targets, *way.reads))
