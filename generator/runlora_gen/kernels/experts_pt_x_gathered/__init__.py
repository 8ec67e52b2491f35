"""The same where the rows are those of tokens, which are gathered as they are read."""

from __future__ import annotations

from dataclasses import replace

from ..experts_pt_x import KERNEL as PT_X

KERNEL = replace(
    PT_X, call="{left0T}, {gathered0}, {dtypes}, routing", replaces=(), priced_as="experts_pt_x", gathers=True
)
