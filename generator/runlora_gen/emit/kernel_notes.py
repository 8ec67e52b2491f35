"""What a file says of the fused kernels in it: their constants, where those come from, what the kernels take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..algebra.operations import Fused
from ..cost.measured import meter_of, tuned_constants
from ..cost.setting import DTYPES, Setting
from ..kernels.record import BEST_AT, Kernel
from ..kernels.registry import KERNELS
from .code import tiles_key

#: Compile-time constants of kernels: what is computed, and the constants by name.
Tiles = tuple[tuple[str, tuple[tuple[str, int], ...]], ...]


@dataclass(frozen=True)
class KernelCall:
    """A kernel's operation in a setting: what it computes, and for which sizes it is tuned.

    ``owner``: the module that it is of, where the modules share a table of constants, else empty.
    """

    operation: Fused
    setting: Setting
    owner: str = ""

    @property
    def key(self) -> str:
        """By which its constants go."""
        return tiles_key(self.operation, self.owner)

    @property
    def tiles(self) -> tuple[tuple[str, int], ...]:
        """Its constants on GPUs with tensor descriptors."""
        return tuple(kernel_constants(self.operation, self.setting).items())

    @property
    def small_tiles(self) -> tuple[tuple[str, int], ...]:
        """Those elsewhere; none if it has one set."""
        return tuple(KERNELS[self.operation.kernel].small_tiles.items())

    @property
    def tuned(self) -> bool:
        """Whether the device profile has measured constants for it."""
        return tuned_constants(self.operation, self.setting) is not None


@dataclass(frozen=True)
class KernelNode:
    """A kernel as its templates ask for it: what its record says, as code."""

    name: str

    @property
    def record(self) -> Kernel:
        """Its record."""
        return KERNELS[self.name]

    def suffix_beside(self, base: str) -> str:
        """What the names of its device functions end with, if it fills the seams of another kernel's source."""
        return "" if self.name == base else f"_{self.name}"

    @property
    def constants(self) -> str:
        """Where a plan finds its constants: by ``tiles``, and if there are two sets by whether descriptors serve."""
        return f"{'(_TILES if tma else _SMALL_TILES)' if self.record.small_tiles else '_TILES'}[tiles]"

    def adapted(self, constant: str) -> str:
        """What a plan makes of a constant; as it is, where its record says nothing of it."""
        return re.sub(r"\b[A-Z_]+\b", self._constant, self.record.adapted.get(constant, constant))

    def _constant(self, match: re.Match[str]) -> str:
        if match[0] == "WHOLE":
            return str(self.record.whole)
        return f'constants["{match[0]}"]' if match[0] in self.record.tiles else match[0]

    def takes(
        self, tensor: str, *others: str, rank: str | None = None, tokens: str | None = None, columns: str | None = None
    ) -> str:
        """The condition that a tensor, a rank, rows and columns, all expressions, are within its limits, and others.

        Raises:
            ValueError: it has a limit that this says nothing of.
        """
        return " and ".join([*self._limits(tensor, (rank, tokens, columns), "==", "<="), *others])

    def refuses(self, tensor: str, *others: str, rank: str | None = None) -> str:
        """The condition that they are not, or others; raises likewise."""
        return " or ".join([*self._limits(tensor, (rank, None, None), "!=", ">"), *others])

    def _limits(self, tensor: str, sizes: Sequence[str | None], equal: str, within: str) -> list[str]:
        taken, record = self.record.dtypes, self.record
        limits = {
            "a largest rank": record.largest_rank,
            "most tokens": record.most_tokens,
            "most columns": record.most_columns,
        }
        found = []
        if taken != DTYPES.keys():
            (size,) = {DTYPES[dtype].bytes for dtype in taken}
            if any(dtype.bytes == size and dtype.name not in taken for dtype in DTYPES.values()):
                raise ValueError(
                    f"{self.name} takes some dtypes of {size} bytes, and its launch asks for the size alone"
                )
            found.append(f"{tensor}.itemsize {equal} {size}")
        for (name, most), given in zip(limits.items(), sizes, strict=True):
            if most is not None:
                if given is None:
                    raise ValueError(f"{self.name} has {name}, of which its launch says nothing")
                found.append(f"{given} {within} {most}")
        return found


def kernel_constants(operation: Fused, setting: Setting) -> Mapping[str, int]:
    """The compile-time constants of a kernel in a setting: its own, and what the device profile has in their place."""
    return {**KERNELS[operation.kernel].tiles, **(tuned_constants(operation, setting) or {})}


def tiles_note(calls: Sequence[KernelCall]) -> str:
    """Where the constants come from; the settings differ in their features alone."""
    if not calls:
        return ""
    setting = calls[0].setting
    meters = dict.fromkeys(meter_of(c.operation, c.setting.dtype, c.setting.device).title for c in calls if c.tuned)
    untuned = [call.key for call in calls if not call.tuned]
    tuned = (
        f"Chosen by measurements on {listed(list(meters))}, at the sizes nearest to {setting.tokens} tokens in "
        f"{setting.dtype.name}."
    )
    general = f"The best ones over all {BEST_AT}."
    if not untuned:
        return tuned
    if len(untuned) == len(calls):
        return general
    return f"{tuned} Those of {listed(untuned)}: {general[0].lower()}{general[1:]}"


def kernels_note(kernels: Sequence[KernelNode]) -> str:
    """Where the kernels run, and how to switch them off."""
    wide = [f"_{kernel.name}" for kernel in kernels if "fp32" in kernel.record.dtypes]
    takes = "16-bit tensors"
    if wide:
        takes += " and float32" if len(wide) == len(kernels) else f", {listed(wide)} with float32 too"
    least = "8.0 or more, those of float8 8.9," if any(kernel.record.float8 for kernel in kernels) else "8.0 or more,"
    return (
        f"Fused kernels run where Triton is installed, on GPUs of compute capability {least} with {takes}. Set "
        "the environment variable RUNLORA_KERNELS=0 before the import to run everything through torch."
    )


def listed(names: Sequence[str]) -> str:
    """As people enumerate: ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
