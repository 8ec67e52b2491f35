"""Decoders: what a model is beside its linears, for those families whose layers are built as Llama's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .architecture import Projection


@dataclass(frozen=True)
class Decoder:
    """A decoder of pre-norm layers: RMSNorm, rotary attention, RMSNorm, a gated MLP; residual sums; a last RMSNorm.

    Attributes:
        layers: how many.
        hidden, intermediate: features of the residual stream, and within the MLP.
        heads, kv_heads, head_dim: of the attention.
        head_norms: whether queries and keys are normed by heads.
        vocab: size of the vocabulary, or None if the config doesn't say.
        tied: whether the head's weight is the embedding's.
        projections: all linears of the layers, also those without LoRA.
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
