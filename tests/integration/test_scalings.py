"""What PEFT's initialisations and scalings make of a layer: another start, and factors that change while it trains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from .models import RANK, gradients, llama, with_lora
from .test_runs_in import injected, same

ALL = 14


def layers(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "scaling"))


def initialised(**options: Any) -> Any:
    """As PEFT leaves it: lora_B is not drawn anew."""
    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear", **options)
    return peft.get_peft_model(llama(), config)


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({"init_lora_weights": "pissa"}, True),
        ({"init_lora_weights": "pissa_niter_4"}, True),
        ({"init_lora_weights": "olora"}, True),
        ({"init_lora_weights": "orthogonal"}, False),
        ({"init_lora_weights": "gaussian"}, False),
        ({"use_rslora": True, "init_lora_weights": "pissa"}, True),
    ],
    ids=["pissa", "pissa_niter", "olora", "orthogonal", "gaussian", "rslora pissa"],
)
def test_initialisations(package: Any, tokens: Tensor, options: dict[str, Any], moves: bool) -> None:
    """Those that move a part of the base into the adapter leave the sum as it was."""
    model = initialised(**options)
    base = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert torch.equal(base, llama().model.layers[0].mlp.up_proj.weight) is not moves
    logits, wanted = model(tokens).logits, gradients(model, tokens)
    package.accelerate(model, strict=True)
    torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(tokens).logits, llama()(tokens).logits, rtol=1e-4, atol=1e-4)
    same(gradients(model, tokens), wanted)


@pytest.mark.filterwarnings("ignore:.*eva initialization used with low_cpu_mem_usage")
@pytest.mark.parametrize("first", ["initialised", "accelerated"])
def test_an_initialisation_by_data(package: Any, tokens: Tensor, first: str) -> None:
    """EVA watches the inputs of PEFT's layers, and draws the adapters anew."""
    rows = torch.randint(50, (8, 9), generator=torch.Generator().manual_seed(4))
    data = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(2)]

    def eva(accelerate: Callable[[Any], Any] | None = None) -> Any:
        config = peft.EvaConfig(rho=1.0)
        model = initialised(init_lora_weights="eva", eva_config=config).eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if accelerate is not None:
            accelerate(model)
        torch.manual_seed(3)
        peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
        drawn = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert len(drawn) == ALL and all("lora_A" in name for name in drawn)
        return model

    def start(model: Any) -> Any:
        package.accelerate(model, strict=True)
        return model

    theirs = eva()
    ours = start(eva()) if first == "initialised" else eva(start)
    assert len([layer for layer in layers(ours) if package.with_peft.is_accelerated(layer)]) == ALL
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    same(gradients(ours, tokens), gradients(theirs, tokens))


def test_scalings_may_change(package: Any, tokens: Tensor) -> None:
    """By all that PEFT has for it, rsLoRA's own scaling included."""
    theirs = with_lora(use_rslora=True)
    ours = copy.deepcopy(theirs)
    package.accelerate(ours, strict=True)
    changes: list[Callable[[Any], None]] = [
        lambda layer: layer.set_scale("default", 3.0),
        lambda layer: layer.scale_layer(0.25),
        lambda layer: layer.unscale_layer(0.5),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.scale_layer(0.0),
        lambda layer: layer.set_scale("default", -1.5),
    ]
    seen = []
    for change in changes:
        for model in (theirs, ours):
            for layer in layers(model):
                change(layer)
        (scaling,) = {layer.scaling["default"] for layer in layers(ours)}
        seen.append(scaling)
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
        same(gradients(ours, tokens), gradients(theirs, tokens))
    assert seen == [12.0, 3.0, 6.0, 4.0, 0.0, -6.0]


@pytest.mark.parametrize("kind", ["PEFT", "lora_bias", "injected"])
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
def test_compiled_a_scaling_that_changes_is_compiled_once_more_and_never_again(package: Any, kind: str) -> None:
    """As with PEFT's own layers: the first is a constant of the graph, any other an input of the second."""
    if kind == "injected":
        model = injected(package, num_hidden_layers=1)
    else:
        model = with_lora(llama(num_hidden_layers=1), lora_bias=kind == "lora_bias")
        package.accelerate(model, strict=True)
    layer = next(layers(model))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(layer, backend=counter, fullgraph=True)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    assert len(trained) == 2 + (kind == "lora_bias")
    frames = []
    for scaling in (2.0, 1.5, 0.75, 3.0, 0.1, -2.5):
        if isinstance(layer.scaling, dict):
            layer.scaling["default"] = scaling
        else:
            layer.scaling = scaling
        x = torch.randn(5, layer.in_features, requires_grad=True)
        tensors = {"x": x, **trained}
        wanted, found = (torch.autograd.grad(run(x).square().sum(), tensors.values()) for run in (layer, step))
        same(dict(zip(tensors, found, strict=True)), dict(zip(tensors, wanted, strict=True)))
        frames.append(counter.frame_count)
    assert frames == [1, 2, 2, 2, 2, 2]
    step.eval()
    counter.clear()
    for scaling in (0.3, 0.7, 1.1, 0.2):
        if isinstance(layer.scaling, dict):
            layer.scaling["default"] = scaling
        else:
            layer.scaling = scaling
        for rows in (5, 200):  # few tokens and many
            x = torch.randn(rows, layer.in_features)
            with torch.no_grad():
                torch.testing.assert_close(step(x), layer(x), rtol=1e-4, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames[-1] == frames[-3]
