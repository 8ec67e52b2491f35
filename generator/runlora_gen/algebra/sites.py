"""The kinds of sites that modules are generated for, each with its derivation."""

from __future__ import annotations

from .derivation import Derivation
from .experts import OF_EXPERTS
from .linear import LONE
from .mlp import OF_MLPS

DERIVATIONS: tuple[Derivation, ...] = (*LONE, *OF_EXPERTS, *OF_MLPS)
