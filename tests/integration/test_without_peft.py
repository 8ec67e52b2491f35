"""``inject_lora`` and what goes with it: LoRA without PEFT, in PEFT's format."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from runlora_gen.request.layout import LAYOUTS
from torch import Tensor, nn

from .models import RANK, filled, gradients, llama, with_lora

NAMES = ["q_proj", "down_proj"]


def injected(package: Any, **options: Any) -> Any:
    model = llama()
    package.inject_lora(model, RANK, 8, **options)
    return filled(model)


@pytest.mark.parametrize(
    ("target_modules", "count"),
    [("all-linear", 14), (NAMES, 4), (["layers.1.mlp.up_proj"], 1), (r".*\.0\.self_attn\.[qk]_proj", 2)],
    ids=["all-linear", "names", "end", "expression"],
)
def test_targets(package: Any, target_modules: Any, count: int) -> None:
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = package.inject_lora(model, target_modules=target_modules)
    assert len(report.accelerated) == count
    trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(report.accelerated)
    assert set(report.left) == ({"lm_head"} if target_modules == "all-linear" else set())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "w1"]}, "nothing in the model is called 'w1'"),
        ({"target_modules": "q_proj"}, "'q_proj' fits no linear inside the model"),
        ({"target_modules": ["embed_tokens"]}, "model.embed_tokens is a Embedding, not a linear"),
        ({"target_modules": ["lm_head"]}, "64x50 is not in llama_r4"),
        ({"r": 8}, "r = 8: llama_r4 has linears for rank 4 only"),
    ],
    ids=["name", "expression", "kind", "shape", "rank"],
)
def test_refused(package: Any, options: dict[str, Any], message: str) -> None:
    model = llama()
    with pytest.raises(ValueError, match=message):
        package.inject_lora(model, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(package.adapters.is_lora_layer(module) for module in model.modules())


def test_refused_for_what_the_model_is(package: Any) -> None:
    model = injected(package)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        package.inject_lora(model)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        package.inject_lora(with_lora())
    with pytest.raises(ValueError, match="fits no linear inside the model"):
        package.inject_lora(nn.Linear(64, 96))
    tied = llama()
    tied.model.layers[0].mlp.up_proj.weight = tied.model.layers[1].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"the weight of .* is tied to that of"):
        package.inject_lora(tied, target_modules=["up_proj"])
    quantized = llama()
    quantized.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(96, 64).char(), requires_grad=False)
    with pytest.raises(TypeError, match="not quantized"):
        package.inject_lora(quantized)
    assert quantized.model.layers[0].mlp.up_proj.weight.requires_grad
    for act in (package.merge, package.unmerge, lambda model: package.save_adapter(model, "nowhere")):
        with pytest.raises(ValueError, match="no generated LoRA layers"):
            act(llama())


def test_what_would_be_lost_is_refused(package: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate (the test extra)")
    model = llama()
    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has hooks, which would be lost"):
        package.inject_lora(model)
    handle.remove()
    dispatched = accelerate.dispatch_model(llama(), {"": "cpu"}, force_hooks=True)
    with pytest.raises(ValueError, match="has a forward that was replaced, as Accelerate does for a device_map"):
        package.inject_lora(dispatched)
    package.inject_lora(model)


def test_a_linear_under_two_names_stays_one(package: Any, tokens: Tensor) -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    report = package.inject_lora(model, target_modules=["up_proj"])
    assert len(report.accelerated) == 2
    assert model.model.layers[0].mlp.up_proj is model.model.layers[1].mlp.up_proj


def test_gradients_are_peft_s(package: Any, tokens: Tensor, folder: str) -> None:
    model = injected(package, target_modules=NAMES)
    package.save_adapter(model, folder)
    other = peft.PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    torch.testing.assert_close(model(tokens).logits, other(tokens).logits, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(model, tokens), gradients(other, tokens)
    assert len(ours) == len(theirs) == 8
    for name, gradient in theirs.items():
        plain = name.removeprefix("base_model.model.").replace(".default.weight", "")
        torch.testing.assert_close(ours[plain], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv1d(tmp_path: Path, tokens: Tensor, layout: str) -> None:
    """GPT-2, both ways through ``runlora_gen``: weights are in_features x out_features, with a bias."""
    import runlora_gen

    def gpt2() -> Any:
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
        return transformers.GPT2LMHeadModel(config).eval()

    model, options = gpt2(), {"kernels": False, "tokens": 64, "layout": layout}
    report = runlora_gen.inject_lora(model, RANK, 8, output=tmp_path / "packages", **options)
    assert len(report.accelerated) == 4 and set(report.left) == {"lm_head"}
    (package,) = report.folders
    assert (package / "base.py").exists() == (layout == "folder")
    filled(model)
    runlora_gen.save_adapter(model, tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "adapter", is_trainable=True).eval()
    torch.testing.assert_close(model(tokens).logits, other(tokens).logits, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(model, tokens), gradients(other, tokens)
    assert len(ours) == len(theirs) == 8
    for one, another in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-6)
    loaded = gpt2()
    runlora_gen.load_adapter(loaded, tmp_path / "adapter", output=tmp_path / "packages", **options)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    wanted = model(tokens).logits
    runlora_gen.merge(model)
    model.save_pretrained(tmp_path / "merged")
    plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(plain(tokens).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "alpha_pattern": {"down_proj": 3}}], ids=["plain", "odd"])
def test_what_peft_saved_is_loaded(package: Any, tokens: Tensor, folder: str, options: dict[str, Any]) -> None:
    theirs = with_lora(target_modules=NAMES, **options)
    theirs.save_pretrained(folder)
    wanted = theirs(tokens).logits
    model = llama()
    package.load_adapter(model, folder)
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    again = injected(package, target_modules=NAMES)
    package.load_adapter(again, folder)
    torch.testing.assert_close(again(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    package.save_adapter(again, f"{folder}/again")
    third = peft.PeftModel.from_pretrained(llama(), f"{folder}/again")
    torch.testing.assert_close(third(tokens).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is not covered"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not covered"),
        ({"bias": "all"}, "peft_type and bias must be LORA and none"),
        ({"r": 8}, "r = 8: llama_r4 has linears for rank 4 only"),
    ],
    ids=["DoRA", "modules_to_save", "bias", "rank"],
)
def test_adapters_that_are_not_loaded(package: Any, folder: str, options: dict[str, Any], message: str) -> None:
    with_lora(**options).save_pretrained(folder)
    model = llama()
    with pytest.raises(ValueError, match=message):
        package.load_adapter(model, folder)
    assert not any(package.adapters.is_lora_layer(module) for module in model.modules())


def test_an_adapter_of_other_layers_is_refused(package: Any, folder: str) -> None:
    with_lora(target_modules=["q_proj"]).save_pretrained(folder)
    with pytest.raises(ValueError, match="has an adapter in one of the file and the model, not in both"):
        package.load_adapter(injected(package), folder)
    config = Path(folder, "adapter_config.json")
    with_lora(target_modules=["q_proj"], lora_dropout=0.5).save_pretrained(folder)
    with pytest.warns(UserWarning, match=r"lora_dropout = 0\.5 is not applied"):
        package.load_adapter(llama(), folder)
    config.unlink()
    with pytest.raises(OSError, match="adapter_config"):
        package.load_adapter(llama(), folder)


def test_merge_unmerge_and_switch_off(package: Any, tokens: Tensor, tmp_path: Path) -> None:
    model = injected(package).eval()
    adapted, base = model(tokens).logits, llama()(tokens).logits
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with package.disable_adapter(model):
        torch.testing.assert_close(model(tokens).logits, base)
    assert torch.equal(model(tokens).logits, adapted)
    package.merge(model)
    torch.testing.assert_close(model(tokens).logits, adapted, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    assert not list(tmp_path.glob("merged/adapter*"))
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(plain(tokens).logits, adapted, rtol=1e-4, atol=1e-5)
    model.model.layers[0].mlp.up_proj.unmerge()
    with pytest.raises(ValueError, match="some LoRA layers are merged and others are not"):
        model.save_pretrained(tmp_path / "half")
    package.unmerge(model)
    assert all(torch.equal(bits[name], tensor) for name, tensor in model.state_dict().items())


def test_a_merge_that_loses_updates_says_so(package: Any) -> None:
    model = llama(torch.bfloat16)
    package.inject_lora(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(parameter, 1e-6)
    with pytest.warns(UserWarning, match="16-bit weights hold less than 99% of the update in 14 layers, least in"):
        package.merge(model)


def test_save_pretrained_holds_the_adapter(package: Any, tokens: Tensor, folder: str) -> None:
    model = injected(package)
    model.save_pretrained(folder)
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, 8, "LORA")
    loaded = peft.PeftModel.from_pretrained(llama(), folder)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_saves_its_own_adapter(package: Any, tokens: Tensor, folder: str, copied: Any) -> None:
    model = injected(package)
    other = copied(model)
    assert torch.equal(other(tokens).logits, model(tokens).logits)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.lora_B.mul_(2)
    other.save_pretrained(folder)
    loaded = llama()
    package.load_adapter(loaded, folder)
    assert torch.equal(loaded(tokens).logits, other(tokens).logits)
    assert not torch.equal(other(tokens).logits, model(tokens).logits)


def test_a_crash_and_a_resume_change_nothing(package: Any, tmp_path: Path) -> None:
    """Trainer, four steps at once, and two with a checkpoint and two from it."""
    rows = torch.randint(50, (16, 8), generator=torch.Generator().manual_seed(5))
    data = [{"input_ids": row, "labels": row} for row in rows]

    def train(folder: Path, stop: int, resume: bool = False) -> dict[str, Tensor]:
        model = injected(package, target_modules=NAMES)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
        )

        class Stop(transformers.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = state.global_step >= stop

        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[Stop()])
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    assert (tmp_path / "parts" / "checkpoint-2" / "adapter_config.json").exists()
    resumed = train(tmp_path / "parts", 4, resume=True)
    assert whole.keys() == resumed.keys()
    first = dict(injected(package, target_modules=NAMES).named_parameters())
    assert not any(torch.equal(whole[name], first[name]) for name in whole), "all of it was trained"
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())
