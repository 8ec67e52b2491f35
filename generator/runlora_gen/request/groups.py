"""Groups: the projections of an architecture that read one activation. One generated module serves one group."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .architecture import Architecture, Projection
from .mlps import Mlp

#: What the linears of a group are called in its module, and the names that models give them.
_QKV = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
)
_GATE_UP = (("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"))
_SHORT = {
    name: short
    for linears, rows in ((("q", "k", "v"), _QKV), (("gate", "up"), _GATE_UP))
    for names in rows
    for name, short in zip(names, linears, strict=True)
}
#: Linears of one parent that read one activation, by the names that models give them: first attention's, the query
#: before the others. Where a parent has several of a row and their widths agree, these share it.
ATTENTION = (
    (*_QKV[0], "kv_a_proj_with_mqa"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    *_QKV[1:],
)
OTHERS = (
    *_GATE_UP,
    ("in_proj_qkvz", "in_proj_ba"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
)
#: Linears of a group: what the kernels take, and more of them are rare.
_FEWEST, _MOST = 2, 3


@dataclass(frozen=True)
class Group:
    """All groups of linears with the same names and shapes.

    Attributes:
        linears: what they are called, in order: ``("q", "k", "v")``.
        in_features: I of all.
        out_features: O of each.
        bias: whether any of them has a bias.
        count: how many such groups the whole model has.
        projections: the names in the model of the linears of one, without repeats.
        transposed_weight: names of those whose checkpoint stores the weight as I×O (GPT-2's Conv1D).
    """

    linears: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    bias: bool
    count: int
    projections: tuple[tuple[str, ...], ...]
    transposed_weight: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The names of its linears in one: ``qkv``, ``gate_up``."""
        return ("" if all(len(linear) == 1 for linear in self.linears) else "_").join(self.linears)

    @property
    def name(self) -> str:
        """Kind and shape as file names carry them: ``qkv_4096x4096_1024_1024``, all widths only where they differ."""
        widths = self.out_features if len(set(self.out_features)) > 1 else self.out_features[:1]
        return f"{self.kind}_{self.in_features}x{'_'.join(map(str, widths))}"

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(in_features, out_features) of each linear."""
        return tuple((self.in_features, width) for width in self.out_features)

    @property
    def held(self) -> tuple[tuple[int, int], ...]:
        """The same of the linears that the model has: here they are these."""
        return self.shapes

    def reads(self, projection: Projection) -> bool:
        """Whether a linear of its reads what it keeps of its input: all do."""
        return self.has(projection)

    def has(self, projection: Projection) -> bool:
        """Whether a projection of the architecture that it is of is one of its linears."""
        return any(
            (projection.name, projection.in_features, projection.out_features) == (name, self.in_features, width)
            for names in self.projections
            for name, width in zip(names, self.out_features, strict=True)
        )


def groups(architecture: Architecture) -> tuple[Group, ...]:
    """The distinct groups of an architecture, in the order in which its projections first use them.

    Left alone are linears of which some layers lack one, and more than three that read one activation.
    """
    by_input: dict[tuple[str, int], list[Projection]] = {}
    for projection in architecture.projections:
        by_input.setdefault((projection.input, projection.in_features), []).append(projection)
    found: dict[tuple[tuple[str, ...], int, tuple[int, ...]], list[list[Projection]]] = {}
    for members in by_input.values():
        linears = _linears(members)
        if _FEWEST <= len(members) <= _MOST and linears is not None and len({m.count for m in members}) == 1:
            key = linears, members[0].in_features, tuple(member.out_features for member in members)
            found.setdefault(key, []).append(members)
    return tuple(_group(key, rows) for key, rows in found.items())


def ungrouped(architecture: Architecture, grouped: Sequence[Group | Mlp]) -> Mapping[tuple[int, int], int]:
    """How many linears of each shape the model has beside those in these groups and MLPs."""
    left: dict[tuple[int, int], int] = {}
    for projection in architecture.projections:
        shape = projection.in_features, projection.out_features
        left[shape] = left.get(shape, 0) + projection.count
    for group in grouped:
        for shape in group.held:
            left[shape] -= group.count
    return left


def _linears(members: Sequence[Projection]) -> tuple[str, ...] | None:
    """What the linears are called; None where that would not tell them apart."""
    names = tuple(_SHORT.get(member.name, re.sub(r"\W", "_", member.name.removesuffix("_proj"))) for member in members)
    apart = len(set(names)) == len(names)
    return names if apart and all(re.fullmatch(r"[A-Za-z]\w*", name) for name in names) else None


def _group(key: tuple[tuple[str, ...], int, tuple[int, ...]], rows: Sequence[Sequence[Projection]]) -> Group:
    members = [member for row in rows for member in row]
    return Group(
        *key,
        bias=any(member.bias for member in members),
        count=sum(row[0].count for row in rows),
        projections=tuple(dict.fromkeys(tuple(member.name for member in row) for row in rows)),
        transposed_weight=tuple(dict.fromkeys(m.name for m in members if m.layout == "in_out")),
    )
