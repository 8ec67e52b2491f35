"""S = s H Aᵀ in one pass over X, where H is what dropout leaves of X: the mask is drawn within."""

from __future__ import annotations

from dataclasses import replace

from ..x_at import KERNEL as X_AT

KERNEL = replace(
    X_AT,
    call="{dropped0}, {right0T}, {scaling0}, {seed0}, dropout",
    # Small programs, of which some draw while others load.
    tiles={"BT": 32, "BI": 128, "BESIDE": 4, "WARPS": 4, "STAGES": 4},
    small_tiles={"BT": 32, "BI": 64, "BESIDE": 4, "WARPS": 4, "STAGES": 3},
    candidates=(),
    adapted={},
    whole=1,
    helpers=X_AT.helpers | {"drop"},
    replaces=(),
    priced_as="x_at",
    drops=True,
)
