"""S = s X A[e]ᵀ and P = s dY B[e], each row by its expert's matrix, in one pass over X or dY."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=1,
    call="{left0}, {right0T}, {scaling0}, routing",
    # The best of five on an H100 where S and P of 32768 rows, 128 experts, 2048x1536, are made of rows of tokens.
    tiles={"BT": 64, "BI": 128, "WARPS": 4, "STAGES": 4},
    candidates=({"BI": 64, "STAGES": 6}, {"BT": 32}, {"BT": 128, "STAGES": 3}),
    largest_rank=128,
    helpers=frozenset({"by_expert", "fitting", "of_expert", "rank_wide", "routed", "stacks"}),
    replaces=("TI,ERI->TR scaled", "TO,EOR->TR scaled"),
)
