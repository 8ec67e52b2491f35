"""The outputs of linears that share X in one persistent kernel: Y = X Wᵀ + S Bᵀ + b of each."""

from __future__ import annotations

from dataclasses import replace

from ..fused_gemm import KERNEL as FUSED_GEMM

KERNEL = replace(
    FUSED_GEMM,
    call="{left1}, {*right1T}, {*left0}, {*right0T}, {*bias0}",
    helpers=FUSED_GEMM.helpers | {"several", "one_of"},
    priced_as="fused_gemm",
)
