"""dA = Pᵀ X in one pass over X."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=1,
    call="{left0T}, {right0}, {dtypes}",
    tiles={"BT": 256, "BI": 64, "WARPS": 4, "STAGES": 4},
    small_tiles={"BT": 64, "BI": 64, "WARPS": 4, "STAGES": 3},
    candidates=({"BT": 64, "BI": 128, "STAGES": 5}, {"BT": 128, "BI": 64}),
    whole=8,
    largest_rank=128,
    helpers=frozenset({"descriptors", "fitting", "multiprocessors", "splits", "sum_parts"}),
    replaces=("TR,TI->RI",),
)
