"""The same where the rows are those of tokens, which are gathered as they are read."""

from __future__ import annotations

from dataclasses import replace

from ..experts_x_at_dropped import KERNEL as X_AT

KERNEL = replace(X_AT, call="{gathered0}, {right0T}, {scaling0}, {seed0}, dropout, routing", gathers=True)
