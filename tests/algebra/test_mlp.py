"""The table of a gated MLP: every program of it by numbers, how many there are, and what they keep."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray
from runlora_gen.algebra.count import count_programs
from runlora_gen.algebra.derivation import CAST_ADAPTER, NO_FACTS, Facts, Way
from runlora_gen.algebra.enumerate import Phase, Program, enumerate_backwards, enumerate_forwards, enumerate_programs
from runlora_gen.algebra.group import group
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.algebra.mlp import LINEARS, MLP
from runlora_gen.algebra.operations import Contract, Convert, Fused, Map, Operand, Operation, Reduce, products
from runlora_gen.algebra.schedule import schedule
from runlora_gen.kernels.sites import serves

Array = NDArray[np.float64]
Values = dict[str, Array]

GOALS = tuple(map(str, MLP.gradients))
WIDE = frozenset({CAST_ADAPTER})
TORCH = MLP.rows(lambda _: False)
#: What every program keeps: S of all linears.
S = ("S_gate", "S_up", "S_down")


def programs(facts: Facts = NO_FACTS) -> tuple[Program, ...]:
    return enumerate_programs(MLP, GOALS, facts=facts)


# By numbers

SIZES = {"T": 5, "I": 3, "O_gate": 7, "O_up": 7, "I_down": 7, "O_down": 4, "R_gate": 2, "R_up": 3, "R_down": 1}
SCALINGS = {"s_gate": 0.75, "s_up": -1.25, "s_down": 0.5}


def given() -> Values:
    """All that is given, with a bias everywhere."""
    generator = np.random.default_rng(0)
    names = [argument.name for argument in MLP.arguments if argument.name in MLP.symbols]
    values = {name: generator.standard_normal([SIZES[d] for d in MLP[name].shape]) for name in (*names, "dY_down")}
    return values | {name: values[f"lora_{name}"] for name in names if f"lora_{name}" in values}


def activate(gate: Array, up: Array) -> Array:
    """Any function of both, which tells them apart."""
    made: Array = np.sin(gate) * up + gate * up**2
    return made


def gate_gradient(dx: Array, gate: Array, up: Array) -> Array:
    made: Array = dx * (np.cos(gate) * up + up**2)
    return made


def up_gradient(dx: Array, gate: Array, up: Array) -> Array:
    made: Array = dx * (np.sin(gate) + 2 * gate * up)
    return made


FUNCTIONS = {"activate": activate, "gate_gradient": gate_gradient, "up_gradient": up_gradient}


def expected(of: Values) -> Values:
    """Straight from what a linear with LoRA is, and its gradients from the chain rule: all that there is."""

    def weight(linear: str) -> Array:
        return of[f"W_{linear}"] + SCALINGS[f"s_{linear}"] * of[f"B_{linear}"] @ of[f"A_{linear}"]

    def backward(linear: str, x: Array, dy: Array) -> Values:
        outer = SCALINGS[f"s_{linear}"] * dy.T @ x
        a, b = of[f"A_{linear}"], of[f"B_{linear}"]
        return {f"dA_{linear}": b.T @ outer, f"dB_{linear}": outer @ a.T, f"db_{linear}": dy.sum(0)}

    x = of["X"]
    gate, up = (x @ weight(linear).T + of[f"b_{linear}"] for linear in LINEARS[:2])
    inner = activate(gate, up)
    found = {"Y_gate": gate, "Y_up": up, "X_down": inner, "Y_down": inner @ weight("down").T + of["b_down"]}
    read = dict(zip(LINEARS, (x, x, inner), strict=True))
    found |= {f"S_{j}": SCALINGS[f"s_{j}"] * read[j] @ of[f"A_{j}"].T for j in LINEARS}
    found |= backward("down", inner, of["dY_down"])
    d_inner = of["dY_down"] @ weight("down")
    d_gate, d_up = gate_gradient(d_inner, gate, up), up_gradient(d_inner, gate, up)
    found |= backward("gate", x, d_gate) | backward("up", x, d_up)
    return found | {"dX": d_gate @ weight("gate") + d_up @ weight("up")}


def matrix(operand: Operand, values: Values) -> Array:
    value = values[operand.symbol.name]
    return value.T if operand.transposed else value


def step_value(step: Operation, values: Values) -> Array:
    match step:
        case Contract():
            made = matrix(step.left, values) @ matrix(step.right, values)
            made = made if step.scaling is None else made * SCALINGS[step.scaling]
            made = made if step.bias is None else made + values[step.bias.name]
            return values[step.out.name] + made if step.accumulate else made
        case Convert(function="cast"):
            return values[step.operands[0].name]
        case Map():
            return FUNCTIONS[step.function](*(values[operand.name] for operand in step.operands))
        case Reduce(function="sum"):
            summed: Array = values[step.operands[0].name].sum(0)
            return summed
    raise AssertionError(step)


def run(phase: Phase, values: Values) -> Values:
    """All that a phase makes, as a module runs it; what stays within a kernel is there only within."""
    values = dict(values)
    for step in schedule(phase, lambda _: 1).steps:
        inner = dict(values)
        for each in products(step.operation):
            inner[each.out.name] = step_value(each, inner)
        values |= {out.name: inner[out.name] for out in step.operation.outputs}
    return values


@pytest.mark.parametrize("facts", [NO_FACTS, WIDE], ids=["", "casts"])
def test_every_program_computes_the_same(facts: Facts) -> None:
    """Each forward gives what may be kept, and each backward is given that alone: so does every pair of both."""
    of = given()
    right = expected(of)
    arguments = {argument.name for argument in MLP.arguments} - (
        {f"{factor}_{linear}" for factor in "AB" for linear in LINEARS} if facts else set()
    )
    known = {**of, **right}
    # The factors as the products read them, kept or given.
    read = {name: of[name] for name in MLP.symbols if name in of and not name.startswith("lora")}

    def check(made: Values, names: Iterable[str], name: str) -> None:
        for each in names:
            assert np.allclose(made[each], known[each], rtol=1e-11, atol=1e-12), (name, each)

    found = programs(facts)
    for forward in dict.fromkeys(program.forward for program in found):
        made = run(forward, {name: value for name, value in of.items() if name in arguments})
        check(made, ("Y_down", *map(str, forward.keeps)), forward.name)
    for backward in dict.fromkeys(program.backward for program in found):
        made = run(backward, read | {str(symbol): known[str(symbol)] for symbol in backward.saved})
        check(made, GOALS, backward.name)
    # Every pair of a forward that keeps and a backward that takes the same is there, and no other.
    pairs = {(forward.keeps, forward, backward) for forward, backward in ((p.forward, p.backward) for p in found)}
    assert len(pairs) == len(found) and all(keeps == backward.saved for keeps, _, backward in pairs)


def test_the_base_is_the_mlp_without_adapters() -> None:
    of = given()
    of |= {name: np.zeros_like(value) for name, value in of.items() if re.match(r"(lora_)?[AB]_", name)}
    values = dict(of)
    for operation in MLP.base:
        values[operation.outputs[0].name] = step_value(operation, values)
    right = expected(of)
    for name in ("Y_gate", "Y_up", "X_down", "Y_down", "dX"):
        assert np.allclose(values[name], right[name])


def test_formulas_parse_back() -> None:
    assert all(MLP.parse(str(operation)) == operation for operation in (*MLP.operations, *MLP.base))


# How many

FEW = dict.fromkeys(("T", *(f"O_{linear}" for linear in LINEARS)), 64)


@pytest.mark.parametrize(
    ("table", "count"),
    [
        # Y of gate and up is kept or made again, and X_down is.
        (TORCH, 2 * 2),
        # Of a forward S and Y of gate and up have two ways, S and Y of down too: 16. Where Y_gate and Y_up are made
        # again they have two ways, kept one: 3. P and dB of down are one pass or not, dX of down has 2 ways, that of X,
        # and dA of gate and up: 16. With that all in one pass, or P and dB of gate and up likewise 2 and, of few rows,
        # those of both in one launch, X_down kept or made again: 7.
        (MLP.table, 16 * 3 * 16 * 7),
        (MLP.rows(partial(serves, dtype="bf16", rank=32, dims=FEW)), 16 * 3 * 16 * 7),
        (MLP.rows(partial(serves, dtype="bf16", rank=32, dims={**FEW, "T": 2049})), 16 * 3 * 16 * 5),
        (MLP.rows(partial(serves, dtype="bf16", rank=32, dims={**FEW, "O_up": 8193})), 16 * 3 * 16 * 5),
        (MLP.rows(partial(serves, dtype="bf16", rank=64, dims=FEW)), 1152),
        # Above 64 neither what is in one pass over X or dY, nor all in one.
        (MLP.rows(partial(serves, dtype="bf16", rank=65, dims=FEW)), 192),
        (MLP.rows(partial(serves, dtype="bf16", rank=129, dims=FEW)), 96),
        # No kernel multiplies matrices of float32.
        (MLP.rows(partial(serves, dtype="fp32", rank=8, dims=FEW)), 48),
    ],
    ids=["torch", "kernels", "few rows", "rows", "columns", "rank 64", "rank 65", "rank 129", "fp32"],
)
@pytest.mark.parametrize("facts", [NO_FACTS, WIDE], ids=["", "casts"])
def test_exact_counts(table: Sequence[Way], count: int, facts: Facts) -> None:
    """Casts are kept by all, so that they multiply nothing."""
    found = enumerate_programs(MLP, GOALS, table=tuple(table), facts=facts)
    assert len(found) == len({program.id for program in found}) == count
    assert count_programs(MLP, GOALS, table=table, facts=facts) == count


def test_exact_counts_of_phases() -> None:
    assert len(enumerate_backwards(MLP, GOALS)) == 3 * 16 * 7
    assert len(enumerate_forwards(MLP)) == 16
    # Whatever of Y and X_down a backward takes, each forward makes it anyway.
    assert len({program.forward for program in programs()}) == 16 * 4


@pytest.mark.parametrize("facts", [NO_FACTS, WIDE], ids=["", "casts"])
def test_they_are_counted_without_a_list(facts: Facts) -> None:
    """Whatever kinds of gradients are wanted, of all linears."""
    kinds = dict.fromkeys(goal.partition("_")[0] for goal in GOALS)
    some = itertools.chain.from_iterable(itertools.combinations(kinds, count) for count in range(1, len(kinds) + 1))
    for wanted, table in itertools.product(some, (TORCH, MLP.table)):
        goals = tuple(goal for goal in GOALS if goal.partition("_")[0] in wanted)
        found = enumerate_programs(MLP, goals, table=table, facts=facts)
        assert count_programs(MLP, goals, table=table, facts=facts) == len(found) > 0


# What the table is made of


def test_rows_are_those_of_a_group_and_of_the_lone_linear() -> None:
    """But for what is between, and what is left out, as it costs the same; names tell torch from a kernel."""

    def rows(ways: Iterable[Way], suffix: str = "") -> set[tuple[str, tuple[str, ...]]]:
        return {
            (
                re.sub(suffix, "", " ".join(map(str, way.targets))),
                tuple(re.sub(suffix, "", str(op)) for op in way.operations),
            )
            for way in ways
        }

    last = [way for way in MLP.table if all(str(target).endswith("_down") for target in way.targets)]
    assert rows(last, "_down") - rows(LINEAR.table) == {
        ("X", ()),
        ("X", ("X = activate(Y_gate, Y_up)",)),
        ("X S", ("mlp_activate: X = activate(Y_gate, Y_up); S = s * X @ A.T",)),
    }
    mine, pair = rows(set(MLP.table).difference(last)), rows(group(LINEARS[:2]).table)
    assert {target: len(operations) for target, operations in mine - pair} == {
        "Y_gate Y_up": 0,
        "dY_gate dY_up": 2,
        "dA_down dY_gate dY_up P_gate P_up dB_gate dB_up": 1,
    }
    # A sum that begins with another contribution, and two kernels in place of one.
    assert sorted((target, operations[0][:18]) for target, operations in pair - mine) == [
        ("Y_gate Y_up", "Y_gate = S_gate @ "),
        ("Y_gate Y_up", "fused_gemm: Y_gate"),
        ("dX", "dX = P_gate @ A_ga"),
    ]
    for way in MLP.table:
        kernels = {op.kernel for op in way.operations if isinstance(op, Fused)}
        assert (way.name in ("fused", "one_launch", "with_gradients")) == bool(kernels), way.name


def test_what_is_in_one_pass() -> None:
    kernels = {op.kernel: str(op) for op in MLP.operations if isinstance(op, Fused) and op.kernel.startswith("mlp")}
    assert kernels == {
        "mlp_activate": "mlp_activate: X_down = activate(Y_gate, Y_up); S_down = s_down * X_down @ A_down.T",
        "mlp_activate_backward": "mlp_activate_backward: X_down := activate(Y_gate, Y_up); "
        "dA_down = P_down.T @ X_down; "
        "dY_gate = gate_gradient(dX_down, Y_gate, Y_up); dY_up = up_gradient(dX_down, Y_gate, Y_up); "
        "P_gate = s_gate * dY_gate @ B_gate; P_up = s_up * dY_up @ B_up; "
        "dB_gate = dY_gate.T @ S_gate; dB_up = dY_up.T @ S_up",
    }


def test_sizes_are_each_linear_s_own() -> None:
    """Down's X is what gate and up make; its width is named by down."""
    assert MLP["W_gate"].shape == ("O_gate", "I") and MLP["W_down"].shape == ("O_down", "I_down")
    assert MLP["X_down"].shape == MLP["dX_down"].shape == ("T", "I_down") and MLP["Y_up"].shape == ("T", "O_up")
    assert MLP.inputs()[0] == MLP["X"] and len(MLP.arguments) == 1 + 3 * (len(LINEAR.arguments) - 1)
    assert [str(output) for output in MLP.outputs] == ["Y_down"]


@pytest.mark.parametrize("facts", [NO_FACTS, WIDE], ids=["", "casts"])
def test_every_symbol_and_row_is_used(facts: Facts) -> None:
    found = programs(facts)
    ways = {way for program in found for way in (*program.forward.ways, *program.backward.ways)}
    assert ways == {way for way in MLP.table if facts or not way.when}
    symbols = {
        symbol
        for way in ways
        for op in way.operations
        for step in products(op)
        for symbol in (*step.reads, *step.outputs, *((step.bias,) if isinstance(step, Contract) and step.bias else ()))
    }
    casts = set() if facts else {symbol for symbol in MLP.symbols.values() if symbol.name.startswith("lora")}
    assert symbols == set(MLP.symbols.values()) - casts


# What is kept


@pytest.mark.parametrize("facts", [NO_FACTS, WIDE], ids=["", "casts"])
def test_what_is_kept_is_never_made_again(facts: Facts) -> None:
    """S of all linears, and of what is cast the factors; of Y and X_down there is a choice."""
    casts = {f"{factor}_{linear}" for factor in "AB" for linear in LINEARS} if facts else set()
    assert {str(symbol) for symbol in MLP.kept} == {*S, *(f"{f}_{linear}" for f in "AB" for linear in LINEARS)}
    kept = set()
    for program in programs(facts):
        made = {out for op in program.backward.operations for out in op.outputs}
        assert made.isdisjoint(MLP.kept)
        names = {str(symbol) for symbol in program.kept}
        assert names >= {*S, *casts} and set(program.kept) <= program.backward.reads
        kept.add(frozenset(names - {*S, *casts}))
        assert MLP["X"] in program.saved_inputs
    assert kept == {frozenset(names) for names in ((), ("X_down",), ("Y_gate", "Y_up"), ("Y_gate", "Y_up", "X_down"))}


def test_what_a_kernel_makes_again_of_gate_and_up_is_not_kept() -> None:
    """X_down, which no other row of a backward reads but dA_down's."""
    for program in programs():
        again = "mlp_activate_backward" in program.backward.kernels
        assert not (again and MLP["X_down"] in program.made & set(program.kept))
        made = {out for op in program.backward.operations for out in op.outputs}
        assert again != (MLP["X_down"] in made | set(program.kept))


def test_without_gradients_of_b_of_s_is_kept_what_y_is_made_again_of() -> None:
    goals = tuple(goal for goal in GOALS if not goal.startswith("dB"))
    found = enumerate_programs(MLP, goals)
    for program in found:
        kept = {str(symbol) for symbol in program.kept}
        assert kept & {*S} == ({*S[:2]} if "Y_gate" not in kept else set())
    assert "mlp_activate_backward" not in set().union(*(program.kernels for program in found)), "it makes dB as well"


def test_no_weight_is_merged() -> None:
    assert not any(program.lossy_in_16_bit for program in programs()) and not MLP.lossy and not MLP.deltas
