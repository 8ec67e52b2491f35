"""M = W + s B A, rounded to 16 bits up or down at random, so that the mean is right: torch has no such rounding."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=2,  # the first one draws the seed
    call="{addend0}, {right0}, {left0}, {scaling0}, seed",
    tiles={"BO": 32, "BI": 128, "WARPS": 4, "STAGES": 3},
    dtypes=frozenset({"bf16", "fp16"}),
    helpers=frozenset({"merged_tile", "update_tile"}),
    replaces=("OR,RI->OI scaled added",),
    when="stochastic",
    priced_as="merge",
    seeded=True,
)
