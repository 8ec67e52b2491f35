"""Gated MLPs: ``down(activate(gate(x), up(x)))``, read off an architecture. One generated module serves one shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .activations import ACTIVATIONS
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
    """

    in_features: int
    intermediate_features: int
    out_features: int
    activation: str
    bias: bool
    count: int
    projections: tuple[tuple[str, str, str], ...]
    transposed_weight: tuple[str, ...] = ()

    #: What the linears are called in its module.
    linears: ClassVar[tuple[str, str, str]] = ("gate", "up", "down")
    kind: ClassVar[str] = "mlp"

    @property
    def name(self) -> str:
        """Kind and shape as file names carry them: ``mlp_4096x11008``, the out features only where they differ."""
        out = f"x{self.out_features}" if self.out_features != self.in_features else ""
        return f"{self.kind}_{self.in_features}x{self.intermediate_features}{out}"


def mlps(architecture: Architecture) -> tuple[Mlp, ...]:
    """The distinct gated MLPs of an architecture, in the order in which it names them.

    Left alone are those of which some lack a linear, and those that are said to have several activations.
    """
    said: dict[tuple[tuple[str, str, str], tuple[int, int, int]], set[str]] = {}
    for gated in architecture.gated:
        for sizes in _sizes(architecture, gated):
            said.setdefault((gated.projections, sizes), set()).add(gated.activation)
    found: dict[tuple[int, int, int, str], list[tuple[tuple[str, str, str], Sequence[Projection]]]] = {}
    for (names, sizes), activations in said.items():
        members = _members(architecture, names, sizes)
        activation, *others = activations
        if members and not others and activation in ACTIVATIONS and ACTIVATIONS[activation].of_mlps:
            found.setdefault((*sizes, activation), []).append((names, members))
    return tuple(_mlp(key, rows) for key, rows in found.items())


def _sizes(architecture: Architecture, gated: Gated) -> Iterator[tuple[int, int, int]]:
    """Those that linears of these names have that fit."""
    gate, _, down = gated.projections
    for first in architecture.projections:
        for last in architecture.projections:
            if (first.name, last.name, last.in_features) == (gate, down, first.out_features):
                sizes = first.in_features, first.out_features, last.out_features
                if gated.sizes in (None, sizes):
                    yield sizes


def _members(
    architecture: Architecture, names: tuple[str, str, str], sizes: tuple[int, int, int]
) -> Sequence[Projection]:
    """The linears of such MLPs, those of gates first; empty where they are not as many of each, or read other things.

    A model may have several of one name and shape, which read other things: where MLPs are of several kinds.
    """
    width, between, out = sizes
    shapes = ((width, between), (width, between), (between, out))
    gates, ups, downs = (
        [p for p in architecture.projections if (p.name, p.in_features, p.out_features) == (name, *shape)]
        for name, shape in zip(names, shapes, strict=True)
    )
    read = [sorted((p.input, p.count) for p in some) for some in (gates, ups)]
    fit = read[0] == read[1] and sum(p.count for p in gates) == sum(p.count for p in downs)
    return [*gates, *ups, *downs] if fit else []


def _mlp(key: tuple[int, int, int, str], rows: Sequence[tuple[tuple[str, str, str], Sequence[Projection]]]) -> Mlp:
    members = [member for _, row in rows for member in row]
    return Mlp(
        *key,
        bias=any(member.bias for member in members),
        count=sum(member.count for names, row in rows for member in row if member.name == names[0]),
        projections=tuple(dict.fromkeys(names for names, _ in rows)),
        transposed_weight=tuple(dict.fromkeys(m.name for m in members if m.layout == "in_out")),
    )
