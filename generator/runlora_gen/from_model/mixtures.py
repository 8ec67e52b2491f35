"""How the experts of Transformers are built, as their modules say it, or as it is found by trying them.

Generated packages hold these functions as they stand here: what is read of a model, and what is judged where modules
are put into it, is one thing.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def is_mixture(experts: Any) -> bool:
    """Whether a module is of experts: as Transformers decorates them, or as Llama 4's, which is tried."""
    # The decorator puts a forward of its own before that of the class, whose name it takes; and ours stands in front of
    # the class of experts with adapters.
    forward = getattr(type(experts), "stands_for", type(experts)).forward
    if getattr(forward, "__globals__", {}).get("__name__") == "transformers.integrations.moe":
        return True
    return _computes_rows(experts, forward)


def is_given_rows(experts: Any) -> bool:
    """Whether experts are given rows that are sorted by expert, as many for each, as Llama 4's; else tokens, choices.

    Transformers' decorator says of the latter how they are built.
    """
    return not hasattr(experts, "has_gate")


def is_gated(experts: Any) -> bool:
    """Whether their first weight holds a gate beside what that is multiplied with."""
    return is_given_rows(experts) or bool(experts.has_gate)


def is_transposed(experts: Any) -> bool:
    """Whether the matrices of experts lie as in_features x out_features."""
    return is_given_rows(experts) or bool(experts.is_transposed)


def is_biased(experts: Any) -> bool:
    """Whether they have biases, of both weights."""
    return not is_given_rows(experts) and bool(experts.has_bias)


def stacks_of(experts: Any) -> tuple[str, str]:
    """The names of experts' two weights, in the order in which they are multiplied with."""
    return "gate_up_proj" if is_gated(experts) else "up_proj", "down_proj"


def between(experts: Any, rows: Tensor) -> Tensor:
    """What experts do between their projections."""
    made: Tensor
    if is_given_rows(experts):
        gate, up = rows.chunk(2, dim=-1)
        made = up * experts.act_fn(gate)
    else:
        made = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    return made


def _computes_rows(experts: Any, forward: Any) -> bool:
    """Whether experts map each row x of theirs to down(up · act_fn(gate)), with gate and up the halves of gate_up(x).

    Tried, with the gradient, on a copy with small random weights.
    """
    held = {name: tuple(weight.shape) for name, weight in experts._parameters.items() if weight is not None}
    if (
        not is_given_rows(experts)
        or held.keys() != {"gate_up_proj", "down_proj"}
        or hasattr(experts, "parametrizations")
    ):
        return False
    (count, hidden, *wide), down = held["gate_up_proj"], held["down_proj"]
    if len(wide) != 1 or wide[0] % 2 or down != (count, wide[0] // 2, hidden):
        return False
    drawn, device = torch.Generator().manual_seed(0), experts.down_proj.device
    sizes = {"x": (6, hidden), "gate_up_proj": (2, hidden, 6), "down_proj": (2, 3, hidden), "dy": (6, hidden)}
    given = {name: torch.randn(size, generator=drawn, device="cpu") for name, size in sizes.items()}
    given["gate_up_proj"] /= hidden**0.5
    if device.type != "meta":
        given = {name: tensor.to(device) for name, tensor in given.items()}
    x, small = given["x"].requires_grad_(), copy.copy(experts)
    small.__dict__["_parameters"] = {name: nn.Parameter(given[name], requires_grad=False) for name in held}
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        try:
            made = between(experts, x.view(2, 3, hidden) @ given["gate_up_proj"])
            ours, theirs = (made @ given["down_proj"]).view(-1, hidden), forward(small, x)
            back, their_back = (torch.autograd.grad(y, x, given["dy"])[0] for y in (ours, theirs))
        except Exception:  # whatever a model's own code says to such rows
            return False
    same = ours.shape == theirs.shape and torch.allclose(ours, theirs, 1e-4, 1e-6)
    return same and torch.allclose(back, their_back, 1e-4, 1e-6)
