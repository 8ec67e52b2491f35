"""The seams of the large product's source: each can be filled, and what fills one changes that place alone."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
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
CONTEXT = TEMPLATE.new_context({**OWN, "own": TEMPLATE.make_module(OWN).own})
SEAMS = {name: "".join(block(CONTEXT)) for name, block in TEMPLATE.blocks.items()}


def filled(blocks: str = "", kernel: str = "fused_gemm") -> str:
    """The source with seams filled, as a kernel's own template does it."""
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
    changed = filled(f"{{% block {seam} %}}\n{mark}{{% endblock %}}")
    assert changed.count(mark) == 1 and changed.replace(mark, SEAMS[seam]) == filled()


def test_what_no_seam_changes_stands_once() -> None:
    """Functions that a kernel has as the source has them are that one's; what differs keeps its name."""
    kernels = [KernelNode(name) for name in ("fused_gemm", "fused_gemm_sum", "fused_gemms")]
    sources = {kernel.name: render(f"kernels/{kernel.name}/device.jinja", {"kernel": kernel}) for kernel in kernels}
    shared = ["_tile_of", "_product_tile", "_write_tile", "_describe_right"]
    own = {
        name: re.search(rf"^def (_product_tile_{name})\(", sources[name], re.MULTILINE)[1]  # type: ignore[index]
        for name in ("fused_gemm_sum", "fused_gemms")
    }
    text = rendering.each_once("\n\n\n".join(source.strip() for source in sources.values()), kernels)
    defined = re.findall(r"^def (\w+)\(", text, re.MULTILINE)
    expected = [*shared, "_fused_gemm_kernel"]
    for name, product in own.items():
        expected += [product, f"_{name}_kernel"]
    assert defined == expected
    kernel = text.partition("def _fused_gemms_kernel(")[2]
    assert "_product_tile_fused_gemms(" in kernel and "_tile_of(" in kernel and "_tile_of_fused_gemms" not in text
    # A name is one function in all modules, also where the source itself is not there.
    for kernel in kernels[1:]:
        alone = rendering.each_once(sources[kernel.name], [kernel])
        rest = [name for name in shared if name != "_product_tile"]
        assert sorted(re.findall(r"^def (\w+)\(", alone, re.MULTILINE)) == sorted(
            [*rest, own[kernel.name], f"_{kernel.name}_kernel"]
        )
        for name in rest:
            assert re.search(rf"^def {name}\(.*?(?=\n\n\n)", alone, re.MULTILINE | re.DOTALL)[0] in text  # type: ignore[index]
    # A function of the source that a kernel has otherwise keeps its name too.
    changed = sources["fused_gemms"].replace("    first = band", "    first = 0 + band", 1)
    assert changed != sources["fused_gemms"]
    text = rendering.each_once(changed, kernels[2:])
    assert "def _tile_of_fused_gemms(" in text and "def _tile_of(" not in text


def test_the_source_says_which_seams_it_has() -> None:
    comment = (FOLDER / "fused_gemm" / "device.jinja").read_text().partition("#}")[0]
    named = re.findall(r"^    ((?:\w+, )*\w+)  ", comment, re.MULTILINE)
    assert sorted(name for names in named for name in names.split(", ")) == sorted(SEAMS)


def test_a_kernel_of_another_name_defines_nothing_twice() -> None:
    def defined(text: str) -> set[str]:
        return {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}

    other = filled("{% block epilogue %}\n    acc = acc * 2.0\n{% endblock %}", "doubled_gemm")
    assert defined(filled()).isdisjoint(defined(other)) and "_doubled_gemm_kernel" in defined(other)
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


#: X one more, W doubled, nothing below zero.
CHANGED = """
{% block load_left %}
{{ super() }}
            if step < k_steps:
                left_tile = left_tile + 1
{% endblock %}
{% block load_x %}
{{ super() }}
            x_tile = tl.where((k + tl.arange(0, BK) < K)[None, :], x_tile + 1, x_tile)
{% endblock %}
{% block load_right %}
{{ super() }}
            if step < k_steps:
                right_tile = right_tile * 2
{% endblock %}
{% block load_w %}
{{ super() }}
            w_tile = w_tile * 2
{% endblock %}
{% block epilogue %}
{{ super() }}
    acc = tl.maximum(acc, 0.0)
{% endblock %}
"""
#: W in codes, with a scale for each of its rows.
QUANTIZED = """
{% block tensors %}
    scales,
{% endblock %}
{% block factors %}
    scales,
{% endblock %}
{% block operands %}
{{ super() }}
            scales,
{% endblock %}
{% block part_operands %}
{{ super() }}
                scales,
{% endblock %}
{% block load_right %}
{{ super() }}
            if step < k_steps:
                row = n + tl.arange(0, BN)
                right_tile = right_tile * tl.load(scales + row, mask=row < N, other=0.0)[None, :]
{% endblock %}
{% block load_w %}
{{ super() }}
            row = n + tl.arange(0, BN)
            w_tile = w_tile * tl.load(scales + row, mask=row < N, other=0.0)[None, :]
{% endblock %}
"""
#: Two weights side by side, each of 256 rows: whole tiles are of one or of the other.
GROUP = """
{% block tensors %}
    other,
{% endblock %}
{% block tile %}
        chosen = w
        row = n
        if n >= 256:
            chosen = other
            row = n - 256
{% endblock %}
{% block factors %}
    row,
{% endblock %}
{% block operands %}
            x, chosen, s, b, m, n, M, N, K, x_stride, w_stride, s_stride, b_stride, row,
{% endblock %}
{% block part_operands %}
{{ super() }}
                n,
{% endblock %}
{% block load_w %}
            w_tile = _load_tile(w, row, k, 256, K, w_stride, BN, BK, False).T
{% endblock %}
"""


@pytest.fixture
def module(text: str, tmp_path: Path) -> Callable[..., Any]:
    """A module with seams filled, whose launches take more tensors."""
    pytest.importorskip("triton", minversion="3.4")
    number = itertools.count()

    def module(blocks: str, *more: torch.Tensor) -> ModuleType:
        changed = text
        for old, new in (
            (textwrap.indent(filled(), "    ").rstrip(), textwrap.indent(filled(blocks), "    ").rstrip()),
            ("    launch(x, w, s, b, y, w, b, y, bias)", "    launch(x, w, s, b, y, w, b, y, bias, *MORE)"),
        ):
            assert changed.count(old) == 1
            changed = changed.replace(old, new)
        made = imported(changed, tmp_path / f"{tmp_path.name}_{next(number)}.py")
        made.MORE = more  # type: ignore[attr-defined]
        return made

    return module


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Small whole numbers: every sum of products of two is exact in 16 bits."""
    values = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed))
    return values.to("cuda" if torch.cuda.is_available() else "cpu", torch.float16)


@pytest.mark.parametrize("features", [64, 63], ids=["descriptors", "pointers"])
def test_filled_seams_compute_what_they_say(module: Callable[..., Any], features: int) -> None:
    """Loads that change an operand, and an epilogue; a base in codes; and none of it where nothing is filled."""
    x, w, s, b, bias = draw(0, 40, features), draw(1, 48, features), draw(2, 40, 8), draw(3, 48, 8), draw(4, 48)
    low = s @ b.t() + bias

    def run(made: ModuleType) -> torch.Tensor:
        result: torch.Tensor = made._fused_gemm(x, w, s, b, bias, tiles="Y")
        return result

    assert torch.equal(run(module("")), x @ w.t() + low)
    assert torch.equal(run(module(CHANGED)), ((x + 1) @ (2 * w).t() + low).clamp(min=0))
    scales = draw(5, 48)
    assert torch.equal(run(module(QUANTIZED, scales)), x @ (scales[:, None] * w).t() + low)


def test_a_tile_chooses_its_operands(module: Callable[..., Any]) -> None:
    """As a group's does: the rows of two weights, which lie apart, are multiplied with one X in one launch."""
    x, w, other, s, b = draw(0, 40, 63), draw(1, 256, 63), draw(2, 256, 63), draw(3, 40, 8), draw(4, 512, 8)
    both = torch.cat([w, torch.full_like(other, float("nan"))])  # the launch takes the sizes from it
    made = module(GROUP, other)
    assert torch.equal(made._fused_gemm(x, both, s, b, None, tiles="Y"), x @ torch.cat([w, other]).t() + s @ b.t())
