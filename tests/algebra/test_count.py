"""The number of programs, against the list of them: of the lone linear, and of any small table."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runlora_gen.algebra.count import count_programs
from runlora_gen.algebra.derivation import CAST_ADAPTER, NO_FACTS, SAVED, Argument, Derivation, Facts, derive, row
from runlora_gen.algebra.enumerate import enumerate_programs, iterate_programs
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.algebra.operations import Symbol

GOALS = ("dX", "dA", "dB", "db")
TABLES = {
    "torch": LINEAR.rows(lambda _: False),
    "kernels": None,
    "wide": LINEAR.rows(lambda kernel: kernel.kernel != "p_db"),
}


@pytest.mark.parametrize("facts", [NO_FACTS, frozenset({CAST_ADAPTER})])
@pytest.mark.parametrize("table", TABLES)
def test_the_lone_linear_s_are_counted_and_iterated(table: str, facts: Facts) -> None:
    for goals in itertools.chain.from_iterable(itertools.combinations(GOALS, count) for count in range(5)):
        options = {"table": TABLES[table], "facts": facts}
        programs = enumerate_programs(LINEAR, goals, **options)
        assert count_programs(LINEAR, goals, **options) == len(programs)
        assert tuple(iterate_programs(LINEAR, goals, **options)) == programs


def test_programs_are_iterated_and_let_go() -> None:
    """Each is one object while somebody holds it, and none when nobody does."""
    programs = iterate_programs(
        LINEAR, ("dX", "dB"), table=LINEAR.rows(lambda _: False), facts=frozenset({CAST_ADAPTER})
    )
    first = next(programs)
    assert next(iterate_programs(LINEAR, ("dX", "dB"), table=TABLES["torch"], facts=frozenset({CAST_ADAPTER}))) is first
    names = {first.id, *(program.id for program in programs)}
    assert len(names) == 232


@st.composite
def derivations(draw: st.DrawFn) -> Derivation:
    """Any small table: shared symbols, rows with several targets, circles, and symbols that nothing makes."""
    inner = [f"t{i}" for i in range(draw(st.integers(1, 4)))]
    gradients = [f"g{i}" for i in range(draw(st.integers(1, 3)))]
    symbols = [Symbol(name, ("T", "T")) for name in ("X", "Y", "dY", *inner, *gradients)]
    table = []
    for number in range(draw(st.integers(2, 12))):
        targets = draw(st.lists(st.sampled_from(["Y", *inner, *gradients]), min_size=1, max_size=2, unique=True))
        sources = [name for name in ("X", "dY", *inner) if name not in targets]
        if set(targets) <= set(inner) and draw(st.booleans()):
            table.append(row(" ".join(targets), SAVED))
            continue
        left, right = draw(st.sampled_from(sources)), draw(st.sampled_from(sources))
        table.append(row(" ".join(targets), f"w{number}", *(f"{target} = {left} @ {right}" for target in targets)))
    return derive(
        "any",
        symbols=symbols,
        arguments=(Argument("X", gradient=None), *(Argument(f"a{i}", gradient=g) for i, g in enumerate(gradients))),
        outputs=("Y",),
        output_gradients=("dY",),
        table=dict.fromkeys(table),
    )


@settings(max_examples=400, deadline=None)
@given(derivations())
def test_any_table_s_programs_are_counted(derivation: Derivation) -> None:
    goals = tuple(map(str, derivation.gradients))
    programs = list(iterate_programs(derivation, goals))
    assert count_programs(derivation, goals) == len(programs) == len(set(programs))
