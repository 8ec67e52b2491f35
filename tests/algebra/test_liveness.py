"""Which gradients need what: what the emitted guards rest on."""

from __future__ import annotations

from runlora_gen.algebra.derivation import CAST_ADAPTER
from runlora_gen.algebra.enumerate import enumerate_programs
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.algebra.liveness import dependents

WIDE = frozenset({CAST_ADAPTER})
PROGRAMS = enumerate_programs(LINEAR, ("dX", "dA", "dB"))
WITH_CASTS = enumerate_programs(LINEAR, ("dX", "dA", "dB"), facts=WIDE)


def test_dependents_name_the_gradients_that_need_a_symbol() -> None:
    program = next(p for p in PROGRAMS if p.id == "lowrank_first/lowrank_first-pt_x-dyt_s/keep-s")
    needed = {str(s): {str(g) for g in goals} for s, goals in dependents(program.backward).items()}
    assert needed["P"] == {"dX", "dA"} and needed["S"] == {"dB"} and needed["X"] == {"dA"} and needed["W"] == {"dX"}
    recompute = next(p for p in PROGRAMS if p.id == "lowrank_first/lowrank_first-pt_x-dyt_s/keep-nothing")
    needed = {str(s): {str(g) for g in goals} for s, goals in dependents(recompute.backward).items()}
    assert needed["X"] == {"dA", "dB"} and needed["A"] == {"dX", "dB"}
    assert LINEAR["dY"] in dependents(recompute.backward)


def test_a_cast_is_needed_for_what_reads_it() -> None:
    program = next(p for p in WITH_CASTS if p.id == "lowrank_first/lowrank_first-pt_x-dyt_s/keep-s-a")
    needed = {str(s): {str(g) for g in goals} for s, goals in dependents(program.backward).items()}
    assert needed["A"] == {"dX"} and needed["B"] == needed["lora_B"] == {"dX", "dA"} and "lora_A" not in needed
