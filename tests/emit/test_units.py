"""Quantities and reasons as people write them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from runlora_gen.emit import units
from runlora_gen.emit.units import QUANTITIES, show_bound, show_reason
from runlora_gen.request.workload import Workload
from runlora_gen.search import criterion
from runlora_gen.search.candidates import setting_for
from runlora_gen.search.choose import Decision, decide
from runlora_gen.search.criterion import Difference


@pytest.mark.parametrize(
    ("show", "value", "expected"),
    [
        (units.show_count, 0, "0"),
        (units.show_count, 999, "999"),
        (units.show_count, 1_000, "1 k"),
        (units.show_count, 214.7e9, "214.7 G"),
        (units.show_count, 3e15, "3 P"),
        (units.show_bytes, 0, "0 B"),
        (units.show_bytes, 1023, "1023 B"),
        (units.show_bytes, 1024, "1 KiB"),
        (units.show_bytes, 42_008_576, "40.06 MiB"),
        (units.show_bytes, 2**41, "2 TiB"),
        (units.show_time, 533.5e-6, "533.5 µs"),
        (units.show_time, 2, "2,000,000.0 µs"),
    ],
)
def test_how_people_write_it(show, value: float, expected: str) -> None:
    assert show(value) == expected


def test_what_a_step_waits_for_is_said() -> None:
    assert show_bound(0.0) == "the device"
    assert show_bound(1.0) == "the host"
    assert show_bound(0.25) == "device and host alike (of time 25% is the host's)"


def test_every_quantity_has_words() -> None:
    assert QUANTITIES.keys() == criterion.QUANTITIES.keys()


@pytest.fixture(scope="module")
def decision() -> Decision:
    workload = Workload(adapter_dtype="bf16", kernels=False)
    return decide(workload, setting_for(workload, 512, 256, 8, False, 4096))


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Difference("time", "time", 500e-6, 533.5e-6), "is worse in time: 533.5 µs against 500.0 µs"),
        (Difference("time", "time", 500e-6, 500.01e-6), "is worse in time: 500.0 µs, by 2e-05 of it"),
        (
            Difference("memory", "saved", 0, 1024),
            "is equal in saved + workspace, but worse in saved: 1 KiB against 0 B",
        ),
        (Difference("flops", "error", 0.0, 0.25), "is equal in FLOPs, but worse in update error: 0.25 against 0"),
        (None, "has the same price; the name decides"),
    ],
)
def test_why_the_runner_up_lost(decision: Decision, difference: Difference | None, words: str) -> None:
    assert decision.runner_up is not None
    reason = show_reason(replace(decision, difference=difference))
    assert reason == f"{decision.runner_up.program.id} {words}"


def test_without_a_runner_up(decision: Decision) -> None:
    alone = replace(decision, candidates=(decision.chosen,), programs=1, runner_up=None, difference=None)
    assert show_reason(alone) == "there is no other program"
    assert show_reason(replace(alone, candidates=(), programs=0)) == ""  # the winners alone were sought
