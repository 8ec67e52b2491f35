"""Dropout of the adapter's input, in PEFT's layers and in injected ones."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import runlora_gen
import torch
from runlora_gen.into_model.packages import imported
from runlora_gen.request.layout import LAYOUTS
from torch import Tensor, nn

from .conftest import takes_long
from .models import RANK, bitwise, checkpointed, filled, gradients, llama, masks_drawn, outcome, seeded, with_lora
from .test_runs_in import compiled_gradients, curve, same

ALL = 14
RATE = 0.5


@pytest.fixture(scope="module", params=LAYOUTS)
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its linears take any rate: that one was given when they were generated is enough."""
    options = {"rank": RANK, "tokens": 64, "kernels": False, "dropout": 0.1, "layout": request.param}
    (folder,) = runlora_gen.generate(llama(), output=tmp_path_factory.mktemp("dropout"), **options)
    return imported(folder)


def peft_model(package: Any, dtype: torch.dtype = torch.float32, rate: float = RATE, **options: Any) -> Any:
    model = with_lora(llama(dtype, **options), lora_dropout=rate).train()
    package.accelerate(model, strict=True)
    return model


def injected(package: Any, dtype: torch.dtype = torch.float32, rate: float = RATE, **options: Any) -> Any:
    """With the adapters that ``with_lora`` draws."""
    model, theirs = llama(dtype, **options), with_lora(llama(dtype, **options))
    package.inject_lora(model, RANK, 8, lora_dropout=rate)
    plain = {name.replace(".default.weight", ""): tensor for name, tensor in theirs.state_dict().items()}
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in plain.items() if "lora_" in name}
    assert state and not model.load_state_dict(state, strict=False).unexpected_keys
    return model.train()


both = pytest.mark.parametrize("make", [peft_model, injected], ids=["PEFT", "injected"])
Make = Callable[..., Any]


def layers(model: nn.Module) -> list[Any]:
    """Its LoRA layers, in the order in which they are called."""
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@pytest.fixture
def drawn(package: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, float]]:
    """The masks that linears drew, with the rates at which they did."""
    return masks_drawn((*package.shapes._MODULES, *getattr(package.shapes, "_GROUP_MODULES", ())), monkeypatch)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_live_model_s_dropout_is_generated(tmp_path: Path, tokens: Tensor, layout: str) -> None:
    options = {"tokens": 64, "kernels": False, "layout": layout}
    model = with_lora(lora_dropout=RATE).train()
    report = runlora_gen.accelerate(model, tmp_path, strict=True, **options)
    assert len(report.accelerated) == ALL and not report.left and "left" not in str(report)
    (folder,) = report.folders
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["workload"]["dropout"] == RATE and f"--dropout {RATE} " in manifest["command"]
    assert not torch.equal(outcome(model, tokens), outcome(model, tokens, seed=4))
    again = with_lora(lora_dropout=RATE)
    assert runlora_gen.accelerate(again, tmp_path, **options) == report, "nothing is generated anew"


@both
def test_masks_follow_the_seed(package: Any, tokens: Tensor, make: Make) -> None:
    model = make(package)
    first = seeded(model, tokens)
    bitwise(seeded(model, tokens), first)
    other = seeded(model, tokens, seed=4)
    assert not any(torch.equal(other[name], gradient) for name, gradient in first.items())


@both
def test_nothing_is_dropped_in_evaluation(
    package: Any, tokens: Tensor, make: Make, drawn: list[tuple[Tensor, float]]
) -> None:
    model = make(package)
    wanted = with_lora(lora_dropout=RATE).eval()
    for evaluated in (model.train(False), model.train().eval()):
        torch.testing.assert_close(evaluated(tokens).logits, wanted(tokens).logits, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(model, tokens), gradients(wanted, tokens)
    for one, other in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert all(rate == 0 and mask.all() for mask, rate in drawn)
    drawn.clear()
    with torch.no_grad():
        model(tokens)
    assert not drawn
    model.train()(tokens)
    assert [rate for _, rate in drawn] == [RATE] * ALL


@both
def test_where_nothing_is_dropped_nothing_is_drawn(package: Any, tokens: Tensor, make: Make) -> None:
    """What else draws goes on as it does with PEFT."""
    for model in (make(package, rate=0.0), make(package).eval()):
        before = torch.get_rng_state()
        gradients(model, tokens)
        assert torch.equal(torch.get_rng_state(), before)


@both
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_with_the_masks_that_were_drawn_it_is_what_peft_computes(
    package: Any,
    tokens: Tensor,
    make: Make,
    dtype: torch.dtype,
    tolerance: float,
    drawn: list[tuple[Tensor, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, theirs = make(package, dtype), with_lora(llama(dtype), lora_dropout=RATE).train()
    found, ours = outcome(model, tokens), seeded(model, tokens)
    assert len(drawn) == 2 * ALL and all(rate == RATE for _, rate in drawn)
    assert all(torch.equal(first, again) for (first, _), (again, _) in zip(drawn[:ALL], drawn[ALL:], strict=True))
    masks = iter([mask for mask, _ in drawn])

    def drop(self: nn.Dropout, x: Tensor) -> Tensor:
        return x * next(masks).view(x.shape) / (1 - self.p)

    monkeypatch.setattr(nn.Dropout, "forward", drop)
    torch.testing.assert_close(found, theirs(tokens).logits, rtol=tolerance, atol=tolerance)
    wanted = gradients(theirs, tokens)
    assert next(masks, None) is None and len(ours) == len(wanted) == 2 * ALL
    for (name, gradient), one in zip(wanted.items(), ours.values(), strict=True):
        torch.testing.assert_close(one, gradient, rtol=100 * tolerance, atol=tolerance, msg=name)


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_computes_again_drops_the_same(
    package: Any, tokens: Tensor, make: Make, reentrant: bool
) -> None:
    plain = make(package)
    plain.enable_input_require_grads()
    wanted = seeded(plain, tokens)
    model = checkpointed(make(package), use_reentrant=reentrant)
    model.enable_input_require_grads()
    bitwise(seeded(model, tokens), wanted)


def windows(package: Any, make: Make, rate: float) -> Any:
    """A layer through which one sees its mask: its first outputs are its first inputs, as far as they are kept."""
    layer = layers(make(package, rate=rate, num_hidden_layers=1))[0]
    weights = dict(layer.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            weight.zero_()
            if "lora" in name:
                weight[:RANK, :RANK] = torch.eye(RANK)
    return layer


@both
@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        "aot_eager",
        pytest.param("inductor", marks=takes_long),
    ],
)
def test_compiled_it_drops_at_its_rate_and_goes_back_through_the_same_mask(
    package: Any, make: Make, backend: str
) -> None:
    scaling, tokens = 2, 3000
    layer = windows(package, make, 0.3)
    torch._dynamo.reset()
    step = torch.compile(layer, fullgraph=True, backend=backend)
    masks = []
    for rate in (0.3, 0.3, 0.6, 0.1):  # rates may change between steps
        if make is injected:
            layer.lora_dropout = rate
        else:
            layer.lora_dropout["default"].p = rate
        x = torch.ones(tokens, layer.in_features, requires_grad=True)
        y = step(x)
        y.sum().backward()
        kept = y[:, :RANK] != 0
        expected = torch.where(kept, scaling / (1 - rate), 0.0)
        torch.testing.assert_close(y[:, :RANK], expected)
        torch.testing.assert_close(x.grad[:, :RANK], expected)
        masks.append(kept)
        assert abs(kept.float().mean() - (1 - rate)) < 5 * (rate * (1 - rate) / kept.numel()) ** 0.5
    assert not torch.equal(*masks[:2]), "a graph draws anew in each call"
    layer.eval()
    assert torch.equal(step(torch.ones(tokens, layer.in_features))[:, :RANK], torch.full((tokens, RANK), 2.0))


@both
def test_compiled_whole(package: Any, tokens: Tensor, make: Make) -> None:
    model = make(package, num_hidden_layers=1)
    wanted = seeded(model, tokens)
    torch._dynamo.reset()
    torch.manual_seed(3)
    same(compiled_gradients(model, tokens, fullgraph=True, backend="aot_eager"), wanted)


def test_restored_it_is_peft_s_own(package: Any, tokens: Tensor) -> None:
    wanted = outcome(with_lora(lora_dropout=RATE).train(), tokens)
    model = peft_model(package)
    model(tokens)
    assert len(package.restore(model)) == ALL
    assert torch.equal(outcome(model, tokens), wanted)


def test_each_module_of_peft_has_its_rate(package: Any, tokens: Tensor, drawn: list[tuple[Tensor, float]]) -> None:
    """As it is when it runs: they may be changed, and switched off one by one."""
    model = peft_model(package, num_hidden_layers=1)
    first, second, third, fourth, *_ = layers(model)
    first.lora_dropout["default"].p = 0.25
    second.lora_dropout["default"].p = 0.0
    third.lora_dropout["default"].eval()
    fourth.lora_dropout["default"] = nn.Identity()
    model(tokens)
    assert [rate for _, rate in drawn] == [0.25, 0.0, 0.0, 0.0, RATE, RATE, RATE]


def test_each_injected_layer_has_its_rate(package: Any, tokens: Tensor, drawn: list[tuple[Tensor, float]]) -> None:
    model = injected(package, num_hidden_layers=1)
    first, second, third, *_ = layers(model)
    first.lora_dropout, second.lora_dropout = 0.25, 0.0
    third.eval()
    model(tokens)
    assert [rate for _, rate in drawn] == [0.25, 0.0, 0.0, RATE, RATE, RATE, RATE]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (nn.Dropout(1.0), "lora_dropout = 1 is not covered while training"),
        (nn.AlphaDropout(0.1), "a lora_dropout that is a AlphaDropout is not covered while training"),
    ],
    ids=["all", "another kind"],
)
def test_other_dropouts_are_left_to_peft(package: Any, tokens: Tensor, change: nn.Module, reason: str) -> None:
    def changed() -> Any:
        model = with_lora(lora_dropout=0.0).train()
        layers(model)[3].lora_dropout["default"] = copy.deepcopy(change)
        return model

    model = changed()
    with pytest.raises(ValueError, match=reason):
        package.accelerate(model, strict=True)
    with pytest.warns(UserWarning, match=f"1 left: {reason}"):
        report = package.accelerate(model)
    assert len(report.accelerated) == ALL - 1 and list(report.left.values()) == [reason]
    wanted = changed()
    with pytest.warns(UserWarning, match=reason):
        torch.testing.assert_close(outcome(model, tokens), outcome(wanted, tokens), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.eval()(tokens).logits, wanted.eval()(tokens).logits, rtol=1e-5, atol=1e-5)


def test_all_of_it_is_dropped_by_peft(tmp_path: Path, tokens: Tensor) -> None:
    """Nothing is generated for a rate of 1, at which the adapter's gradients are zero."""
    model = with_lora(lora_dropout=1.0).train()
    with pytest.warns(UserWarning, match=r"14 left: lora_dropout = 1\.0 while training"):
        runlora_gen.accelerate(model, tmp_path, tokens=64, kernels=False)
    with pytest.warns(UserWarning, match=r"lora_dropout = 1\.0 while training"):
        torch.testing.assert_close(model(tokens).logits, llama()(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", [1, 1.0, -0.1, float("nan")])
def test_a_rate_that_is_none_is_refused(package: Any, tmp_path: Path, rate: float) -> None:
    model = llama()
    with pytest.raises(ValueError, match="lora_dropout"):
        package.inject_lora(model, RANK, lora_dropout=rate)
    with pytest.raises(ValueError, match="lora_dropout"):
        runlora_gen.inject_lora(model, RANK, lora_dropout=rate, output=tmp_path)
    assert not layers(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_masks_are_independent(package: Any, tokens: Tensor, drawn: list[tuple[Tensor, float]]) -> None:
    """Of 200 steps: each at its rate, no two the same, and none says anything of another."""
    model, rate, steps = injected(package, rate=0.3), 0.3, 200
    torch.manual_seed(5)
    with torch.no_grad():  # as where a checkpoint runs first
        for _ in range(steps):
            model(tokens)
    assert len(drawn) == steps * ALL
    assert len({mask.numpy().tobytes() for mask, _ in drawn}) == steps * ALL
    by_layer = [torch.stack([mask for mask, _ in drawn[layer::ALL]]).float() for layer in range(ALL)]
    # Five standard deviations: of 14 rates and some 100 correlations one is off by chance in 2 · 10⁴ changes of torch.
    for masks in by_layer:
        assert abs(masks.mean() - (1 - rate)) < 5 * (rate * (1 - rate) / masks.numel()) ** 0.5
    centred = [(masks - masks.mean()) / masks.std() for masks in by_layer]

    def related(one: Tensor, other: Tensor) -> bool:
        return bool((one * other).mean().abs() > 5 / one.numel() ** 0.5)

    for number, masks in enumerate(centred):
        assert not related(masks[1:], masks[:-1]), "from step to step"
        assert not related(masks[:, 1:], masks[:, :-1]), "from token to token"
        assert not related(masks[..., 1:], masks[..., :-1]), "from feature to feature"
        for other in centred[number + 1 :]:
            assert masks.shape != other.shape or not related(masks, other), "from layer to layer"


def test_saved_loaded_copied_and_pickled(package: Any, tokens: Tensor, tmp_path: Path, folder: str) -> None:
    model = injected(package)
    assert f"lora_dropout={RATE}" in repr(layers(model)[0])
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outcome(made, tokens), outcome(model, tokens))
    package.save_adapter(model, folder)
    assert json.loads(Path(folder, "adapter_config.json").read_text())["lora_dropout"] == RATE
    loaded, generated = llama(), llama()
    package.load_adapter(loaded, folder)
    runlora_gen.load_adapter(generated, folder, output=tmp_path / "packages", tokens=64, kernels=False)
    for other in (loaded, generated):
        assert {layer.lora_dropout for layer in layers(other)} == {RATE}
        assert torch.equal(outcome(other.train(), tokens), outcome(model, tokens))
    theirs = peft.PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    assert theirs.peft_config["default"].lora_dropout == RATE
    assert all(layer.lora_dropout["default"].p == RATE for layer in layers(theirs))
    with_lora(lora_dropout=0.25).save_pretrained(folder)
    package.load_adapter(loaded, folder)
    assert {layer.lora_dropout for layer in layers(loaded)} == {0.25}, "what is loaded counts, not what was there"


def test_injected_by_the_generator(tmp_path: Path, tokens: Tensor) -> None:
    model, options = llama(), {"tokens": 64, "kernels": False}
    report = runlora_gen.inject_lora(model, RANK, 8, lora_dropout=RATE, output=tmp_path, **options)
    assert len(report.accelerated) == ALL and {layer.lora_dropout for layer in layers(model)} == {RATE}
    filled(model).train()
    assert not torch.equal(outcome(model, tokens), outcome(model, tokens, seed=4))
    plain = llama()
    runlora_gen.inject_lora(plain, RANK, 8, output=tmp_path / "plain", **options)
    assert not any(hasattr(layer, "lora_dropout") for layer in layers(plain)), "as without it ever"


def last(model: Any, seed: int) -> float:
    """The mean of the last losses of 60 steps; the start is the same, the masks are the seed's."""
    torch.manual_seed(seed)
    losses = curve(model, 60)
    assert losses[-8:].mean() < losses[:8].mean(), "it learns"
    return float(losses[-8:].mean())


@pytest.fixture(scope="module")
def losses_of_peft() -> Tensor:
    return torch.tensor([last(with_lora(llama(num_hidden_layers=1), lora_dropout=0.1).train(), s) for s in range(5)])


@both
def test_losses_of_a_training_are_peft_s(package: Any, make: Make, losses_of_peft: Tensor) -> None:
    """Masks are other ones than PEFT's: the last losses differ from PEFT's no more than among themselves."""
    ours = torch.tensor([last(make(package, rate=0.1, num_hidden_layers=1), seed) for seed in range(5)])
    spread = ((losses_of_peft.var() + ours.var()) / len(ours)).sqrt()
    assert spread > 0 and (ours.mean() - losses_of_peft.mean()).abs() <= 3 * spread
    assert losses_of_peft.std() / 4 < ours.std() < 4 * losses_of_peft.std()
