"""What a profile's measurements say of an operation: the correction of its roofline, and a kernel's best constants."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ..algebra.operations import Contract, Convert, Dims, Fused, Map, Operation, dimensions
from ..algebra.work import kind, work
from ..kernels.registry import KERNELS
from ..kernels.sites import OPERATIONS, WORKS, parted, undropped
from .device import DeviceProfile
from .profile import Size
from .roofline import roofline
from .setting import DType, Setting


@lru_cache(maxsize=65536)
def correction(operation: Operation, at: Size, dtype: DType, device: DeviceProfile) -> float:
    """Measured time over roofline, at some dimensions; 1 if the operation was never measured.

    A kernel of several linears is as efficient as that of one which is as large as all are together.
    Sizes whose rows start off 16 bytes are another class: cuBLAS is up to four times slower there.
    """
    sizes, ratios = _alike(
        _of_one(operation), dtype, meter_of(operation, dtype, device), _aligned(operation, at, dtype)
    )
    at = _together(operation, at)
    if at in sizes.places:  # of several products that stand for one, each has been there
        return math.exp(statistics.mean(ratios[place] for place in sizes.places[at]))
    apart, weights = _apart(sizes, at)
    return math.exp(sum(map(operator.truediv, ratios, apart)) / weights) if apart else 1.0


def is_priced(operation: Operation, dtype: DType, device: DeviceProfile) -> bool:
    """Whether a kernel's price can be held against torch's: both measured, or both from the roofline.

    What is no product takes its kernel's ratio, or the roofline as the kernel does. Of experts products and kernels are
    both from the roofline until one of these products is measured: other tables say nothing of them.
    """
    if isinstance(operation, Fused) and not operation.products:
        return True
    times = meter_of(operation, dtype, device).times_for(dtype.name)
    if not times or measured_as(operation) in times:
        return True
    if not isinstance(operation, Fused) or "E" not in dimensions(operation):
        return False
    return not any(_ratios(part, dtype, device.meter) for part in operation.products)


def is_measured(operation: Operation, dtype: DType, device: DeviceProfile) -> bool:
    """Whether a profile holds times of what an operation does."""
    return measured_as(operation) in meter_of(operation, dtype, device).times_for(dtype.name)


def by_bare_roofline(setting: Setting) -> bool:
    """Whether experts are priced by the roofline alone: no profile holds times of their frozen products."""
    products = _products_of_experts(setting)
    return setting.experts > 0 and not all(is_measured(op, setting.dtype, setting.device) for op in products)


def is_measured_itself(setting: Setting) -> bool:
    """Whether experts are priced by what their device's own profile holds of them."""
    products = _products_of_experts(setting)
    return setting.experts > 0 and all(meter_of(op, setting.dtype, setting.device) is setting.device for op in products)


def _products_of_experts(setting: Setting) -> list[Contract]:
    return [operation for operation in setting.derivation.base if isinstance(operation, Contract)]


def meter_of(operation: Operation, dtype: DType, device: DeviceProfile) -> DeviceProfile:
    """The profile that holds an operation's measurements: what a device has of its own goes before its meter's."""
    done = measured_as(operation)
    known = {done, *_kernels_of(done)}
    return device.meter if known.isdisjoint(device.times_for(dtype.name)) else device


@lru_cache(maxsize=4096)
def _kernels_of(done: str) -> tuple[str, ...]:
    """The work of kernels that do what torch does in some operation, but for products."""
    return tuple(
        work(other)
        for other in OPERATIONS
        if isinstance(other, Fused) and not other.products and done in KERNELS[other.kernel].replaces
    )


def _aligned(operation: Operation, at: Size, dtype: DType) -> bool:
    """Whether the rows of its large matrices start on 16 bytes."""
    features = [size for name, size in zip(dimensions(operation), at, strict=True) if name[0] in "IO"]
    return dtype.on_16_bytes(*features)


def measured_as(operation: Operation) -> str:
    """The work under which a profile holds an operation's times."""
    one = _of_one(operation)
    if isinstance(one, Fused) and (other := KERNELS[one.kernel].priced_as) is not None:
        one = replace(one, kernel=other)
    return work(one)


@lru_cache(maxsize=4096)
def _of_one(operation: Operation) -> Operation:
    """The products of one linear, of a kernel that another one is measured for; else the operation itself.

    Of a kernel of several steps that also drops, that other's steps.
    """
    if not isinstance(operation, Fused) or (other := KERNELS[operation.kernel].priced_as) is None:
        return operation
    own, _ = parted(operation)
    if KERNELS[operation.kernel].drops:
        own = undropped(own)
        if any(isinstance(part, Map) for part in own.parts):
            return replace(own, kernel=other)
    made = (part for part in reversed(own.products) if part.out not in own.inner)
    first = {kind(part): part for part in made}
    return replace(operation, parts=tuple(first.values())[::-1], inner=())


def _together(operation: Operation, at: Size) -> Size:
    """The size of that linear if it is as large as all are together."""
    one = _of_one(operation)
    if one == operation:
        return at
    names = dimensions(operation)
    if names == dimensions(one):
        return at
    return tuple(
        sum(size for name, size in zip(names, at, strict=True) if name[0] == dim[0]) for dim in dimensions(one)
    )


@lru_cache(maxsize=4096)
def _ratios(operation: Operation, dtype: DType, device: DeviceProfile) -> tuple[tuple[Size, bool, float], ...]:
    """Where an operation was measured, whether on 16 bytes, and the logarithms of measured time over roofline there.

    A product of torch's that was never measured takes the ratios of those of the same dimensions: the bare roofline
    would flatter it beside them. So with what else a kernel of ours does as well, and was measured at.
    """
    times = device.times_for(dtype.name)
    measured: tuple[Operation, ...] = (operation,)
    if isinstance(operation, Convert) and measured_as(operation) not in times:
        measured = tuple(WORKS[done] for done in _kernels_of(work(operation)))
    if isinstance(operation, Contract) and measured_as(operation) not in times:
        measured = tuple(
            other
            for other in OPERATIONS
            if isinstance(other, Contract) and _kinds(other) == _kinds(operation) and work(other) in times
        )

    return tuple(
        (at, _aligned(operation, at, dtype), ratio)
        for of in measured
        for at, ratio in _own_ratios(of if isinstance(of, Fused) else WORKS.get(work(of), of), dtype, device)
    )


@lru_cache(maxsize=4096)
def _own_ratios(operation: Operation, dtype: DType, device: DeviceProfile) -> tuple[tuple[Size, float], ...]:
    """Those of an operation that was measured; products of torch's share them with all that do the same work."""

    def ratio(at: Size, time_s: float) -> float:
        # Measured with everything in one dtype: the ratio holds for an adapter in another one as well.
        dims = dict(zip(dimensions(operation), at, strict=True))
        return math.log(time_s / roofline(operation, setting_at(dims, dtype, device)).device_s)

    times = device.times_for(dtype.name).get(measured_as(operation), ())
    return tuple((at, ratio(at, time_s)) for at, time_s in times)


@dataclass(frozen=True, eq=False)  # made once by ``_sizes``: identity is equality, and cheap to hash
class _Sizes:
    """Sizes at which operations were measured: most operations of the same dimensions share them."""

    sizes: tuple[Size, ...]

    @cached_property
    def logarithms(self) -> Sequence[Sequence[float]]:
        """Of their dimensions."""
        return list(map(_logarithms, self.sizes))

    @cached_property
    def places(self) -> Mapping[Size, list[int]]:
        """Where among them each is."""
        places: dict[Size, list[int]] = {}
        for place, size in enumerate(self.sizes):
            places.setdefault(size, []).append(place)
        return places


_sizes = lru_cache(maxsize=4096)(_Sizes)


@lru_cache(maxsize=65536)
def _apart(sizes: _Sizes, at: Size) -> tuple[Sequence[float], float]:
    """How far each is from another size, to the fourth power, and the sum of the weights that follow from it."""
    here = _logarithms(at)
    apart = [math.dist(there, here) ** 4 for there in sizes.logarithms]
    return apart, sum(1 / far for far in apart)


@lru_cache(maxsize=4096)
def _alike(
    operation: Operation, dtype: DType, device: DeviceProfile, aligned: bool
) -> tuple[_Sizes, tuple[float, ...]]:
    """The ratios of an operation where its rows start on 16 bytes, or where they do not; all if there are none."""
    ratios = _ratios(operation, dtype, device)
    alike = [row for row in ratios if row[1] == aligned] or ratios
    return _sizes(tuple(at for at, _, _ in alike)), tuple(ratio for _, _, ratio in alike)


def _kinds(operation: Operation) -> tuple[str, ...]:
    """Its dimensions, those of a group's linears as those of one."""
    return tuple(dim[0] for dim in dimensions(operation))


def setting_at(dims: Dims, dtype: DType, device: DeviceProfile) -> Setting:
    """The setting in which operations are measured: everything in one dtype, no bias."""
    tokens, in_features, out_features, rank = (dims.get(dim, 1) for dim in "TIOR")
    return Setting(tokens, in_features, out_features, rank, dtype, dtype, False, frozenset(), device, sizes=dims)


def tuned_constants(operation: Fused, setting: Setting) -> Mapping[str, int] | None:
    """What to replace of a kernel's constants: the best at the nearest size where it was tuned; None if never.

    Those of what stands in for it are the best for it as well, unless it has its own.
    """
    if isinstance(operation, Fused):
        kernel = KERNELS[operation.kernel]
        if kernel.priced_as is not None and kernel.tiles != KERNELS[kernel.priced_as].tiles:
            return None
    at = _together(operation, tuple(setting.dims[d] for d in dimensions(operation)))
    meter = meter_of(operation, setting.dtype, setting.device)
    tuned = meter.tiles_for(setting.dtype.name).get(measured_as(operation), ())
    return min(tuned, key=lambda row: (distance(row[0], at), row[0]))[1] if tuned else None


def distance(first: Size, second: Size) -> float:
    """How far apart two sizes are: the Euclidean distance of the logarithms (base 2) of their dimensions."""
    return math.dist(_logarithms(first), _logarithms(second))


@lru_cache(maxsize=65536)
def _logarithms(size: Size) -> tuple[float, ...]:
    return tuple(map(math.log2, size))
