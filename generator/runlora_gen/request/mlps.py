"""Gated MLPs: ``down(activate(gate(x), up(x)))``, read off an architecture. One generated module serves one shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .activations import ACTIVATIONS, Activation
from .architecture import Architecture, Gated, Projection


@dataclass(frozen=True)
class Mlp:
    """All gated MLPs of the same shapes and with the same activation.

    Attributes:
        in_features: I of gate and up.
        intermediate_features: O of these, I of down.
        out_features: O of down.
        activation: between them, a key of :data:`~.activations.ACTIVATIONS`.
        bias: whether any of the linears has one.
        count: how many such MLPs the whole model has.
        projections: the names in the model of gate, up and down, without repeats.
        transposed_weight: names of those whose checkpoint stores the weight as I×O (GPT-2's Conv1D).
        fused: whether gate and up are the halves of one linear, whose name both have then.
    """

    in_features: int
    intermediate_features: int
    out_features: int
    activation: str
    bias: bool
    count: int
    projections: tuple[tuple[str, str, str], ...]
    transposed_weight: tuple[str, ...] = ()
    fused: bool = False

    #: What the linears are called in its module.
    linears: ClassVar[tuple[str, str, str]] = ("gate", "up", "down")
    kind: ClassVar[str] = "mlp"

    @property
    def name(self) -> str:
        """Kind and shape as file names carry them: ``mlp_4096x11008``, the out features only where they differ."""
        out = f"x{self.out_features}" if self.out_features != self.in_features else ""
        return f"{self.kind}_{self.in_features}x{self.intermediate_features}{out}"

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(in_features, out_features) of each linear."""
        wide = self.in_features, self.intermediate_features
        return wide, wide, (self.intermediate_features, self.out_features)

    @property
    def held(self) -> tuple[tuple[int, int], ...]:
        """The same of the linears that the model has."""
        (in_features, between), up, down = self.shapes
        return ((in_features, 2 * between), down) if self.fused else ((in_features, between), up, down)

    @property
    def activated(self) -> Activation:
        """What is between."""
        return ACTIVATIONS[self.activation]

    def has(self, projection: Projection) -> bool:
        """Whether a projection of the architecture that it is of is one of its linears."""
        return any(
            (projection.name, projection.in_features, projection.out_features) == (name, *shape)
            for names in self.projections
            for name, shape in zip(dict.fromkeys(names), self.held, strict=True)
        )

    def reads(self, projection: Projection) -> bool:
        """Whether such a linear reads what it keeps of its input: gate and up do, down's it makes again."""
        return any(projection.name in names[:2] for names in self.projections) and self.has(projection)


def mlps(architecture: Architecture) -> tuple[Mlp, ...]:
    """The distinct gated MLPs of an architecture, in the order in which it names them.

    Left alone are those of which some lack a linear, those that are said to have several activations, and those with
    linears that may as well be of MLPs of other sizes.
    """
    said: dict[tuple[_Linear, _Linear, _Linear], set[str]] = {}
    for gated in architecture.gated:
        for linears in _triples(architecture, gated):
            said.setdefault(linears, set()).add(gated.activation)
    times = Counter(linear for linears in said for linear in dict.fromkeys(linears))
    found: dict[_Key, list[Sequence[Sequence[Projection]]]] = {}
    for linears, activations in said.items():
        activation, *others = activations
        known = not others and activation in ACTIVATIONS and ACTIVATIONS[activation].of_mlps
        members = _members(architecture, linears)
        if known and members and all(times[linear] == 1 for linear in linears):
            (_, in_features, _), _, (_, between, out_features) = linears
            fused = linears[0] == linears[1]
            found.setdefault((in_features, between, out_features, activation, fused), []).append(members)
    return tuple(_mlp(key, rows) for key, rows in found.items())


#: in_features, what is between, out_features, activation; whether gate and up are one linear.
_Key = tuple[int, int, int, str, bool]
#: A name, in_features and out_features: a model may have several such linears, which read other things.
_Linear = tuple[str, int, int]


def _triples(architecture: Architecture, gated: Gated) -> Iterator[tuple[_Linear, _Linear, _Linear]]:
    """Gate, up and down, whose sizes fit."""
    gate, up, down = gated.projections
    shapes: dict[str, dict[tuple[int, int], None]] = {gate: {}, down: {}}  # in order
    for p in architecture.projections:
        shapes.setdefault(p.name, {})[p.in_features, p.out_features] = None
    parts = 2 if gate == up else 1
    for first in shapes[gate]:
        for between, out_features in shapes[down]:
            if parts * between == first[1] and gated.sizes in (None, (first[0], between, out_features)):
                yield (gate, *first), (up, *first), (down, between, out_features)


def _members(architecture: Architecture, linears: tuple[_Linear, _Linear, _Linear]) -> Sequence[Sequence[Projection]]:
    """All gates, ups and downs; empty where they are not as many, or a gate and its up read other things."""
    gates, ups, downs = members = [
        [p for p in architecture.projections if (p.name, p.in_features, p.out_features) == linear] for linear in linears
    ]
    read = [sorted((p.input, p.count) for p in some) for some in (gates, ups)]
    return members if read[0] == read[1] and sum(p.count for p in gates) == sum(p.count for p in downs) else ()


def _mlp(key: _Key, rows: Sequence[Sequence[Sequence[Projection]]]) -> Mlp:
    members = [member for row in rows for some in row for member in some]
    in_features, between, out_features, activation, fused = key
    return Mlp(
        in_features,
        between,
        out_features,
        activation,
        fused=fused,
        bias=any(member.bias for member in members),
        count=sum(gate.count for gates, _, _ in rows for gate in gates),
        projections=tuple(dict.fromkeys((gate[0].name, up[0].name, down[0].name) for gate, up, down in rows)),
        transposed_weight=tuple(dict.fromkeys(m.name for m in members if m.layout == "in_out")),
    )
