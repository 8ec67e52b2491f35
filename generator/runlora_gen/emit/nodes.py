"""Typed nodes for the templates: every decision is made here, the templates only ask."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..algebra.enumerate import Phase, Program
from ..algebra.operations import SYMBOLS, Fused, Symbol, dimensions, products, signature
from ..algebra.schedule import GRADIENTS, dependents, schedule
from ..algebra.table import KERNELS
from ..choose import Decision, Priced, Range, goals, show_bytes, show_count, show_time
from ..cost.price import (
    OperationCost,
    PhaseCost,
    Setting,
    price_frozen,
    price_operation,
    saved_symbols,
    wanted_operations,
)
from ..spec.layers import Layer
from ..spec.workload import Workload
from .code import DTYPE_OF, line, results_of, uses_accumulate, uses_scaled_mm, uses_scaling

#: Columns of a docstring's text.
_DOC_WIDTH = 112
#: Inputs of the emitted autograd functions, and the gradient that each may want.
_INPUT_GRADIENTS = ("dX", None, "dA", "dB", "db", None)


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
    forward_needs: str | None  # the left side that unpacks needs_input_grad, or None if nothing asks
    forward: tuple[str, ...]
    saves: tuple[tuple[str, str], ...]  # symbol, condition
    backward_needs: str
    backward: tuple[Block, ...]
    gradients: tuple[str, ...]  # dX, dA, … that it can give
    returns: tuple[str, ...]
    keeps_scaling: bool
    dtypes: tuple[str, ...]  # variables that hold the dtypes of trained parameters
    seeded: bool


@dataclass(frozen=True)
class RangeNode:
    """Up to ``last_tokens`` (None: no end) use ``variant``; on 16-bit weights ``fallback`` if that differs."""

    last_tokens: int | None
    variant: str
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
    functions: tuple[FunctionNode, ...]
    ranges: tuple[RangeNode, ...]
    frozen: tuple[tuple[str, str], ...]  # argument and why it must not require a gradient
    trains_A: bool
    trains_B: bool
    scaled_mm: bool
    accumulates: bool
    functional: bool  # whether torch.nn.functional is used
    kernels: tuple[str, ...]  # fused kernels that it brings
    helpers: frozenset[str]  # what these need of the kernels' common code
    largest_ranks: Mapping[str, int]  # above it a kernel is slower than torch
    tiles: Tiles  # their compile-time constants by what they compute
    small_tiles: Tiles
    tiles_note: str

    @property
    def selectable(self) -> bool:
        """Whether ``lora_linear`` takes a ``variant``."""
        return len(self.functions) > 1

    @property
    def selects_by_dtype(self) -> bool:
        """Whether 16-bit weights get another variant."""
        return any(part.fallback is not None for part in self.ranges)

    @property
    def selects(self) -> bool:
        """Whether there is anything to select at run time."""
        return len(self.ranges) > 1 or self.selects_by_dtype

    @property
    def selection(self) -> str:
        """The expression that selects a variant."""
        if not self.selects:
            return f'"{self.ranges[0].variant}"'
        return "_select(X.shape[0], X.dtype)" if self.selects_by_dtype else "_select(X.shape[0])"


def module_node(
    layer: Layer, rank: int, workload: Workload, ranges: Sequence[Range], *, all_variants: bool = False
) -> ModuleNode:
    """The module of a layer: the chosen variants, or all that were enumerated."""
    described: dict[str, tuple[Decision, Priced, str]] = {}
    parts = []
    for part in ranges:
        decision = part.decision
        described.setdefault(
            decision.chosen.program.id, (decision, decision.chosen, f"The runner-up lost: {decision.reason}")
        )
        fallback = None
        if decision.fallback.program != decision.chosen.program:
            fallback = decision.fallback.program.id
            note = "For 16-bit weights: it merges nothing, so no small update is lost"
            described.setdefault(fallback, (decision, decision.fallback, note))
        parts.append(RangeNode(part.last_tokens, decision.chosen.program.id, fallback))
    if all_variants:
        decision = ranges[-1].decision
        for candidate in decision.candidates:
            described.setdefault(candidate.program.id, (decision, candidate, ""))
    single = len(described) == 1
    functions = tuple(
        _function(candidate, decision, reason, "_LoRALinearFunction" if single else _class_name(candidate.program))
        for decision, candidate, reason in described.values()
    )
    operations = [op for _, candidate, _ in described.values() for op in candidate.program.operations]
    fused = list(dict.fromkeys(op for op in operations if isinstance(op, Fused)))
    kernels = tuple(sorted({op.kernel for op in fused}))
    helpers = frozenset[str]().union(*(KERNELS[kernel].helpers for kernel in kernels))
    # One set of constants for all token counts: those of the largest, where a step takes longest.
    setting = replace(ranges[-1].decision.setting, tokens=max(workload.tokens))
    wanted = goals(workload)
    frozen = (
        ("x", "dX", "it was generated with --no-input-grad"),
        ("lora_A", "dA", "it was generated with lora_A frozen (--train b)"),
        ("lora_B", "dB", "it was generated with lora_B frozen (--train a)"),
    )
    return ModuleNode(
        name=module_name(layer, rank),
        title=f"LoRA linear, {layer.in_features} to {layer.out_features} features, rank {rank}",
        notes=_notes(layer, workload),
        in_features=layer.in_features,
        out_features=layer.out_features,
        rank=rank,
        bias=layer.bias,
        functions=functions,
        ranges=tuple(parts),
        frozen=tuple((argument, why) for argument, gradient, why in frozen if gradient not in wanted),
        trains_A="dA" in wanted,
        trains_B="dB" in wanted,
        accumulates=any(map(uses_accumulate, operations)),
        scaled_mm=any(map(uses_scaled_mm, operations)),
        functional="F" in helpers or any("F." in line(operation) for operation in operations),
        kernels=kernels,
        helpers=helpers,
        largest_ranks={kernel: limit for kernel in kernels if (limit := KERNELS[kernel].largest_rank)},
        tiles=tuple((results_of(op), tuple(kernel_constants(op, setting).items())) for op in fused),
        small_tiles=tuple(
            (results_of(op), tuple(small.items())) for op in fused if (small := KERNELS[op.kernel].small_tiles)
        ),
        tiles_note=_tiles_note(fused, setting),
    )


def kernel_constants(operation: Fused, setting: Setting) -> Mapping[str, int]:
    """The compile-time constants of a kernel in a setting: its own, and what the device profile has in their place."""
    return {**KERNELS[operation.kernel].tiles, **(_tuned(operation, setting) or {})}


def _tuned(operation: Fused, setting: Setting) -> Mapping[str, int] | None:
    at = tuple(setting.dims[d] for d in dimensions(operation))
    return setting.device.meter.tiles_for(signature(operation), setting.dtype.name, at)


def _tiles_note(fused: Sequence[Fused], setting: Setting) -> str:
    if any(_tuned(operation, setting) is None for operation in fused):
        return "The best ones over all on an H200, at 2048 to 16384 tokens and 5120 and 13824 features."
    return f"Tuned on {setting.device.meter.title}, for {setting.tokens} tokens in {setting.dtype.name}."


def module_name(layer: Layer, rank: int) -> str:
    """The module's file name without its ending; the shape is the name."""
    return f"linear_{layer.name}_r{rank}"


def _notes(layer: Layer, workload: Workload) -> tuple[str, ...]:
    notes = [f"Serves {', '.join(layer.projections)} ({layer.count} linears in the model)."]
    if layer.transposed_weight:
        notes.append(
            f"Checkpoints store the weight of {', '.join(layer.transposed_weight)} as in_features x out_features "
            "(Conv1D): pass weight.t()."
        )
    return tuple(notes)


def _class_name(program: Program) -> str:
    words = program.id.replace("/", "_").replace("-", "_").split("_")
    return "_" + "".join(word.capitalize() for word in words)


def _function(candidate: Priced, decision: Decision, reason: str, class_name: str) -> FunctionNode:
    program = candidate.program
    setting = decision.setting
    needed_by = dependents(program.backward)
    backward = _backward_blocks(program.backward, setting, needed_by)
    saves = tuple((str(symbol), _guard(needed_by[symbol])) for symbol in (*program.saved_inputs, *program.kept))
    merged = SYMBOLS["M"]
    if program.seeded and merged in needed_by and merged not in program.kept:  # it is merged again, to the same bits
        saves += (("seed", _guard(needed_by[merged])),)
    gradients = tuple(str(gradient) for gradient in GRADIENTS if gradient in program.backward.goals)
    return FunctionNode(
        class_name=class_name,
        id=program.id,
        doc=_derivation(candidate, setting, reason),
        forward_needs=_unpack_needs({name for name in gradients if any(f"need_{name}" in guard for _, guard in saves)}),
        forward=_forward_lines(program.forward, setting),
        saves=saves,
        backward_needs=_unpack_needs(set(gradients)) or "_",
        backward=backward,
        gradients=gradients,
        returns=tuple(name if name in gradients else "None" for name in _INPUT_GRADIENTS),
        keeps_scaling=any(map(uses_scaling, program.backward.operations)),
        dtypes=tuple(
            DTYPE_OF[gradient] for gradient in GRADIENTS if gradient in DTYPE_OF and str(gradient) in gradients
        ),
        seeded=program.seeded,
    )


def _unpack_needs(names: set[str]) -> str | None:
    if not names:
        return None
    parts = [f"need_{name}" if name in names else "_" for name in _INPUT_GRADIENTS]
    while parts[-2:] == ["_", "_"]:
        parts.pop()
    if len(parts) < len(_INPUT_GRADIENTS):
        parts[-1] = "*_"
    return ", ".join(parts)


def _guard(gradients: Iterable[Symbol]) -> str:
    return " or ".join(f"need_{gradient}" for gradient in GRADIENTS if gradient in gradients)


def _forward_lines(phase: Phase, setting: Setting) -> tuple[str, ...]:
    lines = []
    for step in schedule(phase, setting.dims).steps:
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
        guards = {symbol: _guard(needed_by[symbol]) for symbol in step.operation.outputs}
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
            add(_guard(needed_by[symbol]), f"del {symbol}")
    return tuple(blocks)


def _derivation(candidate: Priced, setting: Setting, reason: str) -> tuple[str, ...]:
    """The docstring's body: the formulas with their FLOPs and bytes, the price, and why the runner-up lost."""
    program, cost = candidate.program, candidate.cost
    doc: list[str] = []
    phases = (("Forward", program.forward, cost.forward), ("Backward", program.backward, cost.backward))
    for title, phase, total in phases:
        wanted = wanted_operations(phase, setting.gradients)
        ordered = [step.operation for step in schedule(phase, setting.dims).steps if step.operation in wanted]
        prices: list[tuple[str, OperationCost | PhaseCost]] = [
            (operation.formula, price_operation(operation, setting)) for operation in ordered
        ]
        width = max(len(formula) for formula, _ in prices)
        prices.append(("in all", total))
        doc += ["", f"{title}::", ""]
        doc += [_priced(formula, price, width) for formula, price in prices]
    kept = ", ".join(str(s) for s in saved_symbols(program, setting.gradients) if str(s) not in "WAB") or "nothing"
    frozen = price_frozen(setting)
    launched = "replayed as a graph" if setting.launch == "graph" else "launched eagerly"
    doc += [
        "",
        f"Saved for the backward beside the parameters: {kept} ({show_bytes(cost.saved_bytes)}).",
        f"Temporaries: at most {show_bytes(cost.workspace_bytes)}.",
        *textwrap.wrap(
            f"Priced at {setting.tokens} tokens in {setting.dtype.name} {_priced_by(setting)}, {launched}: "
            f"{cost.time_s / frozen:.3f} times the frozen linear ({show_time(frozen)}).",
            _DOC_WIDTH,
        ),
    ]
    if cost.update_error:
        doc.append(f"Relative rounding error of the update: {cost.update_error:.2g}.")
    if reason:
        doc += textwrap.wrap(f"{reason}.", _DOC_WIDTH, break_on_hyphens=False)
    return tuple(doc)


def _priced_by(setting: Setting) -> str:
    device = setting.device
    if not device.meter.times_for(setting.dtype.name):
        return f"by the roofline of {device.title}"
    if device.measured_on is None:
        return f"by what was measured on {device.title}"
    return f"by the roofline of {device.title} with efficiencies measured on {device.measured_on.title}"


def _priced(formula: str, price: OperationCost | PhaseCost, width: int) -> str:
    return (
        f"    {formula:<{width}}  {show_count(price.flops):>8}FLOP  {show_bytes(price.bytes_moved):>10}  "
        f"{show_time(price.time_s):>12}"
    )
