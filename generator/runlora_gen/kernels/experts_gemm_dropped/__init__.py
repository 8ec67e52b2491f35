"""The gradient of rows in one persistent kernel, dX = dY W[e] + K ∘ P A[e] / (1 - p): the mask K is drawn within."""

from __future__ import annotations

from dataclasses import replace

from ..experts_gemm import KERNEL as GEMM

KERNEL = replace(
    GEMM,
    call="{left1}, {right1T}, {left0}, {right0T}, {bias0}, {seed0}, dropout, routing",
    candidates=(),
    helpers=GEMM.helpers | {"drop"},
    priced_as="experts_gemm",
    drops=True,
)
