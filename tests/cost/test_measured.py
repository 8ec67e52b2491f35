"""Prices from measurements: exact where something was measured, between its neighbours elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.algebra.operations import Fused, Symbol, parse
from runlora_gen.algebra.work import work
from runlora_gen.cost.device import DeviceProfile, load_device
from runlora_gen.cost.measured import is_priced, measured_as, setting_at, tuned_constants
from runlora_gen.cost.price import price_operation
from runlora_gen.cost.roofline import roofline
from runlora_gen.cost.setting import DTYPES, Setting
from runlora_gen.request.errors import SpecError
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import enumerated, setting_for

from ..kernels.several import operations
from .tables import times

PRODUCT = LINEAR.parse("Y = X @ W.T + b")
LOW_RANK = LINEAR.parse("S = s * X @ A.T")
FUSED = LINEAR.parse("fused_gemm: Y = S @ B.T + b; Y += X @ W.T")
BASE = """\
format = 2
title = "A machine"
source = "a test"
memory_gb_per_s = 1000
launch_us = 1
host_us = 10
kernel_host_us = 20
tflops = { bf16 = 100, fp16 = 100, fp32 = 10 }
"""
TIMES = """
[times.bf16]
"TI,OI->TO biased" = '''
T       1024 4096
512x512   30   80
'''
"TI,RI->TR scaled" = '''
T   1024
R      8
512  5.5
'''
"fused_gemm: TR,OR->TO biased; TI,OI->TO accumulated" = '''
T       1024
R          8
512x512   40
'''
[tiles.bf16."fused_gemm: TR,OR->TO biased; TI,OI->TO accumulated"]
constants = [{}, {GROUP_M = 16}]
best = '''
T       1024 8192
R          8    8
512x512    1    0
'''
"""


def profile(folder: Path, text: str, name: str = "machine") -> DeviceProfile:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return load_device(str(path))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> DeviceProfile:
    return profile(tmp_path_factory.mktemp("profiles"), BASE + TIMES)


def _with(table: str) -> str:
    """A profile with one table more."""
    return BASE + TIMES.replace("[tiles", table + "[tiles")


def setting(device: DeviceProfile, tokens: int, dtype: str = "bf16") -> Setting:
    shape = setting_for(Workload(dtype=dtype), 512, 512, 8, False, tokens)
    return replace(shape, device=device)


def test_measured_sizes_cost_what_was_measured(measured: DeviceProfile) -> None:
    for operation, time_us in ((PRODUCT, 30), (LOW_RANK, 5.5), (FUSED, 40)):
        assert price_operation(operation, setting(measured, 1024)).device_s == pytest.approx(time_us * 1e-6)


@given(tokens=st.integers(1, 10**6))
def test_other_sizes_are_as_efficient_as_those_measured(measured: DeviceProfile, tokens: int) -> None:
    def over_roofline(count: int) -> float:
        case = setting(measured, count)
        plain = roofline(PRODUCT, case)
        return price_operation(PRODUCT, case).device_s / plain.device_s

    low, high = sorted((over_roofline(1024), over_roofline(4096)))
    assert low * 0.9999 <= over_roofline(tokens) <= high * 1.0001


def test_the_nearer_measurement_weighs_more(measured: DeviceProfile) -> None:
    def over_roofline(count: int) -> float:
        case = setting(measured, count)
        return price_operation(PRODUCT, case).device_s / roofline(PRODUCT, case).device_s

    first, last = over_roofline(1024), over_roofline(4096)
    assert abs(over_roofline(1100) - first) < abs(over_roofline(1100) - last)
    assert abs(over_roofline(3900) - first) > abs(over_roofline(3900) - last)


def test_rows_off_16_bytes_are_a_class_of_their_own(tmp_path: Path) -> None:
    table = times("TI,OI->TO biased", "T 1024", "512x512 30", "511x512 120")
    device = profile(tmp_path, f"{BASE}[times.bf16]\n{table}")

    def over_roofline(in_features: int) -> float:
        case = replace(setting_for(Workload(), in_features, 512, 8, False, 1024), device=device)
        plain = roofline(PRODUCT, case)
        return price_operation(PRODUCT, case).device_s / plain.device_s

    assert over_roofline(520) == pytest.approx(over_roofline(512)) == pytest.approx(over_roofline(4096))
    assert over_roofline(510) == pytest.approx(over_roofline(511))
    assert over_roofline(510) > 3 * over_roofline(512)


def test_a_product_that_was_not_measured_is_as_efficient_as_others_of_its_dimensions(measured: DeviceProfile) -> None:
    """The bare roofline would flatter it beside them."""

    def over_roofline(formula: str, tokens: int) -> float:
        case = setting(measured, tokens)
        operation = LINEAR.parse(formula)
        return price_operation(operation, case).device_s / roofline(operation, case).device_s

    for tokens in (1024, 2000, 4096):
        wide = over_roofline("Y = X @ W.T + b", tokens)
        assert wide > 1.5
        for formula in ("dX = dY @ W", "dX += dY @ W", "Y += X @ W.T", "G = dY.T @ X"):
            assert over_roofline(formula, tokens) == pytest.approx(wide)
        thin = over_roofline("S = s * X @ A.T", tokens)
        assert thin != pytest.approx(wide)
        for formula in ("dA = P.T @ X", "dX = P @ A"):
            assert over_roofline(formula, tokens) == pytest.approx(thin)


def test_a_product_that_was_measured_takes_no_other_s_ratio(tmp_path: Path) -> None:
    device = profile(tmp_path, _with(times("TO,OI->TI", "T 1024", "512x512 7")))
    case = setting(device, 1024)
    assert price_operation(LINEAR.parse("dX = dY @ W"), case).device_s == pytest.approx(7e-6)
    assert price_operation(PRODUCT, case).device_s == pytest.approx(30e-6)
    # Those that have no row stand between both.
    assert 7e-6 < price_operation(LINEAR.parse("G = dY.T @ X"), case).device_s < 30e-6


def test_a_kernel_says_nothing_of_torch(tmp_path: Path) -> None:
    device = profile(tmp_path, _with(times("x_at: TI,RI->TR scaled", "T 1024", "R 8", "512 500")))
    case, operation = setting(device, 1024), LINEAR.parse("dA = P.T @ X")
    ratio = price_operation(LOW_RANK, case).device_s / roofline(LOW_RANK, case).device_s
    assert price_operation(operation, case).device_s == pytest.approx(ratio * roofline(operation, case).device_s)


@pytest.mark.parametrize(
    "formula",
    [
        "P = s * dY @ B",  # T, O and R: nothing of these was measured
        "M = W + s * B @ A",
        "db = sum(dY)",
        "A = cast(lora_A)",
        # A kernel is as efficient as it is: torch says nothing of it.
        "fused_gemm: dX = P @ A; dX += dY @ W",
        "x_at: S = s * X @ A.T",
    ],
)
def test_what_nothing_is_known_of_has_the_roofline(measured: DeviceProfile, formula: str) -> None:
    other = LINEAR.parse(formula)
    case = setting(measured, 1024)
    assert price_operation(other, case) == roofline(other, case)


def test_16_bit_dtypes_stand_for_each_other_and_fp32_does_not(measured: DeviceProfile) -> None:
    assert price_operation(PRODUCT, setting(measured, 1024, "fp16")).device_s == pytest.approx(30e-6)
    case = setting(measured, 1024, "fp32")
    assert price_operation(PRODUCT, case) == roofline(PRODUCT, case)


def test_the_merged_weight_is_as_fast_as_the_weight(measured: DeviceProfile) -> None:
    assert price_operation(LINEAR.parse("Y = X @ M.T + b"), setting(measured, 1024)).device_s == pytest.approx(30e-6)


def test_a_linear_of_a_group_is_as_fast_as_a_linear(measured: DeviceProfile) -> None:
    """Their indices have other names; the work is the same."""
    shapes = {
        "X": ("T", "I"),
        "Wq": ("O_q", "I"),
        "Yq": ("T", "O_q"),
        "dYq": ("T", "O_q"),
        "dX": ("T", "I"),
        "b": ("O_q",),
    }
    symbols = {name: Symbol(name, shape) for name, shape in shapes.items()}
    for ours, lone in (("Yq = X @ Wq.T + b", "Y = X @ W.T + b"), ("dX = dYq @ Wq", "dX = dY @ W")):
        for tokens in (1024, 3000):
            case = setting(measured, tokens)
            group = replace(case, out_features=1, sizes={"O_q": 512})
            assert price_operation(parse(ours, symbols), group) == price_operation(LINEAR.parse(lone), case)


@pytest.mark.parametrize(
    ("kernel", "lone"),
    [
        ("x_ats", "x_at: S = s * X @ A.T"),
        ("pt_xs", "pt_x: dA = P.T @ X"),
        ("p_dbs", "p_db: P = s * dY @ B; dB = dY.T @ S"),
        ("fused_gemms", str(FUSED)),
        ("fused_gemm_sum", "fused_gemm: dX = P @ A; dX += dY @ W"),
    ],
)
def test_a_kernel_of_several_linears_is_as_efficient_as_that_of_one_as_large_as_all(kernel: str, lone: str) -> None:
    operation, other = operations(("q", "k"))[kernel], LINEAR.parse(lone)
    assert isinstance(other, Fused)
    assert measured_as(operation) == work(other)
    h200 = load_device("h200")
    for tokens in (2048, 1500) if kernel == "p_dbs" else (4096, 3000):
        case = replace(setting(h200, tokens), in_features=5120, out_features=13824, rank=24)
        several = replace(case, sizes={"O_q": 8192, "O_k": 5632, "R_q": 8, "R_k": 16})
        ratio, expected = (
            price_operation(op, at).device_s / roofline(op, at).device_s
            for op, at in ((operation, several), (other, case))
        )
        if kernel == "p_dbs":  # which takes as long, in one launch
            fewer = roofline(other, case).device_s / (roofline(other, case).device_s - h200.launch_s)
            assert expected < ratio < expected * fewer * 1.02
        else:
            assert ratio == pytest.approx(expected) != pytest.approx(1)
        # One that has other constants has its own.
        tuned = None if kernel == "p_dbs" else tuned_constants(other, case)
        assert tuned_constants(operation, several) == tuned and tuned_constants(other, case) is not None


def test_what_a_kernel_leaves_to_torch_is_priced_so() -> None:
    """Of rows or columns above its limits: what was chosen for fewer may meet them."""
    operation = operations(("q", "k"))["p_dbs"]
    sizes = {"O_q": 8192, "O_k": 5632, "R_q": 8, "R_k": 16}
    for tokens, columns, alone in ((2048, 8192, True), (2049, 8192, False), (2048, 8193, False)):
        case = replace(setting(load_device("h200"), tokens), sizes={**sizes, "O_q": columns})
        cost, parts = price_operation(operation, case), [price_operation(part, case) for part in operation.parts]
        assert (cost.launches == 1) == alone
        assert alone or (cost.device_s, cost.host_s, cost.launches) == (
            pytest.approx(sum(part.device_s for part in parts)),
            pytest.approx(sum(part.host_s for part in parts)),
            len(parts),
        )


def test_few_rows_and_columns_take_one_launch() -> None:
    operation = LINEAR.parse("p_db: P = s * dY @ B; dB = dY.T @ S")
    for tokens, columns, launches in ((1024, 4096, 1), (1025, 4096, 2), (1024, 4097, 2)):
        case = replace(setting(load_device("h200"), tokens), out_features=columns, rank=16)
        assert price_operation(operation, case).launches == launches


def test_a_kernel_of_several_linears_is_a_candidate_where_that_of_one_was_measured(measured: DeviceProfile) -> None:
    found = operations(("gate", "up")).items()
    assert [name for name, operation in found if is_priced(operation, DTYPES["bf16"], measured)] == ["fused_gemms"]


def test_another_machine_s_ratios_stand_in() -> None:
    """The H100's profile is the H200's with another roofline: the same ratio of time to roofline."""
    h100, h200 = load_device("h100"), load_device("h200")
    assert h100.measured_on is h200 and h100.meter is h200 and h200.meter is h200
    for operation in (PRODUCT, LOW_RANK, FUSED):
        ratios = []
        for device in (h100, h200):
            case = setting(device, 3000)
            plain = roofline(operation, case)
            ratios.append(price_operation(operation, case).device_s / plain.device_s)
        assert ratios[0] == pytest.approx(ratios[1])


def test_constants_of_the_nearest_size(measured: DeviceProfile) -> None:
    def constants(kernel: str, tokens: int, dtype: str = "bf16") -> object:
        operation = LINEAR.parse(kernel)
        assert isinstance(operation, Fused)
        return tuned_constants(operation, setting(measured, tokens, dtype))

    assert constants(str(FUSED), 1500) == {"GROUP_M": 16}
    assert constants(str(FUSED), 7000, "fp16") == {}
    assert constants("p_db: P = s * dY @ B; dB = dY.T @ S", 1024) is None


def test_half_a_wave_takes_as_long_as_a_whole_one() -> None:
    """A kernel that computes in tiles is busy until the last one is done: 132 tiles at once on an H200."""
    h200 = load_device("h200")

    def busy(out_features: int) -> float:
        dims = {"T": 1024, "I": 8192, "O": out_features, "R": 8}
        return roofline(FUSED, setting_at(dims, DTYPES["bf16"], h200)).device_s - h200.launch_s

    assert busy(128 * 9) == pytest.approx(busy(128 * 16), rel=0.01)  # 72 tiles or 128: one wave
    assert busy(128 * 17) == pytest.approx(2 * busy(128 * 16), rel=0.01)  # 136 tiles: two


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "not a device profile"),
        (BASE.replace('title = "A machine"\n', ""), "title is missing"),
        (BASE.replace('"A machine"', '\'a"""b\''), "title: .* is not allowed"),
        (BASE.replace('"A machine"', '"a\\nb"'), "title: .* is not allowed"),
        (BASE.replace('"A machine"', '"a\\\\"'), "title: .* is not allowed"),
        (BASE.replace('"A machine"', "3"), "title: 3 is not allowed"),
        (
            BASE.replace("launch_us = 1", "launch_us = 0"),
            "launch_us: 0 is not allowed; give a number from 1e-6 to 1e12",
        ),
        (BASE.replace("launch_us = 1", 'launch_us = "1"'), "launch_us: '1' is not allowed"),
        (BASE.replace("launch_us = 1", "launch_us = nan"), "launch_us: nan is not allowed"),
        (BASE.replace("fp32 = 10", "fp33 = 10"), "fp32 is missing"),
        (BASE + 'measured_on = "h10"\n', "unknown device"),
        ('measured_on = "h100"\n' + BASE, "measured_on: h100 was not measured itself"),
        ('measured_on = "machine.toml"\n' + BASE, "measured_on: unknown device"),
        ("multiprocessors = 0.5\n" + BASE, "multiprocessors: 0.5 is not allowed"),
        (BASE.replace("launch_us = 1", "launch_us = 1" + "0" * 400), "launch_us: .* is not allowed"),
        ("x = " + "[" * 20000, "not a device profile"),
        (BASE.replace("format = 2", "format = 3"), "format: 3 is not allowed; this version reads 2"),
        (BASE.replace("format = 2", 'format = "2"'), "format: '2' is not allowed; this version reads 2"),
        (BASE.replace("format = 2", "format = true"), "format: True is not allowed"),
    ],
)
def test_a_broken_profile_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        profile(tmp_path, text)


def test_a_kernel_that_was_not_measured_is_no_candidate_beside_torch_that_was(tmp_path: Path) -> None:
    workload = Workload(launch="graph")
    for text, expected in ((BASE, True), (BASE + TIMES, False)):
        device = profile(tmp_path, text, name=f"known_{expected}")
        case = replace(setting_for(workload, 512, 512, 8, False, 4096), device=device)
        kernels = {kernel for program in enumerated(workload, case) for kernel in program.kernels}
        assert "fused_gemm" in kernels and ("p_db" in kernels) == expected


def test_stochastic_rounding_takes_the_merge_s_time() -> None:
    case = replace(setting(load_device("h200"), 1024), in_features=5120, out_features=5120)
    plain, stochastic = (LINEAR.parse(f"{kernel}: M = W + s * B @ A") for kernel in ("merge", "merge_stochastic"))
    assert price_operation(stochastic, case).device_s == price_operation(plain, case).device_s


def test_a_missing_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^--device: there is no file .*none\.toml"):
        load_device(str(tmp_path / "none.toml"))
