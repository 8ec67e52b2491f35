"""P = s dY B and dB = dYᵀ S in one pass over dY."""

from __future__ import annotations

from ..record import Kernel

#: What programs of two kinds read where there are few rows: those that make ROWS of P in tiles of ROWS×ACROSS, those
#: that make COLUMNS rows of dB in tiles of DEEP×COLUMNS. The fastest of those tried on an H200, at 512 to 2048 rows.
APART = {"ROWS": 16, "ACROSS": 256, "DEEP": 64, "COLUMNS": 128}

KERNEL = Kernel(
    launches=2,  # the second one adds up the partial sums of the first
    # To read dY twice takes the device about as long there as to add up parts, and spares the host a launch.
    alone_to=(1024, 4096),
    call="{left0}, {right0}, {right1}, {scaling0}, {dtypes}",
    tiles={"BT": 512, "BO": 64, "WARPS": 4, "STAGES": 3, **APART},
    small_tiles={"BT": 128, "BO": 64, "WARPS": 4, "STAGES": 3, **APART},
    candidates=({"BT": 256}, {"BT": 256, "WARPS": 8, "BO": 128}),
    # Rows a program: so few that programs enough are left, and that its accumulators stay in registers.
    adapted={"BT": "max(64, min(BT, 256 if T < 4096 else 512, 8192 // BR))"},
    # In fp32 arithmetic it was thirty times slower than two products: its accumulators spill.
    dtypes=frozenset({"bf16", "fp16"}),
    # Faster than two products at ranks 8 and 16, slower at 128, where its accumulators leave the registers.
    largest_rank=32,
    helpers=frozenset({"apart", "descriptors", "fitting", "multiprocessors", "rank_wide", "sum_parts"}),
)
