"""The enumeration: exact counts, the paper's graphs, and completeness against an independent brute force."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import pytest
from runlora_gen.algebra.derivation import CAST_ADAPTER, NO_FACTS
from runlora_gen.algebra.enumerate import (
    Phase,
    Program,
    enumerate_backwards,
    enumerate_forwards,
    enumerate_programs,
    pair,
)
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.algebra.operations import Contract, Convert, Fused
from runlora_gen.algebra.paper import paper_labels
from runlora_gen.kernels.sites import seeded, serves

WIDE = frozenset({CAST_ADAPTER})
FACTS = {False: NO_FACTS, True: WIDE}
ALL = ("dX", "dA", "dB")
TORCH = LINEAR.rows(lambda _: False)
CASTS = {LINEAR["A"], LINEAR["B"]}
PAPER = [f"forward{i}/backward{j}" for i in range(1, 5) for j in range(1, 9)]


@pytest.mark.parametrize(
    ("goals", "count", "with_casts"),
    [
        # 4 forwards × 2 ways of dA × 3 of dB (S kept or not) × 6 of dX (M or D kept or not). Where the adapter is cast,
        # each of A and B that the backward reads is kept or cast again.
        (ALL, 144, 544),
        ((*ALL, "db"), 144, 544),
        (("dX", "dA"), 4 * 2 * 6, 160),
        (("dX", "dB"), 4 * 3 * 6, 232),
        (("dA", "dB"), 4 * 2 * 3, 80),
        # P needs B, s Bᵀ G too; S that is kept needs nothing, recomputed it needs A, like s G Aᵀ.
        (("dA",), 4 * 2, 4 * 2 * 2),
        (("dB",), 4 * 3, 4 * (1 + 2 + 2)),
        # A and B for both sums and for M and D, neither where M or D is kept.
        (("dX",), 4 * 6, 4 * (4 * 4 + 2)),
    ],
)
def test_exact_counts(goals: tuple[str, ...], count: int, with_casts: int) -> None:
    for casts, expected in ((False, count), (True, with_casts)):
        programs = enumerate_programs(LINEAR, goals, table=TORCH, facts=FACTS[casts])
        assert len(programs) == expected
        assert len({program.id for program in programs}) == expected
    assert with_casts == sum(2 ** len(CASTS & p.backward.reads) for p in enumerate_programs(LINEAR, goals, table=TORCH))


@pytest.mark.parametrize(
    ("rank", "count", "with_casts"),
    [
        # 5 forwards × backwards: dA 2 × dX 7 × (dB apart 3, or with P 2); without any need of P no pass is shared.
        (8, 310, 1180),
        # Above its largest rank the shared pass over dY is no candidate: 5 × 2 × 3 × 7.
        (64, 210, 800),
    ],
)
def test_exact_counts_with_kernels(rank: int, count: int, with_casts: int) -> None:
    for casts, expected in ((False, count), (True, with_casts)):
        programs = enumerate_programs(
            LINEAR,
            ALL,
            table=LINEAR.rows(partial(serves, dtype="bf16", rank=rank, dims={"T": 4096, "O": 64})),
            facts=FACTS[casts],
        )
        assert len(programs) == expected
        assert len({program.id for program in programs}) == expected


def test_casts_are_made_by_the_forward_and_kept_or_made_again() -> None:
    assert [str(symbol) for symbol in LINEAR.inputs(WIDE)] == ["X", "W", "lora_A", "lora_B"]
    assert [str(symbol) for symbol in LINEAR.inputs()] == ["X", "W", "A", "B"]
    for program in enumerate_programs(LINEAR, ALL, facts=WIDE):
        assert set(program.forward.held) == CASTS and program.backward.held == ()
        again = {op.out for op in program.backward.operations if isinstance(op, Convert)}
        kept = CASTS & set(program.kept)
        assert not again & kept and again | kept == CASTS & (again | program.backward.reads)
        # What is not kept as a cast, the backward casts from the parameter.
        assert {f"lora_{symbol}" for symbol in again} <= {str(symbol) for symbol in program.saved_inputs}
        assert not CASTS & set(program.saved_inputs)
    for program in enumerate_programs(LINEAR, ALL):
        assert not any(isinstance(operation, Convert) for operation in program.operations)
        assert program.forward.held == () and not CASTS & set(program.kept)


@pytest.mark.parametrize("casts", [False, True])
def test_the_paper_s_pairs_are_all_found_once(casts: bool) -> None:
    labels = [
        label for program in enumerate_programs(LINEAR, ALL, facts=FACTS[casts]) for label in paper_labels(program)
    ]
    assert sorted(labels) == sorted(PAPER)


@pytest.mark.parametrize("casts", [False, True])
def test_a_program_is_one_object(casts: bool) -> None:
    """Programs and phases are compared by identity: whoever puts a pair together gets the enumerated one."""
    programs = set(enumerate_programs(LINEAR, ALL, facts=FACTS[casts]))
    backwards = enumerate_backwards(LINEAR, ALL, facts=FACTS[casts])
    assert {
        pair(f, b) for b in backwards for f in enumerate_forwards(LINEAR, facts=FACTS[casts], keeps=b.saved)
    } == programs
    # However the table is spelled, and whatever else it holds.
    assert set(enumerate_programs(LINEAR, ALL, table=LINEAR.table, facts=FACTS[casts])) == programs
    assert set(enumerate_programs(LINEAR, ALL, table=TORCH, facts=FACTS[casts])) < programs
    alone = enumerate_forwards(LINEAR, facts=FACTS[casts])
    assert alone == enumerate_forwards(LINEAR, facts=FACTS[casts], keeps=()) and set(alone) < {
        p.forward for p in programs
    }


@pytest.mark.parametrize("casts", [False, True])
def test_what_a_phase_says_of_itself(casts: bool) -> None:
    for program in enumerate_programs(LINEAR, ALL, facts=FACTS[casts]):
        for phase in (program.forward, program.backward):
            operations = phase.operations
            assert phase.kernels == {op.kernel for op in operations if isinstance(op, Fused)} and not seeded(phase)
            assert phase.made == {out for op in operations for out in op.outputs} | set(phase.saved)
            assert phase.lossy_in_16_bit == (LINEAR["M"] in phase.made)
        assert program.lossy_in_16_bit == any(p.lossy_in_16_bit for p in (program.forward, program.backward))
        assert program.kernels == program.forward.kernels | program.backward.kernels


@pytest.mark.parametrize("casts", [False, True])
def test_nothing_kept_goes_unused_and_x_is_dropped_when_a_is_frozen(casts: bool) -> None:
    for program in enumerate_programs(LINEAR, ALL, facts=FACTS[casts]):
        assert set(program.kept) <= program.backward.reads
        assert LINEAR["X"] in program.saved_inputs
    frozen_a = enumerate_programs(LINEAR, ("dX", "dB"), facts=FACTS[casts])
    without_x = [program for program in frozen_a if LINEAR["X"] not in program.saved_inputs]
    assert without_x and all(LINEAR["S"] in program.kept for program in without_x)


def test_a_row_with_several_targets_is_taken_only_where_all_are_wanted() -> None:
    fused = LINEAR.way("P dB", "fused", "P = s * dY @ B", "dB = dY.T @ S")
    table = (*LINEAR.table, fused)
    with_both = enumerate_programs(LINEAR, ALL, table=table)
    used = [program for program in with_both if fused in program.backward.ways]
    assert len(with_both) > len(enumerate_programs(LINEAR, ALL)) and used
    # P is wanted by every split dX, so that only those graphs which need neither P may not use the row.
    assert all(program.backward.way_of(LINEAR["dB"]) is fused for program in used)
    assert not any(fused in program.backward.ways for program in enumerate_programs(LINEAR, ("dB",), table=table))


def test_cyclic_choices_are_discarded() -> None:
    table = (*LINEAR.table, LINEAR.way("P", "from_dx", "P = s * dY @ B", "P += dX @ A.T"))
    for program in enumerate_programs(LINEAR, ALL, table=table):
        if program.backward.way_of(LINEAR["dX"]).name in ("base_first", "lowrank_first"):
            assert all(chosen.name != "from_dx" for chosen in program.backward.ways)


@pytest.mark.parametrize(
    "formula",
    [
        "Y = X @ W",
        "Y += Q @ W.T",
        "Y = X * W",
        "Y = X @ W.T + c",
        "M = A + s * B @ A",
        "A = cast(lora_C)",
        "A = cast(lora_A.T)",
        "k: j: S = s * X @ A.T",
        "S := s * X @ A.T",
        "k: D := s * B @ A; M = W + D",
    ],
)
def test_the_grammar_refuses_what_does_not_fit(formula: str) -> None:
    with pytest.raises(ValueError, match=r"formula|inner|shape|grammar|symbol"):
        LINEAR.parse(formula)


# An independent brute force. It knows the four results as sums of words over the inputs, and finds every way to bracket
# them and to factor a common beginning or end out of a sum. A tree is ("*", left, right), ("+", terms) or a name with
# an optional "'" for a transposition; a tree and its transpose are one.

WORDS = {
    "Y": [("X", "W'"), ("X", "A'", "B'")],
    "dX": [("dY", "W"), ("dY", "B", "A")],
    "dA": [("B'", "dY'", "X")],
    "dB": [("dY'", "X", "A'")],
}
FORWARD_NAMES = {"X", "W", "A", "B"}


def _transposed(tree):
    if isinstance(tree, str):
        return tree[:-1] if tree.endswith("'") else tree + "'"
    if tree[0] == "*":
        return ("*", _transposed(tree[2]), _transposed(tree[1]))
    return ("+", frozenset(map(_transposed, tree[1])))


def _text(tree) -> str:
    if isinstance(tree, str):
        return tree
    if tree[0] == "*":
        return f"({_text(tree[1])} {_text(tree[2])})"
    return "{" + "+".join(sorted(map(_text, tree[1]))) + "}"


def _canonical(tree) -> str:
    return min(_text(tree), _text(_transposed(tree)))


def _brackets(word) -> Iterator:
    if len(word) == 1:
        yield word[0]
    for cut in range(1, len(word)):
        for left, right in itertools.product(_brackets(word[:cut]), _brackets(word[cut:])):
            yield ("*", left, right)


def _trees(words) -> Iterator:
    """Every way to compute a sum of words."""
    if len(words) == 1:
        yield from _brackets(words[0])
        return
    for terms in itertools.product(*map(_brackets, words)):
        yield ("+", frozenset(terms))
    shortest = min(map(len, words))
    for length in range(1, shortest):
        if len({word[:length] for word in words}) == 1:
            for rest, head in itertools.product(_trees([w[length:] for w in words]), _brackets(words[0][:length])):
                yield ("*", head, rest)
        if len({word[-length:] for word in words}) == 1:
            for rest, tail in itertools.product(_trees([w[:-length] for w in words]), _brackets(words[0][-length:])):
                yield ("*", rest, tail)


def _nodes(tree) -> set[str]:
    if isinstance(tree, str):
        return set()
    children = tree[1:] if tree[0] == "*" else tree[1]
    return {_canonical(tree)}.union(*map(_nodes, children))


def _names(tree) -> set[str]:
    if isinstance(tree, str):
        return {tree.removesuffix("'")}
    return set().union(*map(_names, tree[1:] if tree[0] == "*" else tree[1]))


def _stored(tree) -> list:
    """Intermediates that a forward could keep: inner nodes of inputs only; a term of a sum is never alone in memory."""
    if isinstance(tree, str):
        return []
    children = list(tree[1:]) if tree[0] == "*" else []
    inside = (
        [n for term in tree[1] for child in (term[1:] if term[0] == "*" else ()) for n in _stored(child)]
        if tree[0] == "+"
        else []
    )
    found = [tree] if _names(tree) <= FORWARD_NAMES else []
    return found + [node for child in children for node in _stored(child)] + inside


def _brute_force() -> set[tuple]:
    found = set()
    for forward in _trees(WORDS["Y"]):
        backwards = itertools.product(*(_trees(WORDS[name]) for name in ALL))
        for trees in backwards:
            keepable = {_canonical(node) for tree in trees for node in _stored(tree)}
            for size in range(len(keepable) + 1):
                for kept in itertools.combinations(sorted(keepable), size):
                    found.add((_canonical(forward), tuple(map(_canonical, trees)), kept))
    return found


def _structure(program: Program) -> tuple:
    """What a program of the table computes, as the brute force writes it."""
    kept = {}

    def expand(phase: Phase, given: dict) -> dict:
        trees = dict(given)
        casts = [op for op in phase.operations if isinstance(op, Convert)]
        assert all(str(op.operands[0]) == f"lora_{op.out}" for op in casts)
        trees |= {op.out.name: op.out.name for op in casts}  # a cast is no product
        products = [op for op in phase.operations if op not in casts]
        pending = [part for op in products for part in (op.parts if isinstance(op, Fused) else (op,))]
        while pending:
            for operation in list(pending):
                assert isinstance(operation, Contract)
                earlier = pending[: pending.index(operation)]
                waits = any(operation.out in other.outputs for other in earlier)
                if waits or any(symbol.name not in trees for symbol in operation.reads):
                    continue
                if any(o.out in operation.reads for o in pending if o is not operation):
                    continue
                left, right = (
                    _transposed(trees[o.symbol.name]) if o.transposed else trees[o.symbol.name]
                    for o in (operation.left, operation.right)
                )
                tree = ("*", left, right)
                if operation.accumulate:
                    tree = ("+", frozenset({trees[operation.out.name], tree}))
                if operation.addend is not None:
                    tree = ("+", frozenset({trees[operation.addend.name], tree}))
                trees[operation.out.name] = tree
                pending.remove(operation)
        return trees

    given = {symbol.name: symbol.name for symbol in LINEAR.inputs(WIDE if program.forward.held else NO_FACTS)}
    forward = expand(program.forward, given)
    for symbol in program.kept:
        kept[symbol.name] = forward[symbol.name]
    backward = expand(program.backward, {**given, "dY": "dY", **kept})
    return (
        _canonical(forward["Y"]),
        tuple(_canonical(backward[name]) for name in ALL),
        tuple(sorted(_canonical(tree) for name, tree in kept.items() if LINEAR[name] not in CASTS)),
    )


@pytest.mark.parametrize("casts", [False, True])
def test_complete_against_brute_force(casts: bool) -> None:
    expected = _brute_force()
    for table in (TORCH, LINEAR.table):  # the fused rows compute the same trees in fewer passes
        assert {
            _structure(program) for program in enumerate_programs(LINEAR, ALL, table=table, facts=FACTS[casts])
        } == expected
    # The table also knows two orders of the split sum, in Y and in dX, which are one tree here.
    assert len(expected) == 3 * (2 * 3 * 5)


def test_of_what_is_cast_every_part_is_kept() -> None:
    """Each program without casts stands for one with every set of the casts that its backward reads."""
    found = {}
    for program in enumerate_programs(LINEAR, ALL, facts=WIDE):
        plain = program.id.removesuffix("-b").removesuffix("-a")
        plain = f"{plain}-nothing" if plain.endswith("/keep") else plain
        found.setdefault(plain, set()).add(frozenset(CASTS & set(program.kept)))
    for program in enumerate_programs(LINEAR, ALL):
        read = sorted(CASTS & program.backward.reads)
        sets = {frozenset(kept) for size in range(len(read) + 1) for kept in itertools.combinations(read, size)}
        assert found.pop(program.id) == sets
    assert not found
