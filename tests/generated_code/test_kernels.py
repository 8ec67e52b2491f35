"""The fused kernels against float64: ragged, tiny and strided operands, poisoned outputs, equal bits on every run.

Without a GPU they run in Triton's interpreter, whose products take float16 but not bfloat16.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from runlora_gen.spec.workload import Workload
from torch import Tensor

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
LAYOUTS = ["contiguous", "aligned", "padded", "transposed"]


@pytest.fixture(scope="module")
def fused(load: Any) -> ModuleType:
    """A module whose one variant uses both kernels."""
    module = load(Workload(launch="graph"), in_features=5120, out_features=5120, rank=16)
    assert list(module.VARIANTS) == ["fused/fused-pt_x-one_pass/keep-s"] and module.KERNELS
    return module


def draw(seed: int, rows: int, columns: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Random values, in a buffer that is NaN around them."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    nan = float("nan")
    match layout:
        case "aligned":  # rows on 16 bytes: what tensor descriptors read
            view = values.new_full((rows + 1, -(-columns // 8) * 8 + 8), nan)[:rows, :columns]
        case "padded":
            view = values.new_full((rows + 2, columns + 3), nan)[1:-1, 1 : columns + 1]
        case "transposed":
            view = values.new_full((columns, rows + 5), nan)[:, :rows].t()
        case _:
            return values
    return view.copy_(values)


def check(ours: Tensor, plain: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """|ours - exact| <= 2 |plain - exact| + tiny, two ulps of the summed magnitudes."""
    assert ours.shape == exact.shape and ours.dtype == plain.dtype
    error, allowed = (ours.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    assert error <= 2 * allowed + 2 * torch.finfo(ours.dtype).eps * magnitude.max()


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors are full of NaN: what a kernel does not write shows."""
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **options: empty(*args, **options).fill_(float("nan")))


sizes = st.integers(1, 300)
# On a GPU every rank is compiled anew: a few stand for all.
ranks = st.integers(1, 70) if DEVICE == "cpu" else st.sampled_from([1, 5, 16, 33, 64])
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 2**20)
property_test = settings(max_examples=40, deadline=None)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_gemm(fused: ModuleType, dtype: torch.dtype) -> None:
    @property_test
    @given(M=sizes, N=sizes, K=sizes, R=ranks, bias=st.booleans(), layout=st.tuples(*[layouts] * 4), seed=seeds)
    def run(M: int, N: int, K: int, R: int, bias: bool, layout: tuple[str, ...], seed: int) -> None:
        shapes = ((M, K), (N, K), (M, R), (N, R))
        left, right, low_left, low_right = (
            draw(seed + i, *shape, dtype, kind) for i, (shape, kind) in enumerate(zip(shapes, layout, strict=True))
        )
        b = draw(seed + 4, 1, N, dtype, layout[0])[0] if bias else None

        def reference(*operands: Tensor, bias: Tensor | None) -> Tensor:
            x, w, s, low = operands
            return F.linear(x, w, bias) + F.linear(s, low)

        operands = (left, right, low_left, low_right)
        ours = fused._launch_fused_gemm(*operands, b)
        exact = reference(*(t.double() for t in operands), bias=None if b is None else b.double())
        magnitude = reference(*(t.double().abs() for t in operands), bias=None if b is None else b.double().abs())
        check(ours, reference(*operands, bias=b), exact, magnitude)
        assert torch.equal(ours, fused._launch_fused_gemm(*operands, b))

    run()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_for_p_and_db(fused: ModuleType, dtype: torch.dtype) -> None:
    @property_test
    @given(
        T=st.integers(1, 700),
        O=sizes,
        R=ranks.filter(lambda rank: rank <= 32),
        layout=st.tuples(*[layouts] * 3),
        seed=seeds,
    )
    def run(T: int, O: int, R: int, layout: tuple[str, ...], seed: int) -> None:  # noqa: E741
        shapes = ((T, O), (O, R), (T, R))
        dY, B, S = (
            draw(seed + i, *shape, dtype, kind) for i, (shape, kind) in enumerate(zip(shapes, layout, strict=True))
        )
        P, dB = fused._launch_p_db(dY, B, S, 0.75)
        d, b, s = dY.double(), B.double(), S.double()
        check(P, 0.75 * (dY @ B), 0.75 * d @ b, d.abs() @ b.abs())
        check(dB, dY.t() @ S, d.t() @ s, d.t().abs() @ s.abs())
        for first, second in zip((P, dB), fused._launch_p_db(dY, B, S, 0.75), strict=True):
            assert torch.equal(first, second)

    run()


def problem(tokens: int, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    shapes = {"x": (tokens, 40), "weight": (24, 40), "lora_A": (4, 40), "lora_B": (24, 4)}
    tensors = {name: draw(i, *shape, dtype) / 4 for i, (name, shape) in enumerate(shapes.items())}
    for name in ("x", "lora_A", "lora_B"):
        tensors[name].requires_grad_()
    return tensors


@pytest.fixture
def launches(fused: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that run."""
    names: list[str] = []
    for name in ("_launch_fused_gemm", "_launch_p_db"):
        launch = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *args, name=name, launch=launch: names.append(name) or launch(*args))
    return names


def test_a_step_takes_three_kernels(fused: ModuleType, launches: list[str]) -> None:
    fused.lora_linear(**problem(5), scaling=0.5).sum().backward()
    assert launches == ["_launch_fused_gemm", "_launch_p_db", "_launch_fused_gemm"]


@pytest.mark.parametrize(
    "tensors",
    [problem(0), problem(5, torch.float64), problem(5, torch.float32)],
    ids=["no tokens", "float64", "float32"],
)
def test_what_kernels_do_not_take_goes_through_torch(
    fused: ModuleType, launches: list[str], tensors: dict[str, Any]
) -> None:
    output = fused.lora_linear(**tensors, scaling=0.5)
    output.sum().backward()
    assert not launches and output.dtype == tensors["x"].dtype


def test_offsets_beyond_32_bits_go_through_torch(fused: ModuleType) -> None:
    def serve(*shape: int, stride: int) -> bool:
        matrix = torch.empty(1, dtype=torch.float16, device="meta").as_strided(shape, (stride, 1))
        return bool(fused._kernels_serve(matrix))

    if DEVICE == "cpu":  # on a GPU a meta tensor is refused for its device already
        assert serve(2, 8, stride=2**30) and not serve(2, 8, stride=2**31)
    assert not serve(2**16, 2**15, stride=2**15)


def test_kernels_can_be_switched_off(fused: ModuleType, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "KERNELS", False)
    fused.lora_linear(**problem(5), scaling=0.5).sum().backward()
    assert not launches


def test_compile_goes_through_the_operators(fused: ModuleType) -> None:
    torch.compiler.reset()
    tensors = problem(6)
    compiled = torch.compile(fused.lora_linear, fullgraph=True, backend="aot_eager")
    outputs = [function(**tensors, scaling=0.5) for function in (compiled, fused.lora_linear)]
    torch.testing.assert_close(*outputs)
    wanted = [tensors[name] for name in ("x", "lora_A", "lora_B")]
    first, second = (torch.autograd.grad(output.float().square().sum(), wanted) for output in outputs)
    for ours, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_operators_are_well_formed(fused: ModuleType) -> None:
    left, right, low_left, low_right = (
        draw(i, *s, torch.float16) for i, s in enumerate([(5, 8), (6, 8), (5, 2), (6, 2)])
    )
    torch.library.opcheck(fused._fused_gemm_operator, (left, right, low_left, low_right, None))
    torch.library.opcheck(fused._p_db_operator, (left, draw(9, 8, 2, torch.float16), low_left, 0.5))
