"""THE TABLE of experts: linears with a stack of weights, of which each row takes its expert's.

Tokens choose experts: T rows, one for each expert of each of N tokens, are sorted by expert, and W[e] is the matrix
of a row's expert: Y = X W[e]ᵀ + s X A[e]ᵀ B[e]ᵀ + b[e]. The first projection of an expert reads tokens, Xr = gather(X),
and its dX is the sum of each token's rows. The last one gives tokens: Y = combine(Yr, g), of each the sum of its rows,
by the router's weights g.

Rows of tokens are never kept, as the tokens are there: they are gathered again, or within the kernels that read them.
And what the last projection gives each row need not be kept, though g's gradient is dYr · Yr: with the gradient of the
row before it is weighed, dXu = dYr W[e] + P A[e], it is dXu · X + dYr · b[e] as well, so that both follow from one
pass: dX = g dXu, dg = dXu · X + dYr · b[e]. So dYr is read as it is, and P and S are weighed for the gradients of
factors.

A merged stack M = W + s B A is what PEFT computes with: it reads and writes all experts, whoever has rows.

Where both projections of an expert have adapters, what is between them belongs to the last one, which reads what goes
into the activation: X = activate(U). Then X need not be kept, as it is made again of U, and one pass over U's rows in
the backward yields dU, dg and dA; and, as the first projection hands over its S and leaves the gradients of its B to
the last one, PU = s dU B[e] and dB[e] = dUᵀ S of the first projection as well.

With dropout an adapter reads H = K ∘ X / (1 - p) in place of X, each row by a part of the mask K of its own, also where
several are of one token: dX gets K ∘ P A[e] / (1 - p), and nothing merged computes this. dg is what it was, as dXu · X
is dYr · (X W[e]ᵀ) + S · dYr B[e], whatever of X is in S.
"""

from __future__ import annotations

from .derivation import CAST_ADAPTER, SAVED, Argument, Derivation, Row, Term, derive, row, rows_of_sum
from .operations import Symbol

_GATHERED = "gathered"


def _experts(
    site: str, *, gathers: bool, activated: bool = False, dropout: bool = False, evaluated: Derivation | None = None
) -> Derivation:
    """The first projection of experts, which gathers tokens, or the last, which combines their rows.

    ``activated``: whether the activation between both is the last one's; ``dropout``: whether adapters read what it
    leaves of their rows.
    """
    read, given = ("Xr", "dY") if gathers else ("X", "dYr")
    adapted = "H" if dropout else read
    made, summed = ("Y", "dXr") if gathers else ("Yr", "dXu")
    # By what a product of the backward is weighed: its other factor is a gradient that is not.
    kept, other = ("S", "P") if gathers else ("Sg", "Pg")
    hands, activates = gathers and activated, activated and not gathers
    # Orders that cost the same, and merged stacks, of the simple sites alone: there would be too many programs.
    lowrank_first = None if activated else "lowrank_first"
    merges = not (activated or dropout)
    merged = (row(made, "merged", f"{made} = {read} @ M[e].T + b[e]"),) if merges else ()
    merged_back = (row(summed, "merged", f"{summed} = {given} @ M[e]"),) if merges else ()
    return derive(
        site,
        symbols=(
            Symbol("X", ("N" if gathers else "T", "I")),  # input: tokens, or rows
            Symbol("W", ("E", "O", "I"), store="weight"),  # frozen base weights
            Symbol("b", ("E", "O"), store="weight"),  # frozen biases
            Symbol("lora_A", ("E", "R", "I"), store="adapter"),
            Symbol("lora_B", ("E", "O", "R"), store="adapter"),
            Symbol("A", ("E", "R", "I")),  # lora_A as the products read it: in the activations' dtype
            Symbol("B", ("E", "O", "R")),  # lora_B likewise
            *(() if dropout else (Symbol("M", ("E", "O", "I"), store="weight"),)),  # W + s B A
            Symbol("Y", ("T" if gathers else "N", "O")),  # output: rows, or tokens
            Symbol("S", ("T", "R")),  # s X A[e]ᵀ
            Symbol("dY", ("T" if gathers else "N", "O")),
            Symbol("P", ("T", "R")),  # s dY B[e], not weighed
            Symbol("dX", ("N" if gathers else "T", "I")),
            Symbol("dA", ("E", "R", "I"), store="adapter"),
            Symbol("dB", ("E", "O", "R"), store="adapter"),
            *(
                (Symbol("Xr", ("T", "I")), Symbol("dXr", ("T", "I")))  # of tokens their rows
                if gathers
                else (
                    Symbol("g", ("T",)),  # the router's weights
                    Symbol("dg", ("T",)),
                    Symbol("Yr", ("T", "O")),  # the rows of Y
                    Symbol("dYr", ("T", "O")),  # of dY its rows, not weighed
                    Symbol("dXu", ("T", "I")),  # dX, not weighed
                    Symbol("Sg", ("T", "R")),  # S and P, weighed
                    Symbol("Pg", ("T", "R")),
                )
            ),
            *(
                (
                    Symbol("U", ("T", "F")),  # what goes into the activation: rows of the first projection
                    Symbol("dU", ("T", "F")),
                    Symbol("SU", ("T", "RU")),  # S and B of the first projection
                    Symbol("lora_BU", ("E", "F", "RU"), store="adapter"),
                    Symbol("BU", ("E", "F", "RU")),
                    Symbol("PU", ("T", "RU")),  # s dU BU[e]
                    Symbol("dBU", ("E", "F", "RU"), store="adapter"),
                )
                if activates
                else ()
            ),
            *(
                (
                    Symbol("dropout", (), store="seed"),  # the rate, at which torch's generator draws
                    Symbol("seed", (), store="seed"),  # that it gave, of a mask that is drawn wherever it is read
                    Symbol("K", ("T", "I"), store="byte"),  # whether an element of a row is kept
                    Symbol("H", ("T", "I")),  # K ∘ X / (1 - p), what the adapter reads
                    Symbol("dH", ("T", "I")),  # P A[e]
                )
                if dropout
                else ()
            ),
        ),
        facts=(CAST_ADAPTER,),
        arguments=(
            (
                Argument("U", gradient="dU", activation=True)
                if activates
                else Argument("X", gradient="dX", activation=True)
            ),
            Argument("W"),
            Argument("lora_A", gradient="dA", when=(CAST_ADAPTER,)),
            (
                Argument("lora_B", left="dB", when=(CAST_ADAPTER,))
                if hands
                else Argument("lora_B", gradient="dB", when=(CAST_ADAPTER,))
            ),
            Argument("b", "Tensor | None"),
            Argument("A", when=(f"not {CAST_ADAPTER}",)),
            Argument("B", when=(f"not {CAST_ADAPTER}",)),
            *(() if gathers else (Argument("g", gradient="dg", activation=True),)),
            Argument("scaling", "float"),
            *(
                (
                    Argument("SU", gradient="PU", activation=True),
                    Argument("lora_BU", gradient="dBU", when=(CAST_ADAPTER,)),
                    Argument("BU", when=(f"not {CAST_ADAPTER}",)),
                    Argument("scaling_U", "float"),
                )
                if activates
                else ()
            ),
            *((Argument("dropout", "float", once=True),) if dropout else ()),
            Argument("routing", "Routing"),
        ),
        outputs=("Y", "S") if hands else ("Y",),
        output_gradients=("dY", "P") if hands else ("dY",),
        base=(
            ("Xr = gather(X)", "Y = Xr @ W[e].T + b[e]", "dXr = dY @ W[e]", "dX = combine(dXr)")
            if gathers
            else (
                *(("X = activate(U)",) if activates else ()),
                "Yr = X @ W[e].T + b[e]",
                "Y = combine(Yr, g)",
                "dYr = gather(dY)",
                "dXu = dYr @ W[e]",
                "dX = weigh(dXu, g)",
                *(("dU = activate_backward(dX, U)",) if activates else ()),
            )
        ),
        table=(
            *(
                row(symbol, way, *formulas, when=(CAST_ADAPTER,))
                for symbol in ("A", "B")
                for way, formulas in (("cast", (f"{symbol} = cast(lora_{symbol})",)), (SAVED, ()))
            ),
            *((row("M", "merge", "M[e] = W + s * B[e] @ A[e]"), row("M", SAVED)) if merges else ()),
            *(_masks(read) if dropout else ()),
            # The forward.
            *_products("S", "x_at", adapted, "experts_x_at", f"S = s * {adapted} @ A[e].T"),
            *(_seeded("S", read, "experts_x_at", "S = s * H @ A[e].T") if dropout else ()),
            row("S", SAVED),
            *rows_of_sum(
                made,
                Term(f"{read} @ W[e].T", first="base_first"),
                Term("S @ B[e].T", first=lowrank_first),
                bias="b[e]",
            ),
            *merged,
            *_in_kernel(made, "fused", read, "experts_gemm", f"{made} = S @ B[e].T + b[e]; {made} += {read} @ W[e].T"),
            # The backward.
            *(() if hands else _products("P", "dy_b", given, "experts_x_at", f"P = s * {given} @ B[e]")),
            *(
                _dropped_sum(summed, given)
                if dropout
                else (
                    *rows_of_sum(
                        summed, Term(f"{given} @ W[e]", first="base_first"), Term("P @ A[e]", first=lowrank_first)
                    ),
                    *merged_back,
                    *_in_kernel(
                        summed, "fused", given, "experts_gemm", f"{summed} = P @ A[e]; {summed} += {given} @ W[e]"
                    ),
                )
            ),
            *_products("dA", "pt_x", adapted, "experts_pt_x", f"dA[e] = {other}.T @ {adapted}"),
            *(_seeded("dA", read, "experts_pt_x", f"dA[e] = {other}.T @ H") if dropout else ()),
            *(() if hands else _products_of_dy(given, kept)),
            *(
                (row("Xr", "gather", "Xr = gather(X)"), row("dX", "combine", "dX = combine(dXr)"))
                if gathers
                else (
                    row("Y", "combine", "Y = combine(Yr, g)"),
                    row("Yr", SAVED),
                    row("dYr", "gather", "dYr = gather(dY)"),
                    row("Sg", "weigh", "Sg = weigh(S, g)"),
                    row("Pg", "weigh", "Pg = weigh(P, g)"),
                    row("dX", "weigh", "dX = weigh(dXu, g)"),
                    row("dg", "x_dot", "dg = dot(dXu, X, dYr, b)"),
                    row("dg", "y_dot", "dg = dot(dYr, Yr)"),
                    row(
                        "dX dg",
                        "one_pass",
                        "experts_weigh: dYr := gather(dY); dX = weigh(dXu, g); dg = dot(dXu, X, dYr, b)",
                    ),
                )
            ),
            *(_activated(dropout) if activates else ()),
        ),
        lossy=("M",) if merges else (),
        evaluated=evaluated,
    )


def _masks(read: str) -> tuple[Row, ...]:
    """Dropout's mask, as bytes or as the seed of which kernels draw it, and what it leaves of rows."""
    return (
        row("K", "draw", "K = draw(dropout)"),
        row("K", SAVED),
        row("H", "drop", f"H = drop({read}, K)"),
        row("H", SAVED),
        row("seed", "draw", "seed = draw(dropout)"),
        row("seed", SAVED),
    )


def _dropped_sum(summed: str, given: str) -> tuple[Row, ...]:
    """The gradient of rows that dropout's mask goes through: in a kernel, before the large product is added."""
    formulas = f"K := draw(seed); dH := P @ A[e]; {summed} = drop(dH, K); {summed} += {given} @ W[e]"
    return (
        row("dH", "p_a", "dH = P @ A[e]"),
        row(summed, "lowrank_first", f"{summed} = drop(dH, K)", f"{summed} += {given} @ W[e]"),
        *_in_kernel(summed, "seeded", given, "experts_gemm_dropped", formulas),
    )


def _seeded(target: str, read: str, kernel: str, formula: str) -> tuple[Row, ...]:
    """A product with what a mask leaves of rows, that a kernel draws where it reads them."""
    return _in_kernel(target, "seeded", read, f"{kernel}_dropped", f"K := draw(seed); H := drop({read}, K); {formula}")


def _activated(dropout: bool) -> tuple[Row, ...]:
    """What the last projection does for the activation before it, and for the first projection's B.

    X is made in the pass that makes S, and again in that over U's rows.
    """
    name, mark, drawn, adapted = "one_pass", "", "", "X"
    with_gradients = "with_gradients"
    if dropout:
        name, mark, with_gradients, adapted = "seeded", "_dropped", "with_gradients_seeded", "H"
        drawn = "K := draw(seed); H := drop(X, K); "
    return (
        row("BU", "cast", "BU = cast(lora_BU)", when=(CAST_ADAPTER,)),
        row("X", "activate", "X = activate(U)"),
        row("X", SAVED),
        row("X S", name, f"experts_activate{mark}: X = activate(U); {drawn}S = s * {adapted} @ A[e].T"),
        row("dU", "activate_backward", "dU = activate_backward(dX, U)"),
        row("PU", "du_b", "PU = s_U * dU @ BU[e]"),
        row("dBU", "dut_s", "dBU[e] = dU.T @ SU"),
        row("PU dBU", "one_pass", "experts_p_db: PU = s_U * dU @ BU[e]; dBU[e] = dU.T @ SU"),
        row(
            "dA dU dg PU dBU",
            with_gradients,
            f"experts_activate_backward{mark}: X := activate(U); {drawn}Pg := weigh(P, g); dA[e] = Pg.T @ {adapted}; "
            "dX := weigh(dXu, g); dU = activate_backward(dX, U); dYr := gather(dY); dg = dot(dXu, X, dYr, b); "
            "PU = s_U * dU @ BU[e]; dBU[e] = dU.T @ SU",
        ),
    )


def _products_of_dy(given: str, kept: str) -> tuple[Row, ...]:
    """dB, and with it P: one pass over dY yields both."""
    both = f"P = s * {given} @ B[e]; dB[e] = {given}.T @ {kept}"
    return row("dB", "dyt_s", f"dB[e] = {given}.T @ {kept}"), *_in_kernel(
        "P dB", "one_pass", given, "experts_p_db", both
    )


def _products(target: str, name: str, read: str, kernel: str, formula: str) -> tuple[Row, ...]:
    """A product of torch's, whose place a kernel may take, and of rows of tokens the kernel that gathers them."""
    gathered = (row(target, _GATHERED, _gathered(read, kernel, formula)),) if read in ("Xr", "dYr") else ()
    return (row(target, name, formula), *gathered)


def _in_kernel(target: str, name: str, read: str, kernel: str, formulas: str) -> tuple[Row, ...]:
    """What a kernel computes of rows, and if these are of tokens the one that gathers them."""
    if read in ("Xr", "dYr"):
        return (row(target, f"{name}_{_GATHERED}", _gathered(read, kernel, formulas)),)
    return (row(target, name, f"{kernel}: {formulas}"),)


def _gathered(read: str, kernel: str, formulas: str) -> str:
    tokens = "X" if read == "Xr" else "dY"
    return f"{kernel}_gathered: {read} := gather({tokens}); {formulas}"


#: By whether they gather tokens, and whether the activation between both projections is the last one's.
_PLAIN = {
    (gathers, activated): _experts(site, gathers=gathers, activated=activated)
    for site, gathers, activated in (
        ("experts that read tokens", True, False),
        ("experts that give tokens", False, False),
        ("experts that read tokens, for an activation", True, True),
        ("experts that give tokens, after an activation", False, True),
    )
}
GATHERED, COMBINED, HANDED, ACTIVATED = _PLAIN.values()
#: The same whose adapters read what dropout leaves.
_DROPPED = {
    (gathers, activated): _experts(
        f"{plain.site}, with dropout", gathers=gathers, activated=activated, dropout=True, evaluated=plain
    )
    for (gathers, activated), plain in _PLAIN.items()
}
GATHERED_DROPPED, COMBINED_DROPPED, HANDED_DROPPED, ACTIVATED_DROPPED = _DROPPED.values()
OF_EXPERTS: tuple[Derivation, ...] = (*_PLAIN.values(), *_DROPPED.values())


def experts(*, gathers: bool, activated: bool = False, dropout: bool = False) -> Derivation:
    """The derivation of a projection of experts: the first one, which gathers tokens, or the last.

    ``activated``: whether the activation between both is the last one's; ``dropout``: of the adapter's input.
    """
    return (_DROPPED if dropout else _PLAIN)[gathers, activated]
