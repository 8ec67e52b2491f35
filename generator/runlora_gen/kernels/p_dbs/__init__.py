"""P = s dY B and dB = dYᵀ S of several linears, all in one launch."""

from __future__ import annotations

from ..p_db import APART
from ..record import Kernel

KERNEL = Kernel(
    launches=1,
    call="{*left0}, {*right0}, {*right1}, {*scaling0}, ({dtypes})",
    tiles={**APART, "WARPS": 4, "STAGES": 3},
    adapted={
        "ROWS": "ROWS if T <= 1024 else 2 * ROWS",
        "DEEP": "DEEP if T <= 1024 else 2 * DEEP",
        "COLUMNS": "COLUMNS if T <= 1024 else COLUMNS // 2",
    },
    dtypes=frozenset({"bf16", "fp16"}),
    largest_rank=32,
    # dY is read twice, by programs of two kinds. With more rows it no longer stays in the L2 cache; more columns are
    # too long for the few programs that sum over them.
    most_tokens=2048,
    most_columns=8192,
    helpers=frozenset({"apart", "fitting", "one_of", "rank_wide", "several"}),
    priced_as="p_db",
)
