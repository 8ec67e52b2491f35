"""The workload: what to generate for beside the architecture. Validated once, here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .architecture import LIVE, Architecture, slug
from .bases import BASES, Base
from .errors import SpecError, nearest, shorten
from .experts import MAX_EXPERTS, MAX_TOP_K

#: The dtypes that layers are generated for.
DTYPE_NAMES = ("bf16", "fp16", "fp32")
#: Torch's names of them.
DTYPE_ALIASES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
TORCH_NAMES = {name: alias for alias, name in DTYPE_ALIASES.items()}
#: What fields with names allow.
CHOICES = {
    "criterion": ("time", "flops", "memory"),
    "merge_rounding": ("nearest", "stochastic"),
    "launch": ("eager", "compile", "graph"),
    "groups": ("auto", "none"),
    "norms": ("auto", "none"),
    "rotary": ("auto", "none"),
    "bias": ("none", "all", "lora_only", "lora_bias"),
    "base": tuple(BASES),
    "float8": ("both", "forward", "none"),
}
MAX_BYTES = 2**50
#: Above this, byte counts of a layer leave 64 bits; no training step is near it.
MAX_TOKENS = 2**31


@dataclass(frozen=True)
class Workload:
    """How the layers are trained.

    Attributes:
        tokens: token counts (batch × sequence) for which the choice is made, ascending.
        dtype: of activations and weight, ``bf16``, ``fp16`` or ``fp32``: informs the choice; generated modules run in
            any of these and in float64.
        adapter_dtype: of the adapter: ``fp32``, or the same as ``dtype``; the default of generated layers.
        train: which factors train, of ``a`` and ``b``.
        input_grad: whether the input needs a gradient (not in a first layer).
        criterion: ``time``, ``flops`` or ``memory``.
        max_saved_bytes: limit on what one linear keeps from forward to backward, or None.
        allow_lossy_merge: allow merging into 16-bit weights, which drops small updates.
        merge_rounding: how a merged 16-bit weight is rounded: ``nearest``, or ``stochastic``, with the right mean.
        device: name or path of the device profile.
        launch: ``eager``; ``compile`` for training under torch.compile, whose launches cost the host less; or
            ``graph`` for training under CUDA graphs, where the host costs nothing.
        kernels: allow fused Triton kernels where the device has them.
        target_modules: the projections that were asked for; empty for all.
        target_parameters: the stacks of experts that were asked for, by their parameters' names; empty for those that
            have an adapter. With these and no ``target_modules`` there are no projections.
        model_type: the model type that the config was read as by request, or None.
        groups: ``auto`` for modules of linears that share their input, where they are priced no higher than the lone
            ones; ``none`` for lone linears alone. With dropout there are none.
        norms: ``auto`` for RMSNorms of 16 bits that keep their input as it is, where a model has frozen ones; ``none``
            to leave them as they are.
        rotary: ``auto`` for rotary embeddings of 16 bits that are made in one kernel, where there are kernels; ``none``
            to leave them as they are.
        bias: which biases train, in PEFT's words: ``none``; ``all`` or ``lora_only``, of the linears that have one; or
            ``lora_bias``, of an adapter on every linear. It is priced: modules give the gradient in any case.
        dropout: the probability with which the adapter's input is dropped while training, from 0 up to but not 1. Above
            0 the modules take it as an argument, whatever it is then.
        base: how the frozen weights are stored: ``plain``, in ``dtype``; ``nf4`` or ``fp4``, quantized to 4 bits by
            bitsandbytes, ``int8``, to 8 bits by bitsandbytes; ``fp8``, in float8_e4m3fn with a scale for each row, or
            ``fp8-block``, with one for each block. All are computed with in ``dtype``.
        float8: with the base ``fp8`` on a GPU that multiplies float8, which of a linear's large products may be of it:
            ``both``, that of the ``forward`` alone, or ``none``. Their inputs are rounded to it, row by row.
        memory_budget: bytes that a training step of the whole model may take at the largest of ``tokens``, with
            weights, adapters and their gradients, and without the optimizer; or None. By it a package says which layers
            keep what (see ``forecast.plan``).
        sequence: tokens of a sequence there, by which attention is priced; None where a step is one sequence.
    """

    tokens: tuple[int, ...] = (4096,)
    dtype: str = "bf16"
    adapter_dtype: str = "fp32"
    train: tuple[str, ...] = ("a", "b")
    input_grad: bool = True
    criterion: str = "time"
    max_saved_bytes: int | None = None
    allow_lossy_merge: bool = False
    merge_rounding: str = "nearest"
    device: str = "h100"
    launch: str = "eager"
    kernels: bool = True
    target_modules: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    model_type: str | None = None
    groups: str = "auto"
    norms: str = "auto"
    rotary: str = "auto"
    bias: str = "none"
    dropout: float = 0.0
    base: str = "plain"
    float8: str = "both"
    memory_budget: int | None = None
    sequence: int | None = None

    @property
    def quantized(self) -> bool:
        """Whether the frozen weights are codes, of which a weight is made wherever it is read."""
        return self.base != "plain"

    @property
    def of_float8(self) -> frozenset[str]:
        """The passes, of ``forward`` and ``backward``, whose large product may be of float8."""
        wanted = {"both": ("forward", "backward"), "forward": ("forward",), "none": ()}[self.float8]
        return frozenset(wanted if self.stored.rows else ())

    @property
    def chains_experts(self) -> bool:
        """Whether the first projection of experts may leave the gradients of its B to the last one.

        Not where it would have none to give itself.
        """
        return self.input_grad or "a" in self.train

    @property
    def stored(self) -> Base:
        """What is known of the base."""
        return BASES[self.base]


def parse_counts(option: str, values: Iterable[str], *, maximum: int, kilo: bool = False) -> tuple[int, ...]:
    """Whole numbers from repeated options and comma lists, ascending and without repeats.

    Args:
        option: what errors call it.
        values: texts such as ``"8,16"``.
        maximum: the largest number allowed.
        kilo: take ``4k`` as 4096, too.

    Raises:
        SpecError: an element is no whole number from 1 to ``maximum``, or there is none.
    """
    allowed = f"give whole numbers from 1 to {maximum}" + (", or such as 4k for 4096" if kilo else "")
    counts = set()
    for text in (part.strip() for value in values for part in value.split(",")):
        digits, unit = (text[:-1], 1024) if kilo and text[-1:] in ("k", "K") else (text, 1)
        if not digits.isascii() or not digits.isdigit() or len(digits) > 18 or not 1 <= int(digits) * unit <= maximum:
            raise SpecError(f"{option}: {shorten(text)} is not allowed; {allowed}")
        counts.add(int(digits) * unit)
    if not counts:
        raise SpecError(f"{option}: no value given; {allowed}")
    return tuple(sorted(counts))


def parse_bytes(option: str, value: object, *, maximum: int = MAX_BYTES) -> int:
    """Bytes, from a number, or a text with a unit: ``38GiB``, ``38 GB``.

    Raises:
        SpecError: it is neither, or not from 1 to ``maximum``.
    """
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?(?:([KMGT])(i?)B|B)?", str(value).strip(), re.ASCII | re.I)
    if found is not None and not isinstance(value, bool | float):
        power = 0 if found[2] is None else "KMGT".index(found[2].upper()) + 1
        number = int(float(found[1]) * 1000**power) if power and not found[3] else int(float(found[1]) * 1024**power)
        if 1 <= number <= maximum and (power or "." not in found[1]):
            return number
    raise SpecError(f"{option}: {shorten(value)} is not allowed; give bytes, or such as 38GiB")


def parse_names(values: Iterable[str]) -> tuple[str, ...]:
    """Names from repeated options and comma lists."""
    return tuple(name.strip() for value in values for name in value.split(","))


def parse_targets(values: Iterable[str]) -> tuple[str, ...]:
    """Names of projections from repeated options and comma lists; empty for all, which PEFT calls ``all-linear``."""
    names = parse_names(values)
    return () if [name.lower() for name in names] == ["all-linear"] else names


def parse_dtype(option: str, value: str) -> str:
    """One of ``DTYPE_NAMES`` from that or from torch's name of it, such as ``bfloat16``.

    Raises:
        SpecError: anything else.
    """
    name = DTYPE_ALIASES.get(value, value)
    if name not in DTYPE_NAMES:
        allowed = ", ".join((*DTYPE_NAMES, *DTYPE_ALIASES))
        raise SpecError(f"{option}: {shorten(value)} is not allowed; give one of {allowed}")
    return name


def parse_name(option: str, value: str) -> str:
    """What a package is called, as in Python: ``My-Llama`` is ``my_llama``.

    Raises:
        SpecError: it is no name: letters, digits, ``_``, ``-`` and ``.``, after a letter; 64 at most; no keyword.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]{0,63}", value) or slug(value) != re.sub(
        "[^a-z0-9]+", "_", value.lower()
    ):
        raise SpecError(
            f"{option}: {shorten(value)} is not allowed; give up to 64 letters, digits, _, - and ., the first a letter "
            "and the last none of the marks, and no keyword of Python"
        )
    return slug(value)


def parse_shapes(option: str, values: Iterable[str]) -> tuple[tuple[int, int], ...]:
    """Shapes ``in_features x out_features`` from repeated options and comma lists, each once.

    Raises:
        SpecError: an element is not of the form 4096x11008, or a side is not from 1 to 2^20.
    """
    shapes = []
    for text in (part.strip() for value in values for part in value.split(",")):
        sides = text.split("x")
        if len(sides) != 2 or not all(
            s.isascii() and s.isdigit() and len(s) < 8 and 1 <= int(s) <= 2**20 for s in sides
        ):
            raise SpecError(f"{option}: {shorten(text)} is not allowed; give shapes in x out such as 4096x11008")
        shapes.append((int(sides[0]), int(sides[1])))
    return tuple(dict.fromkeys(shapes))


def parse_stacks(option: str, values: Iterable[str]) -> tuple[tuple[int, int, int, int], ...]:
    """Stacks of experts from repeated options and comma lists: E, how many a token has, in_features, out_features.

    Raises:
        SpecError: an element is not of the form 128x8:2048x1536, or a number is out of bounds.
    """
    stacks = []
    for text in (part.strip() for value in values for part in value.split(",")):
        found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,4}):([0-9]+x[0-9]+)", text)
        experts, top_k = (int(found[1]), int(found[2])) if found else (0, 0)
        if not found or not 1 <= top_k <= min(experts, MAX_TOP_K) or experts > MAX_EXPERTS:
            raise SpecError(
                f"{option}: {shorten(text)} is not allowed; give experts x those of a token : in x out, such as "
                "128x8:2048x1536"
            )
        stacks.append((experts, top_k, *parse_shapes(option, [found[3]])[0]))
    return tuple(dict.fromkeys(stacks))


def parse_train(value: str) -> tuple[str, ...]:
    """The trained factors from ``a,b``, ``a`` or ``b``.

    Raises:
        SpecError: anything else.
    """
    factors = tuple(sorted({part.strip().lower() for part in value.split(",")}))
    if not factors or not set(factors) <= {"a", "b"}:
        raise SpecError(f"--train: {shorten(value)} is not allowed; give a,b or a or b")
    return factors


def parse_dropout(option: str, value: object) -> float:
    """A probability from 0 up to but not 1, from a number or its text.

    Raises:
        SpecError: anything else.
    """
    text = str(value).strip()
    # float() also reads digits of other scripts, and underscores.
    if not isinstance(value, bool) and re.fullmatch(r"\+?[0-9.]+(?:e[+-]?[0-9]+)?|-0(?:\.0*)?", text, re.ASCII | re.I):
        try:
            if 0 <= (dropout := abs(float(text))) < 1:
                return dropout
        except ValueError:
            pass
    raise SpecError(f"{option}: {shorten(value)} is not allowed; give a number from 0 up to but not 1")


def _plain_base(option: str, value: object, dtype: object) -> str:
    """What a base that is called by its dtype is: plain, where that is the dtype of the workload.

    Raises:
        SpecError: it is another one.
    """
    if parse_dtype(option, str(value)) != parse_dtype("dtype", str(dtype).removeprefix("torch.")):
        raise SpecError(f"{option}: {shorten(value)} is not allowed beside another dtype; give plain, or that one")
    return "plain"


def check_adapter_dtype(value: str, dtype: str) -> str:
    """The adapter's dtype, if it is fp32 or the same as the layers'.

    Raises:
        SpecError: anything else: nobody trains such an adapter.
    """
    if value not in ("fp32", dtype):
        raise SpecError(f"--adapter-dtype: {value} is not allowed over --dtype {dtype}; give fp32 or {dtype}")
    return value


def check_ranks(ranks: Sequence[int], architecture: Architecture) -> None:
    """Refuse ranks above the smaller side of a linear or a stack; of a live model, above that of all it has.

    A live one may have adapters on what is narrower, such as a gate to one number, as PEFT puts them on all.

    Raises:
        SpecError: naming the rank, the projection and the largest rank allowed.
    """
    first = max if architecture.source == LIVE else min
    smallest = first(architecture.sites, key=lambda p: min(p.in_features, p.out_features))
    limit = min(smallest.in_features, smallest.out_features)
    for rank in ranks:
        if rank > limit:
            raise SpecError(
                f"--rank: {rank} is above min(in, out) of {smallest.name} "
                f"({smallest.in_features}x{smallest.out_features}); the largest rank allowed is {limit}"
            )


def make_workload(*, prefix: str = "", **fields: Any) -> Workload:
    """A workload from values as Python has them, or as texts of options.

    Args:
        prefix: what errors put before a field's name: ``--`` for options.
        fields: of ``Workload``. What is None or not given has its default; tokens are a number or several, dtypes ours,
            torch's names of them or torch's own.

    Raises:
        SpecError: an unknown field, or a value that is not allowed.
    """

    def label(name: str) -> str:
        return f"{prefix}{name.replace('_', '-')}" if prefix else name

    known = {field.name for field in dataclasses.fields(Workload)}
    for name in fields:
        if name not in known:
            raise SpecError(f"unknown field {nearest(name, sorted(known))}")
    values = {name: value for name, value in fields.items() if value is not None}
    if DTYPE_ALIASES.get(str(values.get("base")), values.get("base")) in DTYPE_NAMES:
        values["base"] = _plain_base(label("base"), values["base"], values.get("dtype", Workload.dtype))
    for name, allowed in CHOICES.items():
        if name in values and values[name] not in allowed:
            raise SpecError(f"{label(name)}: {shorten(values[name])} is not allowed; give one of {', '.join(allowed)}")
    for name in ("input_grad", "allow_lossy_merge", "kernels"):
        if name in values and not isinstance(values[name], bool):
            raise SpecError(f"{label(name)}: {shorten(values[name])} is not allowed; give True or False")
    if "dropout" in values:
        values["dropout"] = parse_dropout(label("dropout"), values["dropout"])
    if "tokens" in values:
        texts = map(str, _several(values["tokens"]))
        values["tokens"] = parse_counts(label("tokens"), texts, maximum=MAX_TOKENS, kilo=True)
    if "max_saved_bytes" in values:
        texts = map(str, _several(values["max_saved_bytes"]))
        values["max_saved_bytes"] = parse_counts(label("max_saved_bytes"), texts, maximum=MAX_BYTES)[0]
    if "memory_budget" in values:
        values["memory_budget"] = parse_bytes(label("memory_budget"), values["memory_budget"])
    if "sequence" in values:
        values["sequence"] = _sequence(label("sequence"), values)
    for name in ("dtype", "adapter_dtype"):
        text = str(values.get(name, getattr(Workload, name))).removeprefix("torch.")
        values[name] = parse_dtype(label(name), text)
    check_adapter_dtype(values["adapter_dtype"], values["dtype"])
    if "train" in values:
        values["train"] = parse_train(",".join(map(str, _several(values["train"]))))
    for name in ("device", "target_modules", "target_parameters"):
        if name in values:
            values[name] = str(values[name]) if name == "device" else tuple(values[name])
    return Workload(**values)


def _sequence(option: str, values: dict[str, Any]) -> int:
    """The tokens of a sequence, of which the largest step has some.

    Raises:
        SpecError: it is no number, or not a part of the tokens; or nothing is asked for that it is for.
    """
    found = parse_counts(option, map(str, _several(values["sequence"])), maximum=MAX_TOKENS, kilo=True)
    most = max(values.get("tokens", Workload.tokens))
    if values.get("memory_budget") is None:
        raise SpecError(f"{option}: given without a memory budget, which alone asks for it")
    if len(found) > 1 or most % found[0]:
        raise SpecError(
            f"{option}: {found[-1]} is not allowed; give one number that divides {most}, the tokens of a step"
        )
    return found[0]


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | set | range) else [value]
