"""S = s X Aᵀ in one pass over X."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=1,
    call="{left0}, {right0T}, {scaling0}",
    tiles={"BT": 64, "BI": 256, "WARPS": 4, "STAGES": 4},
    small_tiles={"BT": 64, "BI": 64, "WARPS": 4, "STAGES": 3},
    candidates=({"BI": 128}, {"BT": 128, "BI": 128}),
    # Few rows of few features: smaller programs, each of which takes a row's features all, leave no parts to add up.
    adapted={
        "BT": "16 if T <= 2048 and WHOLE * BI >= I else BT",
        "BI": "2 * BI if T <= 2048 and WHOLE * BI >= I else BI",
    },
    whole=8,
    largest_rank=128,
    helpers=frozenset({"descriptors", "fitting", "multiprocessors", "rank_wide", "splits", "sum_parts"}),
    replaces=("TI,RI->TR scaled",),
)
