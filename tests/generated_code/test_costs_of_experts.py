"""What the prices say of experts is what torch counts: FLOPs, and what is kept for the backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from runlora_gen.algebra.enumerate import Program
from runlora_gen.algebra.liveness import saved_activations, saved_symbols
from runlora_gen.cost.price import price
from runlora_gen.cost.setting import Setting
from runlora_gen.measure.modules import one_choice, render_module
from runlora_gen.request.experts import Experts
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import setting_of
from runlora_gen.search.choose import decide
from torch.utils.flop_counter import FlopCounterMode

TOKENS, TOP_K, EXPERTS = 12, 2, 4
SITES = {
    "gathers": Experts(EXPERTS, 6, 10, True, TOP_K, True, 1, ("gate_up_proj",)),
    "combines": Experts(EXPERTS, 5, 6, False, TOP_K, True, 1, ("down_proj",)),
    "hands over": Experts(EXPERTS, 6, 10, True, TOP_K, True, 1, ("gate_up_proj",), activation="silu_gated"),
    "activates": Experts(EXPERTS, 5, 6, False, TOP_K, True, 1, ("down_proj",), activation="silu_gated"),
}
#: What a module is given, by the gradients that it may have: of that which goes into an activation, and is handed over.
GRADIENTS_OF = {
    "x": ("dX", "dU"),
    "lora_A": ("dA",),
    "lora_B": ("dB",),
    "weights": ("dg",),
    "s": ("PU",),
    "lora_BU": ("dBU",),
}
#: Torch adds up the rows of a token as a product, which is no more than a sum.
SUMS = {torch.ops.aten.bmm: lambda *shapes, **_: 0}
#: All in one dtype: a product in a wider one, a CPU makes of blocks.
WORKLOAD = Workload(dtype="fp32", adapter_dtype="fp32", kernels=False, tokens=(TOKENS,))


@pytest.fixture(scope="module", params=SITES)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModuleType, Setting, list[Program]]:
    """Every variant in plain torch, where it is priced, and what they are."""
    site = SITES[request.param]
    decision = decide(WORKLOAD, setting_of(WORKLOAD, site, 3, TOKENS))
    folder = tmp_path_factory.mktemp("costs_of_experts") / request.param
    module = render_module(one_choice(site, WORKLOAD, decision), 3, WORKLOAD, folder, all_variants=True)
    return module, decision.setting, [candidate.program for candidate in decision.candidates]


def inputs(module: ModuleType, setting: Setting, index: torch.Tensor) -> dict[str, Any]:
    """Arguments of ``lora_experts``."""
    dims, generator = setting.dims, torch.Generator().manual_seed(0)
    activates = not module.GATHERS and module.ACTIVATION is not None
    read = "N I" if module.GATHERS else "T F" if activates else "T I"
    shapes = {"x": read, "weight": "E O I", "lora_A": "E R I", "lora_B": "E O R", "bias": "E O"}
    shapes |= {"s": "T RU", "lora_BU": "E F RU"} if activates else {}
    tensors: dict[str, Any] = {
        name: torch.randn([dims[side] for side in shape.split()], generator=generator) for name, shape in shapes.items()
    }
    if not module.GATHERS:
        tensors["weights"] = torch.randn(index.shape, generator=generator)
    for name, tensor in tensors.items():
        tensor.requires_grad_(not setting.gradients.isdisjoint(GRADIENTS_OF.get(name, ())))
    if activates:
        s, lora_BU = tensors.pop("s"), tensors.pop("lora_BU")
        tensors["handed"] = module.Handed(s, lora_BU, lora_BU.detach(), 0.5)
    return {**tensors, "routing": module.route(index, EXPERTS), "scaling": 0.5}


def test_flops_and_saved_bytes_are_what_torch_counts(made: tuple[ModuleType, Setting, list[Program]]) -> None:
    """Whoever has the rows; rows of tokens are kept of none, and rows of the output where a program says so.

    Who has them changes from case to case, and from program to program in a case.
    """
    module, full, programs = made
    trains = [str(gradient) for gradient in full.derivation.gradients]
    assert full.gradients >= frozenset(trains) and {*module.VARIANTS} == {program.id for program in programs}
    wishes = [frozenset(some) for count in (1, len(trains)) for some in itertools.combinations(trains, count)]
    loads = (torch.arange(TOKENS * TOP_K).view(TOKENS, TOP_K) % EXPERTS, torch.ones(TOKENS, TOP_K, dtype=torch.int64))
    cases = itertools.product(enumerate(programs), enumerate(wishes))
    for (at, program), (case, gradients) in cases:
        index = loads[(at + case) % 2]
        setting = replace(full, gradients=gradients)
        cost, given = price(program, setting), inputs(module, setting, index)
        parameters = [given[name] for name in ("weight", "lora_A", "lora_B", "bias")]
        parameters += [given["handed"].lora_B] if "handed" in given else []
        frozen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        packed: list[torch.Tensor] = []
        with FlopCounterMode(display=False, custom_mapping=SUMS) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keeping(packed), lambda tensor: tensor):
                output = module.lora_experts(**given, variant=program.id)
            forward = counter.get_total_flops()
            outputs = [output[0], output[1].s] if isinstance(output, tuple) else [output]
            torch.autograd.backward(outputs, [torch.randn_like(each) for each in outputs])
        counted = (forward, counter.get_total_flops() - forward)
        assert counted == (cost.forward.flops, cost.backward.flops), (program.id, gradients)
        kept = [tensor for tensor in packed if tensor.untyped_storage().data_ptr() not in frozen]
        assert sum(tensor.nbytes for tensor in kept) == cost.saved_bytes, (program.id, gradients)
        assert len(kept) == len(saved_activations(program, gradients))
        assert len(packed) == len(saved_symbols(program, gradients))
        assert {str(symbol) for symbol in saved_activations(program, gradients)} <= {
            "X",
            "S",
            "g",
            "M",
            "Yr",
            "U",
            "SU",
        }


def keeping(packed: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor

    return pack
