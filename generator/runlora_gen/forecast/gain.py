"""What generated modules gain in a whole model: its LoRA linears ours, in PEFT's order, and frozen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..algebra.liveness import saved_activations
from ..cost.passes import Times
from ..cost.peft import price_peft
from ..cost.price import price_frozen
from ..cost.setting import Setting
from ..cost.vector import DEVICE_BOUND, HOST_BOUND, weighted
from ..request.architecture import Architecture, Projection
from ..request.layers import Layer
from ..search.choose import Decision


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
    """One way to run all LoRA linears of a model: times of a step, and bytes kept for the backward."""

    times: Times
    kept_bytes: int

    def time_s(self, host_share: float) -> float:
        """Seconds that count, of a step that the host bounds to this share."""
        return weighted(self.times.device_s, self.times.host_s, host_share)


@dataclass(frozen=True)
class Gain:
    """All LoRA linears of a model in one step, forward and backward.

    Attributes:
        linears: how many there are.
        host_share: what bounds the step, see :func:`~.cost.vector.weighted`.
        frozen: the linears alone, without adapters.
        peft: with adapters, as PEFT runs them.
        ours: as generated modules run them.
        rest: what the model does beside them.
    """

    linears: int
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
    return Keeps(bool(saved & inputs), sum(map(setting.bytes_of, saved - inputs)))


def gain(architecture: Architecture, sites: Sequence[Layer], decisions: Sequence[Decision], rest: Times) -> Gain:
    """Sum up a model.

    Args:
        architecture: the model.
        sites: its layer shapes.
        decisions: what was chosen for each of them, in one step.
        rest: what the model does beside its linears, as :func:`~.ranges.rest_of_step` has it.
    """
    chosen = dict(zip(((site.in_features, site.out_features) for site in sites), decisions, strict=True))
    peft = {shape: price_peft(decision.setting) for shape, decision in chosen.items()}
    frozen = {shape: frozen_times(decision.setting) for shape, decision in chosen.items()}
    ours = {shape: Times(d.chosen.cost.device_s, d.chosen.cost.host_s) for shape, d in chosen.items()}

    def total(times: dict[tuple[int, int], Times]) -> Times:
        return sum((times[site.in_features, site.out_features] * site.count for site in sites), Times())

    size = decisions[0].setting.dtype.bytes
    tokens = decisions[0].setting.tokens
    return Gain(
        linears=sum(site.count for site in sites),
        host_share=decisions[0].host_share,
        frozen=Side(total(frozen), 0),
        peft=Side(
            total({shape: cost.times for shape, cost in peft.items()}),
            kept_bytes(
                architecture.projections, {s: Keeps(c.keeps_input, c.own_bytes) for s, c in peft.items()}, tokens * size
            ),
        ),
        ours=Side(
            total(ours), kept_bytes(architecture.projections, {s: keeps(d) for s, d in chosen.items()}, tokens * size)
        ),
        rest=rest,
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
) -> int:
    """Bytes kept by all linears of a model, an input of several of them once.

    Args:
        projections: the linears.
        by_shape: what one linear of each shape keeps.
        row_bytes: of one feature of an input, of all tokens.
        there: inputs that are kept anyway.
    """
    inputs: dict[tuple[str, int], int] = {}
    own = 0
    for projection in projections:
        kept = by_shape[projection.in_features, projection.out_features]
        own += projection.count * kept.own_bytes
        if kept.input and projection.input not in there:
            key = projection.input, projection.in_features
            inputs[key] = max(inputs.get(key, 0), projection.count)
    return own + sum(count * features * row_bytes for (_, features), count in inputs.items())


def shared_stem(names: Iterable[str]) -> str:
    """Names in short, what they end with written once: ``q,k,v,o_proj``."""
    listed = list(names)
    stems = [name.rpartition("_") for name in listed]
    if len(listed) < 2 or len({end for _, _, end in stems}) > 1 or not all(stem for stem, _, _ in stems):
        return ",".join(listed)
    return f"{','.join(stem for stem, _, _ in stems)}_{stems[0][2]}"
