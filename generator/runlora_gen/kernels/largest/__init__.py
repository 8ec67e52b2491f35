"""The largest magnitude of each row, of columns times their scales where there are some: what float8 scales by."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=1,
    call="{operands}",
    tiles={"BT": 16, "BI": 512, "WARPS": 4},
    dtypes=frozenset({"bf16", "fp16"}),
    helpers=frozenset({"float8"}),
    float8=True,
)
