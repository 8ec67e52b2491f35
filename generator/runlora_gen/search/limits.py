"""What can't be met, named in one line: limits that no program keeps to, wishes that contradict each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from ..cost.device import device_for, has_kernels
from ..cost.price import price
from ..cost.setting import DTYPES, Setting
from ..request.architecture import Architecture
from ..request.errors import SpecError
from ..request.experts import Experts, experts
from ..request.layers import Layer, layers
from ..request.workload import Workload, check_ranks
from .candidates import enumerated, setting_of
from .criterion import Priced


def check_request(architecture: Architecture, ranks: Sequence[int], workload: Workload) -> None:
    """Refuse what can't be generated, before anything is.

    Raises:
        SpecError: a rank, a device, a launch mode, a rounding or a limit, named in one line.
    """
    check_ranks(ranks, architecture)
    device_for(workload)
    check_merge_rounding(workload)
    check_experts(architecture, workload)
    if workload.float8 != Workload.float8 and not workload.stored.rows:
        raise SpecError(f"--float8: {workload.float8} needs --base fp8: other codes are multiplied in --dtype")
    check_saved_limit(architecture, ranks, workload)


def check_bias(architectures: Iterable[Architecture], workload: Workload) -> None:
    """Refuse to train the biases of linears none of which has one.

    Raises:
        SpecError: naming what such linears may train.
    """
    if workload.bias in ("all", "lora_only") and not any(site.bias for a in architectures for site in a.sites):
        raise SpecError(f"--bias: {workload.bias} needs a linear that has one, and none has; give none or lora_bias")


def check_merge_rounding(workload: Workload) -> None:
    """Refuse stochastic rounding where nothing would be rounded so.

    Raises:
        SpecError: naming what it needs.
    """
    if workload.merge_rounding != "stochastic":
        return
    if workload.dropout:
        needs = "--dropout 0: under dropout nothing is merged while training"
    elif workload.quantized:
        needs = "--base plain: a weight of codes is merged before its one rounding, which is to the nearest"
    elif not workload.allow_lossy_merge:
        needs = "--allow-lossy-merge: without it nothing is merged into 16 bits"
    elif not DTYPES[workload.dtype].half:
        needs = "--dtype bf16 or fp16: fp32 keeps small updates"
    elif not has_kernels(workload):
        needs = "fused kernels: a --device that has them, and no --no-kernels"
    else:
        return
    raise SpecError(f"--merge-rounding: stochastic needs {needs}")


def check_experts(architecture: Architecture, workload: Workload) -> None:
    """Refuse what no module of experts has.

    Raises:
        SpecError: a base of codes.
    """
    if architecture.stacks and workload.quantized:
        raise SpecError(f"--base: {workload.base} is of linears alone, not of experts; give plain")


def check_saved_limit(architecture: Architecture, ranks: Sequence[int], workload: Workload) -> None:
    """Refuse a ``max_saved_bytes`` that some layer can't meet at some rank and token count.

    Raises:
        SpecError: naming the smallest value that all of them can meet.
    """
    if workload.max_saved_bytes is None:
        return

    def least_saved(setting: Setting) -> int:
        # Only what merges nothing: there is always such a variant that keeps as little as any other.
        programs = [p for p in enumerated(workload, setting) if not p.lossy_in_16_bit]
        return min(price(program, setting).saved_bytes for program in programs)

    sites: list[Layer | Experts] = [
        *layers(architecture),
        *experts(architecture.stacks, chained=workload.chains_experts),
    ]
    needs = [
        (least_saved(setting), setting)
        for site, rank, tokens in itertools.product(sites, ranks, workload.tokens)
        for setting in [setting_of(workload, site, rank, tokens)]
    ]
    largest = max(needs, key=lambda need: need[0], default=None)
    if largest is not None and largest[0] > workload.max_saved_bytes:
        raise _infeasible(workload.max_saved_bytes, *largest)


def within(candidates: Sequence[Priced], workload: Workload, setting: Setting) -> list[Priced]:
    """Those that keep to the limit on saved bytes, of which each linear of a group has its share.

    Raises:
        SpecError: there are none; the message names the closest feasible value.
    """
    limit = workload.max_saved_bytes
    if limit is None:
        return list(candidates)
    fitting = [c for c in candidates if c.cost.saved_bytes <= limit * len(setting.derivation.outputs)]
    if not fitting:
        raise _infeasible(limit, min(c.cost.saved_bytes for c in candidates), setting)
    return fitting


def _infeasible(limit: int, least: int, setting: Setting) -> SpecError:
    kind = "experts" if setting.experts else "linear"
    return SpecError(
        f"--max-saved-bytes: no variant of the {setting.in_features}x{setting.out_features} {kind} saves at most "
        f"{limit} bytes at {setting.tokens} tokens; the smallest feasible value is {least}"
    )
