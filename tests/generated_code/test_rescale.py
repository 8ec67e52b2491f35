"""Weights of 8 bits: by torch and by the kernels, to the bit codes times scales, in float32, rounded once.

That is what Transformers makes of float8 codes in float32, and of int8 ones to the bit what bitsandbytes does there; in
16 bits both multiply what they rounded before, so that they are off by more. Without a GPU the kernels run in Triton's
interpreter, which takes float16 and float32 but not bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runlora_gen.algebra.linear import SCALED
from runlora_gen.cost.device import DeviceProfile
from runlora_gen.cost.lower import with_kernels
from runlora_gen.kernels.sites import alternatives
from runlora_gen.request.workload import Workload
from runlora_gen.search import candidates
from torch import Tensor

pytest.importorskip("triton", minversion="3.4")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
HALF = torch.bfloat16 if GPU else torch.float16
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
E4M3 = torch.float8_e4m3fn
BASES = ["int8", "fp8", "fp8-block"]
#: Below, at and above the sides of tiles; odd ones, and wider than a tile.
SHAPES = [(1, 1), (7, 9), (1, 130), (33, 62), (24, 40), (64, 64), (96, 100), (17, 512), (40, 513)]
#: Rows and columns that have one scale: columns of the last are no power of two, but have 16 as a factor.
BLOCKS = [(128, 128), (16, 32), (32, 16), (3, 48)]

few = settings(max_examples=40 if GPU else 8, deadline=None)
shapes = st.sampled_from(SHAPES)
blocks = st.sampled_from(BLOCKS)
of_a_kernel = pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
every_base = pytest.mark.parametrize("base", BASES)


@pytest.fixture(scope="module")
def modules(load: Any) -> Callable[[str], ModuleType]:
    """By the base every variant on it, with our kernels wherever one serves, with the table's tiles."""
    made: dict[str, ModuleType] = {}

    def module(base: str) -> ModuleType:
        if base not in made:
            workload = Workload(base=base, adapter_dtype="bf16", launch="graph", device="a100")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(DeviceProfile, "tiles_for", lambda *args: {})
                patch.setattr(
                    candidates, "lowered", lambda program, *_: with_kernels(program, alternatives(SCALED, "cheaper"))
                )
                made[base] = load(workload, in_features=40, out_features=24, rank=4, all_variants=True)
            assert made[base].KERNELS and {"W", "M"} <= made[base]._TILES.keys()
        return made[base]

    return module


def block_of(base: str, shape: tuple[int, int], block: tuple[int, int], whole: bool) -> tuple[int, int]:
    """Rows and columns that have one scale, as the base has them: ``whole``: of fp8 one scale for all."""
    if base == "fp8-block":
        return block
    return shape if base == "fp8" and whole else (1, shape[1])


def coded(
    module: ModuleType, base: str, shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> Any:
    """Random codes with random scales, the largest and the smallest codes among them."""
    generator = torch.Generator().manual_seed(seed)
    if base == "int8":
        codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    else:
        codes = torch.randn(shape, generator=generator).mul(100).to(E4M3)
        codes[0, 0], codes[-1, -1] = torch.tensor([torch.finfo(E4M3).max, -(2.0**-9)]).to(E4M3)
    count = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    scale = (torch.rand(count, generator=generator) + 0.5) / 50
    unit = 1 / 127 if base == "int8" else 1.0
    return module.Quantized(codes.to(DEVICE), scale.to(DEVICE), block, unit, dtype)


def expanded(Q: Any) -> Tensor:
    """The scale of each element."""
    rows, columns = (torch.arange(size, device=DEVICE) // side for size, side in zip(Q.shape, Q.block, strict=True))
    scale: Tensor = Q.scale[rows][:, columns]
    return scale


def exact(Q: Any) -> Tensor:
    """The weight in float32: the scale times the unit is rounded, then its product with the code."""
    weight: Tensor = Q.codes.float() * (expanded(Q) * Q.unit)
    return weight


@every_base
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes, block=blocks, whole=st.booleans())
@example(shape=(40, 513), block=(3, 48), whole=False)
@example(shape=(7, 9), block=(128, 128), whole=True)
@few
def test_torch_makes_the_weight_to_the_bit(
    modules: Callable[[str], ModuleType],
    base: str,
    shape: tuple[int, int],
    block: tuple[int, int],
    whole: bool,
    dtype: torch.dtype,
) -> None:
    module = modules(base)
    Q = coded(module, base, shape, block_of(base, shape, block, whole), dtype)
    Q._check()
    found = module._dequantized(Q)
    assert found.dtype == dtype and found.shape == shape == Q.shape and torch.equal(found, exact(Q).to(dtype))
    wide = module._dequantized(Q, torch.float64)
    assert wide.dtype == torch.float64 and torch.equal(wide, exact(Q).double())
    assert torch.equal(module._dequantized(Q.to(torch.float32)), exact(Q))


@of_a_kernel
@every_base
@given(shape=shapes, block=blocks, whole=st.booleans())
@example(shape=(40, 513), block=(3, 48), whole=False)
@example(shape=(33, 62), block=(32, 16), whole=False)
@example(shape=(17, 512), block=(128, 128), whole=True)
@few
def test_the_kernel_makes_the_weight_to_the_bit(
    modules: Callable[[str], ModuleType],
    base: str,
    shape: tuple[int, int],
    block: tuple[int, int],
    whole: bool,
    dtype: torch.dtype,
) -> None:
    module = modules(base)
    Q = coded(module, base, shape, block_of(base, shape, block, whole), dtype)
    found = module._launch_rescale(Q, "W")
    assert found is not None and found.dtype == dtype and torch.equal(found, exact(Q).to(dtype))
    assert torch.equal(module._rescale(Q, tiles="W"), found)


@of_a_kernel
@every_base
@given(shape=shapes, block=blocks, whole=st.booleans(), rank=st.sampled_from([1, 4, 17, 70]))
@example(shape=(96, 100), block=(3, 48), whole=True, rank=70)
@example(shape=(40, 513), block=(16, 32), whole=False, rank=1)
@few
def test_the_merging_kernel_rounds_once(
    modules: Callable[[str], ModuleType],
    base: str,
    shape: tuple[int, int],
    block: tuple[int, int],
    whole: bool,
    rank: int,
    dtype: torch.dtype,
) -> None:
    """Without an update to the bit the weight; with one off by what one rounding may be, and no more."""
    module = modules(base)
    Q = coded(module, base, shape, block_of(base, shape, block, whole), dtype)
    generator = torch.Generator().manual_seed(1)
    A = (torch.randn(rank, shape[1], generator=generator) / 8).to(DEVICE, dtype)
    B = torch.randn(shape[0], rank, generator=generator).to(DEVICE, dtype)
    none = module._launch_rescale_merged(Q, A, torch.zeros_like(B), 0.5, "M")
    assert none is not None and none.dtype == dtype and torch.equal(none, exact(Q).to(dtype))
    found = module._launch_rescale_merged(Q, A, B, 0.5, "M")
    W = exact(Q).double()
    merged = W + 0.5 * B.double() @ A.double()
    summed = W.abs() + 0.5 * B.double().abs() @ A.double().abs()
    # One rounding of the result, and the float32 sums (of three tf32 products on a GPU).
    allowed = torch.finfo(dtype).eps / 2 * merged.abs() + 8 * torch.finfo(torch.float32).eps * summed + 1e-7
    for one in (found, module._dequantized_merged(Q, A, B, 0.5), module._rescale_merged(Q, A, B, 0.5, tiles="M")):
        assert one.dtype == dtype and ((one.double() - merged).abs() <= allowed).all()


@pytest.mark.parametrize(
    ("shape", "block"), [((24, 40), None), ((40, 513), None), ((24, 40), (7, 24)), ((9, 8), (1, 4))]
)
def test_what_kernels_do_not_take_torch_makes(
    modules: Callable[[str], ModuleType], shape: tuple[int, int], block: tuple[int, int] | None
) -> None:
    """Other dtypes, codes with gaps, and blocks in whose rows less than 16 columns follow each other in a tile."""
    module = modules("fp8-block" if block else "fp8")
    base = "fp8-block" if block else "fp8"
    Q = coded(module, base, shape, block or (1, shape[1]), HALF)
    gaps = Q._replace(codes=torch.stack((Q.codes, Q.codes), 1)[:, 0])
    others = [Q.to(torch.float64), gaps, *(() if GPU else (Q.to(torch.bfloat16),)), *([Q] if block else [])]
    for other in others:
        A, B = (torch.ones(*size, device=DEVICE, dtype=other.dtype) for size in ((4, shape[1]), (shape[0], 4)))
        assert module._launch_rescale(other, "W") is None and module._launch_rescale_merged(other, A, B, 1, "M") is None
        assert torch.equal(module._rescale(other, tiles="W"), module._dequantized(other))
        merged = module._dequantized_merged(other, A, B, 1.0)
        assert torch.equal(module._rescale_merged(other, A, B, 1.0, tiles="M"), merged)
    narrow = torch.ones(4, shape[1], device=DEVICE), torch.ones(shape[0], 4, device=DEVICE)
    assert module._launch_rescale_merged(Q, *narrow, 1.0, "M") is None, "the adapter has another dtype"


@pytest.mark.parametrize(
    ("block", "run"), [((1, 40), 1024), ((1, 64), 1024), ((3, 48), 1024), ((2, 32), 32), ((2, 16), 16), ((2, 24), 8)]
)
def test_columns_of_a_tile_have_one_scale(
    modules: Callable[[str], ModuleType], block: tuple[int, int], run: int
) -> None:
    module = modules("fp8-block")
    assert module._run_of(coded(module, "fp8-block", (24, 40), block, HALF)) == run


@pytest.mark.parametrize("base", BASES)
def test_a_replayed_plan_reads_other_operands(modules: Callable[[str], ModuleType], base: str) -> None:
    """A launch is planned once for a geometry: unit, codes and scales are those of the call."""
    module, shape = modules(base), (33, 62)
    for seed in range(2):
        Q = coded(module, base, shape, block_of(base, shape, (16, 32), False), HALF, seed)
        assert torch.equal(module._launch_rescale(Q, "W"), exact(Q).to(HALF))
    doubled = Q._replace(unit=2 * Q.unit)
    assert torch.equal(module._launch_rescale(doubled, "W"), exact(doubled).to(HALF))


@pytest.mark.parametrize("base", BASES)
def test_operators_are_what_is_compiled(modules: Callable[[str], ModuleType], base: str) -> None:
    """With the schema that torch checks, of what it can compare, and with fake results of the right shape and dtype."""
    module, shape = modules(base), (24, 40)
    Q = coded(module, base, shape, block_of(base, shape, (16, 32), False), HALF)
    A, B = torch.ones(4, 40, device=DEVICE, dtype=HALF), torch.ones(24, 4, device=DEVICE, dtype=HALF)
    tests = ("test_faketensor", *(("test_schema",) if base == "int8" else ()))
    torch.library.opcheck(module._rescale_operator, tuple(Q), {"tiles": "W"}, test_utils=tests)
    torch.library.opcheck(module._rescale_merged_operator, (*Q, A, B, 0.5), {"tiles": "M"}, test_utils=tests)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda: (module._rescale(Q, tiles="W"), module._rescale_merged(Q, A, B, 0.5, tiles="M")),
        fullgraph=True,
        backend="eager",
    )
    W, M = compiled()
    assert torch.equal(W, module._launch_rescale(Q, "W"))
    assert torch.equal(M, module._launch_rescale_merged(Q, A, B, 0.5, "M"))


# What it is to those who make such bases


@given(shape=shapes)
@few
def test_int8_is_what_bitsandbytes_has_in_float32(modules: Callable[[str], ModuleType], shape: tuple[int, int]) -> None:
    """To the bit in float32; in 16 bits at most as far from that, since it rounds three times."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    module = modules("int8")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    CB, SCB, _ = functional.int8_vectorwise_quant(weight)
    Q = module.Quantized.of(CB, (SCB, (1, shape[1])))
    assert Q.dtype == torch.bfloat16 and Q.unit == 1 / 127

    def theirs(dtype: torch.dtype) -> Tensor:
        made: Tensor = CB.to(dtype, copy=True).mul_(SCB.unsqueeze(1).mul(1.0 / 127.0))
        return made

    wide = module._dequantized(Q, torch.float32)
    assert torch.equal(wide, theirs(torch.float32))
    assert torch.equal(wide, exact(Q))
    for dtype in (torch.float16, torch.bfloat16):
        ours = module._dequantized(Q, dtype)
        assert torch.equal(ours, wide.to(dtype))
        assert (ours.float() - wide).norm() <= (theirs(dtype).float() - wide).norm()


@pytest.mark.parametrize("base", ["fp8", "fp8-block"])
@given(shape=shapes, block=st.sampled_from([*BLOCKS, (7, 24)]), power=st.booleans())
@example(shape=(40, 513), block=(3, 48), power=False)
@few
def test_float8_is_what_transformers_has_in_float32(
    modules: Callable[[str], ModuleType], base: str, shape: tuple[int, int], block: tuple[int, int], power: bool
) -> None:
    """``power``: of scales that are powers of two, in a dtype of theirs: then 16 bits agree as well."""
    theirs = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="needs Transformers")
    module = modules(base)
    Q = coded(module, base, shape, shape if base == "fp8" else block, torch.float32)
    scale = Q.scale
    if power:
        scale = (2.0 ** Q.scale.log2().round()).to(torch.float8_e8m0fnu)
    given = module.Quantized.of(Q.codes, (scale if base == "fp8-block" else scale.view(()), Q.block))
    assert given.scale.dtype == torch.float32 and given.block == Q.block
    size = None if base == "fp8" else list(block)
    stored = scale.float() if base == "fp8-block" else scale.float().view(())
    for dtype in DTYPES if power else DTYPES[:1]:
        wanted = theirs._dequantize_fp8_weight(Q.codes, stored, size, dtype)
        assert torch.equal(module._dequantized(given, dtype), wanted)
    for dtype in DTYPES[1:]:
        once = (Q.codes.float() * expanded(given)).to(dtype)
        assert torch.equal(module._dequantized(given, dtype), once)
