"""RMSNorms whose weight has an offset, in kernels: in Gemma's models, alone, and where they run as they did."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import runlora_gen
import torch
import transformers
from runlora_gen.into_model.packages import imported
from torch import Tensor, nn

from .models import RANK, VOCABULARY, bitwise, checkpointed, filled, gradients, llama

pytest.importorskip("triton", minversion="3.4", reason="the kernels are Triton's")

HALF = torch.float16
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HIDDEN = 64
SIZES = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a device that has kernels."""
    out = tmp_path_factory.mktemp("packages")
    (folder,) = runlora_gen.generate(llama(), rank=RANK, tokens=64, device="h200", groups="none", output=out)
    return imported(folder)


class Norm(nn.Module):
    """As Gemma's."""

    def __init__(self, features: int = HIDDEN, dtype: torch.dtype = HALF, eps: float = 1e-6) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(features)
        weight = (torch.randn(features, generator=drawn, device="cpu") / 2).to(DEVICE, dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float()
        normed = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * (1.0 + self.weight.float())).type_as(x)


def formed(package: Any, norm: nn.Module) -> Any:
    package.norms.form(nn.Sequential(norm))
    assert type(norm) is not Norm
    return norm


@pytest.fixture
def launches(package: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of the kernels, forwards and backwards."""
    seen: list[str] = []
    kernels = package.norm_kernels
    package.norms._agree(torch.empty(0, device=DEVICE).device, HALF, 1.0)

    def counted(name: str, real: Any, *given: Any) -> Any:
        seen.append(name)
        return real(*given)

    for name in ("forward", "backward"):
        monkeypatch.setattr(kernels, name, functools.partial(counted, name, getattr(kernels, name)))
    return seen


def errors(norm: Any, plain: nn.Module, x: Tensor, dY: Tensor) -> list[list[float]]:
    """Of outputs and of gradients, each row's as large as another's; of a norm and of the plain one."""
    wide = x.detach().double().requires_grad_()
    factor = 1 + norm.weight.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps) * factor
    (exact_back,) = torch.autograd.grad(exact, wide, dY.double())
    off = []
    for each in (norm, plain):
        leaf = x.detach().requires_grad_()
        y = each(leaf)
        (back,) = torch.autograd.grad(y, leaf, dY)
        pairs = ((y, exact), (back, exact_back))
        off.append(
            [
                float(
                    (
                        (one.detach().double() - other.detach()).norm(dim=-1) / (other.detach().norm(dim=-1) + 1e-6)
                    ).norm()
                )
                for one, other in pairs
            ]
        )
    return off


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 96), (2, 3, 4, 16), (2, 1001), (2, 4096), (1, 20000)])
def test_against_float64(package: Any, launches: list[str], shape: tuple[int, ...]) -> None:
    """No further than the model's own operators; of small rows and of large ones, and always the same."""
    norm = Norm(shape[-1])
    plain = copy.deepcopy(norm)
    drawn = torch.Generator().manual_seed(0)
    x, dY = (torch.randn(*shape, generator=drawn, device="cpu") for _ in range(2))
    rows = x.reshape(-1, shape[-1])
    rows *= torch.tensor([0.5, 2.0, 1e-3, 32.0, 0.0]).repeat(9)[: len(rows), None]
    x, dY = x.to(DEVICE, HALF), dY.to(DEVICE, HALF)
    ours, theirs = errors(formed(package, norm), plain, x, dY)
    assert launches == ["forward", "backward"]
    assert ours[0] <= 1.05 * theirs[0] + 1e-6 and ours[1] <= 1.05 * theirs[1] + 1e-3
    with torch.no_grad():
        assert torch.equal(norm(x), norm(x))


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3Text"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_models(package: Any, launches: list[str], family: str, reentrant: bool | None) -> None:
    """Outputs and gradients as near to float64 as the model's own."""
    config = getattr(transformers, f"{family}Config")(**SIZES, **HEADS, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).train()
    model = filled(model).requires_grad_(False).to(HALF).to(DEVICE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("o_proj" in name)
    tokens = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    exact = gradients(copy.deepcopy(model).double(), tokens)
    wanted = gradients(model, tokens)
    model.zero_grad()
    count = package.norms.count(model)
    package.norms.form(model)
    if reentrant is not None:
        checkpointed(model, use_reentrant=reentrant)
    found = gradients(model, tokens)
    again = reentrant is not None
    assert launches.count("forward") > count * again and "backward" in launches
    off = [sum(float((these[n].double() - exact[n]).norm()) for n in exact) for these in (found, wanted)]
    assert off[0] < 1.2 * off[1]
    bitwise(gradients(model, tokens), found)


def test_where_it_runs_as_it_did(package: Any, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    norm = formed(package, Norm())
    x = torch.randn(4, HIDDEN, device=DEVICE, dtype=HALF, requires_grad=True)
    plain = type(norm).replaces.forward
    for given in (x.t().contiguous().t(), x[:0]):
        assert torch.equal(norm(given), plain(norm, given))
    monkeypatch.setattr(package.norm_kernels, "_MOST_FEATURES", HIDDEN - 1)
    assert torch.equal(norm(x), plain(norm, x))
    monkeypatch.undo()
    monkeypatch.setattr(package.launches, "KERNELS", False)
    assert torch.equal(norm(x), plain(norm, x))
    assert not launches


def test_second_derivatives(package: Any) -> None:
    norm = formed(package, Norm())
    plain = copy.deepcopy(norm)
    plain.__class__ = Norm
    seconds = []
    for each in (norm, plain):
        x = torch.linspace(-2, 2, 3 * HIDDEN, device=DEVICE).view(3, HIDDEN).to(HALF).requires_grad_()
        (first,) = torch.autograd.grad(each(x).float().pow(3).sum() / 100, x, create_graph=True)
        seconds.append(torch.autograd.grad(first.float().square().sum(), x)[0].float())
    torch.testing.assert_close(*seconds, rtol=0.05, atol=0.05 * float(seconds[1].abs().max()))


@pytest.mark.parametrize("name", ["_norm_kernel", "_norm_backward_kernel"])
def test_kernels_that_err_are_not_used(package: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Also where only what was compiled before errs."""
    device, real = torch.empty(0, device=DEVICE).device, package.launches.launch
    count: list[Any] = []
    right = 0

    def launched(kernel: Any, grid: Any, tensors: Any, *others: Any, **options: Any) -> None:
        real(kernel, grid, tensors, *others, **options)
        count.append(kernel)
        if kernel is getattr(package.norm_kernels, name) and len(count) > right:
            tensors[2 if name == "_norm_kernel" else 4].mul_(1.2)

    monkeypatch.setattr(package.launches, "launch", launched)
    for right, agrees in ((0, False), (2, False), (4, True)):  # noqa: B007  # launches read it
        count.clear()
        monkeypatch.setattr(package.norms, "_AGREE", {})
        assert package.norms._agree(device, HALF, 1.0) is agrees
        assert {(device, HALF, 1.0): agrees} == package.norms._AGREE
    monkeypatch.setattr(package.launches, "launch", None)
    monkeypatch.setattr(package.norms, "_AGREE", {})
    assert not package.norms._agree(device, HALF, 1.0)


def test_what_was_compiled_is_launched(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By all that Triton looks at; with its arguments in the kernel's order."""
    kernels, launched = package.norm_kernels, list[dict[str, Any]]()
    compiled: list[Any] = []

    class Kernel:
        def __init__(self, names: list[str]) -> None:
            self.names = names

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *given, **options: compiled.append((grid, options)) or Compiled(self.names)

    class Compiled(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *given: launched.append({"grid": grid, **dict(zip(self.names, given, strict=True))})

    for name in ("_norm_kernel", "_norm_backward_kernel"):
        monkeypatch.setattr(kernels, name, Kernel(getattr(kernels, name).arg_names))
    monkeypatch.setattr(package.launches, "LAUNCHES", {})
    x = torch.randn(3, 5, 96, dtype=HALF)
    for _ in range(2):
        y, rstd = kernels.forward(x, x[0, 0], 1e-5, 1.0)
        assert kernels.backward(x, x, x[0, 0], rstd, 1.0).shape == y.shape == x.shape
    assert [grid for grid, _ in compiled] == [(1, 1, 1)] * 2 and len(launched) == 2
    assert all(options["num_warps"] == 4 for _, options in compiled)
    numbers = {"rows": 15, "features": 96, "OFFSET": 1.0, "ROWS": 16, "COLUMNS": 128}
    for one in launched:
        assert {name: one[name] for name in numbers} == numbers
    assert launched[0]["eps"] == 1e-5 and launched[0]["rstd"].shape == (15,) and launched[1]["dy"] is launched[1]["x"]
    others = (
        (x, 1e-6, 1.0),
        (x, 1e-5, 2.0),
        (x.bfloat16(), 1e-5, 1.0),
        (x[:2], 1e-5, 1.0),
        (x.view(30, 48), 1e-5, 1.0),
    )
    for given, eps, offset in others:
        kernels.forward(given, given.flatten()[: given.shape[-1]], eps, offset)
    assert len(compiled) == 2 + len(others) and len(launched) == 2


def test_packages_without_kernels_have_none(tmp_path: Path) -> None:
    for number, more in enumerate(({"device": "cpu"}, {"device": "h200", "kernels": False}, {"norms": "none"})):
        words = {"device": "h200", "rotary": "none", **more}
        (folder,) = runlora_gen.generate(llama(), rank=RANK, tokens=64, output=tmp_path / str(number), **words)
        assert not any((folder / f"{name}.py").exists() for name in ("launches", "norm_kernels", "rotary"))
        if (folder / "norms.py").exists():
            norm = formed(imported(folder), Norm())
            x = torch.randn(3, HIDDEN, device=DEVICE, dtype=HALF, requires_grad=True)
            assert torch.equal(norm(x), type(norm).replaces.forward(norm, x))
