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

@triton.jit
def shaped(source, out, M: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr):
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    at = source + rows[:, None] * N + columns[None, :]
    x = tl.load(at, mask=(rows < M - 1)[:, None] & (columns[None, :] >= 1), other=0.5)
    y = tl.trans(tl.reshape(x, (N, M))).to(WIDE) + columns.to(WIDE)
    z = tl.dot(y.to(x.dtype), tl.trans(x)) + tl.where(rows[:, None] > rows[None, :], rows, 7)
    total = tl.sum(z, axis=1) + tl.max(y, axis=1)
    tl.store(out + rows, tl.where(total != total, 0.0, total) * (2 ** 3) + tl.sum(rows) // M)

for M, N in ((16, 16), (16, 32), (32, 16)):
    for dtype in (torch.float16, torch.float32):
        for wide in (tl.float32, tl.float64):
            source = torch.arange(M * N).reshape(M, N).to(dtype) / (M * N)
            out = torch.zeros(M, dtype=torch.float32)
            shaped[(1,)](source, out, M, N, wide)
            print(M, N, dtype, wide, out.tolist())

@triton.jit
def refused(out, M: tl.constexpr, N: tl.constexpr):
    tl.store(out + tl.arange(0, 2), tl.sum(tl.zeros((M, 2), tl.float32) + tl.zeros((N, 2), tl.float32), axis=0))

for M, N in ((2, 2), (1, 2), (2, 4), (2, 2), (3, 3), (3, 1)):
    try:
        refused[(1,)](out, M, N)
        print("taken", M, N)
    except Exception as error:
        print(M, N, type(error).__name__, str(error.__cause__ or error).splitlines()[-1])

block = tl.block_type(tl.float32, [2, 4])
print(block, block.numel, block.shape, bool(block == tl.block_type(tl.float32, [tl.constexpr(2), 4])))
others = tl.block_type(tl.float32, [4, 2]), tl.block_type(tl.int32, [2, 4]), tl.float32
print(*(bool(block == other) for other in others))
print(tl.tensor(None, block), tl.tensor(None, tl.float32), tl.tensor(None, block).numel)
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
    lines = said[0].splitlines()
    assert said[0] == said[1] and lines[0] == "3 0 [24, 24]" and len(lines) == 18 + 12 + 6 + 3
    assert lines[30:32] == ["taken 2 2", "taken 1 2"] and "power of 2" in lines[34]
    assert lines[36].endswith("True") and lines[37] == "False False False"


#: How many programs ran of launches that are, or are not, as one before them.
AGAIN = """
import torch
import triton
import triton.language as tl
from runlora_gen.measure.interpreter import quicken
from triton.runtime import interpreter

ran = []
real = interpreter.interpreter_builder.set_grid_idx
interpreter.interpreter_builder.set_grid_idx = lambda *at: (ran.append(at), real(*at))[1]
quicken()

@triton.jit
def deeper(x):
    return x * 2

@triton.jit
def inner(x):
    return deeper(x) + 1

@triton.jit
def kernel(source, out, factor, wanted, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, inner(tl.load(source + at)) * factor, mask=at < wanted)

def programs(source, out, *rest, grid=(2,), N=4):
    ran.clear()
    kernel[grid](source, out, *rest, N=N)
    return len(ran)

def given(value=1.0, empty=-7.0):
    return torch.full((9,), value), torch.full((9,), empty)

first = given()
assert programs(*first, 3, 7) == 2 and first[1].tolist() == [9.0] * 7 + [-7.0] * 2
again = given()
assert programs(*again, 3, 7) == 0 and again[1].tolist() == first[1].tolist() and again[0].tolist() == [1.0] * 9
assert programs(*again, 3, 7) == 2, "what is written is other than before"
assert programs(*given(2.0), 3, 7) == 2 and programs(*given(empty=-8.0), 3, 7) == 2, "other numbers"
assert programs(*given(), 4, 7) == 2 and programs(*given(), 3, 6) == 2 and programs(*given(), 3.0, 7) == 2, "arguments"
assert programs(*given(), 3, 7, N=2) == 2 and programs(*given(), 3, 7, grid=(1,)) == 1, "constants, the grid"
source, out = given()
assert programs(source[1:], out[1:], 3, 7) == 2, "another place in the same memory"
shared = torch.full((18,), 1.0)
shared[9:] = -7.0
assert programs(shared[:9], shared[9:], 3, 7) == 2, "the same numbers in one memory"
source, out = given()
assert programs(source.double(), out, 3, 7) == 2, "dtypes"

@triton.jit
def second(first, source, out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.load(source + tl.arange(0, N)))

def of(number):
    memory = torch.zeros(8), torch.ones(8)
    second[(1,)](memory[0][:4], memory[number][:4], memory[1][4:], N=4)
    return memory[1][4:].tolist()

assert of(0) == [0.0] * 4 and of(1) == [1.0] * 4, "in which memory it is"
assert programs(*given(), 3, 7) == 0
real_deeper = deeper

@triton.jit
def deeper(x):
    return x * 5

out = given()[1]
assert programs(given()[0], out, 3, 7) == 2 and out.tolist()[0] == 18.0, "what is called by what is called"
deeper = real_deeper
assert programs(*given(), 3, 7) == 0
for bad in range(2):  # what failed is tried again
    try:
        kernel[(1,)](given()[0], None, 3, 7, N=4)
    except Exception:
        print("failed")
"""


def test_a_launch_that_it_has_seen_is_not_run_again(tmp_path: Path) -> None:
    pytest.importorskip("triton", minversion="3.4")
    (tmp_path / "script.py").write_text(AGAIN)
    command, environment = [sys.executable, str(tmp_path / "script.py")], {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "failed\n" * 2, done.stderr


#: What another version of Triton may be like, and how what is quickened is called.
OTHER = """
import os
import triton.language as tl
from runlora_gen.measure.interpreter import quicken
from triton.runtime import interpreter

real = tl.block_type.__init__
def with_more(self, *arguments):
    real(self, *arguments)
    self.layout = None

tl.core.block_type.__init__ = with_more
before = tl.tensor.__init__, interpreter._get_np_dtype
quicken()
assert (tl.tensor.__init__, interpreter._get_np_dtype) == before
assert not hasattr(interpreter._patch_lang, "_runlora_gen_quick") and tl.core.block_type.__init__ is with_more
"""


def test_other_internals_are_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("triton", minversion="3.4")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", OTHER], env=environment, check=True)
