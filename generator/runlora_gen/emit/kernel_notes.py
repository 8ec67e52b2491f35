"""What a file says of the fused kernels in it: their constants, where those come from, what the kernels take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..algebra.operations import Fused
from ..cost.measured import tuned_constants
from ..cost.setting import Setting
from ..kernels.registry import KERNELS
from .code import results_of

#: Compile-time constants of kernels: what is computed, and the constants by name.
Tiles = tuple[tuple[str, tuple[tuple[str, int], ...]], ...]


@dataclass(frozen=True)
class KernelCall:
    """A kernel's operation in a setting: what it computes, and for which sizes it is tuned."""

    operation: Fused
    setting: Setting

    @property
    def results(self) -> str:
        """By which its constants go."""
        return results_of(self.operation)

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


def kernel_constants(operation: Fused, setting: Setting) -> Mapping[str, int]:
    """The compile-time constants of a kernel in a setting: its own, and what the device profile has in their place."""
    return {**KERNELS[operation.kernel].tiles, **(tuned_constants(operation, setting) or {})}


def tiles_note(calls: Sequence[KernelCall]) -> str:
    """Where the constants come from; the settings differ in their features alone."""
    if not calls:
        return ""
    setting = calls[0].setting
    untuned = [call.results for call in calls if not call.tuned]
    tuned = (
        f"Chosen by measurements on {setting.device.meter.title}, at the sizes nearest to {setting.tokens} tokens in "
        f"{setting.dtype.name}."
    )
    general = "The best ones over all on an H200 in bf16, at 2048 to 16384 tokens and 5120 and 13824 features."
    if not untuned:
        return tuned
    if len(untuned) == len(calls):
        return general
    return f"{tuned} Those of {listed(untuned)}: {general[0].lower()}{general[1:]}"


def kernels_note(kernels: Sequence[str]) -> str:
    """Where the kernels run, and how to switch them off."""
    wide = [f"_{kernel}" for kernel in kernels if "fp32" in KERNELS[kernel].dtypes]
    takes = "16-bit tensors"
    if wide:
        takes += " and float32" if len(wide) == len(kernels) else f", {listed(wide)} with float32 too"
    return (
        f"Fused kernels run where Triton is installed, on GPUs of compute capability 8.0 or more, with {takes}. Set "
        "the environment variable RUNLORA_KERNELS=0 before the import to run everything through torch."
    )


def listed(names: Sequence[str]) -> str:
    """As people enumerate: ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
