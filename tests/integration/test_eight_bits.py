"""Bases of 8 bits on generated modules: int8 of bitsandbytes, and float8_e4m3fn as Transformers stores it.

Transformers multiplies float8 in kernels that it downloads, for GPUs alone. In their place stands here what they are an
approximation of: a product with the weight that Transformers itself makes of the codes, in the backward.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import runlora_gen
import torch
import transformers
from runlora_gen.into_model.packages import imported
from torch import Tensor, nn
from torch.nn import functional as F

from .models import RANK, VOCABULARY, checkpointed, filled, float8, gradients, llama, with_lora

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="needs Transformers with FP8Linear")
fbgemm = pytest.importorskip("transformers.integrations.fbgemm_fp8", reason="needs Transformers with FbgemmFp8Linear")

#: Deprecations of Transformers and of bitsandbytes among themselves.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

ALL = 14
E4M3 = torch.float8_e4m3fn
BASES = ["int8", "fp8", "fp8-block"]
every_base = pytest.mark.parametrize("base", BASES)
DTYPES = [torch.float32, torch.bfloat16]
#: More than are left to bitsandbytes' kernels for few tokens, where there are no gradients.
TOKENS = torch.randint(VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(2))
FEW = TOKENS[:2, :12]
OPTIONS: dict[str, Any] = {"tokens": 64, "kernels": False}
UP = "layers.0.mlp.up_proj"


def multiply(x: Tensor, weight: Tensor, scale: Tensor, block: Any, bias: Tensor | None, *_: Any) -> Tensor:
    """What FP8Linear's kernels approximate: like them it gives x's dtype, whatever autocast says."""
    made = fp8._dequantize_fp8_weight(weight, scale, block, torch.float32).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, made, bias)


@pytest.fixture(scope="module", autouse=True)
def _float8_is_multiplied() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "fp8_linear", multiply)
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for layers in (1, 2):
        llama(num_hidden_layers=layers).save_pretrained(folder / str(layers))
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where packages are generated: what is there and up to date is used as it is."""
    return tmp_path_factory.mktemp("packages")


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def quantized(
    saved: Path, base: str, dtype: torch.dtype = torch.float32, layers: int = 2, skip: tuple[str, ...] = ()
) -> Any:
    """The same Llama on such a base, but for the linears that are skipped."""
    if base == "int8":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
        config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[*skip, "lm_head"])
        options: dict[str, Any] = {"quantization_config": config, "device_map": "cpu", "dtype": dtype}
        return transformers.AutoModelForCausalLM.from_pretrained(saved / str(layers), **options).train()
    model = llama(dtype, num_hidden_layers=layers)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name.rpartition(".")[2] not in (*skip, "lm_head"):
            replace(model, name, float8(linear, base))
    return model


def accelerated(model: Any, out: Path, **options: Any) -> Any:
    """A copy that runs on generated modules, without a warning."""
    model = copy.deepcopy(model)
    first = model.get_submodule(f"base_model.model.model.{UP}.base_layer")
    kind = f"{type(first).__name__}_{getattr(first, 'block_size', None) is None}"
    dtype = str(model.get_submodule("base_model.model.model.norm").weight.dtype)[6:]
    layers = len(model.get_submodule("base_model.model.model.layers"))
    folder = out / f"{kind}_{dtype}_{layers}_{'_'.join(options)}"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = runlora_gen.accelerate(model, folder, strict=True, **OPTIONS, **options)
    assert len(report.accelerated) == 7 * layers and not report.left
    assert report.groups + report.mlps == 2 * layers, "q, k, v, and gate, up or the whole MLP, of each layer"
    assert report.grouped == 5 * layers - 2 * report.mlps
    return model


def pair(saved: Path, out: Path, base: str, **options: Any) -> tuple[Any, Any]:
    """PEFT's and ours."""
    model = with_lora(quantized(saved, base, **options))
    return model, accelerated(model, out)


def near(found: Tensor | Mapping[str, Tensor], wanted: Tensor | Mapping[str, Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)


def nearly(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """In bf16 a gradient is off by some of its ulps, of the largest that it has."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 0.06 * gradient.abs().max(), name


def plain_of(model: Any) -> Any:
    """The same with the weights that its codes stand for, in float32, in linears of torch."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        scale = getattr(module, "weight_scale", None)
        if scale is not None:
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = nn.Parameter(module.weight.float() * scale, requires_grad=False)
            replace(model, name, linear)
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_base
def test_outputs_and_gradients_are_peft_s(saved: Path, out: Path, base: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(saved, out, base, dtype=dtype)
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


def test_a_scale_for_each_row_as_fbgemm_has_it(saved: Path, out: Path) -> None:
    """Its kernels run nowhere here: ours is held against the weights that the codes stand for."""
    model = with_lora(quantized(saved, "fbgemm"))
    ours, plain = accelerated(model, out), plain_of(model)
    near(ours(TOKENS).logits, plain(TOKENS).logits)
    near(gradients(ours, TOKENS), gradients(plain, TOKENS))


@pytest.mark.parametrize("base", ["int8", "fp8-block"])
def test_compiled_whole(saved: Path, out: Path, base: str) -> None:
    theirs, ours = pair(saved, out, base, layers=1)
    wanted = gradients(theirs, TOKENS)
    torch._dynamo.reset()
    step = torch.compile(
        lambda ids: ours(input_ids=ids, labels=ids, use_cache=False).loss, fullgraph=True, backend="aot_eager"
    )
    for _ in range(2):
        ours.zero_grad()
        step(TOKENS).backward()
        near({name: p.grad for name, p in ours.named_parameters() if p.grad is not None}, wanted)


@every_base
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(saved: Path, out: Path, base: str, reentrant: bool) -> None:
    theirs, ours = pair(saved, out, base, layers=1)
    wanted = gradients(theirs, TOKENS)
    ours.enable_input_require_grads()
    near(gradients(checkpointed(ours, use_reentrant=reentrant).train(), TOKENS), wanted)


@every_base
def test_under_autocast_the_dtype_is_peft_s(saved: Path, out: Path, base: str) -> None:
    theirs, ours = pair(saved, out, base)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = theirs(TOKENS).logits, ours(TOKENS).logits
        assert found.dtype == wanted.dtype == torch.bfloat16
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02)
        nearly(gradients(ours, TOKENS), gradients(theirs, TOKENS))
        path, x = "base_model.model.model.layers.0.mlp.down_proj", torch.randn(200, 96)
        for given in (x, x.bfloat16()):
            output = ours.get_submodule(path)(given)
            assert output.dtype == given.dtype and torch.equal(output, output.bfloat16().to(given.dtype))
            if base != "int8":  # what is so on GPUs, too: on a CPU bitsandbytes' product has autocast's dtype
                assert theirs.get_submodule(path)(given).dtype == given.dtype


@every_base
def test_without_gradients(saved: Path, out: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens of int8 are left to bitsandbytes' kernels, which make no weight; all others are ours."""
    theirs, ours = pair(saved, out, base)
    kind = type(ours.get_submodule("base_model.model.model.layers.0.mlp.down_proj"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        wanted = theirs(TOKENS).logits
        theirs.eval(), ours.eval()
        if base == "int8":
            assert torch.equal(ours(FEW).logits, theirs(FEW).logits)
        else:
            near(ours(FEW).logits, theirs(FEW).logits)
        monkeypatch.setattr(kind.replaces, "forward", None)  # what is never called
        near(ours(TOKENS).logits, wanted)
        if base != "int8":
            assert ours.generate(FEW, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 14)


@every_base
def test_adapters_go_from_one_to_the_other(saved: Path, out: Path, tmp_path: Path, base: str) -> None:
    theirs, ours = pair(saved, out, base)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    wanted = theirs(TOKENS).logits
    states = []
    for name in ("theirs", "ours"):
        plain = peft.PeftModel.from_pretrained(quantized(saved, base), tmp_path / name, is_trainable=True)
        for model in (plain.train(), accelerated(plain, out)):
            near(model(TOKENS).logits, wanted)
            states.append(peft.get_peft_model_state_dict(model))
    for state in states[1:]:
        assert state.keys() == states[0].keys() and all(torch.equal(state[key], states[0][key]) for key in state)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@every_base
def test_disabled_restored_and_with_other_adapters(saved: Path, out: Path, base: str) -> None:
    theirs, ours = pair(saved, out, base)
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)
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


def test_merging_is_peft_s(saved: Path, out: Path) -> None:
    """It quantizes the sum anew; while it is merged PEFT's own code runs, and ours afterwards, on what that left."""
    theirs, ours = pair(saved, out, "int8", layers=1)
    for change in ("merge_adapter", "unmerge_adapter"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PEFT's, of what rounding loses
            for model in (theirs, ours):
                getattr(model, change)()
        compare = torch.testing.assert_close if change == "merge_adapter" else near
        compare(ours(TOKENS).logits, theirs(TOKENS).logits)
    near(gradients(ours, TOKENS), gradients(theirs, TOKENS))


@pytest.mark.parametrize("base", ["int8", "fp8-block"])
def test_dropout_trains(saved: Path, out: Path, base: str) -> None:
    theirs = with_lora(quantized(saved, base, layers=1), lora_dropout=0.5)
    ours = accelerated(theirs, out, dropout=0.5)
    with torch.no_grad():
        wanted = theirs.apply(lambda m: m.eval() if isinstance(m, nn.Dropout) else m)(TOKENS).logits
        near(ours.eval()(TOKENS).logits, wanted)
    ours.train()
    first, second = gradients(ours, TOKENS), gradients(ours, TOKENS)
    assert len(first) == ALL and all(gradient.isfinite().all() for gradient in first.values())
    assert not any(torch.equal(first[name], second[name]) for name in first)


def packages_by_projection(model: nn.Module, report: Any) -> dict[str, str]:
    """Which package serves which projections."""
    return {
        name.rpartition(".")[2]: type(module).__module__.split(".")[0]
        for name, module in model.named_modules()
        if name in report.accelerated
    }


def test_rounding_that_nobody_asked_for_is_told_of(saved: Path, tmp_path: Path) -> None:
    """Where the profile says that products may be of float8, and the user said nothing of them."""
    model = with_lora(quantized(saved, "fp8", torch.bfloat16, layers=1))
    options: dict[str, Any] = {"tokens": 64, "device": "h100"}
    with pytest.warns(UserWarning, match="rounded to float8 where that is faster.*: float8=none keeps them"):
        runlora_gen.accelerate(model, tmp_path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for float8 in ("both", "none"):
            runlora_gen.accelerate(
                with_lora(quantized(saved, "fp8", torch.bfloat16, layers=1)), tmp_path, float8=float8, **options
            )


def test_a_mixed_model_has_a_package_for_each_base(saved: Path, tmp_path: Path) -> None:
    """Some linears are as they were, and others in int8, in float8 with and without blocks, or by rows."""
    model = quantized(saved, "int8", layers=1, skip=("q_proj", "o_proj", "down_proj", "gate_proj"))
    for name, base in (("self_attn.o_proj", "fp8"), ("mlp.down_proj", "fp8-block")):
        replace(model, f"model.layers.0.{name}", float8(model.get_submodule(f"model.layers.0.{name}"), base))
    theirs = with_lora(model)
    ours = copy.deepcopy(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = runlora_gen.accelerate(ours, tmp_path, strict=True, float8="forward", **OPTIONS)
    assert len(report.accelerated) == 7 and not report.left
    assert (report.groups, report.grouped) == (1, 2), "k and v, which are of one kind"
    expected = [f"llama_{kind}r{RANK}" for kind in ("fp8_", "fp8_block_", "int8_", "")]
    assert sorted(folder.name for folder in report.folders) == sorted(expected)
    found = packages_by_projection(ours, report)
    by_kind = {kind: {n for n, package in found.items() if f"llama_{kind}r{RANK}" in package} for kind in ("", "int8_")}
    assert by_kind == {"": {"q_proj", "gate_proj"}, "int8_": {"k_proj", "v_proj", "up_proj"}}
    near(ours(TOKENS).logits, theirs(TOKENS).logits)
    near(gradients(ours, TOKENS), gradients(theirs, TOKENS))
    assert len(runlora_gen.restore(ours)) == 7


def test_another_package_s_base_is_named(saved: Path, out: Path) -> None:
    """Whoever has a package at hand is told that it is for linears of another kind."""
    theirs = with_lora(quantized(saved, "fp8", layers=1))
    blocks = with_lora(quantized(saved, "fp8-block", layers=1))
    (folder,) = runlora_gen.generate(theirs, output=out / "named", **OPTIONS)
    package = imported(folder)
    assert package.shapes.BASE == "fp8"
    with pytest.warns(UserWarning, match=f"7 left: a base in fp8-block is not in {folder.name}"):
        assert not package.accelerate(blocks).accelerated
    with pytest.warns(UserWarning, match=f"7 left: a base that is not quantized is not in {folder.name}"):
        assert not package.accelerate(with_lora(llama(num_hidden_layers=1))).accelerated
    assert len(package.accelerate(theirs).accelerated) == 7


# Without PEFT


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default.weight", "")


def injected(model: Any, out: Path, base: str, **options: Any) -> Any:
    report = runlora_gen.inject_lora(model, RANK, 8, output=out / f"injected_{base}", **OPTIONS, **options)
    layers = len(model.model.layers)
    assert len(report.accelerated) == 7 * layers and report.groups + report.mlps == 2 * layers
    assert set(report.left) == {"lm_head"}
    return filled(model)


@every_base
def test_injected_layers_train_as_peft_s(saved: Path, out: Path, tmp_path: Path, base: str) -> None:
    model = injected(quantized(saved, base), out, base)
    runlora_gen.save_adapter(model, tmp_path)
    other = peft.PeftModel.from_pretrained(quantized(saved, base), tmp_path, is_trainable=True).train()
    near(model(TOKENS).logits, other(TOKENS).logits)
    wanted = {plain_name(name): gradient for name, gradient in gradients(other, TOKENS).items()}
    near(gradients(model, TOKENS), wanted)
    loaded = quantized(saved, base)
    runlora_gen.load_adapter(loaded, tmp_path, output=out / f"injected_{base}", **OPTIONS)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    with runlora_gen.disable_adapter(model), other.disable_adapter():
        torch.testing.assert_close(model(TOKENS).logits, other(TOKENS).logits)


@every_base
def test_injected_in_bf16_has_adapters_in_float32(saved: Path, out: Path, base: str) -> None:
    model = injected(quantized(saved, base, torch.bfloat16, layers=1), out / "bf16", base)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert model(TOKENS).logits.dtype == torch.bfloat16
    assert len(gradients(model, TOKENS)) == ALL


@every_base
def test_codes_are_never_merged(saved: Path, out: Path, base: str) -> None:
    model = injected(quantized(saved, base, layers=1), out, base)
    wanted = model(TOKENS).logits
    with pytest.raises(ValueError, match="weights of 8 bits hold no update: load the base in 16 bits, and merge"):
        runlora_gen.merge(model)
    runlora_gen.unmerge(model)
    assert torch.equal(model(TOKENS).logits, wanted)


@pytest.mark.parametrize("base", [*BASES, "fbgemm"])
def test_a_state_has_what_the_base_s_has(saved: Path, out: Path, base: str) -> None:
    """Under the same names: what is saved of an injected model is a checkpoint of its base, beside its adapter."""
    build = functools.partial(quantized, saved, base, layers=1)
    plain, model, again = build(), injected(build(), out, base), injected(build(), out, base)
    state, stored = model.state_dict(), plain.state_dict()
    assert {name for name in state if "lora_" not in name} == stored.keys()
    assert all(
        state[name].dtype == t.dtype and torch.equal(state[name].float(), t.float()) for name, t in stored.items()
    )
    with torch.no_grad():
        for tensor in again.state_dict().values():
            tensor.zero_()  # also codes and scales: all of it is loaded
    assert not again(FEW).logits.any()
    loaded = again.load_state_dict(copy.deepcopy(state))
    assert not loaded.missing_keys and not loaded.unexpected_keys
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_int8_is_saved_as_transformers_reads_it(saved: Path, out: Path, tmp_path: Path) -> None:
    base = quantized(saved, "int8", layers=1)
    model = injected(quantized(saved, "int8", layers=1), out, "int8")
    base.save_pretrained(tmp_path, state_dict={n: t for n, t in model.state_dict().items() if "lora_" not in n})
    runlora_gen.save_adapter(model, tmp_path / "adapter")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float32)
    runlora_gen.load_adapter(again, tmp_path / "adapter", output=out / "injected_int8", **OPTIONS)
    assert torch.equal(again.train()(TOKENS).logits, model(TOKENS).logits)


def test_static_scales_of_activations_stay_in_the_state(out: Path) -> None:
    """Such checkpoints have a scale of the input, too, which nothing reads here."""
    model = nn.Sequential(float8(nn.Linear(64, 96), "fp8-block", activation_scheme="static"), nn.ReLU())
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "0.activation_scale" in stored and "0.bias" in stored
    runlora_gen.inject_lora(model, RANK, output=out / "static", target_modules=["0"], **OPTIONS)
    state = model.state_dict()
    assert stored.keys() == {name for name in state if "lora_" not in name}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"0.lora_A", "0.lora_B"}


# What is refused


def linear8(*, moved: bool = True, wide: bool = False) -> Any:
    modules = pytest.importorskip("bitsandbytes.nn", reason="needs bitsandbytes")
    torch.manual_seed(0)
    layer = modules.Linear8bitLt(64, 96, bias=False, has_fp16_weights=wide)
    return layer.to("cpu") if moved else layer


class Two(nn.Module):
    is_loaded_in_8bit = True  # what PEFT asks for

    def __init__(self, second: Any) -> None:
        super().__init__()
        self.first, self.second = linear8(), second


CONFIG = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=["first", "second"])


def test_what_holds_no_codes_is_named(tmp_path: Path) -> None:
    """bitsandbytes quantizes where a layer is moved to its device, and may keep the weights besides."""
    for second, reason in (
        (linear8(moved=False), "its base is not quantized yet: move it to its device first"),
        (linear8(wide=True), r"its base keeps 16-bit weights \(has_fp16_weights\)"),
    ):
        model = peft.get_peft_model(Two(second), CONFIG)
        with pytest.raises(ValueError, match=f"1 left: {reason}"):
            runlora_gen.accelerate(model, tmp_path, strict=True, **OPTIONS)
    bare = Two(linear8(moved=False))
    with pytest.raises(ValueError, match="move it to its device first"):
        runlora_gen.inject_lora(bare, RANK, 8, output=tmp_path, **OPTIONS)
    assert not any(hasattr(module, "lora_A") for module in bare.modules())


def test_codes_that_were_made_wide_are_named(saved: Path, tmp_path: Path) -> None:
    """As ``float()`` of a whole model makes them."""
    model = with_lora(quantized(saved, "fp8", torch.bfloat16, layers=1))
    base = model.get_submodule(f"base_model.model.model.{UP}").base_layer
    base.weight = nn.Parameter(base.weight.float(), requires_grad=False)
    with pytest.warns(UserWarning, match="1 left: a FP8Linear with a weight of torch.float32 is not covered"):
        report = runlora_gen.accelerate(model, tmp_path, **OPTIONS)
    assert len(report.accelerated) == 6


def test_a_replaced_forward_is_left(saved: Path, tmp_path: Path) -> None:
    model = with_lora(quantized(saved, "fp8-block", layers=1))
    base = model.get_submodule(f"base_model.model.model.{UP}").base_layer
    base.forward = functools.partial(type(base).forward, base)
    with pytest.warns(UserWarning, match="1 left: its forward was replaced"):
        assert len(runlora_gen.accelerate(model, tmp_path, **OPTIONS).accelerated) == 6


def test_scales_that_do_not_fit_are_named_and_nothing_is_changed(tmp_path: Path) -> None:
    linear = float8(nn.Linear(64, 96, bias=False), "fp8-block")
    linear.weight_scale_inv = nn.Parameter(torch.ones(6, 3))
    model = nn.Sequential(float8(nn.Linear(32, 64, bias=False), "fp8-block"), linear)
    with pytest.raises(ValueError, match="the scales must be 6x2, of blocks of 16x32 in 96x64, got 6x3"):
        runlora_gen.inject_lora(model, RANK, output=tmp_path, target_modules=["0", "1"], **OPTIONS)
    assert [type(module) for module in model] == [fp8.FP8Linear] * 2
