"""What follows from the gradient of down's input, in one pass over it, gate and up, with X = activate(gate, up).

dA = Pᵀ X of down; the gradients of gate and up, and of these, for each of both linears, P = s dY B and dB = dYᵀ S. X is
made of tiles, and never written.
"""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=4,
    call="{between0}, {between1}, {between2}, {left0T}, {*right1}, {*right2}, {*scaling1}, ({dtypes}), ({needs}), "
    "ACTIVATION",
    # What `tune` found on an H200 at 4096 and 16384 tokens of 13824 and 14336 features: see the profile.
    tiles={"BT": 32, "BI": 128, "CHUNK": 1024, "WARPS": 4, "STAGES": 3},
    candidates=({"BT": 16, "WARPS": 2}, {"BT": 16, "WARPS": 2, "CHUNK": 512}, {"BI": 64, "WARPS": 2}),
    # A higher rank takes the registers: three sums of BI x BR are held.
    adapted={"BI": "min(BI, 4096 // BR)", "WARPS": "min(8, WARPS * BR // 16)"},
    largest_rank=64,
    spends=True,
    # Of both P for each tile of columns, of dA and both dB for each chunk of rows; tiles are of as many bytes.
    parts="8 * T * R * -(-I // (BI * 2 // BYTES)) + 12 * I * R * -(-T // CHUNK)",
    helpers=frozenset(
        {"activation", "between", "mm_as", "multiprocessors", "rank_wide", "scaled_mm", "several", "spent", "sum_parts"}
    ),
)
