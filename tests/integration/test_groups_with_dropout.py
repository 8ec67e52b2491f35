"""Groups whose adapters drop their input: by masks of each, which follow torch's seed, and are drawn again the same."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import runlora_gen
import torch
from runlora_gen.from_model.live import read_model
from runlora_gen.into_model.packages import imported
from runlora_gen.request.groups import groups
from runlora_gen.search import grouped
from torch import Tensor, nn

from .models import RANK, VOCABULARY, checkpointed, gradients, llama, with_lora
from .test_dropout import bitwise, outcome, seeded
from .test_groups import alone, attention

RATE = 0.5
#: What draws masks: torch as bytes, and kernels from seeds, whose path through torch runs here.
OPTIONS: dict[str, dict[str, Any]] = {
    "bytes": {"kernels": False, "layout": "folder"},
    "seeds": {"device": "h100", "dtype": "bf16", "adapter_dtype": "bf16", "launch": "graph"},
}


@pytest.fixture(scope="module", params=OPTIONS)
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With a module for each of the model's groups, whatever they are priced at."""
    with pytest.MonkeyPatch.context() as patch:
        pays = [(group, None) for group in groups(read_model(llama()).architecture)]
        patch.setattr(grouped, "decide_groups_of_step", lambda *_: pays)
        out = tmp_path_factory.mktemp("packages")
        options = {"rank": RANK, "tokens": 4096, "dropout": 0.1, **OPTIONS[request.param]}
        (folder,) = runlora_gen.generate(llama(), output=out, **options)
    found = imported(folder)
    for module in found.shapes._GROUP_MODULES:
        assert all(("seed" in variant) == (request.param == "seeds") for variant in module.VARIANTS)
    return found


def peft_model(package: Any, **options: Any) -> Any:
    model = with_lora(llama(**options), lora_dropout=RATE).train()
    assert package.accelerate(model, strict=True).groups == 2 * model.config.num_hidden_layers
    return model


def injected(package: Any, **options: Any) -> Any:
    model = llama(**options)
    package.inject_lora(model, RANK, 8, lora_dropout=RATE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model.train()


both = pytest.mark.parametrize("make", [peft_model, injected], ids=["PEFT", "injected"])
Make = Callable[..., Any]


@pytest.fixture
def calls(package: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The rates at which groups were computed."""
    rates: list[float] = []
    compute = package.groups.compute

    def counted(function: Any, x: Tensor, given: Any) -> Any:
        rates.append(given[0].dropout)
        return compute(function, x, given)

    monkeypatch.setattr(package.groups, "compute", counted)
    return rates


def count(model: nn.Module) -> int:
    return 2 * model.config.num_hidden_layers  # type: ignore[union-attr, operator, no-any-return]


@both
def test_masks_follow_the_seed(package: Any, tokens: Tensor, make: Make, calls: list[float]) -> None:
    model = make(package)
    first = seeded(model, tokens)
    assert calls == [RATE] * count(model)
    bitwise(seeded(model, tokens), first)
    other = seeded(model, tokens, seed=4)
    assert not any(torch.equal(other[name], gradient) for name, gradient in first.items())


@both
def test_each_linear_of_a_group_has_a_mask_of_its_own(package: Any, make: Make) -> None:
    """Of a layer through which one sees its masks: its outputs are its inputs, as far as they are kept."""
    layer = attention(make(package))
    linears = [layer.q_proj, layer.k_proj, layer.v_proj]
    with torch.no_grad():
        for linear in linears:
            for name, weight in linear.named_parameters():
                weight.zero_()
                if "lora" in name:
                    weight[:RANK, :RANK] = torch.eye(RANK)
    x = torch.ones(1, 400, 64, requires_grad=True)
    outputs = [linear(x) for linear in linears]
    masks = [output[..., :RANK] != 0 for output in outputs]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        first, second = masks[one].double(), masks[other].double()
        assert abs(first.mean() - (1 - RATE)) < 5 * 0.5 / first.numel() ** 0.5
        assert abs(((first - first.mean()) * (second - second.mean())).mean()) < 5 * 0.25 / first.numel() ** 0.5
    scaling = 8 / RANK
    sum(output.sum() for output in outputs).backward()
    expected = sum(mask * scaling / (1 - RATE) for mask in masks)
    torch.testing.assert_close(x.grad[..., :RANK], expected.float())


@both
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("length", [9, 130], ids=["few", "many"])
def test_what_a_checkpoint_computes_again_drops_the_same(
    package: Any, make: Make, reentrant: bool, length: int, calls: list[float]
) -> None:
    """Also where it computes first without gradients, and few tokens, which linears compute alone if nothing drops."""
    tokens = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(2))
    plain = make(package)
    plain.enable_input_require_grads()
    wanted = seeded(plain, tokens)
    calls.clear()
    model = checkpointed(make(package), use_reentrant=reentrant)
    model.enable_input_require_grads()
    bitwise(seeded(model, tokens), wanted)
    assert calls == [RATE] * 2 * count(model)


def test_a_group_that_ends_does_so_between_a_forward_and_the_next(package: Any, tokens: Tensor) -> None:
    """Outputs that are left end a group: never between what a checkpoint computes first and what it computes again."""

    def apart(model: Any) -> Any:
        """k and v read a copy of what q reads."""
        for name in ("k_proj", "v_proj"):
            for layer in range(2):
                linear = getattr(attention(model, layer), name)
                linear.register_forward_pre_hook(lambda _, args: (args[0] * 1.0,))
        return model

    torch.manual_seed(0)
    model = apart(checkpointed(peft_model(package), use_reentrant=True))
    model.enable_input_require_grads()
    for step in range(4):
        plain = apart(copy.deepcopy(peft_model(package)))
        plain.enable_input_require_grads()
        with pytest.warns() if step == 2 else contextlib.nullcontext():
            found = seeded(model, tokens, seed=step)
        for layer in range(2):
            if attention(model, layer).q_proj._group.alone:
                for name in ("q_proj", "k_proj", "v_proj"):
                    getattr(attention(plain, layer), name)._group = None
        bitwise(found, seeded(plain, tokens, seed=step))


@both
def test_where_nothing_is_dropped_nothing_is_drawn(package: Any, make: Make, calls: list[float]) -> None:
    tokens = torch.randint(VOCABULARY, (1, 200), generator=torch.Generator().manual_seed(2))
    model = make(package).eval()
    before = torch.get_rng_state()
    found = gradients(model, tokens)
    assert torch.equal(torch.get_rng_state(), before) and calls == [0.0] * count(model)
    wanted = gradients(alone(model), tokens)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@both
def test_linears_of_other_rates_are_computed_alone(
    package: Any, tokens: Tensor, make: Make, calls: list[float]
) -> None:
    model = make(package)
    for layer in range(2):
        linear = attention(model, layer).k_proj
        if make is injected:
            linear.lora_dropout = 0.25
        else:
            linear.lora_dropout["default"].p = 0.25
    found = outcome(model, tokens)
    assert len(calls) == 2, "gate and up alone"
    assert torch.equal(outcome(model, tokens), found)


def test_compiled_whole(package: Any, tokens: Tensor) -> None:
    model = peft_model(package, num_hidden_layers=1)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    step(tokens, labels=tokens).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    bitwise_or_close(found, seeded(model, tokens))


def bitwise_or_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert wanted and found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
