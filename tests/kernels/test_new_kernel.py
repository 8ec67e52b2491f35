"""A new kernel is a folder and nothing else: one is put into a copy of the generator, and found, priced and run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runlora_gen
from runlora_gen.emit.render import template_digest
from runlora_gen.kernels.registry import KERNELS

PACKAGE = Path(runlora_gen.__file__).parent
TEMPLATES = PACKAGE.parents[1] / "templates"

#: P = s dY B, which none of ours computes alone.
FILES = {
    "__init__.py": '''
"""P = s dY B."""

from __future__ import annotations

from ..record import Kernel

KERNEL = Kernel(
    launches=1,
    call="{left0}, {right0}, {scaling0}",
    tiles={"BT": 64, "BO": 64, "WARPS": 4, "STAGES": 3},
    largest_rank=64,
    helpers=frozenset({"rank_wide"}),
    replaces=("TO,OR->TR scaled",),
)
''',
    "device.jinja": """
@triton.jit
def _dy_b_kernel(
    dy, b, out, scale, T, O, dy_stride, b_stride, out_stride,
    R: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
):
    row = tl.program_id(0) * BT
    acc = tl.zeros((BT, BR), tl.float32)
    for o in range(0, O, BO):
        dy_tile = _load_tile(dy, row, o, T, O, dy_stride, BT, BO, False)
        b_tile = _load_tile(b, o, 0, O, R, b_stride, BO, BR, False)
        acc = tl.dot(dy_tile, b_tile, acc, input_precision="tf32x3")
    _store_tile(out, acc * scale, row, 0, T, R, out_stride, BT, BR)
""",
    "launch.jinja": '''
def _dy_b(dY: Tensor, B: Tensor, scaling: float, *, tiles: str) -> Tensor:
    """P = scaling · dY @ B: the kernel where it serves, else torch."""
    P: Tensor | None
    if torch.compiler.is_compiling():
        P = _dy_b_operator(dY, B, scaling, tiles=tiles) if _dy_b_serves(dY, B) else None
    else:
        P = _launch_dy_b(dY, B, scaling, tiles)
    return _scaled_mm(dY, B, scaling) if P is None else P


def _dy_b_serves(dY: Tensor, B: Tensor) -> bool:
    return {{ kernel.takes("dY", "_kernels_serve(dY, B)", rank="B.shape[1]") }}


def _launch_dy_b(dY: Tensor, B: Tensor, scaling: float, tiles: str) -> Tensor | None:
    launch, (dy, b) = _planned(_plan_dy_b, (dY, B), tiles)
    if launch is None:
        return None
    P = _new_rank_wide(dy, dy.shape[0], b.shape[1])
    launch(dy, b, P, float(scaling))
    return P


def _plan_dy_b(dY: Tensor, B: Tensor, tiles: str) -> Any:
    if not _dy_b_serves(dY, B):
        return None
    if not _has_rows(dY, B):
        return _Prepared(_with_rows)
    (T, O), R = dY.shape, B.shape[1]
    constants = {{ kernel.constants }}
    BT = constants["BT"]
    return _Launch(
        _dy_b_kernel, (triton.cdiv(T, BT),),
        (T, O, dY.stride(0), B.stride(0), _rank_stride(dY, R)),
        dY.device,
        R=R, BT=BT, BO=constants["BO"], BR=_block_rank(R),
        num_warps=constants["WARPS"], num_stages=constants["STAGES"],
    )  # fmt: skip
''',
    "operator.jinja": """
_dy_b_operator = _operator(
    "dy_b(Tensor dY, Tensor B, float scaling, *, str tiles) -> Tensor",
    _dy_b,
    _launch_dy_b,
    lambda dY, B, scaling, *, tiles: _new_rank_wide(dY, dY.shape[0], B.shape[1]),
)
""",
}

#: In a process of its own: prices the kernel, makes a module with it, and compares its gradients with autograd's.
SCRIPT = """
import json
from pathlib import Path
import torch
from runlora_gen.algebra.linear import LINEAR
from runlora_gen.emit.code import line
from runlora_gen.emit.render import template_digest
from runlora_gen.cost.price import price_operation
from runlora_gen.kernels.registry import KERNELS
from runlora_gen.kernels.sites import OPERATIONS, alternatives
from runlora_gen.measure.modules import module_of_everything
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import setting_for

workload = Workload(device="a100", launch="graph", dtype="fp16", adapter_dtype="fp16")
kernel = next(operation for operation in alternatives(LINEAR, "cheaper") if operation.kernel == "dy_b")
setting = setting_for(workload, 1024, 1024, 8, False, 4096)
price, product = (price_operation(operation, setting) for operation in (kernel, kernel.parts[0]))
module = module_of_everything(workload, Path("made"))
variant = next(id for id in module.VARIANTS if id.endswith("/kernel-s-p-da"))
ran, launch = [], module._launch_dy_b
module._launch_dy_b = lambda *operands: ran.append(operands) or launch(*operands)
device = "cuda" if torch.cuda.is_available() else "cpu"
generator = torch.Generator().manual_seed(0)

def draw(*shape):
    return torch.randint(-2, 3, shape, generator=generator).to(device, torch.float16)

x, weight, dy = draw(40, 32), draw(24, 32), draw(40, 24)
A, B = draw(8, 32).requires_grad_(), draw(24, 8).requires_grad_()
ours = torch.autograd.grad(module.lora_linear(x, weight, A, B, scaling=0.5, variant=variant), (A, B), dy)
plain = torch.autograd.grad(x @ weight.t() + 0.5 * (x @ A.t() @ B.t()), (A, B), dy)
print(json.dumps({
    "kernels": list(KERNELS),
    "digest": template_digest(),
    "measurable": kernel in OPERATIONS,
    "line": line(kernel),
    "flops": [price.flops, product.flops],
    "launched": len(ran),
    "equal": [torch.allclose(a, b) for a, b in zip(ours, plain)],
}))
"""


def test_a_folder_is_all_that_a_kernel_of_one_product_takes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton", minversion="3.4")
    shutil.copytree(PACKAGE, tmp_path / "generator" / "runlora_gen", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(TEMPLATES, tmp_path / "templates")

    def run(script: str) -> dict[str, object]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "generator"), "PYTHONDONTWRITEBYTECODE": "1"}
        if not torch.cuda.is_available():
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    digest = "import json; from runlora_gen.emit.render import template_digest as t; print(json.dumps({'digest': t()}))"
    before = run(digest)
    folder = tmp_path / "generator" / "runlora_gen" / "kernels" / "dy_b"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text.lstrip(), encoding="utf-8")
    found = run(SCRIPT)
    assert found["kernels"] == sorted([*KERNELS, "dy_b"]) and found["measurable"]
    assert before["digest"] == template_digest() != found["digest"]
    assert found["line"] == 'P = _dy_b(dY, B, scaling, tiles="P")'
    assert found["flops"] == [2 * 4096 * 1024 * 8] * 2
    assert found["launched"] == 1 and found["equal"] == [True, True]
