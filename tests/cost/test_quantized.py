"""Prices on a quantized base: what is made of codes, what a profile measured of that, and what is lost by merging."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runlora_gen.algebra.linear import QUANTIZED, SCALED
from runlora_gen.algebra.operations import Operation
from runlora_gen.algebra.work import work
from runlora_gen.cost.device import DeviceProfile, load_device
from runlora_gen.cost.measured import is_priced
from runlora_gen.cost.peft import price_peft
from runlora_gen.cost.price import price_frozen, price_frozen_forward, price_operation
from runlora_gen.cost.profile import parse_toml, read_profile, render_profile
from runlora_gen.cost.roofline import LAUNCHES, roofline
from runlora_gen.cost.rounding import rounding_error
from runlora_gen.cost.setting import DTYPES, Setting
from runlora_gen.emit.nodes import module_node
from runlora_gen.emit.render import Header, render
from runlora_gen.request.bases import BASES
from runlora_gen.request.layers import Layer
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import enumerated, setting_for
from runlora_gen.search.ranges import decide_model

from .tables import times

T, I, O, R = 4096, 5120, 13824, 16  # noqa: E741 - as the formulas have it
BF16 = DTYPES["bf16"]
MADE = QUANTIZED.parse("W = dequantize(Q)")
KERNEL = QUANTIZED.parse("dequantize: W = dequantize(Q)")
MERGED = QUANTIZED.parse("dequantize_merged: W := dequantize(Q); M = W + s * B @ A")
#: W by torch and by its kernel, and M of one pass, of what a base is made of.
ON: dict[str, tuple[Operation, Operation, Operation]] = {
    "nf4": (MADE, KERNEL, MERGED),
    "int8": (
        SCALED.parse("W = rescale(Q)"),
        SCALED.parse("rescale: W = rescale(Q)"),
        SCALED.parse("rescale_merged: W := rescale(Q); M = W + s * B @ A"),
    ),
}
ON["fp8"] = ON["fp8-block"] = ON["int8"]
WEIGHT = O * I * 2
every_base = pytest.mark.parametrize("base", ON)
BASE = """\
format = 2
title = "A machine"
source = "a test"
measured_on = "h200"
memory_gb_per_s = 1000
launch_us = 1
host_us = 10
kernel_host_us = 20
tflops = { bf16 = 100, fp16 = 100, fp32 = 10 }
"""
OWN = f"\n[times.bf16]\n{times(work(KERNEL), '512x512 30', '5120x13824 900')}"


def setting(device: DeviceProfile | None = None, base: str = "nf4", **options: Any) -> Setting:
    found = setting_for(Workload(base=base, adapter_dtype="bf16", **options), I, O, R, False, T)
    return replace(found, device=device or load_device("a100"))


def profile(folder: Path, text: str, name: str) -> DeviceProfile:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return load_device(str(path))


@every_base
def test_bytes_are_those_of_the_codes_and_of_what_is_made_of_them(base: str) -> None:
    where, stored = setting(base=base), BASES[base]
    made, kernel, merged = (roofline(operation, where) for operation in ON[base])
    codes = O * I // 2 if stored.form == "codes" else O * I
    assert where.bytes_of(where.derivation["Q"]) == codes
    assert made.bytes_moved == kernel.bytes_moved == codes + WEIGHT
    assert made.launches == LAUNCHES["dequantize" if stored.form == "codes" else "rescale"] > 1
    assert kernel.launches == merged.launches == 1
    # W is made within the pass: neither written nor read.
    assert merged.bytes_moved == codes + WEIGHT + (O * R + R * I) * 2 and merged.flops == 2 * O * R * I


@every_base
@pytest.mark.parametrize("device", ["a100", "h100"])
def test_the_kernels_are_priced_below_what_they_take_the_place_of(base: str, device: str) -> None:
    """Whether a profile measured them or not: as many bytes, in one launch."""
    where = setting(load_device(device), base)
    made, kernel, merged = (price_operation(operation, where) for operation in ON[base])
    assert 0 < kernel.device_s <= made.device_s and kernel.device_s <= merged.device_s


@every_base
def test_a_frozen_linear_makes_its_weight_in_the_forward_and_in_the_backward(base: str) -> None:
    where, (torch_s, _, _) = setting(base=base), ON[base]
    made = price_operation(torch_s, where).device_s
    forward, backward = (
        price_operation(QUANTIZED.parse(f), where).device_s for f in ("Y = X @ W.T + b", "dX = dY @ W")
    )
    assert price_frozen_forward(where)[0] == pytest.approx(made + forward)
    assert price_frozen(where) == pytest.approx(2 * made + forward + backward)
    plain = replace(setting_for(Workload(adapter_dtype="bf16"), I, O, R, False, T), device=where.device)
    assert price_frozen(where) == pytest.approx(price_frozen(plain) + 2 * made)
    first = replace(where, gradients=frozenset({"dA", "dB"}))
    assert price_frozen(first) == pytest.approx(made + forward), "no dX reads it"


@every_base
def test_peft_pays_for_both_and_for_4_bits_for_a_copy(base: str) -> None:
    where, (torch_s, _, _) = setting(base=base), ON[base]
    plain = replace(setting_for(Workload(adapter_dtype="bf16"), I, O, R, False, T), device=where.device)
    made, ours, theirs = price_operation(torch_s, where), price_peft(plain), price_peft(where)
    more = theirs.times.device_s - ours.times.device_s
    if BASES[base].form == "codes":  # lora.bnb.Linear4bit copies what the base gives, and no other layer does
        assert more >= 2 * made.device_s + T * O * 4 / where.device.bytes_per_s
    else:
        assert more == pytest.approx(2 * made.device_s)
    assert theirs.backward.device_s - ours.backward.device_s == pytest.approx(made.device_s)
    assert theirs.own_bytes == ours.own_bytes and theirs.times.host_s > ours.times.host_s


@every_base
def test_peft_casts_its_input_by_form(base: str) -> None:
    """Where the adapter is wider: layers over bitsandbytes' linears do not, others do, and keep what was cast."""
    where = setting(base=base, dtype="bf16")
    wide = replace(where, adapter_dtype=DTYPES["fp32"])
    casts = BASES[base].form == "float8"
    assert price_peft(where).keeps_input and price_peft(wide).keeps_input == (not casts)
    kept = price_peft(wide).own_bytes - price_peft(where).own_bytes
    assert kept == casts * T * I * 2 + 2 * R * (I + O), "what was cast of X, and of the adapter for dX"
    # X is read and written in the forward and in the backward, to float32 and back.
    passes = price_peft(wide).times.device_s - price_peft(where).times.device_s
    assert (passes > 4 * T * I * 6 / where.device.bytes_per_s) == casts


def test_a_profile_s_own_tables_go_before_those_that_stand_in(tmp_path: Path) -> None:
    """What was measured on the machine itself, beside what is known of another one."""
    device, without = profile(tmp_path, BASE + OWN, "own"), profile(tmp_path, BASE, "without")
    where = setting(device)
    assert price_operation(KERNEL, where).device_s == pytest.approx(900e-6)
    small = replace(where, in_features=512, out_features=512)
    assert price_operation(KERNEL, small).device_s == pytest.approx(30e-6)
    # What torch runs in its place was not measured: it is as efficient as the kernel, by its own roofline.
    ratio = price_operation(KERNEL, where).device_s / roofline(KERNEL, where).device_s
    assert price_operation(MADE, where).device_s == pytest.approx(ratio * roofline(MADE, where).device_s)
    # Everything else is as before.
    product = QUANTIZED.parse("Y = X @ W.T + b")
    assert price_operation(product, where) == price_operation(product, setting(without))
    assert is_priced(KERNEL, BF16, device) and is_priced(KERNEL, BF16, without), "what it replaces was not measured"
    assert not is_priced(MERGED, BF16, device)
    assert is_priced(MERGED, BF16, load_device("h100")), "measured there"


def test_a_table_without_columns_is_read_as_it_was_written() -> None:
    """W = dequantize(Q) has neither tokens nor a rank: a line is all that a size needs."""
    text = BASE.replace('measured_on = "h200"\n', "") + OWN
    read = read_profile(parse_toml(text.encode()))
    assert read.times["bf16"][work(KERNEL)] == {(512, 512): 30, (5120, 13824): 900}
    written = render_profile(read)
    assert "'''\n512x512     30\n5120x13824 900\n'''" in written
    again = read_profile(parse_toml(written.encode()))
    assert again == read and render_profile(again) == written
    with pytest.raises(ValueError, match=r"there is no figure in it|columns"):
        read_profile(parse_toml(text.replace("512x512 30\n", "").replace("5120x13824 900\n", "").encode()))


@every_base
def test_weights_are_kept_only_where_memory_is_named(base: str) -> None:
    free = Workload(
        base=base, device="a100"
    )  # which has no measured times: beside those, only what was measured counts
    limited = replace(free, max_saved_bytes=2**40)
    for workload in (free, limited):
        where = setting_for(workload, 512, 512, 8, False, 1024)
        kept = {symbol.name for program in enumerated(workload, where) for symbol in program.kept}
        assert ("W" in kept) == ("M" in kept) == (workload is limited)


# What is lost by merging before the one rounding


@pytest.fixture(scope="module", params=ON)
def merging(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """A base, and a generated module that merges: where its kernel does not serve, as here, torch does the same."""
    pytest.importorskip("triton", reason="a merge is a kernel's")
    workload = Workload(base=request.param, adapter_dtype="bf16", device="a100")
    (choice,) = decide_model(workload, (Layer(1024, 1024, False, 1, ("q_proj",)),), 16)
    node = module_node(choice, 16, workload, width=120, all_variants=True)
    path = tmp_path_factory.mktemp("generated") / f"generated_merging_{request.param.replace('-', '_')}.py"
    path.write_text(render("linear.py.jinja", {"header": Header("", ""), "module": node}), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    sys.modules[path.stem] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    yield request.param, found
    del sys.modules[path.stem]


def codes_of(weight: torch.Tensor, base: str, module: Any) -> Any:
    """What a weight is quantized to, as those do who make such bases."""
    if base == "nf4":
        functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        state.dtype = torch.bfloat16
        return module.Quantized.of(codes, state)
    if base == "int8":
        scale = weight.abs().amax(1)
        codes = (weight * (127 / scale)[:, None]).round().to(torch.int8)
        return module.Quantized.of(codes, (scale, (1, weight.shape[1])))
    block = (16, 16) if base == "fp8-block" else (1, weight.shape[1])
    down, across = weight.shape[0] // block[0], weight.shape[1] // block[1]
    blocks = weight.view(down, block[0], across, block[1])
    scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    codes = (blocks / scale[:, None, :, None]).view(weight.shape).to(torch.float8_e4m3fn)
    return module.Quantized.of(codes, (scale, block))


@pytest.mark.parametrize(("std", "draws"), [(1e-5, 16), (1e-4, 2), (1e-3, 1), (1e-2, 1)])
def test_merged_before_the_one_rounding_no_update_is_lost(merging: tuple[str, Any], std: float, draws: int) -> None:
    """Rounded to the nearest, and right on average all the same: codes times scales lie on no grid of 16 bits."""
    base, module = merging
    generator = torch.Generator().manual_seed(0)
    realised = wanted = 0.0
    plain = merged = 0.0
    for _ in range(draws):
        weight = torch.randn(1024, 1024, generator=generator) * 0.02
        Q = codes_of(weight, base, module)
        assert Q.dtype == torch.bfloat16
        A = (torch.rand(16, 1024, generator=generator) * 2 - 1) / 32
        B = torch.randn(1024, 16, generator=generator) * std
        exact = module._dequantized(Q, torch.float32).double()
        delta = B.bfloat16().double() @ A.bfloat16().double()
        W, M = (
            w.double() for w in (module._dequantized(Q), module._dequantized_merged(Q, A.bfloat16(), B.bfloat16(), 1.0))
        )
        realised += float(((M - W) * delta).sum())
        wanted += float((delta * delta).sum())
        plain += float((W - exact).square().mean())
        merged += float((M - exact - delta).square().mean())
    # A scale has eight places between two numbers of 16 bits with float8_e4m3fn: it takes many scales to be right.
    assert realised / wanted == pytest.approx(1, abs=0.06 if base.startswith("fp8") else 0.01)
    assert (merged / plain) ** 0.5 == pytest.approx(1, abs=0.02)
    # The formula is of normal weights; those of codes are so many times a scale.
    sigma = float(exact.std())
    assert (merged / draws) ** 0.5 / sigma == pytest.approx(rounding_error(sigma, 7), rel=0.05)
