"""Codes of float8, transposed: dX sums over their rows, and matrix units read what is summed over side by side."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=1,
    call="{operands}.codes",
    tiles={"BO": 64, "BI": 128, "WARPS": 4},
    helpers=frozenset({"float8"}),
    float8=True,
)
