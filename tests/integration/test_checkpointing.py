"""Activation checkpointing: what the last linear of a layer gives is not computed twice, as if it were frozen."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import runlora_gen
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .models import VOCABULARY, checkpointed, gradients, llama, with_lora

TOKENS = torch.arange(24).view(2, 12) % VOCABULARY


class Products(TorchDispatchMode):
    """Notes the shapes of two factors wherever some are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[tuple[int, ...], ...]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(function):
            self.found[tuple(tuple(tensor.shape) for tensor in args[-2:])] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["standalone", "folder"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_only_what_the_backward_reads_is_computed_again(tmp_path: Path, layout: str, dropout: float) -> None:
    model = with_lora(lora_dropout=dropout).train()
    runlora_gen.accelerate(model, tmp_path, tokens=64, kernels=False, layout=layout, groups="none")
    torch.manual_seed(0)
    plain = gradients(model, TOKENS)
    again_computed = checkpointed(copy.deepcopy(model), use_reentrant=False)
    once, twice = Products(), Products()
    with once:
        gradients(model, TOKENS)
    with twice:
        gradients(again_computed, TOKENS)
    tokens, hidden, inner = TOKENS.numel(), 64, 96
    of_gate_and_up = ((tokens, hidden), (hidden, inner))
    assert twice.found[of_gate_and_up] > once.found[of_gate_and_up]
    of_down = ((tokens, inner), (inner, hidden))
    assert twice.found[of_down] == once.found[of_down] >= 2
    torch.manual_seed(0)
    for name, gradient in gradients(again_computed, TOKENS).items():
        assert torch.equal(gradient, plain[name]), name


def test_a_backward_within_a_backward(tmp_path: Path) -> None:
    """As where a checkpoint of its own making computes again: what both nodes give is differentiated there."""
    model = with_lora(llama())
    runlora_gen.accelerate(model, tmp_path, tokens=64, kernels=False)
    layer: Any = next(m for m in model.modules() if hasattr(m, "base_layer"))
    plain: Any = copy.deepcopy(layer)
    x = torch.randn(2, 5, layer.in_features)

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, module: nn.Module) -> torch.Tensor:
            ctx.module = module
            ctx.save_for_backward(x)
            with torch.no_grad():
                return module(x)  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            given = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                torch.autograd.backward(ctx.module(given), gradient)
            return given.grad, None

    results = []
    for module, run in ((layer, Again.apply), (plain, lambda x, module: module(x))):
        leaf = x.clone().requires_grad_()
        run(leaf, module).square().sum().backward()
        results.append([leaf.grad, *(p.grad for n, p in module.named_parameters() if "lora" in n)])
    for again, expected in zip(*results, strict=True):
        torch.testing.assert_close(again, expected)
