"""dA = Pᵀ H and dX = K ∘ P A / (1 - p), where H is what dropout leaves of X, in one pass over both; then dX += dY W."""

from __future__ import annotations

from dataclasses import replace

from ..pt_x import KERNEL as PT_X
from ..record import Bounds

KERNEL = replace(
    PT_X,
    call="{left1}, {right1}, {dropped0}, {left2}, {right2}, {seed0}, dropout, {dtypes}, ({needs})",
    # Small programs, of which some draw while others load: 46 µs in place of 61 at 4096 tokens, 151 in place of 201 at
    # 16384.
    tiles={"BT": 64, "BI": 64, "BESIDE": 8, "WARPS": 4, "STAGES": 3},
    small_tiles={"BT": 64, "BI": 64, "BESIDE": 8, "WARPS": 4, "STAGES": 3},
    bounds={"BESIDE": Bounds(1, 32)},
    candidates=(),
    helpers=PT_X.helpers | {"drop"},
    replaces=None,
    priced_as="pt_x",
    then=True,
)
