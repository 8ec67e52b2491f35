"""THE TABLE of a group: linears that read one X, as q, k and v do, in one autograd function.

Y_j = X W_jᵀ + s_j X A_jᵀ B_jᵀ + b_j for every linear j, and dX = Σ_j dY_j W_j + P_j A_j: X is read once for all S_j and
once for all dA_j, and dX is summed where it is made, instead of by autograd.

Every row says how all linears come to a symbol: one program computes each of them in the same way. What gains nothing
by company is left to the lone linear: merged weights, and the gradients of whole weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from .derivation import CAST_ADAPTER, SAVED, Argument, Derivation, Row, derive, row
from .operations import Symbol


@lru_cache
def group(linears: tuple[str, ...]) -> Derivation:
    """The derivation of a group of two linears or more, by the letters or words that its symbols end with."""

    def each(*texts: str) -> list[str]:
        """Texts with ``?`` for the linear, for one after another."""
        return [text.replace("?", linear) for linear in linears for text in texts]

    def in_turn(*texts: str) -> list[str]:
        """The same, for all of them one text after another."""
        return [text.replace("?", linear) for text in texts for linear in linears]

    def rows(symbols: str, name: str, *formulas: str, when: tuple[str, ...] = ()) -> Row:
        return row(" ".join(in_turn(*symbols.split())), name, *formulas, when=when)

    return derive(
        f"group of {', '.join(linears)}",
        symbols=tuple(_symbols(linears)),
        facts=(CAST_ADAPTER,),
        arguments=(
            Argument("X", gradient="dX", activation=True),
            *(argument for linear in linears for argument in _arguments(linear)),
        ),
        outputs=in_turn("Y_?"),
        output_gradients=in_turn("dY_?"),
        base=(*each("Y_? = X @ W_?.T + b_?"), *_sum(each("dY_? @ W_?"))),
        table=(
            rows("S_?", "x_at", *each("S_? = s_? * X @ A_?.T")),
            # One pass over X yields all.
            rows("S_?", "one_pass", f"x_ats: {'; '.join(each('S_? = s_? * X @ A_?.T'))}"),
            rows("S_?", SAVED),
            *(
                rows(f"{symbol}_?", way, *formulas, when=(CAST_ADAPTER,))
                for symbol in ("A", "B")
                for way, formulas in (("cast", each(f"{symbol}_? = cast(lora_{symbol}_?)")), (SAVED, []))
            ),
            # The forward.
            rows("Y_?", "base_first", *each("Y_? = X @ W_?.T + b_?", "Y_? += S_? @ B_?.T")),
            rows("Y_?", "lowrank_first", *each("Y_? = S_? @ B_?.T + b_?", "Y_? += X @ W_?.T")),
            rows("Y_?", "fused", *each("fused_gemm: Y_? = S_? @ B_?.T + b_?; Y_? += X @ W_?.T")),
            # One persistent kernel, whose tiles are those of all outputs.
            rows("Y_?", "in_one", f"fused_gemms: {'; '.join(each('Y_? = S_? @ B_?.T + b_?', 'Y_? += X @ W_?.T'))}"),
            # The backward.
            rows("P_?", "dy_b", *each("P_? = s_? * dY_? @ B_?")),
            row("dX", "base_first", *_sum(in_turn("dY_? @ W_?", "P_? @ A_?"))),
            row("dX", "lowrank_first", *_sum(in_turn("P_? @ A_?", "dY_? @ W_?"))),
            # One persistent kernel, whose inner loop goes through all products.
            row("dX", "in_one", f"fused_gemm_sum: {'; '.join(_sum(in_turn('P_? @ A_?', 'dY_? @ W_?')))}"),
            rows("dA_?", "pt_x", *each("dA_? = P_?.T @ X")),
            # One pass over X yields all.
            rows("dA_?", "one_pass", f"pt_xs: {'; '.join(each('dA_? = P_?.T @ X'))}"),
            rows("dB_?", "dyt_s", *each("dB_? = dY_?.T @ S_?")),
            # One pass over each dY yields both.
            rows("P_? dB_?", "one_pass", *each("p_db: P_? = s_? * dY_? @ B_?; dB_? = dY_?.T @ S_?")),
            rows("db_?", "sum", *each("db_? = sum(dY_?)")),
        ),
    )


def _sum(terms: Sequence[str]) -> list[str]:
    """dX as the sum of products, in this order."""
    return [f"dX {'+=' if number else '='} {term}" for number, term in enumerate(terms)]


def _symbols(linears: Sequence[str]) -> Iterator[Symbol]:
    """X and dX, and of every linear what the lone one has: see there for what they are."""
    yield from (Symbol(name, ("T", "I")) for name in ("X", "dX"))
    for linear in linears:
        out, rank = f"O_{linear}", f"R_{linear}"
        yield Symbol(f"W_{linear}", (out, "I"), store="weight")
        yield Symbol(f"b_{linear}", (out,), store="weight")
        yield from (Symbol(f"{name}_{linear}", (rank, "I"), store="adapter") for name in ("lora_A", "dA"))
        yield from (Symbol(f"{name}_{linear}", (out, rank), store="adapter") for name in ("lora_B", "dB"))
        yield Symbol(f"A_{linear}", (rank, "I"))
        yield Symbol(f"B_{linear}", (out, rank))
        yield from (Symbol(f"{name}_{linear}", ("T", out)) for name in ("Y", "dY"))
        yield from (Symbol(f"{name}_{linear}", ("T", rank)) for name in ("S", "P"))
        yield Symbol(f"db_{linear}", (out,))


def _arguments(linear: str) -> Iterator[Argument]:
    """Of one linear what the lone one takes beside X, in its order."""
    yield Argument(f"W_{linear}")
    yield Argument(f"lora_A_{linear}", gradient=f"dA_{linear}", when=(CAST_ADAPTER,))
    yield Argument(f"lora_B_{linear}", gradient=f"dB_{linear}", when=(CAST_ADAPTER,))
    yield Argument(f"b_{linear}", "Tensor | None", gradient=f"db_{linear}")
    yield Argument(f"A_{linear}", when=(f"not {CAST_ADAPTER}",))
    yield Argument(f"B_{linear}", when=(f"not {CAST_ADAPTER}",))
    yield Argument(f"scaling_{linear}", "float")
