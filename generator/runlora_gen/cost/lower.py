"""Lowering: which products of a program our single-product kernels compute instead of torch's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from ..algebra.enumerate import Phase, Program, pair, phase_of
from ..algebra.operations import Fused, Operation
from ..kernels.registry import KERNELS
from ..kernels.sites import alternatives, serves
from .measured import is_priced
from .price import phase_times, price_operation
from .setting import Setting
from .vector import DEVICE_BOUND, rounded, weighted


def available(setting: Setting) -> tuple[Fused, ...]:
    """Kernels for single products that may take torch's place in a setting, where they are cheaper."""
    return tuple(
        kernel
        for kernel in alternatives(setting.derivation, "cheaper")
        if serves(kernel, dtype=setting.dtype.name, rank=setting.rank, dims=setting.dims)
        and is_priced(kernel, setting.dtype, setting.device)
    )


def choices(computed: Program | Phase, setting: Setting) -> tuple[tuple[Fused, ...], ...]:
    """Every set of kernels that can take torch's place in a program or a forward, the empty one first.

    Each product is computed in one way wherever the program computes it.
    """
    operations = computed.operations
    return subsets(tuple(kernel for kernel in available(setting) if kernel.parts[0] in operations))


@lru_cache
def subsets(kernels: tuple[Fused, ...]) -> tuple[tuple[Fused, ...], ...]:
    """All subsets, from the empty one to the whole."""
    return tuple(chosen for count in range(len(kernels) + 1) for chosen in itertools.combinations(kernels, count))


def lowered(program: Program, setting: Setting, host_share: float = DEVICE_BOUND) -> Program:
    """The program with those kernels for single products that make it fastest in a setting; ties go to torch."""
    return with_kernels(program, cheaper(setting, host_share))


def lowered_phase(phase: Phase, setting: Setting, host_share: float = DEVICE_BOUND) -> Phase:
    """The same of a forward alone."""
    return phase_with_kernels(phase, cheaper(setting, host_share))


@lru_cache(maxsize=4096)
def cheaper(setting: Setting, host_share: float) -> tuple[Fused, ...]:
    """The kernels for single products that take less time than torch's.

    Times add up, so that what is faster in one program is so in all. Of equal times that is less which takes the device
    less, then the host.
    """

    def key(operation: Operation) -> tuple[float, ...]:
        cost = price_operation(operation, setting)
        times = (weighted(cost.device_s, cost.host_s, host_share), cost.device_s, cost.host_s)
        return tuple(map(rounded, times))

    return tuple(kernel for kernel in available(setting) if key(kernel) < key(kernel.parts[0]))


def phase_time(phase: Phase, kernels: tuple[Fused, ...], setting: Setting) -> tuple[float, float]:
    """Seconds of a phase on the device and on the host, with kernels in place of the products that they compute."""
    times = phase_times(phase, setting, _relevant(phase, kernels))
    return times.device_s, times.host_s


@lru_cache(maxsize=65536)
def _relevant(phase: Phase, kernels: tuple[Fused, ...]) -> tuple[Fused, ...]:
    return tuple(kernel for kernel in kernels if kernel.parts[0] in phase.operations)


def with_kernels(program: Program, kernels: tuple[Fused, ...]) -> Program:
    """The program with kernels in place of the products that they compute.

    Those that are chosen beside torch's products, as the cheaper ones, go into its id.
    """
    return _with_kernels(program, tuple(k for k in kernels if k.parts[0] in program.operations))


@lru_cache(maxsize=65536)
def _with_kernels(program: Program, kernels: tuple[Fused, ...]) -> Program:
    if not kernels:
        return program
    chosen = (kernel for kernel in kernels if KERNELS[kernel.kernel].when == "cheaper")
    by_kernel = (*program.by_kernel, *(symbol for kernel in chosen for symbol in kernel.outputs))
    return pair(phase_with_kernels(program.forward, kernels), phase_with_kernels(program.backward, kernels), by_kernel)


@lru_cache(maxsize=65536)
def phase_with_kernels(phase: Phase, kernels: tuple[Fused, ...]) -> Phase:
    """The phase with kernels in place of the products that they compute."""
    taken: Mapping[Operation, Operation] = {kernel.parts[0]: kernel for kernel in kernels}
    if taken.keys().isdisjoint(phase.operations):
        return phase
    ways = tuple(
        (
            way
            if taken.keys().isdisjoint(way.operations)
            else replace(way, operations=tuple(taken.get(op, op) for op in way.operations))
        )
        for way in phase.ways
    )
    return phase_of(phase.derivation, phase.goals, phase.keeps, ways)
