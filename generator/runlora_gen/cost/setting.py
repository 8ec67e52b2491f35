"""The circumstances in which a program is priced."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import assert_never

from ..algebra.derivation import CAST_ADAPTER, FLOAT8_BACKWARD, FLOAT8_FORWARD, KEEPS_WEIGHTS, Derivation, Facts
from ..algebra.linear import LINEAR
from ..algebra.operations import BITS, Dims, Store, Symbol
from .device import DeviceProfile


@dataclass(frozen=True, eq=False)
class DType:
    """A floating dtype: its size and its precision."""

    name: str
    bytes: int
    mantissa_bits: int

    @property
    def half(self) -> bool:
        """Whether it has 16 bits, so that a merged weight drops small updates."""
        return self.bytes == 2

    def on_16_bytes(self, *lengths: int) -> bool:
        """Whether contiguous rows of these lengths start on 16 bytes, as cuBLAS and tensor descriptors want them."""
        return all(length * self.bytes % 16 == 0 for length in lengths)


DTYPES = {dtype.name: dtype for dtype in (DType("bf16", 2, 7), DType("fp16", 2, 10), DType("fp32", 4, 23))}


@dataclass(frozen=True, eq=False)  # a key of many caches: identity is equality, and cheap to hash
class Setting:
    """The circumstances in which a program is priced.

    Attributes:
        tokens, in_features, out_features, rank: T, I, O and R.
            Of a group ``out_features`` is the sum, ``rank`` that of each linear.
        dtype: of activations and weight.
        adapter_dtype: of lora_A, lora_B and their gradients.
        bias: whether the linear has a bias.
        gradients: names of the gradients that training needs, of dX, dA, dB, db; also of those that another site's
            function makes.
        device: the profile that gives the time.
        derivation: of the site that is computed.
        sizes: of indices that this site has beside T, I, O and R, or in their place.
        keeps_weights: whether weights that are made of codes may be kept for the backward.
        compiled: whether torch.compile runs the step: it fuses the model's own passes.
        float8: of ``forward`` and ``backward`` those whose large product may be of float8.
    """

    tokens: int
    in_features: int
    out_features: int
    rank: int
    dtype: DType
    adapter_dtype: DType
    bias: bool
    gradients: frozenset[str]
    device: DeviceProfile
    derivation: Derivation = field(default=LINEAR, repr=False)
    sizes: Dims = field(default_factory=dict, repr=False)
    keeps_weights: bool = False
    compiled: bool = False
    float8: frozenset[str] = frozenset()

    @cached_property
    def dims(self) -> Dims:
        """Concrete dimensions by the names that symbols use."""
        return {"T": self.tokens, "I": self.in_features, "O": self.out_features, "R": self.rank, **self.sizes}

    @property
    def experts(self) -> int:
        """How many experts share the rows; 0 of linears."""
        return self.sizes.get("E", 0)

    @cached_property
    def _bytes(self) -> dict[Symbol, int]:
        """Those that were asked for: each is, of every program."""
        return {}

    @property
    def casts(self) -> bool:
        """Whether the products read casts of the adapter."""
        return self.adapter_dtype != self.dtype

    @cached_property
    def casts_together(self) -> tuple[Symbol, ...]:
        """Casts that a forward makes in one launch: those of the adapters of several linears."""
        casts = tuple(self.derivation.casts) if self.casts and not self.experts else ()
        return casts if len(casts) > 2 else ()

    @cached_property
    def in_evaluation(self) -> Setting:
        """The same where nothing is trained: nothing is dropped there."""
        evaluated = self.derivation.evaluated
        return self if evaluated is None else replace(self, derivation=evaluated)

    @cached_property
    def facts(self) -> Facts:
        """What is so here, of what conditions in the derivation may ask."""
        holding = {
            CAST_ADAPTER: self.casts,
            KEEPS_WEIGHTS: self.keeps_weights,
            FLOAT8_FORWARD: "forward" in self.float8,
            FLOAT8_BACKWARD: "backward" in self.float8,
        }
        return frozenset(fact for fact, holds in holding.items() if holds) & self.derivation.facts

    def bytes_of(self, symbol: Symbol) -> int:
        """Bytes of a tensor as it is stored."""
        size = self._bytes.get(symbol)
        if size is None:
            size = self._bytes[symbol] = math.ceil(symbol.numel(self.dims) * self.bits_of(symbol.store) / 8)
        return size

    def bits_of(self, store: Store) -> int:
        """Bits of an element as it is stored."""
        match store:
            case "act" | "weight":
                return 8 * self.dtype.bytes
            case "adapter":
                return 8 * self.adapter_dtype.bytes
            case "acc32" | "byte" | "bit" | "code" | "code8" | "seed":
                return BITS[store]
            case _:
                assert_never(store)
