"""A small Llama with random weights, and the package that serves its linears at one rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runlora_gen import api
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs transformers and peft (the test extra)")
peft = pytest.importorskip("peft", reason="needs transformers and peft (the test extra)")

RANK = 4
VOCABULARY = 50
#: What takes more than some seconds runs where it is asked for.
takes_long = pytest.mark.skipif(not os.environ.get("RUNLORA_LONG"), reason="takes long: set RUNLORA_LONG=1")


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The same weights each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    config = transformers.LlamaConfig(**{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **options})
    return transformers.LlamaForCausalLM(config).to(dtype)


def filled(model: nn.Module) -> Any:
    """Adapters that change the output: lora_B is zero at first."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


def with_lora(model: Any = None, **options: Any) -> Any:
    """A PeftModel with adapters in all linears."""
    wide = options.pop("autocast_adapter_dtype", True)
    config = peft.LoraConfig(**{"r": RANK, "lora_alpha": 8, "target_modules": "all-linear", **options})
    return filled(peft.get_peft_model(llama() if model is None else model, config, autocast_adapter_dtype=wide))


def checkpointed(model: Any, **options: Any) -> Any:
    """With activation checkpointing, whatever this version of Transformers calls that."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)(options)
    return model


def gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Of a language model's loss, by the names of the parameters."""
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sizes are so small that threads are what takes time: where others want the cores, a hundred times as long."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Generated once: the shapes of the model at ``RANK``."""
    (folder,) = api.generate(llama(), rank=RANK, tokens=64, kernels=False, output=tmp_path_factory.mktemp("packages"))
    return api._imported(folder)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "adapter")
