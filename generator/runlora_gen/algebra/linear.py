"""THE TABLE of the lone linear: for each symbol of a LoRA linear, all the ways to compute it.

A new idea is a new row. The enumerator, the prices, the documentation and the emitted code all follow from it.
Y = X Wᵀ + s X Aᵀ Bᵀ + b, with S = s X Aᵀ, P = s dY B, D = s B A, M = W + D, G = dYᵀ X.

With dropout the adapter reads H = K ∘ X / (1 - p) in place of X, where the mask K says what is kept:
Y = X Wᵀ + s H Aᵀ Bᵀ + b, dX = dY W + K ∘ P A / (1 - p). W reads all of X, so that nothing merged computes this.
The backward has the mask from the forward, or draws it again from a seed, within the kernels that read X and write dX.

On a quantized base W is made of its codes Q wherever it is read, and let go. M = W + D is then made in the same pass,
before its one rounding: scale · code lies on no grid of 16 bits, so that the rounding dithers, and no update is lost.
But where the codes are of float8: those have a few hundred values, which by scales of powers of two lie on the grid.

Where the codes are float8 with a scale c for each row, the large products may be of float8 themselves, at twice the
rate: Xq is X in float8, each row by a scale that its largest magnitude mX gives, and Y = Xq Qᵀ, scaled by both. dX sums
over the rows of W: dYq is dY with each column times c, and is multiplied with Qt, the codes transposed as they are, so
that W itself is rounded no further.

The paper is "Run LoRA Run" (arXiv 2312.03415); it writes W as I×O, U for Aᵀ and V for Bᵀ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from ..request.bases import Form
from .derivation import (
    CAST_ADAPTER,
    FLOAT8_BACKWARD,
    FLOAT8_FORWARD,
    KEEPS_WEIGHTS,
    SAVED,
    Argument,
    Derivation,
    Row,
    Term,
    derive,
    row,
    rows_of_sum,
)
from .operations import Store, Symbol

_Entry = TypeVar("_Entry")
#: By the form of a quantized base what its codes are stored as, and the function that makes its weight of them.
_CODES: Mapping[Form, tuple[Store, str]] = {
    "codes": ("code", "dequantize"),
    "scaled": ("code8", "rescale"),
    "float8": ("code8", "rescale"),
}


def _linear(
    site: str, *, dropout: bool = False, base: Form = "plain", evaluated: Derivation | None = None
) -> Derivation:
    """The linear, whose adapter reads X, or what dropout leaves of it; ``base``: the form of its weight."""
    read = "H" if dropout else "X"
    quantized = base != "plain"
    store, made = _CODES.get(base, ("code", ""))

    def coded(*entries: _Entry) -> tuple[_Entry, ...]:
        """What there is on a quantized base alone."""
        return entries if quantized else ()

    def plain(*entries: _Entry) -> tuple[_Entry, ...]:
        """What there is where the base is not quantized: updates made as a whole come from the paper."""
        return () if quantized else entries

    def float8(*entries: _Entry) -> tuple[_Entry, ...]:
        """What there is where the codes are of float8."""
        return entries if base == "float8" else ()

    def dropped(*entries: _Entry) -> tuple[_Entry, ...]:
        """What there is with dropout alone."""
        return entries if dropout else ()

    def merged(*entries: _Entry) -> tuple[_Entry, ...]:
        """What there is where the adapter reads what W reads."""
        return () if dropout else entries

    return derive(
        site,
        # The scaling s is folded into S, P, D and M once: no other product is scaled but those of the full-gradient
        # ways.
        symbols=(
            Symbol("X", ("T", "I")),  # input
            *coded(Symbol("Q", ("O", "I"), store=store)),  # codes of the frozen base weight, and their scales
            Symbol("W", ("O", "I"), store="weight"),  # frozen base weight
            Symbol("b", ("O",), store="weight"),  # frozen bias
            Symbol("lora_A", ("R", "I"), store="adapter"),
            Symbol("lora_B", ("O", "R"), store="adapter"),
            Symbol("A", ("R", "I")),  # lora_A as the products read it: in the activations' dtype
            Symbol("B", ("O", "R")),  # lora_B likewise
            Symbol("Y", ("T", "O")),  # output
            Symbol("S", ("T", "R")),  # s X Aᵀ
            *merged(
                Symbol("M", ("O", "I"), store="weight"),  # W + s B A
                *plain(Symbol("D", ("O", "I"), store="weight")),  # s B A
            ),
            Symbol("dY", ("T", "O")),
            Symbol("P", ("T", "R")),  # s dY B
            Symbol("G", ("O", "I")),  # dYᵀ X
            Symbol("dX", ("T", "I")),
            Symbol("dA", ("R", "I"), store="adapter"),
            Symbol("dB", ("O", "R"), store="adapter"),
            Symbol("db", ("O",)),
            *float8(
                Symbol("mX", ("T",), store="acc32"),  # the largest magnitude of each row of X
                Symbol("Xq", ("T", "I"), store="code8"),  # X in float8
            ),
            *float8(
                *merged(
                    Symbol("mdY", ("T",), store="acc32"),  # the same of dY, whose columns are scaled as rows of W are
                    Symbol("dYq", ("T", "O"), store="code8"),
                    Symbol("Qt", ("I", "O"), store="code8"),  # the codes, transposed
                )
            ),
            *dropped(
                Symbol("dropout", (), store="seed"),  # the rate, at which torch's generator draws
                Symbol("seed", (), store="seed"),  # that it gave, of a mask that is drawn wherever it is read
                Symbol("K", ("T", "I"), store="byte"),  # whether an element of X is kept
                Symbol("H", ("T", "I")),  # K ∘ X / (1 - p), what the adapter reads
                Symbol("dH", ("T", "I")),  # P A
            ),
        ),
        # Where the adapter is not cast, A and B are lora_A and lora_B themselves.
        facts=(CAST_ADAPTER, *coded(KEEPS_WEIGHTS), *float8(FLOAT8_FORWARD, FLOAT8_BACKWARD)),
        arguments=(
            Argument("X", gradient="dX", activation=True),
            *plain(Argument("W")),
            *coded(Argument("Q", "Quantized")),
            Argument("lora_A", gradient="dA", when=(CAST_ADAPTER,)),
            Argument("lora_B", gradient="dB", when=(CAST_ADAPTER,)),
            Argument("b", "Tensor | None", gradient="db"),
            Argument("A", when=(f"not {CAST_ADAPTER}",)),
            Argument("B", when=(f"not {CAST_ADAPTER}",)),
            Argument("scaling", "float"),
            *dropped(Argument("dropout", "float", once=True)),
        ),
        outputs=("Y",),
        output_gradients=("dY",),
        form=base,
        base=(*coded(f"W = {made}(Q)"), "Y = X @ W.T + b", "dX = dY @ W"),
        table=(
            *coded(row("W", "dequantize", f"W = {made}(Q)"), row("W", SAVED, when=(KEEPS_WEIGHTS,))),
            row("S", "x_at", f"S = s * {read} @ A.T"),
            row("S", SAVED),
            *dropped(
                row("K", "draw", "K = draw(dropout)"),
                row("K", SAVED),
                row("H", "drop", "H = drop(X, K)"),
                row("H", SAVED),
                row("seed", "draw", "seed = draw(dropout)"),
                row("seed", SAVED),
                row("S", "seeded", "x_at_dropped: K := draw(seed); H := drop(X, K); S = s * H @ A.T"),
            ),
            *merged(
                *plain(row("M", "merge", "M = W + s * B @ A"), row("M", SAVED)),
                *coded(
                    row("M", "in_pass", f"{made}_merged: W := {made}(Q); M = W + s * B @ A"),
                    row("M", SAVED, when=(KEEPS_WEIGHTS,)),
                ),
                *plain(row("D", "b_a", "D = s * B @ A"), row("D", SAVED)),
            ),
            *(
                row(symbol, way, *formulas, when=(CAST_ADAPTER,))
                for symbol in ("A", "B")
                for way, formulas in (("cast", (f"{symbol} = cast(lora_{symbol})",)), (SAVED, ()))
            ),
            # The forward.
            *rows_of_sum(
                "Y",
                Term("X @ W.T", first="base_first", paper=("forward1",)),
                Term("S @ B.T", first="lowrank_first", paper=("forward3",)),
                bias="b",
            ),
            # forward4 is forward2 with another reshaping of X: the same products.
            *merged(row("Y", "merged", "Y = X @ M.T + b", paper=("forward2", "forward4"))),
            row("Y", "fused", "fused_gemm: Y = S @ B.T + b; Y += X @ W.T"),
            # Left out by the paper.
            *merged(*plain(*rows_of_sum("Y", Term("X @ W.T", first="delta"), Term("X @ D.T"), bias="b"))),
            *float8(*_float8(dropout)),
            # The backward.
            row("P", "dy_b", "P = s * dY @ B"),
            row("G", "dyt_x", f"G = dY.T @ {read}"),
            *merged(
                *rows_of_sum("dX", Term("dY @ W", first="base_first"), Term("P @ A", first="lowrank_first")),
                row("dX", "merged", "dX = dY @ M"),
                # One persistent kernel for the large product, with the low-rank product as the tail of its inner loop.
                row("dX", "fused", "fused_gemm: dX = P @ A; dX += dY @ W"),
                # Left out by the paper.
                *plain(*rows_of_sum("dX", Term("dY @ W", first="delta"), Term("dY @ D"))),
            ),
            *dropped(
                row("dH", "p_a", "dH = P @ A"),
                row("dX", "lowrank_first", "dX = drop(dH, K)", "dX += dY @ W"),
            ),
            # One pass reads X and begins dX: the mask is drawn once for both.
            *dropped(
                row(
                    "dX dA",
                    "seeded",
                    "dx_da: K := draw(seed); H := drop(X, K); dA = P.T @ H; dH := P @ A; dX = drop(dH, K); "
                    "dX += dY @ W",
                ),
            ),
            row("dA", "pt_x", f"dA = P.T @ {read}"),
            row("dA", "bt_g", "dA = s * B.T @ G"),
            row("dB", "dyt_s", "dB = dY.T @ S"),
            row("dB", "g_at", "dB = s * G @ A.T"),
            # One pass over dY yields both.
            row("P dB", "one_pass", "p_db: P = s * dY @ B; dB = dY.T @ S"),
            row("db", "sum", "db = sum(dY)"),
        ),
        # A number of float8 takes so few places between two of 16 bits that rounding them dithers too little.
        lossy=merged(*plain("M"), *float8("M")),
        deltas=merged(*plain("D")),
        # It recomputes S and M, and never saves them.
        paper_goals=("dX", "dA", "dB"),
        paper_backwards={
            ("base_first", "pt_x", "dyt_s"): "backward1",
            ("base_first", "pt_x", "g_at"): "backward2",
            ("base_first", "bt_g", "g_at"): "backward3",
            ("merged", "bt_g", "g_at"): "backward4",
            ("merged", "pt_x", "dyt_s"): "backward5",
            ("base_first", "bt_g", "dyt_s"): "backward6",
            ("merged", "bt_g", "dyt_s"): "backward7",
            ("merged", "pt_x", "g_at"): "backward8",
        },
        evaluated=evaluated,
    )


def _float8(dropout: bool) -> tuple[Row, ...]:
    """The rows of products of float8. dX with dropout begins with what is dropped: there W is made."""
    forward, backward = (FLOAT8_FORWARD,), (FLOAT8_BACKWARD,)
    rows = [
        row("mX", "largest", "largest: mX = largest(X)", when=forward),
        row("Xq", "quantize", "quantize: Xq = quantize(X, mX)", when=forward),
        row("Y", "float8", "fused_gemm_8: Y = S @ B.T + b; Y += Xq @ Q.T", when=forward),
    ]
    if not dropout:
        rows += [
            row("S mX", "one_pass", "x_at_largest: S = s * X @ A.T; mX = largest(X)", when=forward),
            row("mdY", "largest", "largest: mdY = largest(dY, Q)", when=backward),
            row(
                "P dB mdY",
                "with_largest",
                "p_db_largest: P = s * dY @ B; dB = dY.T @ S; mdY = largest(dY, Q)",
                when=backward,
            ),
            row("dYq", "quantize", "quantize: dYq = quantize(dY, mdY, Q)", when=backward),
            row("Qt", "transpose", "transpose: Qt = transpose(Q)", when=backward),
            row("dX", "float8", "fused_gemm_8: dX = P @ A; dX += dYq @ Qt.T", when=backward),
        ]
    return tuple(rows)


LINEAR = _linear("linear")
DROPPED = _linear("linear with dropout", dropout=True, evaluated=LINEAR)
QUANTIZED = _linear("linear on a quantized base", base="codes")
QUANTIZED_DROPPED = _linear("linear on a quantized base with dropout", dropout=True, base="codes", evaluated=QUANTIZED)
SCALED = _linear("linear on a base of int8", base="scaled")
SCALED_DROPPED = _linear("linear on a base of int8 with dropout", dropout=True, base="scaled", evaluated=SCALED)
FLOAT8 = _linear("linear on a base of float8", base="float8")
FLOAT8_DROPPED = _linear("linear on a base of float8 with dropout", dropout=True, base="float8", evaluated=FLOAT8)
_LONE: Mapping[tuple[Form, bool], Derivation] = {
    ("plain", False): LINEAR,
    ("plain", True): DROPPED,
    ("codes", False): QUANTIZED,
    ("codes", True): QUANTIZED_DROPPED,
    ("scaled", False): SCALED,
    ("scaled", True): SCALED_DROPPED,
    ("float8", False): FLOAT8,
    ("float8", True): FLOAT8_DROPPED,
}
#: Those of all bases, with dropout and without.
LONE: tuple[Derivation, ...] = tuple(_LONE.values())


def lone_linear(*, dropout: bool = False, base: Form = "plain") -> Derivation:
    """The derivation of a lone linear; ``dropout``: of its adapter's input; ``base``: the form of its weight."""
    return _LONE[base, dropout]
