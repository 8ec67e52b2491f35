"""The price of a program: a vector, derived from its operations and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ..algebra.enumerate import Phase, Program
from ..algebra.operations import (
    SYMBOLS,
    Dims,
    Fused,
    Matmul,
    Operation,
    Symbol,
    dimensions,
    parse,
    products,
    signature,
)
from ..algebra.schedule import dependents, schedule
from ..algebra.table import KERNELS, PARAMETERS
from .device import DeviceProfile, distance, on_16_bytes
from .rounding import merge_error, rounding_error, update_std


@dataclass(frozen=True)
class DType:
    """A floating dtype: its size and its precision."""

    name: str
    bytes: int
    mantissa_bits: int

    @property
    def half(self) -> bool:
        """Whether it has 16 bits, so that a merged weight drops small updates."""
        return self.bytes == 2


DTYPES = {dtype.name: dtype for dtype in (DType("bf16", 2, 7), DType("fp16", 2, 10), DType("fp32", 4, 23))}


@dataclass(frozen=True)
class Setting:
    """The circumstances in which a program is priced.

    Attributes:
        tokens, in_features, out_features, rank: T, I, O and R.
        dtype: of activations, weight and adapter alike.
        bias: whether the linear has a bias (it is read, not trained).
        gradients: names of the gradients that training needs, of dX, dA, dB, db.
        device: the profile that gives the time.
        launch: ``eager`` (the host may be what takes longest) or ``graph`` (captured once, replayed by the device).
    """

    tokens: int
    in_features: int
    out_features: int
    rank: int
    dtype: DType
    bias: bool
    gradients: frozenset[str]
    device: DeviceProfile
    launch: str = "eager"

    @property
    def dims(self) -> Dims:
        """Concrete dimensions by the names that symbols use."""
        return {"T": self.tokens, "I": self.in_features, "O": self.out_features, "R": self.rank}


@dataclass(frozen=True)
class PhaseCost:
    """Price of a forward or of a backward: FLOPs, bytes read and written, launches, bytes of temporaries, seconds.

    ``time_s`` is the larger of what host and device need, ``device_s`` the device's alone.
    """

    flops: int
    bytes_moved: int
    launches: int
    workspace_bytes: int
    time_s: float
    device_s: float


@dataclass(frozen=True)
class Cost:
    """Price of a program.

    ``saved_bytes`` are kept from the forward to the backward, without the parameters, which live anyway.
    ``update_error`` is the relative error of the adapter's contribution through rounding W-sized intermediates.
    """

    forward: PhaseCost
    backward: PhaseCost
    saved_bytes: int
    update_error: float

    @property
    def flops(self) -> int:
        """FLOPs of forward and backward."""
        return self.forward.flops + self.backward.flops

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written in forward and backward."""
        return self.forward.bytes_moved + self.backward.bytes_moved

    @property
    def launches(self) -> int:
        """Kernel launches of forward and backward."""
        return self.forward.launches + self.backward.launches

    @property
    def workspace_bytes(self) -> int:
        """Peak of temporaries: the larger of both phases."""
        return max(self.forward.workspace_bytes, self.backward.workspace_bytes)

    @property
    def memory_bytes(self) -> int:
        """What the criterion ``memory`` minimises: saved bytes and workspace together."""
        return self.saved_bytes + self.workspace_bytes

    @property
    def time_s(self) -> float:
        """Seconds of forward and backward."""
        return self.forward.time_s + self.backward.time_s

    @property
    def device_s(self) -> float:
        """Seconds of forward and backward on the device alone."""
        return self.forward.device_s + self.backward.device_s

    def as_dict(self) -> dict[str, object]:
        """The vector as JSON shows it; times in microseconds."""
        return {
            "flops": {"forward": self.forward.flops, "backward": self.backward.flops},
            "saved_bytes": self.saved_bytes,
            "workspace_bytes": self.workspace_bytes,
            "bytes_moved": self.bytes_moved,
            "launches": self.launches,
            "time_us": round(self.time_s * 1e6, 3),
            "update_error": float(f"{self.update_error:.4g}"),
        }


@dataclass(frozen=True)
class OperationCost:
    """Price of one operation: FLOPs (2·m·n·k), bytes, launches, seconds on the device and on the host."""

    flops: int
    bytes_moved: int
    launches: int
    time_s: float
    host_s: float


@lru_cache(maxsize=65536)
def price_operation(operation: Operation, setting: Setting) -> OperationCost:
    """Price one operation: by the roofline, corrected by what was measured on the device.

    The correction is the ratio of measured time to roofline: at measured dimensions that gives the measured time;
    between them it is the mean of the logarithms, weighted by 1 / distance⁴ in the logarithms of the dimensions.
    """
    cost = roofline(operation, setting.dims, setting.dtype, setting.device, bias=setting.bias)
    factor = _correction(
        operation, tuple(setting.dims[d] for d in dimensions(operation)), setting.dtype, setting.device
    )
    return replace(cost, time_s=cost.time_s * factor)


def roofline(operation: Operation, dims: Dims, dtype: DType, device: DeviceProfile, *, bias: bool) -> OperationCost:
    """Price one operation by max(FLOPs / peak, bytes / bandwidth) + launches.

    Every operand is read once and every result written once; an accumulation reads its target as well. A product added
    to a matrix (M = W + s B A) is two kernels in torch, a copy of the addend and an accumulation into it. A fused
    kernel reads and writes each of its tensors once, and needs a profile that has kernels; one that computes its result
    in tiles is busy for whole waves of them, however few the last one has.
    """
    elements = sum(symbol.numel(dims) for symbol in (*operation.reads, *operation.outputs))
    launches, flops, host_s, idle = 1, 0, device.host_s, 1.0
    if isinstance(operation, Fused):
        if device.kernel_host_s is None:
            raise ValueError(f"{device.name} has no fused kernels, so {operation.formula} has no price there")
        for part in operation.parts:
            m, n, k = part.mnk(dims)
            flops += 2 * m * n * k
        if operation.bias is not None and bias:
            elements += operation.bias.numel(dims)
        launches, host_s = KERNELS[operation.kernel].launches, device.kernel_host_s
        idle = _waves(operation, dims, device)
    if isinstance(operation, Matmul):
        m, n, k = operation.mnk(dims)
        flops = 2 * m * n * k
        if operation.accumulate:
            elements += operation.out.numel(dims)
        if operation.bias is not None and bias:
            elements += operation.bias.numel(dims)
        if operation.addend is not None:
            elements += 2 * operation.out.numel(dims)
            launches += 1
    busy = max(flops / device.flops_per_s[dtype.name] * idle, elements * dtype.bytes / device.bytes_per_s)
    return OperationCost(flops, elements * dtype.bytes, launches, busy + launches * device.launch_s, launches * host_s)


def _waves(operation: Fused, dims: Dims, device: DeviceProfile) -> float:
    """The waves of tiles that a kernel computes its result in, over the part of a wave that would do."""
    tiles = KERNELS[operation.kernel].tiles
    if device.multiprocessors is None or not {"BM", "BN", "PARTS"} <= tiles.keys():
        return 1.0
    rows, columns, _ = operation.parts[0].mnk(dims)
    # The last wave's tiles are cut into parts.
    count = math.ceil(rows / tiles["BM"]) * math.ceil(columns / (tiles["BN"] // tiles["PARTS"]))
    return math.ceil(count / device.multiprocessors) * device.multiprocessors / count


@lru_cache(maxsize=65536)
def _correction(operation: Operation, at: tuple[int, ...], dtype: DType, device: DeviceProfile) -> float:
    """Measured time over roofline, at some dimensions; 1 if the operation was never measured.

    Sizes whose rows start off 16 bytes are another class: cuBLAS is up to four times slower there.
    """
    total = weights = 0.0
    ratios = _ratios(operation, dtype, device.meter)
    aligned = _aligned(operation, at, dtype)
    for measured_at, ratio in [row for row in ratios if _aligned(operation, row[0], dtype) == aligned] or ratios:
        apart = distance(measured_at, at)
        if apart == 0:
            return math.exp(ratio)
        total, weights = total + ratio / apart**4, weights + 1 / apart**4
    return math.exp(total / weights) if weights else 1.0


def is_priced(operation: Operation, dtype: DType, device: DeviceProfile) -> bool:
    """Whether a kernel's price can be held against torch's: both measured, or both from the roofline."""
    measured = device.meter.times_for(dtype.name)
    return not measured or measured_as(operation) in measured


def _aligned(operation: Operation, at: tuple[int, ...], dtype: DType) -> bool:
    """Whether the rows of its large matrices start on 16 bytes."""
    features = [size for name, size in zip(dimensions(operation), at, strict=True) if name in "IO"]
    return on_16_bytes(dtype.bytes, *features)


def measured_as(operation: Operation) -> str:
    """The signature under which a profile holds an operation's times."""
    if isinstance(operation, Fused) and (stand_in := KERNELS[operation.kernel].priced_as) is not None:
        return signature(replace(operation, kernel=stand_in))
    return signature(operation)


@lru_cache(maxsize=4096)
def _ratios(operation: Operation, dtype: DType, device: DeviceProfile) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Where an operation was measured, with the logarithms of measured time over roofline there."""
    measured = device.times_for(dtype.name).get(measured_as(operation), ())
    names = dimensions(operation)
    return tuple(
        (
            at,
            math.log(time_s / roofline(operation, dict(zip(names, at, strict=True)), dtype, device, bias=False).time_s),
        )
        for at, time_s in measured
    )


@lru_cache(maxsize=65536)
def price_phase(phase: Phase, setting: Setting) -> PhaseCost:
    """Price a forward, or the part of a backward that the wanted gradients need."""
    costs = [price_operation(operation, setting) for operation in wanted_operations(phase, setting.gradients)]
    return PhaseCost(
        flops=sum(cost.flops for cost in costs),
        bytes_moved=sum(cost.bytes_moved for cost in costs),
        launches=sum(cost.launches for cost in costs),
        workspace_bytes=_workspace(phase, setting.tokens, setting.in_features, setting.out_features, setting.rank)
        * setting.dtype.bytes,
        time_s=elapsed(costs, setting),
        device_s=sum(cost.time_s for cost in costs),
    )


def elapsed(costs: Sequence[OperationCost], setting: Setting) -> float:
    """Seconds of a phase within a longer run: eager, host and device work side by side, and the slower counts."""
    device_s, host_s = sum(cost.time_s for cost in costs), sum(cost.host_s for cost in costs)
    return max(device_s, host_s) if setting.launch == "eager" else device_s


def price(program: Program, setting: Setting) -> Cost:
    """Price a program in a setting."""
    return Cost(
        forward=price_phase(program.forward, setting),
        backward=price_phase(program.backward, setting),
        saved_bytes=sum(
            symbol.numel(setting.dims) * setting.dtype.bytes
            for symbol in saved_symbols(program, setting.gradients)
            if symbol not in PARAMETERS
        ),
        update_error=_update_error(program, setting),
    )


def price_frozen(setting: Setting) -> float:
    """Seconds of the frozen linear (Y = X Wᵀ + b and dX = dY W): the floor that a LoRA linear is held against."""
    formulas = ["Y = X @ W.T + b"] + (["dX = dY @ W"] if "dX" in setting.gradients else [])
    return sum(elapsed([price_operation(parse(formula), setting)], setting) for formula in formulas)


def wanted_operations(phase: Phase, gradients: Collection[str]) -> tuple[Operation, ...]:
    """The operations of a phase that run when only some of its gradients are wanted; a forward runs whole.

    Of a fused operation with an unwanted result the wanted products run alone.
    """
    if SYMBOLS["Y"] in phase.goals:
        return phase.operations
    needed_by = dependents(phase)

    def wanted(operation: Operation) -> bool:
        return all(any(goal.name in gradients for goal in needed_by[out]) for out in operation.outputs)

    running: list[Operation] = []
    for operation in phase.operations:
        running += [operation] if wanted(operation) else filter(wanted, products(operation))
    return tuple(running)


def saved_symbols(program: Program, gradients: Collection[str]) -> tuple[Symbol, ...]:
    """What the forward hands to the backward when these gradients are wanted: inputs, then kept intermediates."""
    needed_by = dependents(program.backward)
    return tuple(
        symbol
        for symbol in (*program.saved_inputs, *program.kept)
        if any(goal.name in gradients for goal in needed_by[symbol])
    )


@lru_cache(maxsize=65536)
def _workspace(phase: Phase, tokens: int, in_features: int, out_features: int, rank: int) -> int:
    return schedule(phase, {"T": tokens, "I": in_features, "O": out_features, "R": rank}).workspace


def _update_error(program: Program, setting: Setting) -> float:
    made = {symbol for phase in (program.forward, program.backward) for way in phase.ways for symbol in way.targets}
    delta_std, bits = update_std(setting.in_features, setting.rank), setting.dtype.mantissa_bits
    if SYMBOLS["M"] in made:
        return merge_error(delta_std, bits, stochastic=program.seeded)
    if SYMBOLS["D"] in made:
        return rounding_error(delta_std, bits)
    return 0.0
