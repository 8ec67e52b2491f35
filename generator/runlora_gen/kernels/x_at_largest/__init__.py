"""S = s X Aᵀ in one pass over X, with the largest magnitude of each row: what X is rounded to float8 by."""

from __future__ import annotations

from dataclasses import replace

from ..x_at import KERNEL as X_AT

KERNEL = replace(
    X_AT,
    candidates=(),
    dtypes=frozenset({"bf16", "fp16"}),
    helpers=X_AT.helpers | {"float8"},
    replaces=(),
    float8=True,
    largest=True,
)
