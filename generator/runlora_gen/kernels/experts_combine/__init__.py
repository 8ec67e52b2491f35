"""Of each token the sum of its rows, in float32 and in their order: Y = combine(Yr, g), dX = combine(dXr)."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=1,
    call="{operands}, routing=routing",
    tiles={"BI": 1024, "WARPS": 4},
    candidates=({"BI": 512}, {"BI": 1024, "WARPS": 8}),
    helpers=frozenset({"routed", "stacks"}),
    replaces=("TO,T->NO combine", "TI->NI combine"),
)
