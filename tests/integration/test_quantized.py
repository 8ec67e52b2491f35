"""Bases that bitsandbytes quantized, as Transformers loads them: left to PEFT or refused, with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import runlora_gen
import torch
import transformers

from .models import RANK, VOCABULARY, gradients, llama, with_lora

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

#: Deprecations of Transformers and of bitsandbytes among themselves.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

KINDS = {"Linear4bit": {"load_in_4bit": True}, "Linear8bitLt": {"load_in_8bit": True}}
TOKENS = torch.arange(24).view(2, 12) % VOCABULARY


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    llama().save_pretrained(folder)
    return folder


def quantized(saved: Path, kind: str, **options: Any) -> Any:
    config = transformers.BitsAndBytesConfig(**KINDS[kind], **options)
    return transformers.AutoModelForCausalLM.from_pretrained(saved, quantization_config=config, device_map="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_left_to_peft_with_one_warning(saved: Path, tmp_path: Path, kind: str) -> None:
    model = with_lora(quantized(saved, kind))
    classes = {name: type(module) for name, module in model.named_modules()}
    with pytest.warns(UserWarning, match="^PEFT's own code runs in: 14 left: a bnb.") as warned:
        report = runlora_gen.accelerate(model, tmp_path)
    assert len(warned) == 1 and str(warned[0].message).count(kind) == 1
    assert not report.accelerated and not report.folders and len(report.left) == 14
    assert str(report).startswith("0 of 14 LoRA linears run on generated modules\n14 left: a bnb.")
    assert classes == {name: type(module) for name, module in model.named_modules()} and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"14 left: a bnb.{kind} is not covered"):
        runlora_gen.accelerate(model, tmp_path, strict=True)


def test_what_is_not_quantized_is_accelerated(saved: Path, tmp_path: Path) -> None:
    model = with_lora(quantized(saved, "Linear4bit", llm_int8_skip_modules=["down_proj", "lm_head"]))
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="12 left: a bnb.Linear4bit is not covered"):
        report = runlora_gen.accelerate(model, tmp_path, tokens=64, kernels=False)
    assert len(report.accelerated) == 2 and all("down_proj" in name for name in report.accelerated)
    torch.testing.assert_close(gradients(model, TOKENS), gradients(plain, TOKENS), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_injected(saved: Path, tmp_path: Path, kind: str) -> None:
    model = quantized(saved, kind)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for entry in (
        lambda: runlora_gen.inject_lora(model, RANK, output=tmp_path),
        lambda: runlora_gen.generate(model, rank=RANK, output=tmp_path),
    ):
        with pytest.raises(ValueError, match=rf"no linear that LoRA can be generated for; .*quantized \({kind}\)"):
            entry()
    assert trained == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not any("lora" in name for name in trained) and not list(tmp_path.iterdir())


def test_peft_layers_on_embeddings_alone(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=RANK, target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match="1 left: a layer.Embedding is not covered"):
        assert not runlora_gen.accelerate(model, tmp_path).accelerated


def test_no_adapter_is_left(tmp_path: Path) -> None:
    model = with_lora()
    model.base_model.set_adapter([])
    with pytest.warns(UserWarning, match="14 left: no adapter is active"):
        assert not runlora_gen.accelerate(model, tmp_path).accelerated
    with pytest.raises(ValueError, match="no LoRA layer of PEFT on a linear"):
        runlora_gen.accelerate(llama(), tmp_path)
