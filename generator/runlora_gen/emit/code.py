"""One operation, one line of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import assert_never

from ..algebra.operations import (
    Contract,
    Convert,
    Draw,
    Fused,
    Map,
    Operand,
    Operation,
    Reduce,
    Route,
    Step,
    Symbol,
    products,
)
from ..algebra.work import kind
from ..kernels.registry import KERNELS


def dtype_of(gradient: Symbol) -> str | None:
    """The variable with the dtype of a gradient of a parameter that may have another one than the activations."""
    return f"{gradient.name.removeprefix('d')}_dtype" if gradient.store == "adapter" else None


def numbers_of(operation: Operation) -> frozenset[str]:
    """The variables that the line reads beside tensors: scalings, the rate of dropout, what sorts rows by expert."""
    steps = products(operation)
    scalings = (_scaling(step) for step in steps if isinstance(step, Contract) and step.scaled)
    drops = any(isinstance(step, Map) and step.function == "drop" for step in steps)
    routed = any(map(_is_routed, steps))
    return frozenset((*scalings, *(["dropout"] if drops else []), *(["routing"] if routed else [])))


#: The function that makes what is between, of a gate and an up that are matrices of their own.
_APART = {"activate": "_gated", "gate_gradient": "_gate_gradient", "up_gradient": "_up_gradient"}


def _is_routed(step: Step) -> bool:
    """Whether what a step does depends on which expert rows belong to."""
    if isinstance(step, Contract):
        return step.right.stacked != step.stacked
    return isinstance(step, Route) or step.function in ("weigh", "dot")


def _scaling(product: Contract) -> str:
    """The variable with what multiplies a product: ``scaling`` for s, ``scaling_q`` for s_q."""
    return "1.0" if product.scaling is None else f"scaling{product.scaling.removeprefix('s')}"


def helpers_of(operation: Operation) -> frozenset[str]:
    """Functions of the module that the line, or the torch path of its kernel, calls."""
    # A kernel's record has what draws and drops in its place.
    steps = operation.products if isinstance(operation, Fused) else (operation,)
    return frozenset[str]().union(*map(_helpers, steps))


def _helpers(step: Step) -> frozenset[str]:
    match step:
        case Contract(stacked=True, right=Operand(stacked=True)):
            return frozenset({"scaled_baddbmm"})
        case Contract(right=Operand(stacked=True)):
            return frozenset({"by_expert"})
        case Contract(stacked=True):
            return frozenset({"sum_by_expert", "mm_as", "scaled_mm"})
        case Contract() if dtype_of(step.out):
            return frozenset({"mm_as", "scaled_mm"})
        case Contract() if step.accumulate:
            return frozenset({"accumulate"})
        case Contract() if step.addend is not None:
            return frozenset({"scaled_addmm"})
        case Contract():
            return frozenset({"scaled_mm"} if step.scaled else ())
        case Draw(out=Symbol(store="seed")):
            return frozenset({"seeds"})
        case Draw():
            return frozenset({"dropped"})
        case Map(function="drop"):
            return frozenset({"masked"})
        case Reduce(function="largest") | Convert(function="quantize"):
            return frozenset({"quantized"})
        case Route() | Map(function="weigh") | Reduce(function="dot"):
            return frozenset({"routed"})
        case Map(apart=True):
            return frozenset({"between"})
        case Map(function="activate" | "activate_backward"):
            return frozenset({"activated"})
        case Reduce() | Convert() | Map():
            return frozenset()
        case _:
            assert_never(step)


def drawn_line(draw: Draw, drop: Map) -> str:
    """The statement that draws a mask and drops by it: torch does both in one pass."""
    return f"{drop.out}, {draw.out} = _dropped({drop.operands[0]}, {draw.operands[0]})"


def seeds_line(draws: Sequence[Draw], like: str) -> str:
    """The statement that draws seeds, all in one launch; ``like``: what lies where they are to."""
    seeds = ", ".join(str(draw.out) for draw in draws)
    return f"{seeds if len(draws) > 1 else f'({seeds},)'} = _new_seeds({like}, {draws[0].operands[0]}, {len(draws)})"


def line(operation: Operation, owner: str = "", *, tiles: str | None = None) -> str:
    """The statement that computes an operation; a cast only where the backward makes it.

    Args:
        operation: of any kind that modules have.
        owner: of the constants of its kernel: see :func:`tiles_key`.
        tiles: by which they go, in place of that.

    Raises:
        ValueError: it is of a kind that no site which modules are generated for has.
    """
    match operation:
        case Fused():
            return f"{results_of(operation)} = {_call(operation, tiles or tiles_key(operation, owner))}"
        case Reduce(function="largest"):
            return f"{operation.out} = _largest_of({_applied_to(operation)})"
        case Reduce(function="dot"):
            return f"{operation.out} = _dot(routing, {_applied_to(operation)})"
        case Reduce():
            return f"{operation.out} = {operation.operands[0]}.sum(0)"
        case Convert(function="quantize"):
            return f"{operation.out} = _quantized({_applied_to(operation)})"
        case Convert(function="dequantize" | "rescale"):
            return f"{operation.out} = _dequantized({operation.operands[0]})"
        case Convert(function="cast"):
            # A to the dtype of dY, A_q to that of dY_q.
            _, mark, linear = operation.out.name.partition("_")
            return f"{operation.out} = {operation.operands[0]}.to(dY{mark}{linear}.dtype)"
        case Contract():
            return f"{operation.out} = {_product(operation)}"
        case Route():
            return f"{operation.out} = {_routed(operation)}"
        case Map(function="weigh"):
            return f"{operation.out} = _weighed({_applied_to(operation)}, routing)"
        case Map(apart=True):
            return f"{operation.out} = {_APART[operation.function]}({_applied_to(operation)}, ACTIVATION)"
        case Map(function="activate"):
            return f"{operation.out} = _activated({_applied_to(operation)}, ACTIVATION)"
        case Map(function="activate_backward"):
            return f"{operation.out} = _activate_backward({_applied_to(operation)}, ACTIVATION)"
        case Map(function="drop"):
            begun = f"{operation.out} + " if operation.accumulate else ""
            return f"{operation.out} = {begun}_masked({operation.operands[0]}, {operation.operands[1]}, dropout)"
        case Convert() | Map() | Draw():
            raise ValueError(f"there is no line of torch for {operation}")
        case _:
            assert_never(operation)


def _routed(route: Route) -> str:
    rows, *weights = route.operands
    if route.function == "gather":
        return f"_gathered({rows}, routing)"
    return f"_combined({rows}, {weights[0] if weights else None}, routing)"


def _applied_to(step: Reduce | Convert | Map | Draw | Route) -> str:
    """The operands of a function; of codes after the first it takes the scales alone."""
    first, *others = step.operands
    return ", ".join([str(first), *(f"{symbol}.scale" if symbol.coded else str(symbol) for symbol in others)])


def _product(product: Contract) -> str:
    left, right = _operand(product.left), _operand(product.right)
    if product.stacked and product.right.stacked:
        return f"_scaled_baddbmm({product.addend}, {left}, {right}, {_scaling(product)})"
    if product.stacked:
        # Of rows, not of their transpose: it is summed over them.
        return f"_sum_by_expert({product.left.symbol}, {right}, routing, {dtype_of(product.out)})"
    if product.right.stacked:
        return f"_by_expert({left}, {right}, routing{''.join(_beside(product))})"
    if dtype := dtype_of(product.out):
        return f"_mm_as({left}, {right}, {dtype}{f', {_scaling(product)}' if product.scaled else ''})"
    if product.accumulate:
        return f"_accumulate({product.out}, {left}, {right})"
    if product.addend is not None:
        return f"_scaled_addmm({product.addend}, {left}, {right}, {_scaling(product)})"
    if product.scaled:
        return f"_scaled_mm({left}, {right}, {_scaling(product)})"
    if product.bias is not None and product.right.transposed:
        return f"F.linear({left}, {product.right.symbol}, {product.bias})"
    return f"{left} @ {right}"


def _beside(product: Contract) -> Iterator[str]:
    """What a product by expert is given beside its factors."""
    if product.scaled:
        yield f", {_scaling(product)}"
    if product.bias is not None:
        yield f", bias={product.bias}"
    if product.accumulate:
        yield f", onto={product.out}"


def results_of(operation: Operation) -> str:
    """What the line assigns to."""
    return ", ".join(map(str, operation.outputs))


def tiles_key(operation: Fused, owner: str = "") -> str:
    """By which the constants of its kernel go: what it computes, after whose they are where modules share a table.

    What is computed of a seed in one way may be computed by another kernel in another.
    """
    key = f"{owner} {results_of(operation)}".lstrip()
    return f"{key} seeded" if any(isinstance(part, Draw) for part in operation.parts) else key


def _call(operation: Fused, tiles: str) -> str:
    """The call of a kernel's wrapper, with the operands of its parts where the kernel wants them."""
    values = {"needs": ", ".join(f"need_{out}" for out in operation.outputs)}
    values |= {"dtypes": ", ".join(dtype for out in operation.outputs if (dtype := dtype_of(out)))}
    maps = [part for part in operation.parts if isinstance(part, Map)]
    for number, weigh in enumerate(part for part in maps if part.function == "weigh"):
        values |= dict(zip((f"weighed{number}", f"weights{number}"), map(str, weigh.operands), strict=True))
    for made in (part for part in maps if part.function == "activate"):
        values |= {f"activated{number}": str(symbol) for number, symbol in enumerate(made.operands)}
    for added in (part for part in maps if part.function == "plus"):
        values["added0"] = str(added.operands[0])
    for gradient in (part for part in maps if part.function == "gate_gradient"):
        values |= {f"between{number}": str(symbol) for number, symbol in enumerate(gradient.operands)}
    kinds = {"codes": Convert, "seed": Draw, "dropped": Map, "gathered": Route}
    read = {kind: [p.operands[0] for p in operation.parts if isinstance(p, kind)] for kind in kinds.values()}
    for name, kind_of in kinds.items():
        values |= {f"{name}{number}": str(symbol) for number, symbol in enumerate(read[kind_of])}
        values[f"*{name}0"] = f"({', '.join(map(str, read[kind_of]))})"
    for reduced in (p for p in operation.parts if isinstance(p, Reduce) and len(p.operands) > 1):
        values["scales"] = f"{reduced.operands[1]}.scale"
        values |= {f"dotted{number}": str(symbol) for number, symbol in enumerate(reduced.operands[1:])}
    if not isinstance(operation.parts[0], Contract):
        values["operands"] = _applied_to(operation.parts[0])
    alike: dict[str, list[Contract]] = {}
    for number, part in enumerate(operation.products):
        values |= {name.format(number): text for name, text in _arguments(part).items()}
        alike.setdefault(kind(part), []).append(part)
    for number, parts in enumerate(alike.values()):
        arguments = list(map(_arguments, parts))
        for name in arguments[0]:
            values[f"*{name.format(number)}"] = f"({', '.join(each[name] for each in arguments)})"
    kernel = KERNELS[operation.kernel]
    spend = ", spend=True" if kernel.spends else ""
    return f'_{operation.kernel}({kernel.call.format(**values)}, tiles="{tiles}"{spend})'


def _arguments(product: Contract) -> Mapping[str, str]:
    """What a call may take of a product, by names to be filled with its number."""
    values = {"addend{}": str(product.addend), "bias{}": str(product.bias), "scaling{}": _scaling(product)}
    for side, operand in (("left", product.left), ("right", product.right)):
        values[f"{side}{{}}"] = _operand(operand)
        values[f"{side}{{}}T"] = _operand(replace(operand, transposed=not operand.transposed))
    return values


def _operand(operand: Operand) -> str:
    transpose = "mT" if operand.stacked else "t()"
    return f"{operand.symbol}.{transpose}" if operand.transposed else str(operand.symbol)
