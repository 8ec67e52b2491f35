"""X = activate(U) and S = s X A[e]ᵀ in one pass over U."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=1,
    call="{activated0}, {right0T}, {scaling0}, ACTIVATION, routing",
    # What `tune` found best on an H100 at 16384 to 131072 rows: see the profile.
    tiles={"BT": 16, "BI": 256, "WARPS": 4, "STAGES": 3},
    candidates=({"BT": 32}, {"BI": 128}),
    # With a tile of A of a higher rank there is less room for one of U.
    adapted={"BI": "max(16, BI * 64 // max(64, BR))"},
    largest_rank=128,
    helpers=frozenset({"activated", "activation", "by_expert", "of_expert", "rank_wide", "routed", "stacks"}),
)
