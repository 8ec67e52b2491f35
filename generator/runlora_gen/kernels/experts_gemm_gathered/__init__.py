"""The same where the rows are those of tokens, which are gathered as they are read: they are never there as a whole."""

from __future__ import annotations

from dataclasses import replace

from ..experts_gemm import KERNEL as GEMM

KERNEL = replace(
    GEMM, call="{gathered0}, {right1T}, {left0}, {right0T}, {bias0}, routing", priced_as="experts_gemm", gathers=True
)
