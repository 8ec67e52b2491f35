"""How frozen weights are stored: a new way is a row here, with its form in the algebra and a class in the templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

#: What the algebra knows of a base: weights in the activations' dtype; codes that name an element of a table, two to a
#: byte, with a scale for each of their blocks; or numbers of 8 bits, with a scale for each block of rows and columns:
#: whole ones, or of float8.
Form = Literal["plain", "codes", "scaled", "float8"]


@dataclass(frozen=True)
class Base:
    """A way in which frozen weights are stored.

    Attributes:
        name: as ``--base`` and ``Workload`` call it.
        form: of the derivation that modules for it are made from.
        kind: what generated code calls it: bases of one kind are read by the same code.
        title: how its weights are stored, as documents and docstrings say it.
        bits: of an element and its share of the scales.
        takes: the linears that hold such weights, as docstrings say it.
        forwards: by these of their classes they are known.
        layer: PEFT's class for adapters on them, below ``peft.tuners.lora``.
        codes: torch's dtype of numbers of 8 bits.
        rows: whether they are of float8 and every row has one scale, so that products of float8 may read them.
    """

    name: str
    form: Form
    kind: str
    title: str
    bits: float
    takes: str = ""
    forwards: tuple[str, ...] = ()
    layer: str = ""
    codes: str = ""
    rows: bool = False


_OF_BITSANDBYTES = "bitsandbytes.nn.modules."
_LINEAR_4_BIT = ("a ``Linear4bit`` of bitsandbytes", (f"{_OF_BITSANDBYTES}Linear4bit.forward",), "bnb.Linear4bit")
_LINEAR_8_BIT = ("a ``Linear8bitLt`` of bitsandbytes", (f"{_OF_BITSANDBYTES}Linear8bitLt.forward",), "bnb.Linear8bitLt")
_FP8_LINEAR = "transformers.integrations.finegrained_fp8.FP8Linear.forward"
_FBGEMM = "transformers.integrations.fbgemm_fp8.FbgemmFp8Linear.forward"
_E4M3 = "torch.float8_e4m3fn"

#: All of them. Scales of 4 bits are those of bitsandbytes' default blocks of 64 in float32.
BASES: Mapping[str, Base] = {
    base.name: base
    for base in (
        Base("plain", "plain", "plain", "as it is", 16),
        Base("nf4", "codes", "4 bits", "4 bits by bitsandbytes", 4.5, *_LINEAR_4_BIT),
        Base("fp4", "codes", "4 bits", "4 bits by bitsandbytes", 4.5, *_LINEAR_4_BIT),
        Base("int8", "scaled", "int8", "8 bits by bitsandbytes", 8, *_LINEAR_8_BIT, "torch.int8"),
        Base(
            "fp8",
            "float8",
            "fp8",
            "float8_e4m3fn, with a scale for each row or one for all",
            8,
            "an ``FP8Linear`` without blocks or an ``FbgemmFp8Linear`` of Transformers",
            (_FP8_LINEAR, _FBGEMM),
            "layer.Linear",
            _E4M3,
            rows=True,
        ),
        Base(
            "fp8-block",
            "float8",
            "fp8-block",
            "float8_e4m3fn, with a scale for each block",
            8,
            "an ``FP8Linear`` of Transformers",
            (_FP8_LINEAR,),
            "layer.Linear",
            _E4M3,
        ),
    )
}
#: The base of a class of linears, by its forward. FP8Linear, which is of two, is the later where it has blocks.
BY_FORWARD: Mapping[str, Base] = {forward: base for base in BASES.values() for forward in base.forwards}
