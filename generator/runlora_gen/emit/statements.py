"""The statements of autograd functions: what runs, in which order, under which condition, and what is let go when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..algebra.derivation import Derivation
from ..algebra.enumerate import Phase
from ..algebra.liveness import is_told
from ..algebra.operations import Draw, Map, Symbol, products
from ..algebra.schedule import Step, schedule
from ..cost.setting import Setting
from ..kernels.registry import KERNELS
from .code import drawn_line, line, seeds_line


@dataclass(frozen=True)
class Block:
    """Statements under one condition, or under it, or none, where that before it did not hold (``elif``, ``else``)."""

    guard: str
    lines: tuple[str, ...]
    keyword: str = "if"
    adds_to: frozenset[str] = frozenset()  # what a block before it began


def witnesses(site: Derivation) -> tuple[str, ...]:
    """The arguments on which the gradients of others depend: what second derivatives would be of."""
    read = {symbol.name for operation in site.operations for symbol in operation.reads}
    return tuple(a.name for a in site.arguments if a.gradient is not None and a.name in read)


def unpack_needs(site: Derivation, names: set[str]) -> str:
    """The left side that takes these from ``needs_input_grad``."""
    parts = [f"need_{a.gradient}" if a.gradient in names else "_" for a in site.arguments]
    while parts[-1] == "_":
        parts.pop()
    return ", ".join([*parts, "*_"])


def guard(wanted: Iterable[Symbol], site: Derivation) -> str:
    """The condition that one of these gradients is wanted."""
    return " or ".join(f"need_{gradient}" for gradient in site.gradients if gradient in wanted)


def forward_statements(phase: Phase, setting: Setting, owner: str) -> tuple[str, ...]:
    """The statements of a forward; the adapter's casts are made before it is called.

    ``owner``: of the constants of kernels: see :func:`.code.tiles_key`.
    """
    return _statements(phase, _forward_steps(phase, setting), owner)


@dataclass(frozen=True)
class Parts:
    """A forward in two parts: the statements that make what it keeps, and the others.

    Attributes:
        first, rest: of both.
        handed: what the others read of the first beside that.
    """

    first: tuple[str, ...]
    rest: tuple[str, ...]
    handed: tuple[str, ...] = ()


def parts_of_forward(phase: Phase, setting: Setting, owner: str, *, hands: bool = False) -> Parts | None:
    """A forward in two parts; None where nothing is kept, or is there already.

    ``hands``: whether the others may read more of what the first makes than is kept; else it is None there, too.
    """
    kept = set(phase.keeps) - set(phase.held)
    needed, first, rest = set(kept), list[Step](), list[Step]()
    steps = _forward_steps(phase, setting)
    # A mask is drawn and dropped by in one call.
    needed.update(
        step.operation.out for step in steps if isinstance(step.operation, Map) and kept & {*step.operation.reads}
    )
    for step in reversed(steps):
        if needed.isdisjoint(step.operation.outputs):
            rest.insert(0, step)
        else:
            needed.update(step.operation.reads)
            first.insert(0, replace(step, frees=()))
    made = {symbol for step in first for symbol in step.operation.outputs} - kept
    read = dict.fromkeys(symbol for step in rest for symbol in step.operation.reads if symbol in made)
    if not kept or not rest or (read and not hands):
        return None
    rest = [replace(step, frees=tuple(symbol for symbol in step.frees if symbol not in made)) for step in rest]
    return Parts(_statements(phase, first, owner), _statements(phase, rest, owner), tuple(map(str, read)))


def _forward_steps(phase: Phase, setting: Setting) -> list[Step]:
    return [step for step in schedule(phase, setting.bytes_of).steps if step.operation.outputs[0] not in phase.held]


def _statements(phase: Phase, steps: Sequence[Step], owner: str) -> tuple[str, ...]:
    lines = []
    maps = [step.operation for step in steps if isinstance(step.operation, Map)]
    drops = {draw: drop for drop in maps for draw in drop.operands}  # by their masks
    draws = [step.operation for step in steps if isinstance(step.operation, Draw)]
    seeds = [draw for draw in draws if draw.out.store == "seed"]
    drawn = {drops[draw.out]: draw for draw in draws if draw not in seeds}
    for step in steps:
        match step.operation:
            case Draw() if step.operation in seeds:
                if step.operation == seeds[0]:
                    lines.append(seeds_line(seeds, phase.derivation.arguments[0].name))
            case Draw():
                pass  # where it is dropped by: what of may not be there yet
            case Map() if step.operation in drawn:
                lines.append(drawn_line(drawn[step.operation], step.operation))
            case _:
                lines.append(line(step.operation, owner))
        lines += [f"del {symbol}" for symbol in step.frees]
    return tuple(lines)


def absent(phase: Phase, needed_by: Mapping[Symbol, frozenset[Symbol]]) -> tuple[str, ...]:
    """What a backward makes for some wishes alone, and gives a kernel that is told of wishes under others as well."""
    made = {out for operation in phase.operations for out in operation.outputs}
    found: dict[str, None] = {}
    for operation in filter(is_told, phase.operations):
        wanted = frozenset[Symbol]().union(*(needed_by[out] for out in operation.outputs))
        found.update((str(read), None) for read in operation.reads if read in made and not wanted <= needed_by[read])
    return tuple(found)


def backward_blocks(
    phase: Phase, setting: Setting, needed_by: Mapping[Symbol, frozenset[Symbol]], owner: str
) -> tuple[Block, ...]:
    """The statements of a backward, under the wishes for gradients.

    Args:
        phase, setting: what runs, and at which sizes.
        needed_by: the gradients that each symbol is computed for.
        owner: of the constants of kernels: see :func:`.code.tiles_key`.
    """
    blocks: list[Block] = []
    begun: dict[Symbol, int] = {}  # in which block

    def add(condition: str, text: str) -> None:
        if blocks and (blocks[-1].guard, blocks[-1].keyword) == (condition, "if"):
            blocks[-1] = replace(blocks[-1], lines=(*blocks[-1].lines, text))
        else:
            blocks.append(Block(condition, (text,)))

    for step in schedule(phase, setting.bytes_of).steps:
        if is_told(step.operation):
            wanted = frozenset[Symbol]().union(*(needed_by[out] for out in step.operation.outputs))
            guards = dict.fromkeys(step.operation.outputs, guard(wanted, phase.derivation))
            for out in step.operation.outputs:
                if out not in phase.goals and "{needs}" in KERNELS[step.operation.kernel].call:  # told of what follows
                    add(guards[out], f"need_{out} = {guard(needed_by[out], phase.derivation)}")
        else:
            guards = {symbol: guard(needed_by[symbol], phase.derivation) for symbol in step.operation.outputs}
        if len(set(guards.values())) == 1:
            out = step.operation.outputs[0]
            add(guards[out], line(step.operation, owner))
            if begun.setdefault(out, len(blocks)) != len(blocks):
                blocks[-1] = replace(blocks[-1], adds_to=blocks[-1].adds_to | {str(out)})
        else:
            # Each result is wanted for other gradients: the kernel where all are, else the one product.
            blocks.append(
                Block(
                    " and ".join(f"({each})" if " or " in each else each for each in guards.values()),
                    (line(step.operation, owner),),
                )
            )
            single = [(guards[part.outputs[0]], line(part, owner)) for part in products(step.operation)]
            if len(single) == 2:  # of which one is wanted at most
                blocks += [Block(condition, (text,), "elif") for condition, text in single]
            else:
                inner = (text for condition, each in single for text in (f"if {condition}:", f"    {each}"))
                blocks.append(Block("", tuple(inner), "else"))
        for symbol in step.frees:
            add(guard(needed_by[symbol], phase.derivation), f"del {symbol}")
    return tuple(blocks)
