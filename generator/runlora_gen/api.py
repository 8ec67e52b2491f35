"""The Python entries: generate for a model, and put what was generated into it. Nothing is decided here.

torch is imported by what takes a live model, and by nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import operator
import os
import re
import sys
import types
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .generation import Request, dtype_name, generated, of_model, read_request
from .request.errors import SpecError, shorten
from .request.layout import STANDALONE, parse_layout
from .request.workload import make_workload

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .from_model.live import LiveModel
    from .request.architecture import Architecture


def generate(
    model: Any,
    *,
    rank: int | Sequence[int] | None = None,
    output: str | os.PathLike[str] = "generated",
    name: str | None = None,
    layout: str = STANDALONE,
    force: bool = False,
    **workload: Any,
) -> tuple[Path, ...]:
    """Generate the LoRA linears of a model, as the command line does.

    Args:
        model: a ``torch.nn.Module`` (also on the meta device; a PeftModel also gives its ranks), a config of
            Transformers, or what ``--arch`` takes: a name, a config.json or its folder.
        rank: of the adapters, one or several; None for those of a PeftModel.
        output: the folder to write into: a package for each rank.
        name: of the packages; None for that of the model.
        layout: ``standalone``, for modules each of which works alone, or ``folder``, for what they share to stand once.
        force: overwrite files that were not generated.
        workload: fields of ``Workload``: tokens, dtype, adapter_dtype, device, target_modules, ... A live model gives
            its own dtypes and device.

    Returns:
        The folders of the packages, one a rank.

    Raises:
        SpecError: a value that is not allowed, named in one line; nothing is written then.
    """
    request = read_request(model, rank=rank, name=name, layout=layout, **workload)
    for line in request.architecture.left_out_lines():
        print(line, file=sys.stderr)
    return generated(request, Path(output), force=force)


def accelerate(
    model: nn.Module,
    output: str | os.PathLike[str] | None = None,
    *,
    strict: bool = False,
    layout: str = STANDALONE,
    **workload: Any,
) -> Any:
    """Generate what the LoRA linears of a PEFT model need, and run them on it.

    Only their arithmetic changes. The layers stay PEFT's, with all that PEFT does with them: saving, loading, merging,
    switching and disabling adapters. What is not covered runs PEFT's own code, with one warning that counts the layers
    and names the reason. A second call changes nothing.

    Args:
        model: a PeftModel.
        output: the folder for the generated packages, one a rank, which can be vendored; None for one in the user's
            cache, which the report names. What is there and up to date is used as it is.
        strict: raise where a layer would be left to PEFT; the model stays as it was.
        layout: of the packages, as for ``generate``.
        workload: fields of ``Workload`` in place of what the model says (dtypes, device) and of the tokens of short and
            long batches (2048 and 16384 a step).

    Returns:
        A report: ``accelerated`` (names), ``left`` (name to reason), ``folders``, ``modules``; it prints well.

    Raises:
        ValueError: the model has no LoRA layer; a value that is not allowed; or ``strict``, and a layer is not covered.
    """
    from .from_model.live import read_model

    live = None
    with contextlib.suppress(SpecError):  # it has no linear at all; perhaps quantized ones
        live = read_model(model)
    if live is None or not live.adapted:
        return _left_to_peft(model, strict=strict)
    packages = _packages(model, live, live.adapted, output, layout, workload)
    layers = packages[0].with_peft.lora_layers(model)
    # Each layer to the package of its rank: another one would say that this rank is not there.
    groups: list[dict[str, Any]] = [{} for _ in packages]
    for name, layer in layers.items():
        groups[_of_rank(layer, packages)][name] = layer
    shares = list(zip(packages, groups, strict=True))
    report = functools.reduce(operator.add, (package.with_peft.judged(group) for package, group in shares))
    packages[0].with_peft.say(report, layers, strict=strict, stacklevel=3)
    for package, group in shares:
        package.with_peft.swap(group)
    return report


def inject_lora(
    model: nn.Module,
    r: int = 8,
    lora_alpha: float = 8,
    target_modules: str | Sequence[str] = "all-linear",
    *,
    adapter_dtype: torch.dtype | None = None,
    use_rslora: bool = False,
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
        adapter_dtype: of lora_A and lora_B; None for float32 over a 16-bit base, else the base's.
        use_rslora: scale by lora_alpha / sqrt(r).
        output, layout, workload: as for ``accelerate``.

    Returns:
        A report: ``accelerated`` (names), ``left`` (name to reason), ``folders``, ``modules``; it prints well.

    Raises:
        ValueError: the model has adapters already, nothing fits ``target_modules``, or a value is not allowed. The
            model is as it was then.
        TypeError: a linear is quantized.
    """
    from .from_model.live import read_model

    live = read_model(model)
    names = dict.fromkeys(n.rpartition(".")[2] for n, _ in model.named_modules() if _is_target(n, target_modules))
    known = {projection.name for projection in live.architecture.projections}
    wanted = [name for name in names if name in known]
    architecture = live.architecture.restricted(wanted) if wanted else live.architecture
    if adapter_dtype is not None:
        workload = {"adapter_dtype": dtype_name(adapter_dtype), **workload}
    (package,) = _packages(model, live, {r: architecture}, output, layout, workload)
    report = package.inject_lora(
        model, r, lora_alpha, target_modules, adapter_dtype=adapter_dtype, use_rslora=use_rslora
    )
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
    package = _package_of(model)
    if package is None and hasattr(model, "peft_config"):
        adapter_name = options.pop("adapter_name", "default")
        peft_model: Any = model
        peft_model.load_adapter(str(directory), adapter_name, is_trainable=True, **options)
        return
    if package is None:
        from .from_model.live import read_model

        config = json.loads((Path(directory) / "adapter_config.json").read_text(encoding="utf-8"))
        rank = config.get("r")
        if not isinstance(rank, int):
            raise SpecError(f"adapter_config.json: r = {shorten(rank)} is not allowed; give a whole number")
        output, layout = options.pop("output", None), options.pop("layout", STANDALONE)
        live = read_model(model)
        (package,) = _packages(model, live, {rank: live.architecture}, output, layout, options)
        options = {}
    package.load_adapter(model, directory, **options)


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapter in PEFT's format: adapter_config.json and the weights beside it.

    Raises:
        ValueError: the model has no generated layers.
    """
    _needed(model).save_adapter(model, directory)


def merge(model: nn.Module) -> None:
    """Put weights with the updates in them in place of the frozen ones, which are kept for ``unmerge``.

    Raises:
        ValueError: the model has no generated layers.
    """
    _needed(model).merge(model)


def unmerge(model: nn.Module) -> None:
    """Put the frozen weights back.

    Raises:
        ValueError: the model has no generated layers.
    """
    _needed(model).unmerge(model)


def disable_adapter(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within it the base model runs alone, as the reference of DPO or GRPO.

    Raises:
        ValueError: the model has no generated layers.
    """
    manager: contextlib.AbstractContextManager[None] = _needed(model).disable_adapter(model)
    return manager


def restore(model: nn.Module) -> tuple[str, ...]:
    """Let the layers of a PEFT model run PEFT's own code again.

    Returns:
        The names of the layers that ran on generated modules.
    """
    package = _package_of(model)
    names: tuple[str, ...] = () if package is None else package.restore(model)
    return names


def _is_target(name: str, target_modules: str | Sequence[str]) -> bool:
    if isinstance(target_modules, str):
        return target_modules == "all-linear" or re.fullmatch(target_modules, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in target_modules)


# Packages


def _packages(
    model: Any,
    live: LiveModel,
    by_rank: Mapping[int, Architecture],
    output: str | os.PathLike[str] | None,
    layout: str,
    workload: Mapping[str, Any],
) -> list[Any]:
    """The packages for a model, generated where they are not there or stale, and imported."""
    options, note = of_model(model, live)
    request = Request(by_rank, make_workload(**{**options, **workload}), parse_layout("layout", layout)).checked()
    if note and "device" not in workload:
        warnings.warn(note, stacklevel=3)
    if output is not None:
        return [_imported(folder) for folder in generated(request, Path(output))]
    from .emit.package import package_digest

    folders: list[Path] = []
    for rank, architecture in by_rank.items():
        # A folder for each request: models that are trained in turns don't overwrite each other's.
        key = package_digest(architecture, rank, request.workload, layout=layout).removeprefix("sha256:")[:12]
        folders += generated(replace(request, by_rank={rank: architecture}), _cache() / key)
    return [_imported(folder) for folder in folders]


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "runlora_gen"


def _imported(folder: Path) -> Any:
    """A package by its folder, as a module with its submodules; imported once, and anew if the files changed."""
    real = folder.resolve()
    content = hashlib.sha256(str(real).encode() + (real / "manifest.json").read_bytes()).hexdigest()
    name = f"runlora_gen_{real.name}_{content[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, real / "__init__.py", submodule_search_locations=[str(real)]
        )
        assert spec is not None and spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[name] = package
        try:
            spec.loader.exec_module(package)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _package_of(model: nn.Module) -> Any:
    """The package of the generated layers in a model, or None."""
    for module in model.modules():
        kind = type(module)
        if hasattr(kind, "replaces") or (hasattr(kind, "from_linear") and hasattr(module, "lora_A")):
            return importlib.import_module(kind.__module__.rpartition(".")[0])
    return None


def _left_to_peft(model: nn.Module, *, strict: bool) -> Any:
    """The report of a model none of whose LoRA layers is covered, such as a quantized one; warned of.

    Raises:
        SpecError: it has none; or ``strict``.
    """
    here, report = (_of_template(name) for name in ("peft_layers", "report"))
    layers = here.lora_layers(model)
    if not layers:
        raise SpecError("model: no LoRA layer of PEFT on a linear: wrap it first, with peft.get_peft_model")
    left = {name: here.unfit(layer) or "no adapter is active" for name, layer in layers.items()}
    line = report.left_to_peft(left)
    if strict:
        raise SpecError(line)
    warnings.warn(line, stacklevel=3)
    return report.Report((), left, (), 0)


@functools.cache
def _of_template(name: str) -> Any:
    """What every package says of a model: a file of it that depends on no linear, without a package."""
    from .emit.render import Header, render

    module = types.ModuleType(f"{__package__}._{name}")
    sys.modules[module.__name__] = module  # dataclasses look a class's module up
    exec(render(f"{name}.py.jinja", {"header": Header("", "")}), vars(module))
    return module


def _needed(model: nn.Module) -> Any:
    package = _package_of(model)
    if package is None:
        raise SpecError("model: no generated layers in it; put them in first, with accelerate or inject_lora")
    return package


def _of_rank(layer: Any, packages: Sequence[Any]) -> int:
    """Which of the packages is for the rank of a layer's active adapter, else of another one; the first if none is."""
    active = [layer.r[name] for name in layer.active_adapters if name in layer.r]
    known = [package.shapes.RANK for package in packages]
    return next((known.index(rank) for rank in [*active, *layer.r.values()] if rank in known), 0)
