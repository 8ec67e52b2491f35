"""Rows of a gradient by the router's weights, and the gradients of these, in one pass.

dX = g dXu, dg = dXu · X + dYr · b[e].
"""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=1,
    call="{weighed0}, {weights0}, {dotted0}, {gathered0}, {dotted2}, ({needs}), routing",
    tiles={"BI": 1024, "WARPS": 4},
    candidates=({"BI": 512, "WARPS": 2}, {"BI": 256, "WARPS": 2}),
    helpers=frozenset({"of_expert", "routed", "stacks"}),
)
