"""The same where the rows are those of tokens, which are gathered as they are read."""

from __future__ import annotations

from dataclasses import replace

from ..experts_p_db import KERNEL as P_DB

KERNEL = replace(
    P_DB,
    call="{gathered0}, {right0}, {right1}, {scaling0}, {dtypes}, routing",
    priced_as="experts_p_db",
    gathers=True,
)
