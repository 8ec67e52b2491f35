"""The choice of groups: which linears that share their input are computed together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..cost.passes import Times, price_passes
from ..cost.setting import Setting
from ..cost.vector import weighted
from ..request.architecture import Architecture
from ..request.groups import Group, groups, ungrouped
from ..request.layers import Layer, layers
from ..request.workload import Workload
from .candidates import Site
from .choose import Decision
from .ranges import LayerChoice, decide_model, decide_step, winners_of_step

#: An activation's gradient is added to another by reading both and writing the sum.
_PASSES_OF_A_SUM = 3


def decide_groups(workload: Workload, architecture: Architecture, rank: int) -> tuple[LayerChoice, ...]:
    """The choice for every group that takes no longer than its linears one by one, at all asked token counts.

    It is sought by time, whatever the criterion is of what is chosen then.

    None with ``groups="none"``.

    Raises:
        SpecError: no program of some group meets ``max_saved_bytes``.
    """
    found = _candidates(workload, architecture)
    chosen = list(found)
    for tokens in workload.tokens:
        paying = {group for group, _ in decide_groups_of_step(workload, architecture, rank, tokens, winners_of_step)}
        chosen = [group for group in chosen if group in paying]
    if not chosen:
        return ()
    return decide_model(workload, (*chosen, *alone(architecture, chosen)), rank)[: len(chosen)]


def decide_groups_of_step(
    workload: Workload,
    architecture: Architecture,
    rank: int,
    tokens: int,
    decided: Callable[[Workload, Sequence[Site], int, int], Sequence[Decision]] = decide_step,
) -> tuple[tuple[Group, Decision], ...]:
    """The groups that take no longer than their linears one by one, at one token count, with their decisions.

    ``decided``: what gives these, whole or by the winners alone.

    Raises:
        SpecError: no program of some group meets ``max_saved_bytes``.
    """
    found = _candidates(workload, architecture)
    if not found:
        return ()
    lone = layers(architecture)
    by_shape = {
        (layer.in_features, layer.out_features): decision
        for layer, decision in zip(lone, winners_of_step(workload, lone, rank, tokens), strict=True)
    }
    sites: tuple[Site, ...] = (*found, *alone(architecture, found))
    decisions = decided(workload, sites, rank, tokens)[: len(found)]
    paying = []
    for group, decision in zip(found, decisions, strict=True):
        apart, share = _one_by_one(group, by_shape, decision.setting), decision.host_share
        if decision.chosen.cost.weighted_s(share) <= weighted(apart.device_s, apart.host_s, share):
            paying.append((group, decision))
    return tuple(paying)


def _candidates(workload: Workload, architecture: Architecture) -> tuple[Group, ...]:
    return () if workload.groups == "none" else groups(architecture)


def _one_by_one(group: Group, by_shape: Mapping[tuple[int, int], Decision], setting: Setting) -> Times:
    """What the linears of a group take where each is computed by itself, and autograd sums their gradients."""
    costs = (by_shape[group.in_features, width].chosen.cost for width in group.out_features)
    return sum(map(Times.of, costs), sums_by_autograd(setting))


def sums_by_autograd(setting: Setting) -> Times:
    """What autograd takes to add up the gradients of an input, of whose linears each has its own."""
    if "dX" not in setting.gradients:
        return Times()
    count = len(setting.derivation.outputs) - 1
    return price_passes([_PASSES_OF_A_SUM * setting.bytes_of(setting.derivation["dX"])] * count, setting.device)


def alone(architecture: Architecture, grouped: Sequence[Group]) -> tuple[Layer, ...]:
    """The layers with just the linears that are in none of these groups."""
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
