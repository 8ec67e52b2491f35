"""The quickened interpreter computes what Triton's own does, also where integers overflow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Whether it is quickened is the first argument: in a process of its own, as what was replaced stays so.
SCRIPT = """
import sys
import torch
import triton
import triton.language as tl
from runlora_gen.measure.interpreter import quicken
from triton.runtime import interpreter

if sys.argv[1] == "quick":
    quicken()
    once = interpreter._patch_lang
    quicken()
    assert interpreter._patch_lang is once and hasattr(once, "_runlora_gen_quick")

@triton.jit
def inner(x, y):
    return tl.sum(tl.zeros_like(x) + x * y - x, axis=0)

@triton.jit
def kernel(source, out, factor, N: tl.constexpr):
    x = tl.load(source + tl.arange(0, N))
    tl.store(out + tl.program_id(0), inner(x, x) + inner(x, x + factor))

for number in (3, 2**15, 2**16, -(2**16), 2**31 - 1, -(2**31)):
    source = torch.tensor([number, 1, -2, 0], dtype=torch.int32)
    for factor in (0, 1, -5):
        out = torch.zeros(2, dtype=torch.int32)
        before = tl.load
        kernel[(2,)](source, out, factor, N=4)
        print(number, factor, out.tolist())
        assert tl.load is before
"""


def test_it_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("triton", minversion="3.4")
    (tmp_path / "script.py").write_text(SCRIPT)
    said = []
    for how in ("slow", "quick"):
        command = [sys.executable, str(tmp_path / "script.py"), how]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        said.append(done.stdout)
    assert said[0] == said[1] and said[0].startswith("3 0 [24, 24]\n") and said[0].count("\n") == 18
