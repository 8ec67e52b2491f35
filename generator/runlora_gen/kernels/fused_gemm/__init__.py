"""A large product and a low-rank one in one persistent kernel: Y = X Wᵀ + S Bᵀ + b, dX = dY W + P A."""

from __future__ import annotations

from ..record import Bounds, Kernel

KERNEL = Kernel(
    launches=1,
    call="{left1}, {right1T}, {left0}, {right0T}, {bias0}",
    tiles={"BM": 128, "BN": 256, "BK": 64, "GROUP_M": 8, "SUBTILES": 2, "PARTS": 2, "WARPS": 8, "STAGES": 4},
    small_tiles={"BM": 128, "BN": 128, "BK": 32, "GROUP_M": 8, "SUBTILES": 1, "PARTS": 1, "WARPS": 8, "STAGES": 3},
    bounds={"GROUP_M": Bounds(1, 64), "SUBTILES": Bounds(1, 2), "PARTS": Bounds(1, 2)},
    candidates=({"GROUP_M": 16}, {"BN": 128, "SUBTILES": 1}),
    dtypes=frozenset({"bf16", "fp16"}),  # its tiles fill the shared memory with 16-bit operands
    persistent=True,
    helpers=frozenset({"F", "descriptors", "few_tiles", "gemm", "multiprocessors", "rank_wide"}),
)
