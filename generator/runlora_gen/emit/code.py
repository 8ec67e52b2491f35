"""One operation, one line of torch."""

from __future__ import annotations

from dataclasses import replace

from ..algebra.operations import SYMBOLS, Fused, Matmul, Operand, Operation, products
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


def line(operation: Operation) -> str:
    """The statement that computes an operation."""
    if isinstance(operation, Fused):
        return f"{results_of(operation)} = {_call(operation)}"
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


def results_of(operation: Operation) -> str:
    """What the line assigns to."""
    return ", ".join(map(str, operation.outputs))


def _call(operation: Fused) -> str:
    """The call of a kernel's wrapper, with the operands of its parts where the kernel wants them."""
    values = {
        "bias": "None" if operation.bias is None else str(operation.bias),
        "dtypes": ", ".join(DTYPE_OF[out] for out in operation.outputs if out in DTYPE_OF),
    }
    for number, part in enumerate(operation.parts):
        for side, operand in (("left", part.left), ("right", part.right)):
            values[f"{side}{number}"] = _operand(operand)
            values[f"{side}{number}T"] = _operand(replace(operand, transposed=not operand.transposed))
        values[f"addend{number}"] = str(part.addend)
    arguments = KERNELS[operation.kernel].call.format(**values)
    return f'_{operation.kernel}({arguments}, tiles="{results_of(operation)}")'


def _operand(operand: Operand) -> str:
    return f"{operand.symbol}.t()" if operand.transposed else str(operand.symbol)
