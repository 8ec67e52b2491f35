"""W of the codes of a base of 8 bits, in one pass."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=1,
    call="{codes0}",
    tiles={"BO": 16, "BI": 256, "WARPS": 4},
    helpers=frozenset({"scaled"}),
    replaces=("OI->OI rescale",),
)
