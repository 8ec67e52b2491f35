"""X = activate(U) and S = s X A[e]ᵀ in one pass over U."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=1,
    call="{activated0}, {right0T}, {scaling0}, ACTIVATION, routing",
    # The best of 7 on an H100 at 16384 rows, 32 experts, 2880 columns of X, and nearly so at 32768, 128 and 768.
    tiles={"BT": 16, "BI": 128, "WARPS": 4, "STAGES": 3},
    candidates=({"BT": 32}, {"BI": 256}),
    # With a tile of A of a higher rank there is less room for one of U.
    adapted={"BI": "max(16, BI * 64 // max(64, BR))"},
    largest_rank=128,
    helpers=frozenset({"activated", "activation", "by_expert", "of_expert", "rank_wide", "routed", "stacks"}),
)
