"""One operation, one line of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..algebra.operations import Fused, Matmul, Operand, Operation, products


def uses_scaling(operation: Operation) -> bool:
    """Whether the line reads the scaling."""
    return any(isinstance(product, Matmul) and product.scaled for product in products(operation))


def uses_scaled_mm(operation: Operation) -> bool:
    """Whether the line, or the torch path of its kernel, calls the module's helper ``_scaled_mm``."""
    return any(isinstance(p, Matmul) and p.scaled and p.addend is None for p in products(operation))


def uses_accumulate(operation: Operation) -> bool:
    """Whether the line, or the torch path of its kernel, calls the module's helper ``_accumulate``."""
    return any(isinstance(product, Matmul) and product.accumulate for product in products(operation))


def line(operation: Operation) -> str:
    """The statement that computes an operation."""
    if isinstance(operation, Fused):
        return _KERNEL_LINES[operation.kernel](operation)
    if not isinstance(operation, Matmul):
        return f"{operation.out} = {operation.operand}.sum(0)"
    out, left, right = str(operation.out), _operand(operation.left), _operand(operation.right)
    if operation.accumulate:
        return f"{out} = _accumulate({out}, {left}, {right})"
    if operation.addend is not None:
        return f"{out} = torch.addmm({operation.addend}, {left}, {right}, alpha=scaling)"
    if operation.scaled:
        return f"{out} = _scaled_mm({left}, {right}, scaling)"
    if operation.bias is not None and operation.right.transposed:
        return f"{out} = F.linear({left}, {operation.right.symbol}, {operation.bias})"
    return f"{out} = {left} @ {right}"


def _fused_gemm(operation: Fused) -> str:
    """A call with right operands in the layout that F.linear takes: N×K."""
    low, base = operation.parts
    rights = [str(p.right.symbol) if p.right.transposed else f"{p.right.symbol}.t()" for p in (base, low)]
    arguments = [_operand(base.left), rights[0], _operand(low.left), rights[1]]
    if operation.bias is not None:
        arguments.append(str(operation.bias))
    return f"{base.out} = _fused_gemm({', '.join(arguments)})"


def _p_db(operation: Fused) -> str:
    """A call with two results."""
    first, second = operation.parts
    names = (first.left.symbol, first.right.symbol, second.right.symbol)
    return f"{first.out}, {second.out} = _p_db({', '.join(map(str, names))}, scaling)"


#: How a fused kernel is called. Its template is ``templates/kernels/NAME.jinja``.
_KERNEL_LINES: Mapping[str, Callable[[Fused], str]] = {"fused_gemm": _fused_gemm, "p_db": _p_db}


def _operand(operand: Operand) -> str:
    return f"{operand.symbol}.t()" if operand.transposed else str(operand.symbol)
