"""What a generated module promises beside its arithmetic: errors, autocast, compile, checkpoints, state."""

from __future__ import annotations

import ast
import copy
import io
import os
import pickle
import re
import shutil
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from runlora_gen.request.workload import Workload
from torch import Tensor
from torch.utils.checkpoint import checkpoint

T, I, O, R = 6, 5, 7, 3  # noqa: E741  # the notation of the whole project
LORA = {"scaling": 0.5}
SAMPLE = Path(__file__).parents[2] / "generated" / "llama_13b_r8"


def inputs(dtype: torch.dtype = torch.float32, *leading: int, bias: bool = True, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, trains: bool = True) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_(trains)

    return {
        "x": draw(*(leading or (T,)), I),
        "weight": draw(O, I, trains=False),
        "lora_A": draw(R, I),
        "lora_B": draw(O, R),
        "bias": draw(O) if bias else None,
    }


def plain(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, *, scaling: float) -> Tensor:
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, lora_A), lora_B)


def gradients(output: Tensor, tensors: dict[str, Any]) -> list[Tensor]:
    wanted = [t for t in tensors.values() if t is not None and t.requires_grad]
    return list(torch.autograd.grad(output.float().square().sum(), wanted))


def assert_same(function: Any, tensors: dict[str, Any], **tolerance: float) -> None:
    reference = plain(**tensors, **LORA)
    output = function(**tensors, **LORA)
    torch.testing.assert_close(output, reference, **tolerance)
    for ours, theirs in zip(gradients(output, tensors), gradients(reference, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize(
    ("workload", "argument"),
    [
        (Workload(train=("b",)), "lora_A"),
        (Workload(train=("a",)), "lora_B"),
        (Workload(input_grad=False), "x"),
    ],
)
def test_a_gradient_that_was_generated_away_is_refused(load: Any, workload: Workload, argument: str) -> None:
    module = load(workload)
    tensors = inputs()
    with pytest.raises(ValueError, match=f"^{argument} must not require a gradient"):
        module.lora_linear(**tensors, **LORA)
    tensors[argument].requires_grad_(False)
    assert_same(module.lora_linear, tensors)
    layer = module.LoRALinear(I, O, R)
    assert layer.lora_A.requires_grad == ("a" in workload.train)
    assert layer.lora_B.requires_grad == ("b" in workload.train)


def test_frozen_a_saves_no_input(load: Any) -> None:
    """LoRA-FA: with lora_A frozen the input need not be kept."""
    module = load(Workload(train=("b",)))
    tensors = inputs()
    tensors["lora_A"].requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module.lora_linear(**tensors, **LORA)
    assert not any(t.untyped_storage().data_ptr() == tensors["x"].untyped_storage().data_ptr() for t in saved)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast(module: ModuleType, adapter_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """As the original crashed: fp32 adapters over any base under autocast."""
    tensors = inputs(bias=False)
    tensors["weight"] = tensors["weight"].to(weight_dtype)
    for name in ("lora_A", "lora_B"):
        tensors[name] = tensors[name].detach().to(adapter_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = module.lora_linear(**tensors, **LORA)
        reference = plain(**tensors, **LORA)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, reference, rtol=0.05, atol=0.05)
    for ours, theirs in zip(gradients(output, tensors), gradients(reference, tensors), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.5)


def test_adapters_in_another_dtype_are_cast(module: ModuleType) -> None:
    tensors = inputs(torch.bfloat16)
    tensors["lora_A"] = tensors["lora_A"].detach().float().requires_grad_()
    output = module.lora_linear(**tensors, **LORA)
    gradient = torch.autograd.grad(output.sum(), tensors["lora_A"])[0]
    assert output.dtype == torch.bfloat16 and gradient.dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False])
def test_compile_without_graph_breaks(module: ModuleType, bias: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(module.lora_linear, fullgraph=True, backend="aot_eager")
    assert_same(compiled, inputs(bias=bias))


def test_compile_keeps_what_the_backward_accumulates(everything: ModuleType) -> None:
    """Torch 2.11 drops in-place writes in a compiled backward: every order of accumulation must survive."""
    for variant in everything.VARIANTS:
        if re.fullmatch(r"base_first/(?!merged)\w+-pt_x-dyt_s/keep-s", variant):  # a merge accumulates nothing
            torch.compiler.reset()
            run = partial(everything.lora_linear, variant=variant)
            assert_same(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs(bias=False))


def test_compile_every_range(merging: ModuleType) -> None:
    """Thresholds and the choice by dtype trace as well; so do dynamic token counts."""
    torch.compiler.reset()
    module = merging
    assert len(module.VARIANTS) > 1
    compiled = torch.compile(module.lora_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 5):
        assert_same(compiled, inputs(torch.float32, tokens))


def test_compile_under_autocast(module: ModuleType) -> None:
    torch.compiler.reset()

    def run(**tensors: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output: Tensor = module.lora_linear(**tensors, **LORA)
            return output

    tensors = inputs(bias=False)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(**tensors)
    eager = run(**tensors)
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(gradients(compiled, tensors), gradients(eager, tensors), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture(scope="module")
def layer(load: Any) -> Any:
    """Of a module on torch's products; followed by something, as in a model."""
    module = load(Workload(kernels=False, dtype="fp32"))
    made = module.LoRALinear.from_linear(torch.nn.Linear(64, 64), r=8, lora_alpha=16)
    torch.nn.init.normal_(made.lora_B)
    return torch.nn.Sequential(made, torch.nn.SiLU())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_export_whole(layer: Any, grad: bool, strict: bool) -> None:
    """As one graph, for any number of tokens; without a factor of a sum, which Inductor may drop."""
    tokens = torch.export.Dim("tokens", min=2, max=64)
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(layer, (torch.randn(6, 64),), dynamic_shapes=({0: tokens},), strict=strict)
        for count in (6, 9):
            x = torch.randn(count, 64)
            torch.testing.assert_close(exported.module()(x), layer(x))
    sums = [node for node in exported.graph.nodes if str(node.target).startswith(("aten.add.", "aten.add_."))]
    assert bool(sums) != grad and not any("alpha" in node.kwargs for node in sums)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_package_of_inductor(layer: Any, tmp_path: Path) -> None:
    """Compiled ahead and loaded again it is right: as it was not where a sum had a factor, the scaling."""
    x = torch.randn(6, 64)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "layer.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), layer(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(module: ModuleType, use_reentrant: bool) -> None:
    tensors = inputs()
    expected = plain(**tensors, **LORA)
    others = {name: t for name, t in tensors.items() if name != "x"}
    call = partial(module.lora_linear, **others, **LORA)
    output = checkpoint(call, tensors["x"], use_reentrant=use_reentrant)
    output.sum().backward()
    ours = {name: t.grad.clone() for name, t in tensors.items() if t is not None and t.grad is not None}
    for t in tensors.values():
        t.grad = None
    expected.sum().backward()
    torch.testing.assert_close(output, expected)
    assert set(ours) == {"x", "lora_A", "lora_B", "bias"}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, tensors[name].grad)


leading = pytest.mark.parametrize("leading", [(T,), (2, 3), (1, T)], ids=str)


@leading
def test_the_output_may_be_changed_in_place(module: ModuleType, leading: tuple[int, ...]) -> None:
    tensors = inputs(torch.float32, *leading)
    output = module.lora_linear(**tensors, **LORA)
    output.mul_(2)
    reference = plain(**tensors, **LORA) * 2
    for ours, theirs in zip(gradients(output, tensors), gradients(reference, tensors), strict=True):
        torch.testing.assert_close(ours, theirs)


@leading
def test_changing_the_input_in_place_before_the_backward_is_noticed(
    module: ModuleType, leading: tuple[int, ...]
) -> None:
    tensors = inputs(torch.float32, *leading)
    x = tensors["x"].clone()
    output = module.lora_linear(**{**tensors, "x": x}, **LORA)
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_gradients_accumulate_over_two_uses(module: ModuleType) -> None:
    tensors = inputs()
    twice = lambda f: f(**tensors, **LORA) + f(**{**tensors, "x": tensors["x"] * 2}, **LORA)  # noqa: E731
    for ours, theirs in zip(
        gradients(twice(module.lora_linear), tensors), gradients(twice(plain), tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def merging(load: Any) -> ModuleType:
    """Chosen for many tokens on a CPU in float32, where merging pays."""
    return load(Workload(tokens=(64, 65536), dtype="fp32", device="cpu"), in_features=768, out_features=768)


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(1, 100_000), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_the_selection_follows_thresholds_and_never_merges_16_bits(
    merging: ModuleType, tokens: int, dtype: torch.dtype
) -> None:
    chosen, forward = merging._select(tokens, dtype), merging._select_forward(tokens, dtype)
    assert chosen in merging.VARIANTS
    merges = "merged" in chosen, "merged" in forward.__qualname__.lower()
    if dtype != torch.float32 or tokens <= 128:  # decoding: W would be made anew for every token
        assert merges == (False, False)
    elif tokens >= 65536:
        assert merges == (True, True)


def test_a_merge_chosen_for_fp32_keeps_small_updates_of_16_bit_weights(load: Any) -> None:
    """The update is far below half an ulp of the weight: a merged bf16 weight would not move at all."""
    module = load(Workload(tokens=(65536,), dtype="fp32", device="cpu"), in_features=768, out_features=768)
    merged = next(name for name in module.VARIANTS if name.startswith("merged"))
    # The base cancels (1 - 1), so that the output is the update alone: 2⁻¹⁰, an eighth of an ulp of 1 in bf16.
    weight = torch.tensor([[1.0, -1.0]]).bfloat16()
    lora_A, lora_B = torch.tensor([[2.0**-5, 0.0]]).bfloat16(), torch.tensor([[2.0**-5]]).bfloat16()
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    assert float(module.lora_linear(x, weight, lora_A, lora_B, scaling=1.0)) == 2.0**-10
    assert float(module.lora_linear(x, weight, lora_A, lora_B, scaling=1.0, variant=merged)) == 0


def test_layer_state(module: ModuleType) -> None:
    layer = module.LoRALinear(I, O, R, lora_alpha=6, bias=True, dtype=torch.float64)
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    assert [tuple(p.shape) for p in layer.parameters()] == [(O, I), (O,), (R, I), (O, R)]
    assert layer.scaling == 2 and not layer.lora_B.any() and layer.lora_A.any()
    torch.nn.init.normal_(layer.lora_B)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = module.LoRALinear(I, O, R, lora_alpha=6, bias=True, dtype=torch.float64)
    other.load_state_dict(torch.load(buffer))
    x = torch.randn(2, 3, I, dtype=torch.float64)
    torch.testing.assert_close(other(x), layer(x))
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), layer(x))
    assert "in_features=5, out_features=7, r=3, scaling=2.0, bias=True" in repr(layer)


def test_layer_defaults_are_the_generated_shape(module: ModuleType) -> None:
    layer = module.LoRALinear(device="meta")
    assert layer.weight.shape == (module.OUT_FEATURES, module.IN_FEATURES)
    assert layer.lora_A.shape == (module.RANK, module.IN_FEATURES)


def test_from_linear_draws_the_adapter_where_the_linear_is(module: ModuleType) -> None:
    linear = torch.nn.Linear(I, O, bias=False, dtype=torch.bfloat16)
    layer = module.LoRALinear.from_linear(linear, r=R)
    assert layer.weight is linear.weight and layer.bias is None and not linear.weight.requires_grad
    assert layer.lora_A.device.type == "cpu" and layer.lora_A.dtype == torch.float32 and layer.lora_A.any()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    before = layer.lora_B.detach().clone()
    layer(torch.randn(4, I, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, layer.lora_B)


@pytest.mark.parametrize("generated_for", ["fp32", "bf16"])
def test_adapters_are_wide_over_a_narrow_base_unless_asked_otherwise(load: Any, generated_for: str) -> None:
    """As PEFT has them: steps of lr 1e-5 are lost in bfloat16, where 1 + 1e-5 is 1."""
    module = load(Workload(adapter_dtype=generated_for))
    default = torch.float32 if generated_for == "fp32" else torch.bfloat16
    for dtype, adapter, expected in (
        (torch.bfloat16, None, default),
        (torch.bfloat16, torch.float16, torch.float16),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
    ):
        layer = module.LoRALinear(I, O, R, dtype=dtype, adapter_dtype=adapter)
        linear = torch.nn.Linear(I, O, dtype=dtype)
        for made in (layer, module.LoRALinear.from_linear(linear, R, adapter_dtype=adapter)):
            assert (made.weight.dtype, made.lora_A.dtype, made.lora_B.dtype) == (dtype, expected, expected)
    layer = module.LoRALinear(I, O, R, dtype=torch.bfloat16)
    torch.nn.init.ones_(layer.lora_A)
    x = torch.ones(1, I, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=1e-5)
    torch.nn.init.ones_(layer.lora_B)
    layer(x).sum().backward()
    before = layer.lora_A.detach().clone()
    optimizer.step()
    assert torch.equal(before, layer.lora_A) == (generated_for == "bf16")


class Conv1D(torch.nn.Module):
    """As Transformers has it for GPT-2: its weight is (in_features, out_features)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = torch.nn.Parameter(torch.randn(nx, nf))
        self.bias = torch.nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_from_linear_takes_conv1d(module: ModuleType) -> None:
    base = Conv1D(O, I)
    layer = module.LoRALinear.from_linear(base, r=R)
    assert layer.weight is base.weight and layer.fan_in_fan_out and (layer.in_features, layer.out_features) == (I, O)
    assert layer.bias is base.bias and not base.weight.requires_grad and not base.bias.requires_grad
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 3, I)
    torch.testing.assert_close(layer(x), base(x) + layer.scaling * (x @ layer.lora_A.t() @ layer.lora_B.t()))
    layer(x).sum().backward()
    assert layer.lora_A.grad is not None and layer.weight.grad is None


@pytest.mark.parametrize("base", [torch.nn.Linear(I, O), Conv1D(O, I)], ids=["linear", "Conv1D"])
def test_merge_and_unmerge(module: ModuleType, base: torch.nn.Module) -> None:
    layer = module.LoRALinear.from_linear(base, r=R)
    torch.nn.init.normal_(layer.lora_B)
    x, frozen = torch.randn(2, 3, I), layer.weight.detach().clone()
    alone, adapted = base(x), layer(x)
    assert not layer.merged and layer.merge() == pytest.approx(1.0) and layer.merged
    torch.testing.assert_close(layer(x), adapted)
    assert torch.equal(base.weight, frozen), "who else has the weight sees nothing of it"
    assert layer.merge() == 1.0 and list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    torch.testing.assert_close(copy.deepcopy(layer)(x), adapted)
    layer.disable_adapters = True
    torch.testing.assert_close(layer(x), alone)
    layer.unmerge()
    torch.testing.assert_close(layer(x), alone)
    layer.disable_adapters = False
    assert torch.equal(layer.weight, frozen) and not layer.merged and not layer.weight.requires_grad
    torch.testing.assert_close(layer(x), adapted)


def test_merge_says_what_16_bits_drop(module: ModuleType) -> None:
    """Weights around 1 and an update of 2⁻¹², far below half of bfloat16's 2⁻⁷ there: nothing of it is held."""
    linear = torch.nn.Linear(I, O, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(linear.weight)
    layer = module.LoRALinear.from_linear(linear, r=1, lora_alpha=1)
    torch.nn.init.constant_(layer.lora_A, 2.0**-6)
    torch.nn.init.constant_(layer.lora_B, 2.0**-6)
    assert layer.merge() == 0
    layer.unmerge()
    torch.nn.init.ones_(layer.lora_B)
    torch.nn.init.ones_(layer.lora_A)
    assert layer.merge() == 1 and torch.equal(layer.weight, torch.full_like(layer.weight, 2.0))
    layer.unmerge()
    torch.nn.init.zeros_(layer.lora_B)
    assert layer.merge() == 1


def linear_like(name: str, module_name: str = "elsewhere", **attributes: Any) -> torch.nn.Module:
    """A linear of a class with another name, in another package, and with more to it."""
    kind = type(name, (torch.nn.Linear,), {"__module__": module_name})
    linear: torch.nn.Module = kind(I, O)
    for attribute, value in attributes.items():
        setattr(linear, attribute, value)
    return linear


def with_weight(name: str, weight: Tensor) -> torch.nn.Module:
    linear = linear_like(name)
    del linear.weight
    linear.register_buffer("weight", weight)
    return linear


def test_from_linear_refuses_what_it_would_break(module: ModuleType) -> None:
    """A trained adapter would be dropped, codes would be read as numbers: in silence."""
    adapted = torch.nn.Module()
    adapted.base_layer, adapted.lora_A = torch.nn.Linear(I, O), torch.nn.ModuleDict()
    packed = torch.nn.Module()
    packed.weight = lambda: torch.zeros(O, I)  # as torch.ao's quantized linears have it
    parametrized = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(I, O))
    refused: list[tuple[torch.nn.Module, type[Exception], str]] = [
        (module.LoRALinear(I, O, R), ValueError, "no adapter yet, got a LoRALinear"),
        (adapted, ValueError, "no adapter yet, got a Module"),
        (parametrized, TypeError, "a plain weight, got a ParametrizedLinear"),
        (
            with_weight("Linear4bit", torch.zeros(18, 1, dtype=torch.uint8)),
            TypeError,
            "not quantized, got a Linear4bit",
        ),
        (with_weight("Float8", torch.zeros(O, I).to(torch.float8_e4m3fn)), TypeError, "not quantized, got a Float8"),
        (linear_like("Linear8bitLt", "bitsandbytes.nn.modules"), TypeError, "not quantized, got a Linear8bitLt"),
        (packed, TypeError, "not quantized, got a Module"),
        (torch.nn.Conv1d(I, O, 1), TypeError, "a torch.nn.Linear or a Conv1D, got a Conv1d"),
    ]
    for base, error, message in refused:
        wanted = [p.requires_grad for p in base.parameters()]
        with pytest.raises(error, match=f"^linear must .*{message}"):
            module.LoRALinear.from_linear(base)
        assert wanted == [p.requires_grad for p in base.parameters()], "nothing is frozen on the way"


def test_functional_call(module: ModuleType) -> None:
    layer = module.LoRALinear(I, O, R, dtype=torch.float64)
    x = torch.randn(4, I, dtype=torch.float64)
    adapter = {"lora_A": torch.randn(R, I).double(), "lora_B": torch.randn(O, R).double()}

    def loss(adapter: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(layer, adapter, (x,))
        return output.square().sum()

    def reference(adapter: dict[str, Tensor]) -> Tensor:
        return plain(x, layer.weight, **adapter, bias=None, scaling=layer.scaling).square().sum()

    torch.testing.assert_close(loss(adapter), reference(adapter))
    torch.testing.assert_close(torch.func.grad(loss)(adapter), torch.func.grad(reference)(adapter))


def test_second_derivatives_past_a_transform_are_refused(module: ModuleType) -> None:
    """Gradients of torch.func depend on parameters that it does not differentiate: that must not be lost."""
    tensors = inputs(torch.float64)
    others = {name: t for name, t in tensors.items() if name != "x"}
    inner = torch.func.grad(lambda x: module.lora_linear(x, **others, **LORA).sum())(tensors["x"].detach())
    with pytest.raises(RuntimeError, match="no second derivatives"):
        inner.sum().backward()


@pytest.mark.parametrize("path", sorted(SAMPLE.glob("*.py")), ids=lambda path: path.name)
def test_the_sample_is_python_3_10(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    assert tree.body
