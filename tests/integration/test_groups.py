"""Linears that share their input: computed together by whoever is called first, without a change to the model."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import pickle
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import runlora_gen
import torch
import transformers
from runlora_gen.into_model.packages import imported
from runlora_gen.request.layout import LAYOUTS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from .conftest import takes_long
from .models import RANK, VOCABULARY, checkpointed, filled, gradients, llama, with_lora
from .test_runs_in import same

#: More than the tokens that are few without gradients.
MANY = 130


@pytest.fixture
def package(with_groups: Any) -> Any:
    return with_groups


in_both_layouts = pytest.mark.parametrize("with_groups", LAYOUTS, indirect=True, scope="session")


@pytest.fixture
def calls(package: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often groups have been computed since it was asked last."""
    made: list[Any] = []
    compute = package.groups.compute
    monkeypatch.setattr(
        package.groups, "compute", lambda function, *given: made.append(function) or compute(function, *given)
    )

    def count() -> int:
        total = len(made)
        made.clear()
        return total

    return count


@pytest.fixture
def long() -> Tensor:
    return torch.randint(VOCABULARY, (2, MANY // 2), generator=torch.Generator().manual_seed(2))


def peft_model(package: Any, **options: Any) -> Any:
    model = with_lora(llama(**options))
    assert package.accelerate(model, strict=True).groups == 2 * model.config.num_hidden_layers
    return model


def injected(package: Any, **options: Any) -> Any:
    """With the adapters that ``with_lora`` draws."""
    model = llama(**options)
    package.inject_lora(model, RANK, 8)
    state = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): tensor
        for name, tensor in with_lora(llama(**options)).named_parameters()
        if "lora_" in name
    }
    assert state and not model.load_state_dict(state, strict=False).unexpected_keys
    return model


Make = Callable[..., Any]
both = pytest.mark.parametrize("make", [peft_model, injected], ids=["PEFT", "injected"])


def attention(model: Any, layer: int = 0) -> Any:
    return [module for module in model.modules() if hasattr(module, "q_proj")][layer]


def shelf(model: Any) -> Any:
    return attention(model).q_proj._group._shelf


def alone(model: Any) -> Any:
    """The same model, its linears computed one by one."""
    for module in model.modules():
        if getattr(module, "_group", None) is not None:
            module._group = None
    return model


# What is in a group, and what is said of it


@both
@in_both_layouts
def test_outputs_and_gradients_are_those_of_linears_alone(
    package: Any, tokens: Tensor, calls: Callable[[], int], make: Make
) -> None:
    wanted = gradients(alone(make(package)), tokens)
    assert calls() == 0
    model = make(package)
    for _ in range(2):
        same(gradients(model, tokens), wanted)
        assert calls() == 4 and shelf(model).waiting is None


def test_a_report_counts_groups(package: Any) -> None:
    model = with_lora()
    report = package.accelerate(model)
    assert (report.grouped, report.groups, report.modules) == (10, 4, 6)
    assert "14 of 14 LoRA linears" in str(report) and "6 modules; 10 of them in 4 groups)" in str(report)
    groups = [module._group for module in model.modules() if hasattr(module, "_group")]
    assert package.accelerate(model) == report, "a second call changes nothing"
    assert [module._group for module in model.modules() if hasattr(module, "_group")] == groups
    assert (report + report).groups == 8 and (report + report).grouped == 20
    report = package.inject_lora(llama())
    assert (report.grouped, report.groups, report.modules) == (10, 4, 6)
    partly = package.accelerate(with_lora(target_modules=["q_proj", "k_proj", "gate_proj", "up_proj"]))
    assert (partly.grouped, partly.groups) == (4, 2), "only where all of a group have adapters"
    assert " in " not in str(package.accelerate(with_lora(target_modules=["q_proj"])))


def test_restored_layers_are_in_no_group(package: Any, tokens: Tensor, calls: Callable[[], int]) -> None:
    model = peft_model(package)
    kept = weakref.ref(attention(model).q_proj._group)
    state = list(model.state_dict())
    package.restore(model)
    gc.collect()
    assert kept() is None and not any("_group" in vars(module) for module in model.modules())
    model(tokens)
    assert calls() == 0 and list(model.state_dict()) == state
    package.accelerate(model)
    model(tokens)
    assert calls() == 4
    package.restore(attention(model).k_proj)
    model(tokens)
    assert calls() == 3, "those that were in a group with it are alone"
    package.accelerate(model)
    model(tokens)
    assert calls() == 4


def test_layers_that_another_package_takes(
    package: Any, tokens: Tensor, calls: Callable[[], int], tmp_path: Path
) -> None:
    """They are in no group of this one any more."""
    model = peft_model(package)
    wanted = gradients(model, tokens)
    calls()
    (folder,) = runlora_gen.generate(llama(), rank=RANK, tokens=64, kernels=False, groups="none", output=tmp_path)
    imported(folder).with_peft.swap({"k": attention(model).k_proj, "up": attention(model, 1).k_proj}, model)
    same(gradients(model, tokens), wanted)
    assert calls() == 2


@both
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_grouped_among_themselves(
    package: Any, tokens: Tensor, calls: Callable[[], int], make: Make, copied: Any
) -> None:
    model = make(package)
    wanted = gradients(model, tokens)
    attention(model).q_proj(torch.randn(2, 64, requires_grad=True))  # the others' outputs wait, and are not copied
    calls()
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    del model
    gc.collect()
    same(gradients(other, tokens), wanted)
    assert calls() == 4
    single = copied(attention(other).q_proj)
    assert [reference() for reference in single._group._members if reference is not None] == [single]
    torch.testing.assert_close(single(torch.ones(1, 64)), attention(other).q_proj(torch.ones(1, 64)))
    assert calls() == 1, "the copy of a single linear copied no other"


@both
def test_a_shallow_copy_takes_no_place(package: Any, tokens: Tensor, calls: Callable[[], int], make: Make) -> None:
    """It shares the group of the linear that it is a copy of, and computes alone."""
    model = make(package)
    linear = attention(model).q_proj
    other = copy.copy(linear)
    assert other._group is linear._group and linear._group._members[0]() is linear
    x = torch.randn(2, 64, requires_grad=True)
    torch.testing.assert_close(other(x), linear(x))
    calls()
    gradients(model, tokens)
    assert calls() == 4


@both
def test_a_model_is_freed_with_its_last_reference(package: Any, tokens: Tensor, make: Make) -> None:
    """Groups hold no linear: no garbage collection is needed for the memory of a model."""
    module = attention(make(package))
    layer = weakref.ref(module.q_proj)
    gc.collect()
    gc.disable()
    try:
        del module
        assert layer() is None
    finally:
        gc.enable()


# Calls


class Trio(nn.Module):
    """Three linears that share an input, by themselves."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(64, 64, bias=bias)
        self.k_proj = nn.Linear(64, 32, bias=bias)
        self.v_proj = nn.Linear(64, 32, bias=bias)


@pytest.fixture(params=["PEFT", "injected"])
def trio(request: pytest.FixtureRequest, package: Any) -> Any:
    if request.param == "PEFT":
        wrapped = peft.get_peft_model(Trio(), peft.LoraConfig(r=RANK, target_modules=["q_proj", "k_proj", "v_proj"]))
        assert package.accelerate(wrapped, strict=True).groups == 1
        return filled(wrapped).base_model.model
    model = Trio()
    assert package.inject_lora(model).groups == 1
    return filled(model)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(4)).requires_grad_()


def by_itself(layer: Any, x: Tensor) -> Tensor:
    """What a linear gives for x where nothing waits, nor will."""
    group, layer._group = layer._group, None
    try:
        output: Tensor = layer(x)
    finally:
        layer._group = group
    return output


def check(layer: Any, x: Tensor, *, backward: bool = True) -> None:
    """That it gives what it does by itself, and is differentiated so."""
    found = layer(x)
    wanted = by_itself(layer, x)
    torch.testing.assert_close(found, wanted)
    if backward and wanted.requires_grad:
        inputs = [p for p in (x, *layer.parameters()) if p.requires_grad]
        ours, theirs = (torch.autograd.grad(y.square().mean(), inputs, retain_graph=True) for y in (found, wanted))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def waits(trio: Any) -> bool:
    return trio.q_proj._group._shelf.waiting is not None


@pytest.mark.parametrize("order", ["qkv", "vkq", "kqv", "qqkv", "qkkv", "qkvq", "qkvqkv"])
def test_calls_in_any_order(trio: Any, x: Tensor, calls: Callable[[], int], order: str) -> None:
    for name in order:
        check(getattr(trio, f"{name}_proj"), x)
    assert calls() == 1 + (len(order) > 4 or order == "qkvq")
    assert waits(trio) == (order == "qkvq")


def test_what_is_not_called_is_dropped(trio: Any, x: Tensor, calls: Callable[[], int]) -> None:
    check(trio.q_proj, x)
    output = weakref.ref(trio.q_proj._group._shelf.waiting.outputs[1])
    y = x * 2
    check(trio.q_proj, y)
    assert output() is None and calls() == 2
    check(trio.k_proj, y)
    check(trio.v_proj, y)
    assert not waits(trio) and trio.q_proj._group._left == 0


def test_another_tensor_is_computed_alone(trio: Any, x: Tensor, calls: Callable[[], int]) -> None:
    """As in cross-attention: after two times the group is none, and that is said once."""
    other = (x.detach() + 1).requires_grad_()
    for step in range(4):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            check(trio.q_proj, x)
            for layer in (trio.k_proj, trio.v_proj):
                check(layer, other)
        assert calls() == (1 if step < 2 else 0)
        assert not waits(trio)
        assert len(seen) == (step == 2)
        if seen:
            assert "q_proj, k_proj, v_proj of" in str(seen[0].message)
            assert "one by one from now on" in str(seen[0].message)


def test_a_view_or_a_copy_is_another_tensor(trio: Any, x: Tensor) -> None:
    check(trio.q_proj, x)
    check(trio.k_proj, x.view_as(x))
    check(trio.v_proj, x.detach())


def test_an_input_that_is_changed_between_calls(trio: Any, calls: Callable[[], int]) -> None:
    x = torch.randn(200, 64)
    check(trio.q_proj, x, backward=False)
    x.add_(1)
    check(trio.k_proj, x)
    check(trio.v_proj, x)
    assert calls() == 1 and not waits(trio)
    for layer in (trio.q_proj, trio.k_proj, trio.v_proj):
        check(layer, x)
    assert calls() == 1
    check(trio.q_proj, x, backward=False)
    x.add_(1)
    check(trio.q_proj, x)
    assert calls() == 2, "as another one"


def test_changes_of_tensors_of_inference_mode_can_t_be_seen(trio: Any, calls: Callable[[], int]) -> None:
    with torch.inference_mode():
        x = torch.randn(200, 64)
        check(trio.q_proj, x)
        x.add_(1)
        check(trio.k_proj, x)
    with torch.no_grad():
        check(trio.q_proj, x)
        check(trio.k_proj, x)
    assert calls() == 0


@pytest.mark.parametrize("part", ["weight", "lora_A", "lora_B"])
def test_parameters_that_are_changed_between_calls(trio: Any, x: Tensor, part: str) -> None:
    check(trio.q_proj, x)
    with torch.no_grad():
        found = dict(trio.k_proj.named_parameters())
        next(p for name, p in found.items() if part in name.replace("base_layer.", "")).add_(1)
    check(trio.k_proj, x)
    check(trio.v_proj, x)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.no_grad, torch.enable_grad),
        (torch.enable_grad, torch.no_grad),
        (torch.no_grad, torch.inference_mode),
        (torch.enable_grad, functools.partial(torch.autocast, "cpu", torch.bfloat16)),
        (
            functools.partial(torch.autocast, "cpu", torch.bfloat16),
            functools.partial(torch.autocast, "cpu", torch.half),
        ),
        (functools.partial(torch.autocast, "cpu", torch.bfloat16), torch.enable_grad),
    ],
)
def test_a_mode_that_changes_between_calls(trio: Any, calls: Callable[[], int], first: Any, second: Any) -> None:
    x = torch.randn(200, 64).requires_grad_()
    with first():
        check(trio.q_proj, x, backward=False)
    with second():
        found = trio.k_proj(x)
        wanted = by_itself(trio.k_proj, x)
        torch.testing.assert_close(found, wanted)
        assert found.dtype == wanted.dtype and found.requires_grad == wanted.requires_grad
        assert found.is_inference() == wanted.is_inference()
        check(trio.v_proj, x, backward=False)
    assert calls() == 1 + (second is not torch.inference_mode)


def test_few_tokens_without_gradients_are_computed_alone(trio: Any, calls: Callable[[], int]) -> None:
    with torch.no_grad():
        for tokens, count in ((128, 0), (129, 1)):
            x = torch.randn(1, tokens, 64)
            for layer in (trio.q_proj, trio.k_proj, trio.v_proj):
                check(layer, x)
            assert calls() == count


def test_an_exception_between_two_calls(trio: Any, x: Tensor, calls: Callable[[], int]) -> None:
    for _ in range(3):
        with pytest.raises(ValueError, match="not the model's"):
            trio.q_proj(x)
            raise ValueError("not the model's")
        y = x * 2
        for layer in (trio.q_proj, trio.k_proj, trio.v_proj):
            check(layer, y)
        assert not waits(trio)
    assert calls() == 6, "what is left now and then counts for nothing"


def test_hooks_of_a_linear_run_at_its_own_call(trio: Any, x: Tensor, calls: Callable[[], int]) -> None:
    seen = []
    handles = [
        trio.k_proj.register_forward_hook(lambda module, inputs, output: seen.append("after")),
        trio.k_proj.register_forward_pre_hook(lambda module, inputs: seen.append("before")),
    ]
    trio.q_proj(x)
    assert not seen
    trio.k_proj(x)
    trio.v_proj(x)
    assert seen == ["before", "after"] and calls() == 1
    for handle in handles:
        handle.remove()
    handle = trio.k_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    trio.q_proj(x)
    torch.testing.assert_close(trio.k_proj(x), by_itself(trio.k_proj, x))
    handle.remove()


def test_gradients_of_some_outputs(trio: Any, x: Tensor) -> None:
    q, _, _ = (layer(x) for layer in (trio.q_proj, trio.k_proj, trio.v_proj))
    found = torch.autograd.grad(q.sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(by_itself(trio.q_proj, x).sum(), x))


# Adapters


def test_scalings_and_biases_are_each_linear_s(package: Any, x: Tensor, calls: Callable[[], int]) -> None:
    names = ["q_proj", "k_proj", "v_proj"]
    config = peft.LoraConfig(r=RANK, target_modules=names, alpha_pattern={"k_proj": 2, "v_proj": 3})
    theirs = filled(peft.get_peft_model(Trio(bias=True), config))
    ours = copy.deepcopy(theirs)
    package.accelerate(ours, strict=True)
    for name in names:
        one, other = (getattr(model.base_model.model, name) for model in (ours, theirs))
        torch.testing.assert_close(one(x), other(x))
    assert calls() == 1
    ours.base_model.model.k_proj.scaling["default"] = 7.0
    check(ours.base_model.model.q_proj, x)
    ours.base_model.model.k_proj.scaling["default"] = 8.0
    check(ours.base_model.model.k_proj, x)


def test_weights_of_conv1d(package: Any, x: Tensor, calls: Callable[[], int]) -> None:
    model = Trio()
    for name, layer in list(model.named_children()):
        setattr(model, name, transformers.pytorch_utils.Conv1D(layer.out_features, layer.in_features))
    assert package.inject_lora(model).groups == 1
    filled(model)
    for layer in (model.q_proj, model.k_proj, model.v_proj):
        check(layer, x)
    assert calls() == 1


def test_a_member_that_can_t_leaves_the_others_alone(trio: Any, x: Tensor, calls: Callable[[], int]) -> None:
    def together() -> int:
        calls()
        for layer in (trio.q_proj, trio.k_proj, trio.v_proj):
            torch.testing.assert_close(layer(x), by_itself(layer, x))
        return calls()

    k = trio.k_proj
    assert together() == 1
    if hasattr(k, "base_layer"):
        k.merge()
        assert together() == 0
        k.unmerge()
        k.enable_adapters(False)
        assert together() == 0
        k.enable_adapters(True)
        k.set_adapter([])
        assert together() == 0
        k.set_adapter(["default"])
        handle = k.lora_B["default"].register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match="there are hooks on its parts"):
            assert together() == 0
        handle.remove()
        k.update_layer("wide", 8, lora_alpha=8, config=peft.LoraConfig(r=8))
        k.set_adapter(["wide"])
        with pytest.warns(UserWarning, match=f"rank 8 is not in llama_r{RANK}"):
            assert together() == 0
        k.update_layer("second", RANK, lora_alpha=8, config=peft.LoraConfig(r=RANK))
        k.set_adapter(["second"])
        assert together() == 1, "which of its adapters is active is its own affair"
        k.set_adapter(["default"])
    else:
        k.merge()
        assert together() == 0
        k.unmerge()
        k.disable_adapters = True
        assert together() == 0
        k.disable_adapters = False
    assert together() == 1
    trio.q_proj(x)
    k.merge()
    torch.testing.assert_close(k(x), by_itself(k, x))


def test_a_member_of_another_dtype_or_device(trio: Any, x: Tensor, calls: Callable[[], int]) -> None:
    trio.k_proj.double()
    for layer in (trio.q_proj, trio.v_proj):
        check(layer, x)
    check(trio.k_proj, x.double())
    trio.k_proj.to("meta")
    check(trio.q_proj, x)
    assert calls() == 0


def test_with_dropout_only_evaluation_is_grouped(package: Any, tokens: Tensor, calls: Callable[[], int]) -> None:
    """No group has dropout: a package for it has none, and without it PEFT's own code drops."""
    model = with_lora(lora_dropout=0.5)
    with pytest.warns(UserWarning, match="14 left: lora_dropout"):
        assert package.accelerate(model).groups == 0
    with pytest.warns(UserWarning, match="generated without --dropout"):
        gradients(model.train(), tokens)
    assert calls() == 0
    wanted = gradients(alone(copy.deepcopy(model)).eval(), tokens)
    same(gradients(model.eval(), tokens), wanted)
    assert calls() == 4


def test_adapters_that_are_switched_on_later(package: Any, tokens: Tensor, calls: Callable[[], int]) -> None:
    model = peft_model(package)
    model.add_adapter("second", peft.LoraConfig(r=RANK, lora_alpha=2, target_modules="all-linear"))
    model.add_adapter("some", peft.LoraConfig(r=RANK, lora_alpha=2, target_modules=["q_proj", "gate_proj"]))
    filled(model)
    found = {}
    for name, count in (("second", 4), ("some", 0), ("default", 4)):
        model.set_adapter(name)
        found[name] = gradients(model, tokens)
        assert calls() == count, name
    with model.disable_adapter():
        model(tokens)
    assert calls() == 0
    package.restore(model)
    for name, gradient in found.items():
        model.set_adapter(name)
        same(gradient, gradients(model, tokens))


def test_merging_and_unloading(package: Any, tokens: Tensor, calls: Callable[[], int]) -> None:
    model = peft_model(package).eval()
    wanted = model(tokens).logits
    calls()
    model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-4, atol=1e-5)
    assert calls() == 0
    model.unmerge_adapter()
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-4, atol=1e-5)
    assert calls() == 4
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, wanted, rtol=1e-4, atol=1e-5)
    assert calls() == 0


# Checkpoints


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_equal_to_the_bit(
    package: Any, long: Tensor, calls: Callable[[], int], make: Make, reentrant: bool
) -> None:
    model = make(package).train()
    wanted = gradients(model, long)
    calls()
    checkpointed(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    for _ in range(2):
        found = gradients(model, long)
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert calls() == 8 and shelf(model).waiting is None


def attend(trio: Any, x: Tensor, other: Tensor) -> Tensor:
    """As attention, q from one tensor and k and v from another."""
    q, k, v = trio.q_proj(x), trio.k_proj(other), trio.v_proj(other)
    return q.unflatten(-1, (2, 32)).square().sum(1).tanh() * k + v


def gradients_of(y: Tensor, x: Tensor, trio: Any) -> list[Tensor]:
    wanted = [p for p in (x, *trio.parameters()) if p.requires_grad]
    return list(torch.autograd.grad(y.square().sum(), wanted))


@pytest.mark.filterwarnings("ignore:.*one by one from now on")
@pytest.mark.parametrize("several", [1, 3], ids=["step by step", "accumulating"])
def test_a_checkpoint_finds_in_its_recomputation_what_it_saw(trio: Any, x: Tensor, several: int) -> None:
    """Also where the group ends to be one: a recomputation that saves other tensors is an error of torch's."""
    other = (x.detach() + 1).requires_grad_()
    wanted: list[Tensor] = []
    for _ in range(6):
        outputs = [checkpoint(attend, trio, x, other, use_reentrant=False) for _ in range(several)]
        for y in outputs:
            found = gradients_of(y, x, trio)
            wanted = wanted or found
            for one, two in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, two)
    assert trio.q_proj._group.alone


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("of", ["q", "kv"])
def test_a_checkpoint_around_some_of_a_group(trio: Any, x: Tensor, reentrant: bool, of: str) -> None:
    """What was computed outside of it is not there when it recomputes, nor the other way round."""

    def q(x: Tensor) -> Tensor:
        return trio.q_proj(x)[:, :32].tanh() * 2

    def kv(x: Tensor) -> Tensor:
        return trio.k_proj(x).tanh() * trio.v_proj(x)

    with pytest.MonkeyPatch.context() as patch:
        for layer in (trio.q_proj, trio.k_proj, trio.v_proj):
            patch.setattr(layer, "_group", None)
        wanted = gradients_of(q(x) * kv(x), x, trio)
    parts = [functools.partial(checkpoint, f, use_reentrant=reentrant) if f.__name__ == of else f for f in (q, kv)]
    (parts[0](x) * parts[1](x)).square().sum().backward()
    found = [p.grad for p in (x, *trio.parameters()) if p.requires_grad]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_recomputation_that_ends_early_counts_for_nothing(trio: Any, x: Tensor, calls: Callable[[], int]) -> None:
    """It ends when it has what was saved, here between two calls of a group."""

    def ends(x: Tensor) -> Tensor:
        q = trio.q_proj(x)[:, :32].exp()
        return q + trio.k_proj(x) + trio.v_proj(x)

    for _ in range(4):
        y = checkpoint(ends, x, use_reentrant=False)
        for last in (False, False, True):
            torch.autograd.grad(y.sum(), x, retain_graph=not last)
            assert waits(trio)
    assert calls() == 16 and not trio.q_proj._group.alone and trio.q_proj._group._left == 0


# torch.compile


def functions_in(graph: Any) -> int:
    """How many autograd functions a graph calls, also in its checkpoints."""
    found = sum("autograd_function_apply" in str(node.target) for node in graph.graph.nodes)
    return found + sum(
        functions_in(child)
        for name, child in graph.named_children()
        if name.startswith("wrap_body") and "fwd" not in name
    )


def compiled_whole(model: Any, tokens: Tensor, *, checkpoints: bool) -> Any:
    """The one graph in which a model's steps are, with its gradients, once for all steps."""
    model.train().get_input_embeddings().requires_grad_(True)  # else the first X wants no gradient
    wanted = gradients(model, tokens)
    if checkpoints:
        checkpointed(model, use_reentrant=False)
        model.disable_input_require_grads()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(
        lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, fullgraph=True, backend=counter
    )
    for _ in range(3):
        model.zero_grad()
        step(tokens).backward()
        same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted)
    assert counter.frame_count == 1
    return counter.graphs[0]


@pytest.mark.parametrize(("make", "checkpoints"), [(peft_model, False), (peft_model, True), (injected, True)])
def test_compiled_whole(package: Any, tokens: Tensor, make: Make, checkpoints: bool) -> None:
    model = make(package, num_hidden_layers=1)
    graph = compiled_whole(model, tokens, checkpoints=checkpoints)
    assert shelf(model).waiting is None
    assert functions_in(graph) == 4, "q, k, v · o · gate, up · down"


def test_compiled_by_layer_and_with_other_scalings(trio: Any) -> None:
    """The group is one in each graph; a scaling that changes is compiled once more."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def layer(x: Tensor) -> Tensor:
        x = x * 2
        q, k, v = (linear(x) for linear in (trio.q_proj, trio.k_proj, trio.v_proj))
        return q[:, :32].tanh() * k + v

    step = torch.compile(layer, fullgraph=True, backend=counter)
    frames = []
    for scaling in (1.0, 1.0, 1.5, 0.5, 3.0):
        for linear in (trio.q_proj, trio.k_proj):
            if isinstance(linear.scaling, dict):
                linear.scaling["default"] = scaling
            else:
                linear.scaling = scaling
        x = torch.randn(5, 64, requires_grad=True)
        wanted = gradients_of(layer(x), x, trio)
        for one, other in zip(gradients_of(step(x), x, trio), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames == [1, 1, 2, 2, 2] and all(functions_in(graph) == 1 for graph in counter.graphs)


@pytest.mark.parametrize("leaf", [True, False], ids=["a leaf", "no leaf"])
def test_compiled_outputs_that_nobody_fetches_are_gone_with_the_call(trio: Any, leaf: bool) -> None:
    """What was left of one call is not there in the next, when parameters are others."""
    torch._dynamo.reset()
    first, second = (
        torch.compile(functools.partial(lambda linear, x: linear(x if leaf else x * 2), layer), backend="eager")
        for layer in (trio.q_proj, trio.k_proj)
    )
    x = torch.randn(5, 64, requires_grad=True)
    for _ in range(3):
        for step, layer in ((first, trio.q_proj), (second, trio.k_proj)):
            torch.testing.assert_close(step(x), by_itself(layer, x if leaf else x * 2))
        with torch.no_grad():
            for parameter in trio.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
    assert not waits(trio)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_within_a_checkpoint_that_gets_the_input(trio: Any) -> None:
    """torch changes no attribute of it there: it is refused, and without fullgraph run uncompiled."""

    def layer(x: Tensor) -> Tensor:
        y = x * 2
        return checkpoint(attend, trio, y, y, use_reentrant=False) + y[:, :32]

    x = torch.randn(5, 64, requires_grad=True)
    wanted = gradients_of(layer(x), x, trio)
    for allowed in (False, True):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=allowed):
            for one, other in zip(gradients_of(torch.compile(layer, backend="eager")(x), x, trio), wanted, strict=True):
                torch.testing.assert_close(one, other)
            torch._dynamo.reset()
            if allowed:
                torch.compile(layer, backend="eager", fullgraph=True)(x)
            else:
                with pytest.raises(
                    torch._dynamo.exc.Unsupported, match="skip_fwd_side_effects_in_bwd_under_checkpoint"
                ):
                    torch.compile(layer, backend="eager", fullgraph=True)(x)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="warms up kernels of Triton's")
def test_warmup_runs_one_group_of_each_kind(package: Any, calls: Callable[[], int]) -> None:
    model = peft_model(package)
    warming = sys.modules[f"{package.__name__}.warmup"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warming, "_is_whole_on_gpu", lambda _: True)
        cases = warming._cases(model)
        assert sorted(len(case.operands) for case in cases) == [1, 1, 2, 3]
        patch.setattr(warming, "compute", package.groups.compute)
        for case in cases:
            warming._step(case, 5)
        assert calls() == 2 * 3 and all(p.grad is None for p in model.parameters())
        attention(model).k_proj.merge()
        attention(model, 1).k_proj.merge()
        assert sorted(len(case.operands) for case in warming._cases(model)) == [1, 1, 1, 2]


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
