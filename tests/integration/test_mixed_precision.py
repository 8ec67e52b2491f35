"""Mixed precision: no float32 copy of X or dY in any mode, and scaled gradients in float16."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import runlora_gen
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from .models import RANK, llama, with_lora
from .test_runs_in import injected, peft_model

#: Activations are larger than the weight, and than the blocks in which a CPU casts factors of a wide sum.
TOKENS, IN_FEATURES, OUT_FEATURES = 16384, 144, 160
LARGE = TOKENS * min(IN_FEATURES, OUT_FEATURES)


class Block(nn.Module):
    """One linear of a model."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up_proj = nn.Linear(IN_FEATURES, OUT_FEATURES, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.up_proj(x)
        return output


class Wide(TorchDispatchMode):
    """Notes which operators make a float32 tensor as large as activations."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.made += [str(func) for t in tensors if t.dtype == torch.float32 and t.numel() >= LARGE]
        return result


MODES = {
    "bf16 base": (torch.bfloat16, None),
    "fp16 base": (torch.float16, None),
    "float32 under bf16 autocast": (torch.float32, torch.bfloat16),
    "float32 under fp16 autocast": (torch.float32, torch.float16),
}


def wide_tensors(model: Any, autocast: torch.dtype | None, recompute: bool) -> list[str]:
    """Operators of a step that make one. The input comes in 16 bits, as under autocast from the layer before."""
    dtype = autocast or next(model.parameters()).dtype
    x = torch.randn(TOKENS, IN_FEATURES, dtype=dtype, requires_grad=True)
    dY = torch.randn(TOKENS, OUT_FEATURES, dtype=dtype)
    with Wide() as wide:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.backward(dY)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert y.dtype == x.grad.dtype == dtype and all(p.grad.dtype == torch.float32 for p in trained)
    return wide.made


@pytest.mark.parametrize(
    ("dropout", "lora_bias", "recompute"),
    [(0.0, False, False), (0.0, False, True), (0.1, False, False), (0.1, True, True)],
    ids=["plain", "checkpointed", "dropout", "all"],
)
@pytest.mark.parametrize(("dtype", "autocast"), MODES.values(), ids=MODES.keys())
def test_activations_are_never_cast_up(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    dropout: float,
    lora_bias: bool,
    recompute: bool,
) -> None:
    """PEFT's own layer makes such copies: the check finds them there."""
    config = peft.LoraConfig(r=RANK, target_modules=["up_proj"], lora_dropout=dropout, lora_bias=lora_bias)
    model = peft.get_peft_model(Block(dtype), config).train()
    assert "aten._to_copy.default" in wide_tensors(model, autocast, recompute)
    output = tmp_path_factory.getbasetemp() / f"block {dtype} {dropout}"
    runlora_gen.accelerate(model, output, strict=True, kernels=False, tokens=TOKENS)
    assert wide_tensors(model, autocast, recompute) == []


def steps_with_a_scaler(model: Any) -> tuple[list[float], list[Tensor], dict[str, Tensor]]:
    """Scales (negative where the step was skipped), losses and trained parameters.

    The first scale is far too large, and the loss of one step is infinite.
    """
    trained = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-8)
    scales, losses = [], []
    for step in range(12):
        tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(step))
        before = {name: p.detach().clone() for name, p in trained.items()}
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(tokens, labels=tokens).loss
        scaler.scale(loss * torch.inf if step == 6 else loss).backward()
        finite = all(p.grad.isfinite().all() for p in trained.values())
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        moved = any(not torch.equal(p, before[name]) for name, p in trained.items())
        assert moved == finite, "a step with what is not finite is skipped, and no other"
        assert (scaler.get_scale() < scale) is not finite
        scales.append(scale if finite else -scale)
        losses.append(loss.detach())
    return scales, losses, {name.replace(".default.weight", ""): p.detach() for name, p in trained.items()}


@pytest.mark.parametrize("make", [peft_model, injected], ids=["PEFT", "injected"])
def test_scaled_gradients_in_float16_are_peft_s(package: Any, make: Any) -> None:
    theirs, ours = steps_with_a_scaler(with_lora(llama())), steps_with_a_scaler(make(package))
    scales, losses, parameters = theirs
    assert ours[0] == scales == [-(2.0**24), *[2.0**16] * 5, -(2.0**16), *[2.0**8] * 5]
    torch.testing.assert_close(torch.stack(ours[1]), torch.stack(losses), rtol=4e-3, atol=0)  # four units of float16
    start = dict(with_lora(llama()).named_parameters())
    for name, parameter in parameters.items():
        moved = (parameter - start[f"base_model.model.{name}.default.weight"]).norm()
        assert (ours[2][name] - parameter).norm() < 0.02 * moved, name
