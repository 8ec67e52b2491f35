"""What generated modules gain in a whole model: its LoRA linears and experts ours, in PEFT's order, and frozen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..algebra.liveness import saved_activations
from ..algebra.operations import Contract, Fused
from ..cost.passes import Times
from ..cost.peft import price_peft
from ..cost.price import price_frozen, spares
from ..cost.setting import Setting
from ..cost.vector import DEVICE_BOUND, HOST_BOUND, weighted
from ..kernels.registry import KERNELS
from ..request.architecture import Architecture, Projection
from ..request.experts import Experts
from ..request.groups import ungrouped
from ..request.layers import Layer
from ..search.choose import Decision
from ..search.grouped import Together


@dataclass(frozen=True)
class Keeps:
    """What a linear keeps from its forward to its backward, without parameters.

    Attributes:
        input: whether it keeps X itself, which linears that read the same X share.
        own_bytes: of what is its own.
    """

    input: bool
    own_bytes: int


@dataclass(frozen=True)
class Side:
    """One way to run all LoRA linears and experts of a model: times of a step, and bytes kept for the backward."""

    times: Times
    kept_bytes: int

    def time_s(self, host_share: float) -> float:
        """Seconds that count, of a step that the host bounds to this share."""
        return weighted(self.times.device_s, self.times.host_s, host_share)

    def __add__(self, other: Side) -> Side:
        return Side(self.times + other.times, self.kept_bytes + other.kept_bytes)

    def __mul__(self, count: int) -> Side:
        return Side(self.times * count, self.kept_bytes * count)


@dataclass(frozen=True)
class _Sides:
    """The three ways side by side."""

    frozen: Side
    peft: Side
    ours: Side

    def __add__(self, other: _Sides) -> _Sides:
        return _Sides(self.frozen + other.frozen, self.peft + other.peft, self.ours + other.ours)

    def __mul__(self, count: int) -> _Sides:
        return _Sides(self.frozen * count, self.peft * count, self.ours * count)


@dataclass(frozen=True)
class Gain:
    """All LoRA linears and stacks of experts of a model in one step, forward and backward.

    Attributes:
        linears, stacks: how many there are.
        host_share: what bounds the step, see :func:`~.cost.vector.weighted`.
        frozen: they alone, without adapters.
        peft: with adapters, as PEFT runs them.
        ours: as generated modules run them.
        rest: what the model does beside them.
    """

    linears: int
    stacks: int
    host_share: float
    frozen: Side
    peft: Side
    ours: Side
    rest: Times

    @property
    def step(self) -> Times:
        """The whole step with generated modules."""
        return self.ours.times + self.rest


def keeps(decision: Decision) -> Keeps:
    """What a generated module keeps."""
    setting = decision.setting
    saved = frozenset(saved_activations(decision.chosen.program, setting.gradients))
    inputs = setting.derivation.activations
    # What an MLP makes of gate and up the model keeps anyway.
    there = {op.out for op in setting.derivation.base if isinstance(op, Contract)}
    return Keeps(bool(saved & inputs), sum(map(setting.bytes_of, saved - inputs - there)))


def spending(decision: Decision) -> Fused | None:
    """The kernel that makes what is between an MLP's linears in its backward, in the place of what was kept."""
    fused = (op for op in decision.chosen.program.backward.operations if isinstance(op, Fused))
    return next((op for op in fused if KERNELS[op.kernel].spends), None)


def gain(
    architecture: Architecture,
    sites: Sequence[Layer],
    decisions: Sequence[Decision],
    rest: Times,
    grouped: Sequence[tuple[Together, Decision]] = (),
    stacked: Sequence[tuple[Experts, Decision]] = (),
) -> Gain:
    """Sum up a model of linears, of experts, or of both.

    Args:
        architecture: the model.
        sites: its layer shapes.
        decisions: what was chosen for each of them, in one step.
        rest: what the model does beside these, as :func:`~.ranges.rest_of_step` has it; of groups and of MLPs
            we do a part of it: the sums of their inputs' gradients, what is between gate, up and down.
        grouped: the linears that are computed together.
        stacked: the stacks of experts, with what was chosen for them in the same step.
    """
    chosen = dict(zip(((site.in_features, site.out_features) for site in sites), decisions, strict=True))
    peft = {shape: price_peft(decision.setting) for shape, decision in chosen.items()}
    frozen = {shape: frozen_times(decision.setting) for shape, decision in chosen.items()}
    left = ungrouped(architecture, [group for group, _ in grouped])
    ours = sum((Times.of(decision.chosen.cost) * left[shape] for shape, decision in chosen.items()), Times())
    for group, decision in grouped:
        ours += (Times.of(decision.chosen.cost) + sum(spares(decision.setting), Times()) * -1) * group.count

    def total(times: dict[tuple[int, int], Times]) -> Times:
        return sum((times[site.in_features, site.out_features] * site.count for site in sites), Times())

    one = (*decisions, *(decision for _, decision in stacked))[0]
    row = one.setting.tokens * one.setting.dtype.bytes
    experts = [_of_experts(decision) * stack.count for stack, decision in stacked]
    linears = (
        Side(total(frozen), 0),
        Side(
            total({shape: cost.times for shape, cost in peft.items()}),
            kept_bytes(architecture.projections, {s: Keeps(c.keeps_input, c.own_bytes) for s, c in peft.items()}, row),
        ),
        Side(
            ours,
            kept_bytes(
                architecture.projections,
                {s: keeps(d) for s, d in chosen.items()},
                row,
                grouped=[(group, keeps(decision)) for group, decision in grouped],
            ),
        ),
    )
    sides = sum(experts, _Sides(*linears))
    return Gain(
        linears=sum(site.count for site in sites),
        stacks=sum(stack.count for stack, _ in stacked),
        host_share=one.host_share,
        frozen=sides.frozen,
        peft=sides.peft,
        ours=sides.ours,
        rest=rest,
    )


def _of_experts(decision: Decision) -> _Sides:
    """One stack of experts in the three ways.

    Whoever combines rows keeps them for the gradient of the router's weights, but for what we chose; and what goes into
    an activation.
    """
    setting, symbols = decision.setting, decision.setting.derivation.symbols
    rows = setting.bytes_of(symbols["Yr"]) if "dg" in setting.gradients else 0
    rows += setting.bytes_of(symbols["U"]) if "U" in symbols else 0
    peft = price_peft(setting)
    return _Sides(
        Side(frozen_times(setting), rows),
        Side(peft.times, peft.own_bytes + rows),
        Side(Times.of(decision.chosen.cost), decision.chosen.cost.saved_bytes),
    )


def frozen_times(setting: Setting) -> Times:
    """Of the linear without an adapter."""
    return Times(price_frozen(setting, DEVICE_BOUND), price_frozen(setting, HOST_BOUND))


def kept_bytes(
    projections: Sequence[Projection],
    by_shape: dict[tuple[int, int], Keeps],
    row_bytes: int,
    *,
    there: frozenset[str] = frozenset(),
    grouped: Sequence[tuple[Together, Keeps]] = (),
) -> int:
    """Bytes kept by all linears of a model, an input of several of them once.

    Args:
        projections: the linears.
        by_shape: what one linear of each shape keeps.
        row_bytes: of one feature of an input, of all tokens.
        there: inputs that are kept anyway.
        grouped: what groups keep of those of the linears that are computed together.
    """
    inputs: dict[tuple[str, int], int] = {}
    together: dict[tuple[str, int, int], Keeps] = {}
    own = 0
    for group, kept in grouped:
        members = {
            (p.name, p.in_features, p.out_features): Keeps(kept.input and group.reads(p), 0)
            for p in projections
            if group.has(p)
        }
        together |= members
        own += group.count * kept.own_bytes
    for projection in projections:
        key = projection.name, projection.in_features, projection.out_features
        kept = together.get(key) or by_shape[projection.in_features, projection.out_features]
        own += projection.count * kept.own_bytes
        if kept.input and projection.input not in there:
            read = projection.input, projection.in_features
            inputs[read] = max(inputs.get(read, 0), projection.count)
    return own + sum(count * features * row_bytes for (_, features), count in inputs.items())


def shared_stem(names: Iterable[str]) -> str:
    """Names in short, what they end with written once: ``q,k,v,o_proj``."""
    listed = list(names)
    stems = [name.rpartition("_") for name in listed]
    if len(listed) < 2 or len({end for _, _, end in stems}) > 1 or not all(stem for stem, _, _ in stems):
        return ",".join(listed)
    return f"{','.join(stem for stem, _, _ in stems)}_{stems[0][2]}"
