"""dA[e] = Pᵀ X over the rows of each expert."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=2,
    call="{left0T}, {right0}, {dtypes}, routing",
    # The best of five on an H100 at 32768 rows of tokens, 128 experts, 2048 columns.
    tiles={"BT": 32, "BI": 128, "CHUNK": 1024, "WARPS": 4, "STAGES": 4},
    candidates=({"BT": 64}, {"BT": 64, "BI": 64}),
    largest_rank=128,
    helpers=frozenset(
        {"fitting", "of_expert", "routed", "stacks", "sum_by_expert", "sum_chunks", "mm_as", "scaled_mm"}
    ),
    replaces=("TR,TI->ERI",),
)
