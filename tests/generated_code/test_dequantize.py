"""Weights of 4 bits: by torch and by the kernels, to the bit what bitsandbytes makes of the codes.

Without a GPU the kernels run in Triton's interpreter, which takes float16 and float32 but not bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runlora_gen.algebra.linear import QUANTIZED
from runlora_gen.cost.device import DeviceProfile
from runlora_gen.cost.lower import with_kernels
from runlora_gen.kernels.sites import alternatives
from runlora_gen.measure.problem import random_codes
from runlora_gen.request.workload import Workload
from runlora_gen.search import candidates
from torch import Tensor

pytest.importorskip("triton", minversion="3.4")
functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
default = pytest.importorskip("bitsandbytes.backends.default", reason="needs bitsandbytes")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
HALF = torch.bfloat16 if GPU else torch.float16
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
#: Below, at and above the sides of tiles and of blocks; odd ones, where a row ends within a byte.
SHAPES = [(1, 1), (7, 9), (1, 130), (33, 62), (24, 40), (64, 64), (96, 100), (17, 512), (40, 513)]

few = settings(max_examples=40 if GPU else 12, deadline=None)
kinds = st.sampled_from(["nf4", "fp4"])


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_compiled() -> Iterator[None]:
    """On a CPU bitsandbytes compiles some of its operators, anew for some sizes: half a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def module(load: Any) -> ModuleType:
    """Every variant on a quantized base, with our kernels wherever one serves, with the table's tiles."""
    workload = Workload(base="nf4", adapter_dtype="bf16", launch="graph", device="h100")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceProfile, "tiles_for", lambda *args: {})
        patch.setattr(
            candidates, "lowered", lambda program, *_: with_kernels(program, alternatives(QUANTIZED, "cheaper"))
        )
        found: ModuleType = load(workload, in_features=40, out_features=24, rank=4, all_variants=True)
    assert found.KERNELS and {"W", "M"} <= found._TILES.keys()
    return found


def quantize(
    module: ModuleType, shape: tuple[int, int], kind: str, nested: bool, blocksize: int, dtype: torch.dtype
) -> tuple[Any, Tensor]:
    """A random weight's codes as the module takes them, and what bitsandbytes makes of them."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=blocksize)
    if GPU:
        return module.Quantized.of(codes, state), functional.dequantize_4bit(codes, state)
    # bitsandbytes' own formula: on some CPUs another of its kernels gives rows that end within a block wrong scales.
    absmax = state.absmax
    if nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    made = default.ops._dequantize_4bit_compute(codes.reshape(-1), absmax, state.code, blocksize, shape, dtype)
    return module.Quantized.of(codes, state), made


def factors(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B."""
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(rank, shape[1], generator=generator) / 8
    return A.to(DEVICE, dtype), torch.randn(shape[0], rank, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=st.sampled_from(SHAPES), kind=kinds, nested=st.booleans(), blocksize=st.sampled_from(BLOCKSIZES))
@example(shape=(7, 9), kind="nf4", nested=True, blocksize=32)
@example(shape=(96, 100), kind="fp4", nested=False, blocksize=4096)
@example(shape=(40, 513), kind="fp4", nested=True, blocksize=64)
@few
def test_torch_makes_the_weight_to_the_bit(
    module: ModuleType, shape: tuple[int, int], kind: str, nested: bool, blocksize: int, dtype: torch.dtype
) -> None:
    """Where bitsandbytes was not imported before, and where it was."""
    Q, wanted = quantize(module, shape, kind, nested, blocksize, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_DEQUANTIZE", None)
        alone = module._dequantized(Q)
        assert module._dequantized(Q, torch.float64).dtype == torch.float64
    assert alone.dtype == dtype and alone.shape == shape and torch.equal(alone, wanted)
    patched = torch.ops.bitsandbytes.dequantize_4bit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_DEQUANTIZE", patched)
        assert torch.equal(module._dequantized(Q), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@given(shape=st.sampled_from(SHAPES), kind=kinds, nested=st.booleans(), blocksize=st.sampled_from(BLOCKSIZES))
@example(shape=(7, 9), kind="nf4", nested=True, blocksize=32)
@example(shape=(96, 100), kind="fp4", nested=False, blocksize=4096)
@example(shape=(40, 513), kind="fp4", nested=True, blocksize=64)
@few
def test_the_kernel_makes_the_weight_to_the_bit(
    module: ModuleType, shape: tuple[int, int], kind: str, nested: bool, blocksize: int, dtype: torch.dtype
) -> None:
    Q, wanted = quantize(module, shape, kind, nested, blocksize, dtype)
    found = module._launch_dequantize(Q, "W")
    assert found is not None and found.dtype == dtype and torch.equal(found, wanted)
    assert torch.equal(module._dequantize(Q, tiles="W"), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@given(
    shape=st.sampled_from([shape for shape in SHAPES if shape[1] % 2 == 0]),
    kind=kinds,
    nested=st.booleans(),
    blocksize=st.sampled_from(BLOCKSIZES),
    rank=st.sampled_from([1, 4, 17, 70]),
)
@example(shape=(96, 100), kind="nf4", nested=True, blocksize=32, rank=70)
@example(shape=(33, 62), kind="fp4", nested=False, blocksize=4096, rank=1)
@few
def test_the_merging_kernel_rounds_once(
    module: ModuleType, shape: tuple[int, int], kind: str, nested: bool, blocksize: int, rank: int, dtype: torch.dtype
) -> None:
    """Without an update to the bit what bitsandbytes makes; with one off by what one rounding may be, and no more."""
    Q, wanted = quantize(module, shape, kind, nested, blocksize, dtype)
    A, B = factors(shape, rank, dtype)
    none = module._launch_dequantize_merged(Q, A, torch.zeros_like(B), 0.5, "M")
    assert none is not None and none.dtype == dtype and torch.equal(none, wanted)
    found = module._launch_dequantize_merged(Q, A, B, 0.5, "M")
    W = module._dequantized(Q, torch.float32).double()
    exact = W + 0.5 * B.double() @ A.double()
    summed = W.abs() + 0.5 * B.double().abs() @ A.double().abs()
    # One rounding of the result, and the float32 sums (of three tf32 products on a GPU).
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 8 * torch.finfo(torch.float32).eps * summed + 1e-7
    for merged in (found, module._dequantized_merged(Q, A, B, 0.5)):
        assert ((merged.double() - exact).abs() <= allowed).all()


def test_where_a_byte_is_of_two_rows_torch_merges(module: ModuleType) -> None:
    Q, _ = quantize(module, (40, 513), "nf4", True, 64, HALF)
    A, B = factors((40, 513), 4, HALF)
    assert module._launch_dequantize_merged(Q, A, B, 0.5, "M") is None
    found = module._dequantize_merged(Q, A, B, 0.5, tiles="M")
    assert torch.equal(found, module._dequantized_merged(Q, A, B, 0.5))


def test_what_kernels_do_not_take_torch_makes(module: ModuleType) -> None:
    Q, _ = quantize(module, (24, 40), "nf4", True, 64, torch.float32)
    for other in (
        Q.to(torch.float64),
        Q._replace(codes=torch.stack((Q.codes, Q.codes), 1)[:, 0]),
        *(() if GPU else (Q.to(torch.bfloat16),)),
    ):
        assert module._launch_dequantize(other, "W") is None
        assert torch.equal(module._dequantize(other, tiles="W"), module._dequantized(other))


def test_random_codes_are_what_a_module_takes(module: ModuleType) -> None:
    """What is measured and proved with."""
    made = random_codes(module.Quantized, (33, 62), DEVICE, torch.float32)
    made._check()
    assert module.Quantized.of(tuple(made)) == made and module.Quantized.of(made) is made
    weight = module._dequantized(made)
    assert weight.shape == (33, 62) and weight.isfinite().all() and weight.std() > 0
