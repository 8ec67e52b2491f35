"""Lowering: which products of a program our single-product kernels compute instead of torch's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from ..algebra.enumerate import Phase, Program
from ..algebra.operations import Fused, Operation
from ..algebra.table import TWINS, runs
from .price import Setting, elapsed, is_priced, price_operation, wanted_operations


def choices(program: Program, setting: Setting) -> list[tuple[Fused, ...]]:
    """Every set of kernels of ``TWINS`` that can take torch's place in a program, the empty one first.

    Each product is computed in one way wherever the program computes it.
    """
    available = [
        twin
        for plain, twin in TWINS.items()
        if plain in program.operations
        and runs(twin.kernel, dtype=setting.dtype.name, rank=setting.rank)
        and is_priced(twin, setting.dtype, setting.device)
    ]
    return [chosen for count in range(len(available) + 1) for chosen in itertools.combinations(available, count)]


def lowered(program: Program, setting: Setting) -> Program:
    """The program with those kernels for single products that make it fastest in a setting; ties go to torch."""
    best = min(choices(program, setting), key=lambda chosen: (*_time(program, chosen, setting), len(chosen)))
    return with_kernels(program, best)


def _time(program: Program, kernels: tuple[Fused, ...], setting: Setting) -> tuple[float, float]:
    """Seconds of a program, and its seconds on the device, to many digits: the order of a sum is no difference."""
    times = [_phase_time(phase, kernels, setting) for phase in (program.forward, program.backward)]
    return float(f"{sum(time for time, _ in times):.12g}"), float(f"{sum(device for _, device in times):.12g}")


@lru_cache(maxsize=65536)
def _phase_time(phase: Phase, kernels: tuple[Fused, ...], setting: Setting) -> tuple[float, float]:
    twins: dict[Operation, Operation] = {kernel.parts[0]: kernel for kernel in kernels}
    costs = [
        price_operation(twins.get(operation, operation), setting)
        for operation in wanted_operations(phase, setting.gradients)
    ]
    return elapsed(costs, setting), sum(cost.time_s for cost in costs)


def with_kernels(program: Program, kernels: tuple[Fused, ...], *, replacing: bool = False) -> Program:
    """The program with kernels in place of the products that they compute.

    ``replacing``: the kernels are not chosen beside torch's products but all there is, and go into no id.
    """
    return _with_kernels(program, tuple(k for k in kernels if k.parts[0] in program.operations), replacing)


@lru_cache(maxsize=65536)
def _with_kernels(program: Program, kernels: tuple[Fused, ...], replacing: bool) -> Program:
    if not kernels:
        return program
    twins: Mapping[Operation, Operation] = {kernel.parts[0]: kernel for kernel in kernels}
    by_kernel = program.by_kernel if replacing else tuple(symbol for kernel in kernels for symbol in kernel.outputs)
    return Program(_phase(program.forward, twins), _phase(program.backward, twins), by_kernel)


def _phase(phase: Phase, twins: Mapping[Operation, Operation]) -> Phase:
    return _lowered_phase(phase, tuple(sorted(twins.items(), key=lambda pair: pair[0].formula)))


@lru_cache(maxsize=4096)
def _lowered_phase(phase: Phase, twins: tuple[tuple[Operation, Operation], ...]) -> Phase:
    table = dict(twins)
    ways = tuple(replace(way, operations=tuple(table.get(op, op) for op in way.operations)) for way in phase.ways)
    return phase if ways == phase.ways else Phase(phase.goals, phase.keeps, ways)
