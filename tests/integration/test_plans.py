"""Plans for a budget of memory, in models: what layers keep changes, and nothing else does."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import pickle
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runlora_gen
import torch
import transformers
from runlora_gen.forecast import estimate
from runlora_gen.forecast.estimate import Batch, Ways, steps_of
from runlora_gen.from_model.live import read_model
from runlora_gen.into_model.packages import imported
from runlora_gen.measure.memory import held_bytes
from runlora_gen.request.layout import LAYOUTS
from runlora_gen.request.workload import make_workload
from torch import Tensor, nn

from .models import MLPS_PAY, RANK, VOCABULARY, bitwise, checkpointed, gradients, llama, seeded, with_lora
from .test_runs_in import same

#: Most models here are of float32, for gradients that are near: their norms keep what they did.
pytestmark = pytest.mark.filterwarnings("ignore:.* counts on norms that keep their input as it is:UserWarning")

LAYERS, WAYS = 5, Ways(checkpointed=1, remade=2, renormed=1)
#: More than the tokens that are few without gradients.
TOKENS = 160
OPTIONS: dict[str, Any] = {**MLPS_PAY, "tokens": TOKENS, "sequence": TOKENS // 2}


def built(**options: Any) -> Any:
    return llama(**{"num_hidden_layers": LAYERS, **options})


def budget(ways: Ways = WAYS, **options: Any) -> int:
    """What such a plan takes."""
    workload = make_workload(**{**OPTIONS, "sequence": None, **options})
    steps = steps_of(read_model(built()).architecture, RANK, workload, Batch(2, TOKENS // 2))
    return steps.ours(ways).memory.peak


@pytest.fixture(scope="module", autouse=True)
def _kept() -> Iterator[None]:
    """Kernels of 16 bits, where gradients take the place of what was kept, run on no CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "spending", lambda decision: None)
        yield


@pytest.fixture(scope="module", params=LAYOUTS)
def planned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A package whose plan has layers of all kinds."""
    out = tmp_path_factory.mktemp("packages")
    (folder,) = runlora_gen.generate(
        built(), rank=RANK, output=out, layout=request.param, memory_budget=budget(), **OPTIONS
    )
    package = imported(folder)
    assert Ways(package.plan.CHECKPOINTED, package.plan.REMADE, package.plan.RENORMED) == WAYS
    return package


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, TOKENS // 2), generator=torch.Generator().manual_seed(2))


def layers(model: Any) -> Any:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)


def norms_of(layer: Any) -> list[Any]:
    return [layer.input_layernorm, layer.post_attention_layernorm]


def kinds(model: Any) -> list[str]:
    """What each layer does."""
    found = []
    for layer in layers(model):
        remade = getattr(type(layer.mlp), "_runlora_variant", None) is not None
        renormed = [getattr(type(norm), "_runlora_again", False) for norm in norms_of(layer)]
        assert renormed[0] == renormed[1] >= remade
        kept = "less" if remade else "norms" if all(renormed) else "all"
        found.append("input" if layer.gradient_checkpointing else kept)
    return found


PLANNED = ["input", "less", "less", "norms", "all"]


def test_a_planned_model_computes_what_it_did(planned: Any, tokens: Tensor) -> None:
    model = with_lora(built()).train()
    wanted = gradients(model, tokens)
    report = planned.accelerate(model, strict=True)
    assert report.mlps == LAYERS and kinds(model) == PLANNED
    assert report.planned == f"planned: {planned.plan.WAYS}" and str(report).endswith(report.planned)
    assert "in 1 of 5 layers the input alone is kept, in 2 more gate and up are made again, in 1 more" in report.planned
    same(gradients(model, tokens), wanted)
    assert planned.accelerate(model, strict=True).planned == report.planned and kinds(model) == PLANNED


def in_half(planned: Any) -> Any:
    """Norms of 16 bits keep their input as it is, and can make again what they gave."""
    model = with_lora(llama(torch.bfloat16, num_hidden_layers=LAYERS), autocast_adapter_dtype=False).train()
    planned.accelerate(model, strict=True)
    assert kinds(model) == PLANNED
    return model


def test_layers_keep_what_the_plan_says(planned: Any, tokens: Tensor) -> None:
    """Byte by byte, one kind of layer after the other."""
    model = in_half(planned)

    def kept() -> int:
        return held_bytes(lambda: model(tokens, labels=tokens).loss)

    inner, hidden = TOKENS * 96 * 2, TOKENS * 64 * 2
    found = [kept()]
    planned.plan.undo(model)  # the first layer, whose norm is none that makes again
    found.append(kept())
    assert kinds(model) == ["all", "less", "less", "norms", "all"]
    for place in (1, 3):  # a layer of either kind keeps all
        for norm in norms_of(layers(model)[place]):
            norm.__class__ = planned.norms._made(type(norm).replaces, type(norm)._runlora_kind, False)
        mlp: Any = layers(model)[place].mlp
        of = type(mlp)
        mlp.__class__ = planned.mlps._made(of.replaces, of._runlora_at, of._runlora_linears, of._runlora_others, None)
        found.append(kept())
    assert kinds(model) == ["all", "all", "less", "all", "all"]
    first, less, norms = (after - before for before, after in itertools.pairwise(found))
    assert less == 2 * inner + 2 * hidden and norms == 2 * hidden
    # Gate, up, and what both norms give, beside q, k, v and what attention gives; S of seven linears, and more.
    assert 2 * inner + 4 * hidden < first < 2 * inner + 10 * hidden


def test_what_norms_gave_is_made_again_to_the_bit(planned: Any, tokens: Tensor) -> None:
    model = in_half(planned)
    found = gradients(model, tokens)
    calls = dict.fromkeys(("kept", "again"), 0)
    made_again = planned.norms._made_again

    def counted(made: Any, shape: Any) -> Tensor:
        calls["again"] += 1
        y: Tensor = made_again(made, shape)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned.norms, "_made_again", counted)
        bitwise(gradients(model, tokens), found)
    assert calls["again"] == 3 * 2, "a group and an MLP read it, of three layers"
    for layer in layers(model):
        for norm in norms_of(layer):
            norm.__class__ = planned.norms._made(type(norm).replaces, type(norm)._runlora_kind, False)
    bitwise(gradients(model, tokens), found)


def test_what_changed_meanwhile_is_an_error(planned: Any, tokens: Tensor) -> None:
    """Also where the norm's own backward, which looks at it as well, is not wanted."""
    model = in_half(planned)
    layer = layers(model)[3]
    loss = model(tokens, labels=tokens).loss
    with torch.no_grad():
        layer.post_attention_layernorm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="or its weight, was changed in place before the backward"):
        torch.autograd.grad(loss, layer.mlp.gate_proj.lora_A["default"].weight)


def test_within_a_checkpoint_nothing_is_left_out(planned: Any, tokens: Tensor) -> None:
    """What is saved there is the checkpoint's: it makes all again."""
    model = in_half(planned)
    found = gradients(model, tokens)
    for reentrant in (False, True):
        checkpointed(model, use_reentrant=reentrant)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it overrules the plan
            same_in_half(gradients(model, tokens), found)


def same_in_half(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert wanted and found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).float().norm() < 0.05 * gradient.float().norm(), name


def test_memory_is_free_again_after_the_backward(planned: Any, tokens: Tensor) -> None:
    model = in_half(planned)
    held: list[Any] = []
    norm = layers(model)[3].post_attention_layernorm
    norm.register_forward_hook(lambda _, inputs, output: held.extend(map(weakref.ref, (inputs[0], output))))
    loss = model(tokens, labels=tokens).loss
    assert held[1]() is None, "its output is gone after the forward"
    loss.backward()
    del loss
    gc.collect()
    assert held[0]() is None


def test_an_injected_model_is_planned_too(planned: Any, tokens: Tensor) -> None:
    model, plain = built().train(), built().train()
    plain_report = planned.inject_lora(model, RANK, 8)
    assert kinds(model) == PLANNED and plain_report.planned.startswith("planned: ")
    # No hook lets embeddings require gradients, as reentrant checkpoints need.
    assert not model.get_input_embeddings()._forward_hooks
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    found = gradients(model, tokens)
    planned.plan.undo(model)
    for layer in layers(model):
        for module in (layer.mlp, *norms_of(layer)):
            module.__class__ = type(module).replaces
    assert kinds(model) == ["all"] * LAYERS
    same(found, gradients(model, tokens))
    assert plain(tokens).logits.shape == model(tokens).logits.shape


def test_restored_layers_are_as_they_were(planned: Any, tokens: Tensor) -> None:
    for before in (False, True):
        model = with_lora(built()).train()
        if before:
            checkpointed(model, use_reentrant=False)
        wanted = gradients(model, tokens)
        planned.accelerate(model, strict=True)
        planned.accelerate(model, strict=True)
        assert kinds(model) == PLANNED
        planned.restore(model)
        assert kinds(model) == (["input"] if before else ["all"]) * LAYERS
        assert not model._forward_pre_hooks
        assert not any("_runlora" in name for module in model.modules() for name in vars(module))
        bitwise(gradients(model, tokens), wanted)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_planned(planned: Any, tokens: Tensor, copied: Any) -> None:
    model = with_lora(built()).train()
    planned.accelerate(model, strict=True)
    wanted = gradients(model, tokens)
    other = copied(model)
    assert kinds(other) == PLANNED
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    bitwise(gradients(other, tokens), wanted)


def test_what_overrules_the_plan_is_said_once(planned: Any, tokens: Tensor) -> None:
    model = with_lora(built()).train()
    planned.accelerate(model, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(tokens)  # trains nothing
    checkpointed(model.train(), use_reentrant=False)
    with pytest.warns(UserWarning, match="has the first 1 of 5 layers checkpoint, and now 5 do: leave") as said:
        gradients(model, tokens)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(model, tokens)


def test_a_trainer_that_checkpoints_is_told_of(planned: Any, tokens: Tensor, tmp_path: Path) -> None:
    for checkpointing in (False, True):
        model = with_lora(built())
        planned.accelerate(model, strict=True)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            **({"activation_checkpointing": True} if checkpointing else {}),
            report_to="none",
            use_cpu=True,
            save_strategy="no",
        )
        data = [{"input_ids": row, "labels": row} for row in tokens]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            transformers.Trainer(model, arguments, train_dataset=data).train()
        assert sum("layers checkpoint, and now 5 do" in str(each.message) for each in said) == checkpointing


def test_mlps_that_can_not_keep_less_are_said(planned: Any, tokens: Tensor) -> None:
    model = with_lora(built()).train()
    layers(model)[1].mlp.act_fn.register_forward_hook(lambda *_: None)
    wanted = gradients(model, tokens)
    with pytest.warns(UserWarning, match="has the MLPs of 2 layers make gate and up again, and 1 can: the others"):
        report = planned.accelerate(model, strict=True)
    assert len(report.apart) == 1 and kinds(model) == ["input", "norms", "less", "norms", "all"]
    same(gradients(model, tokens), wanted)


def test_norms_that_keep_more_are_said(planned: Any) -> None:
    """As where they were cast to float32, which preparations for a quantized base do."""
    for dtype, running in ((torch.float32, 0), (torch.bfloat16, 2 * LAYERS - 2)):
        model = with_lora(llama(torch.bfloat16, num_hidden_layers=LAYERS), autocast_adapter_dtype=False)
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.to(dtype)
        for norm in norms_of(layers(model)[2]) if running else ():
            norm.weight.requires_grad_(True)
        said = f"counts on norms that keep their input as it is, 2 a layer, and {running + bool(running)} do"
        with pytest.warns(UserWarning, match=said):
            planned.accelerate(model, strict=True)
    model = with_lora(llama(torch.bfloat16, num_hidden_layers=LAYERS), autocast_adapter_dtype=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned.accelerate(model, strict=True)


def test_models_without_such_layers_are_refused_as_they_are(planned: Any) -> None:
    for count in (LAYERS - 1, LAYERS + 1):
        model = with_lora(built(num_hidden_layers=count))
        before = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=f"model has no list of {LAYERS} layers that can checkpoint"):
            planned.accelerate(model)
        assert [type(module) for module in model.modules()] == before
        bare = built(num_hidden_layers=count)
        wanted = [parameter.requires_grad for parameter in bare.parameters()]
        with pytest.raises(ValueError, match=f"model has no list of {LAYERS} layers that can checkpoint"):
            planned.inject_lora(bare, RANK, 8)
        assert [parameter.requires_grad for parameter in bare.parameters()] == wanted
        assert not any("lora" in name for name, _ in bare.named_parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_in_two_lines(dropout: float, tokens: Tensor, tmp_path: Path) -> None:
    """Masks of a layer that runs its forward again, or a part of it, are the same again."""
    model = with_lora(built(), lora_dropout=dropout).train()
    plain = copy.deepcopy(model)
    most = budget(dropout=dropout)
    report = runlora_gen.accelerate(model, tmp_path, memory_budget=most, **OPTIONS)
    assert report.planned and kinds(model) != ["all"] * LAYERS
    found = seeded(model, tokens)
    bitwise(seeded(model, tokens), found)
    if not dropout:
        same(found, gradients(plain, tokens))
    else:
        # What it says of its gradients is so: a step against them lowers the loss by as much as they promise.
        torch.manual_seed(3)
        with torch.no_grad():
            before = model(tokens, labels=tokens).loss
            for name, parameter in model.named_parameters():
                if name in found:
                    parameter -= 1e-3 * found[name]
            torch.manual_seed(3)
            after = model(tokens, labels=tokens).loss
        promised = 1e-3 * sum(gradient.square().sum() for gradient in found.values())
        assert (before - after).item() == pytest.approx(promised.item(), rel=0.05)


def test_a_package_is_planned_anew_from_its_manifest(planned: Any, run_cli: Any, tmp_path: Path) -> None:
    folder = Path(planned.__file__).parent
    manifest = json.loads((folder / "manifest.json").read_text())
    plan = manifest["plan"]
    assert [plan[kind] for kind in ("checkpointed", "remade", "renormed")] == [1, 2, 1]
    assert manifest["workload"]["memory_budget"] == planned.plan.BUDGET
    assert f"--memory-budget {planned.plan.BUDGET} --sequence {TOKENS // 2}" in manifest["command"]
    command = manifest["command"].split()[1:-1]
    out = run_cli(folder.parent, *command, str(tmp_path))
    assert "generated" not in out
    for path in folder.glob("*.py"):
        assert (tmp_path / folder.name / path.name).read_text() == path.read_text()


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    from runlora_gen import cli

    def call(folder: Path, *arguments: str) -> str:
        monkeypatch.chdir(folder)
        cli.main.main(list(arguments), standalone_mode=False)
        return capsys.readouterr().out

    return call


def test_what_can_not_be_planned_changes_nothing(tmp_path: Path) -> None:
    import peft

    model = with_lora(built())
    before = [type(module) for module in model.modules()]
    for options, said in (
        ({"memory_budget": "1KiB"}, "--memory-budget: 0 MiB is too little for a step, which takes 1 MiB at least"),
        ({"memory_budget": "much"}, "memory_budget: 'much' is not allowed; give bytes, or such as 38GiB"),
        ({"memory_budget": "1GiB", "sequence": 7}, "sequence: 7 is not allowed; give one number that divides 160"),
        ({}, "sequence: given without a memory budget"),
    ):
        with pytest.raises(ValueError, match=said):
            runlora_gen.accelerate(model, tmp_path, **{**OPTIONS, **options})
    other = peft.LoraConfig(r=2 * RANK, target_modules=["q_proj"], rank_pattern={}, init_lora_weights=False)
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="memory_budget: planned are models whose adapters are of one rank"):
        runlora_gen.accelerate(model, tmp_path, memory_budget="1GiB", **OPTIONS)
    assert [type(m) for n, m in model.named_modules() if "other" not in n] == before
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's kernels of norms need a GPU")
def test_a_planned_model_on_a_gpu(planned: Any, tokens: Tensor) -> None:
    """What its norms gave, in torch's own kernels, is the same when it is made again."""
    model, tokens = in_half(planned).cuda(), tokens.cuda()
    found = gradients(model, tokens)
    bitwise(gradients(model, tokens), found)
    for layer in layers(model):
        for norm in norms_of(layer):
            norm.__class__ = planned.norms._made(type(norm).replaces, type(norm)._runlora_kind, False)
    bitwise(gradients(model, tokens), found)
    planned.plan.undo(model)
    bitwise(gradients(model, tokens), found)
