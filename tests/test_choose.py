"""The choice: Pareto front, criterion, constraints, tie-break, thresholds, and reasons that are true."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runlora_gen import choose
from runlora_gen.choose import (
    CRITERIA,
    PARETO,
    QUANTITIES,
    TIE_BREAK,
    Decision,
    Priced,
    check_saved_limit,
    decide,
    decide_ranges,
    pareto_front,
    setting_for,
)
from runlora_gen.cost.price import Cost, PhaseCost, price
from runlora_gen.spec.architecture import load_architecture
from runlora_gen.spec.errors import SpecError
from runlora_gen.spec.layers import layers
from runlora_gen.spec.workload import Workload

workloads = st.builds(
    Workload,
    tokens=st.integers(1, 2**16).map(lambda tokens: (tokens,)),
    dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
    train=st.sampled_from([("a", "b"), ("a",), ("b",)]),
    input_grad=st.booleans(),
    criterion=st.sampled_from(CRITERIA),
    allow_lossy_merge=st.booleans(),
    device=st.sampled_from(["h100", "cpu", "rtx-4090"]),
)
sizes = st.tuples(st.integers(1, 2048), st.integers(1, 2048), st.integers(1, 64))
property_test = settings(deadline=None, max_examples=25)


def decided(workload: Workload, size: tuple[int, int, int], tokens: int | None = None) -> Decision:
    in_features, out_features, rank = size
    setting = setting_for(workload, in_features, out_features, rank, False, tokens or workload.tokens[0])
    return decide(workload, setting)


def vector(candidate: Priced) -> tuple[float, ...]:
    return tuple(QUANTITIES[name].of(candidate.cost) for name in PARETO)


def allowed(decision: Decision, workload: Workload) -> list[Priced]:
    lossy = workload.allow_lossy_merge or workload.dtype == "fp32"
    limit = workload.max_saved_bytes
    return [
        c
        for c in decision.candidates
        if (lossy or not c.program.lossy_in_16_bit) and (limit is None or c.cost.saved_bytes <= limit)
    ]


@property_test
@given(workloads, sizes)
def test_front_by_brute_force(workload: Workload, size: tuple[int, int, int]) -> None:
    decision = decided(workload, size)
    vectors = {candidate.program.id: vector(candidate) for candidate in decision.candidates}
    best = {
        mine
        for mine in vectors.values()
        if not any(
            all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for other in vectors.values()
        )
    }
    assert {vectors[name] for name in decision.front} == best
    assert len(decision.front) == len(best)  # each price once


@property_test
@given(workloads, sizes)
def test_the_chosen_is_the_best_allowed_and_on_the_front(workload: Workload, size: tuple[int, int, int]) -> None:
    decision = decided(workload, size)
    candidates = allowed(decision, workload)
    chosen = decision.chosen
    measure = QUANTITIES[workload.criterion].of
    assert chosen in candidates
    assert measure(chosen.cost) == min(measure(candidate.cost) for candidate in candidates)
    assert chosen.program.id in decision.front
    if workload.dtype != "fp32" and not workload.allow_lossy_merge:
        assert not chosen.program.lossy_in_16_bit and decision.fallback == chosen
    if not workload.allow_lossy_merge:
        assert not decision.fallback.program.lossy_in_16_bit
    else:
        assert decision.fallback == chosen


@property_test
@given(workloads, sizes)
def test_reason_is_true(workload: Workload, size: tuple[int, int, int]) -> None:
    decision = decided(workload, size)
    runner_up, reason = decision.runner_up, decision.reason
    assert runner_up is not None and runner_up != decision.chosen
    measure = QUANTITIES[workload.criterion].of
    others = [candidate for candidate in allowed(decision, workload) if candidate != decision.chosen]
    assert measure(runner_up.cost) == min(measure(candidate.cost) for candidate in others)
    assert reason.startswith(f"{runner_up.program.id} ")
    differing = [
        name
        for name in (workload.criterion, *TIE_BREAK)
        if QUANTITIES[name].of(decision.chosen.cost) != QUANTITIES[name].of(runner_up.cost)
    ]
    if not differing:
        assert reason.endswith("has the same price; the name decides")
        return
    quantity = QUANTITIES[differing[0]]
    best, other = quantity.of(decision.chosen.cost), quantity.of(runner_up.cost)
    assert best < other
    assert f"worse in {quantity.title}: " in reason
    assert ("is equal in " in reason) == (differing[0] != workload.criterion)
    if quantity.show(best) == quantity.show(other):
        assert f"{quantity.show(best)}, by " in reason
    else:
        assert reason.endswith(f"{quantity.show(other)} against {quantity.show(best)}")


@property_test
@given(workloads, sizes, st.randoms(use_true_random=False))
def test_order_of_the_candidates_is_of_no_matter(workload: Workload, size: tuple, shuffler: random.Random) -> None:
    decision = decided(workload, size)
    shuffled = [candidate.program for candidate in decision.candidates]
    shuffler.shuffle(shuffled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "programs_for", lambda *_: tuple(shuffled))
        again = decided(workload, size)
    assert (again.chosen, again.fallback, again.runner_up) == (decision.chosen, decision.fallback, decision.runner_up)
    assert (again.front, again.reason) == (decision.front, decision.reason)


def test_tie_break_is_pinned() -> None:
    assert TIE_BREAK == ("time", "saved", "memory", "flops", "error", "device", "bytes", "launches")
    assert PARETO == ("time", "saved", "memory", "flops", "error")
    programs = choose.enumerate_programs(("dX", "dA", "dB"))

    def priced(
        program, time: float = 1e-3, saved: int = 10, flops: int = 5, moved: int = 7, launches: int = 3
    ) -> Priced:
        half = PhaseCost(flops, moved, launches, 0, time / 2, time / 2)
        return Priced(program, Cost(half, half, saved, 0.0))

    def first(*candidates: Priced, criterion: str = "time") -> Priced:
        results = {choose._rank(order, criterion)[0].program for order in itertools.permutations(candidates)}
        (winner,) = results
        return next(candidate for candidate in candidates if candidate.program == winner)

    p, q = sorted(programs[:2], key=lambda program: program.id)
    assert first(priced(p), priced(q)).program == p  # the name
    assert first(priced(p), priced(q, launches=2)).program == q
    assert first(priced(p, moved=6), priced(q, launches=2)).program == p
    assert first(priced(p, moved=6), priced(q, flops=4)).program == q
    assert first(priced(p, saved=9), priced(q, flops=4)).program == p
    assert first(priced(p, saved=9), priced(q, time=0.9e-3)).program == q
    assert first(priced(p, saved=9), priced(q, time=0.9e-3), criterion="memory").program == p
    # The same sum in another order is a tie, so what comes next decides.
    noisy = 1e-3 * (1 + 4e-16)
    assert noisy != 1e-3
    assert first(priced(p, time=noisy, saved=9), priced(q)).program == p
    assert pareto_front([priced(p, time=noisy), priced(q, launches=2)]) == {q.id}


def test_equal_operations_in_another_order_are_a_tie() -> None:
    """Keeping S or computing it in the backward, and no other rounding: found as noise in the time before."""
    decision = decided(Workload(), (5120, 5120, 8))
    times = sorted({candidate.cost.time_s for candidate in decision.candidates})
    compared = sorted({QUANTITIES["time"].of(candidate.cost) for candidate in decision.candidates})
    assert len(compared) < len(times)
    assert all(b / a - 1 > 1e-10 for a, b in itertools.pairwise(compared))


RANGES = [
    # architecture, rank, workload: at least two ranges each
    ("llama-13b", 8, Workload()),
    ("llama-13b", 128, Workload(dtype="fp32")),
    ("llama-13b", 8, Workload(dtype="fp32", criterion="flops", train=("b",))),
    ("llama-250m", 8, Workload(input_grad=False, kernels=False, launch="graph")),
    ("llama-9m", 128, Workload(criterion="memory", train=("b",))),
    ("llama-13b", 8, Workload(dtype="fp32", device="cpu", train=("b",))),
]


@pytest.mark.parametrize(("name", "rank", "workload"), RANGES, ids=lambda value: str(value)[:12])
def test_thresholds_stand_at_the_crossover(name: str, rank: int, workload: Workload) -> None:
    workload = replace(workload, tokens=(16, 1024, 65536))
    layer = layers(load_architecture(name))[0]
    setting = setting_for(workload, layer.in_features, layer.out_features, rank, layer.bias, 16)
    ranges = decide_ranges(workload, setting)
    assert len(ranges) > 1 and ranges[-1].last_tokens is None
    ends = [part.last_tokens for part in ranges[:-1]]
    assert ends == sorted(set(ends))
    for tokens in workload.tokens:  # at the wanted counts the range's choice is the decision there
        part = next(p for p in ranges if p.last_tokens is None or tokens <= p.last_tokens)
        decision = decide(workload, replace(setting, tokens=tokens))
        for ours, best in ((part.decision.chosen, decision.chosen), (part.decision.fallback, decision.fallback)):
            assert ours.program.plain_id == best.program.plain_id
            if ours.program != best.program:  # only in kernels that make no difference
                assert price(ours.program, decision.setting).time_s <= 1.01 * best.cost.time_s
    measure = QUANTITIES[workload.criterion].of
    for low, high in itertools.pairwise(ranges):
        pair = low.decision.chosen.program, high.decision.chosen.program
        if pair[0] == pair[1]:
            pair = low.decision.fallback.program, high.decision.fallback.program
        for tokens, better, worse in ((low.last_tokens, *pair), (low.last_tokens + 1, *reversed(pair))):
            costs = [price(program, replace(setting, tokens=tokens)) for program in (better, worse)]
            assert measure(costs[0]) <= measure(costs[1])
        wide = [price(p, replace(setting, tokens=low.decision.setting.tokens)) for p in pair]
        assert measure(wide[0]) <= measure(wide[1])


def test_one_winner_is_one_range() -> None:
    workload = Workload(tokens=(4096, 8192, 4096), kernels=False, launch="graph")
    setting = setting_for(workload, 5120, 5120, 8, False, 4096)
    (part,) = decide_ranges(workload, setting)
    assert part.last_tokens is None and part.decision.setting.tokens == 4096


def test_limit_on_saved_bytes_holds_up_to_the_threshold() -> None:
    """What wins at few tokens may not run on to where it would save more than the limit."""
    free = Workload(tokens=(4096, 8192), kernels=False, launch="graph")
    size = (5120, 5120, 8)
    low = decided(free, size, 4096).chosen
    limit = min(candidate.cost.saved_bytes for candidate in decided(free, size, 8192).candidates)
    limited = replace(free, max_saved_bytes=limit)
    setting = setting_for(limited, *size, False, 4096)
    ranges = decide_ranges(limited, setting)
    assert len(ranges) == 2 and ranges[0].decision.chosen.program == low.program
    (end,) = [part.last_tokens for part in ranges[:-1]]
    assert price(low.program, replace(setting, tokens=end)).saved_bytes <= limit
    assert price(low.program, replace(setting, tokens=end + 1)).saved_bytes > limit


@property_test
@given(workloads, sizes, st.integers(1, 2**28))
def test_limit_is_met_or_the_closest_value_is_named(workload: Workload, size: tuple, limit: int) -> None:
    limited = replace(workload, max_saved_bytes=limit)
    try:
        decision = decided(limited, size)
    except SpecError as error:
        least = int(str(error).rpartition(" ")[2])
        assert least > limit and f"at most {limit} bytes" in str(error)
        decision = decided(replace(workload, max_saved_bytes=least), size)
        assert decision.chosen.cost.saved_bytes == least
        with pytest.raises(SpecError):
            decided(replace(workload, max_saved_bytes=least - 1), size)
    else:
        assert decision.chosen.cost.saved_bytes <= limit
        assert decision.fallback.cost.saved_bytes <= limit


@pytest.mark.parametrize("train", [("a", "b"), ("a",), ("b",)])
def test_limit_named_for_all_layers_ranks_and_tokens(train: tuple[str, ...]) -> None:
    architecture = load_architecture("llama-9m")
    workload = Workload(tokens=(16, 4096), train=train, max_saved_bytes=1)
    with pytest.raises(SpecError, match="the smallest feasible value is") as caught:
        check_saved_limit(architecture, (4, 64), workload)
    least = int(str(caught.value).rpartition(" ")[2])
    check_saved_limit(architecture, (4, 64), replace(workload, max_saved_bytes=least))
    with pytest.raises(SpecError):
        check_saved_limit(architecture, (4, 64), replace(workload, max_saved_bytes=least - 1))
    for layer, rank in itertools.product(layers(architecture), (4, 64)):
        setting = setting_for(workload, layer.in_features, layer.out_features, rank, layer.bias, 16)
        decide_ranges(replace(workload, max_saved_bytes=least), setting)
    check_saved_limit(architecture, (4, 64), replace(workload, max_saved_bytes=None))


@pytest.mark.parametrize(
    ("show", "value", "expected"),
    [
        (choose.show_count, 0, "0"),
        (choose.show_count, 999, "999"),
        (choose.show_count, 1_000, "1 k"),
        (choose.show_count, 214.7e9, "214.7 G"),
        (choose.show_count, 3e15, "3 P"),
        (choose.show_bytes, 0, "0 B"),
        (choose.show_bytes, 1023, "1023 B"),
        (choose.show_bytes, 1024, "1 KiB"),
        (choose.show_bytes, 42_008_576, "40.06 MiB"),
        (choose.show_bytes, 2**41, "2048 GiB"),
        (choose.show_time, 533.5e-6, "533.5 µs"),
        (choose.show_time, 2, "2,000,000.0 µs"),
    ],
)
def test_how_people_write_it(show, value: float, expected: str) -> None:
    assert show(value) == expected


def test_kernels_that_make_no_difference_make_no_range() -> None:
    """At 2048 tokens the kernel for S is 0.5 µs of 300 faster, at 16384 torch is: no reason for two functions."""
    workload = Workload(tokens=(2048, 16384), device="h200", launch="graph")
    decided = [decide(workload, setting_for(workload, 5120, 5120, 16, False, tokens)) for tokens in workload.tokens]
    first, second = (decision.chosen.program for decision in decided)
    assert first.id != second.id and first.plain_id == second.plain_id
    (part,) = decide_ranges(workload, decided[0].setting)
    assert part.last_tokens is None and part.decision.chosen.program.id == first.id
    loss = price(first, decided[1].setting).time_s / decided[1].chosen.cost.time_s
    assert 1 < loss < 1.01
