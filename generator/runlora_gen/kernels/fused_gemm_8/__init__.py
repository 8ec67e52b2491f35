"""A large product of float8 and a low-rank one of 16 bits in one persistent kernel: Y = Xq Qᵀ + S Bᵀ + b.

Likewise dX = dYq Qtᵀ + P A.
"""

from __future__ import annotations

from ..fused_gemm import KERNEL as FUSED_GEMM
from ..record import Kernel

KERNEL = Kernel(
    launches=1,
    call="{left1}, {right1T}, {left0}, {right0T}, {bias0}",
    tiles={"BM": 128, "BN": 256, "BK": 128, "GROUP_M": 16, "SUBTILES": 2, "PARTS": 2, "WARPS": 8, "STAGES": 3},
    small_tiles={"BM": 128, "BN": 128, "BK": 64, "GROUP_M": 8, "SUBTILES": 1, "PARTS": 1, "WARPS": 8, "STAGES": 3},
    bounds=FUSED_GEMM.bounds,
    candidates=({"GROUP_M": 8},),
    dtypes=FUSED_GEMM.dtypes,
    # The low-rank operands lie beside three stages of the large ones: at rank 128 there is no room for them.
    largest_rank=64,
    persistent=True,
    helpers=frozenset({"F", "descriptors", "gemm", "multiprocessors", "rank_wide", "float8"}),
    float8=True,
)
