"""The kinds of sites that modules are generated for, each with its derivation."""

from __future__ import annotations

from .derivation import Derivation
from .experts import OF_EXPERTS
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
    *OF_EXPERTS,
)
