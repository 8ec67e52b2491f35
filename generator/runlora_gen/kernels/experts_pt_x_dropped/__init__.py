"""dA[e] = Pᵀ H over the rows of each expert, where H is what dropout leaves of X: the mask is drawn within."""

from __future__ import annotations

from dataclasses import replace

from ..experts_pt_x import KERNEL as PT_X

KERNEL = replace(
    PT_X,
    call="{left0T}, {dropped0}, {seed0}, dropout, {dtypes}, routing",
    candidates=(),
    helpers=PT_X.helpers | {"drop"},
    replaces=(),
    priced_as="experts_pt_x",
    drops=True,
)
