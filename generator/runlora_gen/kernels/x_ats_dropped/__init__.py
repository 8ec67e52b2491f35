"""S = s H Aᵀ of linears that share X, in one pass over it, where H is what dropout leaves of X, of each another."""

from __future__ import annotations

from dataclasses import replace

from ..x_at_dropped import KERNEL as X_AT_DROPPED
from ..x_ats import KERNEL as X_ATS

KERNEL = replace(
    X_ATS,
    call="{dropped0}, {*right0T}, {*scaling0}, {*seed0}, dropout",
    # The fastest of those tried on an H200, at 4096 and 16384 tokens.
    tiles={"BT": 64, "BI": 64, "BESIDE": 4, "WARPS": 4, "STAGES": 3},
    small_tiles=X_AT_DROPPED.small_tiles,
    candidates=(),
    adapted={},
    whole=1,
    helpers=X_ATS.helpers | {"drop"},
    drops=True,
)
