"""Generated layers in a model without PEFT, and their adapters in PEFT's format."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..generation import dtype_name
from ..request.errors import SpecError, shorten
from ..request.layout import STANDALONE
from ..request.workload import parse_dropout
from .packages import needed, package_of, packages_for

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..request.architecture import Architecture


def inject_lora(
    model: nn.Module,
    r: int = 8,
    lora_alpha: float = 8,
    target_modules: str | Sequence[str] = "all-linear",
    *,
    target_parameters: Sequence[str] = (),
    adapter_dtype: torch.dtype | None = None,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
    lora_bias: bool = False,
    output: str | os.PathLike[str] | None = None,
    layout: str = STANDALONE,
    **workload: Any,
) -> Any:
    """Generate LoRA layers for a model, replace its linears by them, and freeze all else: LoRA without PEFT.

    Args:
        model: any model with linears (``torch.nn.Linear``, or GPT-2's Conv1D); changed in place.
        r: rank of the adapters.
        lora_alpha: the update is scaled by lora_alpha / r.
        target_modules: as PEFT takes them: names, or ends of names, of linears; a regular expression for whole names;
            or "all-linear" for all but output embeddings and heads.
        target_parameters: as PEFT takes them: names, or ends of names, of stacks of experts.
        adapter_dtype: of lora_A and lora_B; None for float32 over a 16-bit base, else the base's.
        use_rslora: scale by lora_alpha / sqrt(r).
        lora_dropout: the probability with which an element of an adapter's input is dropped while training.
        lora_bias: whether each adapter has a bias, which is trained and scaled as the update is.
        output, layout, workload: as for ``accelerate``.

    Returns:
        A report: ``accelerated`` (names), ``left`` (name to reason), ``folders``, ``modules``; it prints well.

    Raises:
        ValueError: the model has adapters already, nothing fits ``target_modules``, or a value is not allowed. The
            model is as it was then.
        TypeError: a linear is quantized.
    """
    from ..from_model.live import read_model

    live = read_model(model)
    names = dict.fromkeys(n.rpartition(".")[2] for n, _ in model.named_modules() if _is_target(n, target_modules))
    known = {projection.name for projection in live.architecture.projections}
    wanted = [name for name in names if name in known]
    architecture = live.architecture.restricted(wanted) if wanted else live.architecture
    architecture = _with_stacks(architecture, target_modules, target_parameters)
    if adapter_dtype is not None:
        workload = {"adapter_dtype": dtype_name(adapter_dtype), **workload}
    options: dict[str, Any] = {"adapter_dtype": adapter_dtype, "use_rslora": use_rslora, "lora_bias": lora_bias}
    if target_parameters:
        options["target_parameters"] = target_parameters
    if lora_dropout:
        options["lora_dropout"] = lora_dropout = parse_dropout("lora_dropout", lora_dropout)
        workload = {"dropout": lora_dropout, **workload}
    (package,) = packages_for(model, live, {r: architecture}, output, layout, workload)
    report = package.inject_lora(model, r, lora_alpha, target_modules, **options)
    return report


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], **options: Any) -> None:
    """Read an adapter in PEFT's format, into layers that are there, or that are generated and put in for it.

    Args:
        model: with generated layers, or without any; or a PeftModel, which loads it itself.
        directory: with adapter_config.json.
        options: for a PeftModel ``adapter_name``; for new layers ``output``, ``layout`` and fields of ``Workload``.

    Raises:
        ValueError: the adapter has what generated layers don't, or other layers, ranks or shapes than the model.
        OSError: there is no such adapter.
    """
    package = package_of(model)
    if package is None and hasattr(model, "peft_config"):
        adapter_name = options.pop("adapter_name", "default")
        peft_model: Any = model
        peft_model.load_adapter(str(directory), adapter_name, is_trainable=True, **options)
        return
    if package is None:
        from ..from_model.live import read_model

        config = json.loads((Path(directory) / "adapter_config.json").read_text(encoding="utf-8"))
        rank = config.get("r")
        if not isinstance(rank, int):
            raise SpecError(f"adapter_config.json: r = {shorten(rank)} is not allowed; give a whole number")
        output, layout = options.pop("output", None), options.pop("layout", STANDALONE)
        live = read_model(model)
        if config.get("lora_dropout"):
            options = {"dropout": parse_dropout("adapter_config.json: lora_dropout", config["lora_dropout"]), **options}
        targets = config.get("target_modules") or (), config.get("target_parameters") or ()
        architecture = _with_stacks(live.architecture, *targets)
        (package,) = packages_for(model, live, {rank: architecture}, output, layout, options)
        options = {}
    package.load_adapter(model, directory, **options)


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapter in PEFT's format: adapter_config.json and the weights beside it.

    Raises:
        ValueError: the model has no generated layers.
    """
    needed(model).save_adapter(model, directory)


def merge(model: nn.Module) -> None:
    """Put weights with the updates in them in place of the frozen ones, which are kept for ``unmerge``.

    Raises:
        ValueError: the model has no generated layers, or (as with PEFT) a linear without a bias has a lora_bias.
    """
    needed(model).merge(model)


def unmerge(model: nn.Module) -> None:
    """Put the frozen weights back.

    Raises:
        ValueError: the model has no generated layers.
    """
    needed(model).unmerge(model)


def disable_adapter(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within it the base model runs alone, as the reference of DPO or GRPO.

    Raises:
        ValueError: the model has no generated layers.
    """
    manager: contextlib.AbstractContextManager[None] = needed(model).disable_adapter(model)
    return manager


def _with_stacks(
    architecture: Architecture, target_modules: str | Sequence[str], target_parameters: Sequence[str]
) -> Architecture:
    """The same with those stacks of experts alone that are targets, and without linears if none is.

    Raises:
        SpecError: a target is no stack.
    """
    called: dict[str, None] = {}
    for target in target_parameters:
        # Names in the model are those of one layer; a stack is of all of them.
        found = [s.parameter for s in architecture.known_stacks if s.is_called(target) or s.is_called_in(target)]
        if not found:
            raise SpecError(f"target_parameters: {shorten(target)} is no stack of experts of the model")
        called.update(dict.fromkeys(found))
    names = tuple(projection.name for projection in architecture.projections) if target_modules or not called else ()
    return architecture.only(names, tuple(called))


def _is_target(name: str, target_modules: str | Sequence[str]) -> bool:
    if isinstance(target_modules, str):
        return target_modules == "all-linear" or re.fullmatch(target_modules, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in target_modules)
