"""Bases that bitsandbytes quantized to 4 bits, as Transformers loads them, on generated modules."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import runlora_gen
import torch
import transformers
from runlora_gen.into_model.packages import imported
from torch import Tensor, nn

from .models import RANK, VOCABULARY, checkpointed, filled, gradients, llama, with_lora

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

#: Deprecations of Transformers and of bitsandbytes among themselves.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

ALL = 14
#: More than are left to bitsandbytes' kernels for few tokens, where there are no gradients.
TOKENS = torch.randint(VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(2))
FEW = TOKENS[:2, :12]
OPTIONS: dict[str, Any] = {"tokens": 64, "kernels": False}
#: NF4 with scales that are quantized as well, as QLoRA has it, and FP4 with plain ones.
KINDS = [("nf4", True), ("fp4", False)]
DTYPES = [torch.float32, torch.bfloat16]
every_kind = pytest.mark.parametrize(("kind", "nested"), KINDS, ids=["nf4-nested", "fp4"])


@pytest.fixture(scope="module", autouse=True)
def _not_packed() -> Iterator[None]:
    """On CPUs with AVX512-BF16 bitsandbytes packs codes in evaluation, and multiplies in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    # Blocks of 64 end where rows do: of others bitsandbytes reads wrong scales on some CPUs.
    llama(intermediate_size=128).save_pretrained(folder)
    llama(intermediate_size=128, num_hidden_layers=1).save_pretrained(folder / "short")
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where packages are generated: what is there and up to date is used as it is."""
    return tmp_path_factory.mktemp("packages")


def load(saved: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = transformers.BitsAndBytesConfig(**options)
    return transformers.AutoModelForCausalLM.from_pretrained(
        saved, quantization_config=config, device_map="cpu", dtype=dtype
    )


def quantized(
    saved: Path, kind: str = "nf4", nested: bool = True, compute: torch.dtype = torch.float32, **options: Any
) -> Any:
    return load(
        saved,
        options.pop("dtype", compute),
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=compute,
        **options,
    )


def accelerated(model: Any, out: Path, **options: Any) -> Any:
    """A copy that runs on generated modules, without a warning."""
    model = copy.deepcopy(model)
    base = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    folder = out / f"{base.quant_state.quant_type}_{str(base.compute_dtype)[6:]}_{'_'.join(options)}"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = runlora_gen.accelerate(model, folder, strict=True, **OPTIONS, **options)
    layers = len(model.get_submodule("base_model.model.model.layers"))
    assert len(report.accelerated) == 7 * layers and not report.left
    assert report.groups + report.mlps == 2 * layers, "q, k, v, and gate, up or the whole MLP, of each layer"
    assert report.grouped == 5 * layers - 2 * report.mlps
    return model


def pair(saved: Path, out: Path, **options: Any) -> tuple[Any, Any]:
    """PEFT's and ours."""
    model = with_lora(quantized(saved, **options))
    return model, accelerated(model, out)


def near(found: Tensor | dict[str, Tensor], wanted: Tensor | dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def nearly(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """In bf16 a gradient is off by some of its ulps, of the largest that it has."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 0.06 * gradient.abs().max(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_outputs_and_gradients_are_peft_s(saved: Path, out: Path, kind: str, nested: bool, dtype: torch.dtype) -> None:
    theirs, ours = pair(saved, out, kind=kind, nested=nested, compute=dtype)
    state = ours.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer").weight.quant_state
    assert state.nested == nested and state.quant_type == kind
    wanted, found = theirs(TOKENS).logits, ours(TOKENS).logits
    assert found.dtype == wanted.dtype == dtype
    gradients_wanted, gradients_found = gradients(theirs, TOKENS), gradients(ours, TOKENS)
    assert len(gradients_found) == 2 * ALL
    if dtype == torch.float32:
        near(found, wanted)
        near(gradients_found, gradients_wanted)
    else:
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02)
        nearly(gradients_found, gradients_wanted)


def test_bf16_is_as_near_to_the_truth_as_peft(saved: Path, out: Path) -> None:
    """|ours - truth| at most twice |PEFT - truth|, where the truth is computed in float32 on the same codes."""
    theirs, ours = pair(saved, out, compute=torch.bfloat16)
    truth = copy.deepcopy(theirs).float()
    for module in truth.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = torch.float32
            module.weight.quant_state.dtype = torch.float32
    exact = gradients(truth, TOKENS)
    errors = []
    for model in (theirs, ours):
        found = gradients(model, TOKENS)
        errors.append(torch.stack([(found[name] - exact[name]).norm() for name in exact]).norm())
    assert errors[1] <= 2 * errors[0]


def test_compiled_whole(saved: Path, out: Path) -> None:
    theirs, ours = pair(saved / "short", out / "short")
    wanted = gradients(theirs, TOKENS)
    torch._dynamo.reset()
    step = torch.compile(
        lambda ids: ours(input_ids=ids, labels=ids, use_cache=False).loss, fullgraph=True, backend="aot_eager"
    )
    for _ in range(2):
        ours.zero_grad()
        step(TOKENS).backward()
        near({name: p.grad for name, p in ours.named_parameters() if p.grad is not None}, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(saved: Path, out: Path, reentrant: bool) -> None:
    theirs, ours = pair(saved, out)
    wanted = gradients(theirs, TOKENS)
    ours.enable_input_require_grads()
    near(gradients(checkpointed(ours, use_reentrant=reentrant).train(), TOKENS), wanted)


@pytest.mark.parametrize("compute", DTYPES, ids=str)
def test_under_autocast_the_dtype_is_peft_s(saved: Path, out: Path, compute: torch.dtype) -> None:
    theirs, ours = pair(saved, out, compute=compute, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = theirs(TOKENS).logits, ours(TOKENS).logits
        assert found.dtype == wanted.dtype == torch.bfloat16
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02)
        nearly(gradients(ours, TOKENS), gradients(theirs, TOKENS))
        path, x = "base_model.model.model.layers.0.mlp.down_proj", torch.randn(200, 128)
        for given in (x, x.bfloat16()):
            assert ours.get_submodule(path)(given).dtype == theirs.get_submodule(path)(given).dtype


def test_wide_activations_over_a_narrow_compute_dtype(saved: Path, out: Path) -> None:
    """As ``prepare_model_for_kbit_training`` leaves a model: what is not quantized is in float32."""
    prepared = peft.prepare_model_for_kbit_training(
        quantized(saved, compute=torch.bfloat16), use_gradient_checkpointing=False
    )
    theirs = with_lora(prepared)
    ours = accelerated(theirs, out)
    wanted, found = theirs(TOKENS).logits, ours(TOKENS).logits
    assert found.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02)
    nearly(gradients(ours, TOKENS), gradients(theirs, TOKENS))
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):  # of groups, and alone
        layer = ours.get_submodule(f"base_model.model.model.layers.0.{name}")
        x = torch.randn(200, layer.in_features)
        output = layer(x)
        assert output.dtype == torch.float32 and layer(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(output, output.bfloat16().float())  # it was computed in 16 bits


def test_few_tokens_without_gradients_are_peft_s_in_silence(saved: Path, out: Path) -> None:
    """bitsandbytes has kernels for them that make no weight: equal to the bit, and so is what is generated."""
    theirs, ours = (model.eval() for model in pair(saved, out, compute=torch.bfloat16))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(ours(FEW).logits, theirs(FEW).logits)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(ours.generate(FEW, **options), theirs.generate(FEW, **options))


def test_many_tokens_without_gradients_are_ours(saved: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = (model.eval() for model in pair(saved, out))
    kind = type(ours.get_submodule("base_model.model.model.layers.0.mlp.down_proj"))
    with torch.no_grad():
        wanted = theirs(TOKENS).logits
        monkeypatch.setattr(kind.replaces, "forward", None)  # what is never called
        near(ours(TOKENS).logits, wanted)


def test_adapters_go_from_one_to_the_other(saved: Path, out: Path, tmp_path: Path) -> None:
    theirs, ours = pair(saved, out)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    wanted = theirs(TOKENS).logits
    states = []
    for name in ("theirs", "ours"):
        plain = peft.PeftModel.from_pretrained(quantized(saved), tmp_path / name, is_trainable=True)
        for model in (plain, accelerated(plain, out)):
            near(model(TOKENS).logits, wanted)
            states.append(peft.get_peft_model_state_dict(model))
    for state in states[1:]:
        assert state.keys() == states[0].keys() and all(torch.equal(state[key], states[0][key]) for key in state)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_disabled_restored_and_with_other_adapters(saved: Path, out: Path) -> None:
    theirs, ours = pair(saved, out)
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)
    # What initializes an adapter from what quantization lost, as LoftQ does, writes other values into it.
    for model in (theirs, ours):
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    wanted = theirs(TOKENS).logits
    near(ours(TOKENS).logits, wanted)
    kinds = {name: type(module) for name, module in theirs.named_modules()}
    assert len(runlora_gen.restore(ours)) == ALL and runlora_gen.restore(ours) == ()
    assert kinds == {name: type(module) for name, module in ours.named_modules()}
    assert torch.equal(ours(TOKENS).logits, wanted)


def test_a_mixed_model_has_two_packages(saved: Path, tmp_path: Path) -> None:
    """Some linears are in 4 bits, and some as they were: each kind has modules of its own."""
    theirs = with_lora(quantized(saved, llm_int8_skip_modules=["down_proj", "k_proj", "lm_head"]))
    ours = copy.deepcopy(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = runlora_gen.accelerate(ours, tmp_path, strict=True, **OPTIONS)
    assert len(report.accelerated) == ALL and not report.left
    assert sorted(folder.name for folder in report.folders) == [f"llama_nf4_r{RANK}", f"llama_r{RANK}"]
    kinds = {
        name.rpartition(".")[2]: type(module).__module__.split(".")[0]
        for name, module in ours.named_modules()
        if name in report.accelerated
    }
    plain = {name for name, package in kinds.items() if "nf4" not in package}
    assert plain == {"down_proj", "k_proj"} and len(kinds) == 7
    near(ours(TOKENS).logits, theirs(TOKENS).logits)
    near(gradients(ours, TOKENS), gradients(theirs, TOKENS))
    assert len(runlora_gen.restore(ours)) == ALL


def test_dropout_trains(saved: Path, out: Path) -> None:
    theirs = with_lora(quantized(saved), lora_dropout=0.5)
    ours = accelerated(theirs, out, dropout=0.5)
    near(ours.eval()(TOKENS).logits, theirs.eval()(TOKENS).logits)
    ours.train()
    first, second = gradients(ours, TOKENS), gradients(ours, TOKENS)
    assert len(first) == 2 * ALL and all(gradient.isfinite().all() for gradient in first.values())
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_a_package_proves_itself(tmp_path: Path) -> None:
    """With the kernels' ways, whose torch path runs here: also where some gradients alone are wanted."""
    runlora_gen.generate("llama-13b", rank=8, output=tmp_path, base="nf4", dropout=0.1, target_modules="q_proj,k_proj")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not kernels", str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "RUNLORA_EXAMPLES": "4"}, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_losses_of_a_training_are_peft_s(saved: Path, out: Path) -> None:
    curves = []
    for model in pair(saved, out):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(60):
            loss = model(FEW, labels=FEW).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < 0.8 * curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=1e-4)


# Without PEFT


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default.weight", "")


def injected(saved: Path, out: Path, **options: Any) -> Any:
    model = quantized(saved, **options)
    report = runlora_gen.inject_lora(model, RANK, 8, output=out / "injected", **OPTIONS)
    assert len(report.accelerated) == ALL and report.groups + report.mlps == 4 and set(report.left) == {"lm_head"}
    return filled(model)


@pytest.mark.parametrize("compute", DTYPES, ids=str)
def test_injected_layers_train_as_peft_s(saved: Path, out: Path, tmp_path: Path, compute: torch.dtype) -> None:
    model = injected(saved, out / str(compute), compute=compute)
    runlora_gen.save_adapter(model, tmp_path)
    other = peft.PeftModel.from_pretrained(quantized(saved, compute=compute), tmp_path, is_trainable=True)
    found = gradients(model, TOKENS)
    wanted = {plain_name(name): gradient for name, gradient in gradients(other, TOKENS).items()}
    if compute == torch.float32:
        near(model(TOKENS).logits, other(TOKENS).logits)
        near(found, wanted)
    else:
        nearly(found, wanted)
    loaded = quantized(saved, compute=compute)
    runlora_gen.load_adapter(loaded, tmp_path, output=out / str(compute) / "injected", **OPTIONS)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    with runlora_gen.disable_adapter(model), other.disable_adapter():
        torch.testing.assert_close(model(TOKENS).logits, other(TOKENS).logits)


def test_codes_are_never_merged(saved: Path, out: Path) -> None:
    model = injected(saved, out)
    wanted = model(TOKENS).logits
    with pytest.raises(ValueError, match="weights of 4 bits hold no update: load the base in 16 bits, and merge"):
        runlora_gen.merge(model)
    runlora_gen.unmerge(model)
    assert torch.equal(model(TOKENS).logits, wanted)


def test_a_model_is_saved_with_what_its_codes_need(saved: Path, out: Path, tmp_path: Path) -> None:
    base = quantized(saved)
    model = injected(saved, out)
    state = model.state_dict()
    assert {name: state[name].shape for name in base.state_dict()} == {
        name: tensor.shape for name, tensor in base.state_dict().items()
    }
    prefix = "model.layers.0.mlp.up_proj.weight"
    parts = {name.removeprefix(f"{prefix}.") for name in state if name.startswith(f"{prefix}.")}
    assert {"absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"} <= parts
    # As Transformers reads it: the base by its state, the adapter beside it.
    base.save_pretrained(tmp_path, state_dict={name: t for name, t in state.items() if "lora_" not in name})
    runlora_gen.save_adapter(model, tmp_path / "adapter")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float32)
    runlora_gen.load_adapter(again, tmp_path / "adapter", output=out / "injected", **OPTIONS)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


# What is refused


def linear(kind: str = "nf4", *, moved: bool = True, nested: bool = False, shape: tuple[int, int] = (96, 64)) -> Any:
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        shape[1], shape[0], bias=False, compute_dtype=torch.float32, quant_type=kind, compress_statistics=nested
    )
    return layer.to("cpu") if moved else layer


def test_a_layer_without_codes_yet_is_named(out: Path, tmp_path: Path) -> None:
    """bitsandbytes quantizes where a layer is moved to its device."""

    class Model(nn.Module):
        is_loaded_in_4bit = True  # what PEFT asks for

        def __init__(self, second: Any) -> None:
            super().__init__()
            self.first, self.second = linear(), second

    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=["first", "second"])
    model = peft.get_peft_model(Model(linear(moved=False)), config)
    with pytest.raises(ValueError, match="1 left: its base is not quantized yet: move it to its device first"):
        runlora_gen.accelerate(model, tmp_path, strict=True, **OPTIONS)
    bare = Model(linear(moved=False))
    with pytest.raises(ValueError, match="move it to its device first"):
        runlora_gen.inject_lora(bare, RANK, 8, output=tmp_path, **OPTIONS)
    assert not any(hasattr(module, "lora_A") for module in bare.modules())


@pytest.fixture(scope="module")
def generated(saved: Path, out: Path) -> Any:
    """One of the generated modules: they all have the class and its checks."""
    package = imported(runlora_gen.generate(quantized(saved), rank=RANK, output=out / "alone", **OPTIONS)[0])
    return package.shapes._MODULES[0]


ABSMAX = "absmax must have 96 elements, for 96x64 in blocks of 64, got 95"


@pytest.mark.parametrize(
    ("nested", "changes", "error", "message"),
    [
        (False, {"blocksize": 48}, ValueError, "blocksize must be a power of two from 32 to 4096, got 48"),
        (False, {"blocksize": 128}, ValueError, "absmax must have 48 elements, for 96x64 in blocks of 128, got 96"),
        (False, {"absmax": torch.ones(95)}, ValueError, ABSMAX),
        (True, {"absmax": torch.ones(95, dtype=torch.uint8)}, ValueError, ABSMAX),
        (False, {"absmax": torch.ones(96).half()}, TypeError, "absmax must be torch.float32, got torch.float16"),
        (True, {"absmax": torch.ones(96)}, TypeError, "absmax must be torch.uint8, got torch.float32"),
        (False, {"absmax": torch.ones(96, device="meta")}, ValueError, "on the device of the codes, cpu, got meta"),
        (False, {"code": torch.ones(256)}, ValueError, "code must have 16 elements"),
        (False, {"shape": (96, 63)}, ValueError, "codes must have 3024 elements"),
        (False, {"shape": (2, 48, 64)}, ValueError, r"shape must be \(out_features, in_features\), got \(2, 48, 64\)"),
        (False, {"quant_type": "int4"}, ValueError, "quant_type must be nf4 or fp4, got 'int4'"),
        (True, {"offset": None}, ValueError, "offset must have 1 elements"),
        (True, {"offset": torch.ones(1).double()}, TypeError, "offset must be torch.float32, got torch.float64"),
        (False, {"packing_format_for_cpu": True}, ValueError, "must not be packed for inference on a CPU"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else None,
)
def test_a_corrupt_quant_state_is_named(
    generated: Any, nested: bool, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    weight = linear(nested=nested).weight
    assert generated.Quantized.of(weight).shape == (96, 64)
    state = copy.copy(weight.quant_state)
    for name, value in changes.items():
        setattr(state, name, value)
    with pytest.raises(error, match=message):
        generated.Quantized.of(weight.data, state)


def test_parts_of_nested_scales_are_checked_as_well(generated: Any) -> None:
    weight = linear(nested=True, shape=(256, 128)).weight
    assert generated.Quantized.of(weight).absmax2.numel() == 2
    for name, value, message in (
        ("absmax", torch.ones(3), "state2.absmax must have 2 elements"),
        ("code", torch.ones(16), "state2.code must have 256 elements"),
        ("absmax", torch.ones(2).half(), "state2.absmax must be torch.float32"),
    ):
        state = copy.copy(weight.quant_state)
        state.state2 = copy.copy(state.state2)
        setattr(state.state2, name, value)
        with pytest.raises((ValueError, TypeError), match=message):
            generated.Quantized.of(weight.data, state)


def test_codes_of_another_size_or_without_a_state_are_named(generated: Any) -> None:
    weight = linear().weight
    with pytest.raises(ValueError, match="codes must have 3072 elements, for 96x64 in blocks of 64, got 3071"):
        generated.Quantized.of(weight.data[:-1], weight.quant_state)
    with pytest.raises(ValueError, match="must be of 4 bits, with bitsandbytes' quant_state: move it to its device"):
        generated.Quantized.of(linear(moved=False).weight)
    with pytest.raises(ValueError, match="must be of 4 bits, with bitsandbytes' quant_state: move it to its device"):
        generated.Quantized.of(torch.zeros(96, 64))


# Nothing of it


def test_peft_layers_on_embeddings_alone(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=RANK, target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match="1 left: a layer.Embedding is not covered"):
        assert not runlora_gen.accelerate(model, tmp_path).accelerated


def test_no_adapter_is_left(tmp_path: Path) -> None:
    model = with_lora()
    model.base_model.set_adapter([])
    with pytest.warns(UserWarning, match="14 left: no adapter is active"):
        assert not runlora_gen.accelerate(model, tmp_path).accelerated
    with pytest.raises(ValueError, match="no LoRA layer of PEFT on a linear"):
        runlora_gen.accelerate(llama(), tmp_path)
