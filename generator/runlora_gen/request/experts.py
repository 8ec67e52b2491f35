"""Stacks of experts: the 3-D weights of a mixture of experts. One generated module serves all of one shape."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from .activations import ACTIVATIONS, Activation

MAX_EXPERTS = 65_536
MAX_TOP_K = 1024
#: Why a stack is left out that could be generated for.
UNASKED = "experts: ask for them with target_parameters"


@dataclass(frozen=True)
class Stack:
    """A projection of experts, as an architecture has it: a parameter with a matrix for each expert.

    Attributes:
        name: of the parameter, as the end of one of PEFT's ``target_parameters``: ``gate_up_proj``.
        experts: E, how many there are in a layer.
        in_features, out_features: I and O of each.
        gathers: whether it reads the tokens, of which each goes to several experts; else it reads what another
            projection of the same experts made, a row for each of a token's experts, and combines these to a token's.
        top_k: experts of a token.
        bias: whether each has one.
        count: how many such stacks the whole model has.
        layout: ``out_in`` for E×O×I, ``in_out`` for E×I×O.
        module: what holds it, by the end of its name that all layers share: ``mlp.experts``.
        activation: what is between the projections of these experts, a key of
            :data:`~.activations.ACTIVATIONS`; empty if it is none of them, or not known.
    """

    name: str
    experts: int
    in_features: int
    out_features: int
    gathers: bool
    top_k: int
    bias: bool
    count: int
    layout: str = "out_in"
    module: str = ""
    activation: str = ""

    @property
    def parameter(self) -> str:
        """What PEFT's ``target_parameters`` call it: ``mlp.experts.gate_up_proj``."""
        return f"{self.module}.{self.name}".removeprefix(".")

    def is_called(self, target: str) -> bool:
        """Whether a target parameter is its name or the end of it, as PEFT compares them."""
        return f".{self.parameter}".endswith(f".{target}")

    def is_called_in(self, name: str) -> bool:
        """Whether a parameter's whole name in a model is of this stack, in any of its layers."""
        return f".{name}".endswith(f".{self.parameter}")


@dataclass(frozen=True)
class Experts:
    """All stacks of one shape.

    Attributes:
        experts, in_features, out_features, gathers, top_k: as of each stack.
        bias: whether any of them has one.
        count: how many such stacks the whole model has.
        projections: their names, in the order of the architecture, without repeats.
        transposed_weight: names of those whose weight is stored as E×I×O.
        activation: what is between the projections where both have adapters: then the first one hands its S over to
            the last, which reads what goes into the activation. Empty where they are computed each by itself.
    """

    experts: int
    in_features: int
    out_features: int
    gathers: bool
    top_k: int
    bias: bool
    count: int
    projections: tuple[str, ...]
    transposed_weight: tuple[str, ...] = ()
    activation: str = ""

    @property
    def name(self) -> str:
        """What it computes and the shape as file names carry them: ``gathered_experts_128x2048x1536``.

        Those on both sides of an activation are the first and the last: ``first_experts_128x2048x1536``.
        """
        kinds = ("first", "last") if self.activation else ("gathered", "combined")
        return f"{kinds[not self.gathers]}_experts_{self.experts}x{self.in_features}x{self.out_features}"

    @property
    def activated(self) -> Activation | None:
        """The activation between the projections."""
        return ACTIVATIONS[self.activation] if self.activation else None

    @property
    def read_features(self) -> int:
        """The width of what it reads: of the last one what goes into the activation, of which it makes in_features."""
        activation = None if self.gathers else self.activated
        return self.in_features if activation is None else self.in_features * activation.widths


def _pairs(stacks: Iterable[Stack]) -> Collection[Stack]:
    """Those that are the first and the last projection of the same experts in as many layers, around an activation."""
    alike: dict[tuple[object, ...], list[Stack]] = {}
    for stack in stacks:
        if stack.activation:
            key = (stack.module, stack.experts, stack.top_k, stack.count, stack.activation)
            alike.setdefault(key, []).append(stack)
    paired: set[Stack] = set()
    for members in alike.values():
        first = [stack for stack in members if stack.gathers]
        last = [stack for stack in members if not stack.gathers]
        if len(first) == len(last) == 1 and first[0].in_features == last[0].out_features:
            paired.update(members)
    return paired


def experts(stacks: tuple[Stack, ...], *, chained: bool = True) -> tuple[Experts, ...]:
    """The distinct shapes of stacks, in the order of their first.

    ``chained``: whether the two projections of the same experts are computed as a chain where what is between them is
    known; a shape that is chained anywhere is so everywhere.
    """
    alike: dict[tuple[int, int, int, bool, int], list[Stack]] = {}
    activations: dict[tuple[int, int, int, bool, int], str] = {}
    paired = _pairs(stacks) if chained else ()
    for stack in stacks:
        key = (stack.experts, stack.in_features, stack.out_features, stack.gathers, stack.top_k)
        alike.setdefault(key, []).append(stack)
        if stack in paired:
            activations.setdefault(key, stack.activation)
    return tuple(
        Experts(
            *key,
            bias=any(member.bias for member in members),
            count=sum(member.count for member in members),
            projections=tuple(dict.fromkeys(member.name for member in members)),
            transposed_weight=tuple(dict.fromkeys(m.name for m in members if m.layout == "in_out")),
            activation=activations.get(key, ""),
        )
        for key, members in alike.items()
    )
