"""What kernels compute of the sites: products in whose place they run, and operations of which they are part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

from ..algebra.derivation import Derivation
from ..algebra.enumerate import Phase, Program
from ..algebra.operations import Contract, Dims, Draw, Fused, Map, Operation, Step, dimensions
from ..algebra.sites import DERIVATIONS
from ..algebra.work import kind, work
from .record import When
from .registry import KERNELS


def serves(operation: Fused, *, dtype: str, rank: int, dims: Dims) -> bool:
    """Whether the kernel of an operation takes a dtype, a rank and these sizes."""
    return KERNELS[operation.kernel].takes(dtype, rank, dims["T"], columns_of(operation, dims))


def columns_of(operation: Operation, dims: Dims) -> int:
    """The most that an output has of those linears that an operation is of."""
    return max((dims[name] for name in dimensions(operation) if name[0] == "O"), default=0)


@lru_cache
def alternatives(derivation: Derivation, when: When) -> tuple[Fused, ...]:
    """Kernels that take the place of single products of a site's table: they make no other programs.

    They come in the order in which an id names them: products over the tokens first, then as the table has them.

    Raises:
        ValueError: two kernels take the place of one product.
    """
    rows = (operation for row in derivation.table for operation in row.operations)
    products = [operation for operation in dict.fromkeys(rows) if not isinstance(operation, Fused)]
    replacing = [(name, kernel.replaces) for name, kernel in KERNELS.items() if kernel.when == when]
    found: dict[Step, Fused] = {}
    for product in sorted(products, key=lambda product: "T" not in dimensions(product)):
        done = work(product)
        for name, replaced in replacing:
            if done in replaced:
                if product in found:
                    raise ValueError(f"{found[product].kernel} and {name} both take the place of {product}")
                found[product] = Fused(name, (product,))
    return tuple(found.values())


@lru_cache
def operations_of(derivation: Derivation) -> tuple[Operation, ...]:
    """Every operation that a program of a site may hold, each once."""
    single = (*alternatives(derivation, "cheaper"), *alternatives(derivation, "stochastic"))
    return tuple(dict.fromkeys((*derivation.operations, *single)))


#: Every operation that a program of any site may hold, each once.
OPERATIONS: tuple[Operation, ...] = tuple(dict.fromkeys(op for site in DERIVATIONS for op in operations_of(site)))
#: All work that a profile may hold measurements of, each by the first operation that does it: that has a size.
WORKS: Mapping[str, Operation] = {work(op): op for op in reversed(OPERATIONS) if dimensions(op)}


_Some = TypeVar("_Some", bound=Operation)


def parted(operation: _Some) -> tuple[_Some, tuple[Step, ...]]:
    """What a kernel computes itself, and the products that torch computes after it; else the operation."""
    if not (isinstance(operation, Fused) and KERNELS[operation.kernel].then):
        return operation, ()
    last = kind(operation.products[-1])
    then = tuple(part for part in operation.products if part.accumulate and kind(part) == last)
    return replace(operation, parts=operation.parts[: -len(then)]), then


def undropped(operation: Fused) -> Fused:
    """What a kernel that drops computes beside that: its other steps, of all that a mask would leave some of.

    What is dropped for a sum alone is left out with it: without dropout the large product takes it along.
    """
    drops = {part.out: part for part in operation.parts if isinstance(part, Map) and part.function == "drop"}
    sums = [part for part in operation.parts if isinstance(part, Map) and part.function == "plus"]
    added = {drops[part.operands[1]].operands[0] for part in sums}
    # What is dropped to is what it is dropped of; where it is written, the other way round.
    names = dict((p.out, p.operands[0]) if p.out in operation.inner else (p.operands[0], p.out) for p in drops.values())
    names |= {part.out: part.operands[0] for part in sums}

    def renamed(part: Step) -> Step:
        if isinstance(part, Map):
            return replace(part, operands=tuple(names.get(operand, operand) for operand in part.operands))
        if not isinstance(part, Contract):
            return part
        left, right = (replace(side, symbol=names.get(side.symbol, side.symbol)) for side in (part.left, part.right))
        return replace(part, out=names.get(part.out, part.out), left=left, right=right)

    left_out = (*drops.values(), *sums, *(part for part in operation.parts if added.intersection(part.outputs)))
    parts = tuple(renamed(part) for part in operation.parts if part not in left_out and not isinstance(part, Draw))
    return replace(operation, parts=parts, inner=tuple(s for s in operation.inner if any(s == p.out for p in parts)))


def draws(operation: Operation) -> bool:
    """Whether an operation draws random numbers."""
    return isinstance(operation, Fused) and KERNELS[operation.kernel].seeded


def seeded(computed: Phase | Program) -> bool:
    """Whether what is computed draws random numbers."""
    return any(KERNELS[name].seeded for name in computed.kernels)
