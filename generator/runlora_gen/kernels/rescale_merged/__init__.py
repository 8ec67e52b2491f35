"""M = W + s B A of the codes of a base of 8 bits: summed in float32 and rounded once."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=1,
    call="{codes0}, {right0}, {left0}, {scaling0}",
    tiles={"BO": 32, "BI": 128, "WARPS": 4, "STAGES": 3},
    candidates=({"BO": 16, "WARPS": 2}, {"BO": 64}, {"BO": 16, "BI": 256}),
    helpers=frozenset({"scaled", "dequantized_merged", "update_tile"}),
)
