"""What follows from the gradient of experts' last projection, in one pass over it and over U, and X = activate(U).

dX = g dXu, dU of dX and U, dg = dXu · X + dYr · b[e], dA[e] = Pgᵀ X; and of the projection that made U its
PU = s dU BU[e] and dBU[e] = dUᵀ SU. X and dX are made of tiles, and never written.
"""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=4,
    call="{weighed1}, {weights1}, {activated0}, {gathered0}, {dotted2}, {weighed0}, {right1}, {right2}, {scaling1}, "
    "{dtypes}, ({needs}), ACTIVATION, routing",
    # What `tune` found best on an H100 at 32768 rows, 128 experts, 768 columns of X: see the profile.
    tiles={"BT": 16, "BI": 64, "CHUNK": 1024, "WARPS": 2, "STAGES": 3},
    candidates=({"BT": 32, "WARPS": 4, "STAGES": 2}, {"BI": 128, "WARPS": 4}),
    # A higher rank takes the registers: three sums of BI x BR are held.
    adapted={"BI": "min(BI, 4096 // BR)", "WARPS": "min(8, WARPS * BR // 16)"},
    largest_rank=64,
    helpers=frozenset(
        {
            "activated",
            "activation",
            "by_expert",
            "dot_biases",
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
