"""``accelerate`` and ``inject_lora`` on stacks of experts: what PEFT computes, by modules of them."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import pickle
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import runlora_gen
import torch
import torch.nn.functional as F
import transformers
from runlora_gen.generation import Request, generated
from runlora_gen.into_model import with_peft, without_peft
from runlora_gen.into_model.packages import imported, of_rank, packages_in
from runlora_gen.request.architecture import LIVE, Architecture
from runlora_gen.request.experts import Stack
from runlora_gen.request.workload import make_workload
from torch import Tensor, nn

from .models import (
    EXPERTS,
    HIDDEN,
    INNER,
    RANK,
    STACKS,
    TOP_K,
    VOCABULARY,
    checkpointed,
    computes_what_peft_would,
    filled,
    gpt_oss,
    gradients,
    loads_peft_s,
    mixtral,
    nemotron_h,
    qwen3_moe,
)

UP, DOWN = BOTH = STACKS


def package_of(out: Path, rank: int = RANK, inner: int = INNER, activation: str = "", gated: bool = True) -> Any:
    """A package for the experts alone.

    ``activation``: what is between their projections, where that is the modules' own.
    """
    name = "gate_up_proj" if gated else "up_proj"
    options: dict[str, Any] = {"top_k": TOP_K, "bias": False, "count": 1, "module": "mlp.experts"}
    options["activation"] = activation
    stacks = (
        Stack(name, EXPERTS, HIDDEN, 2 * inner if gated else inner, gathers=True, **options),
        Stack("down_proj", EXPERTS, inner, HIDDEN, gathers=False, **options),
    )
    architecture = Architecture("moe", "moe", LIVE, (), stacks=stacks)
    (folder,) = generated(Request({rank: architecture}, make_workload(device="cpu", dtype="fp32")), out)
    return imported(folder)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Those for what is between the projections, each made once."""
    return functools.cache(lambda activation: package_of(tmp_path_factory.mktemp("packages"), activation=activation))


@pytest.fixture(params=["chained", "apart"])
def package(packages: Callable[[str], Any], request: pytest.FixtureRequest) -> Any:
    """That for the model which a test names, by a chain of both projections or by each for itself."""
    callspec: Any = request.node.callspec  # type: ignore[attr-defined]
    name = callspec.params.get("name", "")
    activation = "gpt_oss" if name == "gpt_oss" else "silu_gated"
    return packages(activation if request.param == "chained" else "")


@pytest.fixture(scope="module")
def of_rank_2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return package_of(tmp_path_factory.mktemp("packages"), rank=2)


MODELS: Mapping[str, Callable[..., Any]] = {"qwen3_moe": qwen3_moe, "mixtral": mixtral, "gpt_oss": gpt_oss}


def with_lora(model: Any, targets: Sequence[str] = BOTH, **options: Any) -> Any:
    """A PeftModel with adapters on stacks of experts, and on nothing else."""
    wide = options.pop("autocast_adapter_dtype", True)
    fields = {"r": RANK, "lora_alpha": 8, "target_modules": [], "target_parameters": list(targets), **options}
    return filled(peft.get_peft_model(model, peft.LoraConfig(**fields), autocast_adapter_dtype=wide))


def both_run(package: Any, model: Any, tokens: Tensor, count: int, tolerance: float = 1e-12) -> None:
    """Output and all gradients of PEFT's own code, and then of the modules."""
    wanted, wanted_gradients = model(tokens).logits, gradients(model, tokens)
    report = package.accelerate(model, strict=True)
    assert len(report.accelerated) == count and not report.left
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, found_gradients = model(tokens).logits, gradients(model, tokens)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert found_gradients.keys() == wanted_gradients.keys() and found_gradients
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=100 * tolerance, atol=tolerance)


@pytest.mark.parametrize("targets", [[UP], [DOWN], BOTH], ids=["gate_up", "down", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_peft_s(package: Any, tokens: Tensor, name: str, targets: list[str]) -> None:
    model = with_lora(MODELS[name](torch.float64), targets, use_rslora=True)
    both_run(package, model, tokens, 2 * len(targets))


@pytest.mark.parametrize("activation", ["relu2", ""])
def test_experts_without_a_gate(tmp_path: Path, tokens: Tensor, activation: str) -> None:
    model = with_lora(nemotron_h(torch.float64), ["experts.up_proj", "experts.down_proj"])
    package = package_of(tmp_path, activation=activation, gated=False)
    both_run(package, model, tokens, 2, tolerance=1e-5)  # its router is in float32


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("targets", [[UP], [DOWN], BOTH], ids=["gate_up", "down", "both"])
def test_whatever_transformers_computes_with(
    package: Any, tokens: Tensor, implementation: str, targets: list[str]
) -> None:
    base = qwen3_moe()
    base.set_experts_implementation(implementation)
    both_run(package, with_lora(base, targets), tokens, 2 * len(targets), tolerance=1e-5)


def test_a_trained_router(package: Any, tokens: Tensor) -> None:
    model = with_lora(qwen3_moe(torch.float64, norm_topk_prob=True))
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.requires_grad_(True)
    both_run(package, model, tokens, 4)
    assert any("mlp.gate" in name for name in gradients(model, tokens))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("targets", [[UP], [DOWN], BOTH], ids=["gate_up", "down", "both"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_bf16_is_as_near_to_the_truth_as_peft(package: Any, name: str, targets: list[str], autocast: bool) -> None:
    """The base in bf16, adapters in float32: |ours - truth| at most twice |PEFT - truth|.

    Of one layer's experts: in a model, what is rounded goes to other experts of the next layer.
    """
    truth = with_lora(MODELS[name](torch.bfloat16).double(), targets)
    base = MODELS[name](torch.bfloat16)
    base.set_experts_implementation("grouped_mm")
    model = with_lora(base, targets)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}

    def off(model: Any) -> tuple[torch.dtype, list[Tensor]]:
        dtype = _experts(model).down_proj.dtype
        torch.manual_seed(4)
        x, index = torch.randn(40, HIDDEN).bfloat16().to(dtype), torch.rand(40, EXPERTS).topk(TOP_K).indices
        weights, dy = torch.rand(40, TOP_K).bfloat16().to(dtype), torch.randn(40, HIDDEN).bfloat16().to(dtype)
        layer = model.base_model.model.model.layers[0].mlp.experts
        inputs = [x.requires_grad_(), weights.requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x, index, weights)
        return y.dtype, [y, *torch.autograd.grad(y, inputs, dy)]

    (_, exact), (kind, peft_s) = off(truth), off(model)
    package.accelerate(model, strict=True)
    own, ours = off(model)
    assert own == kind and len(ours) == 3 + 2 * len(targets)
    for one, other, true in zip(ours, peft_s, exact, strict=True):
        assert (one - true).norm() <= 2 * (other - true).norm() + 1e-6


def test_the_dtype_of_the_output_is_the_frozen_model_s(package: Any) -> None:
    """Under autocast a norm in front gives float32, while the experts are in bf16."""
    base = qwen3_moe(torch.bfloat16)
    base.set_experts_implementation("grouped_mm")
    experts = base.model.layers[0].mlp.experts
    x = torch.randn(6, HIDDEN)
    index, weights = torch.tensor([[0, 1]] * 6), torch.full((6, 2), 0.5)
    frozen = experts(x, index, weights)
    model = with_lora(base)
    package.accelerate(model, strict=True)
    layer = model.base_model.model.model.layers[0].mlp.experts
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, index, weights).dtype == frozen.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match.*")  # PEFT reads them all the same
def test_two_ranks_are_of_two_packages(package: Any, of_rank_2: Any, tokens: Tensor) -> None:
    model = with_lora(qwen3_moe(torch.float64), rank_pattern={DOWN: 2})
    ranks = {name: layer.r["default"] for name, layer in package.peft_layers.lora_layers(model).items()}
    assert sorted(ranks.values()) == [2, 2, 4, 4]
    wanted, wanted_gradients = model(tokens).logits, gradients(model, tokens)
    with pytest.raises(ValueError, match=r"rank 2 is not in moe_r4.*down_proj of the same experts is left"):
        package.accelerate(model, strict=True)
    both = (package, of_rank_2)
    layers = package.peft_layers.lora_layers(model)
    assert {name: both[of_rank(layer, both)].shapes.RANK for name, layer in layers.items()} == ranks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not package.accelerate(model).accelerated
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(of_rank_2.accelerate(model).accelerated) == 2, "the others are the other folder's"
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-12, atol=1e-12)
        for name, gradient in gradients(model, tokens).items():
            torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-10, atol=1e-12)
    assert set(packages_in(model)) == set(both)
    assert len(package.restore(model)) == 4 and torch.equal(model(tokens).logits, wanted)


def test_twice_is_once_and_restore_undoes_it(package: Any, tokens: Tensor) -> None:
    model = with_lora(qwen3_moe())
    kinds = {name: type(module) for name, module in model.named_modules()}
    wanted = model(tokens).logits
    first = package.accelerate(model)
    assert "4 of 4 LoRA linears run on generated modules" in str(first) and first.modules == 2
    swapped = {name: type(module) for name, module in model.named_modules()}
    assert package.accelerate(model) == first
    assert {name: type(module) for name, module in model.named_modules()} == swapped != kinds
    layer = model.base_model.model.model.layers[0].mlp.experts
    assert repr(layer).startswith("lora.ParamWrapper(\n  parameter_name='down_proj',\n  accelerated by moe_r4\n")
    assert package.restore(model) == first.accelerated and package.restore(model) == ()
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert torch.equal(model(tokens).logits, wanted)


def test_copies_run_on_the_modules(package: Any, tokens: Tensor) -> None:
    model = with_lora(qwen3_moe())
    package.accelerate(model)
    wanted = model(tokens).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(tokens).logits, wanted)
        assert len(package.restore(again)) == 4


def test_disabled_and_merged_experts_are_as_with_peft(package: Any, tokens: Tensor) -> None:
    model = with_lora(qwen3_moe(torch.float64))
    with model.disable_adapter():
        frozen = model(tokens).logits
    wanted = model(tokens).logits
    package.accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            assert torch.equal(model(tokens).logits, frozen)
        model.merge_adapter()
        torch.testing.assert_close(model(tokens).logits, wanted)
        model.unmerge_adapter()
        torch.testing.assert_close(model(tokens).logits, wanted)
        inner = model.base_model.model.model.layers[0].mlp.experts.base_layer
        inner.merge()
        torch.testing.assert_close(model(tokens).logits, wanted)
        with model.disable_adapter():  # which unmerges it
            torch.testing.assert_close(model(tokens).logits, frozen)
        assert not inner.merged
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, wanted)


def test_adapters_that_come_later_are_judged_when_they_are_used(package: Any, tokens: Tensor) -> None:
    model = with_lora(qwen3_moe(torch.float64))
    package.accelerate(model)
    options = {"lora_alpha": 2, "target_modules": [], "target_parameters": BOTH}
    for name, rank in (("same", RANK), ("other", 2)):
        model.add_adapter(name, peft.LoraConfig(r=rank, **options))
    filled(model)
    plain = copy.deepcopy(model)
    assert len(package.restore(plain)) == 4, "they are the wrappers of the first adapter"
    for name, own in (("same", True), ("other", False), ("default", True)):
        for each in (model, plain):
            each.set_adapter(name)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = model(tokens).logits
        torch.testing.assert_close(found, plain(tokens).logits, rtol=1e-12, atol=1e-12)
        reasons = {str(warning.message) for warning in seen}
        assert reasons == (set() if own else {"experts with LoRA run PEFT's own code: rank 2 is not in moe_r4"})
    for each in (model, plain):
        each.base_model.set_adapter(["default", "same"])
    with pytest.warns(UserWarning, match="2 adapters are active, not one"):
        found = model(tokens).logits
    torch.testing.assert_close(found, plain(tokens).logits)


def test_adapters_are_saved_and_loaded_by_peft(package: Any, tokens: Tensor, folder: str) -> None:
    model = with_lora(qwen3_moe())
    package.accelerate(model)
    model.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(qwen3_moe(), folder, is_trainable=True)
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
    package.accelerate(again, strict=True)
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing(package: Any, tokens: Tensor, use_reentrant: bool) -> None:
    model = with_lora(qwen3_moe(torch.float64))
    wanted = gradients(model, tokens)
    package.accelerate(model, strict=True)
    found = gradients(checkpointed(model.train(), use_reentrant=use_reentrant), tokens)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("targets", [[UP], BOTH], ids=["gate_up", "both"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_compiled_as_a_whole(package: Any, tokens: Tensor, name: str, targets: list[str]) -> None:
    model = with_lora(MODELS[name](), targets)
    wanted = gradients(model, tokens)
    package.accelerate(model, strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, 2 * wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [[UP], BOTH], ids=["gate_up", "both"])
def test_the_output_may_be_changed_in_place(package: Any, targets: list[str]) -> None:
    """As by a model that adds what shared experts give."""
    model = with_lora(qwen3_moe(), targets)
    package.accelerate(model, strict=True)
    layer = model.base_model.model.model.layers[0].mlp.experts
    x, index, weights = torch.randn(6, HIDDEN), torch.tensor([[0, 1]] * 6), torch.full((6, 2), 0.5)
    y, again = (layer(x, index, weights) for _ in range(2))
    y += x
    torch.testing.assert_close(y, again + x)
    y.square().sum().backward()


def _experts(model: Any) -> Any:
    return model.base_model.model.model.layers[0].mlp.experts.get_base_layer()


def _trained(model: Any) -> None:
    _experts(model).down_proj.requires_grad_(True)


def _parametrized(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(_experts(model), "down_proj", nn.Identity())


def _hooked(model: Any) -> None:
    _experts(model).register_forward_hook(lambda *_: None)


def _hooked_inside(model: Any) -> None:
    model.base_model.model.model.layers[0].mlp.experts.base_layer.register_forward_hook(lambda *_: None)


def _replaced(model: Any) -> None:
    experts = _experts(model)
    experts.forward = experts.forward


def _spread(model: Any) -> None:
    _experts(model)._is_expert_parallel = True


def _computed_otherwise(model: Any) -> None:
    _experts(model).config = copy.copy(_experts(model).config)
    _experts(model).config._experts_implementation_internal = "of_somebody"


REFUSED: Mapping[str, tuple[Callable[[Any], None], str]] = {
    "trained": (_trained, "its base weight is trained"),
    "parametrized": (_parametrized, "its base has parametrizations"),
    "hooks": (_hooked, "there are hooks on its parts"),
    "hooks inside": (_hooked_inside, "there are hooks on its parts"),
    "replaced": (_replaced, "its forward was replaced, as Accelerate does for a device_map"),
    "spread": (_spread, "its experts are spread over devices"),
    "otherwise": (_computed_otherwise, "experts computed by of_somebody are not covered"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_covered_is_left_to_peft(package: Any, tokens: Tensor, case: str) -> None:
    """Of the first layer: those of the other run on the modules."""
    change, reason = REFUSED[case]
    model = with_lora(qwen3_moe(torch.float64))
    change(model)
    with pytest.raises(ValueError, match=reason):
        package.accelerate(model, strict=True)
    with pytest.warns(UserWarning, match=rf"^PEFT's own code runs in: .* left: {reason}") as seen:
        report = package.accelerate(model)
    assert len(seen) == 1 and len(report.left) == 2 == len(report.accelerated)
    assert set(report.left.values()) <= {reason, "down_proj of the same experts is left"}


@pytest.mark.parametrize("name", ["gpt_oss"])
def test_biases_are_used_and_left_where_they_are_trained(package: Any, tokens: Tensor, name: str) -> None:
    model = with_lora(MODELS[name](torch.float64))
    _experts(model).down_proj_bias.requires_grad_(True)
    wanted = gradients(model, tokens)
    with pytest.warns(UserWarning, match="its base bias is trained"):
        assert len(package.accelerate(model).accelerated) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gradients(model, tokens)
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", ["trained", "hooks", "hooks inside"])
def test_what_comes_later_is_left_to_peft(package: Any, tokens: Tensor, case: str) -> None:
    change, reason = REFUSED[case]
    model = with_lora(qwen3_moe(torch.float64))
    wanted = model(tokens).logits
    package.accelerate(model, strict=True)
    change(model)
    with pytest.warns(UserWarning, match=f"experts with LoRA run PEFT's own code: {reason}") as seen:
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-12, atol=1e-12)
    assert len(seen) == 1


ROUTER = "mlp.gate.weight"


@pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match.*")
def test_a_router_is_as_with_peft(package: Any, tokens: Tensor) -> None:
    """A single matrix: also of another rank than the package's, disabled, merged, switched and pickled."""
    model = with_lora(qwen3_moe(torch.float64), [*BOTH, ROUTER], rank_pattern={ROUTER: 2})
    both_run(package, model, tokens, 6)
    wanted = model(tokens).logits
    with model.disable_adapter():
        frozen = model(tokens).logits
    assert not torch.equal(frozen, wanted)
    model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(tokens).logits, wanted, rtol=1e-12, atol=1e-12)
    assert len(package.restore(model)) == 6


@pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern keys did not match.*")
def test_all_linear_is_one_graph(tokens: Tensor, tmp_path: Path) -> None:
    """PEFT puts adapters on attention, on experts, of two ranks, and on routers; with PEFT it is none."""
    torch._dynamo.reset()  # other tests have compiled Transformers' code as often as it may be
    config = peft.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    model: Any = peft.get_peft_model(qwen3_moe(), config)
    wanted = gradients(model, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = with_peft.accelerate(model, tmp_path, strict=True)
    assert len(report.accelerated) == 14 and len(report.folders) == 2
    torch._dynamo.reset()  # what other tests compiled counts towards the limit of recompilations
    torch.compile(model, backend="aot_eager", fullgraph=True)(tokens, labels=tokens).loss.backward()
    for name, gradient in wanted.items():
        parameter = model.get_parameter(name)
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-3, atol=1e-4)


def test_other_ranks_are_left(package: Any, tokens: Tensor) -> None:
    model = with_lora(qwen3_moe(), r=2)
    reason = "rank 2 is not in moe_r4"
    wanted = model(tokens).logits
    with pytest.warns(UserWarning, match=reason) as seen:
        report = package.accelerate(model)
    assert len(seen) == 1 and set(report.left.values()) == {reason} and not report.accelerated
    assert torch.equal(model(tokens).logits, wanted)


def test_shapes_that_are_not_there_are_left(tmp_path: Path, tokens: Tensor) -> None:
    model = with_lora(qwen3_moe())
    with pytest.warns(
        UserWarning, match=" left: a stack of experts of 4x24x16 is not in moe_r4 .* gathered experts of 4x16x48 is"
    ):
        assert not package_of(tmp_path, inner=32).accelerate(model).accelerated


def test_a_package_for_linears_leaves_stacks(tmp_path: Path, tokens: Tensor) -> None:
    """Of the shape of one of its linears, too."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * INNER, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, vocab_size=VOCABULARY)
    (folder,) = runlora_gen.generate(config, rank=RANK, output=tmp_path, tokens=64, device="cpu", dtype="fp32")
    linears = imported(folder)
    assert (HIDDEN, 2 * INNER) in linears.shapes.LINEARS
    model = with_lora(qwen3_moe(), target_modules=["q_proj"])
    with pytest.warns(UserWarning, match="4 left: stacks of experts are not in llama_r4"):
        assert len(linears.accelerate(model).accelerated) == 2


def test_float8_is_left(package: Any) -> None:
    model = with_lora(qwen3_moe())
    experts = _experts(model)
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.warns(UserWarning, match=r"a stack of experts in torch.float8_e4m3fn \(Parameter\) is not covered"):
        assert len(package.accelerate(model).accelerated) == 2


@pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match.*")
def test_each_stack_gets_the_package_of_its_rank(of_rank_2: Any, tokens: Tensor, tmp_path: Path) -> None:
    model = with_lora(qwen3_moe(torch.float64), rank_pattern={DOWN: 2})
    wanted = model(tokens).logits
    with pytest.raises(ValueError, match=r"rank 4 is not in moe_r2 .*gate_up_proj of the same experts is left"):
        of_rank_2.accelerate(model, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = with_peft.accelerate(model, tmp_path, strict=True)
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-12, atol=1e-12)
    assert len(report.accelerated) == 4 and report.modules == 2 and len(report.folders) == 2
    assert len(with_peft.restore(model)) == 4


def with_accelerated(package: Any, base: Any) -> Any:
    model = with_lora(base)
    assert len(package.accelerate(model, strict=True).accelerated) == 4
    return model


def injected(package: Any, model: Any, targets: Sequence[str] = BOTH, **options: Any) -> Any:
    report = package.inject_lora(model, RANK, 8, target_parameters=targets, **options)
    assert len(report.accelerated) == 2 * len(targets)
    return filled(model)


@pytest.mark.parametrize("targets", [[UP], [DOWN], BOTH], ids=["gate_up", "down", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_without_peft_it_computes_what_peft_would(
    package: Any, tokens: Tensor, name: str, targets: list[str], folder: str
) -> None:
    model = injected(package, MODELS[name](torch.float64), targets, use_rslora=True)
    computes_what_peft_would(package, model, MODELS[name](torch.float64), tokens, folder, 2 * len(targets))


@pytest.mark.parametrize("targets", [[UP], [DOWN], BOTH], ids=["gate_up", "down", "both"])
def test_adapters_of_peft_are_loaded(package: Any, tokens: Tensor, targets: list[str], folder: str) -> None:
    """Into a model without any, for which they are put in, and into one with others."""
    options = {"use_rslora": True, "alpha_pattern": {targets[0]: 3}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT reads patterns for parameters, and says that it does not
        model = with_lora(qwen3_moe(), targets, **options)
    loads_peft_s(package, model, qwen3_moe, tokens, folder)
    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_parameters"] == sorted(target.removeprefix("mlp.") for target in targets)
    assert config["target_modules"] == []


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (["experts.w1"], {}, "target_parameters: no parameter of the model is called 'experts.w1'"),
        (["mlp.gate.weight"], {}, "an adapter on a parameter of Qwen3MoeTopKRouter is not covered"),
        (BOTH, {"lora_bias": True}, "target_parameters: lora_bias is not covered with them, as in PEFT"),
        (BOTH, {"r": 8}, "r = 8: moe_r4 has modules for rank 4 only"),
        (BOTH, {"target_modules": ["q_proj"]}, "2 left: 16x16 is not in moe_r4"),
        ([], {}, r"target_modules: \(\) fits no linear inside the model"),
    ],
    ids=["name", "router", "lora_bias", "rank", "linear", "nothing"],
)
def test_injection_refused(package: Any, targets: list[str], options: dict[str, Any], message: str) -> None:
    model = qwen3_moe()
    with pytest.raises(ValueError, match=message):
        package.inject_lora(model, target_parameters=targets, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(package.adapters.is_lora_layer(module) for module in model.modules())


def test_injection_refused_for_what_the_model_is(package: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 left: a stack of experts of 4x24x16 is not in moe_r4"):
        package_of(tmp_path, inner=32).inject_lora(qwen3_moe(), target_parameters=[DOWN])
    spread = qwen3_moe()
    spread.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="its experts are spread over devices"):
        package.inject_lora(spread, target_parameters=BOTH)
    for model in (injected(package, qwen3_moe()), with_lora(qwen3_moe())):
        with pytest.raises(ValueError, match="has LoRA layers already"):
            package.inject_lora(model, target_parameters=BOTH)


def test_other_experts_and_the_model_s_config_stay(package: Any, tokens: Tensor) -> None:
    """The implementation of all others may change, as in ``generate``, and adapters go on working."""
    model = qwen3_moe()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = package.inject_lora(model, target_parameters=["layers.0.mlp.experts.down_proj"])
    assert report.accelerated == ("model.layers.0.mlp.experts.down_proj",) and report.modules == 1
    assert str(report).startswith("1 of 1 adapters run on generated modules")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"model.layers.0.mlp.experts.lora.down_proj.{part}" for part in ("lora_A", "lora_B")
    ]
    wanted = filled(model)(tokens).logits
    assert model.config._experts_implementation == "eager"
    model.set_experts_implementation("batched_mm")
    torch.testing.assert_close(model(tokens).logits, wanted)
    assert model.model.layers[1].mlp.experts.config._experts_implementation == "batched_mm"


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_merging_and_disabling(package: Any, tokens: Tensor, name: str) -> None:
    model = MODELS[name](torch.float64)
    frozen = model(tokens).logits
    injected(package, model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = model(tokens).logits
    assert not torch.allclose(wanted, frozen)
    with package.adapters.disable_adapter(model):
        torch.testing.assert_close(model(tokens).logits, frozen, rtol=1e-12, atol=1e-12)
    package.merge(model)
    package.merge(model)
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-12, atol=1e-12)
    with package.adapters.disable_adapter(model):
        torch.testing.assert_close(model(tokens).logits, frozen, rtol=1e-12, atol=1e-12)
    package.unmerge(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_what_a_merge_drops_is_said(package: Any) -> None:
    model = injected(package, mixtral(torch.bfloat16))
    with torch.no_grad():
        for layer in package.adapters.lora_layers(model).values():
            layer.lora_B.mul_(1e-3)
    with pytest.warns(
        UserWarning, match=r"16-bit weights hold less than 99% of the update in 4 layers, least in .*proj"
    ):
        package.merge(model)


def test_save_pretrained_writes_the_adapter_too(package: Any, tokens: Tensor, folder: str) -> None:
    model = injected(package, qwen3_moe())
    wanted = model(tokens).logits
    model.save_pretrained(folder)
    again = transformers.Qwen3MoeForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(again(tokens).logits, wanted)
    package.merge(model)
    model.save_pretrained(f"{folder}_merged")
    merged = transformers.Qwen3MoeForCausalLM.from_pretrained(f"{folder}_merged").eval()
    torch.testing.assert_close(merged(tokens).logits, wanted)


def test_copies_have_adapters_of_their_own(package: Any, tokens: Tensor) -> None:
    model = injected(package, qwen3_moe())
    wanted = model(tokens).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(tokens).logits, wanted)
        package.merge(again)
        torch.testing.assert_close(again(tokens).logits, wanted)
    assert torch.equal(model(tokens).logits, wanted)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_injected_adapters_are_checkpointed(package: Any, tokens: Tensor, use_reentrant: bool) -> None:
    wanted = gradients(injected(package, qwen3_moe(torch.float64)), tokens)
    model = checkpointed(qwen3_moe(torch.float64).train(), use_reentrant=use_reentrant)
    for name, gradient in gradients(injected(package, model), tokens).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt_oss"])
def test_injected_adapters_are_compiled_as_a_whole(package: Any, tokens: Tensor, name: str) -> None:
    model = injected(package, MODELS[name]())
    wanted = gradients(model, tokens)
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager", fullgraph=True)(tokens, labels=tokens).loss.backward()
    for path, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, 2 * wanted[path], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 2}, r"lora_A of model\.layers\..*\.experts\..* is \(4, 2, .*and in the model \(4, 4, "),
        ({"target_parameters": [UP]}, "has an adapter in one of the file and the model, not in both"),
        ({"target_modules": ["q_proj"]}, "has an adapter in one of the file and the model, not in both"),
    ],
    ids=["rank", "fewer", "more"],
)
def test_adapters_of_others_are_refused(package: Any, folder: str, options: dict[str, Any], message: str) -> None:
    with_lora(qwen3_moe(), **options).save_pretrained(folder)
    model = injected(package, qwen3_moe())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        package.load_adapter(model, folder)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("put_in", [with_accelerated, injected], ids=["with PEFT", "without PEFT"])
def test_stacks_of_each_kind_are_run_before_the_first_step(
    package: Any, name: str, put_in: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = put_in(package, MODELS[name]())
    assert package.warmup(model, 8, progress=False).nothing == "no layer lies on a GPU, as a whole and with one adapter"
    warmup = importlib.import_module(f"{package.__name__}.warmup")
    monkeypatch.setattr(warmup, "_is_whole_on_gpu", lambda _: True)
    cases = warmup._cases(model)
    assert len(cases) == 2
    for case in cases:
        warmup._step(case, 8)
        hands_over = getattr(case.given, "hands_over", False)  # it can where the package has chains
        assert len(case.zeros(8)) == (8 if case.given.module.GATHERS else 8 * TOP_K)
        assert len(case.trained) == (1 if hands_over else 2)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_asked_for_is_generated_and_put_in(tokens: Tensor, folder: str, tmp_path: Path) -> None:
    """Of stacks and linears those alone that are targets."""
    model = qwen3_moe()
    report = without_peft.inject_lora(model, RANK, 8, (), target_parameters=[DOWN], output=tmp_path)
    assert len(report.accelerated) == 2
    (made,) = report.folders
    manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    assert [site["module"] for site in manifest["experts"]] == [f"combined_experts_{EXPERTS}x{INNER}x{HIDDEN}_r{RANK}"]
    assert not manifest["layers"] and not manifest["groups"]
    without_peft.save_adapter(filled(model), folder)
    other = qwen3_moe()
    without_peft.load_adapter(other, folder, output=tmp_path / "loaded")
    torch.testing.assert_close(other(tokens).logits, model(tokens).logits)
    with pytest.raises(ValueError, match=r"target_parameters: 'mlp\.gate\.weight' is no stack of experts of the model"):
        without_peft.inject_lora(qwen3_moe(), RANK, target_parameters=["mlp.gate.weight"])


@pytest.mark.parametrize("grouped", [False, True], ids=["linears", "groups"])
def test_beside_linears(tmp_path: Path, tokens: Tensor, grouped: bool) -> None:
    """A package for linears, groups of them, and experts: with PEFT and without it."""
    targets = {"target_modules": "all-linear", "target_parameters": BOTH}
    graph = {"dtype": "bf16", "device": "h100", "launch": "graph", "tokens": 65536}
    options: dict[str, Any] = graph if grouped else {"tokens": 64, "groups": "none"}
    (folder,) = runlora_gen.generate(qwen3_moe(), rank=RANK, output=tmp_path, **targets, **options)
    assert (folder / "groups.py").exists() is grouped
    package = imported(folder)
    model = with_lora(qwen3_moe(torch.float64), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    both_run(package, model, tokens, 12)
    assert "12 of 12 LoRA linears run on generated modules" in str(package.accelerate(model))
    assert len(package.restore(model)) == 12
    adapter = str(tmp_path / "adapter")
    model.save_pretrained(adapter)
    other = qwen3_moe(torch.float64)
    package.load_adapter(other, adapter)
    torch.testing.assert_close(other(tokens).logits, model(tokens).logits, rtol=1e-12, atol=1e-12)
    package.save_adapter(other, adapter)
    again = peft.PeftModel.from_pretrained(qwen3_moe(torch.float64), adapter, autocast_adapter_dtype=False)
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-12, atol=1e-12)


def _gated(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    """Experts whose gate is this function's."""

    def apply(_: Any, u: Tensor) -> Tensor:
        return function(*u.chunk(2, -1))

    def change(experts: Any) -> None:
        experts._apply_gate = types.MethodType(apply, experts)

    return change


def _alternating(experts: Any) -> None:
    experts._apply_gate = types.MethodType(lambda _, u: F.silu(u[..., 0::2]) * u[..., 1::2], experts)


def _raising(experts: Any) -> None:
    """For so few rows as what is between is tried on."""

    def apply(_: Any, u: Tensor) -> Tensor:
        if u.shape[0] < 8:
            raise RuntimeError("too few rows")
        gate, up = u.chunk(2, -1)
        return F.silu(gate) * up

    experts._apply_gate = types.MethodType(apply, experts)


class Learned(nn.Module):
    """A SiLU, as long as its parameter is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


def _learned(experts: Any) -> None:
    experts.act_fn = Learned()


def _limited(experts: Any) -> None:
    experts.limit = 5.0


def _steep(experts: Any) -> None:
    experts.alpha = 1.6


#: Models whose experts are called as others, and do something else between their projections.
IMPOSTORS: Mapping[str, tuple[str, Callable[[Any], None]]] = {
    "another activation": ("qwen3_moe", _gated(lambda gate, up: torch.tanh(gate) * up)),
    "scaled gate": ("qwen3_moe", _gated(lambda gate, up: F.silu(1.01 * gate) * up)),
    "clamped": ("qwen3_moe", _gated(lambda gate, up: F.silu(gate.clamp(max=40)) * up.clamp(-40, 40))),
    "swapped": ("qwen3_moe", _gated(lambda gate, up: F.silu(up) * gate)),
    "alternating": ("qwen3_moe", _alternating),
    "residual": ("qwen3_moe", _gated(lambda gate, up: F.silu(gate) * up + 0.01 * up)),
    "another gradient": ("qwen3_moe", _gated(lambda gate, up: F.silu(gate.detach()) * up + 0 * gate)),
    "shifted": ("qwen3_moe", _gated(lambda gate, up: F.silu(gate) * up + 1)),
    "norm": ("qwen3_moe", _gated(lambda gate, up: F.rms_norm(F.silu(gate) * up, (INNER,)))),
    "learned": ("qwen3_moe", _learned),
    "raising": ("qwen3_moe", _raising),
    "another limit": ("gpt_oss", _limited),
    "another alpha": ("gpt_oss", _steep),
}


def impostor(case: str) -> Any:
    name, change = IMPOSTORS[case]
    model = MODELS[name]()
    model.set_experts_implementation("batched_mm")  # which asks the experts for what is between
    for module in model.modules():
        if hasattr(module, "gate_up_proj"):
            change(module)
    return model


@pytest.mark.parametrize("case", IMPOSTORS)
def test_what_does_something_else_between_is_left_to_peft(
    packages: Callable[[str], Any], tokens: Tensor, case: str
) -> None:
    """By a chain; by each projection for itself it is computed."""
    activation = "gpt_oss" if IMPOSTORS[case][0] == "gpt_oss" else "silu_gated"
    chained, model = packages(activation), with_lora(impostor(case))
    wanted, wanted_gradients = model(tokens).logits, gradients(model, tokens)
    reason = f"between its projections is not what moe_r4 has there: {activation}"
    with pytest.raises(ValueError, match=reason):
        chained.accelerate(model, strict=True)
    with pytest.warns(UserWarning, match=f"4 left: {reason}"):
        report = chained.accelerate(model)
    assert set(report.left.values()) == {reason} and not report.accelerated
    assert torch.equal(model(tokens).logits, wanted)
    for name, gradient in gradients(model, tokens).items():
        assert torch.equal(gradient, wanted_gradients[name])
    both_run(packages(""), model, tokens, 4, tolerance=1e-5)


@pytest.mark.parametrize("case", IMPOSTORS)
def test_what_does_something_else_between_is_generated_for_without_a_chain(
    packages: Callable[[str], Any], tokens: Tensor, case: str, tmp_path: Path, folder: str
) -> None:
    """With PEFT and without it."""
    model = with_lora(impostor(case))
    wanted, wanted_gradients = model(tokens).logits, gradients(model, tokens)
    report = with_peft.accelerate(model, tmp_path / "accelerated", strict=True)
    assert len(report.accelerated) == 4
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model, tokens).items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-3, atol=1e-5)
    model.save_pretrained(folder)
    other = impostor(case)
    chained = packages("gpt_oss" if IMPOSTORS[case][0] == "gpt_oss" else "silu_gated")
    with pytest.raises(ValueError, match=r"target_parameters: .*between its projections is not what moe_r4 has there"):
        chained.inject_lora(other, RANK, 8, target_parameters=BOTH)
    assert not any(chained.adapters.is_lora_layer(module) for module in other.modules())
    without_peft.load_adapter(other, folder, output=tmp_path / "injected")
    torch.testing.assert_close(other(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    for place in ("accelerated", "injected"):
        (path,) = (tmp_path / place).glob("*/manifest.json")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        assert {site["module"].partition("_")[0] for site in manifest["experts"]} == {"gathered", "combined"}
        assert [stack["activation"] for stack in manifest["stacks"]] == ["", ""]


@pytest.mark.parametrize("states", [("disabled",), ("merged",), ("merged", "disabled")], ids="-".join)
@pytest.mark.parametrize("which", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_one_stack_of_a_chain_is_switched_off_alone(
    packages: Callable[[str], Any], tokens: Tensor, name: str, which: str, states: tuple[str, ...]
) -> None:
    """Without PEFT; it computes what modules that are no chain do."""
    found = []
    for activation in ("gpt_oss" if name == "gpt_oss" else "silu_gated", ""):
        package = packages(activation)
        model = injected(package, MODELS[name](torch.float64))
        before = model(tokens).logits
        for layer in package.adapters.lora_layers(model).values():
            if layer.stack.name == which and "merged" in states:
                layer.merge()
            if layer.stack.name == which and "disabled" in states:
                layer.disable_adapters = True
        found.append((model(tokens).logits, gradients(model, tokens)))
        assert torch.allclose(found[-1][0], before) == ("disabled" not in states)
    (ours, our_gradients), (expected, expected_gradients) = found
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert our_gradients.keys() == expected_gradients.keys() and len(our_gradients) == 4
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(our_gradients[parameter], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ["silu_gated", "gpt_oss", ""])
def test_a_manifest_says_what_is_between(packages: Callable[[str], Any], activation: str, tmp_path: Path) -> None:
    """From it the same package comes again; older ones do not say it."""
    made = Path(packages(activation).__file__).parent
    path = made / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    assert [stack["activation"] for stack in manifest["stacks"]] == [activation] * 2
    options = {"rank": RANK, "device": "cpu", "dtype": "fp32"}
    (again,) = runlora_gen.generate(path, output=tmp_path / "again", **options)
    for file in made.glob("*.py"):
        assert (again / file.name).read_text(encoding="utf-8") == file.read_text(encoding="utf-8")
    for stack in manifest["stacks"]:
        del stack["activation"]
    older = tmp_path / "older" / made.name / "manifest.json"
    older.parent.mkdir(parents=True)
    older.write_text(json.dumps(manifest), encoding="utf-8")
    (plain,) = runlora_gen.generate(older, output=tmp_path / "plain", **options)
    assert {file.name.partition("_")[0] for file in plain.glob("*_experts_*.py")} == {"gathered", "combined"}
