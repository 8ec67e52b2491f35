"""What can serve in a setting: the programs of its site that the workload, the device and the sizes leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TypeAlias

from ..algebra.derivation import Derivation, Facts, Way
from ..algebra.enumerate import Phase, Program, enumerate_backwards, enumerate_forwards, enumerate_programs
from ..algebra.experts import experts
from ..algebra.group import group
from ..algebra.linear import LINEAR, lone_linear
from ..algebra.mlp import mlp
from ..algebra.operations import Fused, Symbol
from ..cost.device import device_for
from ..cost.lower import cheaper, lowered, lowered_phase, phase_with_kernels, with_kernels
from ..cost.measured import is_priced
from ..cost.profile import FLOAT8
from ..cost.setting import DTYPES, Setting
from ..cost.vector import DEVICE_BOUND
from ..kernels.sites import alternatives, serves
from ..request.experts import Experts
from ..request.groups import Group
from ..request.layers import Layer
from ..request.mlps import Mlp
from ..request.workload import Workload

#: What a module is generated for.
Site: TypeAlias = Layer | Group | Experts | Mlp


def goals(workload: Workload, derivation: Derivation = LINEAR) -> tuple[str, ...]:
    """The gradients that a module of this workload can give: the bias may always be trained, and so may a router."""
    return tuple(gradient.name for gradient in derivation.gradients if _trains(workload, gradient.name))


def trained(workload: Workload, derivation: Derivation) -> tuple[str, ...]:
    """The same, and those that it leaves to another module."""
    return (*goals(workload, derivation), *(name for name in derivation.left if _trains(workload, name)))


def _trains(workload: Workload, gradient: str) -> bool:
    """Whether a workload wants a gradient."""
    wanted = {"dX": workload.input_grad, "dA": "a" in workload.train, "dB": "b" in workload.train}
    wanted |= {"db": True, "dg": True}
    # What goes into an activation has a projection with an adapter before it.
    wanted |= {"dU": True, "PU": True, "dBU": wanted["dB"]}
    return wanted[gradient.partition("_")[0]]


def setting_of(workload: Workload, site: Site, rank: int, tokens: int) -> Setting:
    """The setting in which a site of this workload is priced."""
    if isinstance(site, Group):
        linears, widths = site.linears, site.out_features
        return _setting(
            workload,
            group(linears, dropout=workload.dropout > 0, base=workload.stored.form),
            site.in_features,
            sum(widths),
            rank,
            site.bias,
            tokens,
            linears,
            widths,
        )
    if isinstance(site, Mlp):
        return _setting(
            workload,
            mlp(dropout=workload.dropout > 0, base=workload.stored.form),
            site.in_features,
            site.out_features,
            rank,
            site.bias,
            tokens,
            site.linears,
            (site.intermediate_features, site.intermediate_features, site.out_features),
            read=site.intermediate_features,
        )
    if isinstance(site, Experts):
        return _setting(
            workload,
            experts(gathers=site.gathers, activated=bool(site.activation), dropout=workload.dropout > 0),
            site.in_features,
            site.out_features,
            rank,
            site.bias,
            tokens,
            routed=(site.experts, site.top_k),
            read=site.read_features,
        )
    return setting_for(workload, site.in_features, site.out_features, rank, site.bias, tokens)


def setting_for(workload: Workload, in_features: int, out_features: int, rank: int, bias: bool, tokens: int) -> Setting:
    """The setting in which a layer shape of this workload is priced; ``bias``: whether its base has one."""
    derivation = lone_linear(dropout=workload.dropout > 0, base=workload.stored.form)
    return _setting(workload, derivation, in_features, out_features, rank, bias, tokens)


@lru_cache(maxsize=65536)
def _setting(
    workload: Workload,
    derivation: Derivation,
    in_features: int,
    out_features: int,
    rank: int,
    bias: bool,
    tokens: int,
    linears: tuple[str, ...] = (),
    widths: tuple[int, ...] = (),
    routed: tuple[int, int] | None = None,
    read: int = 0,
) -> Setting:
    """The setting of a site.

    ``linears``, ``widths``: of a group, of which ``out_features`` is the sum; ``routed``: how many experts there are,
    and how many a token has; ``read``: the width of what they read, if that goes into an activation, or, of the last of
    several linears, comes out of one.
    """
    biased = workload.bias == "lora_bias" or (bias and workload.bias != "none")
    return Setting(
        tokens=tokens,
        in_features=in_features,
        out_features=out_features,
        rank=rank,
        dtype=DTYPES[workload.dtype],
        adapter_dtype=DTYPES[workload.adapter_dtype],
        bias=bias or biased,
        gradients=frozenset(name for name in trained(workload, derivation) if biased or not name.startswith("db")),
        device=device_for(workload),
        derivation=derivation,
        sizes={
            **{f"O_{linear}": width for linear, width in zip(linears, widths, strict=True)},
            **{f"R_{linear}": rank for linear in linears},
            **({f"I_{linears[-1]}": read} if linears and read else {}),
            **({} if routed is None else {"E": routed[0], "N": tokens, "T": tokens * routed[1], "F": read, "RU": rank}),
        },
        keeps_weights=workload.max_saved_bytes is not None,
        compiled=workload.launch == "compile",
        float8=_float8(workload, (in_features, out_features, *widths)),
    )


def enumerated(workload: Workload, setting: Setting) -> tuple[Program, ...]:
    """Every program that can serve, its single products computed by torch."""
    programs = enumerate_programs(
        setting.derivation, goals(workload, setting.derivation), table=rows_for(workload, setting), facts=setting.facts
    )
    if workload.merge_rounding == "stochastic":
        programs = tuple(with_kernels(p, stochastic_for(workload, setting)) for p in programs)
    return programs


def programs_for(workload: Workload, setting: Setting, host_share: float = DEVICE_BOUND) -> tuple[Program, ...]:
    """Every program that can serve, each with those kernels for single products that make it fastest."""
    programs = enumerated(workload, setting)
    return tuple(lowered(p, setting, host_share) for p in programs) if _kernels(workload, setting) else programs


def forwards_for(workload: Workload, setting: Setting, host_share: float = DEVICE_BOUND) -> tuple[Phase, ...]:
    """The same of forwards that keep nothing."""
    phases = enumerate_forwards(setting.derivation, table=rows_for(workload, setting), facts=setting.facts)
    if workload.merge_rounding == "stochastic":
        phases = tuple(phase_with_kernels(phase, stochastic_for(workload, setting)) for phase in phases)
    if _kernels(workload, setting):
        phases = tuple(lowered_phase(phase, setting, host_share) for phase in phases)
    return phases


def paired_phases(workload: Workload, setting: Setting) -> Iterable[tuple[tuple[Phase, ...], tuple[Phase, ...]]]:
    """The forwards and the backwards of all programs, by what is kept: every pair of both is a program.

    Their single products are computed by torch.
    """
    return _paired(
        setting.derivation,
        goals(workload, setting.derivation),
        rows_for(workload, setting),
        setting.facts,
        stochastic_for(workload, setting),
    )


def positions_of(workload: Workload, setting: Setting) -> Mapping[Phase, int]:
    """Where each of those backwards stands among all: they are listed by what is kept."""
    found = enumerate_backwards(
        setting.derivation,
        goals(workload, setting.derivation),
        table=rows_for(workload, setting),
        facts=setting.facts,
    )
    replaced = stochastic_for(workload, setting)
    return {phase_with_kernels(phase, replaced): place for place, phase in enumerate(found)}


def cheaper_for(workload: Workload, setting: Setting, host_share: float) -> tuple[Fused, ...]:
    """The kernels for single products that take torch's place."""
    return cheaper(setting, host_share) if _kernels(workload, setting) else ()


@lru_cache
def _paired(
    derivation: Derivation, goals: tuple[str, ...], table: tuple[Way, ...], facts: Facts, replaced: tuple[Fused, ...]
) -> tuple[tuple[tuple[Phase, ...], tuple[Phase, ...]], ...]:
    backwards: dict[tuple[Symbol, ...], list[Phase]] = {}
    for phase in enumerate_backwards(derivation, goals, table=table, facts=facts):
        backwards.setdefault(phase.saved, []).append(phase_with_kernels(phase, replaced))
    return tuple(
        (
            tuple(
                phase_with_kernels(forward, replaced)
                for forward in enumerate_forwards(derivation, table=table, facts=facts, keeps=kept)
            ),
            tuple(phases),
        )
        for kept, phases in backwards.items()
    )


def rows_for(workload: Workload, setting: Setting) -> tuple[Way, ...]:
    """The rows that can serve.

    With fused kernels where the device has them and the workload allows them, and where they were measured if
    torch's products were. In fp32 only if they were measured: the roofline takes them for as fast as cuBLAS. Not
    where rows of X, W or Y would start off 16 bytes: the kernels run then, but without tensor descriptors, slower
    than torch. Where merges are to round stochastically, none of a site whose merge nothing rounds so, as that of
    experts.
    """
    dtype, kernels = setting.dtype, _kernels(workload, setting)

    def candidate(operation: Fused) -> bool:
        taken = kernels and serves(operation, dtype=dtype.name, rank=setting.rank, dims=setting.dims)
        return taken and is_priced(operation, dtype, setting.device)

    rows = setting.derivation.rows(candidate)
    if workload.merge_rounding == "stochastic" and not stochastic_for(workload, setting):
        return tuple(way for way in rows if setting.derivation.lossy.isdisjoint(way.targets))
    return rows


def multiplies_float8(workload: Workload) -> bool:
    """Whether products of float8 are candidates: wished for, and with a rate on a device that has kernels."""
    device = device_for(workload)
    wished = bool(workload.of_float8) and workload.kernels and DTYPES[workload.dtype].half
    return wished and device.kernels and FLOAT8 in device.flops_per_s


def _float8(workload: Workload, features: Iterable[int]) -> frozenset[str]:
    """The passes whose large product may be of float8: where rows of a byte an element start on 16 of them."""
    aligned = all(size % 16 == 0 for size in features)
    return workload.of_float8 if aligned and multiplies_float8(workload) else frozenset()


def stochastic_for(workload: Workload, setting: Setting) -> tuple[Fused, ...]:
    """What takes the place of merges that round to the nearest."""
    return alternatives(setting.derivation, "stochastic") if workload.merge_rounding == "stochastic" else ()


def _kernels(workload: Workload, setting: Setting) -> bool:
    device, dtype = setting.device, setting.dtype
    aligned = dtype.on_16_bytes(*(size for name, size in setting.dims.items() if name[0] in "IO"))
    measured = dtype.half or bool(device.meter.times_for(dtype.name))
    return workload.kernels and device.kernels and aligned and measured
