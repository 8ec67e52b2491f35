"""Linears that share X, each computed in a way of its own: modules are of groups that compute all of theirs in one way.

S and dA of each linear by itself, or those of all in one pass over X; dX as one sum, to which every linear adds in a
way of its own. With kernels, the linear that begins the sum may do it in one.
"""

from __future__ import annotations

from collections.abc import Sequence

from runlora_gen.algebra.derivation import CAST_ADAPTER, SAVED, Argument, Derivation, Row, derive, row
from runlora_gen.algebra.operations import Symbol


def group(names: Sequence[str], *, shared: bool = True) -> Derivation:
    """The derivation of a group; ``shared``: with the rows that compute for all of its linears at once."""
    rows: list[Row] = []
    if shared:
        passes = {
            "S_": "x_at: " + "; ".join(f"S_{j} = s_{j} * X @ A_{j}.T" for j in names),
            "dA_": "pt_x: " + "; ".join(f"dA_{j} = P_{j}.T @ X" for j in names),
        }
        rows += [row(" ".join(f"{kind}{j}" for j in names), "one_pass", text) for kind, text in passes.items()]
    for j in names:
        rows += _rows(j, begins=j == names[0])
    symbols = [Symbol("X", ("T", "I")), Symbol("dX", ("T", "I"))]
    for j in names:
        out, rank = f"O_{j}", f"R_{j}"
        symbols += [
            Symbol(f"W_{j}", (out, "I"), store="weight"),
            Symbol(f"b_{j}", (out,), store="weight"),
            *(Symbol(f"{name}_{j}", (rank, "I"), store="adapter") for name in ("lora_A", "dA")),
            *(Symbol(f"{name}_{j}", (out, rank), store="adapter") for name in ("lora_B", "dB")),
            Symbol(f"A_{j}", (rank, "I")),
            Symbol(f"B_{j}", (out, rank)),
            *(Symbol(f"{name}_{j}", ("T", out)) for name in ("Y", "dY")),
            *(Symbol(f"{name}_{j}", ("T", rank)) for name in ("S", "P")),
            *(Symbol(f"{name}_{j}", (out, "I"), store="weight") for name in ("M", "D")),
            Symbol(f"G_{j}", (out, "I")),
            Symbol(f"dX_{j}", ("T", "I")),
            Symbol(f"db_{j}", (out,)),
        ]
    arguments = [Argument("X", gradient="dX", activation=True)]
    for j in names:
        arguments += [
            Argument(f"W_{j}"),
            Argument(f"lora_A_{j}", gradient=f"dA_{j}", when=(CAST_ADAPTER,)),
            Argument(f"lora_B_{j}", gradient=f"dB_{j}", when=(CAST_ADAPTER,)),
            Argument(f"b_{j}", "Tensor | None", gradient=f"db_{j}"),
            Argument(f"A_{j}", when=(f"not {CAST_ADAPTER}",)),
            Argument(f"B_{j}", when=(f"not {CAST_ADAPTER}",)),
        ]
    return derive(
        "group",
        symbols=symbols,
        facts=(CAST_ADAPTER,),
        arguments=arguments,
        outputs=[f"Y_{j}" for j in names],
        output_gradients=[f"dY_{j}" for j in names],
        sums={"dX": [f"dX_{j}" for j in names]},
        base=[
            text
            for j in names
            for text in (f"Y_{j} = X @ W_{j}.T + b_{j}", f"dX {'' if j == names[0] else '+'}= dY_{j} @ W_{j}")
        ],
        table=rows,
        lossy=[f"M_{j}" for j in names],
        deltas=[f"D_{j}" for j in names],
    )


def _rows(j: str, *, begins: bool) -> list[Row]:
    """Those of one linear; ``begins``: it writes dX first."""
    first = "=" if begins else "+="
    rows = [
        row(f"S_{j}", "x_at", f"S_{j} = s_{j} * X @ A_{j}.T"),
        row(f"M_{j}", "merge", f"M_{j} = W_{j} + s_{j} * B_{j} @ A_{j}"),
        row(f"D_{j}", "b_a", f"D_{j} = s_{j} * B_{j} @ A_{j}"),
        row(f"A_{j}", "cast", f"A_{j} = cast(lora_A_{j})", when=(CAST_ADAPTER,)),
        row(f"B_{j}", "cast", f"B_{j} = cast(lora_B_{j})", when=(CAST_ADAPTER,)),
        *(row(f"{name}_{j}", SAVED) for name in "SMD"),
        *(row(f"{name}_{j}", SAVED, when=(CAST_ADAPTER,)) for name in "AB"),
        row(f"Y_{j}", "base_first", f"Y_{j} = X @ W_{j}.T + b_{j}", f"Y_{j} += S_{j} @ B_{j}.T"),
        row(f"Y_{j}", "lowrank_first", f"Y_{j} = S_{j} @ B_{j}.T + b_{j}", f"Y_{j} += X @ W_{j}.T"),
        row(f"Y_{j}", "merged", f"Y_{j} = X @ M_{j}.T + b_{j}"),
        row(f"Y_{j}", "delta", f"Y_{j} = X @ W_{j}.T + b_{j}", f"Y_{j} += X @ D_{j}.T"),
        row(f"Y_{j}", "fused", f"fused_gemm: Y_{j} = S_{j} @ B_{j}.T + b_{j}; Y_{j} += X @ W_{j}.T"),
        row(f"P_{j}", "dy_b", f"P_{j} = s_{j} * dY_{j} @ B_{j}"),
        row(f"G_{j}", "dyt_x", f"G_{j} = dY_{j}.T @ X"),
        row(f"dX_{j}", "base_first", f"dX {first} dY_{j} @ W_{j}", f"dX += P_{j} @ A_{j}"),
        row(f"dX_{j}", "merged", f"dX {first} dY_{j} @ M_{j}"),
        row(f"dX_{j}", "delta", f"dX {first} dY_{j} @ W_{j}", f"dX += dY_{j} @ D_{j}"),
        row(f"dA_{j}", "pt_x", f"dA_{j} = P_{j}.T @ X"),
        row(f"dA_{j}", "bt_g", f"dA_{j} = s_{j} * B_{j}.T @ G_{j}"),
        row(f"dB_{j}", "dyt_s", f"dB_{j} = dY_{j}.T @ S_{j}"),
        row(f"dB_{j}", "g_at", f"dB_{j} = s_{j} * G_{j} @ A_{j}.T"),
        row(f"P_{j} dB_{j}", "one_pass", f"p_db: P_{j} = s_{j} * dY_{j} @ B_{j}; dB_{j} = dY_{j}.T @ S_{j}"),
        row(f"db_{j}", "sum", f"db_{j} = sum(dY_{j})"),
    ]
    if begins:
        rows += [
            row(f"dX_{j}", "lowrank_first", f"dX = P_{j} @ A_{j}", f"dX += dY_{j} @ W_{j}"),
            row(f"dX_{j}", "fused", f"fused_gemm: dX = P_{j} @ A_{j}; dX += dY_{j} @ W_{j}"),
        ]
    return rows


def wanted(derivation: Derivation) -> tuple[str, ...]:
    """The names of all gradients."""
    return tuple(map(str, derivation.gradients))
