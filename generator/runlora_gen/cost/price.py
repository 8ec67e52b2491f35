"""The price of a program: a vector, derived from its operations and from nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import assert_never

from ..algebra.derivation import Derivation
from ..algebra.enumerate import Phase, Program
from ..algebra.kernels import KERNELS
from ..algebra.linear import LINEAR
from ..algebra.operations import (
    Cast,
    Dims,
    Fused,
    Matmul,
    Operation,
    Store,
    SumTokens,
    Symbol,
    dimensions,
    products,
    signature,
)
from ..algebra.schedule import dependents, workspace
from ..algebra.sites import OPERATIONS
from .device import DeviceProfile, distance, on_16_bytes
from .rounding import merge_error, rounding_error, update_std


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True, eq=False)  # a key of many caches: identity is equality, and cheap to hash
class Setting:
    """The circumstances in which a program is priced.

    Attributes:
        tokens, in_features, out_features, rank: T, I, O and R.
        dtype: of activations and weight.
        adapter_dtype: of lora_A, lora_B and their gradients.
        bias: whether the linear has a bias (it is read, not trained).
        gradients: names of the gradients that training needs, of dX, dA, dB, db.
        device: the profile that gives the time.
        derivation: of the site that is computed.
    """

    tokens: int
    in_features: int
    out_features: int
    rank: int
    dtype: DType
    adapter_dtype: DType
    bias: bool
    gradients: frozenset[str]
    device: DeviceProfile
    derivation: Derivation = field(default=LINEAR, repr=False)

    @cached_property
    def dims(self) -> Dims:
        """Concrete dimensions by the names that symbols use."""
        return {"T": self.tokens, "I": self.in_features, "O": self.out_features, "R": self.rank}

    @property
    def casts(self) -> bool:
        """Whether the products read casts of the adapter."""
        return self.adapter_dtype != self.dtype

    def bytes_of(self, symbol: Symbol) -> int:
        """Bytes of a tensor as it is stored."""
        return symbol.numel(self.dims) * self.dtype_of(symbol.store).bytes

    def dtype_of(self, store: Store) -> DType:
        """What elements of a kind are stored as."""
        match store:
            case "act" | "weight":
                return self.dtype
            case "adapter":
                return self.adapter_dtype
            case _:
                assert_never(store)


#: How much of a program's time is the host's: 0 where the whole step of the model waits for the device, 1 where it
#: waits for the host.
DEVICE_BOUND, HOST_BOUND = 0.0, 1.0


def weighted(device_s: float, host_s: float, host_share: float) -> float:
    """Seconds that count, of a step whose bound is the host's to this share."""
    return host_share * host_s + (1 - host_share) * device_s


def rounded(seconds: float) -> float:
    """To 12 digits: the same operations summed in another order differ in the last bits, and that is a tie."""
    return float(f"{seconds:.12g}")


@dataclass(frozen=True)
class PhaseCost:
    """Price of a forward or of a backward: FLOPs, bytes read and written, launches, bytes of temporaries, seconds.

    ``device_s`` and ``host_s`` are what each of the two needs; they work side by side.
    """

    flops: int
    bytes_moved: int
    launches: int
    workspace_bytes: int
    device_s: float
    host_s: float

    def weighted_s(self, host_share: float) -> float:
        """Seconds that count, as :func:`weighted` has them; the last bits, which the order of a sum makes, cut off."""
        return rounded(weighted(self.device_s, self.host_s, host_share))


@dataclass(frozen=True)
class Cost:
    """Price of a program.

    ``saved_bytes`` are kept from the forward to the backward, without the parameters, which live anyway.
    ``update_error`` is the relative error of the adapter's contribution through rounding W-sized intermediates.
    ``host_share`` is that of :func:`weighted`.
    """

    forward: PhaseCost
    backward: PhaseCost
    saved_bytes: int
    update_error: float
    host_share: float = DEVICE_BOUND

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
        """Launches of forward and backward."""
        return self.forward.launches + self.backward.launches

    @property
    def workspace_bytes(self) -> int:
        """Peak of temporaries: forward and backward do not run at once."""
        return max(self.forward.workspace_bytes, self.backward.workspace_bytes)

    @property
    def memory_bytes(self) -> int:
        """Saved bytes and workspace together."""
        return self.saved_bytes + self.workspace_bytes

    @property
    def device_s(self) -> float:
        """Seconds of forward and backward on the device."""
        return self.forward.device_s + self.backward.device_s

    @property
    def host_s(self) -> float:
        """Seconds that the host needs to launch forward and backward eagerly."""
        return self.forward.host_s + self.backward.host_s

    @property
    def time_s(self) -> float:
        """What it adds to a step of the whole model: the device's seconds or the host's, whichever bounds the step."""
        return self.weighted_s(self.host_share)

    def weighted_s(self, host_share: float) -> float:
        """The same under another share."""
        return rounded(weighted(self.device_s, self.host_s, host_share))

    def as_dict(self) -> dict[str, object]:
        """The vector as JSON shows it; times in microseconds."""
        return {
            "flops": {"forward": self.forward.flops, "backward": self.backward.flops},
            "saved_bytes": self.saved_bytes,
            "workspace_bytes": self.workspace_bytes,
            "bytes_moved": self.bytes_moved,
            "launches": self.launches,
            "time_us": round(self.time_s * 1e6, 3),
            "device_us": round(self.device_s * 1e6, 3),
            "host_us": round(self.host_s * 1e6, 3),
            "update_error": float(f"{self.update_error:.4g}"),
        }


@dataclass(frozen=True)
class OperationCost:
    """Price of one operation: FLOPs (2·m·n·k), bytes, launches, seconds on the device and on the host."""

    flops: int
    bytes_moved: int
    launches: int
    device_s: float
    host_s: float


@lru_cache(maxsize=65536)
def price_operation(operation: Operation, setting: Setting) -> OperationCost:
    """Price one operation: by the roofline, corrected by what was measured on the device.

    The correction is the ratio of measured time to roofline: at measured dimensions that gives the measured time;
    between them it is the mean of the logarithms, weighted by 1 / distance⁴ in the logarithms of the dimensions.
    """
    cost = roofline(operation, setting)
    factor = _correction(
        operation, tuple(setting.dims[d] for d in dimensions(operation)), setting.dtype, setting.device
    )
    return replace(cost, device_s=cost.device_s * factor)


def roofline(operation: Operation, setting: Setting) -> OperationCost:
    """Price one operation by max(FLOPs / peak, bytes / bandwidth) + launches.

    Bytes are the fewest possible: every operand is read once and every result written once; an accumulation reads its
    target as well. Launches are calls of the host: a library may split one. The adapter's gradients are written in its
    dtype straight from the sums. A fused kernel needs a profile that has kernels; one that computes its result in tiles
    is busy for whole waves of them, however few the last one has.
    """
    dims, device = setting.dims, setting.device
    moved = sum(setting.bytes_of(symbol) for symbol in (*operation.reads, *operation.outputs))
    launches, flops, host_s, idle = 1, 0, device.host_s, 1.0
    match operation:
        case Fused():
            if device.kernel_host_s is None:
                raise ValueError(f"{device.name} has no fused kernels, so {operation.formula} has no price there")
            for part in operation.parts:
                m, n, k = part.mnk(dims)
                flops += 2 * m * n * k
            launches, host_s = KERNELS[operation.kernel].launches, device.kernel_host_s
            idle = _waves(operation, dims, device)
        case Matmul():
            m, n, k = operation.mnk(dims)
            flops = 2 * m * n * k
            if operation.accumulate:
                moved += setting.bytes_of(operation.out)
            # A result that is wider than its factors is scaled by itself.
            if operation.scaled and operation.out.store == "adapter" and setting.casts:
                moved += 2 * setting.bytes_of(operation.out)
                launches += 1
        case SumTokens() | Cast():
            pass
        case _:
            assert_never(operation)
    if isinstance(operation, Matmul | Fused) and operation.bias is not None and setting.bias:
        moved += setting.bytes_of(operation.bias)
    busy = max(flops / device.flops_per_s[setting.dtype.name] * idle, moved / device.bytes_per_s)
    return OperationCost(flops, moved, launches, busy + launches * device.launch_s, launches * host_s)


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
    if there := [ratio for measured_at, _, ratio in ratios if measured_at == at]:
        return math.exp(statistics.mean(there))  # of several products that stand for one
    aligned = _aligned(operation, at, dtype)
    for measured_at, _, ratio in [row for row in ratios if row[1] == aligned] or ratios:
        apart = distance(measured_at, at)
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
def _ratios(
    operation: Operation, dtype: DType, device: DeviceProfile
) -> tuple[tuple[tuple[int, ...], bool, float], ...]:
    """Where an operation was measured, whether on 16 bytes, and the logarithms of measured time over roofline there.

    A product of torch's that was never measured takes the ratios of those of the same dimensions: the bare roofline
    would flatter it beside them.
    """
    times = device.times_for(dtype.name)
    measured: tuple[Operation, ...] = (operation,)
    if isinstance(operation, Matmul) and measured_as(operation) not in times:
        measured = tuple(
            other
            for other in OPERATIONS
            if isinstance(other, Matmul) and dimensions(other) == dimensions(operation) and signature(other) in times
        )
    names = dimensions(operation)

    def ratio(of: Operation, at: tuple[int, ...], time_s: float) -> float:
        # Measured with everything in one dtype: the ratio holds for an adapter in another one as well.
        return math.log(time_s / roofline(of, setting_at(dict(zip(names, at, strict=True)), dtype, device)).device_s)

    return tuple(
        (at, _aligned(operation, at, dtype), ratio(of, at, time_s))
        for of in measured
        for at, time_s in times.get(measured_as(of), ())
    )


def setting_at(dims: Dims, dtype: DType, device: DeviceProfile) -> Setting:
    """The setting in which operations are measured: everything in one dtype, no bias."""
    tokens, in_features, out_features, rank = (dims.get(dim, 1) for dim in "TIOR")
    return Setting(tokens, in_features, out_features, rank, dtype, dtype, False, frozenset(), device)


@lru_cache(maxsize=65536)
def price_phase(phase: Phase, setting: Setting) -> PhaseCost:
    """Price a forward, or the part of a backward that the wanted gradients need."""
    costs = [price_operation(operation, setting) for operation in wanted_operations(phase, setting.gradients)]
    return PhaseCost(
        flops=sum(cost.flops for cost in costs),
        bytes_moved=sum(cost.bytes_moved for cost in costs),
        launches=sum(cost.launches for cost in costs),
        workspace_bytes=workspace(phase, setting.dims) * setting.dtype.bytes,
        device_s=sum(cost.device_s for cost in costs),
        host_s=sum(cost.host_s for cost in costs),
    )


def price(program: Program, setting: Setting, host_share: float = DEVICE_BOUND) -> Cost:
    """Price a program in a setting."""
    return Cost(
        forward=price_phase(program.forward, setting),
        backward=price_phase(program.backward, setting),
        saved_bytes=sum(map(setting.bytes_of, saved_activations(program, setting.gradients))),
        update_error=_update_error(program, setting),
        host_share=host_share,
    )


def price_frozen(setting: Setting, host_share: float = DEVICE_BOUND) -> float:
    """Seconds of the frozen linear (Y = X Wᵀ + b and dX = dY W): the floor that a LoRA linear is held against."""
    device_s, host_s = _base_times(setting, {setting.derivation.output.name, *setting.gradients})
    return weighted(device_s, host_s, host_share)


def price_frozen_forward(setting: Setting) -> tuple[float, float]:
    """Seconds of device and host of its forward alone."""
    return _base_times(setting, {setting.derivation.output.name})


def _base_times(setting: Setting, wanted: Collection[str]) -> tuple[float, float]:
    """Seconds of device and host of what is wanted of a site without adapters."""
    costs = [price_operation(op, setting) for op in setting.derivation.base if op.outputs[0].name in wanted]
    return sum(cost.device_s for cost in costs), sum(cost.host_s for cost in costs)


@lru_cache(maxsize=65536)
def wanted_operations(phase: Phase, gradients: frozenset[str]) -> tuple[Operation, ...]:
    """The operations of a phase that run when only some of its gradients are wanted; a forward runs whole.

    Of a fused operation with an unwanted result the wanted products run alone.
    """
    if phase.is_forward:
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
def saved_activations(program: Program, gradients: frozenset[str]) -> tuple[Symbol, ...]:
    """Those of the saved symbols that are no parameters, which live anyway."""
    parameters = set(program.saved_inputs) - program.derivation.activations
    return tuple(symbol for symbol in saved_symbols(program, gradients) if symbol not in parameters)


def _update_error(program: Program, setting: Setting) -> float:
    made = program.forward.made | program.backward.made
    delta_std, bits = update_std(setting.in_features, setting.rank), setting.dtype.mantissa_bits
    if made & program.derivation.lossy:
        return merge_error(delta_std, bits, stochastic=program.seeded)
    if made & program.derivation.deltas:
        return rounding_error(delta_std, bits)
    return 0.0
