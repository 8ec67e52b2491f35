"""X = activate(gate, up) and S = s H Aᵀ in one pass, where H is what dropout leaves of X: it is drawn within."""

from __future__ import annotations

from dataclasses import replace

from ..mlp_activate import KERNEL as ACTIVATE

KERNEL = replace(
    ACTIVATE,
    call="{activated0}, {activated1}, {right0T}, {scaling0}, {seed0}, dropout, ACTIVATION",
    candidates=(),
    helpers=ACTIVATE.helpers | {"drop"},
    priced_as="mlp_activate",
    drops=True,
)
