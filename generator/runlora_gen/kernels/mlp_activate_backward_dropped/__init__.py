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
    candidates=(),
    helpers=BACKWARD.helpers | {"drop"},
    priced_as="mlp_activate_backward",
    drops=True,
)
