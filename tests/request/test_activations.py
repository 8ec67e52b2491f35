"""Activations: what they are in torch, by autograd of formulas written on their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runlora_gen.request.activations import ACTIVATIONS, Activation
from torch import Tensor

Formula = Callable[[Tensor, Tensor], Tensor]


def gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    """As Transformers has it."""
    gate, up = gate.clamp(min=None, max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


FORMULAS: dict[str, Formula] = {
    "silu_gated": lambda gate, up: F.silu(gate) * up,
    "gelu_gated": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh_gated": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "gpt_oss": gpt_oss,
    "silu": lambda gate, _: F.silu(gate),
    "gelu": lambda gate, _: F.gelu(gate),
    "gelu_tanh": lambda gate, _: F.gelu(gate, approximate="tanh"),
    "relu2": lambda gate, _: F.relu(gate).square(),
}


def run(lines: tuple[str, ...], **given: Tensor) -> dict[str, Any]:
    scope: dict[str, Any] = {"torch": torch, **given}
    for line in lines:
        exec(line, scope)
    return scope


def results(activation: Activation, gate: Tensor, up: Tensor, dx: Tensor) -> list[Tensor]:
    """X, dgate and, of what is gated, dup."""
    given = {"gate": gate, **({"up": up} if activation.gated else {})}
    found = run(activation.backward("torch"), **given, dx=dx)
    names = ("dgate", "dup")[: activation.widths]
    return [run(activation.forward("torch"), **given)["x"], *(found[name] for name in names)]


def test_every_activation_has_a_formula() -> None:
    assert FORMULAS.keys() == ACTIVATIONS.keys()
    assert all(name == activation.name for name, activation in ACTIVATIONS.items())
    assert {name for name, activation in ACTIVATIONS.items() if activation.widths == 2} == {
        "silu_gated",
        "gelu_gated",
        "gelu_tanh_gated",
        "gpt_oss",
    }
    assert [name for name, activation in ACTIVATIONS.items() if activation.interleaved] == ["gpt_oss"]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients(name: str) -> None:
    """Also at the ends of what gpt-oss clamps, where torch has a gradient still, and beyond."""
    activation = ACTIVATIONS[name]
    ends = torch.tensor([0.0, 7.0, -7.0, 7.0 + 1e-9, -7.0 - 1e-9, 20.0, -20.0], dtype=torch.float64)
    grid = torch.cat([ends, torch.linspace(-9, 9, 101, dtype=torch.float64)])
    gate, up = (each.flatten().requires_grad_() for each in torch.meshgrid(grid, grid, indexing="ij"))
    dx = torch.randn(gate.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = FORMULAS[name](gate, up)
    leaves = (gate, up)[: activation.widths]
    expected = [value, *torch.autograd.grad(value, leaves, dx)]
    for ours, exact in zip(results(activation, gate.detach(), up.detach(), dx), expected, strict=True):
        torch.testing.assert_close(ours, exact.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays_nan(name: str) -> None:
    """Of each operand, in what the formulas make of it."""
    activation = ACTIVATIONS[name]
    one, nan = torch.ones(1), torch.full((1,), torch.nan)
    assert all(result.isnan() for result in results(activation, nan, one, one)[: None if activation.gated else 1])
    if activation.gated:
        value, dgate, _ = results(activation, one, nan, one)
        assert value.isnan() and dgate.isnan()
    assert all(result.isnan() for result in results(activation, one, one, nan)[1:])


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("size", [80.0, 60000.0])
def test_large_values_are_finite(name: str, size: float) -> None:
    """And as near to float64's as float32 is."""
    activation = ACTIVATIONS[name]
    gate, up = torch.tensor([-size, -size, size, size]), torch.tensor([-size, size, -size, size])
    found = results(activation, gate, up, torch.ones(4))
    exact = results(activation, gate.double(), up.double(), torch.ones(4).double())
    for ours, expected in zip(found, exact, strict=True):
        assert ours.isfinite().all() and ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected.float())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_lines_say_what_they_need(name: str) -> None:
    """No step is computed for nothing, in neither direction."""
    activation = ACTIVATIONS[name]
    for lines, made in (
        (activation.forward("tl"), ("x",)),
        (activation.backward("tl"), ("dgate", "dup")[: activation.widths]),
    ):
        assert not any("{" in line for line in lines)
        assigned, texts = zip(*(line.split(" = ") for line in lines), strict=True)
        assert assigned[-len(made) :] == made
        for at, step in enumerate(assigned[: -len(made)]):
            assert any(step in text for text in texts[at + 1 :])
