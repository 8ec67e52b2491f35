"""The record of a kernel: what it needs, what it takes, and when it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

#: When a kernel takes the place of a product of torch's: where its price is lower, or where merged weights are to be
#: rounded stochastically.
When = Literal["cheaper", "stochastic"]


@dataclass(frozen=True)
class Kernel:
    """A fused Triton kernel: the record that its folder holds as ``KERNEL``.

    Beside it the folder holds ``device.jinja`` (the Triton source, whose entry is ``_NAME_kernel``), ``launch.jinja``
    (``_NAME``, which the emitted code calls, with its path through torch) and ``operator.jinja`` (the registration for
    torch.compile); the folder's name is the kernel's.

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
        helpers: what it uses of the helpers in ``support.jinja`` and ``tiles.jinja``, which kernels share, and ``F``
            for torch.nn.functional.
        replaces: formulas of the single products whose place it may take, in every site whose table has one. A kernel
            for several products replaces none: it is in a row of the table.
        when: it takes the place of these.
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
    replaces: tuple[str, ...] = ()
    when: When = "cheaper"
    priced_as: str | None = None
    seeded: bool = False

    def takes(self, dtype: str, rank: int) -> bool:
        """Whether it takes a dtype and a rank."""
        return dtype in self.dtypes and (self.largest_rank is None or rank <= self.largest_rank)
