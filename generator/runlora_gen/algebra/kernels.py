"""Fused kernels: what they need, and what they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Kernel:
    """A fused Triton kernel; its templates are ``templates/kernels/NAME*.jinja``.

    Attributes:
        launches: of one call. A product that is split because few tokens or features would leave the machine idle
            takes one more, to add up its parts; that is not counted.
        call: the arguments of its call in the emitted code, from the parts of the operation: ``left0`` is the left
            operand of the first part as the formula has it, ``left0T`` its transpose; likewise ``right`` and
            ``addend``; ``bias`` is b or None, ``dtypes`` are those of results that are gradients of parameters.
        tiles: its compile-time constants where none were tuned, for 16-bit operands on GPUs that have tensor
            descriptors and 227 KiB of shared memory a block.
        small_tiles: the same for operands and GPUs (from sm_80 on) where that does not hold; empty for a kernel that
            uses no descriptors and has one set.
        candidates: constants that ``tune`` tries in place of those of ``tiles``.
        dtypes: dtypes that it takes.
        largest_rank: above it the kernel is no candidate.
        helpers: what it uses of the helpers in ``templates/kernels/support.jinja`` and ``tiles.jinja``,
            and ``F`` for torch.nn.functional.
        priced_as: the kernel whose measured efficiency stands for its own.
        seeded: whether it draws random numbers, from the emitted code's variable ``seed``.
    """

    launches: int
    call: str
    tiles: Mapping[str, int]
    small_tiles: Mapping[str, int] = field(default_factory=dict)
    candidates: Sequence[Mapping[str, int]] = ()
    dtypes: frozenset[str] = frozenset({"bf16", "fp16", "fp32"})
    largest_rank: int | None = None
    helpers: frozenset[str] = frozenset()
    priced_as: str | None = None
    seeded: bool = False


#: Tiles are the best ones, over all, on an H200 in bf16 at 2048 to 16384 tokens and 5120 and 13824 features.
KERNELS: Mapping[str, Kernel] = {
    "fused_gemm": Kernel(
        launches=1,
        call="{left1}, {right1T}, {left0}, {right0T}, {bias}",
        tiles={"BM": 128, "BN": 256, "BK": 64, "GROUP_M": 8, "SUBTILES": 2, "PARTS": 2, "WARPS": 8, "STAGES": 4},
        small_tiles={"BM": 128, "BN": 128, "BK": 32, "GROUP_M": 8, "SUBTILES": 1, "PARTS": 1, "WARPS": 8, "STAGES": 3},
        candidates=({"GROUP_M": 16}, {"BN": 128, "SUBTILES": 1}),
        dtypes=frozenset({"bf16", "fp16"}),  # its tiles fill the shared memory with 16-bit operands
        helpers=frozenset({"F", "descriptors", "multiprocessors", "rank_wide"}),
    ),
    "p_db": Kernel(
        launches=2,  # the second one adds up the partial sums of the first
        call="{left0}, {right0}, {right1}, scaling, {dtypes}",
        tiles={"BT": 512, "BO": 64, "WARPS": 4, "STAGES": 3},
        small_tiles={"BT": 128, "BO": 64, "WARPS": 4, "STAGES": 3},
        candidates=({"BT": 256}, {"BT": 256, "WARPS": 8, "BO": 128}),
        # In fp32 arithmetic it was thirty times slower than two products: its accumulators spill.
        dtypes=frozenset({"bf16", "fp16"}),
        # Faster than two products at ranks 8 and 16, slower at 128, where its accumulators leave the registers.
        largest_rank=32,
        helpers=frozenset({"descriptors", "fitting", "multiprocessors", "rank_wide", "sum_parts"}),
    ),
    "x_at": Kernel(
        launches=1,
        call="{left0}, {right0T}, scaling",
        tiles={"BT": 64, "BI": 256, "WARPS": 4, "STAGES": 4},
        small_tiles={"BT": 64, "BI": 64, "WARPS": 4, "STAGES": 3},
        candidates=({"BI": 128}, {"BT": 128, "BI": 128}),
        largest_rank=128,
        helpers=frozenset({"descriptors", "fitting", "multiprocessors", "rank_wide", "splits", "sum_parts"}),
    ),
    "pt_x": Kernel(
        launches=1,
        call="{left0T}, {right0}, {dtypes}",
        tiles={"BT": 256, "BI": 64, "WARPS": 4, "STAGES": 4},
        small_tiles={"BT": 64, "BI": 64, "WARPS": 4, "STAGES": 3},
        candidates=({"BT": 64, "BI": 128, "STAGES": 5}, {"BT": 128, "BI": 64}),
        largest_rank=128,
        helpers=frozenset({"descriptors", "fitting", "multiprocessors", "splits", "sum_parts"}),
    ),
    "merge": Kernel(
        launches=1,
        call="{addend0}, {right0}, {left0}, scaling",
        tiles={"BO": 32, "BI": 128, "WARPS": 4, "STAGES": 3},
        candidates=({"BO": 64}, {"BI": 256}),
        helpers=frozenset({"merged_tile"}),
    ),
    "merge_stochastic": Kernel(
        launches=2,  # the first one draws the seed
        call="{addend0}, {right0}, {left0}, scaling, seed",
        tiles={"BO": 32, "BI": 128, "WARPS": 4, "STAGES": 3},
        dtypes=frozenset({"bf16", "fp16"}),
        helpers=frozenset({"merged_tile"}),
        priced_as="merge",
        seeded=True,
    ),
}


def runs(kernel: str, *, dtype: str, rank: int) -> bool:
    """Whether a kernel takes a dtype and a rank."""
    limits = KERNELS[kernel]
    return dtype in limits.dtypes and (limits.largest_rank is None or rank <= limits.largest_rank)
