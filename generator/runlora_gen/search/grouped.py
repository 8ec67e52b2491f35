"""The choice of groups: which linears that share their input are computed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from .ranges import LayerChoice, decide_model, decide_step

#: An activation's gradient is added to another by reading both and writing the sum.
_PASSES_OF_A_SUM = 3


def decide_groups(workload: Workload, architecture: Architecture, rank: int) -> tuple[LayerChoice, ...]:
    """The choice for every group that takes no longer than its linears one by one, at all asked token counts.

    It is sought by time, whatever the criterion is of what is chosen then.

    None with ``groups="none"``, and none with dropout, for which no group has ways.

    Raises:
        SpecError: no program of some group meets ``max_saved_bytes``.
    """
    found = () if workload.groups == "none" or workload.dropout else groups(architecture)
    if not found:
        return ()
    kept = [True] * len(found)
    for tokens in workload.tokens:
        paying = _paying(workload, architecture, found, rank, tokens)
        kept = [both and pays for both, pays in zip(kept, paying, strict=True)]
    chosen = [group for group, pays in zip(found, kept, strict=True) if pays]
    if not chosen:
        return ()
    return decide_model(workload, (*chosen, *_alone(architecture, chosen)), rank)[: len(chosen)]


def _paying(
    workload: Workload, architecture: Architecture, found: Sequence[Group], rank: int, tokens: int
) -> list[bool]:
    """Of each group whether it takes no longer than its linears one by one, at one token count."""
    lone = layers(architecture)
    by_shape = {
        (layer.in_features, layer.out_features): decision
        for layer, decision in zip(lone, decide_step(workload, lone, rank, tokens), strict=True)
    }
    sites: tuple[Site, ...] = (*found, *_alone(architecture, found))
    decisions = decide_step(workload, sites, rank, tokens)[: len(found)]
    pays = []
    for group, decision in zip(found, decisions, strict=True):
        apart, share = one_by_one(group, by_shape, decision.setting), decision.host_share
        pays.append(decision.chosen.cost.weighted_s(share) <= weighted(apart.device_s, apart.host_s, share))
    return pays


def one_by_one(group: Group, by_shape: Mapping[tuple[int, int], Decision], setting: Setting) -> Times:
    """What the linears of a group take where each is computed by itself, and autograd sums their gradients."""
    costs = [by_shape[group.in_features, width].chosen.cost for width in group.out_features]
    times = sum((Times(cost.device_s, cost.host_s) for cost in costs), Times())
    if "dX" not in setting.gradients:
        return times
    gradient = setting.bytes_of(setting.derivation["dX"])
    return times + price_passes([_PASSES_OF_A_SUM * gradient] * (len(group.linears) - 1), setting.device)


def _alone(architecture: Architecture, grouped: Sequence[Group]) -> tuple[Layer, ...]:
    """The layers with just the linears that are in none of these groups."""
    left = ungrouped(architecture, grouped)
    counted = (replace(layer, count=left[layer.in_features, layer.out_features]) for layer in layers(architecture))
    return tuple(layer for layer in counted if layer.count)
