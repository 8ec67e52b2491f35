"""P = s dY B[e] and dB[e] = dYᵀ S in one pass over the rows of each expert."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=2,
    call="{left0}, {right0}, {right1}, {scaling0}, {dtypes}, routing",
    # The best of five on an H100 at 32768 rows, 128 experts, 1536 columns.
    tiles={"BT": 64, "BO": 128, "CHUNK": 1024, "WARPS": 4, "STAGES": 3},
    candidates=({"BO": 256}, {"BT": 32, "BO": 256}),
    # A higher rank takes the registers: as many elements of P's tile in all.
    adapted={"BT": "max(16, BT * 16 // BR)"},
    largest_rank=64,
    helpers=frozenset(
        {
            "by_expert",
            "of_expert",
            "rank_wide",
            "routed",
            "stacks",
            "sum_by_expert",
            "sum_chunks",
            "sum_parts",
            "mm_as",
            "scaled_mm",
        }
    ),
)
