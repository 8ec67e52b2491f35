"""The same with dropout: dA = Pᵀ H, where H is what it leaves of X; the mask is drawn within.

The gradient of X is made here: of dV, what the large product gave, and of the adapter's part under the same mask.
"""

from __future__ import annotations

from dataclasses import replace

from ..mlp_activate_backward import KERNEL as BACKWARD

KERNEL = replace(
    BACKWARD,
    call="{added0}, {between1}, {between2}, {left0T}, {right1}, {*right2}, {*right3}, {*scaling2}, {seed0}, dropout, "
    "({dtypes}), ({needs}), ACTIVATION",
    # The fastest of those tried on an H200, at 16384 tokens of 14336 features.
    tiles={"BT": 64, "BI": 64, "CHUNK": 1024, "WARPS": 4, "STAGES": 3},
    candidates=(),
    # A mask and a product more are held, and tiles wait in shared memory.
    adapted={**BACKWARD.adapted, "BT": "max(16, min(BT, 1024 // BR))"},
    helpers=BACKWARD.helpers | {"drop"},
    priced_as="mlp_activate_backward",
    drops=True,
)
