"""W of the codes of a quantized base, in one pass."""

from __future__ import annotations

from ..record import Bounds, Kernel

KERNEL = Kernel(
    launches=1,
    call="{codes0}",
    # 8 elements a thread: what it stores lies side by side. Of 512 to 8192 elements and 1 to 8 warps all that have
    # 8 to 32 a thread take the same time: that of their bytes.
    tiles={"BLOCK": 2048, "WARPS": 4},
    bounds={"BLOCK": Bounds(32, 2**14)},
    helpers=frozenset({"codes"}),
    replaces="OI->OI dequantize",
)
