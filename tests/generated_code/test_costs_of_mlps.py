"""What the prices say of MLPs is what torch counts: FLOPs, and what is kept for the backward."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runlora_gen.algebra.enumerate import Program
from runlora_gen.algebra.liveness import is_told, saved_activations, saved_symbols
from runlora_gen.algebra.mlp import LINEARS
from runlora_gen.cost.price import price
from runlora_gen.measure.modules import one_choice, render_module
from runlora_gen.request.mlps import Mlp
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import setting_of
from runlora_gen.search.choose import decide
from runlora_gen.search.criterion import Priced
from torch.utils.flop_counter import FlopCounterMode

from .test_costs_are_true import every_phase
from .test_mlps import every_program

TOKENS, RANK = 12, 3
SITE = Mlp(6, 10, 8, "silu_gated", True, 1, (("gate_proj", "up_proj", "down_proj"),))
#: Of the adapter's dtype, casts that are kept; else A and B are parameters.
ADAPTERS = ("bf16", "fp32")


@pytest.mark.parametrize("adapter_dtype", ADAPTERS)
def test_flops_and_saved_bytes_are_what_torch_counts(tmp_path: Path, adapter_dtype: str) -> None:
    """Of programs that hold every forward and every backward, by torch: kernels take as many, and keep the same."""
    workload = Workload(adapter_dtype=adapter_dtype, launch="graph", device="a100", bias="all", tokens=(TOKENS,))
    programs: list[Program] = list(every_phase(every_program(workload)))
    full = setting_of(workload, SITE, RANK, TOKENS)
    decision = decide(workload, full)
    decision = replace(decision, candidates=tuple(Priced(each, decision.chosen.cost) for each in programs))
    folder = tmp_path / adapter_dtype
    module = render_module(one_choice(SITE, workload, decision), RANK, workload, folder, all_variants=True)
    trains = sorted(full.gradients)
    wishes = [full.gradients, frozenset(full.gradients) - {"dX"}, *(frozenset({name}) for name in trains)]
    assert len(trains) == 10
    assert module.KERNELS in (True, False)
    module.KERNELS = False
    for number, program in enumerate(programs):
        assert program.id in module.VARIANTS
        # All in turn, of each program the first and another.
        for gradients in (wishes[0], wishes[1 + number % (len(wishes) - 1)]):
            counts(module, program, replace(full, gradients=gradients), adapter_dtype)


def counts(module: Any, program: Program, setting: Any, adapter_dtype: str) -> None:
    adapter = torch.float32 if adapter_dtype == "fp32" else torch.bfloat16
    x, given, parameters = operands(setting.gradients, adapter)
    cost = price(program, setting)
    packed: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = module.lora_mlp(x, **given, variant=program.id)
        forward = counter.get_total_flops()
        output.backward(torch.randn_like(output))
    counted = (forward, counter.get_total_flops() - forward)
    assert forward == cost.forward.flops, program.id
    whole = {goal for goal in setting.derivation.gradients if str(goal)[:2] in ("dA", "dB")}
    if any(map(is_told, program.backward.operations)) and not {*map(str, whole)} <= setting.gradients:
        # It is priced as a whole: torch computes the part that is wanted.
        assert counted[1] <= cost.backward.flops, (program.id, setting.gradients)
    else:
        assert counted[1] == cost.backward.flops, (program.id, setting.gradients)
    kept = [tensor for tensor in packed if tensor.untyped_storage().data_ptr() not in parameters]
    assert sum(tensor.nbytes for tensor in kept) == cost.saved_bytes, (program.id, setting.gradients)
    assert len(kept) == len(saved_activations(program, setting.gradients))
    assert len(packed) == len(saved_symbols(program, setting.gradients))


def operands(wanted: frozenset[str], adapter: torch.dtype) -> tuple[torch.Tensor, dict[str, Any], set[int]]:
    """x, all else that ``lora_mlp`` takes, and where parameters are."""
    generator = torch.Generator().manual_seed(0)

    def draw(gradient: str, dtype: torch.dtype, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype).requires_grad_(gradient in wanted)

    half, shapes = torch.bfloat16, [(out, read) for read, out in SITE.shapes]
    given: dict[str, Any] = {
        "weights": [draw("", half, *shape) for shape in shapes],
        "lora_As": [draw(f"dA_{j}", adapter, RANK, read) for j, (_, read) in zip(LINEARS, shapes, strict=True)],
        "lora_Bs": [draw(f"dB_{j}", adapter, out, RANK) for j, (out, _) in zip(LINEARS, shapes, strict=True)],
        "biases": [draw(f"db_{j}", half, out) for j, (out, _) in zip(LINEARS, shapes, strict=True)],
    }
    parameters = {tensor.untyped_storage().data_ptr() for tensor in itertools.chain(*given.values())}
    return draw("dX", half, TOKENS, SITE.in_features), {**given, "scalings": [0.5, -1.0, 2.0]}, parameters
