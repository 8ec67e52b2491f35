"""Prices of products of float8: their rate, what is read of codes, and where they are candidates at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runlora_gen.algebra.linear import FLOAT8, SCALED
from runlora_gen.algebra.operations import Fused
from runlora_gen.algebra.work import work
from runlora_gen.cost.device import load_device
from runlora_gen.cost.measured import is_priced
from runlora_gen.cost.price import price_operation
from runlora_gen.cost.profile import parse_toml, read_profile, render_profile
from runlora_gen.cost.roofline import roofline
from runlora_gen.cost.setting import DTYPES, Setting
from runlora_gen.kernels.registry import KERNELS
from runlora_gen.request.layers import Layer
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import enumerated, setting_for
from runlora_gen.search.choose import decide, decide_forward
from runlora_gen.search.ranges import decide_model

from .tables import times

T, I, O, R = 8192, 4096, 4096, 16  # noqa: E741 - as the formulas have it
#: A device of which nothing is measured but what each figure says.
BARE = """\
format = 2
title = "A machine that multiplies float8"
source = "a test"
compute_capability = "9.0"
memory_gb_per_s = 2984
launch_us = 0.84
host_us = 35
kernel_host_us = 89
multiprocessors = 132

[tflops]
bf16 = 770
fp16 = 770
fp32 = 66.9
"""
RATE = "fp8 = 1446\n"
Y = "fused_gemm_8: Y = S @ B.T + b; Y += Xq @ Q.T"
DX = "fused_gemm_8: dX = P @ A; dX += dYq @ Qt.T"
OF_FLOAT8 = [op for op in FLOAT8.operations if isinstance(op, Fused) and KERNELS[op.kernel].float8]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A profile's path, of the bare one with what is put behind it."""
    folder = tmp_path_factory.mktemp("devices")
    made: dict[tuple[str, ...], str] = {}

    def path(*more: str) -> str:
        if more not in made:
            file = folder / f"machine{len(made)}.toml"
            file.write_text("".join((BARE, *more)), encoding="utf-8")
            made[more] = str(file)
        return made[more]

    return path


def setting(device: str, **options: Any) -> Setting:
    asked: dict[str, Any] = {"base": "fp8", "adapter_dtype": "bf16", "launch": "graph", **options}
    return setting_for(Workload(device=device, tokens=(T,), **asked), I, O, R, False, T)


def of_float8(workload: Workload, sides: tuple[int, int] = (I, O)) -> set[str]:
    """The kernels of float8 that programs of a workload may have."""
    where = setting_for(workload, *sides, R, False, T)
    kernels = {name for program in enumerated(workload, where) for name in program.kernels}
    return {name for name in kernels if KERNELS[name].float8}


def test_the_rate_is_of_products_of_two_coded_operands(machine: Callable[..., str]) -> None:
    where = setting(machine(RATE))
    large, low = 2 * T * I * O, 2 * T * O * R
    for formula in (Y, DX):
        operation = FLOAT8.parse(formula)
        found = roofline(operation, where)
        idle = KERNELS["fused_gemm_8"].waves(T, O, 132)
        assert found.flops == large + low and found.launches == 1
        assert found.device_s - 0.84e-6 == pytest.approx((large / 1446e12 + low / 770e12) * idle)
    for formula in ("Y = X @ W.T + b", "dX = dY @ W"):  # of weights that are made of codes
        assert roofline(FLOAT8.parse(formula), where).device_s - 0.84e-6 == pytest.approx(large / 770e12)
    plain = roofline(FLOAT8.parse("fused_gemm: dX = P @ A; dX += dY @ W"), where)
    assert plain.flops == large + low and plain.device_s > 1.5 * roofline(FLOAT8.parse(DX), where).device_s


@pytest.mark.parametrize(
    ("formula", "moved"),
    [
        ("largest: mX = largest(X)", T * I * 2 + T * 4),
        ("largest: mdY = largest(dY, Q)", T * O * 2 + T * 4),
        ("quantize: Xq = quantize(X, mX)", T * I * 3 + T * 4),
        ("quantize: dYq = quantize(dY, mdY, Q)", T * O * 3 + T * 4),
        ("transpose: Qt = transpose(Q)", 2 * O * I),
        ("x_at_largest: S = s * X @ A.T; mX = largest(X)", (T * I + R * I + T * R) * 2 + T * 4),
        (
            "p_db_largest: P = s * dY @ B; dB = dY.T @ S; mdY = largest(dY, Q)",
            (T * O + 2 * O * R + 2 * T * R) * 2 + T * 4,
        ),
        (Y, T * I + O * I + (T * R + O * R + T * O) * 2),
        (DX, T * O + O * I + (T * R + I * R + T * I) * 2),
    ],
)
def test_codes_count_where_they_are_read_themselves(machine: Callable[..., str], formula: str, moved: int) -> None:
    """Where they give scales alone, those are a number a row, and count as little as scales do elsewhere."""
    assert roofline(FLOAT8.parse(formula), setting(machine(RATE))).bytes_moved == moved


def test_a_pass_is_priced_by_memory(machine: Callable[..., str]) -> None:
    """What is added to the product is less than it saves: each pass reads X, or dY, once."""
    where = setting(machine(RATE))
    passes = [
        roofline(FLOAT8.parse(formula), where).device_s
        for formula in ("quantize: dYq = quantize(dY, mdY, Q)", "transpose: Qt = transpose(Q)")
    ]
    saved = roofline(FLOAT8.parse("fused_gemm: dX = P @ A; dX += dY @ W"), where).device_s
    saved += roofline(FLOAT8.parse("rescale: W = rescale(Q)"), where).device_s
    assert 0 < sum(passes) < saved - roofline(FLOAT8.parse(DX), where).device_s


def test_where_float8_is_a_candidate(machine: Callable[..., str]) -> None:
    can, can_not = machine(RATE), machine()
    workload = Workload(base="fp8", device=can, adapter_dtype="bf16", launch="graph", tokens=(T,))
    every = {op.kernel for op in OF_FLOAT8}
    assert len(every) == 6 and of_float8(workload) == every
    forward = {"largest", "quantize", "x_at_largest", "fused_gemm_8"}
    assert of_float8(replace(workload, float8="forward")) == forward
    assert of_float8(replace(workload, dropout=0.1)) == forward - {"x_at_largest"}
    assert of_float8(replace(workload, input_grad=False)) == forward, "there is no dX"
    for none in (
        replace(workload, float8="none"),
        replace(workload, kernels=False),
        replace(workload, device=can_not),
        replace(workload, device="a100"),
        replace(workload, dtype="fp32", adapter_dtype="fp32"),
        replace(workload, base="fp8-block"),
        replace(workload, base="int8"),
        replace(workload, base="nf4"),
        replace(workload, base="plain"),
    ):
        assert not of_float8(none), none
    for sides in ((I + 8, O), (I, O + 8), (I + 1, O + 3)):  # rows of codes start off 16 bytes
        assert not of_float8(workload, sides), sides
    assert of_float8(workload, (I + 16, O + 48)) == every


@pytest.mark.parametrize("rank", [16, 32, 64, 128])
def test_the_rank_is_that_of_the_kernels(machine: Callable[..., str], rank: int) -> None:
    """Above 64 there is no room beside the large operands, above 32 no one pass of three results."""
    workload = Workload(base="fp8", device=machine(RATE), adapter_dtype="bf16", launch="graph", tokens=(T,))
    where = setting_for(workload, I, O, rank, False, T)
    kernels = {name for program in enumerated(workload, where) for name in program.kernels}
    assert ("fused_gemm_8" in kernels) == (rank <= 64) and ("p_db_largest" in kernels) == (rank <= 32)


@pytest.mark.parametrize("device", ["bare", "h100"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_it_is_chosen_where_it_is_faster(machine: Callable[..., str], device: str, dropout: float) -> None:
    """With many tokens; with few, where making the weight is what takes time, W of 16 bits is not read either."""
    name = machine(RATE) if device == "bare" else device
    workload = Workload(base="fp8", device=name, adapter_dtype="bf16", launch="graph", tokens=(T,), dropout=dropout)
    where = setting_for(workload, I, O, R, False, T)
    chosen = decide(workload, where).chosen.program
    assert "fused_gemm_8" in chosen.forward.kernels
    assert ("fused_gemm_8" in chosen.backward.kernels) == (not dropout)
    assert not chosen.lossy_in_16_bit and "mX" not in map(str, chosen.kept)
    forward = decide_forward(workload, where)
    assert "fused_gemm_8" in forward.chosen.kernels, "where nothing wants a gradient, too"
    without = replace(workload, float8="none")
    other = decide(without, setting_for(without, I, O, R, False, T)).chosen
    assert not {*other.program.kernels} & {op.kernel for op in OF_FLOAT8}
    assert decide(workload, where).chosen.cost.device_s < other.cost.device_s


def test_what_was_not_measured_beside_torch_s_products_is_no_candidate(machine: Callable[..., str]) -> None:
    """A profile with tables: of a kernel that has none nothing is known."""
    product = FLOAT8.parse("Y = X @ W.T + b")
    device = load_device(machine(RATE, "\n[times.bf16]\n", times(work(product), "T 8192\n4096x4096 400")))
    fused, bf16 = FLOAT8.parse(Y), DTYPES["bf16"]
    assert isinstance(fused, Fused) and not is_priced(fused, bf16, device)
    assert is_priced(fused, bf16, load_device(machine(RATE))) and is_priced(fused, bf16, load_device("h100"))


def test_prices_are_those_of_the_table_where_there_is_one() -> None:
    where = setting("h100")
    for operation in OF_FLOAT8:
        assert work(operation) in where.device.times_for("bf16"), operation
        price = price_operation(operation, where)
        assert 0.2 < roofline(operation, where).device_s / price.device_s < 1.3, operation


def test_a_rate_of_float8_is_read_and_written(tmp_path: Path) -> None:
    profile = read_profile(parse_toml((BARE + RATE).encode()))
    assert profile.tflops == {"bf16": 770, "fp16": 770, "fp32": 66.9, "fp8": 1446}
    text = render_profile(profile)
    assert text.endswith("[tflops]\nbf16 = 770\nfp16 = 770\nfp32 = 66.9\nfp8 = 1446\n")
    assert read_profile(parse_toml(text.encode())) == profile
    assert "fp8" not in render_profile(read_profile(parse_toml(BARE.encode())))
    with pytest.raises(ValueError, match=r"tflops\.fp8"):
        read_profile(parse_toml((BARE + "fp8 = 0\n").encode()))
    (tmp_path / "x.toml").write_text(BARE + "fp8 = -1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"--device: .*tflops\.fp8"):
        load_device(str(tmp_path / "x.toml"))


@pytest.mark.parametrize("base", ["fp8", "fp8-block", "int8"])
def test_what_is_merged_is_allowed_by_form(base: str) -> None:
    """By the fewest FLOPs a merge is chosen, but on float8 not before it is allowed: it loses small updates."""
    workload = Workload(base=base, device="a100", adapter_dtype="bf16", criterion="flops", tokens=(2**20,))
    site = SCALED if base == "int8" else FLOAT8

    def merges(given: Workload) -> bool:
        (choice,) = decide_model(given, (Layer(I, O, False, 1, ("q_proj",)),), R)
        chosen = [part.decision.chosen.program for part in choice.ranges]
        assert {program.derivation for program in chosen} == {site}
        return any("M" in map(str, program.made) for program in chosen)

    assert merges(workload) == (base == "int8")
    assert merges(replace(workload, allow_lossy_merge=True))
