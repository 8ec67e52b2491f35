"""P = s dY B and dB = dYᵀ S in one pass over dY, with the largest magnitude of each row: for dY in float8."""

from __future__ import annotations

from dataclasses import replace

from ..p_db import APART
from ..p_db import KERNEL as P_DB

KERNEL = replace(
    P_DB,
    call="{left0}, {right0}, {right1}, {scales}, {scaling0}, {dtypes}",
    alone_to=(0, 0),
    tiles={name: value for name, value in P_DB.tiles.items() if name not in APART},
    small_tiles={name: value for name, value in P_DB.small_tiles.items() if name not in APART},
    candidates=(),
    adapted={"BT": P_DB.adapted["BT"]},
    helpers=P_DB.helpers - {"apart"} | {"float8"},
    float8=True,
    largest=True,
)
