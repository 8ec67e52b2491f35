"""The same with dropout: dA[e] = Pgᵀ H, where H is what it leaves of X; the mask is drawn within."""

from __future__ import annotations

from dataclasses import replace

from ..experts_activate_backward import KERNEL as BACKWARD

KERNEL = replace(
    BACKWARD,
    call="{weighed1}, {weights1}, {activated0}, {gathered0}, {dotted2}, {weighed0}, {right1}, {right2}, {scaling1}, "
    "{seed0}, dropout, {dtypes}, ({needs}), ACTIVATION, routing",
    candidates=(),
    helpers=BACKWARD.helpers | {"drop"},
    priced_as="experts_activate_backward",
    drops=True,
)
