"""P = s dY B and dB = dYᵀ S in one pass over dY, with the largest magnitude of each row: for dY in float8."""

from __future__ import annotations

from dataclasses import replace

from ..p_db import KERNEL as P_DB

KERNEL = replace(
    P_DB,
    call="{left0}, {right0}, {right1}, {scales}, {scaling0}, {dtypes}",
    candidates=(),
    helpers=P_DB.helpers | {"float8"},
    float8=True,
    largest=True,
)
