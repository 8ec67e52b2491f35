"""S = s X Aᵀ of linears that share X, in one pass over X."""

from __future__ import annotations

from dataclasses import replace

from ..x_at import KERNEL as X_AT

KERNEL = replace(
    X_AT,
    call="{left0}, {*right0T}, {*scaling0}",
    # Above it the accumulators of three linears leave the registers.
    largest_rank=64,
    helpers=X_AT.helpers | {"several", "store_sum"},
    replaces=(),
    priced_as="x_at",
)
