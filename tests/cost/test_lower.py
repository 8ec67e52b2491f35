"""Kernels for single products: they take torch's place exactly where they make the program faster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from runlora_gen.algebra.operations import Fused, products
from runlora_gen.algebra.table import KERNELS, OPERATIONS, TABLE, TWINS
from runlora_gen.choose import enumerated, programs_for, setting_for
from runlora_gen.cost.device import load_device
from runlora_gen.cost.lower import lowered, with_kernels
from runlora_gen.cost.price import Setting, price
from runlora_gen.emit.code import line
from runlora_gen.emit.render import template_folder
from runlora_gen.spec.workload import Workload

GRAPH = Workload(device="h200", launch="graph")

BASE = """\
title = "A machine"
source = "a test"
memory_gb_per_s = 1000
launch_us = 1
host_us = 10
kernel_host_us = 200
tflops = { bf16 = 100, fp16 = 100, fp32 = 10 }
[times.bf16]
"S = s X Aᵀ" = [[4096, 1024, 8, 20]]
"x_at: S = s X Aᵀ" = [[4096, 1024, 8, %s]]
"""


def case(folder: Path, kernel_us: float, launch: str = "graph", rank: int = 8) -> Setting:
    path = folder / f"{kernel_us}.toml"
    path.write_text(BASE % kernel_us, encoding="utf-8")
    setting = setting_for(GRAPH, 1024, 1024, rank, False, 4096)
    return replace(setting, device=load_device(str(path)), launch=launch)


def split(setting: Setting):
    (program,) = (p for p in enumerated(GRAPH, setting) if p.id == "base_first/base_first-pt_x-dyt_s/keep-s")
    return program


def test_the_faster_one_is_taken(tmp_path: Path) -> None:
    program = split(case(tmp_path, 19))
    assert lowered(program, case(tmp_path, 19)).id == f"{program.id}/kernel-s"
    assert lowered(program, case(tmp_path, 21)).id == program.id
    assert lowered(program, case(tmp_path, 20)).id == program.id  # a tie: torch


def test_what_the_host_pays_counts_in_eager_mode(tmp_path: Path) -> None:
    """9 µs less on the device, 390 more on the host, which takes longest here."""
    setting = case(tmp_path, 11, launch="eager")
    assert lowered(split(setting), setting).by_kernel == ()


def test_a_rank_that_a_kernel_does_not_take(tmp_path: Path) -> None:
    setting = case(tmp_path, 1, rank=KERNELS["x_at"].largest_rank + 1)
    assert lowered(split(setting), setting).by_kernel == ()


def test_lowering_is_the_best_of_all_choices() -> None:
    for tokens in (512, 4096, 16384):
        setting = setting_for(GRAPH, 4096, 4096, 16, False, tokens)
        for program, chosen in zip(enumerated(GRAPH, setting), programs_for(GRAPH, setting), strict=True):
            best = price(chosen, setting).time_s
            for twin in TWINS.values():
                assert best <= price(with_kernels(program, (twin,)), setting).time_s * (1 + 1e-9)


def test_what_a_kernel_computes_is_what_torch_would() -> None:
    setting = setting_for(GRAPH, 512, 512, 8, False, 1024)
    for program in enumerated(GRAPH, setting):
        changed = with_kernels(program, tuple(TWINS.values()))
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


def test_ids_stay_unique() -> None:
    setting = setting_for(GRAPH, 4096, 4096, 16, False, 4096)
    ids = [program.id for program in programs_for(GRAPH, setting)]
    assert len(set(ids)) == len(ids) == 310


@pytest.mark.parametrize(("in_features", "out_features"), [(5461, 2048), (2048, 5461), (4, 4)])
def test_rows_off_16_bytes_get_no_kernels(in_features: int, out_features: int) -> None:
    setting = setting_for(GRAPH, in_features, out_features, 4, False, 4096)
    assert not any(program.kernels for program in programs_for(GRAPH, setting))


def test_fp32_gets_kernels_where_they_were_measured() -> None:
    for device, expected in (("h200", True), ("a100", False), ("cpu", False)):
        workload = replace(GRAPH, dtype="fp32", device=device)
        setting = setting_for(workload, 1024, 4096, 8, False, 2048)
        kernels = {kernel for program in programs_for(workload, setting) for kernel in program.kernels}
        assert bool(kernels) == expected and not kernels & {"fused_gemm", "p_db"}


def test_every_kernel_has_its_templates_calls_and_helpers() -> None:
    folder = template_folder() / "kernels"
    helpers = (folder / "support.jinja").read_text() + (folder / "tiles.jinja").read_text()
    used = {operation.kernel: operation for operation in OPERATIONS if isinstance(operation, Fused)}
    assert used.keys() == KERNELS.keys()
    for name, kernel in KERNELS.items():
        assert all((folder / f"{name}{part}.jinja").is_file() for part in ("", "_launch", "_operator"))
        assert all(f'"{helper}" in module.helpers' in helpers for helper in kernel.helpers - {"F"})
        assert kernel.small_tiles.keys() == (kernel.tiles.keys() if "descriptors" in kernel.helpers else set())
        assert all(candidate.keys() <= kernel.tiles.keys() for candidate in kernel.candidates)


def test_calls_follow_from_the_formulas() -> None:
    assert {line(operation) for operation in OPERATIONS if isinstance(operation, Fused)} == {
        'Y = _fused_gemm(X, W, S, B, b, tiles="Y")',
        'dX = _fused_gemm(dY, W.t(), P, A.t(), None, tiles="dX")',
        'P, dB = _p_db(dY, B, S, scaling, B_dtype, tiles="P, dB")',
        'S = _x_at(X, A, scaling, tiles="S")',
        'dA = _pt_x(P, X, A_dtype, tiles="dA")',
        'M = _merge(W, A, B, scaling, tiles="M")',
        'M = _merge_stochastic(W, A, B, scaling, seed, tiles="M")',
    }


def test_twins_are_of_products_that_the_table_has() -> None:
    operations = [operation for row in TABLE for operation in row.operations]
    assert all(plain in operations for plain in TWINS)
