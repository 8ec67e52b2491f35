"""The record of a kernel: what it needs, what it takes, and when it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..request.errors import shorten

#: When a kernel takes the place of a product of torch's: where its price is lower, or where merged weights are to be
#: rounded stochastically.
When = Literal["cheaper", "stochastic"]


#: Where the ``tiles`` of the records are the best ones, over all.
BEST_AT = "on an H200 in bf16, at 2048 to 16384 tokens and 5120 and 13824 features"


@dataclass(frozen=True)
class Bounds:
    """What a constant may be: a power of two, or any whole number, from ``least`` to ``most``."""

    least: int
    most: int
    power_of_two: bool = True

    def allow(self, value: object) -> bool:
        """Whether a value is within."""
        within = type(value) is int and self.least <= value <= self.most
        return within and not (self.power_of_two and value & (value - 1))  # type: ignore[operator]

    def __str__(self) -> str:
        return f"a {'power of two' if self.power_of_two else 'whole number'} from {self.least} to {self.most}"


#: Of Triton's options, which every kernel has, of how many programs a multiprocessor is to have beside each other, and
#: of the sides of tiles, which all other constants are.
OPTIONS: Mapping[str, Bounds] = {
    "STAGES": Bounds(1, 8, power_of_two=False),
    "WARPS": Bounds(1, 16),
    "BESIDE": Bounds(1, 32),
}
SIDE = Bounds(16, 1024)


@dataclass(frozen=True)
class Kernel:
    """A fused Triton kernel: the record that its folder holds as ``KERNEL``.

    Beside it the folder holds ``device.jinja`` (the Triton source, whose entry is ``_NAME_kernel``), ``launch.jinja``
    (``_NAME``, which the emitted code calls, with its path through torch) and ``operator.jinja`` (the registration for
    torch.compile); the folder's name is the kernel's.

    Attributes:
        launches: of one call. A product that is split because few tokens or features would leave the machine idle
            takes one more, to add up its parts; that is not counted.
        whole: blocks that one program sums before parts of their sum, made by several, were added up.
        alone_to: rows and columns of dY up to which one launch does all, whatever it takes beyond.
        call: the arguments of its call in the emitted code, from the parts of the operation: ``left0`` is the left
            operand of the first product as the formula has it, ``left0T`` its transpose; likewise ``right``,
            ``addend``, ``bias`` and ``scaling``; ``seed0`` is what the first mask is drawn from, ``dropped0`` what is
            dropped first, ``codes0`` what is dequantized; ``operands`` are those of a single operation that is no
            product, ``scales`` those of codes that multiply columns; ``dtypes`` are those of results that are
            gradients of parameters, ``needs`` whether each result is wanted, where it is told. Where it is of several
            linears, ``*left0`` is the tuple of the left operands of all parts that do what the first one does,
            one a linear, ``*left1`` that of the next kind of part; likewise the others. ``gathered0`` are the
            tokens whose rows are read, ``weighed0`` those that are weighed by ``weights0``, ``dotted0`` and so on what
            rows are multiplied with.
        tiles: its compile-time constants where none were tuned, for 16-bit operands on GPUs that have tensor
            descriptors and 227 KiB of shared memory a block.
        small_tiles: the same for operands and GPUs (from sm_80 on) where that does not hold; empty for a kernel that
            uses no descriptors and has one set.
        candidates: constants that ``tune`` tries in place of those of ``tiles``.
        bounds: of constants that are neither options of Triton nor sides of tiles.
        adapted: what a launch makes of a constant, whatever was tuned: an expression of Python over the constants, T,
            BR, the columns that hold a row of the rank, WHOLE, which is ``whole``, and I, where it sums over that.
            Shared memory may halve it further (``_fitting``).
        dtypes: dtypes that it takes.
        largest_rank: above it the kernel is no candidate.
        most_tokens, most_columns: likewise, of rows, and of columns of any output.
        helpers: what it uses of the helpers in ``support.jinja`` and ``tiles.jinja``, which kernels share, and ``F``
            for torch.nn.functional.
        replaces: the work, see ``algebra/work.py``, of the single operations whose place it may take, whatever a site
            calls their symbols. A kernel of several replaces none: it is in a row of the table.
        when: it takes the place of these.
        priced_as: the kernel whose measured efficiency, and whose tuned constants, stand for its own; for those of a
            kernel of several linears, those of one that is as large as all are together.
        seeded: whether it draws random numbers, from the emitted code's variable ``seed``.
        drops: whether it reads what a mask leaves, that it draws from a seed: the templates that it has in common with
            another kernel ask for it.
        then: whether the last of its operation's parts, and those before it that are alike, are torch's own products
            after it: they are priced as such.
        persistent: whether its programs walk over tiles of BM×BN of the result, those of the last wave cut into PARTS
            if it has this constant: then it is busy for whole waves.
        float8: whether it is one of those that products of float8 take: on GPUs that have them.
        largest: whether it also gives the largest magnitudes of the rows that it reads: the templates that it has in
            common with another kernel ask for it.
        gathers: whether the rows that it reads are those of tokens, which it gathers: likewise.
        spends: whether its large results take the place of what it reads, where autograd frees that after the backward:
            the emitted code's call allows it (``spend``). So it has to be what no one else can hold, and is read last.
        parts: bytes of the parts of sums that its launch needs, where they are many: an expression of Python over the
            constants, T, I, R, which is the rank of all, and BYTES, of an element.
    """

    launches: int
    call: str
    tiles: Mapping[str, int]
    small_tiles: Mapping[str, int] = field(default_factory=dict)
    candidates: Sequence[Mapping[str, int]] = ()
    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    adapted: Mapping[str, str] = field(default_factory=dict)
    dtypes: frozenset[str] = frozenset({"bf16", "fp16", "fp32"})
    largest_rank: int | None = None
    most_tokens: int | None = None
    most_columns: int | None = None
    whole: int = 1
    alone_to: tuple[int, int] = (0, 0)
    helpers: frozenset[str] = frozenset()
    replaces: tuple[str, ...] = ()
    when: When = "cheaper"
    priced_as: str | None = None
    seeded: bool = False
    drops: bool = False
    then: bool = False
    persistent: bool = False
    float8: bool = False
    largest: bool = False
    gathers: bool = False
    spends: bool = False
    parts: str = "0"

    def __post_init__(self) -> None:
        for constants in (self.tiles, self.small_tiles, *self.candidates):
            self.check(constants)
        if self.small_tiles and self.small_tiles.keys() != self.tiles.keys():
            raise ValueError(f"small tiles are of {', '.join(self.small_tiles)}, not of {', '.join(self.tiles)}")
        if self.persistent and not {"BM", "BN"} <= self.tiles.keys():
            raise ValueError("what walks over tiles has the constants BM and BN")
        for names in (self.bounds, self.adapted):
            self.check({name: self.tiles.get(name) for name in names})

    def check(self, constants: Mapping[str, Any]) -> None:
        """Refuse what it has no constants for: they reach generated code.

        Raises:
            ValueError: an unknown name, or a value out of bounds.
        """
        for name, value in constants.items():
            if name not in self.tiles:
                raise ValueError(f"no constant {shorten(name)}; known are {', '.join(self.tiles)}")
            bounds = self.bounds.get(name) or OPTIONS.get(name, SIDE)
            if not bounds.allow(value):
                raise ValueError(f"{name} = {shorten(value)} is not allowed; give {bounds}")

    def launches_at(self, tokens: int, columns: int) -> int:
        """Launches of one call, by the rows and the columns of outputs."""
        return 1 if tokens <= self.alone_to[0] and columns <= self.alone_to[1] else self.launches

    def at(self, constants: Mapping[str, int], tokens: int, features: int, rank: int) -> Mapping[str, int]:
        """What a launch makes of its constants, for so many tokens, in_features and a rank."""
        sizes = {"T": tokens, "I": features, "BR": block_rank(rank), "WHOLE": self.whole}
        known: dict[str, Any] = {**constants, **sizes, "min": min, "max": max}
        return {**constants, **{name: eval(text, {"__builtins__": {}}, known) for name, text in self.adapted.items()}}

    def parts_bytes(self, constants: Mapping[str, int], tokens: int, features: int, rank: int, size: int) -> int:
        """Bytes of parts of sums, of elements of so many bytes."""
        known = {**self.at(constants, tokens, features, rank), "T": tokens, "I": features, "R": rank, "BYTES": size}
        return int(eval(self.parts, {"__builtins__": {}}, known))

    def waves(self, rows: int, columns: int, processors: int, experts: int = 0) -> float:
        """The waves of tiles that a result takes on so many processors, over the part of a wave that would do.

        ``experts``: by which rows are sorted; no tile is of two. Of each the last one is half empty, on average.
        """
        if not self.persistent:
            return 1.0
        height, across = self.tiles["BM"], self.tiles["BN"] // self.tiles.get("PARTS", 1)
        down = rows / height + min(experts, rows) / 2 if experts else math.ceil(rows / height)
        count, filled = down * math.ceil(columns / across), rows / height / down if experts else 1.0
        return math.ceil(count / processors) * processors / (count * filled)

    def takes(self, dtype: str, rank: int, tokens: int, columns: int) -> bool:
        """Whether it takes a dtype, a rank, and outputs of so many rows and columns."""
        fits = self.largest_rank is None or rank <= self.largest_rank
        return dtype in self.dtypes and fits and self.takes_size(tokens, columns)

    def takes_size(self, tokens: int, columns: int) -> bool:
        """Whether it takes outputs of so many rows and columns."""
        few = self.most_tokens is None or tokens <= self.most_tokens
        return few and (self.most_columns is None or columns <= self.most_columns)


def block_rank(rank: int) -> int:
    """Columns that hold a row of the rank, as ``_block_rank`` of the emitted code has them."""
    return max(16, 1 << (rank - 1).bit_length())
