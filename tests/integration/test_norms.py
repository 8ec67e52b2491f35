"""RMSNorms that keep their input as it is: in models, and what is none of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runlora_gen
import torch
import transformers
from runlora_gen.into_model.packages import imported
from runlora_gen.measure.memory import saved_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .models import RANK, VOCABULARY, bitwise, checkpointed, gradients, llama, with_lora
from .test_runs_in import compiled_gradients

HALF = torch.bfloat16
HIDDEN = 64


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))


def in_half(**options: Any) -> Any:
    """With adapters of the base's dtype, and norms' weights that are not all one."""
    model = llama(HALF, **options)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + torch.randn(parameter.shape, generator=generator) / 4)
    return with_lora(model, autocast_adapter_dtype=False).train()


def norms(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("norm")]


def near(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """As 16 bits are after some layers."""
    assert wanted and found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        off = (found[name] - gradient).float().norm() / gradient.float().norm()
        assert off < 0.05, (name, off)


def test_a_model_computes_what_it_did(package: Any, tokens: Tensor) -> None:
    """Outputs to the bit; gradients, which are made of float32 with one rounding, near."""
    model = in_half()
    plain = copy.deepcopy(model)
    package.accelerate(plain, strict=True)
    for norm in norms(plain):
        norm.__class__ = type(norm).replaces
    report = package.accelerate(model, strict=True)
    assert report.norms == len(norms(model)) == 5 and "; 5 norms)" in str(report)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    found, wanted = gradients(model, tokens), gradients(plain, tokens)
    near(found, wanted)
    assert any(not torch.equal(found[name], gradient) for name, gradient in wanted.items()), "another backward"
    exact = gradients(copy.deepcopy(plain).double(), tokens)
    errors = [
        sum((these[name].double() - gradient).square().sum() for name, gradient in exact.items())
        for these in (found, wanted)
    ]
    assert errors[0] < 1.2 * errors[1]


def test_what_is_kept(package: Any, tokens: Tensor) -> None:
    """Of the norms that what trains stands before: the input in 16 bits, in place of 32 and a number a row."""
    model = in_half()
    package.accelerate(model, strict=True)

    def kept() -> int:
        return saved_bytes(lambda: model(tokens, labels=tokens).loss, model.parameters())

    ours = kept()
    for norm in norms(model):
        norm.__class__ = type(norm).replaces
    # All but the first, whose input needs no gradient.
    assert kept() - ours == 4 * tokens.numel() * (2 * HIDDEN + 4)


FAMILIES = ("Gemma2", "Gemma3Text", "Glm4", "Granite", "Mistral", "Olmo2", "Phi3", "Qwen3", "SmolLM3")


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_families(package: Any, family: str) -> None:
    """Each is taken, and gives its gradient."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, **ids)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).to(HALF).requires_grad_(False)
    found = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    assert found and package.norms.count(model) == len(found)
    kind = package.norms.tried_norm(found[0])
    assert kind.offset == (1.0 if family.startswith("Gemma") else 0.0)
    norm = found[0]
    with torch.no_grad():
        norm.weight.add_(torch.randn(norm.weight.shape) / 4)
    x = (3 * torch.randn(2, 7, norm.weight.shape[0])).to(HALF).requires_grad_()
    dY = torch.randn(x.shape).to(HALF)
    plain = copy.deepcopy(norm)
    package.norms.form(model)
    assert type(norm) is not type(plain) and type(norm).__name__ == type(plain).__name__
    y, other = norm(x), plain(x)
    assert torch.equal(y, other) and y.grad_fn.name() != other.grad_fn.name()
    (back,), (wanted,) = (torch.autograd.grad(each, x, dY) for each in (y, other))
    wide = x.detach().double().requires_grad_()
    factor = norm.weight.double() + kind.offset
    exact = wide * (wide.square().mean(-1, keepdim=True) + kind.eps).rsqrt() * factor
    (exact_back,) = torch.autograd.grad(exact, wide, dY.double())
    assert (back - exact_back).abs().max() <= 1.05 * (wanted - exact_back).abs().max() + 1e-6
    torch.testing.assert_close(back.double(), exact_back, rtol=2**-8, atol=2**-8)


class Plain(nn.Module):
    """What the impostors differ from in one thing each."""

    def __init__(self, eps: float = 1e-5, features: int = HIDDEN) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def normed(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normed(x).to(x.dtype)


def test_that_one_is_taken(package: Any) -> None:
    assert package.norms.tried_norm(Plain()) == package.norms.Kind(1e-5, 0.0)
    assert package.norms.tried_norm(Plain(1e-12)) == package.norms.Kind(1e-12, 0.0)


class _Mean(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class _Clamped(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-2, 2)


class _LargeClamped(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-100, 100))


class _OutsideTheRoot(Plain):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.float()
        return self.weight * (rows / (rows.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)).to(x.dtype)


class _Absolute(Plain):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.float()
        return self.weight * (rows / (rows.abs().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class _Scaled(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.01


class _Half(Plain):
    """Of the first half of the features."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float()
        return self.weight * (rows * torch.rsqrt(rows[..., :32].pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class _Squared(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight.square() * self.normed(x).to(x.dtype)


class _InTraining(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (0.5 if self.training else 1.0)


class _Counting(Plain):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class _Dropping(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 1e-9, self.training)


class _Detached(Plain):
    """With a gradient of its own."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float()
        return self.weight * (rows * torch.rsqrt(rows.detach().pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class _Wide(Plain):
    """In float32 whatever is given."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.float() * self.normed(x)


class _Gated(Plain):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


class _OverAll(Plain):
    """Of all rows together."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float()
        return self.weight * (rows * torch.rsqrt(rows.pow(2).mean() + self.eps)).to(x.dtype)


class _HalfOtherwise(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.dtype == torch.float32 else 1.1)


class _Held(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(HIDDEN))


class _Biased(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(HIDDEN))


class _Hidden(Plain):
    """Whose eps is nowhere to be seen."""

    def normed(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 3e-5)


IMPOSTORS: tuple[Callable[[], nn.Module], ...] = (
    *(_Mean, _Clamped, _LargeClamped, _OutsideTheRoot, _Absolute, _Scaled, _Half, _Squared, _InTraining, _Counting),
    *(_Dropping, _Detached, _Wide, _Gated, _OverAll, _HalfOtherwise, _Held, _Biased, _Hidden),
    lambda: nn.LayerNorm(HIDDEN),
)


@pytest.mark.parametrize("made", IMPOSTORS)
def test_impostors_are_left(package: Any, made: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = made()
    before, random = copy.deepcopy(vars(module)), torch.get_rng_state()
    assert package.norms.count(nn.Sequential(module).to(HALF).requires_grad_(False)) == 0
    package.norms.form(nn.Sequential(module))
    assert type(module) is type(made()) and vars(module).keys() == before.keys()
    assert torch.equal(random, torch.get_rng_state())


def served(package: Any, norm: Any, x: Tensor, **options: Any) -> bool:
    y = norm(x, **options)
    return "_RMSNorm" in type(y.grad_fn).__name__


def test_what_is_patched_is_tried_anew(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some libraries patch the forward of a class."""
    model = nn.Sequential(Plain().to(HALF).requires_grad_(False))
    assert package.norms.count(model) == 1
    monkeypatch.setattr(Plain, "forward", lambda self, x: 2 * self.weight * self.normed(x).to(x.dtype))
    assert package.norms.count(model) == 0


def test_where_it_runs_as_it_did(package: Any) -> None:
    norm: Any = Plain().to(HALF).requires_grad_(False)
    model = nn.Sequential(norm)
    x = torch.randn(3, HIDDEN, dtype=HALF, requires_grad=True)
    package.norms.form(model)
    assert served(package, norm, x) and served(package, norm, x.expand(2, 3, HIDDEN)) and served(package, norm, x[:0])
    assert not norm(x.detach()).requires_grad
    with torch.no_grad():
        assert torch.equal(norm(x), Plain.forward(norm, x))
    wide = copy.deepcopy(model)[0].float()
    assert not served(package, wide, x.detach().float().requires_grad_()), "float32 is kept as it is anyway"
    assert not served(package, wide, x), "dtypes differ"
    norm.requires_grad_(True)
    assert not served(package, norm, x), "the weight trains"
    norm.requires_grad_(False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(norm(dual)).tangent is not None
    rows = torch.func.vmap(norm)(x.detach())
    assert torch.equal(rows, norm(x.detach()))

    class Sub(Tensor):
        pass

    assert not served(package, norm, x.as_subclass(Sub))
    plain = copy.deepcopy(norm)
    plain.__class__ = Plain
    first, wanted = (
        torch.autograd.grad(each(x).float().pow(3).sum(), x, create_graph=True)[0] for each in (norm, plain)
    )
    second, wanted_second = (torch.autograd.grad(each.float().square().sum(), x)[0] for each in (first, wanted))
    torch.testing.assert_close(first, wanted, rtol=0.02, atol=0.02)
    assert (second - wanted_second).float().norm() < 0.03 * wanted_second.float().norm()


def test_hooks_and_forwards_of_their_own(package: Any) -> None:
    norm: Any = Plain().to(HALF).requires_grad_(False)
    seen: list[str] = []
    norm.register_forward_hook(lambda *_: seen.append("after"))
    norm.register_forward_pre_hook(lambda *_: seen.append("before"))
    package.norms.form(nn.Sequential(norm))
    assert served(package, norm, torch.randn(3, HIDDEN, dtype=HALF, requires_grad=True))
    assert seen == ["before", "after"]
    other: Any = Plain().to(HALF)
    other.forward = lambda x: x
    package.norms.form(nn.Sequential(other))
    assert type(other) is Plain


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_restored_ones(package: Any, tokens: Tensor, copied: Any) -> None:
    model = in_half()
    own = [type(norm) for norm in norms(model)]
    package.accelerate(model, strict=True)
    once = [type(norm) for norm in norms(model)]
    package.accelerate(model, strict=True)
    assert [type(norm) for norm in norms(model)] == once != own
    other = copied(model)
    assert [type(norm) for norm in norms(other)] == once
    bitwise(gradients(other, tokens), gradients(model, tokens))
    names = package.restore(model)
    assert [type(norm) for norm in norms(model)] == own and not any("norm" in name for name in names)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_a_checkpoint(package: Any, tokens: Tensor, reentrant: bool) -> None:
    model = in_half()
    package.accelerate(model, strict=True)
    wanted = gradients(model, tokens)
    # Before a reentrant one computes again, it has no gradients: then few tokens take short ways through linears.
    (near if reentrant else bitwise)(gradients(checkpointed(model, use_reentrant=reentrant), tokens), wanted)
    norm: Any = norms(model)[0]
    x = torch.randn(3, HIDDEN, dtype=HALF, requires_grad=True)
    (back,), (again,) = (
        torch.autograd.grad(y.float().square().sum(), x) for y in (norm(x), checkpoint(norm, x, use_reentrant=False))
    )
    assert torch.equal(back, again)


def test_compiled_they_are_the_models_own(package: Any, tokens: Tensor) -> None:
    """One graph, which has what torch.compile makes of their own classes."""
    model, plain = in_half(), in_half()
    for each in (model, plain):
        package.accelerate(each, strict=True)
    for norm in norms(plain):
        norm.__class__ = type(norm).replaces
    torch._dynamo.reset()
    found = compiled_gradients(model, tokens, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    bitwise(found, compiled_gradients(plain, tokens, fullgraph=True, backend="aot_eager"))


def test_compiled_they_are_made_again(package: Any, tokens: Tensor) -> None:
    """What they give is not kept for the linears that read it: but for the first, before which nothing trains."""
    model, plain = in_half(), in_half()
    kept = []
    for each in (model, plain):
        package.accelerate(each, strict=True)
        if each is plain:
            for norm in norms(each):
                norm.__class__ = type(norm).replaces
        torch._dynamo.reset()
        compiled: Any = torch.compile(each, fullgraph=True, backend="aot_eager")
        kept.append(saved_bytes(lambda run=compiled: run(tokens, labels=tokens).loss, each.parameters()))
    assert kept[1] - kept[0] >= 3 * tokens.numel() * HIDDEN * HALF.itemsize


@pytest.mark.parametrize("strict", [True, False])
def test_exported_they_are_the_models_own(package: Any, strict: bool) -> None:
    norm: Any = Plain().to(HALF).requires_grad_(False)
    package.norms.form(nn.Sequential(norm))
    x = torch.randn(3, HIDDEN, dtype=HALF)
    exported = torch.export.export(norm, (x,), strict=strict)
    assert torch.equal(exported.module()(x), Plain.forward(norm, x))


def test_an_injected_model(package: Any, tokens: Tensor) -> None:
    model = llama(HALF).train()
    report = package.inject_lora(model, RANK, 8)
    assert report.norms == 5 and all("_RMSNorm" not in type(norm).__name__ for norm in norms(model))
    assert len(gradients(model, tokens)) == 2 * len(report.accelerated)
    assert package.inject_lora(llama(), RANK, 8).norms == 0, "in float32 they run as they did"


class Kernels:
    """In the place of torch's kernels, which are for GPUs."""

    calls: list[str]

    def __init__(self, package: Any, monkeypatch: pytest.MonkeyPatch, factor: float = 1.0) -> None:
        self.calls, self.norms, self.factor = [], package.norms, factor
        monkeypatch.setattr(package.norms, "_is_fused", lambda x, kind: not kind.offset and x.is_contiguous())
        monkeypatch.setattr(package.norms, "_fused", self.forward)
        monkeypatch.setattr(package.norms, "_fused_backward", self.backward)

    def forward(self, x: Tensor, weight: Tensor, kind: Any) -> tuple[Tensor, Tensor]:
        self.calls.append("forward")
        y, rstd = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, kind.eps)
        assert rstd.dtype == torch.float32 and rstd.shape == (*x.shape[:-1], 1)
        return y, rstd

    def backward(self, dY: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, kind: Any) -> Tensor:
        self.calls.append("backward")
        normed, gradient = x.float() * rstd, dY.float() * weight.float() * self.factor
        return ((gradient - normed * (gradient * normed).mean(-1, keepdim=True)) * rstd).to(x.dtype)


def test_on_kernels_of_torch(package: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_half()
    plain = copy.deepcopy(model)
    package.accelerate(model, strict=True)
    kernels = Kernels(package, monkeypatch)
    near(gradients(model, tokens), gradients(plain, tokens))
    assert kernels.calls.count("forward") == 5 and kernels.calls.count("backward") == 4
    with torch.autocast("cpu", torch.bfloat16):
        near(gradients(model, tokens), gradients(plain, tokens))
    assert kernels.calls.count("backward") == 8
    gemma: Any = type("_One", (Plain,), {"forward": lambda self, x: ((1 + self.weight.float()) * self.normed(x)).to(x)})
    norm = gemma().to(HALF).requires_grad_(False)
    package.norms.form(nn.Sequential(norm))
    kernels.calls.clear()
    assert served(package, norm, torch.randn(3, HIDDEN, dtype=HALF, requires_grad=True)) and not kernels.calls


def test_kernels_that_err_are_not_used(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On each kind of device some rows are compared once."""
    cpu = torch.device("cpu")
    for factor, agrees in ((1.0, True), (1.2, False)):
        with monkeypatch.context() as patch:
            Kernels(package, patch, factor)
            patch.setattr(package.norms, "_AGREE", {})
            assert package.norms._agree(cpu, HALF, 0.0) is agrees
            assert {(cpu, HALF, 0.0): agrees} == package.norms._AGREE
    with monkeypatch.context() as patch:
        Kernels(package, patch)
        patch.setattr(package.norms, "_fused_backward", torch.ops.aten._fused_rms_norm_backward)  # for no CPU
        patch.setattr(package.norms, "_AGREE", {})
        assert not package.norms._agree(cpu, HALF, 0.0)


def test_none_are_wished(tmp_path: Path, tokens: Tensor) -> None:
    model = in_half()
    before = [type(norm) for norm in norms(model)]
    report = runlora_gen.accelerate(model, tmp_path, tokens=64, norms="none", kernels=False)
    assert report.norms == 0 and [type(norm) for norm in norms(model)] == before
    (folder,) = report.folders
    assert not (folder / "norms.py").exists() and imported(folder)
    assert "--norms none" in (folder / "plan.py" if (folder / "plan.py").exists() else folder / "inject.py").read_text()
    with pytest.raises(ValueError, match="norms: 'some' is not allowed; give one of auto, none"):
        runlora_gen.accelerate(in_half(), tmp_path, norms="some")
    assert gradients(model, tokens)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's kernels of norms need a GPU")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [1, 96, 1001, 5120, 16384])
def test_torchs_own_kernels(package: Any, dtype: torch.dtype, features: int) -> None:
    """Of small and large rows, against float64: no further than what a model's own operators give."""
    if not package.norms._has_kernels():
        pytest.skip("this torch has none: from 2.9 on")
    torch.manual_seed(0)
    norm: Any = Plain(features=features).to("cuda", dtype).requires_grad_(False)
    norm.weight.add_(torch.randn_like(norm.weight) / 4)
    plain = copy.deepcopy(norm)
    package.norms.form(nn.Sequential(norm))
    scales = torch.tensor([1e-3, 0.5, 2.0, 32.0, 64.0, 0.0], device="cuda").repeat(43)[:, None]
    x = (torch.randn(scales.shape[0], features, device="cuda") * scales).to(dtype).requires_grad_()
    dY = torch.randn_like(x)
    y, own = norm(x), plain(x)
    assert package.norms._is_fused(x, package.norms.Kind(norm.eps, 0.0)) and "_RMSNorm" in type(y.grad_fn).__name__
    wide = x.detach().double().requires_grad_()
    exact = norm.weight.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    (exact_back,) = torch.autograd.grad(exact, wide, dY.double())
    assert (y - exact).norm() <= 1.05 * (own - exact).norm()
    # Large rows have small gradients: each row counts alike.
    found, theirs = (
        torch.autograd.grad(each, x, dY)[0].double().sub(exact_back).norm(dim=-1) / (exact_back.norm(dim=-1) + 1e-6)
        for each in (y, own)
    )
    assert found.norm() <= 1.05 * theirs.norm() + 1e-3


@on_gpu
def test_a_model_on_a_gpu(package: Any, tokens: Tensor) -> None:
    """As near to float64 as with the model's own norms, also replayed as a graph."""
    model, tokens = in_half().cuda(), tokens.cuda()
    package.accelerate(model, strict=True)
    plain = copy.deepcopy(model)
    for norm in norms(plain):
        norm.__class__ = type(norm).replaces
    exact = gradients(copy.deepcopy(plain).double(), tokens)
    found, wanted = gradients(model, tokens), gradients(plain, tokens)
    near(found, wanted)
    bitwise(gradients(model, tokens), found)
    errors = [
        sum((these[name].double() - gradient).square().sum() for name, gradient in exact.items())
        for these in (found, wanted)
    ]
    assert errors[0] < 1.2 * errors[1]
