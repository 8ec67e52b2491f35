"""The packages that serve a model: generated where they are not there or stale, and imported."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..generation import Request, generated, of_model
from ..request.cache import own_folder
from ..request.errors import SpecError
from ..request.layout import parse_layout
from ..request.workload import make_workload

if TYPE_CHECKING:
    from torch import nn

    from ..from_model.live import LiveModel
    from ..request.architecture import Architecture


def packages_for(
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
    for line in () if "float8" in workload else request.rounding():
        warnings.warn(line.removeprefix("note: ").replace("--float8 ", "float8="), stacklevel=3)
    if output is not None:
        return [imported(folder) for folder in generated(request, Path(output))]
    from ..emit.manifest import package_digest

    folders: list[Path] = []
    for rank, architecture in by_rank.items():
        # A folder for each request: models that are trained in turns don't overwrite each other's.
        key = package_digest(architecture, rank, request.workload, layout=layout).removeprefix("sha256:")[:12]
        folders += generated(replace(request, by_rank={rank: architecture}), own_folder() / key)
    return [imported(folder) for folder in folders]


def imported(folder: Path) -> Any:
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


def package_of(model: nn.Module) -> Any:
    """The package of the generated layers in a model, of the first if there are several, or None."""
    return next(packages_in(model), None)


def packages_in(model: nn.Module) -> Iterator[Any]:
    """The packages of the generated layers in a model: one for each rank."""
    found = set()
    for module in model.modules():
        kind = type(module)
        # What stands in front of a model's own class is ours, and may be called as that.
        front = kind.__bases__[0] if hasattr(kind, "replaces") else kind
        name = front.__module__.rpartition(".")[0]
        ours = hasattr(kind, "from_linear") or hasattr(module, "stack")  # a linear's, or one of a stack of experts
        generated = hasattr(kind, "replaces") or (ours and hasattr(module, "lora_A"))
        if generated and name not in found:
            found.add(name)
            yield importlib.import_module(name)


def needed(model: nn.Module) -> Any:
    package = package_of(model)
    if package is None:
        raise SpecError("model: no generated layers in it; put them in first, with accelerate or inject_lora")
    return package


def of_rank(layer: Any, packages: Sequence[Any]) -> int:
    """Which of the packages is for the base and the rank of a layer's active adapter, else of another one.

    The first for its base if none is; the first if none is for that.
    """
    active = [layer.r[name] for name in layer.active_adapters if name in layer.r]
    here = packages[0].peft_layers
    stack, base = here.is_stack(layer), here.base_of(layer)
    fits = [hasattr(p, "experts_with_peft") if stack else base == p.shapes.BASE for p in packages]
    fitting = [at for at, fit in enumerate(fits) if fit]
    known = {packages[at].shapes.RANK: at for at in reversed(fitting)}
    return next((known[rank] for rank in [*active, *layer.r.values()] if rank in known), (fitting or [0])[0])


@functools.cache
def of_template(name: str) -> Any:
    """What every package says of a model: a file of it that depends on no linear, without a package."""
    from ..emit.render import Header, render

    module = types.ModuleType(f"{__package__}._{name}")
    sys.modules[module.__name__] = module  # dataclasses look a class's module up
    exec(render(f"{name}.py.jinja", {"header": Header("", "")}), vars(module))
    return module
