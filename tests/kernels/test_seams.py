"""The seams of the large product's source: each can be filled, and what fills one changes that place alone."""

from __future__ import annotations

import ast
import importlib.util
import re
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
from runlora_gen.emit import render as rendering
from runlora_gen.emit.kernel_notes import KernelNode
from runlora_gen.emit.nodes import module_node
from runlora_gen.emit.render import Header, render
from runlora_gen.kernels.registry import FOLDER
from runlora_gen.request.layers import Layer
from runlora_gen.request.workload import Workload
from runlora_gen.search.ranges import decide_model

SOURCE = "kernels/fused_gemm/device.jinja"
OWN = {"kernel": KernelNode("fused_gemm")}
TEMPLATE = rendering._environment().get_template(SOURCE)
#: What a place holds if nothing fills it.
SEAMS = {name: "".join(block(TEMPLATE.new_context(OWN))) for name, block in TEMPLATE.blocks.items()}


def filled(kernel: str = "fused_gemm", **seams: str) -> str:
    """The source with seams filled, as a kernel's own template does it."""
    blocks = "".join(f"{{% block {name} %}}\n{text}{{% endblock %}}\n" for name, text in seams.items())
    template = rendering._environment().from_string(f'{{% extends "{SOURCE}" %}}\n{blocks}')
    return template.render(kernel=KernelNode(kernel))


@pytest.fixture(scope="module")
def text() -> str:
    """A module with the kernel."""
    workload = Workload(adapter_dtype="bf16", launch="graph", device="h200")
    (choice,) = decide_model(workload, (Layer(4096, 4096, False, 1, ("q_proj",)),), 8)
    node = module_node(choice, 8, workload, width=120)
    return render("linear.py.jinja", {"header": Header("", ""), "module": node})


def test_what_nothing_fills_is_what_is_emitted(text: str) -> None:
    assert textwrap.indent(filled(), "    ").rstrip() in text
    assert render(SOURCE, OWN) == filled()


@pytest.mark.parametrize("seam", SEAMS)
def test_a_filled_seam_changes_its_place_alone(seam: str) -> None:
    mark = "@@@"
    changed = filled(**{seam: mark})
    assert changed.count(mark) == 1 and changed.replace(mark, SEAMS[seam]) == filled()


def test_the_source_says_which_seams_it_has() -> None:
    comment = (FOLDER / "fused_gemm" / "device.jinja").read_text().partition("#}")[0]
    named = re.findall(r"^    ((?:\w+, )*\w+)  ", comment, re.MULTILINE)
    assert sorted(name for names in named for name in names.split(", ")) == sorted(SEAMS)


def test_a_kernel_of_another_name_defines_nothing_twice() -> None:
    def defined(text: str) -> set[str]:
        return {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}

    other = filled("scaled_gemm", epilogue="    acc = acc * 2.0\n")
    assert defined(filled()).isdisjoint(defined(other)) and "_scaled_gemm_kernel" in defined(other)
    called = {node.func.id for node in ast.walk(ast.parse(other)) if isinstance(node, ast.Call) and _is_own(node)}
    assert called <= defined(other) | {"_load_tile", "_store_tile"}


def _is_own(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id.startswith("_")


def imported(text: str, path: Path) -> ModuleType:
    """Triton reads the source of its kernels: the module must be a file."""
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#: X one more, W doubled, nothing below zero: small whole numbers, of which every sum is exact in 16 bits.
FILLS = {
    "load_left": "{{ super() }}\n            if step < k_steps:\n                left_tile = (left_tile + 1)\n",
    "load_x": "{{ super() }}\n            x_tile = tl.where((k + tl.arange(0, BK) < K)[None, :], x_tile + 1, x_tile)\n",
    "load_right": "{{ super() }}\n            if step < k_steps:\n                right_tile = right_tile * 2\n",
    "load_w": "{{ super() }}\n            w_tile = w_tile * 2\n",
    "epilogue": "{{ super() }}\n    acc = tl.maximum(acc, 0.0)\n",
}


@pytest.mark.parametrize("features", [64, 63], ids=["descriptors", "pointers"])
def test_filled_seams_compute_what_they_say(text: str, tmp_path: Path, features: int) -> None:
    """A load that changes each operand and an epilogue, through descriptors and through pointers."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton", minversion="3.4")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = textwrap.indent(filled(), "    ").rstrip()
    changed = text.replace(source, textwrap.indent(filled(**FILLS), "    ").rstrip())
    plain, ours = (
        imported(source, tmp_path / f"seams_{name}_{features}.py") for name, source in (("a", text), ("b", changed))
    )
    generator = torch.Generator().manual_seed(features)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(device, torch.float16)

    x, w, s, b, bias = draw(40, features), draw(48, features), draw(40, 8), draw(48, 8), draw(48)
    expected = x @ w.t() + s @ b.t() + bias
    assert torch.equal(plain._fused_gemm(x, w, s, b, bias, tiles="Y"), expected)
    expected = ((x + 1) @ (2 * w).t() + s @ b.t() + bias).clamp(min=0)
    assert torch.equal(ours._fused_gemm(x, w, s, b, bias, tiles="Y"), expected)
    assert expected.count_nonzero() not in (0, expected.numel())
