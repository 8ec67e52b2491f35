"""Experts that are given rows, sorted by expert, as Llama 4's: what PEFT computes, by modules of them."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from runlora_gen.from_model.live import read_model
from runlora_gen.generation import Request, generated
from runlora_gen.into_model import with_peft, without_peft
from runlora_gen.into_model.packages import imported
from runlora_gen.request.architecture import LIVE, Architecture
from runlora_gen.request.experts import UNASKED, Stack
from runlora_gen.request.workload import make_workload
from torch import Tensor, nn

from .models import (
    EXPERTS,
    HIDDEN,
    INNER,
    RANK,
    checkpointed,
    computes_what_peft_would,
    filled,
    gradients,
    llama4,
    loads_peft_s,
)

UP, DOWN = BOTH = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
of_targets = pytest.mark.parametrize("targets", [[UP], [DOWN], BOTH], ids=["gate_up", "down", "both"])


def stacks(activation: str = "silu_gated") -> tuple[Stack, ...]:
    """Those of the model: every token is a row of every expert."""
    options: dict[str, Any] = {"top_k": EXPERTS, "bias": False, "count": 2, "layout": "in_out"}
    options |= {"module": "feed_forward.experts", "activation": activation}
    return (
        Stack("gate_up_proj", EXPERTS, HIDDEN, 2 * INNER, gathers=True, **options),
        Stack("down_proj", EXPERTS, INNER, HIDDEN, gathers=False, **options),
    )


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    def made(activation: str, **workload: Any) -> Any:
        request = Request(
            {RANK: Architecture("moe", "moe", LIVE, (), stacks=stacks(activation))},
            make_workload(device="cpu", dtype="fp32", **workload),
        )
        (folder,) = generated(request, tmp_path_factory.mktemp("packages"))
        return imported(folder)

    return functools.cache(made)


@pytest.fixture(params=["silu_gated", ""], ids=["chained", "apart"])
def package(packages: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    return packages(request.param)


def with_lora(model: Any, targets: Sequence[str] = BOTH, **options: Any) -> Any:
    wide = options.pop("autocast_adapter_dtype", True)
    fields = {"r": RANK, "lora_alpha": 8, "target_modules": [], "target_parameters": list(targets), **options}
    return filled(peft.get_peft_model(model, peft.LoraConfig(**fields), autocast_adapter_dtype=wide))


def injected(package: Any, model: Any, targets: Sequence[str] = BOTH, **options: Any) -> Any:
    report = package.inject_lora(model, RANK, 8, target_parameters=targets, **options)
    assert len(report.accelerated) == 2 * len(targets)
    return filled(model)


def experts_of(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("feed_forward.experts")]


@of_targets
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=["float64", "float32"]
)
def test_outputs_and_gradients_are_peft_s(
    package: Any, tokens: Tensor, targets: list[str], dtype: torch.dtype, tolerance: float
) -> None:
    """Though PEFT takes these matrices for transposed, and has the factors of those."""
    model = with_lora(llama4(dtype), targets, use_rslora=True)
    wanted, wanted_gradients = model(tokens).logits, gradients(model, tokens)
    report = package.accelerate(model, strict=True)
    assert len(report.accelerated) == 2 * len(targets) and not report.left
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, found_gradients = model(tokens).logits, gradients(model, tokens)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert found_gradients.keys() == wanted_gradients.keys() and len(found_gradients) == 4 * len(targets)
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=100 * tolerance, atol=tolerance)


@of_targets
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_bf16_is_as_near_to_the_truth_as_peft(package: Any, targets: list[str], autocast: bool) -> None:
    truth = with_lora(llama4(torch.bfloat16).double(), targets)
    model = with_lora(llama4(torch.bfloat16), targets)

    def off(model: Any) -> tuple[torch.dtype, list[Tensor]]:
        layer = model.base_model.model.model.layers[0].feed_forward.experts
        dtype = experts_of(model.base_model.model)[0].get_base_layer().down_proj.dtype
        torch.manual_seed(4)
        x, dy = (torch.randn(EXPERTS * 10, HIDDEN).bfloat16().to(dtype) for _ in range(2))
        inputs = [x.requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype != torch.float64):
            y = layer(x)
        return y.dtype, [y, *torch.autograd.grad(y, inputs, dy)]

    (_, exact), (kind, peft_s) = off(truth), off(model)
    package.accelerate(model, strict=True)
    own, ours = off(model)
    assert own == kind and len(ours) == 2 + 2 * len(targets)
    for one, other, true in zip(ours, peft_s, exact, strict=True):
        assert (one - true).norm() <= 2 * (other - true).norm() + 1e-6


def test_under_autocast_a_base_in_float32_gives_what_its_own_products_give(package: Any, tokens: Tensor) -> None:
    model = with_lora(llama4())
    (first, _), x = experts_of(model), torch.randn(2 * EXPERTS, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = first(x)
        package.accelerate(model, strict=True)
        found = first(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_disabling_merging_and_switching_with_peft(package: Any, tokens: Tensor) -> None:
    model = with_lora(llama4(torch.float64))
    wanted = model(tokens).logits
    with model.disable_adapter():
        frozen = model(tokens).logits
    assert not torch.allclose(wanted, frozen)
    package.accelerate(model, strict=True)
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens).logits, frozen)
    model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, wanted)
    model.unmerge_adapter()
    torch.testing.assert_close(model(tokens).logits, wanted)
    assert len(package.restore(model)) == 4
    torch.testing.assert_close(model(tokens).logits, wanted)


def test_one_stack_may_be_switched_off(package: Any, tokens: Tensor) -> None:
    """By itself, and while its weight holds the update."""
    reference, model = (with_lora(llama4(torch.float64)), injected(package, llama4(torch.float64)))
    package.save_adapter(model, folder := str(Path(package.__file__).parent / "switched"))
    reference = peft.PeftModel.from_pretrained(llama4(torch.float64), folder, autocast_adapter_dtype=False)
    for switched in ("gate_up_proj", "down_proj"):
        mine = [m for m in package.adapters.lora_layers(model).values() if m.stack.name == switched]
        theirs = [m for m in reference.modules() if getattr(m, "parameter_name", "") == switched]
        for layer in theirs:
            layer._disable_adapters = True
        wanted = reference(tokens).logits
        for merged in (False, True):
            for layer in mine:
                layer.disable_adapters = True
                if merged:
                    layer.merge()
            torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-12, atol=1e-12)
            for layer in mine:
                layer.unmerge()
                layer.disable_adapters = False
        for layer in theirs:
            layer._disable_adapters = False


@of_targets
def test_without_peft_it_computes_what_peft_would(
    package: Any, tokens: Tensor, targets: list[str], folder: str
) -> None:
    model = injected(package, llama4(torch.float64), targets, use_rslora=True)
    computes_what_peft_would(package, model, llama4(torch.float64), tokens, folder, 2 * len(targets))


@of_targets
def test_adapters_of_peft_are_loaded(package: Any, tokens: Tensor, targets: list[str], folder: str) -> None:
    loads_peft_s(package, with_lora(llama4(), targets), llama4, tokens, folder)


def test_merging_and_disabling_without_peft(package: Any, tokens: Tensor) -> None:
    model = llama4(torch.float64)
    frozen = model(tokens).logits
    injected(package, model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = model(tokens).logits
    assert not torch.allclose(wanted, frozen)
    with package.adapters.disable_adapter(model):
        torch.testing.assert_close(model(tokens).logits, frozen, rtol=1e-12, atol=1e-12)
    package.merge(model)
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-12, atol=1e-12)
    package.unmerge(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_copies_have_adapters_of_their_own(package: Any, tokens: Tensor) -> None:
    model = injected(package, llama4())
    wanted = model(tokens).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(tokens).logits, wanted)
        package.merge(again)
        torch.testing.assert_close(again(tokens).logits, wanted)
        assert type(experts_of(again)[0]).__name__ == "Llama4TextExperts"
    assert torch.equal(model(tokens).logits, wanted)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_injected_adapters_are_checkpointed(package: Any, tokens: Tensor, use_reentrant: bool) -> None:
    wanted = gradients(injected(package, llama4(torch.float64)), tokens)
    model = checkpointed(llama4(torch.float64).train(), use_reentrant=use_reentrant)
    for name, gradient in gradients(injected(package, model), tokens).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_peft_s", [True, False], ids=["with PEFT", "without PEFT"])
def test_experts_are_compiled_as_a_whole(package: Any, with_peft_s: bool) -> None:
    """The model around them has branches of its own: of one layer's experts."""
    torch._dynamo.reset()
    model = with_lora(llama4()) if with_peft_s else injected(package, llama4())
    if with_peft_s:
        package.accelerate(model, strict=True)
    layer, x = experts_of(model)[0], torch.randn(3 * EXPERTS, HIDDEN)
    factors = [parameter for name, parameter in layer.named_parameters() if "lora_" in name]
    wanted = torch.autograd.grad(layer(x).square().sum(), factors)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), factors)
    assert len(found) == 4
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_rows_that_cannot_be_shared_out_are_refused(package: Any) -> None:
    model = injected(package, llama4())
    with pytest.raises(ValueError, match=rf"x must have as many rows for each of {EXPERTS} experts, got {EXPERTS + 1}"):
        experts_of(model)[0](torch.randn(EXPERTS + 1, HIDDEN))


def test_other_calls_run_peft_s_own_code(package: Any) -> None:
    model = with_lora(llama4())
    package.accelerate(model, strict=True)
    with (
        pytest.warns(UserWarning, match="a call with other arguments is not covered"),
        pytest.raises(TypeError),
    ):
        experts_of(model)[0](torch.randn(EXPERTS, HIDDEN), torch.zeros(1), torch.zeros(1))


def test_what_is_generated_with_a_factor_frozen(packages: Callable[..., Any]) -> None:
    """The module's A is what PEFT has as lora_B: it takes the matrices for transposed."""
    package, model = packages("", train=("b",)), with_lora(llama4())
    with pytest.raises(ValueError, match="lora_B is trained, and moe_r4 was generated with lora_A frozen"):
        package.accelerate(model, strict=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    assert len(package.accelerate(model, strict=True).accelerated) == 4
    put_in = injected(package, llama4())
    trained = {name.rpartition(".")[2] for name, parameter in put_in.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A"}


def test_they_are_run_before_the_first_step(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warmup = importlib.import_module(f"{package.__name__}.warmup")
    monkeypatch.setattr(warmup, "_is_whole_on_gpu", lambda _: True)
    accelerated = with_lora(llama4())
    package.accelerate(accelerated, strict=True)
    for model in (injected(package, llama4()), accelerated):
        cases = warmup._cases(model)
        assert len(cases) == 2
        for case in cases:
            warmup._step(case, 8)


# Read from the model, and generated for it


def test_they_are_read_as_stacks_of_which_every_expert_has_all_tokens(tokens: Tensor, tmp_path: Path) -> None:
    with torch.device("meta"):
        on_meta = llama4()
    for model in (llama4(), on_meta):
        read = read_model(model)
        assert read.architecture.offered == stacks()
        assert read.left_out["model.layers.*.feed_forward.experts.down_proj"] == UNASKED
    model = with_lora(llama4(torch.float64))
    wanted, wanted_gradients = model(tokens).logits, gradients(model, tokens)
    report = with_peft.accelerate(model, tmp_path, strict=True)
    assert len(report.accelerated) == 4
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients(model, tokens).items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-10, atol=1e-12)
    (folder,) = report.folders
    manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
    assert [site["top_k"] for site in manifest["experts"]] == [EXPERTS] * 2


def test_they_are_generated_for_and_put_in(tokens: Tensor, folder: str, tmp_path: Path) -> None:
    model = llama4()
    report = without_peft.inject_lora(model, RANK, 8, (), target_parameters=BOTH, output=tmp_path)
    assert len(report.accelerated) == 4
    without_peft.save_adapter(filled(model), folder)
    other = llama4()
    without_peft.load_adapter(other, folder, output=tmp_path / "loaded")
    torch.testing.assert_close(other(tokens).logits, model(tokens).logits)


def impostor(name: str) -> type[nn.Module]:
    """The class of experts with something else in it."""
    kind: Any = type(experts_of(llama4())[0])

    def up_first(self: Any, x: Tensor) -> Tensor:
        up, gate = torch.bmm(x.view(self.num_experts, -1, self.hidden_size), self.gate_up_proj).chunk(2, -1)
        return torch.bmm(up * self.act_fn(gate), self.down_proj).view(-1, self.hidden_size)

    def first_alone(self: Any, x: Tensor) -> Tensor:
        gate, up = (x @ self.gate_up_proj[0]).chunk(2, -1)
        return (up * self.act_fn(gate)) @ self.down_proj[0]

    others: dict[str, Any] = {
        "residual": lambda self, x: kind.forward(self, x) + x,
        "scaled": lambda self, x: 1.01 * kind.forward(self, x),
        "detached": lambda self, x: kind.forward(self, x.detach()) + 0 * x,
        "up first": up_first,
        "one expert": first_alone,
        "interleaved": lambda self, x: kind.forward(
            self, x.view(-1, self.num_experts, self.hidden_size).transpose(0, 1)
        ),
        "raises": lambda self, x: x.nothing,
        "more arguments": lambda self, x, index: kind.forward(self, x),
        "shape": lambda self, x: kind.forward(self, x).view(self.num_experts, -1, self.hidden_size),
    }
    return type("Other", (kind,), {"forward": others[name]})


@pytest.mark.parametrize(
    "name",
    ["residual", "scaled", "detached", "up first", "one expert", "interleaved", "raises", "more arguments", "shape"],
)
def test_experts_that_compute_something_else_are_left(package: Any, name: str) -> None:
    """With the reason, by a package and by what is read: they are tried."""
    model = llama4()
    for experts in experts_of(model):
        experts.__class__ = impostor(name)
    assert read_model(model).left_out["model.layers.*.feed_forward.experts"] == "3-D weights of Other"
    reason = "an adapter on a parameter of Other is not covered"
    with pytest.raises(ValueError, match=reason):
        package.inject_lora(model, RANK, target_parameters=BOTH)
    with pytest.raises(ValueError, match=reason):
        package.accelerate(with_lora(model), strict=True)


def test_experts_with_other_weights_are_left(package: Any) -> None:
    for change in ("bias", "width", "name"):
        model = llama4()
        for experts in experts_of(model):
            if change == "bias":
                experts.bias = nn.Parameter(torch.zeros(EXPERTS, HIDDEN))
            elif change == "width":
                experts.down_proj = nn.Parameter(experts.down_proj.data[:, :-1])
            else:
                experts.other_proj = experts.down_proj
                del experts.down_proj
        assert read_model(model).left_out["model.layers.*.feed_forward.experts"] == "3-D weights of Llama4TextExperts"
        with pytest.raises(ValueError, match="an adapter on a parameter of Llama4TextExperts is not covered"):
            package.inject_lora(model, RANK, target_parameters=[UP])


def test_a_trial_changes_nothing(package: Any, tokens: Tensor) -> None:
    model = llama4()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    state = torch.random.get_rng_state()
    read_model(model)
    assert package.peft_layers.unfit_stack(experts_of(model)[0], "down_proj") is None
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == mark and torch.equal(after[name], tensor) for name, (mark, tensor) in before.items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_variants_are_selected_by_tokens(package: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were priced: every token is a row of each expert."""
    model = with_lora(llama4())
    package.accelerate(model, strict=True)
    asked: list[int] = []
    for module in package.shapes.EXPERTS.values():

        def noted(count: int, dtype: torch.dtype, select: Callable[..., str] = module._select) -> str:
            asked.append(count)
            return select(count, dtype)

        monkeypatch.setattr(module, "_select", noted)
    gradients(model, tokens)
    assert asked and set(asked) == {tokens.numel()}
