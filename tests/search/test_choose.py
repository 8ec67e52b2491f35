"""The choice in one setting: Pareto front, criterion, constraints, tie-break, and reasons that are true."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runlora_gen.algebra.enumerate import enumerate_programs
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.cost.lower import available, phase_with_kernels, subsets
from runlora_gen.cost.price import price, price_phase
from runlora_gen.cost.setting import Setting
from runlora_gen.cost.vector import Cost, PhaseCost, rounded, weighted
from runlora_gen.request.architecture import load_architecture
from runlora_gen.request.errors import SpecError
from runlora_gen.request.layers import layers
from runlora_gen.request.workload import CHOICES, Workload
from runlora_gen.search import choose
from runlora_gen.search.candidates import enumerated, programs_for, setting_for
from runlora_gen.search.choose import Decision, decide, decide_forward, fastest
from runlora_gen.search.criterion import (
    PARETO,
    QUANTITIES,
    TIE_BREAK,
    Difference,
    Priced,
    pareto_front,
    ranked,
)
from runlora_gen.search.limits import check_saved_limit
from runlora_gen.search.ranges import decide_model

#: With kernels and with casts, but not with both: four times as many programs, and nothing else.
OPERANDS = (
    {"dtype": "bf16", "adapter_dtype": "bf16"},
    {"dtype": "fp16", "adapter_dtype": "fp16"},
    {"dtype": "bf16", "kernels": False},
    {"dtype": "fp16", "kernels": False},
    {"dtype": "fp32"},
)
workloads = st.builds(
    lambda operands, **options: Workload(**operands, **options),
    operands=st.sampled_from(OPERANDS),
    tokens=st.integers(1, 2**16).map(lambda tokens: (tokens,)),
    train=st.sampled_from([("a", "b"), ("a",), ("b",)]),
    input_grad=st.booleans(),
    criterion=st.sampled_from(CHOICES["criterion"]),
    allow_lossy_merge=st.booleans(),
    device=st.sampled_from(["h100", "cpu", "rtx-4090"]),
)
sizes = st.tuples(st.integers(1, 2048), st.integers(1, 2048), st.integers(1, 64))
shares = st.sampled_from([0.0, 0.03125, 0.25, 0.5, 1.0])
property_test = settings(deadline=None, max_examples=15)


def decided(workload: Workload, size: tuple[int, int, int], host_share: float = 0.0) -> Decision:
    in_features, out_features, rank = size
    return decide(
        workload, setting_for(workload, in_features, out_features, rank, False, workload.tokens[0]), host_share
    )


def vector(candidate: Priced) -> tuple[tuple[float, ...], ...]:
    """What may be traded; of equal times that is the less which takes the device less, then the host."""
    parts = (("time", "device", "host"), *((name,) for name in PARETO[1:]))
    return tuple(tuple(QUANTITIES[name](candidate.cost) for name in names) for names in parts)


def allowed(decision: Decision, workload: Workload) -> list[Priced]:
    lossy = workload.allow_lossy_merge or workload.dtype == "fp32"
    limit = workload.max_saved_bytes
    return [
        c
        for c in decision.candidates
        if (lossy or not c.program.lossy_in_16_bit) and (limit is None or c.cost.saved_bytes <= limit)
    ]


@property_test
@given(workloads, sizes, shares)
def test_front_by_brute_force(workload: Workload, size: tuple[int, int, int], share: float) -> None:
    decision = decided(workload, size, share)
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
@example(Workload(adapter_dtype="bf16", tokens=(1,), input_grad=False), (1, 1, 1), 1.0)  # ties in the host's time
@given(workloads, sizes, shares)
def test_the_chosen_is_the_best_allowed_and_on_the_front(
    workload: Workload, size: tuple[int, int, int], share: float
) -> None:
    decision = decided(workload, size, share)
    candidates = allowed(decision, workload)
    chosen = decision.chosen
    measure = QUANTITIES[workload.criterion]
    assert chosen in candidates
    assert measure(chosen.cost) == min(measure(candidate.cost) for candidate in candidates)
    assert chosen.program.id in decision.front
    if workload.dtype != "fp32" and not workload.allow_lossy_merge:
        assert not chosen.program.lossy_in_16_bit and decision.fallback is chosen
    if not workload.allow_lossy_merge:
        assert not decision.fallback.program.lossy_in_16_bit
    else:
        assert decision.fallback is chosen


@property_test
@given(workloads, sizes, shares)
def test_time_is_the_device_s_and_the_host_s_by_their_shares(
    workload: Workload, size: tuple[int, int, int], share: float
) -> None:
    decision = decided(workload, size, share)
    assert decision.host_share == share
    for candidate in decision.candidates:
        cost = candidate.cost
        assert cost.time_s == rounded(weighted(cost.device_s, cost.host_s, share))
        assert cost.time_s == pytest.approx(share * cost.host_s + (1 - share) * cost.device_s)
    if share in (0.0, 1.0):  # what is not the bound decides nothing but ties
        name = ("device", "host")[int(share)]
        assert QUANTITIES["time"](decision.chosen.cost) == QUANTITIES[name](decision.chosen.cost)


@property_test
@given(workloads, sizes, shares)
def test_the_difference_is_true(workload: Workload, size: tuple[int, int, int], share: float) -> None:
    decision = decided(workload, size, share)
    runner_up = decision.runner_up
    assert runner_up is not None and runner_up != decision.chosen
    measure = QUANTITIES[workload.criterion]
    others = [candidate for candidate in allowed(decision, workload) if candidate != decision.chosen]
    assert measure(runner_up.cost) == min(measure(candidate.cost) for candidate in others)
    differing = [
        Difference(workload.criterion, name, best, other)
        for name in (workload.criterion, *TIE_BREAK)
        if (best := QUANTITIES[name](decision.chosen.cost)) != (other := QUANTITIES[name](runner_up.cost))
    ]
    assert decision.difference == (differing[0] if differing else None)
    assert decision.difference is None or decision.difference.better < decision.difference.worse


@property_test
@given(workloads, sizes, st.randoms(use_true_random=False))
def test_order_of_the_candidates_is_of_no_matter(workload: Workload, size: tuple, shuffler: random.Random) -> None:
    decision = decided(workload, size, 0.25)
    shuffled = [candidate.program for candidate in decision.candidates]
    shuffler.shuffle(shuffled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "programs_for", lambda *_: tuple(shuffled))
        again = decided(workload, size, 0.25)
    assert (again.chosen, again.fallback, again.runner_up) == (decision.chosen, decision.fallback, decision.runner_up)
    assert (again.front, again.difference) == (decision.front, decision.difference)


def test_tie_break_is_pinned() -> None:
    assert TIE_BREAK == ("time", "device", "host", "saved", "memory", "flops", "error", "bytes", "launches")
    assert PARETO == ("time", "saved", "memory", "flops", "error")
    programs = enumerate_programs(LINEAR, ("dX", "dA", "dB"))

    def priced(
        program,
        time: float = 1e-3,
        host: float = 1e-4,
        saved: int = 10,
        flops: int = 5,
        moved: int = 7,
        launches: int = 3,
        share: float = 0.0,
    ) -> Priced:
        half = PhaseCost(flops, moved, launches, 0, time / 2, host / 2)
        return Priced(program, Cost(half, half, saved, 0.0, share))

    def first(*candidates: Priced, criterion: str = "time") -> Priced:
        results = {ranked(order, criterion)[0].program for order in itertools.permutations(candidates)}
        (winner,) = results
        return next(candidate for candidate in candidates if candidate.program is winner)

    p, q = sorted(programs[:2], key=lambda program: program.id)
    assert first(priced(p), priced(q)).program is p  # the name
    assert first(priced(p), priced(q, launches=2)).program is q
    assert first(priced(p, moved=6), priced(q, launches=2)).program is p
    assert first(priced(p, moved=6), priced(q, flops=4)).program is q
    assert first(priced(p, saved=9), priced(q, flops=4)).program is p
    assert first(priced(p, saved=9), priced(q, host=0.9e-4)).program is q
    assert first(priced(p, host=0.9e-4), priced(q, time=0.9e-3)).program is q
    assert first(priced(p, host=0.9e-4, share=1.0), priced(q, time=0.9e-3, share=1.0)).program is p
    # Equal in the time that counts: the device's goes before the host's.
    assert first(priced(p, share=0.5), priced(q, time=0.9e-3, host=2e-4, share=0.5)).program is q
    assert first(priced(p, saved=9), priced(q, time=0.9e-3), criterion="memory").program is p
    # The same sum in another order is a tie, so what comes next decides.
    noisy = 1e-3 * (1 + 4e-16)
    assert noisy != 1e-3
    assert first(priced(p, time=noisy, saved=9), priced(q)).program is p
    assert pareto_front([priced(p, time=noisy), priced(q, launches=2)]) == {q.id}


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_equal_operations_in_another_order_are_a_tie(share: float) -> None:
    """Keeping S or computing it in the backward, and no other rounding: found as noise in the time before."""
    costs = [c.cost for c in decided(Workload(adapter_dtype="bf16"), (5120, 5120, 8), share).candidates]
    times = {weighted(cost.device_s, cost.host_s, share) for cost in costs}
    compared = sorted({QUANTITIES["time"](cost) for cost in costs})
    assert len(compared) < len(times)
    assert all(b / a - 1 > 1e-10 for a, b in itertools.pairwise(compared))


#: By time and without a limit, which is where the fastest is found without pricing everything.
FASTEST = (
    Workload(),
    Workload(adapter_dtype="bf16"),
    Workload(adapter_dtype="fp16", dtype="fp16", device="h200", train=("b",)),
    Workload(kernels=False),
    Workload(train=("b",), input_grad=False),
    Workload(dtype="fp32", device="h200"),
    Workload(dtype="fp32", device="cpu"),
    Workload(adapter_dtype="bf16", device="cpu", allow_lossy_merge=True),
    Workload(adapter_dtype="bf16", allow_lossy_merge=True, merge_rounding="stochastic", train=("a",)),
    Workload(train=("a",), input_grad=False, allow_lossy_merge=True),
)


@settings(deadline=None, max_examples=60)
@given(
    workload=st.sampled_from(FASTEST),
    size=st.sampled_from([(2, 128, 96, 4), (700, 512, 2048, 16), (4096, 768, 768, 8)]),
    share=shares,
)
def test_the_fastest_is_what_is_decided_by_time(workload: Workload, size: tuple[int, ...], share: float) -> None:
    tokens, in_features, out_features, rank = size
    setting = setting_for(workload, in_features, out_features, rank, False, tokens)
    decision = decide(workload, setting, share)
    lossy = workload.allow_lossy_merge
    fallback = fastest(workload, setting, share, merging=lossy)
    chosen = fastest(workload, setting, share, merging=lossy or not setting.dtype.half)
    assert (chosen.program, fallback.program) == (decision.chosen.program, decision.fallback.program)
    assert (chosen.cost, fallback.cost) == (decision.chosen.cost, decision.fallback.cost)


def test_the_fastest_prices_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload()
    setting = setting_for(workload, 640, 640, 8, False, 3000)
    priced = []
    monkeypatch.setattr(choose, "price", lambda *arguments: priced.append(arguments) or price(*arguments))
    fastest(workload, setting, 0.0)
    assert 1 <= len(priced) < 100 < len(enumerated(workload, setting))


def every_forward(workload: Workload, setting: Setting) -> list:
    """All forwards that keep nothing, with every choice of kernels for single products."""
    programs = enumerated(workload, setting)
    plain = dict.fromkeys(p.forward for p in programs if not p.forward.keeps)
    singles = available(setting) if any(p.kernels for p in programs_for(workload, setting)) else ()
    return list(dict.fromkeys(phase_with_kernels(phase, kernels) for phase in plain for kernels in subsets(singles)))


@settings(deadline=None, max_examples=40)
@given(
    workload=st.sampled_from(FASTEST).map(lambda workload: replace(workload, criterion="memory")),
    size=st.sampled_from([(2, 128, 96, 4), (700, 512, 2048, 16), (4096, 768, 768, 8)]),
    share=shares,
)
def test_y_alone_is_computed_by_the_fastest_forward(workload: Workload, size: tuple[int, ...], share: float) -> None:
    """Whatever the criterion is for training: nothing is kept."""
    tokens, in_features, out_features, rank = size
    setting = setting_for(workload, in_features, out_features, rank, False, tokens)
    decision = decide_forward(workload, setting, share)
    times = {phase: price_phase(phase, setting).weighted_s(share) for phase in every_forward(workload, setting)}
    lossless = min(time for phase, time in times.items() if not phase.lossy_in_16_bit)
    least = min(times.values())
    half, lossy = setting.dtype.half, workload.allow_lossy_merge
    assert price_phase(decision.chosen, setting).weighted_s(share) == (lossless if half and not lossy else least)
    assert price_phase(decision.fallback, setting).weighted_s(share) == (least if lossy else lossless)
    assert not (decision.chosen.lossy_in_16_bit and half and not lossy)
    assert not (decision.fallback.lossy_in_16_bit and not lossy)
    assert decision.chosen.keeps == () and decision.setting is setting and decision.host_share == share


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
    workload = Workload(tokens=(16, 4096), train=train, max_saved_bytes=1, adapter_dtype="bf16", kernels=False)
    with pytest.raises(SpecError, match="the smallest feasible value is") as caught:
        check_saved_limit(architecture, (4, 64), workload)
    least = int(str(caught.value).rpartition(" ")[2])
    check_saved_limit(architecture, (4, 64), replace(workload, max_saved_bytes=least))
    with pytest.raises(SpecError):
        check_saved_limit(architecture, (4, 64), replace(workload, max_saved_bytes=least - 1))
    for rank in (4, 64):
        decide_model(replace(workload, max_saved_bytes=least), layers(architecture), rank)
    check_saved_limit(architecture, (4, 64), replace(workload, max_saved_bytes=None))
