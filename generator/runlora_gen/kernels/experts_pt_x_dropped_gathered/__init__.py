"""The same where the rows are those of tokens, which are gathered as they are read."""

from __future__ import annotations

from dataclasses import replace

from ..experts_pt_x_dropped import KERNEL as PT_X

KERNEL = replace(PT_X, call="{left0T}, {gathered0}, {seed0}, dropout, {dtypes}, routing", gathers=True)
