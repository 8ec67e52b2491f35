"""The kinds of sites that modules are generated for, each with its derivation."""

from __future__ import annotations

from .derivation import Derivation
from .linear import LINEAR
from .operations import Operation

DERIVATIONS: tuple[Derivation, ...] = (LINEAR,)

#: Every operation that a program of any site may hold, each once: what a device profile knows times of.
OPERATIONS: tuple[Operation, ...] = tuple(
    dict.fromkeys(operation for derivation in DERIVATIONS for operation in derivation.operations)
)
