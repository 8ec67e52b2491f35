"""Gated MLPs whose gate and up are the halves of one linear: as a whole, as PEFT computes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import runlora_gen
import torch
import transformers
from runlora_gen.into_model.packages import imported
from runlora_gen.measure.memory import saved_bytes
from torch import Tensor

from .models import MLPS_PAY, RANK, VOCABULARY, bitwise, checkpointed, gradients
from .test_mlps import counted
from .test_runs_in import compiled_gradients, same

FAMILIES = ("Glm4", "Phi3")


def build(family: str, **options: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**sizes, **heads, **ids, **options)
    )


def with_lora(family: str, **options: Any) -> Any:
    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear", **options)
    model = peft.get_peft_model(build(family), config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def package(family: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With a module for the MLPs, as where they pay."""
    out = tmp_path_factory.mktemp("packages")
    (folder,) = runlora_gen.generate(build(family), rank=RANK, output=out, **MLPS_PAY)
    return imported(folder)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))


@pytest.mark.filterwarnings("ignore:.*the targeted layer of type Linear has no bias")
@pytest.mark.parametrize("lora_bias", [False, True])
def test_it_computes_what_peft_does(
    package: Any, family: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, lora_bias: bool
) -> None:
    model = with_lora(family, lora_bias=lora_bias)
    wanted, outputs = gradients(model, tokens), model(tokens).logits
    report = package.accelerate(model, strict=True)
    assert report.mlps == 2 and not report.apart
    calls = counted(package, monkeypatch)
    same(gradients(model, tokens), wanted)
    assert calls() == 2
    torch.testing.assert_close(model(tokens).logits, outputs, rtol=1e-4, atol=1e-5)
    package.restore(model)
    bitwise(gradients(model, tokens), wanted)
    assert calls() == 2, "those of the outputs alone"


def test_it_keeps_less(package: Any, family: str, tokens: Tensor) -> None:
    """Neither what the activation gives nor its product with up, and gate and up once, not in halves again."""
    model = with_lora(family)

    def kept() -> int:
        return saved_bytes(lambda: model(tokens, labels=tokens).loss, model.parameters())

    before = kept()
    package.accelerate(model, strict=True)
    # S is there for each half.
    assert before - kept() == 2 * tokens.numel() * (2 * 96 - RANK) * 4


def test_where_it_runs(package: Any, family: str, tokens: Tensor) -> None:
    """Under a checkpoint, compiled, copied, switched off, merged."""
    model = with_lora(family)
    package.accelerate(model, strict=True)
    wanted = gradients(model, tokens)
    same(gradients(checkpointed(copy.deepcopy(model), use_reentrant=False), tokens), wanted)
    torch._dynamo.reset()
    same(compiled_gradients(copy.deepcopy(model), tokens, fullgraph=True, backend="aot_eager"), wanted)
    with torch.no_grad():
        outputs = model(tokens).logits
        with model.disable_adapter():
            frozen = model(tokens).logits
        assert not torch.allclose(outputs, frozen, atol=1e-3)
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, outputs, rtol=1e-3, atol=1e-4)


def test_an_injected_model(
    package: Any, family: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = build(family).train()
    assert package.inject_lora(model, RANK, 8).mlps == 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    calls = counted(package, monkeypatch)
    outputs = model(tokens).logits
    assert calls() == 2
    package.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(family), str(tmp_path))
    torch.testing.assert_close(loaded(tokens).logits, outputs, rtol=1e-4, atol=1e-5)


def test_with_dropout_it_runs_as_it_did(family: str, tokens: Tensor, tmp_path: Path) -> None:
    """One mask is of gate and up both: no module has that."""
    model = with_lora(family, lora_dropout=0.1)
    report = runlora_gen.accelerate(model, tmp_path, strict=True, **MLPS_PAY)
    assert report.mlps == 0 and not report.apart and gradients(model, tokens)


def test_a_package_for_linears_apart_serves_halves_too(family: str, tokens: Tensor, tmp_path: Path) -> None:
    """Of the same sizes, but by the names that it was generated for alone."""
    model = with_lora(family)
    other = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCABULARY
        )
    )
    (folder,) = runlora_gen.generate(other, rank=RANK, output=tmp_path, **MLPS_PAY)
    with pytest.warns(UserWarning, match="PEFT's own code runs in"):
        report = imported(folder).accelerate(model)
    assert report.mlps == 0 and not report.apart and gradients(model, tokens)
