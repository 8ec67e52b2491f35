"""What stacks of experts cost: rows are multiplied once, stacks are read once, and tiles are of one expert."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.cost.device import DeviceProfile, load_device
from runlora_gen.cost.peft import price_peft
from runlora_gen.cost.price import price, price_frozen, price_operation
from runlora_gen.cost.roofline import roofline
from runlora_gen.cost.setting import Setting
from runlora_gen.emit.derivation_text import program_text
from runlora_gen.kernels.registry import KERNELS
from runlora_gen.request.experts import Experts
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import enumerated, rows_for, setting_of
from runlora_gen.search.choose import decide

N, E, TOP_K, I, O, R = 4096, 128, 8, 2048, 1536, 16  # noqa: E741 - as the formulas have it
T = N * TOP_K
GATHERED = Experts(E, I, O, True, TOP_K, False, 1, ("gate_up_proj",))
COMBINED = Experts(E, I, O, False, TOP_K, False, 1, ("down_proj",))
WORKLOAD = Workload(adapter_dtype="bf16", launch="graph")


def setting(site: Experts = GATHERED, tokens: int = N, workload: Workload = WORKLOAD) -> Setting:
    return setting_of(workload, site, R, tokens)


@pytest.fixture
def plain() -> DeviceProfile:
    """A data sheet, on which a kernel is what its tiles are."""
    return replace(load_device("h100"), times={}, tiles={}, measured_on=None)


@pytest.mark.parametrize(
    ("formula", "flops", "elements"),
    [
        ("Y = Xr @ W[e].T + b[e]", 2 * T * I * O, T * I + E * O * I + T * O),
        ("S = s * Xr @ A[e].T", 2 * T * I * R, T * I + E * R * I + T * R),
        ("Y += S @ B[e].T", 2 * T * R * O, T * R + E * O * R + 2 * T * O),
        ("P = s * dY @ B[e]", 2 * T * O * R, T * O + E * O * R + T * R),
        ("dA[e] = P.T @ Xr", 2 * T * R * I, T * R + T * I + E * R * I),
        ("dB[e] = dY.T @ S", 2 * T * O * R, T * O + T * R + E * O * R),
        # A merge is of all experts, whoever has rows.
        ("M[e] = W + s * B[e] @ A[e]", 2 * E * O * R * I, E * O * I + E * O * R + E * R * I + E * O * I),
        ("Xr = gather(X)", 0, N * I + T * I),
        ("dX = combine(dXr)", 0, T * I + N * I),
        # Rows that a kernel gathers are never there.
        ("experts_x_at_gathered: Xr := gather(X); S = s * Xr @ A[e].T", 2 * T * I * R, N * I + E * R * I + T * R),
        (
            "experts_gemm_gathered: Xr := gather(X); Y = S @ B[e].T + b[e]; Y += Xr @ W[e].T",
            2 * T * O * (R + I),
            N * I + T * R + E * O * R + E * O * I + T * O,
        ),
    ],
)
def test_flops_are_of_rows_and_bytes_of_a_stack_once(formula: str, flops: int, elements: int) -> None:
    cost = price_operation(setting().derivation.parse(formula), setting())
    assert cost.flops == flops and cost.bytes_moved == 2 * elements


def test_one_expert_is_a_linear() -> None:
    """Whose rows are the tokens: with the same products, priced alike by the roofline."""
    one = setting(replace(GATHERED, experts=1, top_k=1))
    linear = replace(one, derivation=LINEAR, sizes={})
    for text, alike in (("Y = Xr @ W[e].T + b[e]", "Y = X @ W.T + b"), ("dA[e] = P.T @ Xr", "dA = P.T @ X")):
        mine, theirs = roofline(one.derivation.parse(text), one), roofline(linear.derivation.parse(alike), linear)
        assert (mine.flops, mine.bytes_moved) == (theirs.flops, theirs.bytes_moved)


def test_launches_of_torch_by_expert() -> None:
    """A product of rows has one more beside it; what scales, adds or biases it are passes of their own."""
    case, biased = setting(COMBINED), setting(replace(COMBINED, bias=True))

    def launches(formula: str, where: Setting = case) -> int:
        return price_operation(where.derivation.parse(formula), where).launches

    assert launches("Yr = X @ W[e].T + b[e]") == 2 and launches("Yr = X @ W[e].T + b[e]", biased) == 5
    assert launches("S = s * X @ A[e].T") == 3 and launches("Yr += S @ B[e].T") == 3
    assert launches("dA[e] = Pg.T @ X") == launches("M[e] = W + s * B[e] @ A[e]") == 1
    assert launches("dYr = gather(dY)") == 2 and launches("Y = combine(Yr, g)") == 7
    kernels = {"experts_gemm: Yr = S @ B[e].T + b[e]; Yr += X @ W[e].T": 1, "experts_combine: Y = combine(Yr, g)": 1}
    kernels["experts_p_db_gathered: dYr := gather(dY); P = s * dYr @ B[e]; dB[e] = dYr.T @ Sg"] = 2
    assert {formula: launches(formula) for formula in kernels} == kernels


@pytest.mark.parametrize("tokens", [16, 128, 4096, 32768])
def test_a_tile_of_each_expert_is_half_empty(plain: DeviceProfile, tokens: int) -> None:
    """So few tokens take many tiles, and many are hardly slowed: by whole waves of them."""
    case = replace(setting(tokens=tokens), device=plain)
    formula = "experts_gemm_gathered: Xr := gather(X); Y = S @ B[e].T + b[e]; Y += Xr @ W[e].T"
    cost = roofline(case.derivation.parse(formula), case)
    tiles = KERNELS["experts_gemm"].tiles
    rows = tokens * TOP_K
    count = (rows / tiles["BM"] + E / 2) * math.ceil(O / tiles["BN"])
    assert plain.multiprocessors is not None
    waves = math.ceil(count / plain.multiprocessors)
    of_tile = 2 * tiles["BM"] * O / math.ceil(O / tiles["BN"]) * (I + R)
    computing = waves * plain.multiprocessors * of_tile / plain.flops_per_s["bf16"]
    busy = max(computing, cost.bytes_moved / plain.bytes_per_s)
    assert cost.device_s == pytest.approx(busy + plain.launch_s)


@pytest.mark.parametrize("site", [GATHERED, COMBINED], ids=lambda site: site.name)
def test_programs_take_longer_than_frozen_experts(site: Experts) -> None:
    """And the chosen one little more: none but those that merge reads a stack more often than frozen experts do."""
    case = setting(site)
    programs = enumerated(WORKLOAD, case)
    frozen = price_frozen(case)
    times = {program.id: price(program, case).device_s for program in programs}
    assert frozen * 0.9 < min(times.values()) < 1.5 * frozen
    merged = min(time for name, time in times.items() if name.startswith("merged/"))
    assert merged > min(times.values())


def test_nothing_rounds_a_merged_stack_stochastically() -> None:
    """So where that is asked for none is merged: rounded to the nearest, it would lose what was to stay."""
    stochastic = replace(WORKLOAD, allow_lossy_merge=True, merge_rounding="stochastic")
    case = setting(COMBINED, workload=stochastic)
    assert any(program.lossy_in_16_bit for program in enumerated(WORKLOAD, case))
    programs = enumerated(stochastic, case)
    assert programs and not any(program.lossy_in_16_bit for program in programs)


def test_what_docstrings_hold_it_against() -> None:
    decision = decide(WORKLOAD, setting())
    text = " ".join(program_text(decision.chosen, decision, WORKLOAD, "", 100))
    assert " times the frozen experts (" in text and "linear" not in text


def test_kernels_of_experts_are_candidates_until_torch_s_products_are_measured() -> None:
    """What was measured of linears says nothing of them: all of it is from the roofline, or nothing."""
    workload = replace(WORKLOAD, device="h200")
    case = setting(workload=workload)
    assert case.device.meter.times_for("bf16"), "this profile has measurements"
    with_kernels = {op for way in rows_for(workload, case) for op in way.operations}
    assert case.derivation.parse("experts_p_db: P = s * dY @ B[e]; dB[e] = dY.T @ S") in with_kernels
    times = {**case.device.times_for("bf16"), "TO,EOR->TR scaled": (((T, O, R, E), 1e-3),)}
    measured = replace(case, device=replace(case.device, times={"bf16": times}, measured_on=None))
    left = with_kernels - {op for way in rows_for(workload, measured) for op in way.operations}
    # What computes that product, and what computes one of the same dimensions, which takes its ratio.
    assert {str(operation).partition(":")[0] for operation in left} == {"experts_p_db", "experts_gemm_gathered"}


@pytest.mark.parametrize(("activation", "passes"), [("silu_gated", (2, 3, 4, 3, 3, 3)), ("relu2", (2, 3))])
def test_a_frozen_activation_is_priced_by_the_model_s_own_passes(activation: str, passes: tuple[int, ...]) -> None:
    """In how many passes torch computes ours, which rounds once, says nothing of the frozen step, nor of PEFT's."""
    case, apart = setting(replace(COMBINED, activation=activation)), setting(COMBINED)
    least_s = case.bytes_of(case.derivation["X"]) * sum(passes) / case.device.bytes_per_s
    added_s = price_frozen(case) - price_frozen(apart)
    assert least_s < added_s < 2 * least_s
    assert price_peft(case).times.device_s - price_peft(apart).times.device_s == pytest.approx(added_s)


def test_peft_is_priced_without_dropout() -> None:
    """It refuses that on experts."""
    dropped, plain = (setting(workload=replace(WORKLOAD, dropout=rate)) for rate in (0.1, 0.0))
    assert price_peft(dropped) == price_peft(plain)
