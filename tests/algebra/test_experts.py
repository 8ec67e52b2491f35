"""The table of experts: every program of it by numbers, how many there are, and what they keep."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray
from runlora_gen.algebra.count import count_programs
from runlora_gen.algebra.derivation import CAST_ADAPTER, NO_FACTS, Derivation, Facts, Way
from runlora_gen.algebra.enumerate import Phase, Program, enumerate_programs
from runlora_gen.algebra.experts import (
    ACTIVATED,
    ACTIVATED_DROPPED,
    COMBINED,
    COMBINED_DROPPED,
    GATHERED,
    GATHERED_DROPPED,
    HANDED,
    HANDED_DROPPED,
    OF_EXPERTS,
    experts,
)
from runlora_gen.algebra.operations import (
    Contract,
    Convert,
    Draw,
    Fused,
    Map,
    Operand,
    Operation,
    Reduce,
    Route,
    products,
)
from runlora_gen.algebra.schedule import schedule
from runlora_gen.kernels.sites import serves

Array = NDArray[np.float64]
Values = dict[str, Array]

DROPPED = (GATHERED_DROPPED, COMBINED_DROPPED, HANDED_DROPPED, ACTIVATED_DROPPED)
SITES = OF_EXPERTS
GOALS = {site: tuple(map(str, site.gradients)) for site in SITES}
#: Those whose rows become tokens, those that hand over, and those that read what goes into an activation.
GIVE_TOKENS = (COMBINED, ACTIVATED, COMBINED_DROPPED, ACTIVATED_DROPPED)
HANDING, ACTIVATING = (HANDED, HANDED_DROPPED), (ACTIVATED, ACTIVATED_DROPPED)
RATE = 0.25
WIDE = frozenset({CAST_ADAPTER})
SCALINGS = {"s": 0.75, "s_U": 0.5}
SCALING = SCALINGS["s"]
every_site = pytest.mark.parametrize("site", SITES, ids=lambda site: site.site)


def torch_alone(site: Derivation) -> tuple[Way, ...]:
    return site.rows(lambda _: False)


# By numbers


@dataclass(frozen=True)
class Problem:
    """Tokens that chose experts: of each row, sorted by expert, its token, its expert and the router's weight.

    Expert 2 of 4 has no row.
    """

    tokens: Array
    experts: Array
    given: Values

    def rows_of(self, expert: int) -> Array:
        """Where they are."""
        return np.flatnonzero(self.experts == expert)

    def values(self, *names: str) -> Values:
        """Some of what a site is given."""
        return {name: self.given[name] for name in names if name in self.given}


N, TOP_K, E, I, O, R = 5, 2, 4, 3, 6, 2  # noqa: E741 - as the formulas have it
CHOSEN = ((0, 1), (3, 0), (1, 3), (0, 3), (1, 0))


def problem(site: Derivation) -> Problem:
    choices = np.array(CHOSEN).reshape(-1)
    order = np.argsort(choices, kind="stable")
    generator = np.random.default_rng(0)
    sizes = {"N": N, "T": N * TOP_K, "E": E, "I": I, "O": O, "R": R, "F": 2 * I, "RU": R + 1}
    arguments = [argument.name for argument in site.arguments if argument.name in site.symbols]
    names = [*arguments, "dY", *(("P",) if site in HANDING else ())]
    names = [name for name in names if name != "dropout"]
    given = {name: generator.standard_normal([sizes[dim] for dim in site[name].shape]) for name in names}
    given |= {name: given[f"lora_{name}"] for name in ("A", "B", "BU") if name in given}
    if site in DROPPED:  # whichever draws, from the rate or from a seed: the same mask
        given["K"] = (generator.random((sizes["T"], I)) >= RATE).astype(np.float64)
        given |= dict.fromkeys(("dropout", "seed"), np.zeros(()))
    return Problem(order // TOP_K, choices[order], given)


def activate(u: Array) -> Array:
    """Of a gate and what it is multiplied with, side by side: any function of both."""
    gate, up = np.split(u, 2, -1)
    made: Array = np.sin(gate) * up
    return made


def activate_backward(dx: Array, u: Array) -> Array:
    gate, up = np.split(u, 2, -1)
    return np.concatenate([dx * np.cos(gate) * up, dx * np.sin(gate)], -1)


def expected(site: Derivation, of: Problem) -> Values:
    """Row by row, straight from what a linear with LoRA is, and its gradients from the chain rule."""
    w, b, lora_a, lora_b, dy = (of.given[name] for name in ("W", "b", "lora_A", "lora_B", "dY"))
    x = activate(of.given["U"]) if site in ACTIVATING else of.given["X"]
    found = {"Y": np.zeros((N, O)) if site in GIVE_TOKENS else np.zeros((len(of.tokens), O))}
    found |= {"dX": np.zeros_like(x), "dA": np.zeros_like(lora_a), "dB": np.zeros_like(lora_b)}
    found |= {"dg": np.zeros_like(of.given["g"])} if site in GIVE_TOKENS else {}
    kept = of.given["K"] / (1 - RATE) if site in DROPPED else np.ones((len(of.tokens), I))
    for row, (token, expert) in enumerate(zip(of.tokens, of.experts, strict=True)):
        at = row if site in GIVE_TOKENS else token
        whole = w[expert] + SCALING * lora_b[expert] @ lora_a[expert] * kept[row]
        made = whole @ x[at] + b[expert]
        if site not in GIVE_TOKENS:
            found["Y"][row] = made
            gradient = dy[row]
        else:
            found["Y"][token] += of.given["g"][row] * made
            found["dg"][row] = dy[token] @ made
            gradient = of.given["g"][row] * dy[token]
        found["dX"][at] += gradient @ whole
        outer = SCALING * np.outer(gradient, x[at] * kept[row])
        found["dA"][expert] += lora_b[expert].T @ outer
        found["dB"][expert] += outer @ lora_a[expert].T
    if site in HANDING:  # the gradient of S is another module's, and so is that of B
        del found["dB"]
        left = x[of.tokens] * kept
        found["S"] = SCALING * np.stack([lora_a[e] @ row for row, e in zip(left, of.experts, strict=True)])
        p = of.given["P"]
        found["dX"], found["dA"] = np.zeros_like(x), np.zeros_like(lora_a)
        for row, (token, expert) in enumerate(zip(of.tokens, of.experts, strict=True)):
            found["dX"][token] += dy[row] @ w[expert] + p[row] @ lora_a[expert] * kept[row]
            found["dA"][expert] += np.outer(p[row], left[row])
    if site in ACTIVATING:
        du = activate_backward(found.pop("dX"), of.given["U"])
        found |= {"dU": du, "dBU": np.zeros_like(of.given["BU"])}
        found["PU"] = SCALINGS["s_U"] * np.stack([d @ of.given["BU"][e] for d, e in zip(du, of.experts, strict=True)])
        for row, expert in enumerate(of.experts):
            found["dBU"][expert] += np.outer(du[row], of.given["SU"][row])
    return found


def matrices(operand: Operand, values: Values) -> Array:
    value = values[operand.symbol.name]
    return np.swapaxes(value, -1, -2) if operand.transposed else value


def product(step: Contract, values: Values, of: Problem) -> Array:
    left, right = matrices(step.left, values), matrices(step.right, values)
    if step.stacked and step.right.stacked:
        made = np.stack([left[e] @ right[e] for e in range(E)])
    elif step.stacked:
        made = np.stack([left[:, of.rows_of(e)] @ right[of.rows_of(e)] for e in range(E)])
    else:
        made = np.stack([left[row] @ right[expert] for row, expert in enumerate(of.experts)])
    made = made if step.scaling is None else made * SCALINGS[step.scaling]
    if step.addend is not None:
        made = made + values[step.addend.name]
    return made if step.bias is None else made + values[step.bias.name][of.experts]


def step_value(step: Operation, values: Values, of: Problem) -> Array:
    """What a step makes."""
    match step:
        case Contract():
            made = product(step, values, of)
            return values[step.out.name] + made if step.accumulate else made
        case Convert(function="cast"):
            return values[step.operands[0].name]
        case Route(function="gather"):
            return values[step.operands[0].name][of.tokens]
        case Route(function="combine"):
            rows, *weights = (values[operand.name] for operand in step.operands)
            weighed = rows * weights[0][:, None] if weights else rows
            return np.stack([weighed[of.tokens == token].sum(0) for token in range(N)])
        case Draw():
            return of.given[step.out.name]
        case Map(function="drop"):
            rows, mask = (values[operand.name] for operand in step.operands)
            return rows * mask / (1 - RATE)
        case Map(function="activate"):
            return activate(values[step.operands[0].name])
        case Map(function="activate_backward"):
            return activate_backward(*(values[operand.name] for operand in step.operands))
        case Map(function="weigh"):
            rows, weights = (values[operand.name] for operand in step.operands)
            return rows * weights[:, None]
        case Reduce(function="dot"):
            first, second, *more = (values[operand.name] for operand in step.operands)
            dots = (first * second).sum(1)
            return dots + (more[0] * more[1][of.experts]).sum(1) if more else dots
    raise AssertionError(step)


def run(operations: Iterable[Operation], values: Values, of: Problem) -> Values:
    """All that some operations make, each in its turn, and what stays within a kernel only there."""
    for operation in operations:
        inner = dict(values)
        for step in products(operation):
            inner[step.out.name] = step_value(step, inner, of)
        values |= {out.name: inner[out.name] for out in operation.outputs}
    return values


def in_order(phase: Phase) -> Iterator[Operation]:
    """As a module runs them."""
    return (step.operation for step in schedule(phase, lambda _: 1).steps)


def programs(site: Derivation) -> Iterator[Program]:
    for facts in (NO_FACTS, WIDE):
        yield from enumerate_programs(site, GOALS[site], facts=facts)


@every_site
def test_every_program_computes_the_same(site: Derivation) -> None:
    """With a bias, and from what it saves alone: each forward, and each backward with what it is given of one.

    What forwards give a backward is the same of all that give it, so that no pair needs to be run.
    """
    of = problem(site)
    right = expected(site, of)
    outputs, names = {*map(str, site.outputs)}, {argument.name for argument in site.arguments}
    assert not of.rows_of(2).size and right.keys() == {*outputs, *GOALS[site]}
    made: dict[Phase, Values] = {}
    made_by_all: Values = {}
    went_back = set[object]()
    for program in programs(site):
        if program.forward not in made:
            casts = any(isinstance(op, Convert) for op in program.forward.operations)
            forward = run(in_order(program.forward), of.values(*names - ({"A", "B"} if casts else set())), of)
            for name, value in forward.items():
                wanted = right[name] if name in outputs else made_by_all.setdefault(name, value)
                assert np.allclose(value, wanted, rtol=1e-12, atol=1e-12), (program.id, name)
            assert outputs <= forward.keys()
            made[program.forward] = forward
        given = [str(symbol) for symbol in (*program.kept, *program.saved_inputs)]
        if (program.backward, *given) in went_back:
            continue
        went_back.add((program.backward, *given))
        kept = {name: made[program.forward][name] for name in given}
        values = of.values("dY", "b", *(("P",) if site in HANDING else ()))
        backward = run(in_order(program.backward), values | kept, of)
        for name in right.keys() - outputs:
            assert np.allclose(backward[name], right[name], rtol=1e-12, atol=1e-12), (program.id, name)
    assert made and went_back


def test_g_s_gradient_without_a_bias_is_that_of_the_rows_alone() -> None:
    """The bias is the one part of a row that dXu · X does not hold."""
    of = problem(COMBINED)
    of.given["b"][:] = 0
    rows = run((COMBINED.parse("dYr = gather(dY)"),), of.values("dY"), of)["dYr"]
    values = of.values("X", "A", "B", "W", "b") | {"dYr": rows}
    formulas = ("P = s * dYr @ B[e]", "dXu = P @ A[e]", "dXu += dYr @ W[e]", "dg = dot(dXu, X, dYr, b)")
    made = run(tuple(map(COMBINED.parse, formulas)), values, of)
    assert np.allclose(made["dg"], (made["dXu"] * of.given["X"]).sum(1))
    assert np.allclose(made["dg"], expected(COMBINED, of)["dg"])


@every_site
def test_formulas_parse_back(site: Derivation) -> None:
    assert all(site.parse(str(operation)) == operation for operation in site.operations)


# How many


@pytest.mark.parametrize(
    ("site", "torch", "with_kernels"),
    [
        # Y 3 ways, dX 3, where M is read kept or made again, S kept or made again. With kernels S is made of rows or of
        # tokens, as dA is, Y and dX have a way more, P and dB may be one pass: S kept 8 or made again 14, 5 × 2 × 2.
        (GATHERED, 3 * 4 * 2, (8 + 14) * 5 * 2 * 2),
        # dXu 2 ways and merged; dg of dXu, of Yr that is kept, made again in 2 ways or merged; M kept or made again
        # where one is merged. With kernels Yr and dXu have a way more, dg is in one pass with dX; P 3 ways.
        (COMBINED, 3 * 2 * (2 * 4 + 2 * 2 + 4 * 2 + 2), 4 * 2 * 3 * (3 * 6 + 3 * 2 + 6 * 2 + 2)),
        # Nothing is kept. With kernels a way more of S, Y, dX and dA.
        (HANDED, 1, 2 * 2 * 2 * 2),
        # X and S kept or made again, dg of dXu or of Yr, kept or made again. With kernels 2 ways of Yr and of dXu.
        (ACTIVATED, 12, 1272),
        # Nothing is merged, and the mask comes first in dX. H, too, is kept or made again; or a seed is, of which
        # kernels draw: then S, dA and dX have one way each.
        (GATHERED_DROPPED, 2 * 2 * 2, 3 * 2 * 2 * 2 + 3 * 2 * 2),
        (COMBINED_DROPPED, 2 * 2 * 2 * 4, 3 * 3 * 2 * 6 * 2 + 3 * 3 * 2 * 6),
        (HANDED_DROPPED, 2, 2 * 2 + 2),
        (ACTIVATED_DROPPED, 22, 1092),
    ],
    ids=lambda value: getattr(value, "site", None),
)
def test_exact_counts(site: Derivation, torch: int, with_kernels: int) -> None:
    casts = {site["A"], site["B"]}
    for table, expected in ((torch_alone(site), torch), (None, with_kernels)):
        found = enumerate_programs(site, GOALS[site], table=table)
        assert len(found) == len({program.id for program in found}) == expected
        # Casts that the backward reads are kept or made again; another module's is made again.
        of_casts = enumerate_programs(site, GOALS[site], table=table, facts=WIDE)
        assert len(of_casts) == sum(2 ** len(casts & program.backward.reads) for program in found)


@every_site
@pytest.mark.parametrize("facts", [NO_FACTS, WIDE], ids=["", "casts"])
def test_they_are_counted_without_a_list(site: Derivation, facts: Facts) -> None:
    every = GOALS[site]
    # Of three and more one is what all of them are.
    for goals in itertools.chain.from_iterable(itertools.combinations(every, count) for count in (1, 2, len(every))):
        for table in (torch_alone(site), site.table):
            found = enumerate_programs(site, goals, table=table, facts=facts)
            assert count_programs(site, goals, table=table, facts=facts) == len(found)


@pytest.mark.parametrize(
    ("dtype", "rank", "left"),
    [
        ("bf16", 64, set()),
        ("bf16", 65, {"experts_p_db"}),
        ("bf16", 129, {"experts_p_db", "experts_x_at_gathered", "experts_pt_x_gathered"}),
        ("fp32", 8, {"experts_gemm", "experts_gemm_gathered"}),
    ],
)
def test_what_a_kernel_does_not_take_is_no_candidate(dtype: str, rank: int, left: set[str]) -> None:
    def kernels(table: Iterable[Way]) -> set[str]:
        return {op.kernel for way in table for op in way.operations if isinstance(op, Fused)}

    assert (
        kernels(GATHERED.table)
        - kernels(GATHERED.rows(partial(serves, dtype=dtype, rank=rank, dims=defaultdict(lambda: 64))))
        == left
    )


# What is kept


@every_site
def test_rows_of_tokens_are_never_kept(site: Derivation) -> None:
    """The tokens are there: they are gathered again. Of what the last projection made rows may be kept, for dg."""
    kept: set[str] = set()
    for program in programs(site):
        names = {str(symbol) for symbol in program.kept}
        kept |= names
        read = "U" if site in ACTIVATING else "X"  # what a mask leaves of rows may stand for it
        assert read in map(str, program.saved_inputs) or (site in DROPPED and "H" in names)
        assert ("g" in map(str, program.saved_inputs)) == (site in GIVE_TOKENS)
        assert set(program.kept) <= program.backward.reads, "what nothing reads is not kept"
    assert (
        kept
        == {
            GATHERED: {"S", "M", "A", "B"},
            COMBINED: {"S", "M", "A", "B", "Yr"},
            HANDED: {"A"},
            ACTIVATED: {"X", "S", "A", "B", "Yr"},
            # What a mask leaves of rows is nowhere else.
            GATHERED_DROPPED: {"S", "A", "B", "K", "H", "seed"},
            COMBINED_DROPPED: {"S", "A", "B", "Yr", "K", "H", "seed"},
            HANDED_DROPPED: {"A", "K", "H", "seed"},
            ACTIVATED_DROPPED: {"X", "S", "A", "B", "Yr", "K", "H", "seed"},
        }[site]
    )


@pytest.mark.parametrize("site", DROPPED, ids=lambda site: site.site)
def test_a_mask_is_drawn_once_and_goes_back_through_the_same(site: Derivation) -> None:
    found = set()
    for program in programs(site):
        (drawn,) = (op for op in program.forward.operations if isinstance(op, Draw))
        assert str(drawn.operands[0]) == "dropout" and drawn.out in program.kept, "dX goes through it"
        assert not any(isinstance(op, Draw) for op in program.backward.operations)
        drawing = [
            op for op in program.operations if isinstance(op, Fused) and any(isinstance(p, Draw) for p in op.parts)
        ]
        # By a seed all kernels draw; by bytes none does.
        read = {str(symbol) for op in program.operations for symbol in op.reads}
        seeded = str(drawn.out) == "seed"
        assert bool(drawing) == seeded and not read & ({"K", "H"} if seeded else {"seed"})
        assert site["dropout"] not in program.saved_inputs
        found.add(seeded)
    assert found == {False, True}


def test_which_site_a_projection_is() -> None:
    assert experts(gathers=True) is GATHERED and experts(gathers=False) is COMBINED
    assert experts(gathers=True, activated=True) is HANDED and experts(gathers=False, activated=True) is ACTIVATED
    for gathers, activated in itertools.product((True, False), repeat=2):
        site = experts(gathers=gathers, activated=activated, dropout=True)
        assert site in DROPPED and site.evaluated is experts(gathers=gathers, activated=activated)
    assert [str(symbol) for symbol in GATHERED.gradients] == ["dX", "dA", "dB"]
    assert [str(symbol) for symbol in COMBINED.gradients] == ["dX", "dA", "dB", "dg"]
    assert [str(symbol) for symbol in GATHERED.inputs()] == ["X", "W", "A", "B"]
    # The gradient of the router's weights reads the biases.
    assert [str(symbol) for symbol in COMBINED.inputs(WIDE)] == ["X", "W", "lora_A", "lora_B", "b", "g"]


@every_site
def test_what_merges_loses_updates_in_16_bits(site: Derivation) -> None:
    for program in programs(site):
        merged = site.symbols.get("M")
        assert program.lossy_in_16_bit == (merged in program.forward.made | program.backward.made)
        assert (merged is None) == (site in DROPPED)
