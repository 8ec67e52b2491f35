"""A package of generated files for one architecture and one rank: names and texts, nothing written yet."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .. import __version__
from ..cost.device import has_kernels, turns
from ..forecast.plan import Plan, plan_for
from ..request.architecture import GENERATOR, LIVE, Architecture
from ..request.files import read_text
from ..request.layers import layers
from ..request.layout import FOLDER, STANDALONE
from ..request.mlps import Mlp
from ..request.workload import Workload
from ..search.grouped import decide_groups
from ..search.ranges import LayerChoice, decide_experts, decide_model
from .manifest import MANIFEST, folder_name, package_digest, public_part, sha256
from .nodes import ModuleNode, activations_of, module_name, module_node, shared_node
from .render import (
    MAX_GENERATED_BYTES,
    SHARED,
    Header,
    natural,
    render,
    render_module,
    render_test,
    render_test_of_experts,
)
from .report import SCHEMA_VERSION, choice_data, plan_data, plan_lines, planned_ways
from .style import Style, style_of

#: The files of a package that put its modules into a model, ``norms`` unless they are not wished, and ``copies`` for
#: these, MLPs and ``rotary``; ``groups`` and ``mlps`` are where there are some, ``plan`` where there is a budget.
OF_MODELS = (
    "__init__",
    "adapters",
    "copies",
    "inject",
    "norms",
    "peft_layers",
    "report",
    "shapes",
    "warmup",
    "with_peft",
)
#: The same where there are kernels: of norms and of rotary embeddings, and what both have in common.
OF_KERNELS = ("launches", "norm_kernels", "rotary")
#: The same of stacks of experts.
OF_EXPERTS = ("experts", "experts_with_peft", "inject_experts")
#: Where the manifest's JSON Schema is published, beside this file.
MANIFEST_SCHEMA = "manifest.schema.json"


@dataclass(frozen=True)
class Package:
    """Files of one generated folder by name, and what was chosen for its layers, groups, MLPs and experts."""

    folder: str
    files: Mapping[str, str]
    layers: tuple[LayerChoice, ...]
    groups: tuple[LayerChoice, ...] = ()
    mlps: tuple[LayerChoice, ...] = ()
    experts: tuple[LayerChoice, ...] = ()

    @property
    def modules(self) -> int:
        """How many there are."""
        return len(self.layers) + len(self.groups) + len(self.mlps) + len(self.experts)


class _Former:
    """The files of a former run: where the same text was rendered then, its formatted form is on disk already."""

    def __init__(self, folder: Path | None, style: Style) -> None:
        self._folder, self._style = folder, style
        self._rendered: dict[str, str] = {}
        self._files: dict[str, str] = {}
        try:
            manifest = json.loads(self._read(MANIFEST))
            if manifest["generator"] == GENERATOR:
                self._rendered, self._files = dict(manifest["rendered"]), dict(manifest["files"])
        except (ValueError, TypeError, KeyError, RecursionError):
            pass  # nothing to reuse: everything is formatted anew

    def _read(self, name: str) -> str:
        """The text of one of the files; ValueError if there is none to reuse."""
        if self._folder is None:
            raise ValueError
        return read_text(self._folder / name, label=name, limit=MAX_GENERATED_BYTES, kind="generated file")

    def format(self, rendered: Mapping[str, str]) -> dict[str, str]:
        """Format rendered texts, or read them formatted from files that nobody has touched since."""
        kept = {name: text for name, source in rendered.items() if (text := self._kept(name, source)) is not None}
        anew = [name for name in rendered if name not in kept]
        formatted = dict(zip(anew, self._style.format([rendered[name] for name in anew]), strict=True)) if anew else {}
        return {name: kept[name] if name in kept else formatted[name] for name in rendered}

    def _kept(self, name: str, source: str) -> str | None:
        """The formatted text of a file, if it is that of this rendered one."""
        if self._rendered.get(name) == self.digest(source):
            with contextlib.suppress(ValueError):
                text = self._read(name)
                if self._files.get(name) == sha256(text):
                    return text
        return None

    def digest(self, source: str) -> str:
        """Of what a formatted text follows from: the rendered one, black's version and its options."""
        return sha256(f"{self._style.key}\n{source}")


def build_package(
    architecture: Architecture,
    rank: int,
    workload: Workload,
    *,
    out: Path,
    line_length: int | None = None,
    all_variants: bool = False,
    layout: str = STANDALONE,
    reuse: bool = True,
) -> Package:
    """Choose and render everything for one rank.

    Args:
        architecture, rank, workload: what to generate for.
        out: the folder that will hold the package: the text is formatted as the repository around it.
        line_length: in place of that repository's.
        all_variants: every enumerated program in each module.
        layout: ``standalone`` or ``folder``: whether each module has what they share, or their folder.
        reuse: take files of an earlier package there where they would be the same.

    Raises:
        SpecError: a constraint that no variant meets, or a repository whose style can't be read.
    """
    folder = folder_name(architecture, rank)
    style = style_of(out / folder, line_length)
    public = public_part(workload)
    header = Header(
        command=_command(architecture, rank, public, all_variants, layout, line_length),
        digest=package_digest(architecture, rank, workload, all_variants=all_variants, layout=layout),
    )
    decided = decide_model(workload, layers(architecture), rank)
    several = decide_groups(workload, architecture, rank)
    together, whole = (
        tuple(choice for choice in several if isinstance(choice.layer, Mlp) is of_mlps) for of_mlps in (False, True)
    )
    routed = decide_experts(workload, architecture, rank)
    plan = None
    if workload.memory_budget is not None:
        # An MLP that is not computed as a whole at all token counts is none in the plan either.
        plan, steps = plan_for(architecture if whole else replace(architecture, gated=()), rank, workload)
        if plan.ways.remade and steps.remade is not None:
            whole = tuple(replace(choice, least=steps.remade.decision) for choice in whole)
    nodes, groups, mlps, stacks = (
        [
            module_node(choice, rank, workload, width=style.line_length, all_variants=all_variants, layout=layout)
            for choice in choices
        ]
        for choices in (decided, together, whole, routed)
    )
    every = (*nodes, *groups, *mlps, *stacks)
    rendered = {f"{node.name}.py": render_module(node, header) for node in every}
    shared = _shared(every, header) if layout == FOLDER else {}
    chained = any(node.handing for node in stacks)
    # A kernel is for norms whose weight has an offset; torch has one for those without.
    norm_kernels, rotary = workload.norms == "auto" and has_kernels(workload), turns(workload)
    context = {
        "header": header,
        "title": architecture.slug,
        "modules": nodes,
        "groups": groups,
        "mlps": mlps,
        "experts": stacks,
        "chained": chained,
        "rank": rank,
        "dropout": workload.dropout > 0,
        "folder": layout == FOLDER,
        "kernels": "kernels" in shared,
        "quantized": workload.quantized,
        "base": workload.stored,
        "norms": workload.norms == "auto",
        "rotary": rotary,
        "norm_kernels": norm_kernels,
        "launches": norm_kernels or rotary,
        "plan": plan,
        # Whether norms make again what they gave.
        "renorms": plan is not None and steps.renormed is not None and plan.ways.remade + plan.ways.renormed > 0,
        # Whether it counts on norms that keep their input as it is, and how many a layer has.
        "norms_of_layer": 0 if architecture.decoder is None else architecture.decoder.norms,
        "lean": plan is not None and steps.lean,
        "plan_lines": [] if plan is None else plan_lines(plan, workload),
        "plan_ways": "" if plan is None else planned_ways(plan, workload),
        "workload": workload,
        "imported": sorted((node.name for node in every), key=natural),
    }
    rendered |= {f"{name}.py": text for name, text in shared.items()}
    unneeded = {"norms"} if workload.norms == "none" else set()
    unneeded |= {"copies"} if unneeded and not (mlps or rotary) else set()
    in_models = (
        *(name for name in OF_MODELS if name not in unneeded),
        *(["groups"] if groups or mlps else []),
        *(["mlps"] if mlps else []),
        *(name for name in OF_KERNELS if context[name]),
        *(["plan"] if plan is not None else []),
        *(OF_EXPERTS if stacks else ()),
    )
    rendered |= {f"{name}.py": render(f"{name}.py.jinja", context) for name in in_models}
    if nodes:
        rendered["test_equivalence.py"] = render_test(
            [node.name for node in nodes],
            groups=groups,
            mlps=mlps,
            activations=activations_of(mlps),
            dropout=workload.dropout > 0,
            base=workload.stored,
            shared=shared,
            header=header,
        )
    if stacks:
        rendered["test_experts.py"] = render_test_of_experts(
            [node.name for node in stacks],
            activations=activations_of(stacks),
            dropout=workload.dropout > 0,
            shared=shared,
            header=header,
        )
    former = _Former(out / folder if reuse else None, style)
    files = former.format(rendered)
    files["py.typed"] = ""
    digests = {name: former.digest(source) for name, source in rendered.items()}
    choices = (decided, together, whole, routed)
    files[MANIFEST] = _manifest(architecture, rank, public, header, style, choices, plan, digests, files)
    return Package(folder, files, decided, together, whole, routed)


def _shared(modules: Sequence[ModuleNode], header: Header) -> Mapping[str, str]:
    """The files of what these modules share, by name."""
    node = shared_node(modules)
    wanted = {"base": node.lone or node.groups, "quantized": node.quantized}
    wanted |= {"routing": node.experts, "kernels": bool(node.kernels)}
    names = [name for name in SHARED if wanted.get(name, True)]
    return {name: render(f"{name}.py.jinja", {"header": header, "module": node}) for name in names}


def _command(
    architecture: Architecture,
    rank: int,
    workload: Workload,
    all_variants: bool,
    layout: str,
    line_length: int | None,
) -> str:
    """The command that makes this package when run in the folder above it; only what is not a default."""
    default = Workload()
    source = architecture.name if architecture.source == "catalogue" else architecture.source
    if source == LIVE:
        source = f"{folder_name(architecture, rank)}/{MANIFEST}"
    elif not re.fullmatch(r"[A-Za-z0-9._/-]+", source):
        source = "CONFIG"  # a folder's name may hold anything, even a line break: it never reaches a file
    words = ["runlora-gen", "--arch", source, "--rank", str(rank)]
    if architecture.package is not None:
        words += ["--name", architecture.package]
    if workload.target_modules:
        words += ["--target-modules", ",".join(workload.target_modules)]
    if workload.target_parameters:
        words += ["--target-parameters", ",".join(workload.target_parameters)]
    if workload.model_type is not None:
        words += ["--model-type", workload.model_type]
    if workload.tokens != default.tokens:
        words += ["--tokens", ",".join(map(str, workload.tokens))]
    for name in (
        "dtype",
        "adapter_dtype",
        "criterion",
        "device",
        "launch",
        "merge_rounding",
        "groups",
        "norms",
        "rotary",
        "bias",
    ):
        if getattr(workload, name) != getattr(default, name):
            words += [f"--{name.replace('_', '-')}", getattr(workload, name)]
    for name in ("base", "float8"):
        if getattr(workload, name) != getattr(default, name):
            words += [f"--{name}", getattr(workload, name)]
    if workload.dropout:
        words += ["--dropout", str(workload.dropout)]
    if workload.train != default.train:
        words += ["--train", ",".join(workload.train)]
    if not workload.input_grad:
        words.append("--no-input-grad")
    if workload.max_saved_bytes is not None:
        words += ["--max-saved-bytes", str(workload.max_saved_bytes)]
    for name in ("memory_budget", "sequence"):
        if (value := getattr(workload, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if not workload.kernels:
        words.append("--no-kernels")
    if workload.allow_lossy_merge:
        words.append("--allow-lossy-merge")
    if all_variants:
        words.append("--all-variants")
    if layout != STANDALONE:
        words += ["--layout", layout]
    if line_length is not None:
        words += ["--line-length", str(line_length)]
    return shlex.join([*words, "-o", "."])


def _manifest(
    architecture: Architecture,
    rank: int,
    workload: Workload,
    header: Header,
    style: Style,
    decided: Sequence[Sequence[LayerChoice]],
    plan: Plan | None,
    rendered: Mapping[str, str],
    files: Mapping[str, str],
) -> str:
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "generator": GENERATOR,
        "generator_version": __version__,
        "licence": header.licence,
        "command": header.command,
        "digest": header.digest,
        "style": sha256(style.key),
        "arch": architecture.slug,
        "projections": [asdict(projection) for projection in architecture.projections],
        "stacks": [asdict(stack) for stack in architecture.stacks],
        "gated": [asdict(gated) for gated in architecture.gated],
        "decoder": [asdict(architecture.decoder)] if plan is not None and architecture.decoder is not None else [],
        "plan": None if plan is None else plan_data(plan),
        "model_type": architecture.model_type,
        "rank": rank,
        "workload": {**asdict(workload), "tokens": list(workload.tokens), "train": list(workload.train)},
        **{
            kind: [{"module": module_name(choice.layer, rank), "rank": rank, **choice_data(choice)} for choice in some]
            for kind, some in zip(("layers", "groups", "mlps", "experts"), decided, strict=True)
        },
        "files": {name: sha256(text) for name, text in sorted(files.items())},
        "rendered": dict(sorted(rendered.items())),
    }
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
