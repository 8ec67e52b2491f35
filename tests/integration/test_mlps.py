"""Gated MLPs as a whole: in models, what PEFT computes, and where they can't be, its linears one by one."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import subprocess
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import runlora_gen
import torch
import transformers
from runlora_gen.into_model.packages import imported, packages_in
from runlora_gen.request.layout import LAYOUTS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from .conftest import takes_long
from .models import MLPS_PAY, RANK, VOCABULARY, bitwise, checkpointed, filled, gradients, llama, with_lora
from .test_checkpointing import Products
from .test_groups import compiled_whole, functions_in
from .test_runs_in import both, injected, peft_model, same

#: More than the tokens that are few without gradients.
MANY = 130
HIDDEN, BETWEEN = 64, 96
NAMES = ("gate_proj", "up_proj", "down_proj")
Make = Callable[..., Any]
Calls = Callable[[], int]


@pytest.fixture
def package(with_mlps: Any) -> Any:
    return with_mlps


@pytest.fixture(scope="module")
def of_gemma(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("packages")
    (folder,) = runlora_gen.generate(built("Gemma2"), rank=RANK, output=out, **MLPS_PAY)
    return imported(folder)


@pytest.fixture(scope="module")
def of_rank_2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("packages")
    (folder,) = runlora_gen.generate(llama(), rank=2, output=out, **MLPS_PAY)
    return imported(folder)


def counted(package: Any, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """How often MLPs of a package have been computed as a whole since it was asked last."""
    made: list[Any] = []
    compute = package.mlps.compute
    monkeypatch.setattr(
        package.mlps, "compute", lambda function, *given: made.append(function) or compute(function, *given)
    )

    def count() -> int:
        total = len(made)
        made.clear()
        return total

    return count


@pytest.fixture
def calls(package: Any, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return counted(package, monkeypatch)


@pytest.fixture
def long() -> Tensor:
    return torch.randint(VOCABULARY, (2, MANY // 2), generator=torch.Generator().manual_seed(2))


def built(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A family's language model of the sizes of ``llama``."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": BETWEEN, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    name = {"Gemma3": "Gemma3Text"}.get(family, family)
    config = getattr(transformers, f"{name}Config")(**{**sizes, **heads, **options})
    return getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)


def mlp(model: Any, layer: int = 0) -> Any:
    return [module for module in model.modules() if hasattr(module, "gate_proj")][layer]


def both_run(
    package: Any, model: Any, tokens: Tensor, calls: Calls, *, whole: int = 2, tolerance: float = 1e-12
) -> Any:
    """Output and all gradients of PEFT's own code, and then of the modules; what is said of these."""
    wanted, wanted_gradients = model(tokens).logits, gradients(model, tokens)
    report = package.accelerate(model, strict=True)
    assert report.mlps == whole and not report.apart
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, found_gradients = model(tokens).logits, gradients(model, tokens)
    assert calls() == 2 * whole
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert found_gradients.keys() == wanted_gradients.keys() and found_gradients
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=100 * tolerance, atol=tolerance)
    return report


def as_peft(package: Any, model: Any, tokens: Tensor) -> None:
    """Gradients of an accelerated model are those of PEFT's own code on a copy of it."""
    plain = copy.deepcopy(model)
    package.restore(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gradients(model, tokens)
    same(found, gradients(plain, tokens))


# What is computed


@pytest.mark.parametrize("with_mlps", LAYOUTS, indirect=True, scope="session")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_outputs_and_gradients_are_peft_s(
    package: Any, tokens: Tensor, calls: Calls, dtype: torch.dtype, tolerance: float
) -> None:
    model = with_lora(llama(dtype), use_rslora=True, alpha_pattern={"up_proj": 3, "down_proj": 5})
    report = both_run(package, model, tokens, calls, tolerance=tolerance)
    assert len(report.accelerated) == 14 and report.modules == 6
    assert "14 of 14 LoRA linears" in str(report) and "6 modules; 6 of them in 2 groups; 2 MLPs as a whole)" in str(
        report
    )


@pytest.mark.parametrize("family", ["Qwen3", "Mistral", "Olmo2"])
def test_other_families(package: Any, tokens: Tensor, calls: Calls, family: str) -> None:
    both_run(package, with_lora(built(family, torch.float64)), tokens, calls)


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3"])
def test_another_activation(of_gemma: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    # Its norms are of float32.
    model = with_lora(built(family, torch.float64))
    both_run(of_gemma, model, tokens, counted(of_gemma, monkeypatch), tolerance=1e-5)


def test_of_another_activation_it_is_none(package: Any, of_gemma: Any, tokens: Tensor, calls: Calls) -> None:
    model = with_lora(built("Gemma2"))
    report = package.accelerate(model, strict=True)
    (reason,) = set(report.apart.values())
    assert report.mlps == 0 and len(report.apart) == 2
    assert reason == f"it does something else than llama_r{RANK} has for one of its shapes: down(silu_gated(gate, up))"
    assert f"MLPs one by one: 2 left: {reason} (base_model.model.model.layers.0.mlp, …)" in str(report)
    as_peft(package, model, tokens)
    assert calls() == 0


@both
def test_injected_and_accelerated_are_one(package: Any, tokens: Tensor, calls: Calls, make: Make) -> None:
    wanted = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): gradient
        for name, gradient in gradients(with_lora(), tokens).items()
    }
    model = make(package)
    for _ in range(2):
        found = gradients(model, tokens)
        same({n.removeprefix("base_model.model.").replace(".default.weight", ""): g for n, g in found.items()}, wanted)
        assert calls() == 2


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_bf16_is_as_near_to_the_truth_as_peft(package: Any, calls: Calls, autocast: bool) -> None:
    """|ours - truth| at most twice |PEFT - truth|: a base in bf16 with adapters in float32, or all in float32.

    Of one MLP: in a model, what others round comes first.
    """
    dtype = torch.float32 if autocast else torch.bfloat16
    truth, model = with_lora(llama(dtype).double()), with_lora(llama(dtype))
    assert mlp(model).up_proj.lora_A["default"].weight.dtype == torch.float32

    def off(model: Any) -> tuple[torch.dtype, list[Tensor]]:
        dtype = mlp(model).up_proj.base_layer.weight.dtype
        torch.manual_seed(4)
        x, dy = (torch.randn(200, HIDDEN).bfloat16().to(dtype) for _ in range(2))
        inputs = [x.requires_grad_(), *(p for p in mlp(model).parameters() if p.requires_grad)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = mlp(model)(x)
        return y.dtype, [y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))]

    (_, exact), (kind, peft_s) = off(truth), off(model)
    package.accelerate(model, strict=True)
    own, ours = off(model)
    assert calls() == 1 and own == kind and len(ours) == 2 + 6
    for one, other, true in zip(ours, peft_s, exact, strict=True):
        assert one.dtype == other.dtype and (one - true).norm() <= 2 * (other - true).norm() + 1e-6


@pytest.mark.parametrize("trained", ["none", "all", "lora_only"])
def test_biases(package: Any, tokens: Tensor, calls: Calls, trained: str) -> None:
    """Of the model's linears, which PEFT may let be trained, and of adapters."""
    model = llama(torch.float64, mlp_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in NAMES:
                getattr(layer.mlp, name).bias.normal_()
    options = {"lora_bias": True} if trained == "none" else {"bias": trained}
    model = with_lora(model, target_modules=list(NAMES), **options)
    both_run(package, model, tokens, calls)
    assert len(gradients(model, tokens)) == 6 * 3


def test_of_an_adapter_only_some_is_trained(package: Any, tokens: Tensor, calls: Calls) -> None:
    model = with_lora(llama(torch.float64))
    for name, parameter in model.named_parameters():
        if "gate_proj.lora_A" in name or "down_proj.lora_B" in name or "layers.1.mlp.up_proj" in name:
            parameter.requires_grad_(False)
    both_run(package, model, tokens, calls)


def test_a_package_for_a_frozen_lora_a(tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**MLPS_PAY, "train": ("b",), "tokens": 256}  # where it pays
    (folder,) = runlora_gen.generate(llama(), rank=RANK, output=tmp_path, **options)
    package = imported(folder)
    calls = counted(package, monkeypatch)
    model = with_lora(llama(torch.float64))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    both_run(package, model, tokens, calls)
    mlp(model).gate_proj.lora_A["default"].weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="lora_A is trained, and .* was generated with it frozen"):
        gradients(model, tokens)
    assert calls() == 1


@both
def test_inputs_of_any_kind(package: Any, calls: Calls, make: Make) -> None:
    """As what the MLP's own class gives for them: any strides, no tokens, gradients wanted or not."""
    module = mlp(make(package))
    wide = torch.randn(5, 3, 2 * HIDDEN, generator=torch.Generator().manual_seed(4))
    inputs = {
        "transposed": wide[..., :HIDDEN].transpose(0, 1),
        "every other": wide[..., ::2],
        "expanded": wide[:1, :, :HIDDEN].expand(7, 3, HIDDEN),
        "two dimensions": wide[0, :, HIDDEN:],
        "one": wide[0, 0, :HIDDEN],
        "none": wide[:0, :, :HIDDEN],
    }
    parameters = [p for p in module.parameters() if p.requires_grad]
    for name, x in inputs.items():
        for wanted in (False, True):
            found = []
            for forward in (type(module).forward, type(module).replaces.forward):
                leaf = x.detach().requires_grad_(wanted)
                y = forward(module, leaf)
                found.append([y, *torch.autograd.grad(y.square().sum(), [*parameters, *([leaf] if wanted else [])])])
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)
    assert calls() == 2 * len(inputs)


@both
def test_few_tokens_without_gradients_run_linear_by_linear(package: Any, calls: Calls, make: Make) -> None:
    """Each linear has a short way for them."""
    module = mlp(make(package))
    for context in (torch.no_grad, torch.inference_mode):
        for tokens, count in ((128, 0), (129, 1)):
            x = torch.randn(1, tokens, HIDDEN)
            with context():
                found = module(x)
                assert calls() == count
                torch.testing.assert_close(found, type(module).replaces.forward(module, x), rtol=1e-4, atol=1e-5)


@both
def test_evaluation_and_generation(package: Any, tokens: Tensor, long: Tensor, calls: Calls, make: Make) -> None:
    model = make(package).eval()
    plain = with_lora().eval()
    with torch.no_grad():
        torch.testing.assert_close(model(long).logits, plain(long).logits, rtol=1e-4, atol=1e-5)
        assert calls() == 2
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(input_ids=tokens, **options), plain.generate(input_ids=tokens, **options))
        assert calls() == 0
        torch.testing.assert_close(model.generate(input_ids=long, **options), plain.generate(input_ids=long, **options))
        assert calls() == 2, "of the prompt"


# Adapters


def test_a_rank_of_one_linear_alone(package: Any, of_rank_2: Any, tokens: Tensor, calls: Calls) -> None:
    """Its MLP runs linear by linear; the linears that stay are a package's, and the others another's."""
    model = with_lora(rank_pattern={r"layers\.0\.mlp\.down_proj": 2})
    wanted, plain = gradients(model, tokens), copy.deepcopy(model)
    with pytest.warns(UserWarning, match=f"1 left: rank 2 is not in llama_r{RANK}"):
        report = package.accelerate(model)
    assert report.mlps == 1 and not report.apart
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert of_rank_2.accelerate(model).mlps == 0
        same(gradients(model, tokens), wanted)
    assert calls() == 1 and package.mlps.is_whole(mlp(model, 1)) and not package.mlps.is_whole(mlp(model))
    assert len(package.restore(model)) == 14
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


def test_two_ranks_in_one_model(tmp_path: Path, tokens: Tensor) -> None:
    """MLPs of each are their package's."""
    model = with_lora(rank_pattern={r"layers\.0\.mlp\..*": 2})
    wanted = gradients(model, tokens)
    report = runlora_gen.accelerate(model, tmp_path, strict=True, **MLPS_PAY)
    assert len(report.folders) == 2 and report.mlps == 2 and not report.apart
    assert "2 MLPs as a whole" in str(report)
    modules = [type(mlp(model, layer))._runlora_function.__module__ for layer in range(2)]
    assert modules[0].endswith("mlp_64x96_r2") and modules[1].endswith(f"mlp_64x96_r{RANK}")
    same(gradients(model, tokens), wanted)
    assert len(runlora_gen.restore(model)) == 14 and type(mlp(model)) is type(llama().model.layers[0].mlp)


@pytest.mark.parametrize("targets", [["gate_proj", "up_proj"], ["down_proj"], ["q_proj"]])
def test_mlps_with_some_adapters_are_none(package: Any, tokens: Tensor, calls: Calls, targets: list[str]) -> None:
    model, bare = with_lora(target_modules=targets), llama()
    report = package.accelerate(model, strict=True)
    assert (report.mlps, report.apart) == (0, {}) and "MLP" not in str(report)
    as_peft(package, model, tokens)
    assert package.inject_lora(bare, target_modules=targets).mlps == 0
    gradients(bare, tokens)
    assert calls() == 0


def test_disabled_merged_and_unloaded(package: Any, tokens: Tensor, calls: Calls) -> None:
    model = with_lora(llama(torch.float64))
    with model.disable_adapter():
        frozen = model(tokens).logits
    wanted = model(tokens).logits
    package.accelerate(model, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            assert torch.equal(model(tokens).logits, frozen)
        model.merge_adapter()
        torch.testing.assert_close(model(tokens).logits, wanted)
        model.unmerge_adapter()
        assert calls() == 0
        torch.testing.assert_close(model(tokens).logits, wanted)
        assert calls() == 2
        mlp(model).up_proj.merge()
        torch.testing.assert_close(model(tokens).logits, wanted)
        assert calls() == 1
        mlp(model).up_proj.unmerge()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, wanted)
    assert calls() == 0
    kind = type(llama().model.layers[0].mlp)
    for copied in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        assert type(mlp(copied)) is kind, "what holds no adapter needs no package"
        torch.testing.assert_close(copied(tokens).logits, wanted)


def test_adapters_that_come_later(package: Any, tokens: Tensor, calls: Calls) -> None:
    """Switched to, several at a time, and deleted: judged when they are used."""
    model = with_lora()
    package.accelerate(model, strict=True)
    second: dict[str, Any] = {"r": RANK, "lora_alpha": 2, "target_modules": "all-linear"}
    model.add_adapter("second", peft.LoraConfig(**second))
    model.add_adapter("some", peft.LoraConfig(**{**second, "target_modules": ["gate_proj", "up_proj"]}))
    model.add_adapter("other", peft.LoraConfig(**{**second, "r": 2}))
    filled(model)
    for name, count in (("second", 2), ("some", 0), ("other", 0), ("default", 2)):
        model.set_adapter(name)
        as_peft(package, model, tokens)
        assert calls() == count, name
    model.base_model.set_adapter(["default", "second"])
    as_peft(package, model, tokens)
    assert calls() == 0
    model.base_model.set_adapter("second")
    model.delete_adapter("default")
    as_peft(package, model, tokens)
    assert calls() == 2


def test_rows_with_adapters_of_their_own(package: Any, tokens: Tensor, calls: Calls) -> None:
    """PEFT hands each row's adapter to the linears, by hooks: its own code runs."""
    model = with_lora().eval()
    package.accelerate(model, strict=True)
    model.add_adapter("second", peft.LoraConfig(r=RANK, lora_alpha=2, target_modules="all-linear"))
    filled(model).eval()
    plain = copy.deepcopy(model)
    package.restore(plain)
    names = ["default", "second"]
    with pytest.warns(UserWarning, match="a call with adapter_names is not covered"):
        found = model(tokens, adapter_names=names).logits
    torch.testing.assert_close(found, plain(tokens, adapter_names=names).logits)
    assert calls() == 0


def test_modules_to_save(package: Any, tokens: Tensor, calls: Calls) -> None:
    """Copies that are trained in whole: beside MLPs, of a norm, and of a linear of MLPs."""
    model = with_lora(modules_to_save=["lm_head", "norm"])
    both_run(package, model, tokens, calls, tolerance=1e-5)
    model = with_lora(target_modules=["q_proj", "gate_proj", "up_proj"], modules_to_save=["down_proj"])
    assert package.accelerate(model, strict=True).mlps == 0
    as_peft(package, model, tokens)
    assert calls() == 0


def test_with_dropout_only_evaluation_is_whole(package: Any, tokens: Tensor, calls: Calls) -> None:
    model = with_lora(lora_dropout=0.5)
    with pytest.warns(UserWarning, match="14 left: lora_dropout"):
        assert package.accelerate(model).mlps == 0
    with pytest.warns(UserWarning, match="generated without --dropout"):
        gradients(model.train(), tokens)
    assert calls() == 0
    as_peft(package, model.eval(), tokens)
    assert calls() == 2


# Calls of which some would be left out


def _hooked(module: nn.Module, seen: list[str]) -> list[Any]:
    return [
        module.register_forward_pre_hook(lambda *_: seen.append("before")),
        module.register_forward_hook(lambda *_: seen.append("after")),
        module.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]


@both
@pytest.mark.parametrize("child", ["", *NAMES, "act_fn"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # where the input wants no gradient
def test_hooks_run(package: Any, tokens: Tensor, calls: Calls, make: Make, child: str) -> None:
    """Those of the MLP itself around it as a whole."""
    model = make(package)
    wanted = gradients(model, tokens)
    calls()
    seen: list[str] = []
    handles = _hooked(mlp(model, 1).get_submodule(child), seen)
    same(gradients(model, tokens), wanted)
    assert seen == ["before", "after", "backward"] and calls() == (1 if child else 2)
    for handle in handles:
        handle.remove()
    same(gradients(model, tokens), wanted)
    assert calls() == 2


@both
def test_a_hook_that_changes_what_the_mlp_gives(package: Any, tokens: Tensor, make: Make) -> None:
    model = make(package)
    wanted = model(tokens).logits
    handle = mlp(model).act_fn.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not torch.allclose(model(tokens).logits, wanted)
    handle.remove()
    torch.testing.assert_close(model(tokens).logits, wanted)


@both
def test_children_that_are_replaced_later(package: Any, tokens: Tensor, calls: Calls, make: Make) -> None:
    model = make(package)
    own = type(mlp(model)).replaces

    def apart() -> None:
        """All of them are: as by the class's own forward."""
        logits = model(tokens).logits
        assert calls() == 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mlp(model), "forward", types.MethodType(own.forward, mlp(model)))
            torch.testing.assert_close(logits, model(tokens).logits)
        calls()

    for name, other in (
        ("down_proj", nn.Linear(BETWEEN, HIDDEN)),
        ("gate_proj", nn.Linear(HIDDEN, BETWEEN)),
        ("act_fn", nn.GELU()),
        ("act_fn", nn.Sequential(nn.SiLU(), nn.Tanh())),
    ):
        former = getattr(mlp(model), name)
        setattr(mlp(model), name, other)
        apart()
        setattr(mlp(model), name, former)
    model(tokens)
    assert calls() == 2


@both
@pytest.mark.parametrize("child", [*NAMES, "act_fn"])
def test_a_forward_of_a_child_s_own(package: Any, tokens: Tensor, calls: Calls, make: Make, child: str) -> None:
    """As Accelerate and others put them in."""
    model = make(package)
    wanted = model(tokens).logits
    module = getattr(mlp(model), child)
    module.forward = lambda x, former=module.forward: 2 * former(x)
    calls()
    found = model(tokens).logits
    assert calls() == 1 and not torch.allclose(found, wanted)
    del module.forward
    torch.testing.assert_close(model(tokens).logits, wanted)
    assert calls() == 2


@both
def test_a_forward_of_the_mlp_s_own(package: Any, tokens: Tensor, calls: Calls, make: Make) -> None:
    model = make(package)
    wanted = model(tokens).logits
    module = mlp(model)
    module.forward = lambda x, former=module.forward: former(x)
    calls()
    torch.testing.assert_close(model(tokens).logits, wanted)
    assert calls() == 2
    module.forward = lambda x: x
    assert not torch.allclose(model(tokens).logits, wanted)


class Scaled(nn.Module):
    """A gated MLP that takes more than an input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj = nn.Linear(HIDDEN, BETWEEN)
        self.up_proj = nn.Linear(HIDDEN, BETWEEN)
        self.down_proj = nn.Linear(BETWEEN, HIDDEN)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y * scale


def test_more_arguments_are_the_class_s_own_affair(package: Any, calls: Calls) -> None:
    """And an MLP may be the model."""
    model = Scaled()
    assert package.inject_lora(model).mlps == 1
    filled(model)
    x = torch.randn(5, HIDDEN)
    y = model(x)
    assert calls() == 1
    for found in (model(x, 2.0), model(x, scale=2.0), model(x=x, scale=2.0), 2 * model(x=x)):
        torch.testing.assert_close(found, 2 * y, rtol=1e-4, atol=1e-5)
    assert calls() == 0
    with pytest.raises(TypeError):
        model()


def test_a_base_weight_that_is_trained_later(package: Any, tokens: Tensor, calls: Calls) -> None:
    model = with_lora()
    package.accelerate(model, strict=True)
    mlp(model).down_proj.base_layer.weight.requires_grad_(True)
    as_peft(package, model, tokens)
    assert calls() == 1
    assert mlp(model).down_proj.base_layer.weight.grad is not None


def test_linears_of_other_dtypes(package: Any, calls: Calls) -> None:
    """Are called one by one, and what they say of it is theirs."""
    module = mlp(peft_model(package))
    x = torch.randn(5, HIDDEN)
    module(x)
    assert calls() == 1
    module.down_proj.double()
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        module(x)
    module.act_fn.register_forward_hook(lambda module, inputs, output: output.double())
    assert module(x).dtype == torch.float64 and calls() == 0


# Others of the same names


class Impostor(nn.Module):
    """What a Llama's MLP is but for what it does."""

    def __init__(self, of: Any, how: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = of.gate_proj, of.up_proj, of.down_proj
        self.act_fn = nn.GELU() if how == "another activation" else of.act_fn
        self.how = how
        if how == "a parameter":
            self.scale = nn.Parameter(torch.full((BETWEEN,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.how == "clamped":
            gate = gate.clamp(max=1.0)
        hidden = self.act_fn(gate) * up
        if self.how == "a parameter":
            hidden = hidden * self.scale
        y: Tensor = self.down_proj(hidden)
        return 1.5 * y if self.how == "scaled" else y + x if self.how == "added" else y


IMPOSTORS = ("another activation", "scaled", "clamped", "added", "a parameter")


@pytest.mark.parametrize("how", IMPOSTORS)
def test_impostors_are_left(package: Any, tokens: Tensor, calls: Calls, how: str) -> None:
    """Beside an MLP that is one; named, with the reason."""

    def model() -> Any:
        base = llama()
        base.model.layers[0].mlp = Impostor(base.model.layers[0].mlp, how)
        return base

    adapted = with_lora(model())
    wanted = gradients(adapted, tokens)
    report = package.accelerate(adapted, strict=True)
    assert report.mlps == 1 and list(report.apart) == ["base_model.model.model.layers.0.mlp"]
    assert "MLPs one by one: 1 left: it does something else than" in str(report) and "; 1 MLP as a whole)" in str(
        report
    )
    assert type(mlp(adapted)) is Impostor
    same(gradients(adapted, tokens), wanted)
    assert calls() == 1
    bare = model()
    report = package.inject_lora(bare, RANK, 8)
    assert report.mlps == 1 and list(report.apart) == ["model.layers.0.mlp"] and type(mlp(bare)) is Impostor
    gradients(bare, tokens)
    assert calls() == 1


def test_what_is_none_any_more_is_left_by_a_second_call(package: Any, tokens: Tensor, calls: Calls) -> None:
    model = peft_model(package)
    mlp(model).act_fn = nn.GELU()
    report = package.accelerate(model)
    assert report.mlps == 1 and len(report.apart) == 1 and not package.mlps.is_whole(mlp(model))
    as_peft(package, model, tokens)
    assert calls() == 1


def test_dispatched_models_are_left(package: Any, tokens: Tensor, calls: Calls) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate (the test extra)")
    model = accelerate.dispatch_model(with_lora(), {"": "cpu"}, force_hooks=True)
    wanted = gradients(with_lora(), tokens)
    with pytest.warns(UserWarning, match="14 left: its forward was replaced, as Accelerate does"):
        assert package.accelerate(model).mlps == 0
    same(gradients(model, tokens), wanted)
    assert calls() == 0
    model = peft_model(package)
    own = mlp(model)
    accelerate.hooks.add_hook_to_module(own, accelerate.hooks.ModelHook())
    same(gradients(model, tokens), wanted)
    assert calls() == 2, "put around it as a whole"
    report = package.accelerate(model)
    assert report.mlps == 1 and set(report.apart.values()) == {
        "its forward was replaced, as Accelerate does for a device_map"
    }
    same(gradients(model, tokens), wanted)
    assert calls() == 1
    package.restore(model)
    same(gradients(model, tokens), wanted)


# Copies, files, and the way back


COPIES: dict[str, Callable[[Any, Path], Any]] = {
    "copy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "file": lambda model, folder: _through_a_file(model, folder / "model.pt"),
}


def _through_a_file(model: Any, file: Path) -> Any:
    torch.save(model, file)
    return torch.load(file, weights_only=False)


@both
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_whole(package: Any, tokens: Tensor, calls: Calls, tmp_path: Path, make: Make, how: str) -> None:
    model = make(package)
    wanted = gradients(model, tokens)
    other = COPIES[how](model, tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    calls()
    same(gradients(other, tokens), wanted)
    assert calls() == 2 and type(mlp(other)) is type(mlp(model))
    shallow = copy.copy(mlp(other))
    x = torch.randn(3, HIDDEN)
    torch.testing.assert_close(shallow(x), mlp(other)(x))
    assert calls() == 2
    single = copy.deepcopy(mlp(other))
    torch.testing.assert_close(single(x), mlp(other)(x))
    assert calls() == 2


READ = """
import sys
import torch

sys.path.insert(0, sys.argv[1])
model, x, y = torch.load(sys.argv[2], weights_only=False)
assert type(model).__name__ == "LlamaMLP" and type(model) is not type(model).replaces
torch.testing.assert_close(model(x), y)
"""


def test_another_process_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package's folder is on the path; nothing else of ours is there."""
    (folder,) = runlora_gen.generate(llama(), rank=RANK, output=tmp_path, **MLPS_PAY)
    vendored = folder.rename(tmp_path / "vendored_for_another_process")
    monkeypatch.syspath_prepend(tmp_path)
    model, x, file = llama(), torch.randn(5, HIDDEN), tmp_path / "mlp.pt"
    assert importlib.import_module(vendored.name).inject_lora(model).mlps == 2
    module = mlp(filled(model))
    torch.save((module, x, module(x).detach()), file)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", READ, str(tmp_path), str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_twice_is_once_and_restore_undoes_it(package: Any, tokens: Tensor, calls: Calls) -> None:
    model = with_lora()
    kinds = {name: type(module) for name, module in model.named_modules()}
    fields = {name: set(vars(module)) for name, module in model.named_modules() if ".mlp" in name}
    state, text = list(model.state_dict()), repr(mlp(model).act_fn)
    wanted = model(tokens).logits
    first = package.accelerate(model)
    swapped = {name: type(module) for name, module in model.named_modules()}
    assert package.accelerate(model) == first and (first + first).mlps == 4
    assert {name: type(module) for name, module in model.named_modules()} == swapped != kinds
    assert list(model.state_dict()) == state and repr(mlp(model).act_fn) == text
    kind = kinds["base_model.model.model.layers.0.mlp"]
    assert isinstance(mlp(model), kind) and repr(mlp(model)).startswith(kind.__name__ + "(")
    for _ in range(2):
        calls()
        torch.testing.assert_close(model(tokens).logits, wanted)
        assert calls() == 2
        assert package.restore(model) == first.accelerated and package.restore(model) == ()
        assert {name: type(module) for name, module in model.named_modules()} == kinds
        assert {name: set(vars(model.get_submodule(name))) for name in fields} == fields
        assert torch.equal(model(tokens).logits, wanted) and calls() == 0
        assert package.accelerate(model) == first


def test_one_that_is_restored_alone(package: Any, tokens: Tensor, calls: Calls) -> None:
    model = peft_model(package)
    wanted = gradients(model, tokens)
    calls()
    package.restore(mlp(model).up_proj)
    same(gradients(model, tokens), wanted)
    assert calls() == 1
    assert len(package.restore(mlp(model, 1))) == 3
    same(gradients(model, tokens), wanted)
    assert calls() == 0


def test_mlps_that_another_package_takes(package: Any, tokens: Tensor, calls: Calls, tmp_path: Path) -> None:
    """One that has none as a whole, and another one of the same."""
    model = peft_model(package)
    wanted = gradients(model, tokens)
    layers = {f"layers.{i}.mlp.{name}": getattr(mlp(model, i), name) for i in range(2) for name in NAMES}
    for groups, count in (("none", 0), ("auto", 2)):
        (folder,) = runlora_gen.generate(llama(), rank=RANK, output=tmp_path / groups, **MLPS_PAY, groups=groups)
        other = imported(folder)
        other.with_peft.swap(layers, model.base_model.model.model)
        calls()
        with pytest.MonkeyPatch.context() as patch:
            theirs = counted(other, patch) if count else lambda: 0
            same(gradients(model, tokens), wanted)
            assert (calls(), theirs()) == (0, count)
    assert len(package.restore(model)) == 14


def test_adapters_are_saved_and_loaded_by_peft(package: Any, tokens: Tensor, calls: Calls, folder: str) -> None:
    model = with_lora()
    package.accelerate(model)
    model.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    wanted = gradients(model, tokens)
    same(gradients(again, tokens), wanted)
    package.accelerate(again, strict=True)
    calls()
    same(gradients(again, tokens), wanted)
    assert calls() == 2
    again.load_adapter(folder, "second")
    again.set_adapter("second")
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
    assert calls() == 4


# Without PEFT


def test_injected_adapters_are_peft_s(package: Any, tokens: Tensor, calls: Calls, folder: str) -> None:
    """Saved, and loaded by PEFT; saved by that, and loaded."""
    model = injected(package)
    package.save_adapter(model, folder)
    other = peft.PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    torch.testing.assert_close(model(tokens).logits, other(tokens).logits, rtol=1e-5, atol=1e-5)
    filled(other).save_pretrained(folder)
    again = llama()
    assert set(again.state_dict()) < set(model.state_dict())
    package.load_adapter(again, folder)
    calls()
    torch.testing.assert_close(again(tokens).logits, other(tokens).logits, rtol=1e-5, atol=1e-5)
    assert calls() == 2


@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "with biases"])
def test_injected_adapters_are_merged_and_switched_off(
    package: Any, tokens: Tensor, calls: Calls, lora_bias: bool
) -> None:
    model = llama(torch.float64, attention_bias=True, mlp_bias=True)
    frozen = model(tokens).logits
    package.inject_lora(model, RANK, 8, lora_bias=lora_bias)
    wanted = filled(model).train()(tokens).logits
    assert calls() == 2 and not torch.allclose(wanted, frozen)
    package.merge(model)
    torch.testing.assert_close(model(tokens).logits, wanted)
    package.unmerge(model)
    assert calls() == 0
    torch.testing.assert_close(model.eval()(tokens).logits, wanted)
    assert calls() == 2
    for name in NAMES:
        getattr(mlp(model), name).disable_adapters = True
    model(tokens)
    assert calls() == 1
    for name in NAMES:
        getattr(mlp(model, 1), name).disable_adapters = True
    for layer in range(2):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(model.model.layers[layer].self_attn, name).disable_adapters = True
    torch.testing.assert_close(model(tokens).logits, frozen)


# Checkpoints, and what is kept


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_equal_to_the_bit(
    package: Any, long: Tensor, calls: Calls, make: Make, reentrant: bool
) -> None:
    model = make(package).train()
    wanted = gradients(model, long)
    calls()
    checkpointed(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    for _ in range(2):
        bitwise(gradients(model, long), wanted)
        assert calls() == 4


@both
def test_a_recomputation_stops_before_the_last_product(package: Any, tokens: Tensor, make: Make) -> None:
    """That of a frozen MLP, whose output no backward reads, does so, too."""
    model = make(package).train()
    again_computed = checkpointed(copy.deepcopy(model), use_reentrant=False)
    once, twice = Products(), Products()
    with once:
        wanted = gradients(model, tokens)
    with twice:
        bitwise(gradients(again_computed, tokens), wanted)
    of_gate_and_up = ((tokens.numel(), HIDDEN), (HIDDEN, BETWEEN))
    of_down = ((tokens.numel(), BETWEEN), (BETWEEN, HIDDEN))
    assert once.found[of_gate_and_up] and twice.found[of_gate_and_up] > once.found[of_gate_and_up]
    assert twice.found[of_down] == once.found[of_down] >= 2


@both
def test_what_is_kept(package: Any, make: Make) -> None:
    """X, gate and up, and what is as wide as a rank: nothing of what is between, nor what down reads."""
    module, tokens = mlp(make(package)), 40
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    wide = []
    for forward in (type(module).forward, type(module).replaces.forward):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = forward(module, torch.randn(tokens, HIDDEN, requires_grad=True))
        wide.append(
            Counter(t.shape[-1] for storage, t in kept.items() if storage not in parameters and len(t) == tokens)
        )
        y.sum().backward()
    ours, theirs = wide
    assert ours == {HIDDEN: 1, BETWEEN: 2, RANK: 3}
    assert theirs[BETWEEN] > 2


# torch.compile


@pytest.mark.parametrize(("make", "checkpoints"), [(peft_model, False), (peft_model, True), (injected, True)])
def test_compiled_whole(package: Any, tokens: Tensor, make: Make, checkpoints: bool) -> None:
    graph = compiled_whole(make(package, num_hidden_layers=1), tokens, checkpoints=checkpoints)
    assert functions_in(graph) == 3, "q, k, v · o · the MLP"


def test_a_dynamic_sequence_is_compiled_once(package: Any) -> None:
    model = peft_model(package, num_hidden_layers=1)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, backend=counter)
    for length in (5, 33, 12, 90):
        ids = torch.randint(VOCABULARY, (2, length))
        torch._dynamo.mark_dynamic(ids, 1)  # raises where the code is made for one length
        wanted = gradients(model, ids)
        model.zero_grad()
        step(ids).backward()
        same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, wanted)
    assert counter.frame_count == 1


def test_compiled_alone_it_runs_what_it_would(package: Any) -> None:
    """Another scaling is one more graph for all; with a hook, and switched off, it is its linears one by one."""
    module = mlp(peft_model(package))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda x: module(x * 2), fullgraph=True, backend=counter)
    x = torch.randn(5, HIDDEN, requires_grad=True)

    def check() -> int:
        inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
        found, wanted = step(x), module(x * 2)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        both = [torch.autograd.grad(y.square().sum(), inputs, allow_unused=True) for y in (found, wanted)]
        for one, other in zip(*both, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        return functions_in(counter.graphs[-1])

    for scaling in (1.0, 1.5, 0.5, 3.0):
        module.down_proj.scaling["default"] = scaling
        assert check() == 1
    assert counter.frame_count == 2
    module.up_proj.enable_adapters(False)
    assert check() == 2
    module.up_proj.enable_adapters(True)
    check()
    assert counter.frame_count == 3, "the second graph again"
    with torch.no_grad():
        torch.testing.assert_close(step(x), module(x * 2))


@takes_long
@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpointed"])
def test_compiled_by_inductor(package: Any, tokens: Tensor, checkpoints: bool) -> None:
    model = peft_model(package).train()
    wanted = gradients(model, tokens)
    if checkpoints:
        checkpointed(model, use_reentrant=False)
        model.disable_input_require_grads()
    torch._dynamo.reset()
    step = torch.compile(lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        step(tokens).backward()
        same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted)


# Around them


def test_warmup_on_a_cpu_has_nothing_to_compile(package: Any) -> None:
    for model in (peft_model(package), injected(package)):
        assert str(package.warmup(model)).startswith("nothing to compile: no layer lies on a GPU")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="warms up kernels of Triton's")
def test_warmup_runs_one_mlp_of_each_kind(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the linears of one that runs linear by linear now."""
    model = peft_model(package)
    warming = sys.modules[f"{package.__name__}.warmup"]
    monkeypatch.setattr(warming, "_is_whole_on_gpu", lambda _: True)
    cases = warming._cases(model)
    assert sorted(len(case.operands) for case in cases) == [1, 3, 3], "o · q, k, v · gate, up, down"
    for case in cases:
        warming._step(case, 5)
    assert all(p.grad is None for p in model.parameters())
    mlp(model).down_proj.merge()
    assert sorted(len(case.operands) for case in warming._cases(model)) == [1, 1, 3, 3]
    mlp(model).down_proj.unmerge()
    for layer in range(2):
        mlp(model, layer).act_fn.register_forward_hook(lambda *_: None)
    assert sorted(len(case.operands) for case in warming._cases(model)) == [1, 1, 1, 3]


def test_a_backward_within_a_backward(package: Any) -> None:
    """As where a checkpoint of its own making computes again: what both nodes give is differentiated there."""
    module = mlp(peft_model(package))

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            with torch.no_grad():
                return module(x)  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            given = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                torch.autograd.backward(module(given), gradient)
            return given.grad

    found = []
    for run in (Again.apply, module):
        module.zero_grad()
        leaf = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(4)).requires_grad_()
        run(leaf).square().sum().backward()
        found.append([leaf.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 1 + 6
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@both
def test_the_output_may_be_changed_in_place(package: Any, make: Make) -> None:
    """As by a residual that is added to it, also where a checkpoint computes again."""
    module = mlp(make(package))
    x = torch.randn(2, 5, HIDDEN, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        y: Tensor = module(x)
        y += x
        return y

    wanted = torch.autograd.grad((module(x) + x).square().sum(), x)
    for y in (block(x), *(checkpoint(block, x, use_reentrant=False) for _ in range(2))):
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x), wanted)


@pytest.mark.parametrize("made", [peft_model, injected])
def test_of_a_model_with_mlps_its_package_is_known(package: Any, made: Make) -> None:
    """What stands in front of an MLP is called as its own class, which is of Transformers."""
    model = made(package)
    assert type(mlp(model)).__module__.startswith("transformers.")
    assert list(packages_in(model)) == [package]
    assert "no layer lies on a GPU" in runlora_gen.warmup(model, MANY, progress=False).nothing


def test_a_training_stops_and_is_resumed(package: Any, tmp_path: Path) -> None:
    """Trainer, four steps at once, and two with a checkpoint and two from it."""
    pytest.importorskip("accelerate", reason="needs accelerate (the test extra)")
    data = [{"input_ids": ids, "labels": ids} for ids in torch.arange(16 * 6).view(16, 6) % VOCABULARY]

    def train(folder: Path, stop: int, resume: bool = False) -> dict[str, Tensor]:
        class Stop(transformers.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = state.global_step >= stop

        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            seed=3,
            disable_tqdm=True,
        )
        model = peft_model(package)
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[Stop()])
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    resumed = train(tmp_path / "parts", 4, resume=True)
    assert len(whole) == 28
    bitwise(resumed, whole)
