"""Biases of adapters (``lora_bias``) and of their bases, frozen and trained, in PEFT's layers and in injected ones."""

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
from torch import Tensor, nn

from .models import RANK, checkpointed, filled, gradients, llama, with_lora
from .test_runs_in import compiled_gradients, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*"),
    # PEFT takes the bias of an lora_B that it saves for a shard.
    pytest.mark.filterwarnings("ignore:.*LoRA tensor\\(s\\) have invalid shape"),
]

ALL = 14
BIASED = {"attention_bias": True, "mlp_bias": True}
#: Of the base: in all linears, in some, in none.
BASES = {"all": BIASED, "some": {"attention_bias": True}, "none": {}}
bases = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())


def biased(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """With biases of the base that are not zero."""
    model, generator = llama(dtype, **options), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


def peft_model(package: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = with_lora(biased(dtype, **options), lora_bias=True)
    package.accelerate(model, strict=True)
    return model


def plain(name: str) -> str:
    """What an injected layer calls a parameter that PEFT calls so."""
    name = name.removeprefix("base_model.model.").replace("base_layer.", "")
    return name.replace(".default.weight", "").replace("lora_B.default.bias", "lora_bias")


def injected(package: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """With the adapters that ``with_lora`` draws."""
    model, theirs = biased(dtype, **options), with_lora(biased(dtype, **options), lora_bias=True)
    package.inject_lora(model, RANK, 8, lora_bias=True)
    model.load_state_dict({plain(name): tensor for name, tensor in theirs.state_dict().items()})
    return model


both = pytest.mark.parametrize("make", [peft_model, injected], ids=["PEFT", "injected"])
Make = Callable[..., Any]


@both
@bases
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_it_is_what_peft_computes(
    package: Any, tokens: Tensor, make: Make, base: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    theirs, ours = with_lora(biased(dtype, **base), lora_bias=True), make(package, dtype, **base)
    logits = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens).logits, logits, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        few = tokens[:, :1]  # as a model decodes
        torch.testing.assert_close(ours(few).logits, theirs(few).logits, rtol=tolerance, atol=tolerance)
    wanted, found = gradients(theirs, tokens), gradients(ours, tokens)
    assert len(wanted) == 3 * ALL
    for name, gradient in wanted.items():
        one = found[name if make is peft_model else plain(name)]
        torch.testing.assert_close(one, gradient, rtol=100 * tolerance, atol=tolerance)


@pytest.mark.parametrize("trained", ["all", "lora_only"])
@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "lora_bias"])
def test_a_base_bias_may_be_trained(package: Any, tokens: Tensor, trained: str, lora_bias: bool) -> None:
    model = with_lora(biased(**BIASED), bias=trained, lora_bias=lora_bias)
    wanted = gradients(model, tokens)
    assert len(wanted) == (3 + lora_bias) * ALL
    package.accelerate(model, strict=True)
    found = gradients(model, tokens)
    same(found, wanted)
    assert sum(name.endswith("base_layer.bias") for name in found) == ALL


def errors_by_kind(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """Relative errors of the gradients, root mean square over the layers: a single one's may be near none by chance."""
    errors: dict[str, list[Tensor]] = {}
    for name, gradient in exact.items():
        kind = name.partition("_proj.")[2]
        errors.setdefault(kind, []).append((found[name].double() - gradient).norm() / gradient.norm())
    return {kind: torch.stack(each).square().mean().sqrt() for kind, each in errors.items()}


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 base", "autocast"])
@pytest.mark.parametrize("trained", ["none", "all"], ids=["base frozen", "base trained"])
def test_in_16_bits_it_is_as_near_to_the_truth_as_peft(
    package: Any, tokens: Tensor, autocast: bool, trained: str
) -> None:
    """|ours - truth| at most twice |PEFT - truth|; gradients have the dtypes of their parameters."""
    dtype = torch.float32 if autocast else torch.bfloat16
    options = {"lora_bias": True, "bias": trained}
    truth = with_lora(biased(dtype, **BIASED).double(), **options)
    model = with_lora(biased(dtype, **BIASED), **options)
    exact, exact_gradients = truth(tokens).logits, gradients(truth, tokens)
    errors = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = gradients(model, tokens)
            off = (model(tokens).logits.double() - exact).norm()
        errors.append({"logits": off, **errors_by_kind(found, exact_gradients)})
        trains = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
        assert {name: gradient.dtype for name, gradient in found.items()} == trains
        package.accelerate(model, strict=True)
    theirs, ours = errors
    assert len(ours) == 4 + (trained == "all")
    for kind, error in ours.items():
        assert error <= 2 * theirs[kind], kind


@both
def test_a_wide_bias_is_added_in_the_dtype_of_the_base(package: Any, tokens: Tensor, make: Make) -> None:
    model = make(package, torch.bfloat16, **BIASED)
    wide = [p for name, p in model.named_parameters() if p.requires_grad and "bias" in name]
    assert len(wide) == ALL and {p.dtype for p in wide} == {torch.float32}
    assert model(tokens).logits.dtype == torch.bfloat16
    assert all(p.grad is None for p in wide)
    gradients(model, tokens)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in wide)


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(package: Any, tokens: Tensor, make: Make, reentrant: bool) -> None:
    model = make(package, **BIASED).train()
    wanted = gradients(model, tokens)
    checkpointed(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    same(gradients(model, tokens), wanted)


@both
def test_compiled_whole(package: Any, tokens: Tensor, make: Make) -> None:
    model = make(package, num_hidden_layers=1, attention_bias=True)
    wanted = gradients(model, tokens)
    torch._dynamo.reset()
    same(compiled_gradients(model, tokens, fullgraph=True, backend="aot_eager"), wanted)


def test_merged_switched_and_disabled_by_peft(package: Any, tokens: Tensor) -> None:
    """An adapter with a bias beside one without."""
    model = with_lora(biased(**BIASED), lora_bias=True).eval()
    model.add_adapter("second", peft.LoraConfig(r=RANK, lora_alpha=2, target_modules=["q_proj", "up_proj"]))
    filled(model)

    def outputs() -> list[Tensor]:
        found = []
        for name in ("default", "second"):
            model.set_adapter(name)
            found.append(model(tokens).logits)
            with model.disable_adapter():
                found.append(model(tokens).logits)
            model.merge_adapter()
            found.append(model(tokens).logits)
            with model.disable_adapter():  # unmerges
                found.append(model(tokens).logits)
        return found

    wanted = outputs()
    assert not torch.allclose(wanted[0], wanted[1], atol=1e-3)
    package.accelerate(model, strict=True)
    for one, other in zip(outputs(), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    merged = copy.deepcopy(model)
    merged.set_adapter("default")
    logits = merged(tokens).logits
    torch.testing.assert_close(merged.merge_and_unload()(tokens).logits, logits, rtol=1e-4, atol=1e-5)


def test_generate(package: Any, tokens: Tensor) -> None:
    model = with_lora(biased(**BIASED), lora_bias=True).eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(tokens, **options)
    package.accelerate(model, strict=True)
    assert torch.equal(model.generate(tokens, **options), wanted)


def test_injected_it_starts_at_the_base(package: Any, tokens: Tensor) -> None:
    model = biased(**BIASED)
    wanted = model(tokens).logits
    package.inject_lora(model, lora_bias=True)
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "lora_bias"}


def test_injected_merged_and_switched_off(package: Any, tokens: Tensor, tmp_path: Path) -> None:
    model = injected(package, **BIASED).eval()
    adapted, base = model(tokens).logits, biased(**BIASED)(tokens).logits
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    package.merge(model)
    torch.testing.assert_close(model(tokens).logits, adapted, rtol=1e-4, atol=1e-5)
    for module in model.modules():
        if package.adapters.is_lora_layer(module):
            assert not torch.equal(module.bias, module._frozen_bias)
            module.merge()  # a second time changes nothing
    with package.disable_adapter(model):
        torch.testing.assert_close(model(tokens).logits, base, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    assert not list(tmp_path.glob("merged/adapter*"))
    other = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(other(tokens).logits, adapted, rtol=1e-4, atol=1e-5)
    package.unmerge(model)
    assert all(torch.equal(bits[name], tensor) for name, tensor in model.state_dict().items())
    with package.disable_adapter(model):
        torch.testing.assert_close(model(tokens).logits, base, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(tokens).logits, adapted, rtol=1e-5, atol=1e-5)


def test_a_merge_without_a_bias_to_merge_into_is_refused(package: Any) -> None:
    """As PEFT refuses it; and nothing was merged by then."""
    with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
        with_lora(lora_bias=True).merge_adapter()
    model = injected(package, attention_bias=True)
    with pytest.raises(ValueError, match=r"lora_bias can't be merged: model\.layers\.0\.mlp\.gate_proj has no bias"):
        package.merge(model)
    layers = [module for module in model.modules() if package.adapters.is_lora_layer(module)]
    assert len(layers) == ALL and not any(layer.merged for layer in layers)
    with pytest.raises(ValueError, match="lora_bias can't be merged: the base linear has no bias"):
        model.model.layers[0].mlp.gate_proj.merge()
    assert not model.model.layers[0].mlp.gate_proj.merged


@bases
def test_files_are_peft_s(package: Any, tokens: Tensor, folder: str, base: dict[str, Any]) -> None:
    theirs = with_lora(biased(**base), lora_bias=True)
    theirs.save_pretrained(folder)
    wanted = theirs(tokens).logits
    model = biased(**base)
    package.load_adapter(model, folder)
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    again = biased(**base)
    package.inject_lora(again, lora_bias=True)
    package.load_adapter(again, folder)
    torch.testing.assert_close(again(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    package.save_adapter(again, f"{folder}/again")
    assert json.loads(Path(folder, "again", "adapter_config.json").read_text())["lora_bias"] is True
    back = peft.PeftModel.from_pretrained(biased(**base), f"{folder}/again")
    assert len([name for name in back.state_dict() if name.endswith("lora_B.default.bias")]) == ALL
    torch.testing.assert_close(back(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    for made in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(made(tokens).logits, again(tokens).logits)


def test_files_with_and_without_one_do_not_mix(package: Any, folder: str) -> None:
    with_lora(biased(**BIASED), lora_bias=True).save_pretrained(folder)
    model = biased(**BIASED)
    package.inject_lora(model)
    with pytest.raises(ValueError, match="q_proj has a lora_bias in one of the file and the model, not in both"):
        package.load_adapter(model, folder)
    with_lora(biased(**BIASED)).save_pretrained(folder)
    with pytest.raises(ValueError, match="q_proj has a lora_bias in one of the file and the model, not in both"):
        package.load_adapter(injected(package, **BIASED), folder)


@pytest.mark.parametrize(
    ("options", "bias"),
    [
        ({}, "none"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "all"),
        ({"bias": "lora_only", "lora_bias": True}, "lora_bias"),
    ],
    ids=["none", "lora_bias", "all", "both"],
)
def test_what_trains_is_what_is_priced(tmp_path: Path, options: dict[str, Any], bias: str) -> None:
    model = with_lora(biased(**BIASED), **options)
    (folder,) = runlora_gen.generate(model, output=tmp_path, tokens=64, kernels=False)
    assert json.loads((folder / "manifest.json").read_text())["workload"]["bias"] == bias


def test_in_one_line(tmp_path: Path, tokens: Tensor) -> None:
    """Through ``runlora_gen``, both ways."""
    options: dict[str, Any] = {"kernels": False, "tokens": 64, "output": tmp_path / "packages"}
    model = with_lora(biased(**BIASED), lora_bias=True)
    wanted = model(tokens).logits
    assert len(runlora_gen.accelerate(model, strict=True, **options).accelerated) == ALL
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    runlora_gen.save_adapter(model, tmp_path / "adapter")
    ours = biased(**BIASED)
    runlora_gen.inject_lora(ours, RANK, 8, lora_bias=True, **options)
    runlora_gen.load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(ours(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    fresh = biased(**BIASED)
    runlora_gen.load_adapter(fresh, tmp_path / "adapter", **options)
    torch.testing.assert_close(fresh(tokens).logits, wanted, rtol=1e-5, atol=1e-5)


def test_a_hook_on_the_biased_lora_B_is_still_called(package: Any, tokens: Tensor) -> None:
    model = peft_model(package)
    part: nn.Module = model.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"]
    calls: list[int] = []
    part.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="there are hooks on its parts"):
        model(tokens)
    assert calls == [1]
