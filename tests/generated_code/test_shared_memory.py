"""Kernels fit the shared memory of the GPUs that they are for, at every rank and dtype that they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runlora_gen.algebra.experts import (
    ACTIVATED,
    ACTIVATED_DROPPED,
    COMBINED,
    COMBINED_DROPPED,
    GATHERED,
    GATHERED_DROPPED,
)
from runlora_gen.algebra.group import group
from runlora_gen.algebra.linear import DROPPED, LINEAR
from runlora_gen.algebra.mlp import MLP, mlp
from runlora_gen.algebra.operations import Fused
from runlora_gen.kernels.sites import operations_of

from .test_kernels_of_groups import LINEARS, alone

pytest.importorskip("triton", minversion="3.4")

ROOT = Path(__file__).parents[2]
#: Bytes that a block may have: of GPUs with tensor descriptors, and of the smallest others (sm_86, sm_89).
ROOM = {90: 227 * 1024, 86: 99 * 1024}
#: The kernel of which it was too much; all of them take a minute each.
CASES = [(90, "float32", "dx_das")]
#: Of what the interpreter does not refuse: names that change their type.
CASES += [(90, "bfloat16", f"experts_{name}_dropped") for name in ("x_at", "pt_x", "activate_backward")]
#: What loads two matrices a stage, of as many rows as there are columns of the other.
CASES += [(86, "bfloat16", "p_dbs")]
#: What holds more sums than others, on the GPUs that have the least.
CASES += [
    (86, dtype, f"mlp_activate_backward{drops}") for drops in ("", "_dropped") for dtype in ("bfloat16", "float32")
]
if os.environ.get("RUNLORA_LONG"):
    CASES += [(architecture, dtype, "") for architecture in ROOM for dtype in ("float32", "bfloat16")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sites = (LINEAR, group(LINEARS), DROPPED, group(LINEARS, dropout=True), GATHERED, COMBINED, ACTIVATED)
    sites = (MLP, mlp(dropout=True), *sites, GATHERED_DROPPED, COMBINED_DROPPED, ACTIVATED_DROPPED)
    found = {site: [op for op in operations_of(site) if isinstance(op, Fused)] for site in sites}
    place = tmp_path_factory.mktemp("shared_memory")
    alone(place, found, dropout=True)
    return place


@pytest.mark.parametrize(("architecture", "dtype", "kernel"), CASES)
def test_it_is_enough(folder: Path, architecture: int, dtype: str, kernel: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        f"{__package__}.shared_memory",
        str(folder),
        str(architecture),
        dtype,
        *filter(None, [kernel]),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert len(rows) >= (2 if kernel else 15)
    assert [row for row in rows if row[2] > ROOM[architecture]] == []
