"""Accelerated and injected models where people train them: compiled, checkpointed, under autocast, accumulating."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import RANK, VOCABULARY, filled, gradients, llama, with_lora


def peft_model(package: Any, **options: Any) -> Any:
    model = with_lora(llama(**options))
    package.accelerate(model, strict=True)
    return model


def injected(package: Any) -> Any:
    model = llama()
    package.inject_lora(model, RANK, 8)
    return filled(model)


both = pytest.mark.parametrize("make", [peft_model, injected], ids=["PEFT", "injected"])


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(wanted) == 28
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def compiled_gradients(model: Any, tokens: Tensor, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    step = torch.compile(lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, **options)
    step(tokens).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@both
def test_compiled_whole(package: Any, tokens: Tensor, make: Callable[[Any], Any]) -> None:
    model = make(package)
    wanted = gradients(model, tokens)
    torch._dynamo.reset()
    same(compiled_gradients(model, tokens, fullgraph=True, backend="aot_eager"), wanted)


def test_compiled_with_checkpointing(package: Any, tokens: Tensor) -> None:
    model = injected(package).train()
    wanted = gradients(model, tokens)
    model.activation_checkpointing_enable()
    model.disable_input_require_grads()  # a hook of Transformers for reentrant checkpoints, which breaks the graph
    torch._dynamo.reset()
    same(compiled_gradients(model, tokens, fullgraph=True, backend="aot_eager"), wanted)


def test_a_dynamic_sequence_is_compiled_once_more_at_most(package: Any) -> None:
    model = peft_model(package, num_hidden_layers=1)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda ids: model(input_ids=ids, use_cache=False).logits, backend=counter, dynamic=True)
    for length in (5, 9, 17):
        ids = torch.randint(VOCABULARY, (2, length))
        torch.testing.assert_close(step(ids), model(ids).logits, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(package: Any, tokens: Tensor, make: Callable[[Any], Any], reentrant: bool) -> None:
    model = make(package).train()
    wanted = gradients(model, tokens)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    same(gradients(model, tokens), wanted)


def test_inject_into_a_model_that_is_checkpointing(package: Any, tokens: Tensor) -> None:
    """A reentrant checkpoint has no gradients but for inputs that need them: as PEFT, the injection sees to it."""
    model = llama().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    package.inject_lora(model, RANK, 8)
    same(gradients(filled(model), tokens), gradients(injected(package), tokens))


@both
def test_autocast(package: Any, tokens: Tensor, make: Callable[[Any], Any]) -> None:
    """As near to float32 as PEFT's own code is: at most twice its error."""
    model, plain = make(package), with_lora()
    wanted, plain_wanted = model(tokens).logits, plain(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        error = (plain(tokens).logits - plain_wanted).norm()
        output = model(tokens, labels=tokens)
    output.loss.backward()
    assert 0 < (output.logits - wanted).norm() <= 2 * error
    assert sum(p.grad is not None for p in model.parameters()) == 28


@both
def test_accumulation(package: Any, tokens: Tensor, make: Callable[[Any], Any]) -> None:
    model = make(package)
    once = gradients(model, tokens)
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
    same({n: p.grad / 3 for n, p in model.named_parameters() if p.grad is not None}, once)


def test_losses_of_a_training_are_peft_s(package: Any) -> None:
    """200 steps: the curves part no faster than two of PEFT that differ in the order of their sums only.

    Rounding grows exponentially from step to step, and by chance: within an order of magnitude it is the same.
    """
    data = torch.randint(VOCABULARY, (8, 2, 8), generator=torch.Generator().manual_seed(6))

    def curve(model: Any, permuted: bool = False) -> Tensor:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=3e-3)
        losses = []
        for step in range(200):
            ids = data[step % len(data)]
            if permuted:  # the same batch, its rows summed in another order
                ids = ids.flip(0)
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    one = {"num_hidden_layers": 1}
    theirs, noise = curve(with_lora(llama(**one))), curve(with_lora(llama(**one)), permuted=True)
    ours = curve(peft_model(package, **one))
    assert theirs[-8:].mean() < 0.95 * theirs[:8].mean(), "it learns"
    assert (ours - theirs).abs().max() <= 10 * (noise - theirs).abs().max() + 1e-4
    torch.testing.assert_close(ours[:20], theirs[:20], rtol=1e-5, atol=1e-5)
