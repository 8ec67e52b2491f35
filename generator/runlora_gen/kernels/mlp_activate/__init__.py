"""X = activate(gate, up) and S = s X Aᵀ in one pass over gate and up."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=2,  # the second one adds up the partial sums of the first
    call="{activated0}, {activated1}, {right0T}, {scaling0}, ACTIVATION",
    tiles={"BT": 16, "BI": 256, "WARPS": 4, "STAGES": 3},
    candidates=({"BI": 512, "WARPS": 8}, {"BT": 32, "WARPS": 8}),
    # With a tile of A of a higher rank there is less room for those of gate and up.
    adapted={"BI": "max(16, BI * 64 // max(64, BR))"},
    largest_rank=128,
    helpers=frozenset({"activation", "between", "multiprocessors", "rank_wide", "scaled_mm", "splits", "sum_parts"}),
)
