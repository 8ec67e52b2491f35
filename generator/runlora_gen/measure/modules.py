"""Generated modules to run: rendered, written, imported."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from ..algebra.table import TWINS
from ..choose import Priced, Range, decide
from ..cost.lower import with_kernels
from ..emit.nodes import module_name, module_node
from ..emit.render import Header, render
from ..spec.layers import Layer
from ..spec.workload import Workload
from .problem import Point


def render_module(
    layer: Layer, rank: int, workload: Workload, ranges: Sequence[Range], path: Path, *, all_variants: bool = False
) -> ModuleType:
    """Render the module of a layer into a folder, which must not exist, and import it under a name of its own."""
    node = module_node(layer, rank, workload, ranges, all_variants=all_variants)
    path.mkdir(parents=True)
    file = path / f"{module_name(layer, rank)}.py"  # Triton reads the source of its kernels: it must be a file
    file.write_text(render("linear.py.jinja", {"header": Header("", ""), "module": node}), encoding="utf-8")
    return import_file(file, f"{path.name}_{file.stem}")


def import_file(path: Path, name: str) -> ModuleType:
    """Import a file under a name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def module_of_everything(workload: Workload, path: Path) -> ModuleType:
    """A module with every operation and, where the workload's device has them, every kernel of the table."""
    point = Point(4096, 64, 64, 8)
    setting = point.setting(workload)
    decision = decide(workload, setting)
    if workload.kernels and setting.device.kernels:
        twins = tuple(TWINS.values())
        programs = [Priced(with_kernels(c.program, twins), c.cost) for c in decision.candidates]
        decision = replace(decision, candidates=(*decision.candidates, *programs))
    return render_module(point.layer, point.rank, workload, (Range(decision, None),), path, all_variants=True)
