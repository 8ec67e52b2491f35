"""The same where the rows are those of tokens, which are gathered as they are read."""

from __future__ import annotations

from dataclasses import replace

from ..experts_gemm_dropped import KERNEL as GEMM

KERNEL = replace(
    GEMM, call="{gathered0}, {right1T}, {left0}, {right0T}, {bias0}, {seed0}, dropout, routing", gathers=True
)
