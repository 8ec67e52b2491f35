"""``accelerate``: what PEFT computes and all that PEFT offers, on generated modules."""

from __future__ import annotations

import copy
import pickle
import warnings
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import runlora_gen
import torch
import transformers
from runlora_gen.into_model.packages import imported
from runlora_gen.request.layout import LAYOUTS
from torch import Tensor

from .models import RANK, filled, gradients, llama, with_lora

ALL = 14
DROPOUT = f"lora_dropout = 0.5 while training: llama_r{RANK} was generated without --dropout"


def accelerated(package: Any, model: Any) -> Any:
    assert len(package.accelerate(model, strict=True).accelerated) == ALL
    return model


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_outputs_and_gradients_are_peft_s(package: Any, tokens: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    model = with_lora(llama(dtype), use_rslora=True)
    wanted, wanted_gradients = model(tokens).logits, gradients(model, tokens)
    report = package.accelerate(model)
    assert len(report.accelerated) == ALL and not report.left and report.modules == 4
    assert "14 of 14 LoRA linears run on generated modules" in str(report)
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=tolerance, atol=tolerance)
    found = gradients(model, tokens)
    assert found.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=100 * tolerance, atol=tolerance)


def test_bf16_is_as_near_to_the_truth_as_peft(package: Any, tokens: Tensor) -> None:
    """The base in bf16, adapters in float32: |ours - truth| at most twice |PEFT - truth|."""
    truth = with_lora(llama(torch.bfloat16).double())
    model = with_lora(llama(torch.bfloat16))
    assert (
        model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").lora_A["default"].weight.dtype
        == torch.float32
    )
    exact, exact_gradients = truth(tokens).logits, gradients(truth, tokens)
    errors = []
    for _ in range(2):
        off = {name: (g.double() - exact_gradients[name]).norm() for name, g in gradients(model, tokens).items()}
        errors.append({"logits": (model(tokens).logits.double() - exact).norm(), **off})
        package.accelerate(model, strict=True)
    for name, error in errors[1].items():
        assert error <= 2 * errors[0][name] + 1e-6, name


def test_twice_is_once_and_restore_undoes_it(package: Any, tokens: Tensor) -> None:
    model = with_lora()
    kinds = {name: type(module) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = model(tokens).logits
    first = package.accelerate(model)
    swapped = {name: type(module) for name, module in model.named_modules()}
    assert package.accelerate(model) == first
    assert {name: type(module) for name, module in model.named_modules()} == swapped != kinds
    assert model.state_dict().keys() == state.keys()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert repr(layer).startswith("lora.Linear(\n  accelerated by llama_r4\n  (base_layer): Linear(")
    assert package.restore(model) == first.accelerated and package.restore(model) == ()
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert torch.equal(model(tokens).logits, wanted)


def test_without_it_dropout_is_peft_s_in_training_and_ours_in_evaluation(package: Any, tokens: Tensor) -> None:
    model = with_lora(lora_dropout=0.5)
    with pytest.raises(ValueError, match=DROPOUT):
        package.accelerate(model, strict=True)
    assert package.restore(model) == (), "the model is as it was"
    with pytest.warns(UserWarning, match=f"^PEFT's own code runs in: 14 left: {DROPOUT}") as seen:
        report = package.accelerate(model)
    assert len(seen) == 1 and set(report.left.values()) == {DROPOUT} and not report.accelerated
    with pytest.warns(UserWarning, match=DROPOUT):
        torch.manual_seed(3)
        found = model.train()(tokens).logits
    package.restore(model)
    torch.manual_seed(3)
    assert torch.equal(found, model(tokens).logits)
    wanted = model.eval()(tokens).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package.accelerate(model)
    torch.testing.assert_close(model(tokens).logits, wanted)


@pytest.mark.parametrize(
    ("options", "reason", "count"),
    [
        ({"use_dora": True}, "DoraLinearVariant is not covered", ALL),
        ({"r": 8}, f"rank 8 is not in llama_r{RANK}", ALL),
        ({"rank_pattern": {"down_proj": 2}}, f"rank 2 is not in llama_r{RANK}", 2),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "a layer.Embedding is not covered", 1),
        ({"target_modules": ["lm_head", "q_proj"]}, f"64x50 is not in llama_r{RANK}", 1),
    ],
    ids=["DoRA", "rank", "rank_pattern", "embedding", "shape"],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
def test_what_is_not_covered_is_left_to_peft(
    package: Any, tokens: Tensor, options: dict[str, Any], reason: str, count: int
) -> None:
    model = with_lora(**options)
    wanted = model(tokens).logits
    with pytest.raises(ValueError, match=reason):
        package.accelerate(model, strict=True)
    with pytest.warns(UserWarning, match=reason):
        report = package.accelerate(model)
    assert list(report.left.values()).count(reason) == count == len(report.left)
    assert f"{count} left: {reason}" in str(report)
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-5, atol=1e-5)


def test_quantized_hooked_trained_and_patched_bases_are_left(package: Any) -> None:
    model = with_lora()
    layers = model.base_model.model.model.layers
    first, second = layers[0].mlp, layers[1].mlp
    first.up_proj.base_layer.weight = torch.nn.Parameter(torch.zeros(96, 64, dtype=torch.uint8), requires_grad=False)
    first.gate_proj.lora_A["default"].register_forward_hook(lambda *_: None)
    first.down_proj.base_layer.weight.requires_grad_(True)
    second.up_proj.base_layer.forward = second.up_proj.base_layer.forward
    torch.nn.utils.parametrizations.weight_norm(second.gate_proj.base_layer)
    with pytest.warns(UserWarning, match="5 left|1 left"):
        report = package.accelerate(model)
    assert set(report.left.values()) == {
        "a base of torch.uint8 is not covered",
        "there are hooks on its parts",
        "its base weight is trained",
        "its forward was replaced, as Accelerate does for a device_map",
        "its base has parametrizations",
    }
    assert len(report.accelerated) == ALL - 5


def test_hooks_of_accelerate_are_left(package: Any, tokens: Tensor) -> None:
    """A model whose parts are sent to devices: PEFT's own code calls the hooked forwards."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate (the test extra)")
    model = with_lora(accelerate.dispatch_model(llama(), {"": "cpu"}, force_hooks=True))
    wanted, state = model(tokens).logits, list(model.state_dict())
    with pytest.warns(UserWarning, match=r"^PEFT's own code runs in: 14 left: its forward was replaced") as seen:
        report = package.accelerate(model)
    assert len(seen) == 1 and not report.accelerated and list(model.state_dict()) == state
    assert torch.equal(model(tokens).logits, wanted)
    partly = with_lora()
    base = partly.base_model.model.model.layers[0].mlp.up_proj.base_layer
    accelerate.hooks.add_hook_to_module(base, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    with pytest.warns(UserWarning, match="1 left: its forward was replaced"):
        assert len(package.accelerate(partly).accelerated) == ALL - 1


def test_a_hook_that_comes_later_is_called(package: Any, tokens: Tensor) -> None:
    model = accelerated(package, with_lora())
    calls = []
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    handle = layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="a LoRA linear runs PEFT's own code: there are hooks on its parts"):
        model(tokens)
    handle.remove()
    model(tokens)
    assert calls == [1]


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*")
def test_a_tied_weight_is_used_as_it_is(tmp_path: Any, tokens: Tensor) -> None:
    """The head has the embeddings' weight: both go on having it."""
    model = with_lora(llama(tie_word_embeddings=True), target_modules=["lm_head", "q_proj"])
    wanted, found = model(tokens).logits, gradients(model, tokens)
    package = imported(runlora_gen.generate(model, output=tmp_path, tokens=64, kernels=False)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = package.accelerate(model)
    assert len(report.accelerated) + len(report.left) == 3
    base = model.base_model.model
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model, tokens).items():
        torch.testing.assert_close(gradient, found[name], rtol=1e-4, atol=1e-6)


def test_nothing_to_replace(package: Any) -> None:
    with pytest.raises(ValueError, match="no LoRA layers of PEFT: wrap it first"):
        package.accelerate(llama())


def test_several_adapters(package: Any, tokens: Tensor) -> None:
    model = with_lora()
    model.add_adapter("second", peft.LoraConfig(r=RANK, lora_alpha=2, target_modules=["q_proj", "up_proj"]))
    model.add_adapter("wide", peft.LoraConfig(r=8, lora_alpha=2, target_modules=["q_proj"]))
    filled(model)

    def outputs() -> list[Tensor]:
        found = []
        for name in ("default", "second", "wide"):
            model.set_adapter(name)
            found.append(model(tokens).logits)
        with model.disable_adapter():
            found.append(model(tokens).logits)
        model.base_model.set_adapter(["default", "second"])
        found.append(model(tokens).logits)
        model.set_adapter("default")
        found.append(model(tokens, adapter_names=["default", "second"]).logits)
        return found

    model.eval()
    wanted = outputs()
    accelerated(package, model)
    with pytest.warns(UserWarning) as seen:
        found = outputs()
    messages = {str(warning.message) for warning in seen}
    assert len(messages) == 3
    for part in ("rank 8 is not in", "2 adapters are active, not one", "a call with adapter_names is not covered"):
        assert any(part in message for message in messages), part
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="linear")
    model.set_adapter("both")
    found = model(tokens).logits
    package.restore(model)
    torch.testing.assert_close(found, model(tokens).logits, rtol=1e-5, atol=1e-5)
    model.delete_adapter("second")


def test_a_layer_that_waits_for_its_adapter_runs_its_base_in_silence(package: Any, tokens: Tensor) -> None:
    model = with_lora(target_modules=["q_proj"])
    model.add_adapter("second", peft.LoraConfig(r=RANK, lora_alpha=2, target_modules=["up_proj"]))
    filled(model).eval()
    wanted = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        wanted[name] = model(tokens).logits
    assert len(package.accelerate(model, strict=True).accelerated) == 4
    for name, logits in wanted.items():
        model.set_adapter(name)
        torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-5, atol=1e-5)


def test_merging_is_peft_s(package: Any, tokens: Tensor) -> None:
    model = accelerated(package, with_lora().eval())
    wanted = model(tokens).logits
    package.merge(model)
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-4, atol=1e-5)
    package.unmerge(model)
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-4, atol=1e-5)
    with package.disable_adapter(model):
        torch.testing.assert_close(model(tokens).logits, llama()(tokens).logits, rtol=1e-4, atol=1e-5)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not any(hasattr(module, "lora_A") for module in merged.modules())
    torch.testing.assert_close(merged(tokens).logits, wanted, rtol=1e-4, atol=1e-5)


def test_saved_loaded_copied_and_pickled(package: Any, tokens: Tensor, folder: str) -> None:
    model = accelerated(package, with_lora(modules_to_save=["lm_head"]).eval())
    wanted = model(tokens).logits
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(package.restore(made)) == ALL
        torch.testing.assert_close(made(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    package.save_adapter(model, folder)
    loaded = accelerated(package, peft.PeftModel.from_pretrained(llama(), folder).eval())
    assert torch.equal(loaded(tokens).logits, wanted)
    other = accelerated(package, with_lora(modules_to_save=["lm_head"]))
    package.load_adapter(other, folder, adapter_name="again")
    other.set_adapter("again")
    assert torch.equal(other.eval()(tokens).logits, wanted)


def test_generate(package: Any, tokens: Tensor) -> None:
    model = with_lora().eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(tokens, **options)
    assert torch.equal(accelerated(package, model).generate(tokens, **options), wanted)


def test_conv1d(tmp_path: Any) -> None:
    """GPT-2: weights are in_features x out_features, with a bias."""
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=20)).eval()
    model = with_lora(base, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True).eval()
    tokens = torch.randint(20, (2, 5))
    wanted = model(tokens).logits
    report = runlora_gen.accelerate(model, tmp_path, strict=True, kernels=False, tokens=64)
    assert len(report.accelerated) == 4
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-5, atol=1e-5)


def test_fused_storage(tmp_path: Any) -> None:
    """Phi-3 stores q, k, v as one linear, and gate and up: each has one adapter, and reads its input once as it is."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Phi3Config(**sizes, num_hidden_layers=1, vocab_size=20, pad_token_id=0)
    model = with_lora(transformers.Phi3ForCausalLM(config), target_modules=["qkv_proj", "o_proj", "gate_up_proj"])
    tokens = torch.randint(20, (2, 5))
    wanted = gradients(model, tokens)
    report = runlora_gen.accelerate(model, tmp_path, strict=True, kernels=False, tokens=64)
    assert len(report.accelerated) == 3 and report.groups == 0
    torch.testing.assert_close(gradients(model, tokens), wanted, rtol=1e-4, atol=1e-6)


def test_what_was_generated_frozen_is_not_trained_on_it(tmp_path: Any, tokens: Tensor) -> None:
    model = with_lora(target_modules=["q_proj"])
    with pytest.warns(UserWarning, match="2 left: lora_A is trained, and llama_r4 was generated with it frozen"):
        runlora_gen.accelerate(model, tmp_path, kernels=False, tokens=64, train="b")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    assert (
        len(runlora_gen.accelerate(model, tmp_path, strict=True, kernels=False, tokens=64, train="b").accelerated) == 2
    )
    assert len(gradients(model, tokens)) == 2


def test_kernels_that_are_missing_are_named(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = SimpleNamespace(is_cuda=True)
    assert package.shapes.without_kernels(on_gpu) is None, "it was generated without"
    monkeypatch.setattr(package.shapes, "_MODULES", (SimpleNamespace(triton=None),))
    assert package.shapes.without_kernels(SimpleNamespace(is_cuda=False)) is None
    said = package.shapes.without_kernels(on_gpu)
    assert said is not None and said.startswith("Triton is not installed")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generated_for_each_rank(tmp_path: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """``runlora_gen.accelerate``: a package a rank in the cache, generated once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = with_lora(target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2})
    wanted = model(tokens).logits
    report = runlora_gen.accelerate(model, kernels=False, tokens=64, layout=layout)
    assert {(path / "base.py").exists() for path in report.folders} == {layout == "folder"}
    assert [path.name for path in report.folders] == ["llama_r2", "llama_r4"] and len(report.accelerated) == 4
    assert all(path.is_relative_to(tmp_path / "runlora_gen") for path in report.folders) and report.modules == 2
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.py")}
    assert runlora_gen.accelerate(model, kernels=False, tokens=64, layout=layout) == report
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.py")}
    assert len(runlora_gen.restore(model)) == 4
    with pytest.raises(ValueError, match="no LoRA layer of PEFT"):
        runlora_gen.accelerate(llama())


class Gated(torch.nn.Module):
    """With a gate to one number, as shared experts have it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = torch.nn.Linear(16, 24), torch.nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.up(x) * self.gate(x).sigmoid()
        return gated


def test_a_gate_narrower_than_its_rank_is_accelerated(tmp_path: Any) -> None:
    """PEFT's all-linear puts adapters there as well."""
    config = peft.LoraConfig(r=RANK, target_modules=["up", "gate"], init_lora_weights=False)
    model = peft.get_peft_model(Gated(), config)
    x = torch.randn(5, 16)
    wanted = model(x)
    report = runlora_gen.accelerate(model, tmp_path, strict=True, tokens=64)
    assert len(report.accelerated) == 2
    torch.testing.assert_close(model(x), wanted)
