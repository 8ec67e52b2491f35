"""Accelerated and injected models where people train them: compiled, checkpointed, under autocast, accumulating."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from .conftest import takes_long
from .models import RANK, VOCABULARY, checkpointed, gradients, llama, with_lora


def peft_model(package: Any, **options: Any) -> Any:
    model = with_lora(llama(**options))
    package.accelerate(model, strict=True)
    return model


def injected(package: Any, **options: Any) -> Any:
    """With the adapters that ``with_lora`` draws."""
    model = llama(**options)
    package.inject_lora(model, RANK, 8)
    state = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): tensor
        for name, tensor in with_lora(llama(**options)).named_parameters()
        if "lora_" in name
    }
    assert state and not model.load_state_dict(state, strict=False).unexpected_keys
    return model


both = pytest.mark.parametrize("make", [peft_model, injected], ids=["PEFT", "injected"])


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert wanted and found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def compiled_gradients(model: Any, tokens: Tensor, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    step = torch.compile(lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, **options)
    step(tokens).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@both
def test_compiled_whole(package: Any, tokens: Tensor, make: Callable[[Any], Any]) -> None:
    model = make(package, num_hidden_layers=1)
    wanted = gradients(model, tokens)
    torch._dynamo.reset()
    same(compiled_gradients(model, tokens, fullgraph=True, backend="aot_eager"), wanted)


@takes_long
def test_compiled_by_inductor_with_checkpointing(package: Any, tokens: Tensor) -> None:
    model = peft_model(package, num_hidden_layers=1).train()
    wanted = gradients(model, tokens)
    checkpointed(model, use_reentrant=False)
    # Transformers' hook makes the embeddings' output require a gradient, which torch.compile can't trace, and which
    # only a reentrant checkpoint needs.
    model.disable_input_require_grads()
    torch._dynamo.reset()
    same(compiled_gradients(model, tokens, fullgraph=True), wanted)


def test_a_dynamic_sequence_is_compiled_once(package: Any) -> None:
    model = peft_model(package, num_hidden_layers=1)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, backend=counter)
    for length in (5, 33, 12):
        ids = torch.randint(VOCABULARY, (2, length))
        torch._dynamo.mark_dynamic(ids, 1)  # raises where the code is made for one length
        wanted = gradients(model, ids)
        model.zero_grad()
        step(ids).backward()
        same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, wanted)
    assert counter.frame_count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@both
@pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning", "ignore:The CUDA Graph is empty:UserWarning")
def test_reduce_overhead(package: Any, tokens: Tensor, make: Callable[[Any], Any]) -> None:
    model, tokens = make(package).cuda(), tokens.cuda()
    wanted = gradients(model, tokens)
    torch._dynamo.reset()
    step = torch.compile(lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, mode="reduce-overhead")
    for _ in range(3):  # warm up, record, replay
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()
        step(tokens).backward()
        same({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, wanted)


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(package: Any, tokens: Tensor, make: Callable[[Any], Any], reentrant: bool) -> None:
    model = make(package).train()
    wanted = gradients(model, tokens)
    checkpointed(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    same(gradients(model, tokens), wanted)


def test_inject_into_a_model_that_is_checkpointing(package: Any, tokens: Tensor) -> None:
    """A reentrant checkpoint has no gradients but for inputs that need them: as PEFT, the injection sees to it."""
    wanted = injected(package).train()
    model = checkpointed(llama().train(), use_reentrant=True)
    package.inject_lora(model, RANK, 8)
    model.load_state_dict(wanted.state_dict())
    same(gradients(model, tokens), gradients(wanted, tokens))


@both
def test_autocast(package: Any, tokens: Tensor, make: Callable[[Any], Any]) -> None:
    """As near to the truth as PEFT under autocast is: at most twice its error."""
    truth, plain = with_lora(llama(torch.float64)), with_lora()
    exact = truth(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        error = (plain(tokens).logits - exact).norm()
        model = make(package)
        logits = model(tokens, labels=tokens)
        logits.loss.backward()
    assert (logits.logits - exact).norm() <= 2 * error
    assert sum(p.grad is not None for p in model.parameters()) == 28


@both
def test_accumulation(package: Any, tokens: Tensor, make: Callable[[Any], Any]) -> None:
    model = make(package)
    once = gradients(model, tokens)
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
    same({n: p.grad / 3 for n, p in model.named_parameters() if p.grad is not None}, once)


def curve(model: Any, steps: int = 200) -> Tensor:
    """Losses of a training on sequences that go up by one, two, three and four."""
    starts = torch.randint(VOCABULARY, (8, 4, 1), generator=torch.Generator().manual_seed(6))
    batches = (starts + torch.arange(12) * torch.arange(1, 5)[:, None]) % VOCABULARY
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        ids = batches[step % len(batches)]
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().float())
    return torch.stack(losses)


def reordered(model: Any, order: str) -> Any:
    """PEFT's arithmetic, its sums in the order of another kernel: of the features, or half a batch at a time."""
    for module in model.modules():
        if type(module) is not nn.Linear:
            continue
        shuffle = torch.randperm(module.in_features, generator=torch.Generator().manual_seed(7))

        def features(x: Tensor, base: nn.Linear = module, shuffle: Tensor = shuffle) -> Tensor:
            return F.linear(x[..., shuffle], base.weight[:, shuffle], base.bias)

        def halves(x: Tensor, base: nn.Linear = module) -> Tensor:
            return torch.cat([F.linear(part, base.weight, base.bias) for part in x.chunk(2)])

        module.forward = features if order == "features" else halves
    return model


@pytest.mark.parametrize(
    ("dtype", "wide_adapter"),
    [
        pytest.param(torch.float32, True, id="float32"),
        pytest.param(torch.bfloat16, False, id="bfloat16", marks=takes_long),
        pytest.param(torch.bfloat16, True, id="bfloat16 with float32 adapters", marks=takes_long),
    ],
)
def test_losses_of_a_training_are_peft_s(package: Any, dtype: torch.dtype, wide_adapter: bool) -> None:
    """200 steps: our curve is as near to PEFT's as PEFT's own are that sum in the order of other kernels."""

    def model() -> Any:
        return with_lora(llama(dtype, num_hidden_layers=1), autocast_adapter_dtype=wide_adapter)

    theirs = curve(model())
    assert theirs[-8:].mean() < 0.85 * theirs[:8].mean(), "it learns"
    noise = torch.stack([curve(reordered(model(), order)) - theirs for order in ("features", "halves")])
    accelerated = model()
    package.accelerate(accelerated, strict=True)
    off = curve(accelerated) - theirs
    assert off.square().mean().sqrt() <= 2 * noise.square().mean(dim=1).sqrt().max()
    assert off[-8:].mean().abs() <= 2 * noise.abs().max()


@pytest.mark.parametrize("name", ["shapes", "with_peft", "groups", "mlps"])
def test_named_tuples_of_what_is_compiled_have_no_properties(name: str) -> None:
    """Which torch.compile does not know before torch 2.11: it would break the graph at every layer."""
    tree = ast.parse((Path(__file__).parents[2] / "generated" / "llama_13b_r8" / f"{name}.py").read_text("utf-8"))
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    tuples = [node for node in classes if "NamedTuple" in map(ast.unparse, node.bases)]
    assert tuples or name == "with_peft"
    for node in tuples:
        decorated = [each.name for each in node.body if isinstance(each, ast.FunctionDef) and each.decorator_list]
        assert not decorated, f"{node.name}: {decorated}"
