"""Modules of groups: every variant is proved as a package proves its own, and they compile without a break."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from runlora_gen.algebra.enumerate import Phase
from runlora_gen.cost.passes import Times
from runlora_gen.cost.vector import PhaseCost
from runlora_gen.emit.nodes import module_node
from runlora_gen.emit.package import build_package
from runlora_gen.measure.modules import one_choice, render_module
from runlora_gen.request.architecture import load_architecture
from runlora_gen.request.groups import Group, groups
from runlora_gen.request.layout import FOLDER, LAYOUTS, STANDALONE
from runlora_gen.request.workload import Workload
from runlora_gen.search import grouped
from runlora_gen.search.candidates import forwards_for, setting_of
from runlora_gen.search.choose import decide
from runlora_gen.search.ranges import Range, decide_model
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

from .packages import proves

PACKAGE = "llama_9m_r4"
QKV, GATE_UP = "qkv_128x128_r4", "gate_up_128x352_r4"
WORKLOAD = Workload(adapter_dtype="bf16", launch="graph", tokens=(65536,))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the path with a package that has groups in each layout, at in_LAYOUT/."""
    place = tmp_path_factory.mktemp("groups")
    with pytest.MonkeyPatch.context() as patch:
        # Whatever their price is.
        patch.setattr(grouped, "_apart", lambda group, by_shape: Times(1.0, 1.0))
        patch.setattr(grouped, "_mlps", lambda workload, architecture: ())
        for layout in LAYOUTS:
            out = place / f"in_{layout}"
            made = build_package(load_architecture("llama-9m"), 4, WORKLOAD, out=out, layout=layout)
            (out / made.folder).mkdir(parents=True)
            for file, text in made.files.items():
                (out / made.folder / file).write_text(text, encoding="utf-8")
    sys.path.insert(0, str(place))
    yield place
    sys.path.remove(str(place))
    for name in [name for name in sys.modules if name.startswith("in_")]:
        del sys.modules[name]


def load(layout: str, name: str) -> ModuleType:
    return importlib.import_module(f"in_{layout}.{PACKAGE}.{name}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_package_proves_its_groups(place: Path, layout: str) -> None:
    """The torch path and, in the interpreter, the kernels."""
    # The kernels in one of the layouts: their text is the same, and the interpreter slow.
    which = "groups and not kernels" if layout == FOLDER else "groups or own"
    proves(place / f"in_{layout}" / PACKAGE, "test_equivalence.py", which)


def operands(ranks: tuple[int, ...], widths: tuple[int, ...]) -> tuple[Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, trains: bool = True) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_(trains)

    x = draw(2, 7, 128)
    return x, {
        "weights": [draw(width, 128, trains=False) for width in widths],
        "lora_As": [draw(rank, 128) for rank in ranks],
        "lora_Bs": [draw(width, rank) for width, rank in zip(widths, ranks, strict=True)],
        "biases": [None, *(draw(width) for width in widths[1:])],
        "scalings": [0.5, -2.0, 1.5][: len(widths)],
    }


def plain(x: Tensor, given: dict[str, Any]) -> list[Tensor]:
    return [
        torch.nn.functional.linear(x, weight, bias) + scaling * (x @ lora_A.t() @ lora_B.t())
        for weight, lora_A, lora_B, bias, scaling in zip(*given.values(), strict=True)
    ]


def gradients(outputs: list[Tensor], x: Tensor, given: dict[str, Any]) -> tuple[Tensor, ...]:
    leaves = [x, *given["lora_As"], *given["lora_Bs"], *given["biases"][1:]]
    return torch.autograd.grad(sum(((i + 1) * y.sin()).sum() for i, y in enumerate(outputs)), leaves)


@pytest.mark.parametrize("group", groups(load_architecture("llama-9m")), ids=lambda group: group.kind)
def test_every_variant_equals_plain_linears(tmp_path: Path, group: Group) -> None:
    """Of ranks and widths of their own; in float64, so that nothing is left to rounding."""
    choice = one_choice(group, WORKLOAD, decide(WORKLOAD, setting_of(WORKLOAD, group, 4, 65536)))
    module = render_module(choice, 4, WORKLOAD, tmp_path / group.kind, all_variants=True)
    function, count = getattr(module, f"lora_{group.kind}"), len(group.linears)
    x, given = operands((4, 1, 6)[:count], (128, 24, 352)[:count])
    wanted = plain(x, given)
    expected = gradients(wanted, x, given)
    assert len(module.VARIANTS) == len(choice.ranges[0].decision.candidates) > 20
    for variant in module.VARIANTS:
        outputs = list(function(x, **given, variant=variant))
        torch.testing.assert_close(outputs, wanted)
        torch.testing.assert_close(gradients(outputs, x, given), expected)
        with torch.no_grad():
            torch.testing.assert_close(list(function(x, **given, variant=variant)), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_without_a_break(place: Path, layout: str) -> None:
    module = load(layout, QKV)
    x, given = operands((4, 4, 4), (128, 128, 128))

    def outputs(x: Tensor) -> list[Tensor]:
        return list(module.lora_qkv(x, **given))

    compiled: Any = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled(x), x, given), gradients(plain(x, given), x, given))


def mixed() -> tuple[Tensor, dict[str, Any]]:
    """Operands in float32, five of six factors in float64."""
    x, given = operands((4, 2, 4), (128, 24, 128))
    given |= {key: [t if t is None else t.detach().float() for t in given[key]] for key in ("weights", "biases")}
    given["lora_As"][1] = given["lora_As"][1].detach().float().requires_grad_()
    return x.detach().float(), given


class Ran(TorchDispatchMode):
    """Notes what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def test_adapters_are_cast_in_one_launch(place: Path) -> None:
    """As they are priced; those that have x's dtype already are read as they are."""
    module = load("standalone", QKV)
    x, given = mixed()
    with Ran() as ran:
        outputs = list(module.lora_qkv(x, **given))
    assert [len(args[0]) for func, args in ran.calls if func is torch.ops.aten._foreach_copy_.default] == [5]
    assert not [func for func, _ in ran.calls if func is torch.ops.aten._to_copy.default]
    assert {output.dtype for output in outputs} == {torch.float32}
    cast = given | {key: [factor.float() for factor in given[key]] for key in ("lora_As", "lora_Bs")}
    torch.testing.assert_close(outputs, plain(x, cast), rtol=1e-4, atol=1e-3)  # sums of 128 in float32


@pytest.mark.parametrize("group", groups(load_architecture("llama-9m")), ids=lambda group: group.kind)
def test_casts_of_adapters_are_priced_as_one_launch(group: Group) -> None:
    def forwards(workload: Workload) -> dict[str, PhaseCost]:
        candidates = decide(workload, setting_of(workload, group, 4, 65536)).candidates
        return {candidate.program.forward.name: candidate.cost.forward for candidate in candidates}

    narrow, wide = forwards(WORKLOAD), forwards(replace(WORKLOAD, adapter_dtype="fp32"))
    assert narrow.keys() == wide.keys()
    for name, cost in narrow.items():
        assert wide[name].launches == cost.launches + 1
        assert wide[name].bytes_moved > cost.bytes_moved
        assert wide[name].host_s > cost.host_s


def test_torch_compile_sees_one_cast_of_adapters(place: Path) -> None:
    module = load("standalone", QKV)
    x, given = mixed()
    graphs: list[str] = []

    def noted(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return make_boxed_func(graph.forward)

    def outputs(x: Tensor) -> list[Tensor]:
        return list(module.lora_qkv(x, **given))

    compiled: Any = torch.compile(outputs, fullgraph=True, backend=aot_autograd(fw_compiler=noted))
    torch.testing.assert_close(compiled(x), outputs(x))
    forward, *_ = graphs
    assert forward.count("aten._foreach_copy") == 1 and "_to_copy" not in forward


def test_an_input_changed_in_place_is_noticed(place: Path) -> None:
    """Before the backward: as autograd notices it of what it saves itself."""
    module = load("standalone", QKV)
    x, given = operands((4, 4, 4), (128, 128, 128))
    twice = x * 2
    outputs = module.lora_qkv(twice, **given)
    twice.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(list(outputs), x, given)


def test_functions_have_names_of_python() -> None:
    """Also those of forwards that no variant has, whose ways have several words."""
    group = groups(load_architecture("llama-13b"))[1]
    workload = Workload(tokens=(2048, 16384))
    (choice,) = decide_model(workload, (group,), 8)
    forwards = [replace(part.decision, chosen=phase) for part in choice.forwards[-1:] for phase in forwards_of(group)]
    for forward in forwards:
        node = module_node(replace(choice, forwards=(Range(forward, None),)), 8, workload, width=88)
        assert all(made.name.isidentifier() for made in node.forwards)


def forwards_of(group: Group) -> tuple[Phase, ...]:
    workload = Workload(tokens=(16384,))
    return forwards_for(workload, setting_of(workload, group, 8, 16384))


def test_the_manifest_names_them(place: Path) -> None:
    manifest = json.loads((place / "in_standalone" / PACKAGE / "manifest.json").read_text(encoding="utf-8"))
    found = {group["module"]: (group["linears"], group["out_features"], group["count"]) for group in manifest["groups"]}
    assert found == {
        QKV: (["q", "k", "v"], [128, 128, 128], 4),
        GATE_UP: (["gate", "up"], [352, 352], 4),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor itself
def test_inductor_writes_gradients_once(place: Path) -> None:
    """Gradients of gate and up, that each of two kernels reads, where it first meets these kernels."""
    pytest.importorskip("triton", minversion="3.4")
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    module = load(STANDALONE, GATE_UP)
    tokens, width = 96, 352
    x, gate, up = (
        torch.randn(size, dtype=torch.float16) for size in ((2, tokens // 2, 128), (width, 128), (width, 128))
    )
    As, Bs = (
        [torch.randn(size, dtype=torch.float16).requires_grad_() for _ in range(2)] for size in ((4, 128), (width, 4))
    )
    (variant,) = (name for name in module.VARIANTS if name.endswith("one_pass/keep-s"))

    def hidden(x: Tensor) -> Tensor:
        first, second = module.lora_gate_up(x, [gate, up], As, Bs, scalings=[1.0, 1.0], variant=variant)
        return torch.nn.functional.silu(first) * second

    compiled = torch.compile(hidden, fullgraph=True)
    x.requires_grad_()
    torch._dynamo.reset()
    with config.patch(fx_graph_cache=False):
        _, code = run_and_get_code(lambda: compiled(x).sum().backward())
    backward = code[-1]
    assert "fused_gemm_sum.default(" in backward and backward.count("p_db.default(") >= 2
    shapes = (f"({tokens}, {width})", f"(2, {tokens // 2}, {width})")
    assert sum(backward.count(f"empty_strided_cpu({shape}") for shape in shapes) <= 2
