"""M = W + s B A: W is read once, M written once."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=1,
    call="{addend0}, {right0}, {left0}, {scaling0}",
    tiles={"BO": 32, "BI": 128, "WARPS": 4, "STAGES": 3},
    candidates=({"BO": 64}, {"BI": 256}),
    helpers=frozenset({"merged_tile", "update_tile"}),
    replaces=("OR,RI->OI scaled added",),
)
