"""Typed nodes for the templates: every decision is made here, the templates only ask."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import assert_never

from ..algebra.derivation import Argument, Derivation
from ..algebra.enumerate import Phase, Program
from ..algebra.liveness import dependents
from ..algebra.mlp import OF_MLPS
from ..algebra.operations import Fused
from ..cost.setting import Setting
from ..kernels.registry import KERNELS
from ..kernels.sites import draws, seeded
from ..request.activations import Activation
from ..request.bases import Base
from ..request.experts import Experts
from ..request.groups import Group
from ..request.layers import Layer
from ..request.layout import FOLDER, STANDALONE
from ..request.mlps import Mlp
from ..request.workload import TORCH_NAMES, Workload
from ..search.candidates import Site, setting_of, trained
from ..search.choose import Decision, ForwardDecision
from ..search.criterion import Priced
from ..search.ranges import LayerChoice
from .code import dtype_of, helpers_of, numbers_of
from .derivation_text import forward_text, program_text
from .kernel_notes import KernelCall, KernelNode, Tiles, kernels_note, listed, tiles_note
from .statements import (
    Block,
    Parts,
    absent,
    backward_blocks,
    forward_statements,
    guard,
    parts_of_forward,
    unpack_needs,
    witnesses,
)
from .units import show_reason

#: What a line of a comment on a constant begins with.
_COMMENT = "#: "


@dataclass(frozen=True)
class FunctionNode:
    """One ``torch.autograd.Function``."""

    class_name: str
    id: str
    doc: tuple[str, ...]
    forward: tuple[str, ...]
    parts: Parts | None  # what makes what is kept, and what makes the output of it
    outputs: tuple[str, ...]  # of the site, and what is kept beside them
    kept: tuple[str, ...]  # what the forward makes for the backward
    inputs: str  # the left side that takes from the inputs what is saved or asked
    needs: str  # the left side that unpacks needs_input_grad for what is saved
    saves: tuple[tuple[str, str], ...]  # symbol, condition
    backward_needs: str
    backward: tuple[Block, ...]
    gradients: tuple[str, ...]  # dX, dA, … that it can give
    absent: tuple[str, ...]  # what the backward reads where it was not wanted, too
    reread: frozenset[str]  # those of them that are read again: several blocks add to them, or others follow
    returns: tuple[str, ...]
    keeps: tuple[str, ...]  # of the inputs that are no tensors, those that the backward reads
    dtypes: tuple[str, ...]  # variables that hold the dtypes of trained parameters
    seeded: bool


@dataclass(frozen=True)
class ForwardNode:
    """A function that computes the outputs alone."""

    name: str
    doc: tuple[str, ...]
    arguments: tuple[Argument, ...]
    forward: tuple[str, ...]
    seeded: bool


@dataclass(frozen=True)
class RangeNode:
    """Up to ``last_tokens`` (None: no end) use ``chosen``; on 16-bit weights ``fallback`` if that differs."""

    last_tokens: int | None
    chosen: str
    fallback: str | None


@dataclass(frozen=True, kw_only=True)
class SharedNode:
    """What modules of one workload share, and the fused kernels that they bring.

    Attributes:
        rank: of the adapters.
        arguments: of the autograd functions.
        trains: arguments that may require a gradient.
        frozen: the other ones, and why they must not.
        wide_adapter: whether the adapter is in float32 by default, over 16-bit weights too.
        lossy_merge: whether 16-bit weights may be merged.
        dropout: whether the adapter's input may be dropped while training.
        base: how the frozen weights are stored.
        dtype: torch's name of the dtype that the modules are generated for.
        helpers: functions that lines call, and what the kernels need of their common code.
        calls: of fused kernels.
        function: what the module's function is called, or where several share this, that of the lone linears.
        linears: those of a group; none of a lone linear.
        lone: whether any module of those that share this is of a lone linear.
        groups: whether any is of several linears, a group's or an MLP's.
        of_groups, mlps: whether any is a group's, and whether any is an MLP's.
        experts: whether any is of experts.
        activations: those that modules of experts and of MLPs compute.
        handing: whether any is of experts that hand over to such modules.
        folder: whether what they share stands once in their folder, and not in each of them.
        width: columns of a line.
    """

    rank: int
    arguments: tuple[Argument, ...]
    trains: tuple[str, ...]
    frozen: tuple[tuple[str, str], ...]
    wide_adapter: bool
    lossy_merge: bool
    dropout: bool
    base: Base
    dtype: str
    helpers: frozenset[str]
    calls: tuple[KernelCall, ...]
    function: str
    linears: tuple[str, ...]
    lone: bool
    groups: bool
    of_groups: bool
    mlps: bool
    experts: bool
    activations: tuple[Activation, ...]
    handing: bool
    folder: bool
    width: int

    @property
    def between(self) -> tuple[Activation, ...]:
        """The activations of MLPs: of those of experts gate and up may be no matrices of their own."""
        return tuple(each for each in self.activations if each.of_mlps)

    @property
    def quantized(self) -> bool:
        """Whether the base's weight is given as codes."""
        return self.base.form != "plain"

    @property
    def differentiable(self) -> str:
        """Which arguments get gradients, for people."""
        plural = {"lora_A": "lora_As", "lora_B": "lora_Bs", "bias": "biases"} if self.linears else {}
        return listed([plural.get(name, name) for name in self.trains])

    @cached_property
    def kernels(self) -> tuple[KernelNode, ...]:
        """The fused kernels, by their names."""
        return tuple(map(KernelNode, sorted({call.operation.kernel for call in self.calls})))

    @property
    def kernels_note(self) -> tuple[str, ...]:
        """What these need and take, in lines of a comment."""
        return self._comment(kernels_note(self.kernels))

    @property
    def tiles(self) -> Tiles:
        """Compile-time constants of the kernels by what they compute."""
        return tuple((call.key, call.tiles) for call in self.calls)

    @property
    def small_tiles(self) -> Tiles:
        """The same for GPUs without tensor descriptors."""
        return tuple((call.key, call.small_tiles) for call in self.calls if call.small_tiles)

    @property
    def tiles_note(self) -> tuple[str, ...]:
        """Where they come from, in lines of a comment."""
        return self._comment(tiles_note(self.calls))

    def _comment(self, text: str) -> tuple[str, ...]:
        return tuple(textwrap.wrap(text, self.width - len(_COMMENT)))


@dataclass(frozen=True, kw_only=True)
class ModuleNode(SharedNode):
    """One generated module, of a lone linear, of a group or of experts.

    Attributes:
        site: what it is for.
        out_features: of a group a tuple, of each linear.
        projections: of a group, the names in the model of its linears, in each kind that it serves.
        bias: whether a lone linear has one by default.
        outputs, output_gradients: of its functions.
        witnesses: arguments on which gradients depend.
        ranges: ids of variants.
        forward_ranges: functions that compute the outputs alone.
        least: the id of the variant for layers that keep as little as they can, or None.
    """

    site: Site
    name: str
    title: str
    notes: tuple[str, ...]
    in_features: int
    out_features: int | tuple[int, ...]
    intermediate_features: int
    projections: tuple[tuple[str, ...], ...]
    bias: bool
    outputs: tuple[str, ...]
    output_gradients: tuple[str, ...]
    witnesses: tuple[str, ...]
    functions: tuple[FunctionNode, ...]
    forwards: tuple[ForwardNode, ...]
    ranges: tuple[RangeNode, ...]
    forward_ranges: tuple[RangeNode, ...]
    least: str | None

    @property
    def is_of_experts(self) -> bool:
        """Whether it is of a stack of experts."""
        return isinstance(self.site, Experts)

    @property
    def hands(self) -> bool:
        """Whether it hands over to the module after the activation."""
        return isinstance(self.site, Experts) and self.site.gathers and bool(self.site.activation)

    @property
    def activates(self) -> bool:
        """Whether it reads what goes into an activation."""
        return isinstance(self.site, Experts) and not self.site.gathers and bool(self.site.activation)


@dataclass(frozen=True)
class _Variant:
    """A program that a module has, with what its docstring says beside its price."""

    decision: Decision
    candidate: Priced
    note: str

    @property
    def program(self) -> Program:
        return self.candidate.program


def module_node(
    choice: LayerChoice,
    rank: int,
    workload: Workload,
    *,
    width: int,
    all_variants: bool = False,
    layout: str = STANDALONE,
) -> ModuleNode:
    """The module of a layer or of a group: the chosen variants, or all that were enumerated.

    ``width``: columns of a line.
    """
    site = choice.layer
    linears = site.linears if isinstance(site, Group | Mlp) else ()
    folder = layout == FOLDER
    owner = site.name if folder else ""
    variants = _variants(choice.with_all(workload) if all_variants else choice, all_variants)
    alone = len(variants) == 1
    programs = {
        f"_LoRA{_kind(site).title()}Function" if alone else _class_name(v.program, site, number): v.program
        for number, v in enumerate(variants, start=1)
    }
    functions = tuple(
        _function(variant, workload, class_name, owner, width)
        for variant, class_name in zip(variants, programs, strict=True)
    )
    forwards, forward_ranges = _forwards(choice, workload, programs, owner, width)
    operations = [operation for program in programs.values() for operation in program.operations]
    operations += [operation for phase in forwards for operation in phase.operations]
    fused = list(dict.fromkeys(op for op in operations if isinstance(op, Fused)))
    # One set of constants for all token counts: those of the largest, where a step takes longest.
    most = max(workload.tokens)
    sizes = setting_of(workload, site, rank, most).sizes
    setting = replace(choice.ranges[-1].decision.setting, tokens=most, sizes=sizes)
    trains, frozen = _trained(setting.derivation, workload)
    activation = site.activated if isinstance(site, Experts | Mlp) else None
    return ModuleNode(
        site=site,
        name=module_name(site, rank),
        title=_title(site, rank),
        notes=tuple(line for note in _notes(site) for line in textwrap.wrap(note, width)),
        function=function_name(site),
        linears=linears,
        lone=isinstance(site, Layer),
        groups=bool(linears),
        of_groups=isinstance(site, Group),
        mlps=isinstance(site, Mlp),
        experts=isinstance(site, Experts),
        activations=() if activation is None else (activation,),
        handing=isinstance(site, Experts) and activation is not None,
        in_features=site.in_features,
        out_features=site.out_features,
        intermediate_features=site.intermediate_features if isinstance(site, Mlp) else 0,
        projections=site.projections if isinstance(site, Group | Mlp) else (),
        rank=rank,
        bias=site.bias,
        outputs=tuple(map(str, setting.derivation.outputs)),
        output_gradients=tuple(map(str, setting.derivation.output_gradients)),
        arguments=setting.derivation.arguments,
        witnesses=witnesses(setting.derivation),
        functions=functions,
        forwards=tuple(forwards.values()),
        ranges=_ranges(choice),
        forward_ranges=forward_ranges,
        least=None if choice.least is None else choice.least.chosen.program.id,
        trains=trains,
        frozen=frozen,
        wide_adapter=workload.adapter_dtype == "fp32",
        lossy_merge=workload.allow_lossy_merge,
        dropout=workload.dropout > 0,
        base=workload.stored,
        dtype=f"torch.{TORCH_NAMES[workload.dtype]}",
        helpers=frozenset[str]().union(*(KERNELS[op.kernel].helpers for op in fused), *map(helpers_of, operations)),
        calls=tuple(KernelCall(op, setting, owner) for op in fused),
        folder=folder,
        width=width,
    )


def shared_node(modules: Sequence[ModuleNode]) -> SharedNode:
    """What all of these modules, of one workload and rank, take from the files of their folder."""
    values = {field.name: getattr(modules[0], field.name) for field in dataclasses.fields(SharedNode)}
    values["helpers"] = frozenset[str]().union(*(module.helpers for module in modules))
    values["calls"] = tuple(call for module in modules for call in module.calls)
    for kind in ("lone", "groups", "of_groups", "mlps", "experts", "handing"):
        values[kind] = any(getattr(module, kind) for module in modules)
    values["activations"] = activations_of(modules)
    return SharedNode(**values)


def activations_of(modules: Iterable[ModuleNode]) -> tuple[Activation, ...]:
    """The activations of modules, each once."""
    return tuple({each.name: each for module in modules for each in module.activations}.values())


def _variants(choice: LayerChoice, all_variants: bool) -> tuple[_Variant, ...]:
    """The programs of a module, each once: those that were chosen, in the order of their ranges, then all others.

    After the chosen ones stands that which keeps the least, where a plan asks for one.
    """
    found: dict[str, _Variant] = {}

    def add(decision: Decision, candidate: Priced, note: str = "") -> None:
        found.setdefault(candidate.program.id, _Variant(decision, candidate, note))

    for decision in (part.decision for part in choice.ranges):
        reason = show_reason(decision)
        add(decision, decision.chosen, f"The runner-up lost: {reason}" if reason else "")
        add(decision, decision.fallback, "For 16-bit weights: it merges nothing, so no small update is lost")
    if choice.least is not None:
        add(choice.least, choice.least.chosen, "For layers of which the plan wants that they keep the least")
    if all_variants:
        decision = choice.ranges[-1].decision
        for candidate in decision.candidates:
            add(decision, candidate)
    return tuple(found.values())


def _ranges(choice: LayerChoice) -> tuple[RangeNode, ...]:
    """Which variant trains where."""
    nodes = []
    for part in choice.ranges:
        chosen, fallback = part.decision.chosen.program, part.decision.fallback.program
        nodes.append(RangeNode(part.last_tokens, chosen.id, None if fallback is chosen else fallback.id))
    return tuple(nodes)


def _trained(derivation: Derivation, workload: Workload) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """The arguments that may require a gradient in a module of a workload, and the others with the reason."""
    given = {gradient.partition("_")[0] for gradient in trained(workload, derivation)}  # dA_q stands for all of a group
    arguments = (
        ("x", derivation.arguments[0].gradient, "it was generated with --no-input-grad"),
        ("lora_A", "dA", "it was generated with lora_A frozen (--train b)"),
        ("lora_B", "dB", "it was generated with lora_B frozen (--train a)"),
        ("bias", "db", "biases of experts are not trained"),
        ("weights", "dg", ""),
    )
    possible = [each for each in arguments if each[0] != "weights" or "dg" in derivation.symbols]
    return (
        tuple(argument for argument, gradient, _ in possible if gradient in given),
        tuple((argument, why) for argument, gradient, why in possible if gradient not in given),
    )


def _kind(site: Site) -> str:
    """What a site is, in a word."""
    match site:
        case Layer():
            return "linear"
        case Group():
            return "group"
        case Experts():
            return "experts"
        case Mlp():
            return site.kind
        case _:
            assert_never(site)


def module_name(site: Site, rank: int) -> str:
    """The module's file name without its ending; what it computes and the shape are the name."""
    return f"{f'linear_{site.name}' if isinstance(site, Layer) else site.name}_r{rank}"


def function_name(site: Site) -> str:
    """The name of its function."""
    return f"lora_{site.kind if isinstance(site, Group) else _kind(site)}"


def _title(site: Site, rank: int) -> str:
    if isinstance(site, Mlp):
        sizes = f"{site.in_features} to {site.intermediate_features} to {site.out_features} features, rank {rank}"
        return f"LoRA of a gated MLP, {sizes}"
    if isinstance(site, Layer):
        return f"LoRA linear, {site.in_features} to {site.out_features} features, rank {rank}"
    if isinstance(site, Experts):
        what = "that read tokens" if site.gathers else "that give tokens"
        what += "" if site.activated is None else f" {'for' if site.gathers else 'after'} an activation"
        sizes = f"{site.in_features} to {site.out_features} features, rank {rank}"
        return f"LoRA of {site.experts} experts {what}, {sizes}"
    widths = listed([str(width) for width in site.out_features])
    return f"LoRA linears {listed(site.linears)} of one input, {site.in_features} to {widths} features, rank {rank}"


def _notes(site: Site) -> tuple[str, ...]:
    if isinstance(site, Layer):
        notes = [f"Serves {', '.join(site.projections)} ({site.count} linears in the model)."]
        taken = "LoRALinear.from_linear takes such a layer; to lora_linear pass weight.t()"
    elif isinstance(site, Experts):
        notes = [f"Serves {', '.join(site.projections)} ({site.count} stacks in the model)."]
        if site.activated is not None:
            other = "last" if site.gathers else "first"
            notes.append(f"It is a chain with the module of the same experts' {other} projection: {site.activation}.")
        if site.transposed_weight:
            names = ", ".join(site.transposed_weight)
            notes.append(f"Models store {names} as experts x in_features x out_features: pass weight.mT.")
        return tuple(notes)
    else:
        kinds = "; ".join(listed(tuple(dict.fromkeys(names))) for names in site.projections)
        of = "MLPs" if isinstance(site, Mlp) else "groups"
        notes = [f"Serves {kinds} ({site.count} such {of} in the model)."]
        if isinstance(site, Mlp):
            notes.append(f"Between them is {site.activation}.")
        taken = f"to {function_name(site)} pass weight.t()"
    if site.transposed_weight:
        notes.append(
            f"Checkpoints store the weight of {', '.join(site.transposed_weight)} as in_features x out_features "
            f"(Conv1D): {taken}."
        )
    return tuple(notes)


def _class_name(program: Program, site: Site, number: int) -> str:
    """After the program's id; that of an MLP is long, so that it goes by its number in the module."""
    if isinstance(site, Mlp):
        return f"_Variant{number}"
    words = program.id.replace("/", "_").replace("-", "_").split("_")
    return "_" + "".join(word.capitalize() for word in words)


def _forwards(
    choice: LayerChoice, workload: Workload, programs: Mapping[str, Program], owner: str, width: int
) -> tuple[Mapping[Phase, ForwardNode], tuple[RangeNode, ...]]:
    """The functions that compute Y alone, where the forward of no variant does just that, and which to use when."""
    made: dict[Phase, ForwardNode] = {}

    def named(phase: Phase, decision: ForwardDecision) -> str:
        for class_name, program in programs.items():
            if program.forward.ways == phase.ways:
                return f"{class_name}.forward"
        if phase not in made:
            stem = f"_forward_{phase.name.replace('-', '_')}"
            taken = sum(node.name.startswith(stem) for node in made.values())
            name = f"{stem}{f'_{taken + 1}' if taken else ''}"
            made[phase] = ForwardNode(
                name,
                tuple(forward_text(phase, decision, workload, width)),
                phase.derivation.arguments,
                forward_statements(phase, decision.setting, owner),
                seeded(phase),
            )
        return made[phase].name

    parts = []
    for part in choice.forwards:
        chosen, fallback = part.decision.chosen, part.decision.fallback
        parts.append(
            RangeNode(
                part.last_tokens,
                named(chosen, part.decision),
                None if fallback is chosen else named(fallback, part.decision),
            )
        )
    return made, tuple(parts)


def _parts(program: Program, setting: Setting, owner: str) -> Parts | None:
    """The forward of a lone linear or of an MLP in two parts, see there; no group's, and no expert's."""
    site = program.derivation
    whole = len(site.outputs) > 1 or any(argument.name == "routing" for argument in site.arguments)
    return (
        None if whole or seeded(program) else parts_of_forward(program.forward, setting, owner, hands=site in OF_MLPS)
    )


def _function(variant: _Variant, workload: Workload, class_name: str, owner: str, width: int) -> FunctionNode:
    program, setting = variant.program, variant.decision.setting
    site = program.derivation
    needed_by = dependents(program.backward)
    # What is no tensor goes to the backward as numbers do.
    codes = [symbol for symbol in program.saved_inputs if symbol.coded]
    kept = (*(symbol for symbol in program.saved_inputs if symbol not in codes), *program.kept)
    saves = tuple((str(symbol), guard(needed_by[symbol], site)) for symbol in kept)
    made = [str(symbol) for symbol in program.kept if symbol not in program.forward.held]
    for operation in filter(draws, program.backward.operations):  # it is drawn again, to the same bits
        saves += (("seed", guard(needed_by[operation.outputs[0]], site)),)
        made.append("seed")
    gradients = tuple(str(gradient) for gradient in site.gradients if gradient in program.backward.goals)
    numbers = frozenset[str]().union(*map(numbers_of, program.backward.operations))
    keeps = tuple(a.name for a in site.arguments if a.name in {*numbers, *map(str, codes)})
    backward = backward_blocks(program.backward, setting, needed_by, owner)
    used = {*witnesses(site), *(symbol for symbol, _ in saves), *keeps}
    return FunctionNode(
        class_name=class_name,
        id=program.id,
        doc=tuple(program_text(variant.candidate, variant.decision, workload, variant.note, width)),
        forward=forward_statements(program.forward, setting, owner),
        parts=_parts(program, setting, owner),
        outputs=(*map(str, site.outputs), *made),
        kept=tuple(made),
        inputs=", ".join(a.name if a.name in used else "_" for a in site.arguments),
        needs=unpack_needs(
            site, {name for name in gradients if any(f"need_{name}" in condition for _, condition in saves)}
        ),
        saves=saves,
        backward_needs=unpack_needs(site, set(gradients)),
        backward=backward,
        gradients=gradients,
        absent=absent(program.backward, needed_by),
        reread=frozenset(str(read) for operation in program.backward.operations for read in operation.reads).union(
            *(block.adds_to for block in backward)
        ),
        returns=tuple(a.gradient if a.gradient in gradients else "None" for a in site.arguments),
        keeps=keeps,
        dtypes=tuple(name for g in site.gradients if str(g) in gradients and (name := dtype_of(g))),
        seeded=seeded(program),
    )
