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
from runlora_gen.algebra.linear import QUANTIZED
from runlora_gen.algebra.work import work
from runlora_gen.cost.device import DeviceProfile, load_device
from runlora_gen.cost.measured import is_priced
from runlora_gen.cost.peft import price_peft
from runlora_gen.cost.price import price_frozen, price_frozen_forward, price_operation
from runlora_gen.cost.profile import parse_toml, read_profile, render_profile
from runlora_gen.cost.roofline import DEQUANTIZING, roofline
from runlora_gen.cost.rounding import rounding_error
from runlora_gen.cost.setting import DTYPES, Setting
from runlora_gen.emit.nodes import module_node
from runlora_gen.emit.render import Header, render
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
CODES, WEIGHT = O * I // 2, O * I * 2
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


def setting(device: DeviceProfile | None = None, **options: Any) -> Setting:
    found = setting_for(Workload(base="nf4", adapter_dtype="bf16", **options), I, O, R, False, T)
    return replace(found, device=device or load_device("a100"))


def profile(folder: Path, text: str, name: str) -> DeviceProfile:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return load_device(str(path))


def test_bytes_are_those_of_the_codes_and_of_what_is_made_of_them() -> None:
    where = setting()
    made, kernel, merged = (roofline(operation, where) for operation in (MADE, KERNEL, MERGED))
    assert made.bytes_moved == kernel.bytes_moved == CODES + WEIGHT
    assert made.launches == DEQUANTIZING and kernel.launches == merged.launches == 1
    # W is made within the pass: neither written nor read.
    assert merged.bytes_moved == CODES + WEIGHT + (O * R + R * I) * 2 and merged.flops == 2 * O * R * I


def test_a_frozen_linear_makes_its_weight_in_the_forward_and_in_the_backward() -> None:
    where = setting()
    made = price_operation(MADE, where).device_s
    forward, backward = (
        price_operation(QUANTIZED.parse(f), where).device_s for f in ("Y = X @ W.T + b", "dX = dY @ W")
    )
    assert price_frozen_forward(where)[0] == pytest.approx(made + forward)
    assert price_frozen(where) == pytest.approx(2 * made + forward + backward)
    plain = replace(setting_for(Workload(adapter_dtype="bf16"), I, O, R, False, T), device=where.device)
    assert price_frozen(where) == pytest.approx(price_frozen(plain) + 2 * made)
    first = replace(where, gradients=frozenset({"dA", "dB"}))
    assert price_frozen(first) == pytest.approx(made + forward), "no dX reads it"


def test_peft_pays_for_both_and_for_a_copy() -> None:
    where = setting()
    plain = replace(setting_for(Workload(adapter_dtype="bf16"), I, O, R, False, T), device=where.device)
    made, ours, theirs = price_operation(MADE, where), price_peft(plain), price_peft(where)
    assert theirs.times.device_s - ours.times.device_s >= 2 * made.device_s + T * O * 4 / where.device.bytes_per_s
    assert theirs.backward.device_s - ours.backward.device_s == pytest.approx(made.device_s)
    assert theirs.own_bytes == ours.own_bytes and theirs.times.host_s > ours.times.host_s


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


def test_weights_are_kept_only_where_memory_is_named() -> None:
    free, limited = Workload(base="nf4"), Workload(base="nf4", max_saved_bytes=2**40)
    for workload in (free, limited):
        where = setting_for(workload, 512, 512, 8, False, 1024)
        kept = {symbol.name for program in enumerated(workload, where) for symbol in program.kept}
        assert ("W" in kept) == ("M" in kept) == (workload is limited)


# What is lost by merging before the one rounding


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A generated module that merges: where its kernel does not serve, as here, torch does the same."""
    pytest.importorskip("triton", reason="a merge is a kernel's")
    workload = Workload(base="nf4", adapter_dtype="bf16")
    (choice,) = decide_model(workload, (Layer(1024, 1024, False, 1, ("q_proj",)),), 16)
    node = module_node(choice, 16, workload, width=120, all_variants=True)
    path = tmp_path_factory.mktemp("generated") / "generated_merging.py"
    path.write_text(render("linear.py.jinja", {"header": Header("", ""), "module": node}), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    sys.modules[path.stem] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    yield found
    del sys.modules[path.stem]


@pytest.mark.parametrize(("std", "draws"), [(1e-5, 16), (1e-4, 2), (1e-3, 1), (1e-2, 1)])
def test_merged_before_the_one_rounding_no_update_is_lost(module: Any, std: float, draws: int) -> None:
    """Rounded to the nearest, and right on average all the same: codes times scales lie on no grid of 16 bits."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    realised = wanted = 0.0
    plain = merged = 0.0
    for _ in range(draws):
        weight = torch.randn(1024, 1024, generator=generator) * 0.02
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        state.dtype = torch.bfloat16
        Q = module.Quantized.of(codes, state)
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
    assert realised / wanted == pytest.approx(1, abs=0.01)
    assert (merged / plain) ** 0.5 == pytest.approx(1, abs=0.02)
    # The formula is of normal weights; those of codes are 16 times a scale.
    sigma = float(exact.std())
    assert (merged / draws) ** 0.5 / sigma == pytest.approx(rounding_error(sigma, 7), rel=0.05)
