"""Gated MLPs: modules that compute ``down(activate(gate(x), up(x)))``, found by trying them.

Generated packages hold this as it stands here: what is read of a model, and what is judged where modules are put into
it, is one thing.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .copies import copied, fields, is_plain, lasting


class MlpTrial(NamedTuple):
    """What a gated MLP made of some rows, small and large, with tiny linears in the place of its own.

    Attributes:
        x: the rows, in float64.
        dy: the gradient of what was made of them, at random.
        linears: weight and bias of gate, of up and of down.
        y: what was made.
        gradients: of x and of all in ``linears``.
    """

    x: Tensor
    dy: Tensor
    linears: tuple[Tensor, ...]
    y: Tensor
    gradients: tuple[Tensor, ...]

    def is_made_by(self, activated: Any, activate_backward: Any) -> bool:
        """Whether the same is made with these between the linears.

        Args:
            activated: gives the activation of gate and up, which have a row for each of x.
            activate_backward: gives the gradients of gate and of up for that of the activation, gate and up.
        """
        gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias = self.linears
        x, dy = self.x, self.dy
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            gate, up = x @ gate_weight.T + gate_bias, x @ up_weight.T + up_bias
            hidden = activated(gate, up)
            dgate, dup = activate_backward(dy @ down_weight, gate, up)
            made = (
                hidden @ down_weight.T + down_bias,
                dgate @ gate_weight + dup @ up_weight,
                *(dgate.T @ x, dgate.sum(0), dup.T @ x, dup.sum(0), dy.T @ hidden, dy.sum(0)),
            )
            return _alike(made, (self.y, *self.gradients))


#: What models call gate, up and down; the same where gate and up are the halves of one linear.
TRIPLES = (
    *(("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo")),
    ("gate_up_proj", "gate_up_proj", "down_proj"),
)
#: In features of the tiny linears, which are the out features, too, and what is between.
_WIDE, _BETWEEN = 6, 5
#: Rows go beyond what something may be cut off at.
_SCALES = (0.5, 2.0, 8.0, 32.0, 512.0)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def triple_of(module: Any) -> tuple[str, str, str] | None:
    """The names of a module's children that may be gate, up and down; None if it has none."""
    return next((t for t in TRIPLES if all(module._modules.get(name) is not None for name in t)), None)


def tried_mlp(module: Any) -> MlpTrial | None:
    """A trial of what a module does with its gate, up and down; None where it fails, or may do something else tomorrow.

    The module itself is neither called nor changed: a copy is, without what it holds of weights. What its linears are,
    and whether they have hooks or adapters, makes no difference.
    """
    names = triple_of(module)
    if names is None or not all(map(_is_stateless, _parts(module, names))):
        return None
    device = next((p.device for name in names for p in module._modules[name].parameters()), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    try:
        off = torch.autocast(device.type, enabled=False)
        with torch.inference_mode(False), off, torch.random.fork_rng([device] if device.type == "cuda" else []):
            return _tried_on(module, names, device)
    except Exception:  # whatever a model's own code says to such rows
        return None


class _Tiny(nn.Linear):
    """A linear that knows whether it was called: code that takes its weight would pass an adapter over."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        nn.Module.__init__(self)  # that of nn.Linear draws numbers
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.linear(x, self.weight, self.bias)


def _parts(module: Any, names: tuple[str, str, str]) -> list[Any]:
    """A module and all below it but its linears."""
    others = [child for name, child in module._modules.items() if child is not None and name not in names]
    return [module, *(part for child in others for part in child.modules())]


def _is_stateless(part: Any) -> bool:
    """Whether a module has nothing that lasts from call to call or makes these differ, as far as that is seen."""
    if any(tensor is not None for held in (part._parameters, part._buffers) for tensor in held.values()):
        return False
    if any(getattr(part, hooks) for hooks in _HOOKS) or "forward" in vars(part):
        return False
    if type(part).__call__ is not nn.Module.__call__:
        return False
    return not any(isinstance(value, (Tensor, nn.Module)) or _holds_more(value) for value in fields(part).values())


def _holds_more(value: Any) -> bool:
    """Whether a container holds anything but numbers, names and the like, which cannot be copied lightly."""
    if isinstance(value, dict):
        return _holds_more([*value.keys(), *value.values()])
    return isinstance(value, (list, tuple, set)) and any(not is_plain(item) or _holds_more(item) for item in value)


def _tried_on(module: Any, names: tuple[str, str, str], device: Any) -> MlpTrial | None:
    drawn = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn, dtype=torch.float64, device="cpu")

    scales = torch.tensor(_SCALES * 4, dtype=torch.float64, device="cpu")[:, None]
    x, dy = ((draw(len(scales), _WIDE) * scale).to(device) for scale in (scales, 1.0))
    fused = names[0] == names[1]
    sizes = (*([(2 * _BETWEEN, _WIDE)] if fused else [(_BETWEEN, _WIDE)] * 2), (_WIDE, _BETWEEN))
    tiny = [_Tiny(draw(*size).to(device), draw(size[0]).to(device)) for size in sizes]
    weights = [tensor for linear in tiny for tensor in (linear.weight, linear.bias)]
    small = copied(module, dict(zip(dict.fromkeys(names), tiny, strict=True)))
    others = _parts(small, names)
    before = copy.deepcopy([lasting(part) for part in others])
    random = _random_state(device)
    made: list[tuple[Tensor, ...]] = []
    with torch.enable_grad():
        for training in (False, True):
            for part in (*others, *tiny):
                vars(part)["training"] = training
            for shape in (x.shape, (4, -1, _WIDE)):
                given = x.clone().view(shape).requires_grad_()
                y = type(small).forward(small, given)
                if not isinstance(y, Tensor) or y.shape != given.shape:
                    return None
                back = torch.autograd.grad(y, [given, *weights], dy.view(shape))
                made.append((y.detach().reshape(x.shape), back[0].reshape(x.shape), *back[1:]))
    with torch.no_grad():
        again = type(small).forward(small, x.clone())
    calls = {linear.calls for linear in tiny}
    if calls != {len(made) + 1} or not torch.equal(random, _random_state(device)):
        return None
    if not all(_alike(one, made[0]) for one in (*made[1:], (again, *made[0][1:]))):
        return None
    if [lasting(part) for part in others] != before:
        return None
    y, dx, *gradients = made[0]
    own, back = tuple(weight.detach() for weight in weights), tuple(gradients)
    return MlpTrial(x, dy, _apart(own) if fused else own, y, (dx, *(_apart(back) if fused else back)))


def _apart(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Those of gate, up and down, of those of both in one and of down."""
    (gate, up), (gate_bias, up_bias) = (tensor.chunk(2) for tensor in tensors[:2])
    return gate, gate_bias, up, up_bias, *tensors[2:]


def _random_state(device: Any) -> Tensor:
    """From which random numbers follow: whatever draws some is no MLP that does the same each time."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _alike(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(one.shape == other.shape and torch.allclose(one, other, 1e-4, 1e-5) for one, other in pairs)
