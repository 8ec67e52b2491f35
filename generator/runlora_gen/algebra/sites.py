"""The kinds of sites that modules are generated for, each with its derivation."""

from __future__ import annotations

from .derivation import Derivation
from .experts import (
    ACTIVATED,
    ACTIVATED_DROPPED,
    COMBINED,
    COMBINED_DROPPED,
    GATHERED,
    GATHERED_DROPPED,
    HANDED,
    HANDED_DROPPED,
)
from .linear import (
    DROPPED,
    FLOAT8,
    FLOAT8_DROPPED,
    LINEAR,
    QUANTIZED,
    QUANTIZED_DROPPED,
    SCALED,
    SCALED_DROPPED,
)

DERIVATIONS: tuple[Derivation, ...] = (
    LINEAR,
    DROPPED,
    QUANTIZED,
    QUANTIZED_DROPPED,
    SCALED,
    SCALED_DROPPED,
    FLOAT8,
    FLOAT8_DROPPED,
    GATHERED,
    COMBINED,
    HANDED,
    ACTIVATED,
    GATHERED_DROPPED,
    COMBINED_DROPPED,
    HANDED_DROPPED,
    ACTIVATED_DROPPED,
)
