"""dA = Pᵀ H and dX = K ∘ P A / (1 - p), where H is what dropout leaves of X, in one pass over both; then dX += dY W."""

from __future__ import annotations

from dataclasses import replace

from ..pt_x import KERNEL as PT_X

KERNEL = replace(
    PT_X,
    call="{left1}, {right1}, {dropped0}, {left2}, {right2}, {seed0}, dropout, {dtypes}, ({needs})",
    # Small programs, of which some draw while others load: large ones, alone on a multiprocessor, were slower.
    tiles={"BT": 64, "BI": 64, "BESIDE": 8, "WARPS": 4, "STAGES": 3},
    small_tiles={"BT": 64, "BI": 64, "BESIDE": 8, "WARPS": 4, "STAGES": 3},
    candidates=(),
    whole=1,
    helpers=PT_X.helpers | {"drop", "store_sum"},
    replaces=(),
    priced_as="pt_x",
    then=True,
)
