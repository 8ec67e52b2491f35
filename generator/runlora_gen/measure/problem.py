"""One LoRA linear at a size, with random operands: what tools and ``tune`` run steps of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra.mlp import LINEARS
from ..cost.setting import Setting
from ..request.activations import ACTIVATIONS
from ..request.layers import Layer
from ..request.workload import Workload
from ..search.candidates import setting_for

#: What is between the projections of experts where that is measured: as most models have it.
ACTIVATION = "silu_gated"
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Point:
    """A size: tokens, in_features, out_features and rank; of experts how many there are, and how many a token has.

    ``mlp``: of a gated MLP, whose gate and up have these features.
    """

    tokens: int
    in_features: int
    out_features: int
    rank: int
    experts: int = 0
    top_k: int = 1
    mlp: bool = False

    @classmethod
    def parse(cls, text: str, rank: int | None = None) -> Point:
        """The size that ``TOKENS:INxOUT:RANK`` names, or without ``:RANK`` where the rank is given."""
        tokens, shape, *own = text.split(":")
        in_features, out_features = shape.split("x")
        return cls(int(tokens), int(in_features), int(out_features), int(own[0]) if rank is None else rank)

    @property
    def dims(self) -> dict[str, int]:
        """By the names that symbols use."""
        sizes = {"T": self.tokens * self.top_k, "I": self.in_features, "O": self.out_features, "R": self.rank}
        read = self.in_features * ACTIVATIONS[ACTIVATION].widths
        sizes |= {"E": self.experts, "N": self.tokens, "F": read, "RU": self.rank} if self.experts else {}
        if self.mlp:
            sizes |= {f"R_{linear}": self.rank for linear in LINEARS}
            sizes |= {"O_gate": self.out_features, "O_up": self.out_features, "I_down": self.out_features}
            sizes["O_down"] = self.in_features
        return sizes

    @property
    def layer(self) -> Layer:
        """A lone linear of this shape, without a bias."""
        return Layer(self.in_features, self.out_features, False, 1, ("linear",))

    def setting(self, workload: Workload) -> Setting:
        """The setting in which it is priced."""
        return setting_for(workload, self.in_features, self.out_features, self.rank, False, self.tokens)


def random_codes(quantized: Any, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Any:
    """A random weight of 4 bits, as bitsandbytes makes it of one: blocks of 64, whose scales are quantized too.

    Args:
        quantized: the class of a generated module that holds one.
        shape: (out_features, in_features).
        device, dtype: of what is made of it.
    """
    count = shape[0] * shape[1]
    blocks = math.ceil(count / 64)
    return quantized(
        codes=torch.randint(256, (math.ceil(count / 2),), device=device, dtype=torch.uint8),
        absmax=torch.randint(256, (blocks,), device=device, dtype=torch.uint8),
        code=torch.linspace(-1, 1, 16, device=device),
        absmax2=torch.rand(math.ceil(blocks / 256), device=device) + 0.5,
        code2=torch.linspace(-1, 1, 256, device=device),
        offset=torch.tensor(2.0, device=device),
        blocksize=64,
        blocksize2=256,
        shape=shape,
        quant_type="nf4",
        dtype=dtype,
    )


def random_float8(quantized: Any, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Any:
    """A random matrix of float8, each of whose rows has a scale.

    Args:
        quantized: the class of a generated module that holds one.
        shape: rows and columns.
        device, dtype: of what is made of it.
    """
    codes = torch.randn(shape, device=device).to(torch.float8_e4m3fn)
    scale = torch.rand(shape[0], 1, device=device) + 0.5
    return quantized(codes, scale, (1, shape[1]), 1.0, dtype)


class Nothing(torch.autograd.Function):
    """What autograd needs of a custom function that has a LoRA linear's arguments, x as wide as its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """x itself."""
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient as it comes."""
        _ = ctx.saved_tensors
        return grads[0], None, None, None


class Problem:
    """Operands of a LoRA linear and an output gradient, all random: zeros are faster than numbers."""

    def __init__(self, point: Point, device: torch.device, dtype: torch.dtype) -> None:
        def draw(names: str, trains: bool) -> Tensor:
            size = [point.dims[name] for name in names]
            return torch.randn(size, device=device, dtype=dtype).requires_grad_(trains)

        self.x, self.weight = draw("TI", True), draw("OI", False)
        self.lora_A, self.lora_B = draw("RI", True), draw("OR", True)
        self.grad_output = draw("TO", False)

    def forward(self, module: ModuleType, variant: str | None) -> Tensor:
        """The output of a variant of a generated module; of the frozen linear for None."""
        if variant is None:
            return F.linear(self.x, self.weight)
        operands = (self.x, self.weight, self.lora_A, self.lora_B)
        output: Tensor = module.lora_linear(*operands, scaling=0.5, variant=variant)
        return output

    def step(self, module: ModuleType, variant: str | None) -> None:
        """Forward and backward of a variant, or of the frozen linear for None."""
        wanted = (self.x,) if variant is None else (self.x, self.lora_A, self.lora_B)
        torch.autograd.grad(self.forward(module, variant), wanted, self.grad_output)
