"""The same where the rows are those of tokens, which are gathered as they are read."""

from __future__ import annotations

from dataclasses import replace

from ..experts_x_at import KERNEL as X_AT

KERNEL = replace(
    X_AT, call="{gathered0}, {right0T}, {scaling0}, routing", replaces=(), priced_as="experts_x_at", gathers=True
)
