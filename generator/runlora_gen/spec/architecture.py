"""Architectures: the linear projections of a model, read from a Hugging Face style config.

Two kinds of data files drive this module, and no model is named in its code:

- ``families/*.toml`` says how the configs of a model type are read: which fields hold the sizes
  and the bias flags, and which projections follow from them;
- ``architectures/*.toml`` is the catalogue: each file is such a config, written as TOML.

A ``config.json`` of the user takes the same path as a file of the catalogue. It is untrusted, so
only checked integers, checked booleans and a known model type leave this module.
"""

from __future__ import annotations

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
from typing import Any, NoReturn

import tomllib

from runlora_gen.spec.errors import SpecError, shorten
from runlora_gen.spec.files import read_text

MAX_FEATURES = 1_048_576
MAX_CONFIG_BYTES = 1 << 20
MAX_INTEGER_DIGITS = 100  # far above any size, far below what makes int() slow or refuse
DEFAULT_MODEL_TYPE = "llama"
CONFIG_NAME = "config.json"

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
class Architecture:
    """A model, as far as LoRA is concerned."""

    name: str
    model_type: str
    source: str  # "catalogue", "folder/config.json", "organisation/name" or "live"; never an absolute path
    projections: tuple[Projection, ...]
    #: Modules that hold other weights, and the reason of each; empty where a data file was read.
    left_out: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def slug(self) -> str:
        """The name as a valid Python package name."""
        return slug(self.name)

    def restricted(self, target_modules: Sequence[str]) -> Architecture:
        """Return the same architecture with only these projections, in their own order."""
        allowed = tuple(dict.fromkeys(projection.name for projection in self.projections))
        if not target_modules:
            raise SpecError(f"target_modules: empty; {self.name} has: {', '.join(allowed)}")
        for name in target_modules:
            if name not in allowed:
                raise SpecError(
                    f"target_modules: {shorten(name)} is not in {self.name}, " f"which has: {', '.join(allowed)}"
                )
        kept = tuple(p for p in self.projections if p.name in target_modules)
        return replace(self, projections=kept)


def architecture_names() -> tuple[str, ...]:
    """Return the names in the catalogue, sorted."""
    return tuple(_catalogue())


def load_architecture(name_or_path: str, *, model_type: str | None = None) -> Architecture:
    """Read an architecture by its catalogue name, or from a config.json or a folder with one.

    ``model_type`` overrides what the config says, for models that are built like a known one.
    """
    name = name_or_path.lower()
    if name in _catalogue():
        file = _catalogue()[name]
        config = _Config(file.name, tomllib.loads(file.read_text(encoding="utf-8")))
        return _build(config, name=name, source="catalogue", model_type=model_type)
    path = _find_config(name_or_path)
    config = _Config(_clean(os.path.basename(path)), _read_json(path))
    name, source = _name_and_source(path)
    return _build(config, name=name, source=source, model_type=model_type)


def family_projections(values: Mapping[str, object], model_type: str) -> tuple[Projection, ...]:
    """What a family's data file says of a config; empty if no family serves the type, or the config doesn't suit it."""
    family = _families().get(model_type)
    try:
        return () if family is None else _projections(family, _Config("config", values))
    except SpecError:
        return ()


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
class _Family:
    """One file of families/; unknown keys in it are a TypeError."""

    model_types: Sequence[str]
    sizes: Mapping[str, _Size]
    projections: Sequence[_ProjectionRule]
    flags: Mapping[str, _Flag] = field(default_factory=dict)
    multiples: Sequence[Sequence[str]] = ()  # pairs: the first must be a multiple of the second


def _load_family(file: Path) -> _Family:
    table: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    table["sizes"] = {symbol: _Size(**size) for symbol, size in table["sizes"].items()}
    table["flags"] = {name: _Flag(**flag) for name, flag in table.get("flags", {}).items()}
    table["projections"] = [_ProjectionRule(**rule) for rule in table["projections"]]
    return _Family(**table)


@functools.cache
def _families() -> Mapping[str, _Family]:
    files = sorted((_DATA / "families").glob("*.toml"))
    return {model_type: family for family in map(_load_family, files) for model_type in family.model_types}


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


def _build(config: _Config, *, name: str, source: str, model_type: str | None) -> Architecture:
    if model_type is None:
        found = config.values.get("model_type")
        if found is None:
            found = DEFAULT_MODEL_TYPE
            config = replace(config, note=f" (no model_type, so read as {found})")
        where = f"{config.file}: "
        hint = "; --model-type NAME reads the file as one of these if its layers are alike"
    else:
        found, where, hint = model_type, "", ""
    if not isinstance(found, str) or found not in _families():
        raise SpecError(
            f"{where}model_type = {shorten(found)}: " f"expected one of {', '.join(sorted(_families()))}{hint}"
        )
    return Architecture(name, found, source, _projections(_families()[found], config))


def _projections(family: _Family, config: _Config) -> tuple[Projection, ...]:
    sizes = _read_sizes(family, config)
    flags = {name: _read_flag(flag, config) for name, flag in family.flags.items()}
    return tuple(
        Projection(
            name=rule.name,
            in_features=_features(config, sizes, f"{rule.name} in_features", rule.in_features),
            out_features=_features(config, sizes, f"{rule.name} out_features", rule.out_features),
            bias=flags[rule.bias] if isinstance(rule.bias, str) else rule.bias,
            count=sizes["layers"] if rule.count is None else rule.count,
            input=rule.input,
            layout=rule.layout,
        )
        for rule in family.projections
        if not rule.if_different or len({sizes[symbol] for symbol in rule.if_different}) > 1
    )


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
            raise SpecError(
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


def _find_config(argument: str) -> str:
    try:
        is_folder = stat.S_ISDIR(os.stat(argument).st_mode)
    except PermissionError:
        raise SpecError(f"{shorten(argument)}: cannot be read: permission denied") from None
    except (OSError, ValueError):  # ValueError: a NUL or a lone surrogate in the path
        _refuse_unknown(argument)
    path = os.path.join(argument, CONFIG_NAME) if is_folder else argument
    if is_folder and not os.path.lexists(path):
        raise SpecError(f"{shorten(argument)}: the folder holds no readable {CONFIG_NAME}")
    return path


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
