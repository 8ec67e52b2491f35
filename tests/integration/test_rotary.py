"""Rotary embeddings in one kernel: in models, to the bit, and what is none of them."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runlora_gen
import torch
import transformers
from runlora_gen.into_model.packages import imported
from torch import Tensor, nn

from .models import RANK, VOCABULARY, bitwise, checkpointed, gradients, llama, with_lora
from .test_runs_in import compiled_gradients

pytest.importorskip("triton", minversion="3.4", reason="the kernel is Triton's")

#: Triton's interpreter rounds to bfloat16 otherwise than GPUs do.
HALF = torch.float16
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FEATURES = 16


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a device that has kernels."""
    out = tmp_path_factory.mktemp("packages")
    (folder,) = runlora_gen.generate(llama(), rank=RANK, tokens=64, device="h200", groups="none", output=out)
    return imported(folder)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2), device="cpu").to(DEVICE)


@pytest.fixture
def launches(package: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each was of a gradient."""
    seen: list[bool] = []
    real = package.rotary._launch

    def launch(*operands: Any) -> Any:
        seen.append(operands[-1])
        return real(*operands)

    package.rotary._agrees(torch.empty(0, device=DEVICE).device, HALF)
    monkeypatch.setattr(package.rotary, "_launch", launch)
    yield seen


def in_half(**options: Any) -> Any:
    return with_lora(llama(HALF, **options), autocast_adapter_dtype=False).train().to(DEVICE)


def attentions(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("self_attn")]


def own(model: Any) -> Any:
    """The model with its own rotary embeddings."""
    for module in attentions(model):
        module.__class__ = type(module).replaces
    return model


def test_a_model_computes_what_it_did(package: Any, tokens: Tensor, launches: list[bool]) -> None:
    model = in_half()
    report = package.accelerate(model, strict=True)
    assert report.rotary == 2 and "; 2 rotary embeddings)" in str(report)
    plain = own(copy.deepcopy(model))
    found, outputs = gradients(model, tokens), model(tokens).logits
    assert launches == [False, False, True, True, False, False]
    assert torch.equal(outputs, plain(tokens).logits)
    bitwise(found, gradients(plain, tokens))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


def test_an_injected_model(package: Any, tokens: Tensor, launches: list[bool]) -> None:
    model = llama(HALF).train().to(DEVICE)
    assert package.inject_lora(model, RANK, 8).rotary == 2 and gradients(model, tokens)
    assert launches == [False, False, True, True]
    assert package.inject_lora(llama(), RANK, 8).rotary == 0, "in float32 they run as they did"


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_a_checkpoint(package: Any, tokens: Tensor, launches: list[bool], reentrant: bool) -> None:
    model = in_half()
    package.accelerate(model, strict=True)
    plain = checkpointed(own(copy.deepcopy(model)), use_reentrant=reentrant)
    found = gradients(checkpointed(model, use_reentrant=reentrant), tokens)
    assert launches.count(False) == 4 and launches.count(True) == 2
    bitwise(found, gradients(plain, tokens))


def test_it_is_tried_within_a_checkpoint(package: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which keeps count of what is saved, and finds nothing of a trial when it computes again."""
    model = in_half()
    package.accelerate(model, strict=True)
    monkeypatch.setattr(package.rotary, "_AGREES", {})
    package.rotary.rotates.cache_clear()
    found = gradients(checkpointed(model, use_reentrant=False), tokens)
    assert package.rotary._AGREES
    bitwise(found, gradients(own(copy.deepcopy(model)), tokens))


@pytest.mark.parametrize("long", [True, False])
def test_compiled(
    package: Any, tokens: Tensor, launches: list[bool], monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    """They are the kernel's where heads are long, and the model's own where they are short."""
    model = in_half()
    package.accelerate(model, strict=True)
    plain = own(copy.deepcopy(model))
    assert package.rotary._MOST_FUSED == 2**23
    if long:
        monkeypatch.setattr(package.rotary, "_MOST_FUSED", 2 * 9 * 4 * FEATURES - 1)
    torch._dynamo.reset()
    found = compiled_gradients(model, tokens, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    bitwise(found, compiled_gradients(plain, tokens, fullgraph=True, backend="aot_eager"))
    assert launches == ([False, False, True, True] if long else [])


#: Of StableLM's heads a quarter is turned.
FAMILIES = ("Gemma2", "Granite", "Mistral", "Phi3", "Qwen2", "Qwen3", "SmolLM3", "StableLm")
OTHERS = ("Cohere", "Glm4", "GptOss", "Olmo2")


@pytest.mark.parametrize("family", FAMILIES + OTHERS)
def test_families(package: Any, tokens: Tensor, launches: list[bool], family: str) -> None:
    """To the bit the same, in the kernel or not."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": FEATURES, "pad_token_id": 0}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, **ids)
    if family == "GptOss":
        config.layer_types = ["full_attention"]
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(HALF).to(DEVICE).train()
    wanted = gradients(model, tokens)
    model.zero_grad()
    assert package.rotary.count(model) == (family in FAMILIES)
    package.rotary.form(model)
    bitwise(gradients(model, tokens), wanted)
    assert len(launches) == (2 if family in FAMILIES else 0)


def halves(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return (q * cos) + (halves(q) * sin), (k * cos) + (halves(k) * sin)


def _interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    turned = [torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) for x in (q, k)]
    return tuple(x * cos.unsqueeze(1) + other * sin.unsqueeze(1) for x, other in zip((q, k), turned, strict=True))


def _otherwise(change: Callable[..., Any]) -> Callable[..., Any]:
    def impostor(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return change(q, k, cos, sin)

    return impostor


_turned = apply_rotary_pos_emb
IMPOSTORS: dict[str, Callable[..., Any]] = {
    "interleaved": _interleaved,
    "backwards": _otherwise(lambda q, k, cos, sin: _turned(q, k, cos, -sin)),
    "scaled": _otherwise(lambda q, k, cos, sin: _turned(q * 1.001, k, cos, sin)),
    "keys as they are": _otherwise(lambda q, k, cos, sin: (_turned(q, k, cos, sin)[0], k)),
    "queries alone": _otherwise(lambda q, k, cos, sin: _turned(q, q, cos, sin)),
    "clamped": _otherwise(lambda q, k, cos, sin: tuple(x.clamp(-4, 4) for x in _turned(q, k, cos, sin))),
    "in float32": _otherwise(lambda q, k, cos, sin: tuple(x.to(q) for x in _turned(q.float(), k.float(), cos, sin))),
    "with one rounding": _otherwise(
        lambda q, k, *by: tuple(
            x.to(torch.promote_types(q.dtype, by[0].dtype)) for x in _turned(*(each.float() for each in (q, k, *by)))
        )
    ),
    "wider": _otherwise(lambda q, k, cos, sin: tuple(x.float() for x in _turned(q, k, cos, sin))),
    "a list": _otherwise(lambda q, k, cos, sin: list(_turned(q, k, cos, sin))),
    "half of a head": _otherwise(
        lambda q, k, cos, sin: tuple(
            torch.cat((turned[..., :8], x[..., 8:]), -1)
            for turned, x in zip(_turned(q, k, cos, sin), (q, k), strict=True)
        )
    ),
    "without a gradient": _otherwise(lambda q, k, cos, sin: tuple(x.detach() for x in _turned(q, k, cos, sin))),
    "another gradient": _otherwise(lambda q, k, cos, sin: _turned(q.detach() + 2 * (q - q.detach()), k, cos, sin)),
    "one cos for all": _otherwise(lambda q, k, cos, sin: _turned(q, k, cos[:1], sin[:1])),
    "drawing": _otherwise(lambda q, k, cos, sin: (torch.rand(()), _turned(q, k, cos, sin))[1]),
    "for angles in float32": _otherwise(lambda q, k, *by: tuple(x.to(q) for x in _turned(q, k, *by))),
    "refusing": _otherwise(lambda q, k, cos, sin: _turned(q, k, cos, sin.view(1))),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_impostors_are_left(package: Any, name: str) -> None:
    assert not package.rotary.rotates(IMPOSTORS[name])


def test_what_is_asked_before_it_is_called(package: Any) -> None:
    """A function that takes something else is not even called."""

    def other(query: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        raise AssertionError("called")

    assert package.rotary.rotates(apply_rotary_pos_emb) and not package.rotary.rotates(other)
    assert not package.rotary.rotates(print)


class Attention(nn.Module):
    """It calls a function of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(2, 2)

    def forward(self, *operands: Any, **more: Any) -> Any:
        return apply_rotary_pos_emb(*operands, **more)


def drawn(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), device="cpu").to(DEVICE, dtype)


@pytest.fixture
def attention(package: Any) -> Any:
    module = Attention().to(HALF).to(DEVICE)
    package.rotary.form(nn.Sequential(module))
    return module


def operands(rows: int = 7, features: int = FEATURES, batch: int = 2, dtype: torch.dtype = HALF) -> list[Any]:
    q, k = (drawn(2, rows, heads, features, dtype=dtype).transpose(1, 2).requires_grad_() for heads in (3, 2))
    return [q, k, drawn(batch, rows, features, dtype=dtype), drawn(batch, rows, features, dtype=dtype) * 2]


@pytest.mark.parametrize("case", ["odd", "narrow", "many rows", "one angle for all", "as heads lie", "last is apart"])
def test_of_all_layouts(attention: Any, launches: list[bool], case: str) -> None:
    shapes = {"odd": {"features": 6}, "narrow": {"features": 2}, "many rows": {"rows": 67}}
    given = operands(**shapes.get(case, {}), batch=1 if case == "one angle for all" else 2)
    if case == "as heads lie":
        given = [each.detach().contiguous().requires_grad_(each.requires_grad) for each in given]
    if case == "last is apart":
        given = [each.detach().mT.contiguous().mT.requires_grad_(each.requires_grad) for each in given]
        assert given[0].stride(-1) != 1
    found, wanted = attention(*given), apply_rotary_pos_emb(*given)
    back = [drawn(*each.shape) for each in wanted]
    back[0] = back[0].mT.contiguous().mT if case == "last is apart" else back[0]
    gradients_found, gradients_wanted = (torch.autograd.grad(each, given[:2], back) for each in (found, wanted))
    assert launches == [False, True]
    for one, other in zip((*found, *gradients_found), (*wanted, *gradients_wanted), strict=True):
        assert torch.equal(one, other) and one.shape == other.shape
    if case != "last is apart":
        assert [each.stride() for each in found] == [each.stride() for each in wanted]


def test_patched_after_it_was_compiled(package: Any, attention: Any, launches: list[bool], monkeypatch: Any) -> None:
    """torch.compile asks what stands there now, and compiles anew."""
    monkeypatch.setattr(package.rotary, "_MOST_FUSED", 0)
    monkeypatch.setattr(package.rotary, "_AGREES", {})
    torch._dynamo.reset()
    run = torch.compile(lambda *given: attention(*given), fullgraph=True, backend="eager")
    given = [each.detach() for each in operands()]
    wanted = apply_rotary_pos_emb(*given)
    assert all(map(torch.equal, run(*given), wanted)) and launches.pop() is False and package.rotary._AGREES
    launches.clear()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "apply_rotary_pos_emb", lambda q, k, cos, sin: (k, q))
        assert torch.equal(run(*given)[0], given[1]) and not launches
    assert all(map(torch.equal, run(*given), wanted)) and launches


@pytest.mark.parametrize("strict", [True, False])
def test_exported_they_are_the_models_own(
    package: Any, attention: Any, launches: list[bool], monkeypatch: Any, strict: bool
) -> None:
    """It runs where this package is not."""
    monkeypatch.setattr(package.rotary, "_MOST_FUSED", 0)
    given = [each.detach() for each in operands()]
    exported = torch.export.export(attention, tuple(given), strict=strict)
    assert not any("rotary" in str(node.target) for node in exported.graph.nodes if node.op == "call_function")
    assert all(map(torch.equal, exported.module()(*given), apply_rotary_pos_emb(*given))) and not launches


def test_a_name_that_is_an_attribute_s_too(package: Any) -> None:
    """Then the forward is left: one name of its code is for both."""

    class Both(Attention):
        def forward(self, *given: Any) -> Any:
            return apply_rotary_pos_emb(*given), getattr(self.apply_rotary_pos_emb, "x", None)

    class Elsewhere(Attention):
        forward = types.FunctionType(Attention.forward.__code__, {**globals(), "__name__": "elsewhere"})

    for kind in (Both, Elsewhere):
        module = kind()
        package.rotary.form(nn.Sequential(module))
        assert type(module) is kind


def test_what_was_compiled_is_launched(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By all that Triton looks at; with its arguments in the kernel's order."""
    module, names = package.rotary, package.rotary._rotary_kernel.arg_names
    compiled: list[tuple[int, ...]] = []
    launched: list[dict[str, Any]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *given, **options: compiled.append(grid) or Compiled()

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *given: launched.append({"grid": grid, **dict(zip(names, given, strict=True))})

    monkeypatch.setattr(module, "_rotary_kernel", Kernel())
    monkeypatch.setattr(package.launches, "LAUNCHES", {})
    given = [each.detach() for each in operands(rows=9)]
    for back in (False, False, True):
        outputs = module._launch(*given, back)
    module._launch(*given, True)
    assert compiled == [(1, 5, 2)] * 2 and [each["BACK"] for each in launched] == [False, True]
    assert launched[0]["grid"] == compiled[0] and (launched[0]["rows"], launched[0]["heads"]) == (9, 3)
    assert [launched[0][name] for name in ("HALF", "ROWS", "COLUMNS")] == [FEATURES // 2, 32, FEATURES // 2]
    for name, tensor in zip(("q", "k", "q_out", "k_out"), (*given[:2], *outputs), strict=True):
        assert [launched[0][f"{name}_{axis}"] for axis in ("batch", "head", "row")] == [*tensor.stride()[:3]]
    others = [operands(rows=8), operands(rows=9, batch=1), operands(rows=9, dtype=torch.bfloat16)]
    shifted = torch.cat((given[2].flatten()[:1], given[2].flatten()))[1:].view_as(given[2])
    for other in (*others, [*given[:2], shifted, given[3]]):
        module._launch(*(each.detach() for each in other), False)
    assert len(compiled) == 6 and len(launched) == 2
    monkeypatch.setattr(package.launches, "MOST_LAUNCHES", 6)
    module._launch(*(each.detach() for each in operands(rows=10)), False)
    assert len(package.launches.LAUNCHES) == 1


def test_second_derivatives(attention: Any, launches: list[bool]) -> None:
    given = operands()
    seconds = []
    for turn in (attention, apply_rotary_pos_emb):
        first = torch.autograd.grad(turn(*given)[0].float().square().sum(), given[0], create_graph=True)[0]
        seconds.append(torch.autograd.grad(first.float().square().sum(), given[0])[0])
    torch.testing.assert_close(*seconds, rtol=0.02, atol=0.02)
    assert len(launches) > 2


def test_where_it_runs_as_it_did(attention: Any, launches: list[bool]) -> None:
    """Each is what the function gives, or raises, by the function itself."""
    q, k, cos, sin = operands()
    wide = [each.detach().float() for each in (q, k, cos, sin)]
    leaf = cos.clone().requires_grad_()
    cases = [
        wide,
        [*wide[:2], cos, sin],
        [q, k, leaf, sin],
        [q, k, cos, sin.clone().requires_grad_()],
        [q, k.detach(), cos, sin],
        [q[:0], k[:0], cos[:0], sin[:0]],
        [q, k, cos[:, :1], sin[:, :1]],
    ]
    for given in cases:
        for one, other in zip(attention(*given), apply_rotary_pos_emb(*given), strict=True):
            assert torch.equal(one, other) and one.requires_grad == other.requires_grad
    for one, other in zip(
        attention(q.mT, k.mT, cos.mT, sin.mT, unsqueeze_dim=1),
        apply_rotary_pos_emb(q.mT, k.mT, cos.mT, sin.mT),
        strict=True,
    ):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError):
        attention(q, k, cos[..., :4], sin[..., :4])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q.detach(), torch.ones_like(q))
        assert torch.autograd.forward_ad.unpack_dual(attention(dual, k.detach(), cos, sin)[0]).tangent is not None
    torch.func.vmap(functools.partial(attention, cos=cos, sin=sin))(q.detach()[None], k.detach()[None])

    class Sub(Tensor):
        pass

    assert attention(q.as_subclass(Sub), k, cos, sin)
    assert not launches
    with torch.no_grad():
        attention(q, k.detach(), cos, sin)
    assert launches == [False], "where nothing asks for gradients, both are alike"


def test_what_is_patched_runs(attention: Any, launches: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """As some libraries put another function, or another forward, in the place of Transformers'."""
    given = operands()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "apply_rotary_pos_emb", lambda q, k, cos, sin: (k, q))
        assert attention(*given) == (given[1], given[0])
    attention(*given)
    assert launches == [False]
    monkeypatch.setattr(Attention, "forward", lambda self, *given: given)
    assert attention(1, 2) == (1, 2)


def test_other_names_are_looked_up_anew(package: Any, monkeypatch: pytest.MonkeyPatch, launches: list[bool]) -> None:
    class Other(Attention):
        def forward(self, *given: Any) -> Any:
            return FEATURES, len(apply_rotary_pos_emb(*given))

    module = Other().to(HALF).to(DEVICE)
    package.rotary.form(nn.Sequential(module))
    monkeypatch.setattr(sys.modules[__name__], "FEATURES", "changed")
    assert module(*operands(features=16)) == ("changed", 2) and launches


def test_wrapped_forwards(package: Any, launches: list[bool]) -> None:
    """The innermost is what calls; a wrapper that does not hold what it wraps is left."""
    seen: list[str] = []

    def holds(forward: Any) -> Any:
        @functools.wraps(forward)
        def wrapper(self: Any, *given: Any, more: str = "more") -> Any:
            seen.append(more)
            return forward(self, *given)

        return wrapper

    class Twice(Attention):
        forward = holds(holds(Attention.forward))

    module = Twice().to(HALF).to(DEVICE)
    package.rotary.form(nn.Sequential(module))
    module(*operands(), more="given")
    assert seen == ["given", "more"] and launches == [False]

    class Lost(Attention):
        @functools.wraps(Attention.forward)
        def forward(self, *given: Any) -> Any:
            return super().forward(*given)

    class Called:
        __wrapped__ = Attention.forward

        def __call__(self, *given: Any) -> Any:
            return given

    class Odd(Attention):
        forward = Called()

    for kind in (Lost, Odd):
        module = kind()
        package.rotary.form(nn.Sequential(module))
        assert type(module) is kind


def test_a_wrapper_whose_cell_is_empty(package: Any) -> None:
    def hollow(forward: Any) -> Any:
        if forward is None:
            later = forward

        @functools.wraps(forward)
        def wrapper(self: Any, *given: Any) -> Any:
            return (forward if given else later)(self, *given)

        return wrapper

    class Hollow(Attention):
        forward = hollow(Attention.forward)

    module = Hollow().to(HALF).to(DEVICE)
    package.rotary.form(nn.Sequential(module))
    assert type(module) is not Hollow and module(*operands())


def test_hooks_and_forwards_of_their_own(package: Any, launches: list[bool]) -> None:
    module = Attention().to(HALF).to(DEVICE)
    seen: list[str] = []
    module.register_forward_hook(lambda *_: seen.append("after"))
    package.rotary.form(nn.Sequential(module))
    module(*operands())
    assert seen == ["after"] and launches == [False]
    other: Any = Attention()
    other.forward = lambda x: x
    package.rotary.form(nn.Sequential(other))
    assert type(other) is Attention


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_restored_ones(package: Any, tokens: Tensor, launches: list[bool], copied: Any) -> None:
    model = in_half()
    classes = [type(module) for module in attentions(model)]
    package.accelerate(model, strict=True)
    wanted = gradients(model, tokens)
    forward = attentions(model)[0].forward
    other = copied(model)
    launches.clear()
    bitwise(gradients(other, tokens), wanted)
    assert launches == [False, False, True, True]
    names = package.restore(model)
    assert [type(module) for module in attentions(model)] == classes
    assert not any(name.endswith("self_attn") for name in names)
    launches.clear()
    assert gradients(model, tokens) and not launches
    assert forward.__self__ is attentions(model)[0], "as a hook would hold it"


def test_a_kernel_that_errs_is_not_used(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On each kind of device it is held against the formula once."""
    device = torch.empty(0, device=DEVICE).device
    real = package.rotary._launch
    for changed in (0.0, 2.0**-10):
        monkeypatch.setattr(package.rotary, "_AGREES", {})
        monkeypatch.setattr(package.rotary, "_launch", lambda *given, by=changed: tuple(x + by for x in real(*given)))
        assert package.rotary._agrees(device, HALF) is not bool(changed)
    calls: list[bool] = []

    def errs_later(*given: Any) -> Any:
        calls.append(given[-1])
        return tuple(x + 2.0**-10 * (len(calls) > 2) for x in real(*given))

    monkeypatch.setattr(package.rotary, "_AGREES", {})
    monkeypatch.setattr(package.rotary, "_launch", errs_later)
    assert not package.rotary._agrees(device, HALF), "what was compiled is launched another way than at first"
    monkeypatch.setattr(package.rotary, "_AGREES", {})
    monkeypatch.setattr(package.rotary, "_launch", None)
    assert package.rotary.count(in_half()) == 0, "none runs so"
    assert not package.rotary._agrees(device, HALF) and {(device, HALF): False} == package.rotary._AGREES


def test_none_are_wished(tmp_path: Path, tokens: Tensor) -> None:
    """By word, or as there are no kernels."""
    model = in_half()
    before = [type(module) for module in attentions(model)]
    report = runlora_gen.accelerate(model, tmp_path / "none", tokens=64, device="h200", rotary="none")
    assert report.rotary == 0 and [type(module) for module in attentions(model)] == before
    (folder,) = report.folders
    assert not (folder / "rotary.py").exists() and "--rotary none" in (folder / "inject.py").read_text()
    for more in ({"device": "cpu"}, {"device": "h200", "kernels": False}):
        (folder,) = runlora_gen.generate(llama(), rank=RANK, tokens=64, output=tmp_path / str(len(more)), **more)
        assert not (folder / "rotary.py").exists() and imported(folder)
    with pytest.raises(ValueError, match="rotary: 'some' is not allowed; give one of auto, none"):
        runlora_gen.accelerate(in_half(), tmp_path, rotary="some")


@pytest.mark.skipif(not GPU, reason="a GPU rounds to bfloat16 as torch does, the interpreter does not")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "features"), [(1, 2), (67, 96), (1000, 128), (33, 256), (129, 80)])
def test_on_a_gpu(package: Any, dtype: torch.dtype, rows: int, features: int) -> None:
    """To the bit, also replayed as a graph."""
    module = Attention().to("cuda", dtype)
    package.rotary.form(nn.Sequential(module))
    assert package.rotary._agrees(torch.device("cuda", 0), dtype)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # a capture must not wait for what ran elsewhere, as a backward does for its inputs
        q, k = (
            torch.randn(3, rows, heads, features, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
            for heads in (5, 2)
        )
        angle = torch.randn(3, rows, features, device="cuda") * 9
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

        def run(turn: Any) -> list[Tensor]:
            turned = turn(q, k, cos, sin)
            return [*turned, *torch.autograd.grad(turned, (q, k), [torch.ones_like(each) / 3 for each in turned])]

        wanted = run(apply_rotary_pos_emb)
        assert all(torch.equal(one, other) for one, other in zip(run(module), wanted, strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = run(module)
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
