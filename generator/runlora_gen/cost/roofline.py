"""The bare price of an operation, from its shapes and a machine's peak rates alone."""

from __future__ import annotations

from functools import lru_cache
from typing import assert_never

from ..algebra.operations import (
    Contract,
    Convert,
    Draw,
    Fused,
    Map,
    Operation,
    Reduce,
    Route,
    Symbol,
    biases,
    products,
)
from ..kernels.registry import KERNELS
from ..kernels.sites import columns_of
from .profile import FLOAT8
from .setting import Setting
from .vector import OperationCost

#: Launches of what torch does in more than one. Where a weight is made of its codes, bitsandbytes' where the scales are
#: quantized too: of the scales, of their offset, of the weight; torch's where the codes are numbers: of the product
#: with the scales, and of its dtype. Between tokens and rows sorted by expert it takes indices, masks and sums. Of an
#: activation it takes one for each operation, here of a gated SiLU in float32: conversions come on top in 16 bits.
LAUNCHES = {
    "dequantize": 3,
    "rescale": 2,
    "gather": 2,
    "combine": 7,
    "weigh": 3,
    "dot": 4,
    "activate": 3,
    "activate_backward": 10,
}
#: The same where gate and up are matrices of their own: the function, or its slope, and a product.
LAUNCHES_APART = 2


def roofline(operation: Operation, setting: Setting) -> OperationCost:
    """Price one operation by max(FLOPs / peak, bytes / bandwidth) + launches.

    Bytes are the fewest possible: every operand is read once and every result written once; an accumulation reads its
    target as well. Launches are calls of the host: a library may split one. The adapter's gradients are written in its
    dtype straight from the sums. A fused kernel needs a profile that has kernels; one that computes its result in tiles
    is busy for whole waves of them, however few the last one has.
    """
    dims, device = setting.dims, setting.device
    moved = sum(map(setting.bytes_of, _moved(operation)))
    launches, flops, counted_s, host_s, idle = 1, 0, 0.0, device.host_s, 1.0
    match operation:
        case Fused():
            if device.kernel_host_s is None:
                raise ValueError(f"{device.name} has no fused kernels, so {operation.formula} has no price there")
            for product in operation.products:
                m, n, k = product.mnk(dims)
                flops += 2 * m * n * k
                counted_s += 2 * m * n * k / device.flops_per_s[_rate(product, setting)]
            kernel = KERNELS[operation.kernel]
            launches, host_s = kernel.launches_at(dims["T"], columns_of(operation, dims)), device.kernel_host_s
            if kernel.persistent and device.multiprocessors is not None:
                rows, _, _ = operation.products[0].mnk(dims)
                columns = sum(dims[out.shape[-1]] for out in operation.outputs)
                idle = kernel.waves(rows, columns, device.multiprocessors, setting.experts)
        case Contract():
            m, n, k = operation.mnk(dims)
            flops = 2 * m * n * k
            counted_s = flops / device.flops_per_s[_rate(operation, setting)]
            if operation.accumulate:
                moved += setting.bytes_of(operation.out)
            if operation.right.stacked and not operation.stacked:
                # Torch's product of rows by expert has one more, and does nothing beside it.
                launches += 1 + operation.scaled + operation.accumulate + 3 * bool(setting.bias and biases(operation))
            # A result that is wider than its factors is scaled by itself.
            if operation.scaled and operation.out.store == "adapter" and setting.casts:
                moved += 2 * setting.bytes_of(operation.out)
                launches += 1
        case Map(apart=True):
            launches = LAUNCHES_APART
            moved += 2 * setting.bytes_of(operation.out) * (launches - 1)  # what lies between both
        case Convert() | Map() | Reduce() | Route() if operation.function in LAUNCHES:
            launches = LAUNCHES[operation.function]
        case Map() if operation.accumulate:
            moved += setting.bytes_of(operation.out)
        case Reduce() | Convert() | Map() | Draw() | Route():
            pass
        case _:
            assert_never(operation)
    if setting.bias:
        moved += sum(map(setting.bytes_of, biases(operation)))
    busy = max(counted_s * idle, moved / device.bytes_per_s)
    return OperationCost(flops, moved, launches, busy + launches * device.launch_s, launches * host_s)


@lru_cache(maxsize=4096)
def _moved(operation: Operation) -> tuple[Symbol, ...]:
    """What an operation reads and writes, but for codes of which it reads the scales alone."""
    whole = {
        symbol
        for step in products(operation)
        for place, symbol in enumerate(step.reads)
        if isinstance(step, Contract) or place == 0 or not symbol.coded
    }
    return (*(symbol for symbol in operation.reads if symbol in whole), *operation.outputs)


def _rate(product: Contract, setting: Setting) -> str:
    """What a product goes by in a device's peak rates."""
    return FLOAT8 if product.coded else setting.dtype.name
