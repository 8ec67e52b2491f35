"""THE TABLE: for each symbol of a LoRA linear, all the ways to compute it.

A new idea is a new row. The enumerator, the prices, the documentation and the emitted code all follow from it.
Y = X Wᵀ + s X Aᵀ Bᵀ + b, with S = s X Aᵀ, P = s dY B, D = s B A, M = W + D, G = dYᵀ X.

The paper is "Run LoRA Run" (arXiv 2312.03415); it writes W as I×O, U for Aᵀ and V for Bᵀ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .operations import SYMBOLS, Fused, Operation, Symbol, parse


@dataclass(frozen=True)
class Way:
    """One row: a way to obtain its targets, as operations in order. No operations: the forward saved them."""

    targets: tuple[Symbol, ...]
    name: str
    operations: tuple[Operation, ...]
    paper: tuple[str, ...] = ()  # the paper's names for a forward that uses this row
    largest_rank: int | None = None  # above it the row is no candidate

    @property
    def saved(self) -> bool:
        """Whether the forward keeps the target for the backward instead of computing it again."""
        return not self.operations

    @property
    def kernels(self) -> frozenset[str]:
        """The fused kernels that this row needs; without them it can't be chosen."""
        return frozenset(operation.kernel for operation in self.operations if isinstance(operation, Fused))

    @property
    def reads(self) -> frozenset[Symbol]:
        """Symbols that must exist before this way runs."""
        read = {symbol for operation in self.operations for symbol in operation.reads}
        return frozenset(read - set(self.targets))


def way(target: str, name: str, *formulas: str, paper: tuple[str, ...] = (), largest_rank: int | None = None) -> Way:
    """A row of the table from its formulas; ``target`` may name several symbols, separated by spaces."""
    targets = tuple(SYMBOLS[symbol] for symbol in target.split())
    return Way(targets, name, tuple(map(parse, formulas)), paper, largest_rank)


SAVED = "saved"

TABLE: tuple[Way, ...] = (
    way("S", "x_at", "S = s * X @ A.T"),
    way("S", SAVED),
    way("M", "merge", "M = W + s * B @ A"),
    way("M", SAVED),
    way("D", "b_a", "D = s * B @ A"),
    way("D", SAVED),
    # The forward.
    way("Y", "base_first", "Y = X @ W.T + b", "Y += S @ B.T", paper=("forward1",)),
    way("Y", "lowrank_first", "Y = S @ B.T + b", "Y += X @ W.T", paper=("forward3",)),
    # forward4 is forward2 with another reshaping of X: the same products.
    way("Y", "merged", "Y = X @ M.T + b", paper=("forward2", "forward4")),
    way("Y", "fused", "fused_gemm: Y = S @ B.T + b; Y += X @ W.T"),
    way("Y", "delta", "Y = X @ W.T + b", "Y += X @ D.T"),  # left out by the paper
    # The backward.
    way("P", "dy_b", "P = s * dY @ B"),
    way("G", "dyt_x", "G = dY.T @ X"),
    way("dX", "base_first", "dX = dY @ W", "dX += P @ A"),
    way("dX", "lowrank_first", "dX = P @ A", "dX += dY @ W"),
    way("dX", "merged", "dX = dY @ M"),
    # One persistent kernel for the large product, with the low-rank product as the tail of its inner loop.
    way("dX", "fused", "fused_gemm: dX = P @ A; dX += dY @ W"),
    way("dX", "delta", "dX = dY @ W", "dX += dY @ D"),  # left out by the paper
    way("dA", "pt_x", "dA = P.T @ X"),
    way("dA", "bt_g", "dA = s * B.T @ G"),
    way("dB", "dyt_s", "dB = dY.T @ S"),
    way("dB", "g_at", "dB = s * G @ A.T"),
    # One pass over dY yields both. Measured on an H200: faster than two products at ranks 8 and 16, slower at 128,
    # where its accumulators leave the registers.
    way("P dB", "one_pass", "p_db: P = s * dY @ B; dB = dY.T @ S", largest_rank=32),
    way("db", "sum", "db = sum(dY)"),
)


def rows(*, kernels: bool, rank: int) -> tuple[Way, ...]:
    """The rows that are candidates: with or without fused kernels, at a rank."""
    return tuple(
        row for row in TABLE if (kernels or not row.kernels) and (row.largest_rank is None or rank <= row.largest_rank)
    )


#: The paper's backward graphs: its names for the ways of dX, dA and dB. It recomputes S and M, and never saves them.
PAPER_BACKWARDS: Mapping[tuple[str, str, str], str] = {
    ("base_first", "pt_x", "dyt_s"): "backward1",
    ("base_first", "pt_x", "g_at"): "backward2",
    ("base_first", "bt_g", "g_at"): "backward3",
    ("merged", "bt_g", "g_at"): "backward4",
    ("merged", "pt_x", "dyt_s"): "backward5",
    ("base_first", "bt_g", "dyt_s"): "backward6",
    ("merged", "bt_g", "dyt_s"): "backward7",
    ("merged", "pt_x", "g_at"): "backward8",
}

#: What a way may start from. The backward reads inputs of the forward only if the forward saved them.
PARAMETERS = frozenset(SYMBOLS[name] for name in ("W", "A", "B"))
INPUTS = PARAMETERS | {SYMBOLS["X"]}

#: Rounding these to 16 bits drops updates smaller than half an ulp of W: DESIGN's lossy merge.
LOSSY_IN_16_BIT = frozenset({SYMBOLS["M"]})
