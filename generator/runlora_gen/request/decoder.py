"""Decoders: what a model is beside its linears, for those families whose layers are built as Llama's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .architecture import Projection


@dataclass(frozen=True)
class Router:
    """What chooses experts by the softmax of a linear, and weighs them.

    Attributes:
        normed: whether the weights of a token's experts are divided by their sum.
        float32: whether they stay in float32; else they are cast to the activations' dtype.
    """

    normed: bool
    float32: bool


@dataclass(frozen=True)
class Decoder:
    """A decoder of pre-norm layers: RMSNorm, rotary attention, RMSNorm, a gated MLP; residual sums; a last RMSNorm.

    Attributes:
        layers: how many.
        hidden, intermediate: features of the residual stream, and within the MLP, or within each expert.
        heads, kv_heads, head_dim: of the attention.
        head_norms: whether queries and keys are normed by heads.
        vocab: size of the vocabulary, or None if the config doesn't say.
        tied: whether the head's weight is the embedding's.
        projections: all linears of the layers, also those without LoRA.
        router: of a mixture of experts, which are in the MLP's place in all layers.
        post_norms: whether what the attention and the MLP give is normed, too, before the residual sums.
        wide_norms: whether norms multiply by 1 + weight, in float32, as Gemma's.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    head_norms: bool
    vocab: int | None
    tied: bool
    projections: tuple[Projection, ...]
    router: Router | None = None
    post_norms: bool = False
    wide_norms: bool = False

    @property
    def norms(self) -> int:
        """How many of the residual stream's width a layer has."""
        return 4 if self.post_norms else 2
