"""Layers: the projections of an architecture, grouped by shape. One generated module serves one layer."""

from __future__ import annotations

from dataclasses import dataclass

from .architecture import Architecture


@dataclass(frozen=True)
class Layer:
    """All projections of one shape.

    Attributes:
        in_features, out_features: I and O.
        bias: whether any of them has a bias.
        count: how many such linears the whole model has.
        projections: their names, in the order of the architecture, without repeats.
        transposed_weight: names of those whose checkpoint stores the weight as I×O (GPT-2's Conv1D).
    """

    in_features: int
    out_features: int
    bias: bool
    count: int
    projections: tuple[str, ...]
    transposed_weight: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The shape as file names carry it."""
        return f"{self.in_features}x{self.out_features}"


def layers(architecture: Architecture) -> tuple[Layer, ...]:
    """The distinct shapes of an architecture, in the order in which its projections first use them."""
    groups: dict[tuple[int, int], list[int]] = {}
    for position, projection in enumerate(architecture.projections):
        groups.setdefault((projection.in_features, projection.out_features), []).append(position)
    result = []
    for (in_features, out_features), positions in groups.items():
        members = [architecture.projections[position] for position in positions]
        result.append(
            Layer(
                in_features=in_features,
                out_features=out_features,
                bias=any(member.bias for member in members),
                count=sum(member.count for member in members),
                projections=tuple(dict.fromkeys(member.name for member in members)),
                transposed_weight=tuple(dict.fromkeys(m.name for m in members if m.layout == "in_out")),
            )
        )
    return tuple(result)
