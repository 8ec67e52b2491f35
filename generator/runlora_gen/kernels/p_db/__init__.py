"""P = s dY B and dB = dYᵀ S in one pass over dY."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=2,  # the second one adds up the partial sums of the first
    call="{left0}, {right0}, {right1}, {scaling0}, {dtypes}",
    tiles={"BT": 512, "BO": 64, "WARPS": 4, "STAGES": 3},
    small_tiles={"BT": 128, "BO": 64, "WARPS": 4, "STAGES": 3},
    candidates=({"BT": 256}, {"BT": 256, "WARPS": 8, "BO": 128}),
    # Rows a program: so few that programs enough are left, and that its accumulators stay in registers.
    adapted={"BT": "max(64, min(BT, 256 if T < 4096 else 512, 8192 // BR))"},
    # In fp32 arithmetic it was thirty times slower than two products: its accumulators spill.
    dtypes=frozenset({"bf16", "fp16"}),
    # Faster than two products at ranks 8 and 16, slower at 128, where its accumulators leave the registers.
    largest_rank=32,
    helpers=frozenset({"descriptors", "fitting", "multiprocessors", "rank_wide", "sum_parts"}),
)
