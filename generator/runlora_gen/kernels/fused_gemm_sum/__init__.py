"""The gradient that linears which share X give it, in one persistent kernel: dX = Σ dY W + Σ P A."""

from __future__ import annotations

from dataclasses import replace

from ..fused_gemm import KERNEL as FUSED_GEMM

KERNEL = replace(
    FUSED_GEMM,
    call="{*left1}, {*right1}, {*left0}, {*right0}",
    helpers=FUSED_GEMM.helpers - {"F"} | {"several", "add_product"},
    priced_as="fused_gemm",
)
