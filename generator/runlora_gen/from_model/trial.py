"""What experts do between their projections, tried on some rows.

Generated packages hold this as it stands here: see :mod:`.mixtures`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .mixtures import between, is_transposed, stacks_of


class Trial(NamedTuple):
    """What experts did between their projections with some rows, small and large.

    Attributes:
        rows: in float64.
        gradient: of what was made of them, at random.
        made, back: that, and the rows' gradient.
    """

    rows: Tensor
    gradient: Tensor
    made: Tensor
    back: Tensor

    def is_same(self, made: Tensor, back: Tensor) -> bool:
        """Whether something else did the same."""
        pairs = ((made, self.made), (back, self.back))
        return all(one.shape == other.shape and torch.allclose(one, other, 1e-4, 1e-5) for one, other in pairs)


def tried(experts: Any) -> Trial | None:
    """A trial of what is between experts' projections; None where it fails, or may do something else tomorrow."""
    act_fn = getattr(experts, "act_fn", None)
    if isinstance(act_fn, nn.Module) and act_fn.state_dict():
        return None
    weight = experts._parameters[stacks_of(experts)[0]]
    drawn, width = torch.Generator().manual_seed(0), weight.shape[2 if is_transposed(experts) else 1]
    rows, gradient = (torch.randn(5, width, generator=drawn, dtype=torch.float64) for _ in range(2))
    # Also beyond what something may be cut off at.
    rows *= torch.tensor([[0.5], [2.0], [8.0], [32.0], [512.0]])
    if weight.device.type != "meta":
        rows, gradient = rows.to(weight.device), gradient.to(weight.device)
    with torch.enable_grad(), torch.autocast(rows.device.type, enabled=False):
        leaf = rows.clone().requires_grad_()
        try:
            made = between(experts, leaf)
            gradient = gradient[:, : made.shape[1]]
            (back,) = torch.autograd.grad(made, leaf, gradient)
        except Exception:  # whatever a model's own code says to such rows
            return None
    return Trial(rows, gradient, made.detach(), back)
