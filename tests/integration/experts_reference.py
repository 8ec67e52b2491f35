"""Experts with LoRA as a loop over them in plain torch, behind the interface of generated modules.

What puts modules of experts into models is tested with it, whatever computes. Imports nothing of this repository.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: A module's own stand below these.
EXPERTS, IN_FEATURES, OUT_FEATURES, RANK, GATHERS = 0, 0, 0, 0, False
TRAINS = ("x", "lora_A", "lora_B")
KERNELS = False
VARIANTS = ("loop",)


class Routing(NamedTuple):
    rows: Tensor
    places: Tensor
    starts: Tensor
    top_k: int


def route(index: Tensor, experts: int) -> Routing:
    flat = index.reshape(-1)
    ordered, rows = torch.sort(flat, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(experts + 1, device=index.device, dtype=ordered.dtype))
    places = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows), device=index.device))
    return Routing(rows, places, starts.int(), index.shape[1])


def lora_experts(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    routing: Routing,
    scaling: float,
    variant: str | None = None,
) -> Tensor:
    assert (weight.shape[0], weight.shape[2], weight.shape[1]) == (EXPERTS, IN_FEATURES, OUT_FEATURES)
    assert lora_A.shape == (EXPERTS, RANK, IN_FEATURES) and lora_B.shape == (EXPERTS, OUT_FEATURES, RANK)
    assert variant is None
    rows = x[routing.rows // routing.top_k] if GATHERS else x
    lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    # Every expert on every row, of which only its own count: sizes are small, and torch.compile needs no value.
    expert = torch.searchsorted(routing.starts, torch.arange(len(rows), device=x.device, dtype=torch.int32), right=True)
    total = rows.new_zeros(len(rows), OUT_FEATURES)
    for e in range(EXPERTS):
        y = rows @ weight[e].T + scaling * (rows @ lora_A[e].T) @ lora_B[e].T
        total = total + torch.where((expert == e + 1)[:, None], y if bias is None else y + bias[e], 0)
    return total


def combine(rows: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    of_choices = rows[routing.places].view(*weights.shape, -1)
    return (of_choices * weights[..., None]).sum(1)
