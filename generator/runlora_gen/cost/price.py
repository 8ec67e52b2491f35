"""The price of operations, phases and programs: a vector, derived from the operations and from nothing else."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import lru_cache

from ..algebra.enumerate import Phase, Program
from ..algebra.liveness import saved_activations, wanted_operations
from ..algebra.operations import Convert, Fused, Map, Operation, Symbol, dimensions
from ..algebra.schedule import workspace
from ..kernels.registry import KERNELS
from ..kernels.sites import columns_of, parted, seeded
from .measured import correction
from .passes import Times, passes_apart, passes_of_activation, price_passes
from .roofline import roofline
from .rounding import merge_error, rounding_error, update_std
from .setting import Setting
from .vector import DEVICE_BOUND, Cost, OperationCost, PhaseCost, weighted


@lru_cache(maxsize=65536)
def price_operation(operation: Operation, setting: Setting) -> OperationCost:
    """Price one operation: by the roofline, corrected by what was measured on the device.

    The correction is the ratio of measured time to roofline: at measured dimensions that gives the measured time;
    between them it is the mean of the logarithms, weighted by 1 / distance⁴ in the logarithms of the dimensions.
    """
    own, then = parted(operation)
    if isinstance(own, Fused) and not _takes_size(own, setting):  # its launch leaves it to torch
        first, *others = (price_operation(part, setting) for part in own.parts)
        return sum(others, first)
    cost = roofline(own, setting)
    factor = correction(operation, tuple(setting.dims[d] for d in dimensions(operation)), setting.dtype, setting.device)
    return sum((price_operation(part, setting) for part in then), replace(cost, device_s=cost.device_s * factor))


def _takes_size(operation: Fused, setting: Setting) -> bool:
    return KERNELS[operation.kernel].takes_size(setting.dims["T"], columns_of(operation, setting.dims))


@lru_cache(maxsize=65536)
def price_in(operation: Operation, setting: Setting, forward: bool) -> OperationCost:
    """Price an operation where it runs: in the forward of several linears one launch makes all casts of adapters.

    The first cast has the launch, the others their bytes alone.
    """
    cost = price_operation(operation, setting)
    if not forward or operation.outputs[0] not in setting.casts_together[1:]:
        return cost
    launched_s = cost.launches * setting.device.launch_s
    return replace(cost, launches=0, device_s=cost.device_s - launched_s, host_s=0.0)


@lru_cache(maxsize=65536)
def price_phase(phase: Phase, setting: Setting) -> PhaseCost:
    """Price a forward, or the part of a backward that the wanted gradients need."""
    return replace(sum_phase(phase, setting), workspace_bytes=workspace(phase, setting.bytes_of))


@lru_cache(maxsize=65536)
def sum_phase(phase: Phase, setting: Setting) -> PhaseCost:
    """The same without its workspace, found sooner: no order is sought that needs little memory."""
    costs, times = _costs(phase, setting, ()), phase_times(phase, setting)
    return PhaseCost(
        flops=sum(cost.flops for cost in costs),
        bytes_moved=sum(cost.bytes_moved for cost in costs),
        launches=sum(cost.launches for cost in costs),
        workspace_bytes=0,
        device_s=times.device_s,
        host_s=times.host_s,
    )


@lru_cache(maxsize=65536)
def phase_times(phase: Phase, setting: Setting, kernels: tuple[Fused, ...] = ()) -> Times:
    """The seconds of a phase alone, found sooner than its whole price.

    ``kernels``: those that take the place of the single products that they compute. What the autograd function itself
    takes the host counts with the backward: without one there is no function.
    """
    costs = _costs(phase, setting, kernels)
    function_s = 0.0 if phase.is_forward else setting.device.function_host_s
    return Times(sum(cost.device_s for cost in costs), sum((cost.host_s for cost in costs), function_s))


def _costs(phase: Phase, setting: Setting, kernels: tuple[Fused, ...]) -> list[OperationCost]:
    taken: dict[Operation, Operation] = {kernel.parts[0]: kernel for kernel in kernels}
    return [
        price_in(taken.get(operation, operation), setting, phase.is_forward)
        for operation in wanted_operations(phase, setting.gradients)
    ]


def program_times(program: Program, setting: Setting) -> Times:
    """The same of a program."""
    return phase_times(program.forward, setting) + phase_times(program.backward, setting)


def price(program: Program, setting: Setting, host_share: float = DEVICE_BOUND) -> Cost:
    """Price a program in a setting."""
    return Cost(
        forward=price_phase(program.forward, setting),
        backward=price_phase(program.backward, setting),
        saved_bytes=saved_bytes(program, setting),
        update_error=update_error(program.made, setting, stochastic=seeded(program)),
        host_share=host_share,
    )


def saved_bytes(program: Program, setting: Setting) -> int:
    """Bytes that a program keeps for its backward, which says what."""
    return sum(map(setting.bytes_of, saved_activations(program, setting.gradients)))


def price_of_model(operation: Operation, setting: Setting) -> Times:
    """What an operation takes where the model itself runs it: an activation, by its own passes, which are fewer."""
    match operation:
        case Map(apart=True):
            passes = passes_apart(operation.function, setting.bytes_of(operation.out), fused=setting.compiled)
        case Map(activates=True):
            backward = operation.function == "activate_backward"
            wide, made = operation.reads[-1], operation.reads[0] if backward else operation.out
            gated = setting.bytes_of(wide) > setting.bytes_of(made)
            passes = passes_of_activation(
                setting.bytes_of(made), gated=gated, backward=backward, fused=setting.compiled
            )
        case _:
            return Times.of(price_operation(operation, setting))
    return passes.price(setting.device)


def spares(setting: Setting) -> tuple[Times, Times]:
    """What a site of several linears does in place of the model and of autograd, forward and backward.

    What is between linears; and the sum of the gradients of what several read, each of which is read with it, and the
    sum written.
    """
    base = setting.derivation.base
    sums = [3 * setting.bytes_of(op.outputs[0]) for op in base if op.accumulate] if "dX" in setting.gradients else []
    between = [op for op in base if isinstance(op, Map) and op.activates]
    forward, backward = (
        sum((price_of_model(op, setting) for op in between if (op.function == "activate") is first), Times())
        for first in (True, False)
    )
    return forward, backward + price_passes(sums, setting.device)


def price_frozen(setting: Setting, host_share: float = DEVICE_BOUND) -> float:
    """Seconds of the frozen linear (Y = X Wᵀ + b and dX = dY W): the floor that a LoRA linear is held against.

    A quantized one makes its weight in the forward and again in the backward.
    """
    forward, backward = price_frozen_forward(setting), _base_times(setting, setting.gradients, backward=True)
    return weighted(forward[0] + backward[0], forward[1] + backward[1], host_share)


def price_frozen_forward(setting: Setting) -> tuple[float, float]:
    """Seconds of device and host of its forward alone."""
    return _base_times(setting, set(map(str, setting.derivation.outputs)))


def _base_times(setting: Setting, wanted: Collection[str], *, backward: bool = False) -> tuple[float, float]:
    """Seconds of device and host of what is wanted of a site without adapters, and of what that is made of.

    ``backward``: what the forward made is there, but for weights that are made of codes.
    """
    derivation, needed, costs = setting.derivation, set(wanted), []
    made, outputs = [str(operation.outputs[0]) for operation in derivation.base], set(map(str, derivation.outputs))
    # What is handed over to another site is of adapters, and not among these.
    there = made[: max(at for at, name in enumerate(made, start=1) if name in outputs)] if backward else []
    for operation in reversed(derivation.base):
        if operation.outputs[0].name in needed:
            if operation.outputs[0].name in there and not isinstance(operation, Convert):
                continue
            needed.update(map(str, operation.reads))
            costs.append(price_of_model(operation, setting))
    return sum(cost.device_s for cost in costs), sum(cost.host_s for cost in costs)


def update_error(made: Collection[Symbol], setting: Setting, *, stochastic: bool) -> float:
    """The relative error of the update through what is made and rounded; ``stochastic``: merges are rounded so."""
    delta_std, bits = update_std(setting.in_features, setting.rank), setting.dtype.mantissa_bits
    if not setting.derivation.lossy.isdisjoint(made):
        return merge_error(delta_std, bits, stochastic=stochastic)
    return 0.0 if setting.derivation.deltas.isdisjoint(made) else rounding_error(delta_std, bits)
