"""Gated MLPs as a whole whose adapters drop their input, or whose weights are of 4 and 8 bits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runlora_gen
import torch
from runlora_gen.from_model.live import read_model
from runlora_gen.into_model.packages import imported
from runlora_gen.request.layout import FOLDER, STANDALONE
from runlora_gen.request.mlps import mlps
from runlora_gen.search import grouped
from torch import Tensor, nn

from .models import (
    RANK,
    VOCABULARY,
    bitwise,
    checkpointed,
    coded,
    gradients,
    in_float8,
    llama,
    masks_drawn,
    outcome,
    seeded,
    with_lora,
)
from .test_mlps import counted
from .test_runs_in import same

RATE = 0.5
LAYERS = 2
LINEARS = ("gate_proj", "up_proj", "down_proj")
#: What draws masks: torch as bytes, and kernels from seeds, whose path through torch runs here.
KERNELS = {"bytes": False, "seeds": True}
#: Features at which blocks of scales end where rows do.
WIDE = 128
Make = Callable[..., Any]


def generated(model: Any, out: Path, **options: Any) -> Any:
    """A package with a module for the model's MLPs and none for other groups, whatever they are priced at."""
    with pytest.MonkeyPatch.context() as patch:
        pays = [(mlp, None) for mlp in mlps(read_model(model).architecture)]
        assert pays
        patch.setattr(grouped, "decide_groups_of_step", lambda *_: pays)
        (folder,) = runlora_gen.generate(model, rank=RANK, output=out, tokens=4096, launch="graph", **options)
    return imported(folder)


# Dropout


@pytest.fixture(scope="module", params=KERNELS)
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kernels = KERNELS[request.param]
    options: dict[str, Any] = {"device": "h200", "dtype": "bf16", "adapter_dtype": "bf16"} if kernels else {}
    layout = STANDALONE if kernels else FOLDER
    out = tmp_path_factory.mktemp("packages")
    found = generated(llama(), out, dropout=0.1, kernels=kernels, layout=layout, **options)
    for module in found.shapes._MLP_MODULES:
        assert all(("seed" in variant) == kernels for variant in module.VARIANTS)
    return found


@pytest.fixture
def calls(package: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    return counted(package, monkeypatch)


def peft_model(package: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = with_lora(llama(dtype), lora_dropout=RATE, **options).train()
    assert package.accelerate(model, strict=True).mlps == LAYERS
    return model


def injected(package: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """With the adapters that ``with_lora`` draws."""
    model, theirs = llama(dtype), with_lora(llama(dtype), **options)
    assert package.inject_lora(model, RANK, 8, lora_dropout=RATE, **options).mlps == LAYERS
    plain = {name.replace(".default.weight", ""): tensor for name, tensor in theirs.state_dict().items()}
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in plain.items() if "lora_" in name}
    assert state and not model.load_state_dict(state, strict=False).unexpected_keys
    return model.train()


both = pytest.mark.parametrize("make", [peft_model, injected], ids=["PEFT", "injected"])


@both
def test_masks_follow_the_seed(package: Any, tokens: Tensor, make: Make, calls: Callable[[], int]) -> None:
    model = make(package)
    first = seeded(model, tokens)
    assert calls() == LAYERS
    bitwise(seeded(model, tokens), first)
    other = seeded(model, tokens, seed=4)
    assert not any(torch.equal(other[name], gradient) for name, gradient in first.items())


@both
def test_with_the_masks_that_were_drawn_it_is_what_peft_computes(
    package: Any, tokens: Tensor, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of MLPs alone: their modules draw in the order of gate, up and down, and PEFT drops by the same masks."""
    masks: list[Tensor] = []
    if "seed" in next(iter(package.shapes._MLP_MODULES[0].VARIANTS)):
        for module in package.shapes._MLP_MODULES:

            def drop_by(seed: Tensor, X: Tensor, dropout: float, by: Any = module._drop_by) -> Tensor:
                masks.append(by(seed, torch.ones_like(X), dropout))
                return by(seed, X, dropout)  # type: ignore[no-any-return]

            monkeypatch.setattr(module, "_drop_by", drop_by)
    else:
        drawn = masks_drawn(package.shapes._MLP_MODULES, monkeypatch)
    of_mlps = {"target_modules": list(LINEARS)}
    model, theirs = make(package, torch.float64, **of_mlps), with_lora(
        llama(torch.float64), lora_dropout=RATE, **of_mlps
    )
    found = outcome(model, tokens)
    masks = masks or [mask / (1 - RATE) for mask, _ in drawn]
    assert len(masks) == len(LINEARS) * LAYERS
    taken = iter(list(masks))
    ours = seeded(model, tokens)

    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x * next(taken).view(x.shape))
    wanted = theirs.train()(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert next(taken, None) is None
    taken = iter(list(masks)[: len(LINEARS) * LAYERS])
    expected = gradients(theirs, tokens)
    assert len(ours) == len(expected) == 2 * len(LINEARS) * LAYERS
    for (name, gradient), one in zip(expected.items(), ours.values(), strict=True):
        torch.testing.assert_close(one, gradient, rtol=1e-10, atol=1e-12, msg=name)


@both
def test_nothing_is_dropped_in_evaluation(package: Any, tokens: Tensor, make: Make, calls: Callable[[], int]) -> None:
    model, wanted = make(package).eval(), with_lora(lora_dropout=RATE).eval()
    before = torch.get_rng_state()
    ours, theirs = gradients(model, tokens), gradients(wanted, tokens)
    assert calls() == LAYERS and torch.equal(torch.get_rng_state(), before)
    for one, other in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@both
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("length", [9, 130], ids=["few", "many"])
def test_what_a_checkpoint_computes_again_drops_the_same(
    package: Any, make: Make, reentrant: bool, length: int, calls: Callable[[], int]
) -> None:
    tokens = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(2))
    plain = make(package)
    plain.enable_input_require_grads()
    wanted = seeded(plain, tokens)
    calls()
    model = checkpointed(make(package), use_reentrant=reentrant)
    model.enable_input_require_grads()
    bitwise(seeded(model, tokens), wanted)
    assert calls() == 2 * LAYERS


# Weights of codes


def in_nf4(model: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    return coded(model)


@pytest.fixture
def _float8_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the weight that Transformers itself makes of the codes: its kernels are for GPUs alone."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="needs Transformers with FP8Linear")

    def multiply(x: Tensor, weight: Tensor, scale: Tensor, block: Any, bias: Tensor | None, *_: Any) -> Tensor:
        made = fp8._dequantize_fp8_weight(weight, scale, block, torch.float32).to(x.dtype)
        return nn.functional.linear(x, made, bias)

    monkeypatch.setattr(fp8, "fp8_linear", multiply)


@pytest.mark.usefixtures("_float8_is_multiplied")
@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("base", ["nf4", "fp8-block"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_weights_of_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, kernels: bool) -> None:
    """Outputs and gradients are PEFT's, plain and under a checkpoint."""
    tokens = torch.randint(VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(2))
    plain = llama(intermediate_size=WIDE)
    model = with_lora(in_nf4(plain) if base == "nf4" else in_float8(plain, base))
    package = generated(model, tmp_path, kernels=kernels, **({"device": "h200", "dtype": "bf16"} if kernels else {}))
    calls = counted(package, monkeypatch)
    ours = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = package.accelerate(ours, strict=True)
    assert report.mlps == LAYERS and not report.left
    wanted = gradients(model, tokens)
    torch.testing.assert_close(ours(tokens).logits, model(tokens).logits, rtol=1e-4, atol=2e-6)
    found = gradients(ours, tokens)
    assert calls() == 2 * LAYERS
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)
    ours.enable_input_require_grads()
    same(gradients(checkpointed(ours, use_reentrant=False).train(), tokens), found)
    assert calls() == 2 * LAYERS
