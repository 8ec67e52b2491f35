"""The operations of kernels that are of several linears at once, as a group has them."""

from __future__ import annotations

from collections.abc import Sequence

from runlora_gen.algebra.group import group
from runlora_gen.algebra.operations import Fused


def operations(linears: Sequence[str]) -> dict[str, Fused]:
    """By the names of their kernels."""

    def each(*texts: str) -> str:
        return "; ".join(text.replace("?", linear) for linear in linears for text in texts)

    terms = [text.replace("?", linear) for text in ("P_? @ A_?", "dY_? @ W_?") for linear in linears]
    formulas = {
        "x_ats": each("S_? = s_? * X @ A_?.T"),
        "pt_xs": each("dA_? = P_?.T @ X"),
        "p_dbs": each("P_? = s_? * dY_? @ B_?", "dB_? = dY_?.T @ S_?"),
        "fused_gemms": each("Y_? = S_? @ B_?.T + b_?", "Y_? += X @ W_?.T"),
        "fused_gemm_sum": "; ".join(f"dX {'+=' if number else '='} {term}" for number, term in enumerate(terms)),
    }
    found = {}
    for name, text in formulas.items():
        operation = group(tuple(linears)).parse(f"{name}: {text}")
        assert isinstance(operation, Fused)
        found[name] = operation
    return found
