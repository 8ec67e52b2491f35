"""X = activate(U) and S = s H A[e]ᵀ in one pass over U, where H is what dropout leaves of X: it is drawn within."""

from __future__ import annotations

from dataclasses import replace

from ..experts_activate import KERNEL as ACTIVATE

KERNEL = replace(
    ACTIVATE,
    call="{activated0}, {right0T}, {scaling0}, {seed0}, dropout, ACTIVATION, routing",
    candidates=(),
    helpers=ACTIVATE.helpers | {"drop"},
    priced_as="experts_activate",
    drops=True,
)
