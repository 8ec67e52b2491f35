"""S = s H Aᵀ in one pass over X, where H is what dropout leaves of X: the mask is drawn within."""

from __future__ import annotations

from dataclasses import replace

from ..record import Bounds
from ..x_at import KERNEL as X_AT

KERNEL = replace(
    X_AT,
    call="{dropped0}, {right0T}, {scaling0}, {seed0}, dropout",
    # Small programs, of which some draw while others load: at 4096 tokens 26 µs in place of 33.
    tiles={"BT": 32, "BI": 128, "BESIDE": 4, "WARPS": 4, "STAGES": 4},
    small_tiles={"BT": 32, "BI": 64, "BESIDE": 4, "WARPS": 4, "STAGES": 3},
    bounds={"BESIDE": Bounds(1, 32)},
    candidates=(),
    helpers=X_AT.helpers | {"drop"},
    replaces=None,
    priced_as="x_at",
    drops=True,
)
