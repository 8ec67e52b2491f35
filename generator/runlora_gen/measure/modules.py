"""Generated modules to run: rendered, written, imported."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from ..algebra.enumerate import enumerate_programs
from ..algebra.mlp import LINEARS
from ..algebra.operations import Operation
from ..cost.lower import with_kernels
from ..emit.nodes import module_name, module_node
from ..emit.render import render_module as text_of
from ..kernels.sites import alternatives
from ..request.experts import Experts
from ..request.mlps import Mlp
from ..request.workload import Workload
from ..search.candidates import Site, goals, setting_of
from ..search.choose import Decision, decide, decide_forward
from ..search.criterion import Priced
from ..search.ranges import LayerChoice, Range
from .problem import Point

#: Columns of a line of what is only run.
_WIDTH = 120


def render_module(
    choice: LayerChoice, rank: int, workload: Workload, path: Path, *, all_variants: bool = False
) -> ModuleType:
    """Render the module of a site into a folder, which must not exist, and import it under a name of its own."""
    node = module_node(choice, rank, workload, width=_WIDTH, all_variants=all_variants)
    path.mkdir(parents=True)
    file = path / f"{module_name(choice.layer, rank)}.py"  # Triton reads the source of its kernels: it must be a file
    file.write_text(text_of(node), encoding="utf-8")
    return import_file(file, f"{path.name}_{file.stem}")


def one_choice(site: Site, workload: Workload, decision: Decision) -> LayerChoice:
    """A layer or a group with one decision for all token counts."""
    forward = decide_forward(workload, decision.setting, decision.host_share)
    return LayerChoice(site, (Range(decision, None),), (Range(forward, None),))


def import_file(path: Path, name: str) -> ModuleType:
    """Import a file under a name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def module_of_experts(workload: Workload, path: Path, gathers: bool, activation: str = "") -> ModuleType:
    """A module with every operation and, where the workload has them, every kernel of a projection of experts."""
    return _module_of(Experts(4, 64, 64, gathers, 2, False, 1, ("experts",), activation=activation), workload, path)


def module_of_mlp(workload: Workload, path: Path, activation: str) -> ModuleType:
    """The same of a gated MLP."""
    return _module_of(Mlp(64, 64, 64, activation, False, 1, (LINEARS,)), workload, path)


def _module_of(site: Site, workload: Workload, path: Path) -> ModuleType:
    """A module with all that a site has: of many programs as few as hold it."""
    rank = 8
    setting = setting_of(workload, site, rank, 4096)
    single = alternatives(setting.derivation, "cheaper") if workload.kernels else ()
    decision, known = decide(workload, setting), set[Operation]()
    held = []
    table = setting.derivation.rows(lambda _: workload.kernels)
    for each in enumerate_programs(setting.derivation, goals(workload, setting.derivation), table=table):
        for program in (each, with_kernels(each, single)):
            if not known.issuperset(program.operations):
                known.update(program.operations)
                held.append(Priced(program, decision.chosen.cost))
    decision = replace(decision, candidates=tuple(held))
    return render_module(one_choice(site, workload, decision), rank, workload, path, all_variants=True)


def module_of_everything(workload: Workload, path: Path) -> ModuleType:
    """A module with every operation and, where the workload's device has them, every kernel of its site."""
    point = Point(4096, 64, 64, 8)
    decision = of_everything(workload, decide(workload, point.setting(workload)))
    return render_module(one_choice(point.layer, workload, decision), point.rank, workload, path, all_variants=True)


def of_everything(workload: Workload, decision: Decision) -> Decision:
    """The decision with candidates that have all of that: every program, with torch's products and with kernels.

    Also what was never measured, and that no choice is made of for that; their prices are of no interest.
    """
    setting = decision.setting
    if workload.kernels and setting.device.kernels:
        every = enumerate_programs(setting.derivation, goals(workload, setting.derivation), facts=setting.facts)
        single = alternatives(setting.derivation, "cheaper")
        programs = dict.fromkeys(each for program in every for each in (program, with_kernels(program, single)))
        known = {c.program for c in decision.candidates}
        added = (Priced(program, decision.chosen.cost) for program in programs if program not in known)
        decision = replace(decision, candidates=(*decision.candidates, *added))
    return decision
