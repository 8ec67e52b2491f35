"""The circumstances in which a program is priced."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import assert_never

from ..algebra.derivation import Derivation
from ..algebra.linear import LINEAR
from ..algebra.operations import Dims, Store, Symbol
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
        dtype: of activations and weight.
        adapter_dtype: of lora_A, lora_B and their gradients.
        bias: whether the linear has a bias (it is read, not trained).
        gradients: names of the gradients that training needs, of dX, dA, dB, db.
        device: the profile that gives the time.
        derivation: of the site that is computed.
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

    @cached_property
    def dims(self) -> Dims:
        """Concrete dimensions by the names that symbols use."""
        return {"T": self.tokens, "I": self.in_features, "O": self.out_features, "R": self.rank}

    @property
    def casts(self) -> bool:
        """Whether the products read casts of the adapter."""
        return self.adapter_dtype != self.dtype

    def bytes_of(self, symbol: Symbol) -> int:
        """Bytes of a tensor as it is stored."""
        return symbol.numel(self.dims) * self.dtype_of(symbol.store).bytes

    def dtype_of(self, store: Store) -> DType:
        """What elements of a kind are stored as."""
        match store:
            case "act" | "weight":
                return self.dtype
            case "adapter":
                return self.adapter_dtype
            case _:
                assert_never(store)
