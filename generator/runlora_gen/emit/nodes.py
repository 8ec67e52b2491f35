"""Typed nodes for the templates: every decision is made here, the templates only ask."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..algebra.derivation import Argument, Derivation
from ..algebra.enumerate import Phase, Program
from ..algebra.kernels import KERNELS
from ..algebra.operations import Cast, Fused, Operation, Symbol, dimensions, products, signature
from ..algebra.schedule import dependents, schedule
from ..cost.price import (
    DEVICE_BOUND,
    HOST_BOUND,
    OperationCost,
    PhaseCost,
    Setting,
    price_frozen,
    price_operation,
    price_phase,
    saved_activations,
    wanted_operations,
)
from ..request.layers import Layer
from ..request.workload import Workload
from ..search.candidates import goals
from ..search.choose import Decision, ForwardDecision
from ..search.criterion import Priced
from ..search.ranges import LayerChoice
from .code import dtype_of, helpers_of, line, results_of, uses_scaling
from .units import show_bound, show_bytes, show_count, show_reason, show_time

#: What a line of a comment on a constant begins with.
_COMMENT = "#: "


@dataclass(frozen=True)
class Block:
    """Statements under one condition, or under it where the condition before it did not hold (``elif``)."""

    guard: str
    lines: tuple[str, ...]
    keyword: str = "if"


@dataclass(frozen=True)
class FunctionNode:
    """One ``torch.autograd.Function``."""

    class_name: str
    id: str
    doc: tuple[str, ...]
    forward: tuple[str, ...]
    outputs: tuple[str, ...]  # Y, and what is kept beside it
    inputs: str  # the left side that takes from the inputs what is saved or asked
    needs: str  # the left side that unpacks needs_input_grad for what is saved
    saves: tuple[tuple[str, str], ...]  # symbol, condition
    backward_needs: str
    backward: tuple[Block, ...]
    gradients: tuple[str, ...]  # dX, dA, … that it can give
    returns: tuple[str, ...]
    keeps_scaling: bool
    dtypes: tuple[str, ...]  # variables that hold the dtypes of trained parameters
    seeded: bool

    @property
    def kept(self) -> tuple[str, ...]:
        """What the forward makes for the backward."""
        return self.outputs[1:]


@dataclass(frozen=True)
class ForwardNode:
    """A function that computes Y alone."""

    name: str
    doc: tuple[str, ...]
    forward: tuple[str, ...]
    seeded: bool


@dataclass(frozen=True)
class RangeNode:
    """Up to ``last_tokens`` (None: no end) use ``chosen``; on 16-bit weights ``fallback`` if that differs."""

    last_tokens: int | None
    chosen: str
    fallback: str | None


#: Compile-time constants of kernels: what is computed, and the constants by name.
Tiles = tuple[tuple[str, tuple[tuple[str, int], ...]], ...]


@dataclass(frozen=True)
class ModuleNode:
    """One generated module."""

    name: str
    title: str
    notes: tuple[str, ...]
    in_features: int
    out_features: int
    rank: int
    bias: bool
    arguments: tuple[Argument, ...]  # of the autograd functions
    witnesses: tuple[str, ...]  # those on which gradients depend
    functions: tuple[FunctionNode, ...]
    forwards: tuple[ForwardNode, ...]
    ranges: tuple[RangeNode, ...]  # ids of variants
    forward_ranges: tuple[RangeNode, ...]  # functions that compute Y
    trains: tuple[str, ...]  # arguments that may require a gradient
    frozen: tuple[tuple[str, str], ...]  # argument and why it must not require a gradient
    wide_adapter: bool  # whether the adapter is in float32 by default, over 16-bit weights too
    lossy_merge: bool  # whether 16-bit weights may be merged
    kernels: tuple[str, ...]  # fused kernels that it brings
    kernels_note: tuple[str, ...]  # what these need and take, in lines of a comment
    helpers: frozenset[str]  # functions that its lines call, and what its kernels need of their common code
    largest_ranks: Mapping[str, int]  # above it a kernel is slower than torch
    tiles: Tiles  # their compile-time constants by what they compute
    small_tiles: Tiles
    tiles_note: tuple[str, ...]

    @property
    def differentiable(self) -> str:
        """Which arguments get gradients, for people."""
        return _listed(self.trains)


def module_node(
    choice: LayerChoice, rank: int, workload: Workload, *, width: int, all_variants: bool = False
) -> ModuleNode:
    """The module of a layer: the chosen variants, or all that were enumerated.

    ``width``: columns of a line.
    """
    layer = choice.layer
    described: dict[str, tuple[Decision, Priced, str]] = {}
    parts = []
    for part in choice.ranges:
        decision = part.decision
        chosen, fallback = decision.chosen, decision.fallback
        reason = show_reason(decision)
        runner_up = f"The runner-up lost: {reason}" if reason else ""
        described.setdefault(chosen.program.id, (decision, chosen, runner_up))
        differs = fallback.program is not chosen.program
        if differs:
            note = "For 16-bit weights: it merges nothing, so no small update is lost"
            described.setdefault(fallback.program.id, (decision, fallback, note))
        parts.append(RangeNode(part.last_tokens, chosen.program.id, fallback.program.id if differs else None))
    if all_variants:
        decision = choice.ranges[-1].decision
        for candidate in decision.candidates:
            described.setdefault(candidate.program.id, (decision, candidate, ""))
    class_names = {
        id: "_LoRALinearFunction" if len(described) == 1 else _class_name(candidate.program)
        for id, (_, candidate, _) in described.items()
    }
    functions = tuple(
        _function(candidate, decision, workload, reason, class_names[id], width)
        for id, (decision, candidate, reason) in described.items()
    )
    programs = {class_names[id]: candidate.program for id, (_, candidate, _) in described.items()}
    forwards, forward_ranges = _forwards(choice, workload, programs, width)
    operations = [operation for program in programs.values() for operation in program.operations]
    operations += [operation for phase in forwards for operation in phase.operations]
    fused = list(dict.fromkeys(op for op in operations if isinstance(op, Fused)))
    kernels = tuple(sorted({op.kernel for op in fused}))
    helpers = frozenset[str]().union(*(KERNELS[kernel].helpers for kernel in kernels), *map(helpers_of, operations))
    # One set of constants for all token counts: those of the largest, where a step takes longest.
    setting = choice.ranges[-1].decision.setting
    setting = replace(setting, tokens=max(workload.tokens))
    wanted = goals(workload)
    arguments = (
        ("x", "dX", "it was generated with --no-input-grad"),
        ("lora_A", "dA", "it was generated with lora_A frozen (--train b)"),
        ("lora_B", "dB", "it was generated with lora_B frozen (--train a)"),
        ("bias", "db", ""),
    )
    return ModuleNode(
        name=module_name(layer, rank),
        title=f"LoRA linear, {layer.in_features} to {layer.out_features} features, rank {rank}",
        notes=tuple(line for note in _notes(layer) for line in textwrap.wrap(note, width)),
        in_features=layer.in_features,
        out_features=layer.out_features,
        rank=rank,
        bias=layer.bias,
        arguments=setting.derivation.arguments,
        witnesses=_witnesses(setting.derivation),
        functions=functions,
        forwards=tuple(forwards.values()),
        ranges=tuple(parts),
        forward_ranges=forward_ranges,
        trains=tuple(argument for argument, gradient, _ in arguments if gradient in wanted),
        frozen=tuple((argument, why) for argument, gradient, why in arguments if gradient not in wanted),
        wide_adapter=workload.adapter_dtype == "fp32",
        lossy_merge=workload.allow_lossy_merge,
        kernels=kernels,
        kernels_note=tuple(textwrap.wrap(_kernels_note(kernels), width - len(_COMMENT))),
        helpers=helpers,
        largest_ranks={kernel: limit for kernel in kernels if (limit := KERNELS[kernel].largest_rank)},
        tiles=tuple((results_of(op), tuple(kernel_constants(op, setting).items())) for op in fused),
        small_tiles=tuple(
            (results_of(op), tuple(small.items())) for op in fused if (small := KERNELS[op.kernel].small_tiles)
        ),
        tiles_note=tuple(textwrap.wrap(_tiles_note(fused, setting), width - len(_COMMENT))) if fused else (),
    )


def _listed(names: Sequence[str]) -> str:
    """As people enumerate: ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def kernel_constants(operation: Fused, setting: Setting) -> Mapping[str, int]:
    """The compile-time constants of a kernel in a setting: its own, and what the device profile has in their place."""
    return {**KERNELS[operation.kernel].tiles, **(_tuned(operation, setting) or {})}


def _tuned(operation: Fused, setting: Setting) -> Mapping[str, int] | None:
    at = tuple(setting.dims[d] for d in dimensions(operation))
    return setting.device.meter.tiles_for(signature(operation), setting.dtype.name, at)


def _tiles_note(fused: Sequence[Fused], setting: Setting) -> str:
    untuned = [results_of(operation) for operation in fused if _tuned(operation, setting) is None]
    tuned = (
        f"Chosen by measurements on {setting.device.meter.title}, at the sizes nearest to {setting.tokens} tokens in "
        f"{setting.dtype.name}."
    )
    general = "The best ones over all on an H200 in bf16, at 2048 to 16384 tokens and 5120 and 13824 features."
    if not untuned:
        return tuned
    if len(untuned) == len(fused):
        return general
    return f"{tuned} Those of {_listed(untuned)}: {general[0].lower()}{general[1:]}"


def _kernels_note(kernels: Sequence[str]) -> str:
    wide = [f"_{kernel}" for kernel in kernels if "fp32" in KERNELS[kernel].dtypes]
    takes = "16-bit tensors"
    if wide:
        takes += " and float32" if len(wide) == len(kernels) else f", {_listed(wide)} with float32 too"
    return (
        f"Fused kernels run where Triton is installed, on GPUs of compute capability 8.0 or more, with {takes}. Set "
        "the environment variable RUNLORA_KERNELS=0 before the import to run everything through torch."
    )


def module_name(layer: Layer, rank: int) -> str:
    """The module's file name without its ending; the shape is the name."""
    return f"linear_{layer.name}_r{rank}"


def _notes(layer: Layer) -> tuple[str, ...]:
    notes = [f"Serves {', '.join(layer.projections)} ({layer.count} linears in the model)."]
    if layer.transposed_weight:
        notes.append(
            f"Checkpoints store the weight of {', '.join(layer.transposed_weight)} as in_features x out_features "
            "(Conv1D): LoRALinear.from_linear takes such a layer; to lora_linear pass weight.t()."
        )
    return tuple(notes)


def _class_name(program: Program) -> str:
    words = program.id.replace("/", "_").replace("-", "_").split("_")
    return "_" + "".join(word.capitalize() for word in words)


def _forwards(
    choice: LayerChoice, workload: Workload, programs: Mapping[str, Program], width: int
) -> tuple[Mapping[Phase, ForwardNode], tuple[RangeNode, ...]]:
    """The functions that compute Y alone, where the forward of no variant does just that, and which to use when."""
    made: dict[Phase, ForwardNode] = {}

    def named(phase: Phase, decision: ForwardDecision) -> str:
        for class_name, program in programs.items():
            if program.forward.ways == phase.ways:
                return f"{class_name}.forward"
        if phase not in made:
            taken = sum(node.name.startswith(f"_forward_{phase.name}") for node in made.values())
            name = f"_forward_{phase.name}{f'_{taken + 1}' if taken else ''}"
            made[phase] = ForwardNode(
                name,
                tuple(_forward_derivation(phase, decision, workload, width)),
                _forward_lines(phase, decision.setting),
                phase.seeded,
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


def _function(
    candidate: Priced, decision: Decision, workload: Workload, reason: str, class_name: str, width: int
) -> FunctionNode:
    program = candidate.program
    setting = decision.setting
    needed_by = dependents(program.backward)
    backward = _backward_blocks(program.backward, setting, needed_by)
    saves = tuple(
        (str(symbol), _guard(needed_by[symbol], program.derivation))
        for symbol in (*program.saved_inputs, *program.kept)
    )
    made = [str(symbol) for symbol in program.kept if symbol not in program.forward.held]
    site = program.derivation
    for operation in filter(site.seeded, program.backward.operations):  # it is drawn again, to the same bits
        saves += (("seed", _guard(needed_by[operation.outputs[0]], site)),)
        made.append("seed")
    gradients = tuple(str(gradient) for gradient in site.gradients if gradient in program.backward.goals)
    keeps_scaling = any(map(uses_scaling, program.backward.operations))
    used = {*_witnesses(site), *(symbol for symbol, _ in saves), *(["scaling"] if keeps_scaling else [])}
    return FunctionNode(
        class_name=class_name,
        id=program.id,
        doc=tuple(_derivation(candidate, decision, workload, reason, width)),
        forward=_forward_lines(program.forward, setting),
        outputs=("Y", *made),
        inputs=", ".join(a.name if a.name in used else "_" for a in site.arguments),
        needs=_unpack_needs(site, {name for name in gradients if any(f"need_{name}" in guard for _, guard in saves)}),
        saves=saves,
        backward_needs=_unpack_needs(site, set(gradients)),
        backward=backward,
        gradients=gradients,
        returns=tuple(a.gradient if a.gradient in gradients else "None" for a in site.arguments),
        keeps_scaling=keeps_scaling,
        dtypes=tuple(name for g in site.gradients if str(g) in gradients and (name := dtype_of(g))),
        seeded=program.seeded,
    )


def _witnesses(site: Derivation) -> tuple[str, ...]:
    """The arguments on which the gradients of others depend: what second derivatives would be of."""
    read = {symbol.name for operation in site.operations for symbol in operation.reads}
    return tuple(a.name for a in site.arguments if a.gradient is not None and a.name in read)


def _unpack_needs(site: Derivation, names: set[str]) -> str:
    """The left side that takes these from ``needs_input_grad``."""
    parts = [f"need_{a.gradient}" if a.gradient in names else "_" for a in site.arguments]
    while parts[-1] == "_":
        parts.pop()
    return ", ".join([*parts, "*_"])


def _guard(wanted: Iterable[Symbol], site: Derivation) -> str:
    return " or ".join(f"need_{gradient}" for gradient in site.gradients if gradient in wanted)


def _forward_lines(phase: Phase, setting: Setting) -> tuple[str, ...]:
    """The statements of a forward; the adapter's casts are made before it is called."""
    lines = []
    for step in schedule(phase, setting.dims).steps:
        if not isinstance(step.operation, Cast):
            lines.append(line(step.operation))
            lines += [f"del {symbol}" for symbol in step.frees]
    return tuple(lines)


def _backward_blocks(
    phase: Phase, setting: Setting, needed_by: Mapping[Symbol, frozenset[Symbol]]
) -> tuple[Block, ...]:
    blocks: list[Block] = []

    def add(guard: str, text: str) -> None:
        if blocks and (blocks[-1].guard, blocks[-1].keyword) == (guard, "if"):
            blocks[-1] = Block(guard, (*blocks[-1].lines, text))
        else:
            blocks.append(Block(guard, (text,)))

    for step in schedule(phase, setting.dims).steps:
        guards = {symbol: _guard(needed_by[symbol], phase.derivation) for symbol in step.operation.outputs}
        if len(set(guards.values())) == 1:
            add(guards[step.operation.outputs[0]], line(step.operation))
        else:
            # Each result is wanted for other gradients: the kernel where all are, else the one product.
            blocks.append(
                Block(
                    " and ".join(f"({guard})" if " or " in guard else guard for guard in guards.values()),
                    (line(step.operation),),
                )
            )
            for product in products(step.operation):
                blocks.append(Block(guards[product.outputs[0]], (line(product),), "elif"))
        for symbol in step.frees:
            add(_guard(needed_by[symbol], phase.derivation), f"del {symbol}")
    return tuple(blocks)


def _derivation(candidate: Priced, decision: Decision, workload: Workload, reason: str, width: int) -> Iterable[str]:
    """The docstring's body: the formulas with their FLOPs and bytes, the price, and why the runner-up lost."""
    program, cost, setting = candidate.program, candidate.cost, decision.setting
    for title, phase, total in (
        ("Forward", program.forward, cost.forward),
        ("Backward", program.backward, cost.backward),
    ):
        yield from _price_table(title, phase, total, setting)
    kept = ", ".join(map(str, saved_activations(program, setting.gradients))) or "nothing"
    yield ""
    sentences = [
        f"Saved for the backward beside the parameters: {kept} ({show_bytes(cost.saved_bytes)}).",
        f"Temporaries: at most {show_bytes(cost.workspace_bytes)}.",
        *_priced_at(setting, workload, cost.device_s, cost.host_s, decision.host_share),
    ]
    if cost.update_error:
        sentences.append(f"Relative rounding error of the update: {cost.update_error:.2g}.")
    if reason:
        sentences.append(f"{reason}.")
    for sentence in sentences:
        yield from textwrap.wrap(sentence, width - 4, break_on_hyphens=False)


def _forward_derivation(phase: Phase, decision: ForwardDecision, workload: Workload, width: int) -> Iterable[str]:
    """The same of a forward alone."""
    setting = decision.setting
    cost = price_phase(phase, setting)
    yield from _price_table("Where no gradient is wanted", phase, cost, setting)
    yield ""
    frozen = replace(setting, gradients=frozenset())
    for sentence in _priced_at(frozen, workload, cost.device_s, cost.host_s, decision.host_share):
        yield from textwrap.wrap(sentence, width - 4, break_on_hyphens=False)


def _price_table(title: str, phase: Phase, total: PhaseCost, setting: Setting) -> Iterable[str]:
    wanted = wanted_operations(phase, setting.gradients)
    ordered: list[Operation] = [s.operation for s in schedule(phase, setting.dims).steps if s.operation in wanted]
    prices: list[tuple[str, OperationCost | PhaseCost]] = [
        (operation.formula, price_operation(operation, setting)) for operation in ordered
    ]
    columns = max(len(formula) for formula, _ in prices)
    prices.append(("in all", total))
    yield from ("", f"{title}::", "")
    for formula, price in prices:
        yield (
            f"    {formula:<{columns}}  {show_count(price.flops, 'FLOP'):>11}  {show_bytes(price.bytes_moved):>10}  "
            f"{show_time(price.device_s):>12}"
        )


def _priced_at(
    setting: Setting, workload: Workload, device_s: float, host_s: float, host_share: float
) -> Iterable[str]:
    """What it was priced for, and what it takes beside the frozen linear."""
    frozen_device, frozen_host = (price_frozen(setting, share) for share in (DEVICE_BOUND, HOST_BOUND))
    adapter = f", the adapter in {setting.adapter_dtype.name}," if setting.casts else ""
    yield (
        f"Priced at {setting.tokens} tokens in {setting.dtype.name}{adapter} {_priced_by(setting)}: "
        f"{device_s / frozen_device:.3f} times the frozen linear ({show_time(frozen_device)}) on the device."
    )
    if workload.launch == "graph":
        yield "Launches cost nothing: they are replayed as a graph."
        return
    yield (
        f"Launched eagerly it takes the host {host_s / frozen_host:.2f} times the frozen linear "
        f"({show_time(frozen_host)}); a step of the whole model is bound by {show_bound(host_share)}."
    )


def _priced_by(setting: Setting) -> str:
    device = setting.device
    if not device.meter.times_for(setting.dtype.name):
        return f"by the roofline of {device.title}"
    if device.measured_on is None:
        return f"by what was measured on {device.title}"
    return f"by the roofline of {device.title} with efficiencies measured on {device.measured_on.title}"
