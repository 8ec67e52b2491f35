"""Dropout on stacks of experts, which PEFT has none of: by ``inject_lora`` alone."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from runlora_gen.generation import Request, generated
from runlora_gen.into_model import without_peft
from runlora_gen.into_model.packages import imported
from runlora_gen.request.architecture import LIVE, Architecture
from runlora_gen.request.experts import Stack
from runlora_gen.request.layout import FOLDER, STANDALONE
from runlora_gen.request.workload import make_workload
from torch import Tensor, nn

from .models import (
    EXPERTS,
    HIDDEN,
    INNER,
    RANK,
    STACKS,
    TOP_K,
    bitwise,
    checkpointed,
    filled,
    gradients,
    masks_drawn,
    outcome,
    qwen3_moe,
    seeded,
)

RATE = 0.5
UP, DOWN = BOTH = STACKS
#: Stacks with an adapter in two layers, in the order in which they are computed.
ALL = 4


@pytest.fixture(scope="module", params=["chained", "apart"])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its modules take any rate: that one was given when they were generated is enough."""
    chained = request.param == "chained"
    options: dict[str, Any] = {"top_k": TOP_K, "bias": False, "count": 1, "module": "mlp.experts"}
    options["activation"] = "silu_gated" if chained else ""
    stacks = (
        Stack("gate_up_proj", EXPERTS, HIDDEN, 2 * INNER, gathers=True, **options),
        Stack("down_proj", EXPERTS, INNER, HIDDEN, gathers=False, **options),
    )
    architecture = Architecture("moe", "moe", LIVE, (), stacks=stacks)
    workload = make_workload(device="cpu", dtype="fp32", dropout=0.1)
    layout = FOLDER if chained else STANDALONE
    (folder,) = generated(Request({RANK: architecture}, workload, layout), tmp_path_factory.mktemp("dropout"))
    return imported(folder)


def injected(package: Any, model: Any = None, rate: float = RATE, targets: Any = BOTH) -> Any:
    model = qwen3_moe() if model is None else model
    report = package.inject_lora(model, RANK, 8, target_parameters=targets, lora_dropout=rate)
    assert len(report.accelerated) == 2 * len(targets)
    return filled(model).train()


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_dropout")]


@pytest.fixture
def drawn(package: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, float]]:
    """The masks that stacks drew, with the rates at which they did."""
    return masks_drawn(package.shapes.EXPERTS.values(), monkeypatch)


def test_masks_follow_the_seed(package: Any, tokens: Tensor) -> None:
    model = injected(package)
    first = seeded(model, tokens)
    bitwise(seeded(model, tokens), first)
    other = seeded(model, tokens, seed=4)
    assert not any(torch.equal(other[name], gradient) for name, gradient in first.items())


def test_it_is_dropped_while_training_alone(package: Any, tokens: Tensor, drawn: list[tuple[Tensor, float]]) -> None:
    model, plain = injected(package), injected(package, rate=0.0)
    wanted = gradients(plain.eval(), tokens)
    for evaluated in (model.eval(), model.train().eval()):
        for name, gradient in gradients(evaluated, tokens).items():
            torch.testing.assert_close(gradient, wanted[name])
    assert all(rate == 0 and mask.all() for mask, rate in drawn)
    drawn.clear()
    with torch.no_grad():
        model(tokens)
    assert not drawn
    model.train()(tokens)
    rows = tokens.numel() * TOP_K
    assert [(mask.shape, rate) for mask, rate in drawn] == [((rows, width), RATE) for width in (HIDDEN, INNER)] * 2
    # A model that is put into evaluation before it gets adapters drops nothing.
    drawn.clear()
    package.inject_lora(frozen := qwen3_moe().eval(), RANK, target_parameters=BOTH, lora_dropout=RATE)
    before = torch.get_rng_state()
    gradients(frozen, tokens)
    assert torch.equal(torch.get_rng_state(), before) and all(rate == 0 for _, rate in drawn)


def test_with_the_masks_that_were_drawn_it_is_what_the_formula_says(
    package: Any, tokens: Tensor, drawn: list[tuple[Tensor, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts row by row, as autograd differentiates them."""
    model = injected(package, qwen3_moe(torch.float64))
    found, ours = outcome(model, tokens), seeded(model, tokens)
    assert len(drawn) == 2 * ALL
    assert all(torch.equal(first, again) for (first, _), (again, _) in zip(drawn[:ALL], drawn[ALL:], strict=True))
    masks = iter([mask for mask, _ in drawn[:ALL]] * 2)

    def output(self: Any, experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        chosen, order = torch.sort(index.flatten(), stable=True)

        def projected(rows: Tensor, name: str) -> Tensor:
            layer, mask = self[name], next(masks)
            left = rows * mask / (1 - RATE)
            made = torch.einsum("ti,toi->to", rows, layer.weight[chosen])
            down = torch.einsum("ti,tri->tr", left, layer.lora_A[chosen])
            return made + layer.scaling * torch.einsum("tr,tor->to", down, layer.lora_B[chosen])

        rows = projected(x[order // TOP_K], "gate_up_proj")
        rows = projected(experts._apply_gate(rows), "down_proj") * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // TOP_K, rows)

    monkeypatch.setattr(package.inject_experts.LoRAExperts, "output", output)
    torch.testing.assert_close(found, outcome(model, tokens), rtol=1e-12, atol=1e-12)
    for name, gradient in seeded(model, tokens).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-12, msg=name)
    assert next(masks, None) is None


def test_masks_are_independent(package: Any, tokens: Tensor, drawn: list[tuple[Tensor, float]]) -> None:
    """Of 100 steps: each at its rate, no two the same, and none says anything of another."""
    model, rate, steps = injected(package, rate=0.3), 0.3, 100
    torch.manual_seed(5)
    with torch.no_grad():  # as where a checkpoint runs first
        for _ in range(steps):
            model(tokens)
    assert len({mask.numpy().tobytes() for mask, _ in drawn}) == len(drawn) == steps * ALL
    by_stack = [torch.stack([mask for mask, _ in drawn[stack::ALL]]).double() - (1 - rate) for stack in range(ALL)]

    def related(one: Tensor, other: Tensor) -> bool:
        return abs(float((one * other).mean())) > 5 * rate * (1 - rate) / math.sqrt(one.numel())

    for number, masks in enumerate(by_stack):
        assert abs(masks.mean()) < 5 * math.sqrt(rate * (1 - rate) / masks.numel())
        assert not related(masks[1:], masks[:-1]), "from step to step"
        assert not related(masks[:, 1:], masks[:, :-1]), "from row to row"
        assert not related(masks[..., 1:], masks[..., :-1]), "from feature to feature"
        for other in by_stack[number + 1 :]:
            width = min(masks.shape[2], other.shape[2])
            assert not related(masks[..., :width], other[..., :width]), "from stack to stack"


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_computes_again_drops_the_same(package: Any, tokens: Tensor, reentrant: bool) -> None:
    plain = injected(package)
    plain.enable_input_require_grads()
    wanted = seeded(plain, tokens)
    model = checkpointed(injected(package), use_reentrant=reentrant)
    model.enable_input_require_grads()
    bitwise(seeded(model, tokens), wanted)


def test_compiled_whole(package: Any, tokens: Tensor) -> None:
    """It draws anew in each call, as torch's generator says."""
    model = injected(package)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    wanted = seeded(model, tokens)
    model.zero_grad()
    torch.manual_seed(3)
    compiled(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5)
    first, second = (compiled(tokens).logits.detach() for _ in range(2))
    assert not torch.equal(first, second)


def test_each_stack_has_its_rate(package: Any, tokens: Tensor, drawn: list[tuple[Tensor, float]]) -> None:
    model = injected(package)
    first, second, third, _ = layers(model)
    first.lora_dropout, second.lora_dropout = 0.25, 0.0
    third.eval()
    model(tokens)
    assert [rate for _, rate in drawn] == [0.25, 0.0, 0.0, RATE]


@pytest.mark.parametrize("targets", [[UP], [DOWN]], ids=["gate_up", "down"])
def test_of_one_stack_the_other_drops_nothing(
    package: Any, tokens: Tensor, targets: list[str], drawn: list[tuple[Tensor, float]]
) -> None:
    model = injected(package, targets=targets)
    outcome(model, tokens)
    assert sorted({rate for _, rate in drawn}) in ([RATE], [0.0, RATE])
    width = HIDDEN if targets == [UP] else INNER
    assert all(mask.shape[1] == width for mask, rate in drawn if rate)


@pytest.mark.parametrize("rate", [1, 1.0, -0.1, float("nan")])
def test_a_rate_that_is_none_is_refused(package: Any, tmp_path: Path, rate: float) -> None:
    model = qwen3_moe()
    with pytest.raises(ValueError, match="lora_dropout"):
        package.inject_lora(model, RANK, target_parameters=BOTH, lora_dropout=rate)
    with pytest.raises(ValueError, match="lora_dropout"):
        without_peft.inject_lora(model, RANK, (), (), target_parameters=BOTH, lora_dropout=rate, output=tmp_path)
    assert not layers(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_saved_peft_loads(package: Any, tokens: Tensor, folder: str) -> None:
    """It has no dropout on parameters, and refuses a file with one: so the rate is the model's, and said to be lost."""
    model = injected(package)
    assert f"lora_dropout={RATE}" in repr(layers(model)[0])
    with pytest.warns(UserWarning, match=r"lora_dropout = 0\.5 is saved as 0: PEFT loads no adapter on parameters"):
        package.save_adapter(model, folder)
    config = Path(folder, "adapter_config.json")
    assert json.loads(config.read_text())["lora_dropout"] == 0
    theirs = peft.PeftModel.from_pretrained(qwen3_moe(), folder)
    torch.testing.assert_close(model.eval()(tokens).logits, theirs(tokens).logits)
    package.load_adapter(model, folder)
    assert {layer.lora_dropout for layer in layers(model)} == {RATE}, "a file says nothing of it"
    package.load_adapter(fresh := qwen3_moe(), folder)
    assert {layer.lora_dropout for layer in layers(fresh)} == {0.0}
    config.write_text(config.read_text().replace('"lora_dropout": 0.0', f'"lora_dropout": {RATE}'))
    with pytest.raises(ValueError, match="lora_dropout"):
        peft.PeftModel.from_pretrained(qwen3_moe(), folder)


def test_copies_drop_as_the_model(package: Any, tokens: Tensor) -> None:
    model = injected(package)
    assert torch.equal(outcome(copy.deepcopy(model), tokens), outcome(model, tokens))


def test_injected_by_the_generator(tmp_path: Path, tokens: Tensor) -> None:
    model, options = qwen3_moe(), {"target_parameters": BOTH, "tokens": 64, "kernels": False}
    report = without_peft.inject_lora(model, RANK, 8, (), lora_dropout=RATE, output=tmp_path, **options)
    (made,) = report.folders
    manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    assert len(report.accelerated) == ALL and manifest["workload"]["dropout"] == RATE
    assert {layer.lora_dropout for layer in layers(model)} == {RATE}
    filled(model).train()
    assert not torch.equal(outcome(model, tokens), outcome(model, tokens, seed=4))
    plain = qwen3_moe()
    without_peft.inject_lora(plain, RANK, 8, (), output=tmp_path / "plain", **options)
    assert not layers(plain), "as without it ever"


def test_losses_go_down(package: Any, tokens: Tensor) -> None:
    torch.manual_seed(0)
    model = injected(package, rate=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < sum(losses[:5])


def test_stacks_are_run_before_the_first_step(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warmup: Any = __import__(f"{package.__name__}.warmup", fromlist=["warmup"])
    monkeypatch.setattr(warmup, "_is_whole_on_gpu", lambda _: True)
    cases = warmup._cases(injected(package))
    assert len(cases) == 2
    for case in cases:
        warmup._step(case, 8)
