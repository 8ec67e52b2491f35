"""The search without a list of all programs, against the list: the front, and what is chosen under every criterion."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from runlora_gen.algebra.count import count_programs
from runlora_gen.algebra.derivation import SAVED, Argument, Derivation, Way, derive, row
from runlora_gen.algebra.enumerate import iterate_programs
from runlora_gen.algebra.operations import Symbol
from runlora_gen.cost.price import price
from runlora_gen.cost.setting import Setting
from runlora_gen.request.workload import CHOICES, Workload
from runlora_gen.search.candidates import enumerated, goals, rows_for, setting_for, stochastic_for
from runlora_gen.search.criterion import PARETO, QUANTITIES, Priced, pareto_front, ranked
from runlora_gen.search.fronts import undominated

from .groups import group, wanted

WORKLOADS = (
    Workload(),
    Workload(adapter_dtype="bf16"),
    Workload(adapter_dtype="fp16", dtype="fp16", device="rtx-4090"),
    Workload(kernels=False),
    Workload(dtype="fp32", device="cpu"),
    Workload(dtype="fp32", device="h200"),
    Workload(train=("a",), adapter_dtype="bf16"),
    Workload(train=("b",), input_grad=False),
    Workload(input_grad=False, adapter_dtype="bf16"),
    Workload(adapter_dtype="bf16", allow_lossy_merge=True, merge_rounding="stochastic"),
)
shares = st.sampled_from([0.0, 0.03125, 0.25, 1.0])


def vector(candidate: Priced) -> tuple[tuple[float, ...], ...]:
    """What may be traded; of equal times that is the less which takes the device less, then the host."""
    parts = (("time", "device", "host"), *((name,) for name in PARETO[1:]))
    return tuple(tuple(QUANTITIES[name](candidate.cost) for name in names) for names in parts)


def front(candidates: Sequence[Priced]) -> set[tuple[tuple[float, ...], ...]]:
    names = pareto_front(candidates)
    return {vector(candidate) for candidate in candidates if candidate.program.id in names}


def judge(every: Sequence[Priced], found: Sequence[Priced]) -> None:
    """Nothing is lost: not the front, nor what is best by a criterion, without merges, or under a limit."""
    assert {candidate.program for candidate in found} <= {candidate.program for candidate in every}
    assert front(found) == front(every)
    limits = sorted({candidate.cost.saved_bytes for candidate in every})
    for criterion, lossy, limit in itertools.product(
        CHOICES["criterion"], (False, True), {limits[0], limits[len(limits) // 2], limits[-1]}
    ):
        best = [
            ranked(
                [c for c in some if c.cost.saved_bytes <= limit and (lossy or not c.program.lossy_in_16_bit)], criterion
            )[:1]
            for some in (every, found)
        ]
        assert list(map(vector, best[0])) == list(map(vector, best[1]))


@settings(max_examples=25, deadline=None)
@given(
    workload=st.sampled_from(WORKLOADS),
    size=st.sampled_from([(1, 128, 96, 4), (16, 512, 2048, 16), (700, 2048, 512, 64), (4096, 5120, 5120, 8)]),
    share=shares,
)
def test_a_lone_linear_s_front_is_that_of_all_programs(
    workload: Workload, size: tuple[int, int, int, int], share: float
) -> None:
    tokens, in_features, out_features, rank = size
    setting = setting_for(workload, in_features, out_features, rank, True, tokens)
    every = [Priced(program, price(program, setting, share)) for program in enumerated(workload, setting)]
    table, replaced = rows_for(workload, setting), stochastic_for(workload, setting)
    judge(every, undominated(setting, goals(workload), table, replaced, share))


def setting_of(derivation: Derivation, workload: Workload, tokens: int, sizes: dict[str, int]) -> Setting:
    """Of a group; its bias is frozen."""
    alone = setting_for(workload, sizes["I"], sizes["O_q"], max(v for k, v in sizes.items() if "R" in k), True, tokens)
    gradients = frozenset(name for name in wanted(derivation) if not name.startswith("db"))
    return replace(alone, derivation=derivation, sizes=sizes, gradients=gradients)


def every_one(setting: Setting, table: Sequence[Way], share: float) -> list[Priced]:
    programs = iterate_programs(setting.derivation, wanted(setting.derivation), table=table, facts=setting.facts)
    return [Priced(program, price(program, setting, share)) for program in programs]


PAIR = group("qk")
sizes_of_pairs = st.fixed_dictionaries(
    {"I": st.sampled_from([64, 2048])}
    | {f"O_{j}": st.sampled_from([64, 512, 2048]) for j in "qk"}
    | {f"R_{j}": st.sampled_from([4, 16, 512]) for j in "qk"}
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    left_out=st.sets(st.sampled_from(PAIR.table), min_size=12, max_size=24),
    workload=st.sampled_from(WORKLOADS[:2]),
    tokens=st.sampled_from([1, 64, 4096]),
    sizes=sizes_of_pairs,
    share=shares,
)
def test_a_pair_s_front_is_that_of_all_programs(
    left_out: set[Way], workload: Workload, tokens: int, sizes: dict[str, int], share: float
) -> None:
    table = [way for way in PAIR.table if way not in left_out]
    setting = setting_of(PAIR, workload, tokens, sizes)
    count = count_programs(PAIR, wanted(PAIR), table=table, facts=setting.facts)
    assume(1 < count < 700)
    every = every_one(setting, table, share)
    assert len(every) == count
    judge(every, undominated(setting, wanted(PAIR), table, (), share))


def with_a_shared_symbol() -> Derivation:
    """Two linears on H, which is made of X: it may be kept for all, or made again."""
    symbols = [Symbol("X", ("T", "I")), Symbol("C", ("I", "I")), Symbol("H", ("T", "I"))]
    rows = [row("H", "x_c", "H = X @ C"), row("H", SAVED)]
    arguments = [Argument("X", activation=True), Argument("C")]
    for j in "qk":
        out, rank = f"O_{j}", f"R_{j}"
        symbols += [
            *(Symbol(f"{name}_{j}", (out, "I")) for name in ("W", "M")),
            *(Symbol(f"{name}_{j}", (rank, "I")) for name in ("A", "dA")),
            *(Symbol(f"{name}_{j}", (out, rank)) for name in ("B", "dB")),
            *(Symbol(f"{name}_{j}", ("T", out)) for name in ("Y", "dY")),
            *(Symbol(f"{name}_{j}", ("T", rank)) for name in ("S", "P")),
        ]
        rows += [
            row(f"S_{j}", "h_at", f"S_{j} = s_{j} * H @ A_{j}.T"),
            row(f"S_{j}", SAVED),
            row(f"M_{j}", "merge", f"M_{j} = W_{j} + s_{j} * B_{j} @ A_{j}"),
            row(f"Y_{j}", "split", f"Y_{j} = H @ W_{j}.T", f"Y_{j} += S_{j} @ B_{j}.T"),
            row(f"Y_{j}", "merged", f"Y_{j} = H @ M_{j}.T"),
            row(f"P_{j}", "dy_b", f"P_{j} = s_{j} * dY_{j} @ B_{j}"),
            row(f"dA_{j}", "pt_h", f"dA_{j} = P_{j}.T @ H"),
            row(f"dB_{j}", "dyt_s", f"dB_{j} = dY_{j}.T @ S_{j}"),
        ]
        arguments += [
            Argument(f"W_{j}"),
            Argument(f"A_{j}", gradient=f"dA_{j}"),
            Argument(f"B_{j}", gradient=f"dB_{j}"),
        ]
    return derive(
        "pair on a shared symbol",
        symbols=symbols,
        arguments=arguments,
        outputs=("Y_q", "Y_k"),
        output_gradients=("dY_q", "dY_k"),
        table=rows,
        lossy=("M_q", "M_k"),
    )


SHARING = with_a_shared_symbol()


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.sampled_from([1, 64, 4096]), sizes=sizes_of_pairs, share=shares, train=st.sampled_from(["ab", "a", "b"])
)
def test_what_parts_share_is_chosen_once(tokens: int, sizes: dict[str, int], share: float, train: str) -> None:
    goals = [goal for goal in wanted(SHARING) if goal[1].lower() in train]
    setting = replace(setting_of(SHARING, WORKLOADS[1], tokens, sizes), gradients=frozenset(goals))
    every = [Priced(p, price(p, setting, share)) for p in iterate_programs(SHARING, goals)]
    assert len(every) == count_programs(SHARING, goals)
    judge(every, undominated(setting, goals, SHARING.table, (), share))


@pytest.mark.parametrize(("shared", "count"), [(False, 310 * 210 * 210), (True, 24_593_964)])
def test_three_linears_are_counted_priced_and_chosen(shared: bool, count: int) -> None:
    """Of q, k and v with all kernels: 2 s on two cores, where listing all would take hours."""
    derivation = group("qkv", shared=shared)
    sizes = {"I": 4096, "O_q": 4096, "O_k": 1024, "O_v": 1024, "R_q": 8, "R_k": 8, "R_v": 16}
    setting = setting_of(derivation, Workload(adapter_dtype="bf16"), 4096, sizes)
    start = time.process_time()
    assert count_programs(derivation, wanted(derivation)) == count
    found = undominated(setting, wanted(derivation), derivation.table)
    best = ranked([c for c in found if not c.program.lossy_in_16_bit], "time")[0]
    assert time.process_time() - start < 5
    assert len({vector(candidate) for candidate in found}) == len(found) < 500
    assert len({candidate.program.id for candidate in found}) == len(found)
    # Each has one that is no worse in anything.
    programs = itertools.islice(iterate_programs(derivation, wanted(derivation)), 0, 1_000, 50)
    for other in (Priced(program, price(program, setting)) for program in programs):
        assert any(all(a <= b for a, b in zip(vector(c), vector(other), strict=True)) for c in found)
    # The pass over X for all, where there is one.
    assert any(len(way.targets) > 2 for way in best.program.forward.ways) == shared
