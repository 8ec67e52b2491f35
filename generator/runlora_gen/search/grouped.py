"""The choice of what is computed together: linears that share their input, and gated MLPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias, TypeVar

from ..cost.passes import Times
from ..cost.price import spares
from ..cost.vector import weighted
from ..request.architecture import Architecture
from ..request.groups import Group, groups, ungrouped
from ..request.layers import Layer, layers
from ..request.mlps import Mlp, mlps
from ..request.workload import Workload
from .candidates import Site
from .choose import Decision
from .ranges import LayerChoice, decide_model, decide_step, winners_of_step

#: Linears that one module computes together.
Together: TypeAlias = Group | Mlp
_Site = TypeVar("_Site", Group, Mlp)
#: What decides on sites of a step.
_Decided: TypeAlias = Callable[[Workload, Sequence[Site], int, int], Sequence[Decision]]


def decide_groups(workload: Workload, architecture: Architecture, rank: int) -> tuple[LayerChoice, ...]:
    """The choice for all that takes no longer together than apart, at all asked token counts: groups, then MLPs.

    It is sought by time, whatever the criterion is of what is chosen then; but an MLP keeps less than its linears do,
    and is taken where memory is the criterion. Of the linears of an MLP there is no group.

    None with ``groups="none"``.

    Raises:
        SpecError: no program of some group meets ``max_saved_bytes``.
    """
    counts = [
        {site for site, _ in decide_groups_of_step(workload, architecture, rank, tokens, winners_of_step)}
        for tokens in workload.tokens
    ]
    whole = [mlp for mlp in _mlps(workload, architecture) if all(mlp in found for found in counts)]
    # Where an MLP pays at some counts, its group did as well as it there.
    together = [
        group
        for group in _candidates(workload, architecture)
        if not any(_is_of(group, mlp) for mlp in whole)
        and all(group in found or any(_is_of(group, mlp) for mlp in found) for found in counts)
    ]
    chosen: tuple[Together, ...] = (*together, *whole)
    if not chosen:
        return ()
    return decide_model(workload, (*chosen, *alone(architecture, chosen)), rank)[: len(chosen)]


def decide_groups_of_step(
    workload: Workload, architecture: Architecture, rank: int, tokens: int, decided: _Decided = decide_step
) -> tuple[tuple[Together, Decision], ...]:
    """What takes no longer together than apart, at one token count, with the decisions: groups, then MLPs.

    ``decided``: what gives these, whole or by the winners alone.

    Raises:
        SpecError: no program of some group meets ``max_saved_bytes``.
    """
    found, whole = _candidates(workload, architecture), _mlps(workload, architecture)
    if not (found or whole):
        return ()
    lone = layers(architecture)
    by_shape = {
        (layer.in_features, layer.out_features): Times.of(decision.chosen.cost)
        for layer, decision in zip(lone, winners_of_step(workload, lone, rank, tokens), strict=True)
    }
    grouped = _paying(workload, architecture, rank, tokens, found, decided, lambda group: _apart(group, by_shape))
    times = {group: Times.of(decision.chosen.cost) + _spared(decision) * -1 for group, decision in grouped.items()}

    def apart(mlp: Mlp) -> Times:
        pair = next((taken for group, taken in times.items() if _is_of(group, mlp)), None)
        return _apart(mlp, by_shape) if pair is None else pair + by_shape[mlp.shapes[-1]]

    together = _paying(workload, architecture, rank, tokens, whole, decided, apart)
    left = {group: d for group, d in grouped.items() if not any(_is_of(group, mlp) for mlp in together)}
    return (*left.items(), *together.items())


def _paying(
    workload: Workload,
    architecture: Architecture,
    rank: int,
    tokens: int,
    found: Sequence[_Site],
    decided: _Decided,
    apart: Callable[[_Site], Times],
) -> dict[_Site, Decision]:
    """Those that take no longer than what ``apart`` says of them, together with what they spare the model.

    Where memory is what counts also an MLP that takes longer: what they spare would be kept, too.
    """
    if not found:
        return {}
    decisions = decided(workload, (*found, *alone(architecture, found)), rank, tokens)[: len(found)]
    paying = {}
    for site, decision in zip(found, decisions, strict=True):
        rivals, share = apart(site) + _spared(decision), decision.host_share
        spares_memory = workload.criterion == "memory" and isinstance(site, Mlp)
        if spares_memory or decision.chosen.cost.weighted_s(share) <= weighted(rivals.device_s, rivals.host_s, share):
            paying[site] = decision
    return paying


def _candidates(workload: Workload, architecture: Architecture) -> tuple[Group, ...]:
    return () if workload.groups == "none" else groups(architecture)


def _mlps(workload: Workload, architecture: Architecture) -> tuple[Mlp, ...]:
    """None where a limit on saved bytes is one of each linear.

    One linear of gate and up has one mask, or one matrix of codes: with dropout, and on such bases, it is left.
    """
    if workload.groups == "none" or workload.max_saved_bytes is not None:
        return ()
    cut = not (workload.dropout or workload.quantized)
    found = [mlp for mlp in mlps(architecture) if cut or not mlp.fused]
    # A file is called by the shapes of its module.
    shapes = [mlp.shapes for mlp in found]
    return tuple(mlp for mlp in found if shapes.count(mlp.shapes) == 1)


def _is_of(group: Together, mlp: Together) -> bool:
    """Whether a group is of gate and up of an MLP."""
    return (
        isinstance(mlp, Mlp)
        and isinstance(group, Group)
        and mlp.shapes[:2] == group.shapes
        and any(names[:2] in group.projections for names in mlp.projections)
    )


def _apart(site: Together, by_shape: Mapping[tuple[int, int], Times]) -> Times:
    """What its linears take where each is computed by itself."""
    return sum((by_shape[shape] for shape in site.held), Times())


def _spared(decision: Decision) -> Times:
    return sum(spares(decision.setting), Times())


def alone(architecture: Architecture, grouped: Sequence[Together]) -> tuple[Layer, ...]:
    """The layers with just the linears that are computed alone."""
    together = {name for group in grouped for names in group.projections for name in names}
    left = ungrouped(architecture, grouped)
    return tuple(
        replace(
            layer,
            count=count,
            projections=tuple(p for p in layer.projections if p not in together) or layer.projections,
        )
        for layer in layers(architecture)
        if (count := left[layer.in_features, layer.out_features])
    )
