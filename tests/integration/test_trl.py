"""TRL's trainers: their losses with our layers are those with PEFT's."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from .models import RANK, VOCABULARY, llama, with_lora

for name in ("trl", "datasets"):
    pytest.importorskip(name, reason="needs trl and datasets")

import datasets  # noqa: E402
import trl  # noqa: E402

#: What TRL warns of: that packing mixes sequences without flash attention, and names of its own that will change.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Words are numbers."""
    words = {"<end>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", pad_token="<pad>")


def text(start: int, length: int) -> str:
    return " ".join(f"w{2 + (start + 3 * i) % (VOCABULARY - 2)}" for i in range(length))


def models(package: Any) -> dict[str, Any]:
    """PEFT's, accelerated and injected, with the same adapters."""
    plain, accelerated, injected = with_lora(), with_lora(), llama()
    package.accelerate(accelerated, strict=True)
    package.inject_lora(injected, RANK, 8)
    adapters = {
        n.removeprefix("base_model.model.").replace(".default.weight", ""): p for n, p in plain.named_parameters()
    }
    injected.load_state_dict({name: p for name, p in adapters.items() if ".lora_" in name}, strict=False)
    return {"PEFT": plain, "accelerated": accelerated, "injected": injected}


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": True,
        "seed": 3,
    }


def same(found: dict[str, list[float]]) -> None:
    wanted = found["PEFT"]
    assert len(wanted) == 3 and all(map(math.isfinite, wanted)) and wanted[0] != wanted[-1]
    for kind in ("accelerated", "injected"):
        torch.testing.assert_close(torch.tensor(found[kind]), torch.tensor(wanted), rtol=1e-4, atol=1e-5)


def test_sft_with_packing(package: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"text": text(i, 4 + i % 5)} for i in range(24)])
    options = trl.SFTConfig(**arguments(tmp_path), packing=True, max_length=16)
    found = {}
    for kind, model in models(package).items():
        trainer = trl.SFTTrainer(model, options, train_dataset=data, processing_class=tokenizer)
        assert len(trainer.train_dataset) < len(data), "rows are packed"
        found[kind] = losses(trainer)
    same(found)


def test_dpo(package: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The reference is the model as it starts: a second adapter in PEFT's, which TRL adds; else a copy."""
    rows = [{"prompt": text(i, 4), "chosen": " " + text(i + 12, 3), "rejected": " " + text(5 * i, 3)} for i in range(8)]
    data = datasets.Dataset.from_list(rows)
    options = trl.DPOConfig(**arguments(tmp_path), max_length=16)
    found = {}
    for kind, model in models(package).items():
        reference = copy.deepcopy(model) if kind == "injected" else None
        trainer = trl.DPOTrainer(model, reference, options, train_dataset=data, processing_class=tokenizer)
        found[kind] = losses(trainer)
    same(found)
