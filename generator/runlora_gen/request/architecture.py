"""Architectures: the linear projections of a model, read from a Hugging Face style config.

Two kinds of data files drive this module, and no model is named in its code:

- ``families/*.toml`` says how the configs of a model type are read: which fields hold the sizes
  and the bias flags, and which projections follow from them;
- ``architectures/*.toml`` is the catalogue: each file is such a config, written as TOML.

A ``config.json`` of the user takes the same path as a file of the catalogue. It is untrusted, so
only checked integers, checked booleans and a known model type leave this module. A family without
a data file is read from the model that Transformers builds of the config, if it is installed.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import keyword
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import tomllib

from .activations import ACTIVATIONS, activation_of_mlps
from .cache import cached_config, is_model_name
from .decoder import Decoder, Router
from .errors import SpecError, one_line, shorten
from .experts import MAX_EXPERTS, MAX_TOP_K, UNASKED, Stack
from .files import read_text

MAX_FEATURES = 1_048_576
MAX_LAYERS = 10_000
MAX_CONFIG_BYTES = 1 << 20
MAX_INTEGER_DIGITS = 100  # far above any size, far below what makes int() slow or refuse
DEFAULT_MODEL_TYPE = "llama"
CONFIG_NAME = "config.json"
#: By which a manifest is known as ours.
GENERATOR = "runlora-gen"
#: What ``Architecture.source`` says where there is no file to read again: the package's manifest takes its place.
LIVE = "live"

_DATA = Path(__file__).parent


@dataclass(frozen=True)
class Projection:
    """One linear of every layer (or of the whole model, as ``count`` says)."""

    name: str  # as in PEFT's target_modules; one model may have several of one name
    in_features: int
    out_features: int
    bias: bool
    count: int  # how many there are in the whole model
    input: str  # the activation it reads: projections with the same one share it
    layout: str = "out_in"  # "in_out" where the weight is stored as I x O (GPT-2's Conv1D)


@dataclass(frozen=True)
class Gated:
    """MLPs that compute ``down(activate(gate(x), up(x)))`` and nothing else.

    Attributes:
        projections: the names of gate, up and down; gate and up have one where they are the halves of a linear.
        activation: a key of :data:`~.activations.ACTIVATIONS`.
        sizes: I of gate and up, I of down and its O: all linears of these names and sizes are of such MLPs. None where
            all of these names are.
    """

    projections: tuple[str, str, str]
    activation: str
    sizes: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Architecture:
    """A model, as far as LoRA is concerned."""

    name: str
    model_type: str
    source: str  # "catalogue", "folder/config.json", "organisation/name" or "live"; never an absolute path
    projections: tuple[Projection, ...]
    #: Modules that hold other weights, and the reason of each; empty where a data file was read.
    left_out: Mapping[str, str] = field(default_factory=dict, compare=False)
    package: str | None = None  # what its package is called by request
    #: How its config says that the weights are stored, as a workload calls it if it can; None where it says nothing.
    stored: str | None = field(default=None, compare=False)
    decoder: Decoder | None = field(
        default=None, compare=False
    )  # the whole model, where its family's file describes it
    #: Projections of experts that get an adapter: those that were asked for, or that have one.
    stacks: tuple[Stack, ...] = ()
    #: Those that get one only where they are asked for.
    offered: tuple[Stack, ...] = field(default=(), compare=False)
    #: Which of the projections are linears of gated MLPs.
    gated: tuple[Gated, ...] = ()

    @property
    def known_stacks(self) -> tuple[Stack, ...]:
        """Stacks of experts that get an adapter, and those that may."""
        return (*self.stacks, *self.offered)

    @property
    def slug(self) -> str:
        """The name of its package, a valid one in Python."""
        return slug(self.package or self.name)

    @property
    def sites(self) -> tuple[Projection | Stack, ...]:
        """All that gets an adapter."""
        return (*self.projections, *self.stacks)

    def left_out_lines(self) -> list[str]:
        """What is left out, a line for each reason."""
        names: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            names.setdefault(why, []).append(name)
        return [one_line(f"left out: {', '.join(modules)}: {why}") for why, modules in names.items()]

    def without_gates(self) -> Architecture:
        """The same without linears to or from one number, which no rank is below: gates of experts."""
        gates = {p.name: p for p in self.projections if 1 in (p.in_features, p.out_features)}
        if len(gates) in (0, len({projection.name for projection in self.projections})):
            return self
        reasons = {name: f"{p.in_features}x{p.out_features}, which no rank is below" for name, p in gates.items()}
        kept = tuple(projection for projection in self.projections if projection.name not in gates)
        return replace(
            self, projections=kept, left_out={**self.left_out, **reasons}, gated=_all_there(self.gated, kept)
        )

    def restricted(self, target_modules: Sequence[str], target_parameters: Sequence[str] = ()) -> Architecture:
        """Return the same architecture with only these projections and stacks, in their own order.

        Raises:
            SpecError: it has none of a name.
        """
        allowed = tuple(dict.fromkeys(projection.name for projection in self.projections))
        if not target_modules and not target_parameters:
            raise SpecError(f"target_modules: empty; {self.name} has: {', '.join(allowed)}")
        for name in target_modules:
            if name not in allowed:
                raise SpecError(
                    f"target_modules: {shorten(name)} is not in {self.name}, " f"which has: {', '.join(allowed)}"
                )
        known = (*self.stacks, *self.offered)
        for name in target_parameters:
            if not any(stack.is_called(name) for stack in known):
                names = ", ".join(dict.fromkeys(stack.parameter for stack in known))
                has = f"which has: {names}" if names else "which has no experts that LoRA can be generated for"
                raise SpecError(f"target_parameters: {shorten(name)} is not in {self.name}, {has}")
        return self.only(target_modules, target_parameters)

    def only(self, target_modules: Sequence[str], target_parameters: Sequence[str]) -> Architecture:
        """The same with what it has of these."""
        stacks = tuple(stack for stack in self.known_stacks if any(stack.is_called(name) for name in target_parameters))
        left_out = {
            where: why
            for where, why in self.left_out.items()
            if why != UNASKED or not any(f".{where}".endswith(f".{stack.parameter}") for stack in stacks)
        }
        kept = tuple(p for p in self.projections if p.name in target_modules)
        return replace(
            self,
            projections=kept,
            left_out=left_out,
            stacks=stacks,
            offered=tuple(stack for stack in self.offered if stack not in stacks),
            gated=_all_there(self.gated, kept),
        )


def _all_there(gated: Sequence[Gated], projections: Sequence[Projection]) -> tuple[Gated, ...]:
    """Those whose linears are among these."""
    names = {projection.name for projection in projections}
    return tuple(mlp for mlp in gated if names.issuperset(mlp.projections))


def architecture_names() -> tuple[str, ...]:
    """Return the names in the catalogue, sorted."""
    return tuple(_catalogue())


class OtherFamilies(Protocol):
    """What reads configs of families without a data file here, if it can: :mod:`..from_model.meta`."""

    def is_installed(self) -> bool:
        """Whether it can read any."""

    def knows(self, model_type: str) -> bool:
        """Whether it reads those of a model type."""

    def read_config(
        self, values: Mapping[str, object], model_type: str, *, file: str, name: str, source: str
    ) -> Architecture:
        """The architecture of a config; raises SpecError where it can't be read."""


def load_architecture(
    name_or_path: str, *, model_type: str | None = None, others: OtherFamilies | None = None
) -> Architecture:
    """Read an architecture by its catalogue name, from a config.json or a folder with one, or from a cached model.

    Args:
        name_or_path: such as ``llama-13b``, ``path/to/config.json``, or ``meta-llama/Llama-3.1-8B``, which is looked
            for in the local Hugging Face cache where no such path exists.
        model_type: overrides what the config says, for models that are built like a known one.
        others: reads families without a data file; None for nothing.

    Raises:
        SpecError: there is nothing of that name, or it can't be read.
    """
    name = name_or_path.lower()
    if name in _catalogue():
        file = _catalogue()[name]
        config = _Config(file.name, tomllib.loads(file.read_text(encoding="utf-8")))
        return _build(config, name=name, source="catalogue", model_type=model_type, others=others)
    path, cached = _find_config(name_or_path)
    config = _Config(_clean(os.path.basename(path)), _read_json(path))
    if config.values.get("generator") == GENERATOR:
        return _from_manifest(config)
    name, source = (slug(cached.rpartition("/")[2]), cached) if cached else _name_and_source(path)
    return _build(config, name=name, source=source, model_type=model_type, others=others)


def family_projections(values: Mapping[str, object], model_type: str) -> tuple[Projection, ...]:
    """What a family's data file says of a config; empty if no family serves the type, or the config doesn't suit it."""
    family = _families().get(model_type)
    try:
        return () if family is None else _projections(family, _Config("config", values))
    except SpecError:
        return ()


def decoder_of(values: Mapping[str, object], read: Architecture) -> Decoder | None:
    """The whole model of one all of whose linears were read, by the fields of its config; None if not all is known."""
    return _decoder_around(read, _Config("config", values), read.model_type)


def architecture_of(values: Mapping[str, object], *, others: OtherFamilies | None = None) -> Architecture:
    """Read an architecture from the fields of a config, as ``to_dict`` of Transformers gives them.

    ``others``: reads families without a data file; None for nothing.

    Raises:
        SpecError: it can't be read.
    """
    kind = values.get("model_type")
    label = kind if isinstance(kind, str) and kind else "model"
    return _build(_Config("config", values), name=slug(label), source=LIVE, model_type=None, others=others)


def _from_manifest(config: _Config) -> Architecture:
    """What a package was generated for, by its manifest: to generate anew where the model is not at hand."""
    projections = tuple(map(_projection, _rows(config, "projections")))
    stacks = tuple(
        Stack(
            name=row.text("name"),
            experts=row.size("experts", MAX_EXPERTS),
            in_features=row.size("in_features"),
            out_features=row.size("out_features"),
            gathers=row.values.get("gathers") is True,
            top_k=row.size("top_k", MAX_TOP_K),
            bias=row.values.get("bias") is True,
            count=row.size("count"),
            layout=row.layout,
            module=row.text("module", mark=".") if row.values.get("module") else "",
            activation=found if (found := str(row.values.get("activation"))) in ACTIVATIONS else "",
        )
        for row in _rows(config, "stacks")
    )
    gated = tuple(
        Gated(row.names("projections"), activation, row.sizes("sizes"))
        for row in _rows(config, "gated")
        if (activation := str(row.values.get("activation"))) in ACTIVATIONS  # else of a later version
    )
    if not projections and not stacks:
        _refuse_rows(config, "projections")
    whole = _Row(config, "manifest", config.values)
    return Architecture(
        whole.text("arch"),
        whole.text("model_type"),
        LIVE,
        projections,
        stacks=stacks,
        gated=gated,
        decoder=_decoder_of_manifest(config),
    )


def _projection(row: _Row) -> Projection:
    return Projection(
        name=row.text("name"),
        in_features=row.size("in_features"),
        out_features=row.size("out_features"),
        bias=row.values.get("bias") is True,
        count=row.size("count"),
        input=row.text("input", mark=" ,.*"),
        layout=row.layout,
    )


def _decoder_of_manifest(config: _Config) -> Decoder | None:
    """The whole model, which a package has that was planned for a budget of memory."""
    for row in _rows(config, "decoder"):
        linears = tuple(map(_projection, _rows(replace(config, values=row.values), "projections")))
        router, vocab = row.values.get("router"), row.values.get("vocab")
        sizes = ("hidden", "intermediate", "heads", "kv_heads", "head_dim")
        return Decoder(
            layers=row.size("layers", MAX_LAYERS),
            **{name: row.size(name) for name in sizes},
            head_norms=row.values.get("head_norms") is True,
            post_norms=row.values.get("post_norms") is True,
            wide_norms=row.values.get("wide_norms") is True,
            vocab=None if vocab is None else row.size("vocab"),
            tied=row.values.get("tied") is True,
            projections=linears,
            router=(
                Router(**{name: router.get(name) is True for name in ("normed", "float32")})
                if isinstance(router, dict)
                else None
            ),
        )
    return None


@dataclass(frozen=True)
class _Row:
    """An object of a manifest, of which only checked values leave this module."""

    config: _Config
    place: str  # what errors call it
    values: Mapping[str, object]

    def text(self, field: str, *, mark: str = "") -> str:
        value = self.values.get(field)
        if not isinstance(value, str) or not re.fullmatch(rf"[A-Za-z0-9_{mark}-]{{1,128}}", value):
            self.config.fail(self.place, value, "expected a name")
        return value

    def size(self, field: str, most: int = MAX_FEATURES) -> int:
        value = self.values.get(field)
        if type(value) is not int or not 0 < value <= most:
            self.config.fail(self.place, value, f"expected a whole number from 1 to {most}")
        return value

    def names(self, field: str) -> tuple[str, str, str]:
        one, two, three = self._three(field)
        return one.text(field), two.text(field), three.text(field)

    def sizes(self, field: str) -> tuple[int, int, int] | None:
        if self.values.get(field) is None:
            return None
        one, two, three = self._three(field)
        return one.size(field), two.size(field), three.size(field)

    def _three(self, field: str) -> Sequence[_Row]:
        value = self.values.get(field)
        if not isinstance(value, list) or len(value) != 3:
            self.config.fail(self.place, value, "expected three, of gate, up and down")
        return [replace(self, values={field: element}) for element in value]

    @property
    def layout(self) -> str:
        return "in_out" if self.values.get("layout") == "in_out" else "out_in"


def _rows(config: _Config, field: str) -> Sequence[_Row]:
    """The objects of a list; packages of earlier versions have none of some kinds."""
    found = config.values.get(field, [])
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        _refuse_rows(config, field)
    return [_Row(config, field, row) for row in found]


def _refuse_rows(config: _Config, field: str) -> NoReturn:
    found = config.values.get(field)
    config.fail(field, found, "expected a list of them; generate the package anew from its model")


# Families: how a config is read


@dataclass(frozen=True)
class _Size:
    """How one size is found: the first config field that is set, else what is said here.

    ``default`` is a number, or a sum such as ``{hidden = 4}``; ``product`` and ``quotient`` name
    earlier sizes of the family. With none of these the field is required.
    """

    fields: Sequence[str] = ()
    default: int | Mapping[str, int] | None = None
    product: Sequence[str] = ()
    quotient: Sequence[str] = ()
    max: int = MAX_FEATURES


@dataclass(frozen=True)
class _Flag:
    """A boolean of the config."""

    fields: Sequence[str]
    default: bool


@dataclass(frozen=True)
class _ProjectionRule:
    """A projection, its features given as sums of sizes: ``{q = 1, kv = 2}``."""

    name: str
    input: str
    in_features: Mapping[str, int]
    out_features: Mapping[str, int]
    bias: bool | str = False  # a constant, or the name of a flag
    count: int | None = None  # one per layer unless given
    layout: str = "out_in"
    if_different: Sequence[str] = ()  # exists only where these two sizes differ


@dataclass(frozen=True)
class _RouterRule:
    """How a family's routers are :class:`Router`."""

    normed: bool | str  # a constant, or the name of a flag
    float32: bool = False


@dataclass(frozen=True)
class _DecoderRule:
    """How the models of a family are :class:`Decoder`; its sizes have the names of the family's."""

    model_types: Sequence[str]  # the family's others have something more
    head_norms: bool = False
    post_norms: bool = False
    wide_norms: bool = False
    tied: bool = False  # whether the head's weight is the embedding's, where a config says nothing
    router: _RouterRule | None = None


@dataclass(frozen=True)
class _GatedRule:
    """How a family's MLPs are :class:`Gated`."""

    projections: Sequence[str]
    activation: Sequence[str]  # config fields, of which the first that is set names the function
    default: str  # what is the function where none is set
    model_types: Sequence[str] = ()  # all of the family unless given
    read_as: Mapping[str, str] = field(default_factory=dict)  # what the model takes some functions for


@dataclass(frozen=True)
class _Family:
    """One file of families/; unknown keys in it are a TypeError."""

    model_types: Sequence[str]
    sizes: Mapping[str, _Size]
    projections: Sequence[_ProjectionRule]
    flags: Mapping[str, _Flag] = field(default_factory=dict)
    multiples: Sequence[Sequence[str]] = ()  # pairs: the first must be a multiple of the second
    decoder: _DecoderRule | None = None  # where the layers are those of :class:`Decoder`
    gated: Sequence[_GatedRule] = ()
    #: Whether there is more than these linears, as experts: then models are read as Transformers builds them.
    partial: bool = False


def _load_family(file: Path) -> _Family:
    table: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    table["sizes"] = {symbol: _Size(**size) for symbol, size in table["sizes"].items()}
    table["flags"] = {name: _Flag(**flag) for name, flag in table.get("flags", {}).items()}
    table["projections"] = [_ProjectionRule(**rule) for rule in table["projections"]]
    table["gated"] = [_GatedRule(**rule) for rule in table.get("gated", ())]
    if "decoder" in table:
        router = table["decoder"].pop("router", None)
        table["decoder"] = _DecoderRule(**table["decoder"], router=router and _RouterRule(**router))
    return _Family(**table)


@functools.cache
def _families() -> Mapping[str, _Family]:
    files = sorted((_DATA / "families").glob("*.toml"))
    return {model_type: family for family in map(_load_family, files) for model_type in family.model_types}


@functools.cache
def _whole_families() -> Mapping[str, _Family]:
    """Those whose data files say all of a model."""
    return {model_type: family for model_type, family in _families().items() if not family.partial}


@functools.cache
def _catalogue() -> Mapping[str, Path]:
    files = (_DATA / "architectures").glob("*.toml")
    return dict(sorted((file.name.removesuffix(".toml"), file) for file in files))


# From a config to an architecture


@dataclass(frozen=True)
class _Config:
    """The fields of one config, and how to speak about them."""

    file: str
    values: Mapping[str, object]
    note: str = ""

    def find(self, fields: Sequence[str]) -> tuple[str, object]:
        """Return the first field that is set, with its value; null is unset, as in transformers."""
        for name in fields:
            value = self.values.get(name)
            if value is not None:
                return name, value
        return (fields[0] if fields else ""), None

    def fail(self, name: str, value: object, allowed: str) -> NoReturn:
        raise SpecError(f"{self.file}: {name} = {shorten(value)}: {allowed}")


class _MissingFieldError(SpecError):
    """A config leaves a size to its reader."""


def _build(
    config: _Config, *, name: str, source: str, model_type: str | None, others: OtherFamilies | None
) -> Architecture:
    whole, config = config, _text_config(config)
    nested = config is not whole
    own = config.values.get("model_type")
    if model_type is None and own is None:
        model_type = DEFAULT_MODEL_TYPE
        config = replace(config, note=f" (no model_type, so read as {model_type})")
    found = own if model_type is None else model_type
    # Others know more of a whole model than of its text part, such as its defaults.
    candidates = [whole, config] if model_type is None else [_typed(config, found)]
    other = functools.partial(_read_by_others, others, candidates, name=name, source=source)
    parts = [key for key, value in whole.values.items() if key.endswith("_config") and isinstance(value, dict)]
    left_out = {} if not nested else {key: "not of the text model" for key in parts if key not in _OF_THE_TEXT}
    if isinstance(found, str) and found in _whole_families():
        if found != own:
            _check_fields(config, found)
        try:
            projections = _projections(_families()[found], config)
            decoder = _decoder(_families()[found], config, found, projections)
            gated = _gated(_families()[found], config, found, projections)
            architecture = Architecture(name, found, source, projections, left_out, decoder=decoder, gated=gated)
        except _MissingFieldError:
            read = other() if nested else None
            if read is None:
                raise
            architecture = read
    else:
        read = other()
        if read is None:
            _refuse_type(config, found, others)
        architecture = replace(read, decoder=_decoder_around(read, config, found))
    if found != own and isinstance(own, str):
        architecture = _as_its_own(config, own, architecture, others)
    return replace(architecture, stored=_stored(whole.values))


def _stored(values: Mapping[str, object]) -> str | None:
    """What ``quantization_config`` says: one of ``BASES``, or a method of another kind."""
    found = values.get("quantization_config")
    if not isinstance(found, dict):
        return None
    if found.get("load_in_8bit"):
        return "int8"
    if found.get("quant_method") == "fp8":  # Transformers' fine-grained fp8; without blocks it has one scale
        return "fp8-block" if found.get("weight_block_size", (128, 128)) else "fp8"
    if found.get("quant_method") == "fbgemm_fp8":
        return "fp8"
    if found.get("load_in_4bit"):
        return shorten(found.get("bnb_4bit_quant_type") or "fp4").strip("'")  # bitsandbytes' default
    return shorten(found.get("quant_method") or "another way").strip("'")


def _text_config(config: _Config) -> _Config:
    """Of a model that reads text and other things, the part of the config that is of its text model."""
    own, text = config.values.get("model_type"), config.values.get("text_config")
    if not isinstance(text, dict) or (isinstance(own, str) and own in _whole_families()):
        return config
    if text.get("model_type") is None and isinstance(own, str):
        text = {**text, "model_type": f"{own}_text"}  # old files leave it to the reader
    return _Config(f"{config.file}: text_config", text)


def _typed(config: _Config, model_type: object) -> _Config:
    return replace(config, values={**config.values, "model_type": model_type})


def _read_by_others(
    others: OtherFamilies | None, candidates: Sequence[_Config], *, name: str, source: str
) -> Architecture | None:
    """Read the first config whose type others know; None if there is none, or there are no others."""
    if others is None or not others.is_installed():
        return None
    for config in candidates:
        kind = config.values.get("model_type")
        if isinstance(kind, str) and others.knows(kind):
            return others.read_config(config.values, kind, file=config.file, name=name, source=source)
    return None


def _refuse_type(config: _Config, model_type: object, others: OtherFamilies | None) -> NoReturn:
    could = others is not None and not others.is_installed()
    hint = "; with torch and transformers installed other families can be read, too" if could else ""
    raise SpecError(
        f"{config.file}: model_type = {shorten(model_type)}: expected one of {', '.join(sorted(_whole_families()))}"
        f"; --model-type NAME reads the file as one of these if its layers are alike{hint}"
    )


#: Parts of a config that are no other model.
_OF_THE_TEXT = ("text_config", "quantization_config", "generation_config")
#: Fields that say that a model has what no data file describes.
_OTHER_KINDS = {
    "num_experts": "experts",
    "num_local_experts": "experts",
    "n_routed_experts": "experts",
    "moe_num_experts": "experts",
    "moe_intermediate_size": "experts",
    "kv_lora_rank": "latent attention",
    "state_size": "state-space layers",
    "mamba_d_state": "state-space layers",
    "is_encoder_decoder": "an encoder and a decoder",
    "multi_query": "queries, keys and values in one linear",
    "parallel_attn": "queries, keys and values in one linear",
}


def _check_fields(config: _Config, model_type: str) -> None:
    """Refuse a config with fields of layers that the family doesn't have: it would be read as what it is not."""
    family = _families()[model_type]
    known = {name for part in (family.sizes, family.flags) for entry in part.values() for name in entry.fields}
    biased = any(rule.bias is True for rule in family.projections)
    foreign = {name: value for name, value in config.values.items() if name not in known}
    for name, kind in _OTHER_KINDS.items():
        if foreign.get(name):
            config.fail(name, foreign[name], f"stands for {kind}, which {model_type} doesn't have")
    for other in _whole_families():
        for size in _families()[other].sizes.values():
            for name in size.fields:
                if foreign.get(name) is not None:
                    config.fail(name, foreign[name], f"a field of {other}, whose layers {model_type} doesn't have")
        for flag in _families()[other].flags.values():
            for name in flag.fields:
                # What the family has in any case contradicts nothing.
                if isinstance(foreign.get(name), bool) and foreign[name] != biased:
                    config.fail(name, foreign[name], f"a field of {other}, whose layers {model_type} doesn't have")


def _as_its_own(config: _Config, own: str, read: Architecture, others: OtherFamilies | None) -> Architecture:
    """What was read as another model type than the config's own, but for MLPs that do something else there.

    Refused is what its own type is known not to have.
    """
    projections, experts, gated = tuple[Projection, ...](), tuple[Stack, ...](), read.gated
    if own in _whole_families():
        projections = family_projections(config.values, own)
        gated = _gated(_families()[own], config, own, projections)
    else:
        with contextlib.suppress(SpecError):  # what can't be read contradicts nothing
            known = _read_by_others(others, [_typed(config, own)], name=own, source="")
            if known is not None:
                projections, experts, gated = known.projections, known.offered, known.gated
    has = {(p.name, p.in_features, p.out_features, p.bias, p.layout): p.count for p in projections}
    for p in read.projections if projections else ():
        if has.get((p.name, p.in_features, p.out_features, p.bias, p.layout)) != p.count:
            names = ", ".join(dict.fromkeys(projection.name for projection in projections))
            wanted = f"{p.count} {p.name} of {p.in_features}x{p.out_features} {'with' if p.bias else 'without'} a bias"
            raise SpecError(
                f"{config.file}: model_type = {shorten(own)}: its layers are not {read.model_type}'s: "
                f"there are no {wanted} (it has {names})"
            )
    if projections and read.offered != experts:
        raise SpecError(f"{config.file}: model_type = {shorten(own)}: its experts are not {read.model_type}'s")
    return replace(read, gated=tuple(mlp for mlp in read.gated if mlp in gated))


def _flag(family: _Family, config: _Config, said: bool | str) -> bool:
    """A constant, or a flag of the config by its name."""
    return _read_flag(family.flags[said], config) if isinstance(said, str) else said


def _projections(family: _Family, config: _Config) -> tuple[Projection, ...]:
    sizes = _read_sizes(family, config)
    return tuple(
        Projection(
            name=rule.name,
            in_features=_features(config, sizes, f"{rule.name} in_features", rule.in_features),
            out_features=_features(config, sizes, f"{rule.name} out_features", rule.out_features),
            bias=_flag(family, config, rule.bias),
            count=sizes["layers"] if rule.count is None else rule.count,
            input=rule.input,
            layout=rule.layout,
        )
        for rule in family.projections
        if not rule.if_different or len({sizes[symbol] for symbol in rule.if_different}) > 1
    )


def _gated(family: _Family, config: _Config, model_type: str, linears: Sequence[Projection]) -> tuple[Gated, ...]:
    """The gated MLPs; none where they have a function that no row of ACTIVATIONS is of."""
    found = []
    sizes = {p.name: (p.in_features, p.out_features) for p in linears}
    for rule in family.gated:
        gate, up, down = rule.projections
        label, said = config.find(rule.activation)
        if not rule.model_types or model_type in rule.model_types:
            if said is not None and not isinstance(said, str):
                config.fail(label, said, "expected the name of an activation")
            function = rule.default if said is None else said
            activation = activation_of_mlps(rule.read_as.get(function, function))
            if activation is not None and sizes:
                found.append(Gated((gate, up, down), activation, (sizes[gate][0], *sizes[down])))
    return tuple(found)


def _decoder(family: _Family, config: _Config, model_type: str, linears: tuple[Projection, ...]) -> Decoder | None:
    """The whole model; of what only estimates need nothing is refused here."""
    if family.decoder is None or model_type not in family.decoder.model_types:
        return None
    sizes, vocab = _read_sizes(family, config), config.values.get("vocab_size")
    rule, names = family.decoder, ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim")
    router = rule.router
    return Decoder(
        **{name: sizes[name] for name in names},
        head_norms=rule.head_norms,
        post_norms=rule.post_norms,
        wide_norms=rule.wide_norms,
        vocab=vocab if type(vocab) is int and 1 <= vocab <= MAX_FEATURES else None,
        tied=config.values.get("tie_word_embeddings", rule.tied) is True,
        projections=linears,
        router=None if router is None else Router(_flag(family, config, router.normed), router.float32),
    )


def _decoder_around(read: Architecture, config: _Config, model_type: object) -> Decoder | None:
    """The whole model of one that was read elsewhere, if all is known, and if it has experts all of its layers do."""
    family = _families().get(model_type) if isinstance(model_type, str) else None
    if family is None or not isinstance(model_type, str):
        return None
    try:
        decoder = _decoder(family, config, model_type, read.projections)
        known = decoder is not None and read.projections == _projections(family, config)
    except SpecError:  # what only estimates need
        return None
    if decoder is None or not known or any(stack.count != decoder.layers for stack in read.known_stacks):
        return None
    return decoder if len(read.known_stacks) == (0 if decoder.router is None else 2) else None


def decoder_types() -> tuple[str, ...]:
    """Model types that are :class:`Decoder`, sorted."""
    rules = {id(family): family.decoder for family in _families().values()}.values()
    return tuple(sorted(name for rule in rules if rule is not None for name in rule.model_types))


def _read_sizes(family: _Family, config: _Config) -> dict[str, int]:
    sizes: dict[str, int] = {}
    labels: dict[str, str] = {}
    for symbol, size in family.sizes.items():
        label, value = config.find(size.fields)
        if value is None and size.product:
            label = " * ".join(labels[factor] for factor in size.product)
            value = sizes[size.product[0]] * sizes[size.product[1]]
        elif value is None and size.quotient:
            whole, part = size.quotient
            if sizes[whole] % sizes[part]:
                allowed = f"must be a multiple of {labels[part]} = {sizes[part]} without {label}"
                config.fail(labels[whole], sizes[whole], allowed)
            value = sizes[whole] // sizes[part]
        elif value is None and isinstance(size.default, Mapping):
            value = _sum(sizes, size.default)
        elif value is None:
            value = size.default
        if value is None:
            raise _MissingFieldError(
                f"{config.file}: missing field {' or '.join(size.fields)}{config.note}: "
                f"expected an integer from 1 to {size.max}"
            )
        sizes[symbol] = _check(config, label, value, size.max)
        labels[symbol] = label
    for whole, part in family.multiples:
        if sizes[whole] % sizes[part]:
            allowed = f"must be a multiple of {labels[part]} = {sizes[part]}"
            config.fail(labels[whole], sizes[whole], allowed)
    return sizes


def _read_flag(flag: _Flag, config: _Config) -> bool:
    label, value = config.find(flag.fields)
    if value is None:
        return flag.default
    if not isinstance(value, bool):
        config.fail(label, value, "expected true or false")
    return value


def _features(config: _Config, sizes: Mapping[str, int], label: str, terms: Mapping[str, int]) -> int:
    return _check(config, label, _sum(sizes, terms), MAX_FEATURES)


def _sum(sizes: Mapping[str, int], terms: Mapping[str, int]) -> int:
    return sum(sizes[symbol] * factor for symbol, factor in terms.items())


def _check(config: _Config, label: str, value: object, largest: int) -> int:
    # A bool is an int to isinstance, and `true` is no size.
    if type(value) is not int or not 1 <= value <= largest:
        config.fail(label, value, f"expected an integer from 1 to {largest}")
    return value


# From a path to a config


def _find_config(argument: str) -> tuple[str, str | None]:
    """The path of a config, and the name of the model whose it is if it is a cached one."""
    try:
        is_folder = stat.S_ISDIR(os.stat(argument).st_mode)
    except PermissionError:
        raise SpecError(f"{shorten(argument)}: cannot be read: permission denied") from None
    except (OSError, ValueError):  # ValueError: a NUL or a lone surrogate in the path
        if is_model_name(argument):
            return cached_config(argument, CONFIG_NAME), argument
        _refuse_unknown(argument)
    path = os.path.join(argument, CONFIG_NAME) if is_folder else argument
    if is_folder and not os.path.lexists(path):
        raise SpecError(f"{shorten(argument)}: the folder holds no readable {CONFIG_NAME}")
    return path, None


def _refuse_unknown(argument: str) -> NoReturn:
    if any(mark in argument for mark in "/\\") or argument.lower().endswith(".json"):
        raise SpecError(f"{shorten(argument)}: no such file or folder")
    # The cut keeps difflib, which is quadratic, quick.
    close = difflib.get_close_matches(argument.lower()[:64], architecture_names(), n=1, cutoff=0.5)
    suggestion = f"did you mean {close[0]}? " if close else ""
    raise SpecError(
        f"unknown architecture {shorten(argument)}: {suggestion}expected a name that "
        f"`runlora-gen archs` lists, or the path of a {CONFIG_NAME}"
    )


def _read_json(path: str) -> Mapping[str, object]:
    file = _clean(os.path.basename(path))
    text = read_text(path, label=file, limit=MAX_CONFIG_BYTES, kind="config", encoding="utf-8-sig")
    try:
        values = json.loads(text, parse_constant=_refuse_constant, parse_int=_parse_int)
    except ValueError as error:
        raise SpecError(f"{file}: not valid JSON: {error}") from None
    except RecursionError:
        raise SpecError(f"{file}: not a config: nested too deeply") from None
    if not isinstance(values, dict):
        raise SpecError(f"{file}: expected a JSON object, found {shorten(values)}")
    return values


def _refuse_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not a JSON number")


def _parse_int(literal: str) -> int:
    if len(literal) > MAX_INTEGER_DIGITS:
        raise ValueError(f"an integer of {len(literal)} digits, expected at most {MAX_INTEGER_DIGITS}")
    return int(literal)


def _name_and_source(path: str) -> tuple[str, str]:
    # abspath, not resolve: in the Hugging Face cache config.json is a link to a nameless blob.
    folder, file = os.path.split(os.path.abspath(path))
    folder = os.path.basename(folder)
    name = folder if file == CONFIG_NAME else file.removesuffix(".json")
    source = f"{_clean(folder)}/{_clean(file)}" if folder else _clean(file)
    return slug(name), source


def _clean(name: str) -> str:
    """Return a file name that is safe in one-line messages and in generated text."""
    return re.sub(r"[^A-Za-z0-9._-]|\.{2,}", "_", name)[:64]


def slug(name: str) -> str:
    """Any name as that of a Python package: lower-case letters, digits and underscores."""
    text = re.sub(r"[^a-z0-9]+", "_", name.lower())[:64].strip("_")
    if not text or text[0].isdigit() or keyword.iskeyword(text):
        text = f"model_{text}".rstrip("_")
    return text
