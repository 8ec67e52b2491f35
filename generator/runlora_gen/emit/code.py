"""One operation, one line of torch."""

from __future__ import annotations

from ..algebra.operations import Matmul, Operand, Operation


def uses_scaling(operation: Operation) -> bool:
    """Whether the line reads the scaling."""
    return isinstance(operation, Matmul) and operation.scaled


def uses_scaled_mm(operation: Operation) -> bool:
    """Whether the line calls the module's helper ``_scaled_mm``."""
    return isinstance(operation, Matmul) and operation.scaled and operation.addend is None


def line(operation: Operation) -> str:
    """The statement that computes an operation.

    Accumulations are written with ``out=``: in place, a single launch, counted by torch's FlopCounterMode (which does
    not see ``addmm_``) and traceable by torch.compile.
    """
    if not isinstance(operation, Matmul):
        return f"{operation.out} = {operation.operand}.sum(0)"
    out, left, right = str(operation.out), _operand(operation.left), _operand(operation.right)
    if operation.accumulate:
        return f"torch.addmm({out}, {left}, {right}, out={out})"
    if operation.addend is not None:
        return f"{out} = torch.addmm({operation.addend}, {left}, {right}, alpha=scaling)"
    if operation.scaled:
        return f"{out} = _scaled_mm({left}, {right}, scaling)"
    if operation.bias is not None and operation.right.transposed:
        return f"{out} = F.linear({left}, {operation.right.symbol}, {operation.bias})"
    return f"{out} = {left} @ {right}"


def _operand(operand: Operand) -> str:
    return f"{operand.symbol}.t()" if operand.transposed else str(operand.symbol)
