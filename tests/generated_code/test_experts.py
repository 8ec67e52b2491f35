"""Modules of experts: every text of a variant is proved as a package proves its own, in both layouts, and kernels."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from runlora_gen.algebra.operations import Fused
from runlora_gen.emit.package import build_package
from runlora_gen.kernels.registry import KERNELS
from runlora_gen.kernels.sites import operations_of
from runlora_gen.measure import proof
from runlora_gen.measure.modules import of_everything, one_choice, render_module
from runlora_gen.request.architecture import Architecture, Projection
from runlora_gen.request.experts import Experts, Stack
from runlora_gen.request.layout import FOLDER, LAYOUTS
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import setting_of
from runlora_gen.search.choose import decide
from runlora_gen.search.ranges import decide_model

from .packages import proves, types_are_right

PACKAGE = "mixed_r8"
STACKS = (
    Stack("gate_up_proj", 8, 64, 96, True, 2, False, 2, module="mlp.experts"),
    Stack("down_proj", 8, 48, 64, False, 2, True, 2, layout="in_out", module="mlp.experts"),
    # A chain, in other layers.
    Stack("gate_up_proj", 4, 48, 64, True, 2, True, 1, module="other.experts", activation="silu_gated"),
    Stack("down_proj", 4, 32, 48, False, 2, False, 1, "in_out", module="other.experts", activation="silu_gated"),
)
#: The modules of experts: by themselves, and chained.
APART = ("gathered_experts_8x64x96_r8", "combined_experts_8x48x64_r8")
CHAINED = ("first_experts_4x48x64_r8", "last_experts_4x32x48_r8")
ARCHITECTURE = Architecture(
    "mixed", "mixtral", "catalogue", (Projection("q_proj", 64, 64, False, 2, "x"),), stacks=STACKS
)
WORKLOAD = Workload(adapter_dtype="bf16", launch="graph", tokens=(4096,))
SITES = {
    "gathers": Experts(8, 64, 96, True, 2, False, 2, ("gate_up_proj",)),
    "combines": Experts(8, 96, 64, False, 2, False, 2, ("down_proj",)),
    "hands over": Experts(8, 64, 96, True, 2, False, 2, ("gate_up_proj",), activation="silu_gated"),
    "activates": Experts(8, 48, 64, False, 2, False, 2, ("down_proj",), activation="silu_gated"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package that has experts in each layout, at in_LAYOUT/."""
    place = tmp_path_factory.mktemp("experts")
    for layout in LAYOUTS:
        out = place / f"in_{layout}"
        made = build_package(ARCHITECTURE, 8, WORKLOAD, out=out, layout=layout)
        (out / made.folder).mkdir(parents=True)
        for file, text in made.files.items():
            (out / made.folder / file).write_text(text, encoding="utf-8")
    return place


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_package_proves_its_experts(place: Path, layout: str) -> None:
    """The torch path and, in the interpreter, the kernels."""
    # The kernels in one of the layouts: their text is the same, and the interpreter slow.
    which = "not kernels" if layout == FOLDER else "not kernels or own"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    examples = 2 if layout == FOLDER else 1
    proves(place / f"in_{layout}" / PACKAGE, "test_experts.py", which, environment, examples=examples)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_their_types_are_right(place: Path, layout: str) -> None:
    """As those of the sample, which has no experts."""
    types_are_right(place / f"in_{layout}" / PACKAGE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verify_proves_them(place: Path, layout: str) -> None:
    """All of a folder, those of linears as well."""
    folder = place / f"in_{layout}" / PACKAGE
    names = ("linear_64x64_r8", *APART, *CHAINED)
    proof.load({name: folder / f"{name}.py" for name in names})
    checks = list(proof.checks(names, proof.TORCH, 1))
    for name in names:
        titles = {check.title.rpartition(": ")[2] for check in checks if check.module == name}
        assert "equals plain lora in float64" in titles
        assert ("rows are sorted by expert" in titles) == ("experts" in name)
        assert ("a chain equals plain loras in float64" in titles) == (name == CHAINED[1])
    assert [check.title for check in proof.checks(names[1:2], proof.KERNELS, 1)] == [
        "kernels round no worse than plain lora",
        "kernels give wide gradients from wide sums",
        "kernels give tokens of no expert no number",
        "kernels leave to torch what a transform wraps",
    ]


def covering(variants: Mapping[str, Any]) -> list[str]:
    """Variants that together have every way to compute something; the first is the one that is selected."""

    def ways(name: str) -> set[object]:
        """Also what it calls: of several symbols ways may have one name."""
        called = {(at, each) for at, half in enumerate(halves(variants[name])) for each in half.__code__.co_names}
        return {(at, way) for at, part in enumerate(name.split("/")) for way in part.split("-")} | called

    return first_of({name: ways(name) for name in variants})


def each_text(variants: Mapping[str, Any]) -> list[str]:
    """Variants that together have the text of every forward and of every backward: what they keep is in both."""
    return first_of({name: set(enumerate(map(inspect.getsource, halves(of)))) for name, of in variants.items()})


def halves(variant: Any) -> tuple[Any, Any]:
    return variant.forward, variant.backward.__wrapped__


def first_of(held: Mapping[str, set[Any]]) -> list[str]:
    """Names that together hold all; the first is among them."""
    found = [next(iter(held))]
    missing = set[object]().union(*held.values()) - held[found[0]]
    while missing:
        found.append(max(held, key=lambda name: len(held[name] & missing)))
        missing -= held[found[-1]]
    return found


def proved(path: Path, part: str, examples: int, variants: Callable[[Mapping[str, Any]], Sequence[str]]) -> int:
    """How many properties hold; all must."""
    name = "of_" + "_".join(path.parts[-3:-1]).replace(
        " ", "_"
    )  # torch.compile takes what once had a name for what has it
    proof.load({name: path})
    module: Any = sys.modules[f"_runlora_gen_verified.{name}"]
    module.VARIANTS = {name: module.VARIANTS[name] for name in variants(module.VARIANTS)}
    checks = list(proof.checks([name], part, examples))
    for check in checks:
        outcome = proof.outcome(check)
        assert "error" not in outcome, (check.title, outcome["error"])
    return len(checks)


@pytest.mark.parametrize("adapter_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("site", SITES)
def test_every_text_is_proved(tmp_path: Path, site: str, adapter_dtype: str) -> None:
    """In plain torch; of an adapter that is cast, which multiplies them, variants that have all ways."""
    workload = replace(WORKLOAD, adapter_dtype=adapter_dtype, kernels=False)
    (choice,) = decide_model(workload, (SITES[site],), 8)
    render_module(choice, 8, workload, tmp_path / site, all_variants=True)
    (path,) = (path for path in (tmp_path / site).iterdir() if path.suffix == ".py")
    # What hands over has fewer programs.
    least = 30 if site == "hands over" else 80
    assert proved(path, proof.TORCH, 1, each_text if adapter_dtype == "bf16" else covering) > least


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """In plain torch, with a variant of all ways."""
    workload = replace(WORKLOAD, kernels=False)
    (choice,) = decide_model(workload, (SITES["gathers"],), 8)
    return render_module(choice, 8, workload, tmp_path_factory.mktemp("merging") / "made", all_variants=True)


def test_torch_multiplies_by_groups_what_does_not_stop_it(merging: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are columns in memory, as those of a transposed matrix, do: on the GPU, by an assertion."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with FakeTensorMode():

        def rows(*shape: int, dtype: torch.dtype = torch.bfloat16, apart: int = 1) -> torch.Tensor:
            strides = (shape[1] * apart, apart) if apart > 1 else torch.empty(shape, device="meta").stride()
            return torch.empty_strided(shape, strides, device="cuda", dtype=dtype)

        takes = merging._is_grouped
        assert takes(rows(64, 32), stack=rows(4, 32, 16)) and takes(rows(64, 32), rows(64, 16))
        assert takes(rows(64, 32), stack=rows(4, 16, 32).mT), "of a stack both ways"
        assert not takes(rows(32, 64).t(), stack=rows(4, 32, 16))
        assert not takes(rows(32, 64).t(), rows(64, 16)) and not takes(rows(64, 16), rows(32, 64).t())
        assert not takes(rows(64, 1, apart=8), rows(64, 16))
        assert not takes(rows(64, 33), rows(64, 16)) and not takes(rows(0, 32), rows(0, 16))
        assert not takes(rows(64, 32, dtype=torch.float32), rows(64, 16, dtype=torch.float32))


def test_a_factor_of_zero_hides_no_nan_of_a_stack(merging: Any) -> None:
    """As torch's product does on a GPU, and for large matrices on the CPU."""
    W, B, A = torch.ones(2, 8, 8), torch.ones(2, 8, 4), torch.full((2, 4, 8), math.nan)
    with mock.patch.object(torch, "baddbmm", lambda W, B, A, *, alpha: W if alpha == 0 else W + alpha * B @ A):
        assert merging._scaled_baddbmm(W, B, A, 0.0).isnan().all()
        assert torch.equal(merging._scaled_baddbmm(W, B, torch.ones(2, 4, 8), 0.5), W + 2)


@pytest.mark.parametrize("site", SITES)
def test_every_kernel_is_proved(tmp_path: Path, site: str) -> None:
    pytest.importorskip("triton", minversion="3.4")
    setting = setting_of(WORKLOAD, SITES[site], 8, 4096)
    choice = one_choice(SITES[site], WORKLOAD, of_everything(WORKLOAD, decide(WORKLOAD, setting)))
    module = render_module(choice, 8, WORKLOAD, tmp_path / site, all_variants=True)
    launched = {name for name in KERNELS if hasattr(module, f"_launch_{name}")}
    assert launched == {op.kernel for op in operations_of(setting.derivation) if isinstance(op, Fused)}
    (path,) = (path for path in (tmp_path / site).iterdir() if path.suffix == ".py")
    # One drawn case beside the fixed ones: more are the catalogue of mutants', and the interpreter slow.
    assert proved(path, proof.KERNELS, 1, covering) == 4


@pytest.mark.skipif(not os.environ.get("RUNLORA_LONG"), reason="takes minutes: set RUNLORA_LONG=1")
@pytest.mark.parametrize("site", SITES)
def test_every_way_to_drop_is_proved(tmp_path: Path, site: str) -> None:
    """In plain torch, and by the kernels that draw."""
    pytest.importorskip("triton", minversion="3.4")
    workload = replace(WORKLOAD, dropout=0.1)
    setting = setting_of(workload, SITES[site], 8, 4096)
    choice = one_choice(SITES[site], workload, of_everything(workload, decide(workload, setting)))
    module = render_module(choice, 8, workload, tmp_path / site, all_variants=True)
    drawing = {op.kernel for op in setting.derivation.operations if isinstance(op, Fused) and KERNELS[op.kernel].drops}
    assert drawing and drawing <= {name for name in KERNELS if hasattr(module, f"_launch_{name}")}
    (path,) = (path for path in (tmp_path / site).iterdir() if path.suffix == ".py")
    assert proved(path, proof.TORCH, 1, covering) > 30
    assert proved(path, proof.KERNELS, 3, covering) == 4


#: Each module by its kernels under torch.compile, which sees their operators, against eager calls.
_COMPILED = """
import sys
from pathlib import Path

import torch
from runlora_gen.measure.modules import import_file

E, T, K, H, R = 8, 20, 2, 64, 8
module = import_file(Path(sys.argv[1]), "compiled_experts")
gathers, activates = module.GATHERS, hasattr(module, "ACTIVATION_WIDTHS")
I, O = (H, 96) if gathers else (96, H)
torch.manual_seed(0)
index = torch.rand(T, E).topk(K).indices
read = I * module.ACTIVATION_WIDTHS if activates else I
sizes = {"x": (T if gathers else T * K, read), "lora_A": (E, R, I), "lora_B": (E, O, R)}
if activates:
    sizes |= {"s": (T * K, R), "lora_BU": (E, read, R)}
trained = {name: (torch.randn(size) / 4).half().requires_grad_() for name, size in sizes.items()}
if not gathers:
    trained["weights"] = torch.rand(T, K).requires_grad_()
weight, bias = (torch.randn(E, O, I) / 8).half(), torch.randn(E, O).half()
hands_over = gathers and module.ACTIVATION is not None  # what it is handed to makes the gradient of its lora_B
launched = []
for name in [name for name in vars(module) if name.startswith("_launch_")]:
    real = getattr(module, name)
    setattr(module, name, lambda *args, real=real, name=name: (launched.append(name), real(*args))[1])


def experts(index, s=None, lora_BU=None, **given):
    routing = module.route(index, E)
    if activates:
        given = {**given, "handed": module.Handed(s, lora_BU, lora_BU.detach(), 0.5)}
    output = module.lora_experts(weight=weight, bias=bias, routing=routing, scaling=1.5, **given)
    return torch.cat((output[0], output[1].s), 1) if isinstance(output, tuple) else output


def run(function):
    output = function(index, **trained)
    leaves = [leaf for name, leaf in trained.items() if name != "lora_B" or not hands_over]
    return output, *torch.autograd.grad(output.float().square().sum(), leaves)


wanted = run(experts)
assert launched
launched.clear()
found = run(torch.compile(experts, backend="aot_eager", fullgraph=True))
assert launched
for ours, expected in zip(found, wanted, strict=True):
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected)
"""


@pytest.mark.parametrize("site", SITES)
def test_kernels_run_compiled(tmp_path: Path, site: str) -> None:
    """In the interpreter, in a process of its own."""
    pytest.importorskip("triton", minversion="3.4")
    (choice,) = decide_model(WORKLOAD, (SITES[site],), 8)
    render_module(choice, 8, WORKLOAD, tmp_path / site)
    (path,) = (path for path in (tmp_path / site).iterdir() if path.suffix == ".py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILED, str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
