"""What ``dx_da`` computes, of linears that share X in one pass: dX = Σ K ∘ P A / (1 - p), then dX += Σ dY W."""

from __future__ import annotations

from dataclasses import replace

from ..dx_da import KERNEL as DX_DA

KERNEL = replace(
    DX_DA,
    call="{*left0T}, {*right1}, {dropped0}, {*left2}, {*right2}, {*seed0}, dropout, ({dtypes}), ({needs})",
    # Above it the accumulators of three linears leave the registers.
    largest_rank=64,
    helpers=DX_DA.helpers | {"several"},
)
