"""Gated MLPs: linears gate and up of one input, what is between, and down. One generated module serves one shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .activations import ACTIVATIONS, Activation


@dataclass(frozen=True)
class Mlp:
    """All gated MLPs of the same shapes.

    Attributes:
        in_features: I of gate and up.
        intermediate_features: what these make, and down reads.
        out_features: O of down.
        activation: what is between, a key of :data:`~.activations.ACTIVATIONS`.
        bias: whether any of the linears has a bias.
        count: how many there are in the whole model.
        projections: what gate, up and down are called in the model, without repeats.
        transposed_weight: names of those whose checkpoint stores the weight as I×O.
    """

    in_features: int
    intermediate_features: int
    out_features: int
    activation: str
    bias: bool
    count: int
    projections: tuple[tuple[str, str, str], ...]
    transposed_weight: tuple[str, ...] = ()

    #: What its module calls them.
    linears: ClassVar[tuple[str, str, str]] = ("gate", "up", "down")
    kind: ClassVar[str] = "mlp"

    @property
    def name(self) -> str:
        """Kind and shape as file names carry them: ``mlp_5120x13824``, the third width only where it differs."""
        sizes = [self.in_features, self.intermediate_features]
        sizes += [] if self.out_features == self.in_features else [self.out_features]
        return f"{self.kind}_{'x'.join(map(str, sizes))}"

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(in_features, out_features) of each linear."""
        wide = self.in_features, self.intermediate_features
        return wide, wide, (self.intermediate_features, self.out_features)

    @property
    def activated(self) -> Activation:
        """What is between."""
        return ACTIVATIONS[self.activation]
