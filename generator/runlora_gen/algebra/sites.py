"""The kinds of sites that modules are generated for, each with its derivation."""

from __future__ import annotations

from .derivation import Derivation
from .linear import DROPPED, LINEAR

DERIVATIONS: tuple[Derivation, ...] = (LINEAR, DROPPED)
