"""One operation, one line of torch."""

from __future__ import annotations

from ..algebra.operations import SYMBOLS, Fused, Matmul, Operand, Operation, Symbol, products
from ..algebra.table import KERNELS

#: Gradients of parameters that may have another dtype than the activations, and the variable that holds it.
DTYPE_OF = {SYMBOLS["dA"]: "A_dtype", SYMBOLS["dB"]: "B_dtype"}


def uses_scaling(operation: Operation) -> bool:
    """Whether the line reads the scaling."""
    return any(isinstance(product, Matmul) and product.scaled for product in products(operation))


def uses_scaled_mm(operation: Operation) -> bool:
    """Whether the line, or the torch path of its kernel, calls the module's helper ``_scaled_mm``."""
    return any(isinstance(p, Matmul) and p.scaled and p.addend is None for p in products(operation))


def uses_accumulate(operation: Operation) -> bool:
    """Whether the line, or the torch path of its kernel, calls the module's helper ``_accumulate``."""
    return any(isinstance(product, Matmul) and product.accumulate for product in products(operation))


def dtypes_of(operation: Operation) -> set[Symbol]:
    """The gradients whose dtype the line reads."""
    return {out for out in operation.outputs if out in DTYPE_OF}


def line(operation: Operation) -> str:
    """The statement that computes an operation."""
    if isinstance(operation, Fused):
        results = ", ".join(map(str, operation.outputs))
        return f"{results} = {KERNELS[operation.kernel].calls[results]}"
    if not isinstance(operation, Matmul):
        return f"{operation.out} = {operation.operand}.sum(0)"
    out, left, right = str(operation.out), _operand(operation.left), _operand(operation.right)
    if operation.accumulate:
        return f"{out} = _accumulate({out}, {left}, {right})"
    if operation.addend is not None:
        return f"{out} = torch.addmm({operation.addend}, {left}, {right}, alpha=scaling)"
    if operation.scaled:
        value = f"_scaled_mm({left}, {right}, scaling)"
    elif operation.bias is not None and operation.right.transposed:
        return f"{out} = F.linear({left}, {operation.right.symbol}, {operation.bias})"
    else:
        value = f"{left} @ {right}"
    if operation.out in DTYPE_OF:
        value = f"{value if operation.scaled else f'({value})'}.to({DTYPE_OF[operation.out]})"
    return f"{out} = {value}"


def _operand(operand: Operand) -> str:
    return f"{operand.symbol}.t()" if operand.transposed else str(operand.symbol)
