"""Kernels for single products: they take torch's place exactly where they make the program faster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.algebra.operations import products
from runlora_gen.cost.device import load_device
from runlora_gen.cost.lower import (
    available,
    lowered,
    lowered_phase,
    phase_time,
    phase_with_kernels,
    subsets,
    with_kernels,
)
from runlora_gen.cost.price import price, price_phase
from runlora_gen.cost.setting import Setting
from runlora_gen.kernels.registry import KERNELS
from runlora_gen.kernels.sites import alternatives
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import enumerated, programs_for, setting_for

GRAPH = Workload(adapter_dtype="bf16", device="h200", launch="graph")

BASE = """\
title = "A machine"
source = "a test"
memory_gb_per_s = 1000
launch_us = 1
host_us = 10
kernel_host_us = 200
tflops = { bf16 = 100, fp16 = 100, fp32 = 10 }
format = 2
[times.bf16]
"TI,RI->TR scaled" = '''
T    4096
R       8
1024   20
'''
"x_at: TI,RI->TR scaled" = '''
T    4096
R       8
1024   %s
'''
"""


def case(folder: Path, kernel_us: float, rank: int = 8) -> Setting:
    path = folder / f"{kernel_us}.toml"
    path.write_text(BASE % kernel_us, encoding="utf-8")
    return replace(setting_for(GRAPH, 1024, 1024, rank, False, 4096), device=load_device(str(path)))


def split(setting: Setting):
    (program,) = (p for p in enumerated(GRAPH, setting) if p.id == "base_first/base_first-pt_x-dyt_s/keep-s")
    return program


def test_the_faster_one_is_taken(tmp_path: Path) -> None:
    program = split(case(tmp_path, 19))
    assert lowered(program, case(tmp_path, 19)).id == f"{program.id}/kernel-s"
    assert lowered(program, case(tmp_path, 21)).id == program.id
    assert lowered(program, case(tmp_path, 20)).id == program.id  # a tie: torch
    forward = program.forward
    assert lowered_phase(forward, case(tmp_path, 19)) is lowered(program, case(tmp_path, 19)).forward
    assert lowered_phase(forward, case(tmp_path, 21)) is forward


def test_what_the_host_pays_counts_as_far_as_the_step_waits_for_it(tmp_path: Path) -> None:
    """9 µs less on the device, 190 more on the host: worth it up to a share of the host's of 9 / 199."""
    setting = case(tmp_path, 11)
    program = split(setting)
    for share, taken in ((0.0, True), (0.045, True), (0.046, False), (1.0, False)):
        assert bool(lowered(program, setting, share).by_kernel) == taken
        assert (lowered_phase(program.forward, setting, share) is not program.forward) == taken


def test_a_rank_that_a_kernel_does_not_take(tmp_path: Path) -> None:
    setting = case(tmp_path, 1, rank=KERNELS["x_at"].largest_rank + 1)
    assert lowered(split(setting), setting).by_kernel == ()


def test_lowering_is_the_best_of_all_choices() -> None:
    for tokens, share in ((512, 0.0), (4096, 0.01), (16384, 0.0)):
        setting = setting_for(GRAPH, 4096, 4096, 16, False, tokens)
        for program, chosen in zip(enumerated(GRAPH, setting), programs_for(GRAPH, setting, share), strict=True):
            best = price(chosen, setting, share).time_s
            for kernel in alternatives(LINEAR, "cheaper"):
                assert best <= price(with_kernels(program, (kernel,)), setting, share).time_s * (1 + 1e-9)


def test_the_time_of_a_phase_is_its_price() -> None:
    """Seconds alone, without the rest of the vector, and with kernels that it does not hold yet."""
    setting = setting_for(Workload(device="h200"), 4096, 4096, 16, False, 2048)
    for program in enumerated(Workload(device="h200", train=("b",)), setting):
        for phase in (program.forward, program.backward):
            for kernels in subsets(available(setting)):
                cost = price_phase(phase_with_kernels(phase, kernels), setting)
                assert phase_time(phase, kernels, setting) == pytest.approx((cost.device_s, cost.host_s))


def test_every_set_of_kernels_the_empty_one_first() -> None:
    kernels = alternatives(LINEAR, "cheaper")
    found = subsets(kernels)
    assert found[0] == () and found[-1] == kernels and len(set(found)) == len(found) == 2 ** len(kernels)


def test_what_a_kernel_computes_is_what_torch_would() -> None:
    setting = setting_for(GRAPH, 512, 512, 8, False, 1024)
    for program in enumerated(GRAPH, setting):
        changed = with_kernels(program, alternatives(LINEAR, "cheaper"))
        for before, after in ((program.forward, changed.forward), (program.backward, changed.backward)):
            assert [p for op in before.operations for p in products(op)] == [
                p for op in after.operations for p in products(op)
            ]
        assert changed.kept == program.kept and changed.saved_inputs == program.saved_inputs
        before, after = price(program, setting), price(changed, setting)
        assert (before.flops, before.saved_bytes, before.workspace_bytes) == (
            after.flops,
            after.saved_bytes,
            after.workspace_bytes,
        )


@pytest.mark.parametrize(("adapter_dtype", "count"), [("bf16", 310), ("fp32", 1180)])
def test_ids_stay_unique(adapter_dtype: str, count: int) -> None:
    workload = replace(GRAPH, adapter_dtype=adapter_dtype)
    setting = setting_for(workload, 4096, 4096, 16, False, 4096)
    programs = programs_for(workload, setting)
    assert len({program.id for program in programs}) == len(programs) == count
    assert any(program.by_kernel for program in programs)


@pytest.mark.parametrize(("in_features", "out_features"), [(5461, 2048), (2048, 5461), (4, 4)])
def test_rows_off_16_bytes_get_no_kernels(in_features: int, out_features: int) -> None:
    setting = setting_for(GRAPH, in_features, out_features, 4, False, 4096)
    assert not any(program.kernels for program in programs_for(GRAPH, setting))


def test_fp32_gets_kernels_where_they_were_measured() -> None:
    for device, expected in (("h200", True), ("a100", False), ("cpu", False)):
        workload = Workload(dtype="fp32", device=device)
        setting = setting_for(workload, 1024, 4096, 8, False, 2048)
        kernels = {kernel for program in programs_for(workload, setting) for kernel in program.kernels}
        assert bool(kernels) == expected and not kernels & {"fused_gemm", "p_db"}
