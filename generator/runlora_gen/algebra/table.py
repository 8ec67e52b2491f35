"""THE TABLE: for each symbol of a LoRA linear, all the ways to compute it.

A new idea is a new row. The enumerator, the prices, the documentation and the emitted code all follow from it.
Y = X Wᵀ + s X Aᵀ Bᵀ + b, with S = s X Aᵀ, P = s dY B, D = s B A, M = W + D, G = dYᵀ X.

The paper is "Run LoRA Run" (arXiv 2312.03415); it writes W as I×O, U for Aᵀ and V for Bᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .operations import SYMBOLS, Fused, Operation, Symbol, parse


@dataclass(frozen=True)
class Way:
    """One row: a way to obtain its targets, as operations in order. No operations: the forward saved them."""

    targets: tuple[Symbol, ...]
    name: str
    operations: tuple[Operation, ...]
    paper: tuple[str, ...] = ()  # the paper's names for a forward that uses this row

    @property
    def saved(self) -> bool:
        """Whether the forward keeps the target for the backward instead of computing it again."""
        return not self.operations

    @property
    def reads(self) -> frozenset[Symbol]:
        """Symbols that must exist before this way runs."""
        read = {symbol for operation in self.operations for symbol in operation.reads}
        return frozenset(read - set(self.targets))


def way(target: str, name: str, *formulas: str, paper: tuple[str, ...] = ()) -> Way:
    """A row of the table from its formulas; ``target`` may name several symbols, separated by spaces."""
    targets = tuple(SYMBOLS[symbol] for symbol in target.split())
    return Way(targets, name, tuple(map(parse, formulas)), paper)


SAVED = "saved"
CAST = "cast"

TABLE: tuple[Way, ...] = (
    way("S", "x_at", "S = s * X @ A.T"),
    way("S", SAVED),
    way("M", "merge", "M = W + s * B @ A"),
    way("M", SAVED),
    way("D", "b_a", "D = s * B @ A"),
    way("D", SAVED),
    # Where the adapter has another dtype than the activations; else A and B are lora_A and lora_B themselves.
    way("A", CAST, "A = cast(lora_A)"),
    way("A", SAVED),
    way("B", CAST, "B = cast(lora_B)"),
    way("B", SAVED),
    # The forward.
    way("Y", "base_first", "Y = X @ W.T + b", "Y += S @ B.T", paper=("forward1",)),
    way("Y", "lowrank_first", "Y = S @ B.T + b", "Y += X @ W.T", paper=("forward3",)),
    # forward4 is forward2 with another reshaping of X: the same products.
    way("Y", "merged", "Y = X @ M.T + b", paper=("forward2", "forward4")),
    way("Y", "fused", "fused_gemm: Y = S @ B.T + b; Y += X @ W.T"),
    way("Y", "delta", "Y = X @ W.T + b", "Y += X @ D.T"),  # left out by the paper
    # The backward.
    way("P", "dy_b", "P = s * dY @ B"),
    way("G", "dyt_x", "G = dY.T @ X"),
    way("dX", "base_first", "dX = dY @ W", "dX += P @ A"),
    way("dX", "lowrank_first", "dX = P @ A", "dX += dY @ W"),
    way("dX", "merged", "dX = dY @ M"),
    # One persistent kernel for the large product, with the low-rank product as the tail of its inner loop.
    way("dX", "fused", "fused_gemm: dX = P @ A; dX += dY @ W"),
    way("dX", "delta", "dX = dY @ W", "dX += dY @ D"),  # left out by the paper
    way("dA", "pt_x", "dA = P.T @ X"),
    way("dA", "bt_g", "dA = s * B.T @ G"),
    way("dB", "dyt_s", "dB = dY.T @ S"),
    way("dB", "g_at", "dB = s * G @ A.T"),
    # One pass over dY yields both.
    way("P dB", "one_pass", "p_db: P = s * dY @ B; dB = dY.T @ S"),
    way("db", "sum", "db = sum(dY)"),
)


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


def _by_product(*formulas: str) -> Mapping[Operation, Fused]:
    """Kernels for single products, by these."""
    return {fused.parts[0]: fused for fused in map(parse, formulas) if isinstance(fused, Fused)}


#: Kernels for single products of the table, beside torch's own: they make no other programs, the price decides which of
#: the two computes the product.
TWINS = _by_product("x_at: S = s * X @ A.T", "pt_x: dA = P.T @ X", "merge: M = W + s * B @ A")
#: What takes the place of products where a merged weight is rounded stochastically: torch has no such rounding.
STOCHASTIC_MERGE = _by_product("merge_stochastic: M = W + s * B @ A")

#: Every operation that a program may hold, each once.
OPERATIONS: tuple[Operation, ...] = tuple(
    dict.fromkeys(
        (
            *(operation for row in TABLE for operation in row.operations),
            *TWINS.values(),
            *STOCHASTIC_MERGE.values(),
        )
    )
)


def runs(kernel: str, *, dtype: str, rank: int) -> bool:
    """Whether a kernel takes a dtype and a rank."""
    limits = KERNELS[kernel]
    return dtype in limits.dtypes and (limits.largest_rank is None or rank <= limits.largest_rank)


def rows(
    *, kernels: bool, dtype: str = "bf16", rank: int = 1, known: Callable[[Operation], bool] = lambda _: True
) -> tuple[Way, ...]:
    """The rows that are candidates: with or without fused kernels that take a dtype and a rank, and are known."""

    def serves(operation: Operation) -> bool:
        if not isinstance(operation, Fused):
            return True
        return kernels and runs(operation.kernel, dtype=dtype, rank=rank) and known(operation)

    return tuple(row for row in TABLE if all(map(serves, row.operations)))


def inputs(*, casts: bool) -> tuple[Symbol, ...]:
    """What a forward starts from, in the order in which it is saved; ``casts``: the adapter has a dtype of its own."""
    return tuple(SYMBOLS[name] for name in ("X", "W", *(("lora_A", "lora_B") if casts else ("A", "B"))))


#: The paper's backward graphs: its names for the ways of dX, dA and dB. It recomputes S and M, and never saves them.
PAPER_BACKWARDS: Mapping[tuple[str, str, str], str] = {
    ("base_first", "pt_x", "dyt_s"): "backward1",
    ("base_first", "pt_x", "g_at"): "backward2",
    ("base_first", "bt_g", "g_at"): "backward3",
    ("merged", "bt_g", "g_at"): "backward4",
    ("merged", "pt_x", "dyt_s"): "backward5",
    ("base_first", "bt_g", "dyt_s"): "backward6",
    ("merged", "bt_g", "dyt_s"): "backward7",
    ("merged", "pt_x", "g_at"): "backward8",
}

#: Rounding these to 16 bits drops updates smaller than half an ulp of W: DESIGN's lossy merge.
LOSSY_IN_16_BIT = frozenset({SYMBOLS["M"]})
