"""A config of any family that Transformers knows, read from the model that it builds of it on the meta device.

No weights, no code from outside, no network. The config is untrusted: its numbers are bounded before Transformers sees
them, the model's size while it is built, and whatever Transformers raises is one line.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..request.architecture import MAX_FEATURES, MAX_LAYERS, Architecture, Projection
from ..request.errors import SpecError, one_line, shorten
from ..request.experts import MAX_EXPERTS, MAX_TOP_K, Stack

if TYPE_CHECKING:
    from .live import LiveModel

#: Far above any token id or context, and no list of so many things hurts.
MAX_NUMBER = 2**24
#: The largest models have some thousands.
MAX_MODULES = 100_000
MAX_SECONDS = 60
#: Fields that have other code or other weights loaded, or that only a machine with an accelerator reads.
_DROPPED = {"auto_map", "quantization_config", "use_kernels"}
_DROPPED |= {"attn_implementation", "_attn_implementation", "dtype", "torch_dtype"}


def is_installed() -> bool:
    """Whether there are a Transformers and a torch to ask; neither is imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def knows(model_type: str) -> bool:
    """Whether Transformers has a config of this type."""
    with _quiet():
        from transformers import CONFIG_MAPPING

        return model_type in CONFIG_MAPPING


def read_config(values: Mapping[str, object], model_type: str, *, file: str, name: str, source: str) -> Architecture:
    """The architecture of a config; of several models in one, the text model.

    Args:
        values: the config.
        model_type: what Transformers reads it as.
        file: what errors call it.
        name, source: of the architecture.

    Raises:
        SpecError: Transformers builds no model of it, or it is larger than any.
    """
    _check_numbers(values, file)
    read, dropped = _build(values, model_type, file)
    architecture = read.architecture
    bounds = {"in_features": MAX_FEATURES, "out_features": MAX_FEATURES, "experts": MAX_EXPERTS, "top_k": MAX_TOP_K}
    sites: tuple[Projection | Stack, ...] = (*architecture.projections, *architecture.offered)
    for p in sites:
        for side, most in bounds.items():
            if (size := getattr(p, side, 1)) > most:
                raise SpecError(f"{file}: {p.name} {side} = {size}: expected an integer from 1 to {most}")
    return replace(architecture, name=name, source=source, left_out={**architecture.left_out, **dropped})


def _build(values: Mapping[str, object], model_type: str, file: str) -> tuple[LiveModel, dict[str, str]]:
    try:
        with _quiet():
            import torch
            import transformers

            from .live import read_model

            auto: Any = transformers.AutoModel
            config: Any = transformers.CONFIG_MAPPING[model_type].from_dict(_plain(values))
            text = config.get_text_config()
            with _bounded(), _offline(), torch.random.fork_rng(devices=[]), torch.device("meta"):
                model = auto.from_config(text, trust_remote_code=False, attn_implementation="eager")
            read = read_model(model)
            parts = (
                [] if text is config else [key for key in config.sub_configs if getattr(config, key, text) is not text]
            )
    except SpecError:
        raise
    except Exception as error:
        # Whatever it was: the file is not ours, nor is the code that reads it.
        said = " ".join(str(error).split())[:200]
        raise SpecError(
            one_line(f"{file}: Transformers builds no {shorten(model_type)} of it: {type(error).__name__}: {said}")
        ) from None
    return read, dict.fromkeys(parts, "not of the text model")


def _plain(values: object) -> Any:
    """A config without the fields that lead elsewhere."""
    if isinstance(values, Mapping):
        return {key: _plain(value) for key, value in values.items() if key not in _DROPPED}
    return [_plain(value) for value in values] if isinstance(values, list) else values


def _check_numbers(values: object, file: str, label: str = "") -> None:
    """Refuse what makes Transformers count for ever: it makes lists as long as a config says."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            _check_numbers(value, file, str(key))
    elif isinstance(values, list):
        for value in values:
            _check_numbers(value, file, label)
    elif isinstance(values, int | float) and not isinstance(values, bool):
        limit = MAX_LAYERS if "layer" in label.lower() else MAX_NUMBER
        if isinstance(values, int) and abs(values) > limit:
            raise SpecError(f"{file}: {shorten(label)[1:-1]} = {shorten(values)}: expected at most {limit}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that Transformers prints, logs or warns of reaches the terminal."""
    former = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(former)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Some configs name a backbone that lies on the hub: it is not fetched."""
    from huggingface_hub import constants

    former = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = former


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """A model of too many modules, or one that takes too long to build, is an error."""
    from torch.nn.modules.module import register_module_module_registration_hook

    count, end = 0, time.monotonic() + MAX_SECONDS

    def count_up(*_: object) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES or time.monotonic() > end:
            raise ValueError(f"more than {MAX_MODULES} modules, or {MAX_SECONDS} seconds to build them")

    handle = register_module_module_registration_hook(count_up)
    try:
        yield
    finally:
        handle.remove()
