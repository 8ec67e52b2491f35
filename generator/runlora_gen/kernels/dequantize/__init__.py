"""W of the codes of a quantized base, in one pass."""

from __future__ import annotations

from ..record import Bounds, Kernel

KERNEL = Kernel(
    launches=1,
    call="{codes0}",
    # 16 elements a thread: what it loads are 8 bytes side by side, and what it stores two times 16.
    tiles={"BLOCK": 2048, "WARPS": 4},
    bounds={"BLOCK": Bounds(32, 2**14)},
    helpers=frozenset({"codes"}),
    replaces=("OI->OI dequantize",),
)
