"""Linears on quantized bases, as bitsandbytes and Transformers make them of plain ones: what the benchmarks run on."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

#: Of float8_e4m3fn, the largest number.
MOST = 448
#: Rows and columns of a block that has one scale in ``fp8-block``, as DeepSeek has them.
BLOCK = (128, 128)


def coded(
    model: nn.Module, base: str, device: torch.device, dtype: torch.dtype, storage: torch.dtype = torch.uint8
) -> nn.Module:
    """The model with coded linears in place of its own, but for its output embeddings.

    Args:
        model: of Transformers; changed in place.
        base: how the weights are to be stored, as ``Workload`` has it.
        device: of the linears.
        dtype: in which is computed.
        storage: of codes of 4 bits.
    """
    for name, linear in _linears(model):
        if base.startswith("fp8"):
            made: Any = _float8(linear, base)
        else:
            made = _of_bitsandbytes(linear, base, dtype, storage)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made.to(device))
    loaded: Any = model
    if base == "int8":  # by which PEFT knows
        loaded.is_loaded_in_8bit = True
    elif not base.startswith("fp8"):
        loaded.is_loaded_in_4bit = True
    return model.requires_grad_(False)


def decoded(model: nn.Module, base: str) -> nn.Module:
    """The model with the weights that float8 leaves of its own: changed in place."""
    for _, linear in _linears(model):
        codes, scale, block = float8_codes(linear.weight.data.float(), base)
        whole = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        linear.weight.data = (codes.float() * whole).to(linear.weight.dtype)
    return model


def float8_codes(weight: Tensor, base: str) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """A weight in float8, the scales of its blocks, and how many rows and columns those have."""
    rows, columns = weight.shape
    down, across = BLOCK if base == "fp8-block" else (1, columns)
    blocks = weight.view(rows // down, down, columns // across, across)
    scale = blocks.abs().amax((1, 3)) / MOST
    codes = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
    return codes, scale, (down, across)


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [(name, linear) for name, linear in found if name != "lm_head"]


def _of_bitsandbytes(linear: nn.Linear, base: str, dtype: torch.dtype, storage: torch.dtype) -> nn.Module:
    modules: Any = import_module("bitsandbytes.nn.modules")
    size = linear.in_features, linear.out_features
    if base == "int8":
        made = modules.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
        made.weight = modules.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        how = {"quant_type": base, "quant_storage": storage}
        made = modules.Linear4bit(*size, bias=False, compute_dtype=dtype, **how)
        made.weight = modules.Params4bit(linear.weight.data.cpu(), requires_grad=False, module=made, **how)
    found: nn.Module = made
    return found


def _float8(linear: nn.Linear, base: str) -> nn.Module:
    codes, scale, block = float8_codes(linear.weight.data.float(), base)
    size = linear.in_features, linear.out_features
    integrations: Any
    if base == "fp8":
        integrations = import_module("transformers.integrations.fbgemm_fp8")
        made, name = integrations.FbgemmFp8Linear(*size, bias=False), "weight_scale"
    else:
        integrations = import_module("transformers.integrations.finegrained_fp8")
        made, name = integrations.FP8Linear(*size, block_size=block), "weight_scale_inv"
    made.weight = nn.Parameter(codes, requires_grad=False)
    setattr(made, name, nn.Parameter(scale, requires_grad=False))
    made.bias = None
    found: nn.Module = made
    return found
