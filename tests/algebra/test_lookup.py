"""Programs by what they do: each is found by its ways, and what is asked wrongly is refused."""

from __future__ import annotations

import pytest
from runlora_gen.algebra.enumerate import Program, enumerate_programs
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.algebra.lookup import Asked

PROGRAMS = enumerate_programs(LINEAR, ("dX", "dA", "dB"))
SPLIT = {"Y": "base_first", "dX": "base_first", "dA": "pt_x", "dB": "dyt_s"}


def asked_for(program: Program) -> Asked:
    """All that a program does."""
    ways = [way for phase in (program.forward, program.backward) for way in phase.ways if not way.saved]
    return Asked({str(s): way.name for way in ways for s in way.targets}, [str(symbol) for symbol in program.kept])


def test_every_program_is_found_by_all_that_it_does() -> None:
    """A symbol that the forward and the backward compute in two ways would be two."""
    for program in PROGRAMS:
        assert asked_for(program).among(PROGRAMS) is program


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (Asked(SPLIT, keeps=("S",)), "base_first/base_first-pt_x-dyt_s/keep-s"),
        (Asked(SPLIT), "base_first/base_first-pt_x-dyt_s/keep-nothing"),
        (Asked({**SPLIT, "Y": "merged", "dX": "merged"}, keeps=("S", "M")), "merged/merged-pt_x-dyt_s/keep-s-m"),
        (Asked({**SPLIT, "P": "one_pass", "dB": "one_pass"}), "base_first/base_first-pt_x-one_pass/keep-nothing"),
    ],
)
def test_what_is_asked_for_is_what_it_is_called(asked: Asked, name: str) -> None:
    assert asked.among(PROGRAMS).id == name


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked({**SPLIT, "Y": "based_first"}), "^Y is computed by one of base_first, .*, not by based_first$"),
        (Asked({**SPLIT, "Q": "base_first"}), "^there is no symbol Q, only X, W, b, "),
        (Asked(SPLIT, keeps=("P",)), "dB by dyt_s and keep P: none$"),
        (Asked(SPLIT, keeps=("Q",)), "^there is no symbol Q"),
        (Asked({"Y": "base_first"}), "^one program must compute Y by base_first and keep nothing: base_first/"),
        (Asked({**SPLIT, "dB": "one_pass", "P": "dy_b"}), ": none$"),
    ],
    ids=["way", "symbol", "kept", "unknown", "several", "none"],
)
def test_what_is_asked_wrongly_is_refused(asked: Asked, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked.among(PROGRAMS)
