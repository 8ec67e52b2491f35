"""dA = Pᵀ X of linears that share X, in one pass over X."""

from __future__ import annotations

from dataclasses import replace

from ..pt_x import KERNEL as PT_X

KERNEL = replace(
    PT_X,
    call="{*left0T}, {right0}, ({dtypes})",
    # Above it the accumulators of three linears leave the registers.
    largest_rank=64,
    helpers=PT_X.helpers | {"several", "store_sum"},
    replaces=(),
    priced_as="pt_x",
)
