"""Modules of gated MLPs: every forward and backward in float64, and packages that have some prove them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from runlora_gen.algebra.enumerate import Program, enumerate_programs
from runlora_gen.cost.passes import Times
from runlora_gen.emit.package import build_package
from runlora_gen.measure import proof
from runlora_gen.measure.modules import one_choice, render_module
from runlora_gen.request.architecture import load_architecture
from runlora_gen.request.layout import FOLDER, LAYOUTS
from runlora_gen.request.mlps import Mlp
from runlora_gen.request.workload import Workload
from runlora_gen.search import grouped
from runlora_gen.search.candidates import goals, setting_of
from runlora_gen.search.choose import decide
from runlora_gen.search.criterion import Priced
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .packages import proves, types_are_right
from .test_costs_are_true import every_phase

PACKAGE, MODULE = "llama_9m_r4", "mlp_128x352_r4"
WORKLOAD = Workload(adapter_dtype="bf16", launch="graph", device="a100", tokens=(4096,))
IN, INNER, OUT = 16, 40, 24
#: What is between, by the names of activations.
BETWEEN = {
    "silu_gated": lambda gate, up: torch.nn.functional.silu(gate) * up,
    "gelu_gated": lambda gate, up: torch.nn.functional.gelu(gate) * up,
    "gelu_tanh_gated": lambda gate, up: torch.nn.functional.gelu(gate, approximate="tanh") * up,
}


def rendered(programs: Sequence[Program] | None, workload: Workload, folder: Path, activation: str) -> ModuleType:
    """A module with these programs, or with all; torch's products in place of kernels where torch could."""
    site = Mlp(IN, INNER, OUT, activation, False, 1, (("gate_proj", "up_proj", "down_proj"),))
    decision = decide(workload, setting_of(workload, site, 4, 4096))
    if programs is not None:
        decision = replace(decision, candidates=tuple(Priced(each, decision.chosen.cost) for each in programs))
    return render_module(one_choice(site, workload, decision), 4, workload, folder, all_variants=True)


def every_program(workload: Workload) -> tuple[Program, ...]:
    setting = setting_of(workload, Mlp(IN, INNER, OUT, "silu_gated", False, 1, ()), 4, 4096)
    return enumerate_programs(setting.derivation, goals(workload, setting.derivation), facts=setting.facts)


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict[str, Any]]:
    """Ranks and scalings of their own, a bias of some; of x more dimensions than two."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, trains: bool = True) -> Tensor:
        drawn = torch.randn(size, generator=generator, dtype=torch.float64) / size[-1] ** 0.5
        return drawn.to(dtype).requires_grad_(trains)

    shapes, ranks = ((INNER, IN), (INNER, IN), (OUT, INNER)), (4, 1, 6)
    return draw(2, 5, IN), {
        "weights": [draw(*shape, trains=False) for shape in shapes],
        "lora_As": [draw(rank, width) for (_, width), rank in zip(shapes, ranks, strict=True)],
        "lora_Bs": [draw(width, rank) for (width, _), rank in zip(shapes, ranks, strict=True)],
        "biases": [draw(1, INNER).detach()[0].requires_grad_(), None, draw(1, OUT).detach()[0].requires_grad_()],
        "scalings": [0.5, -2.0, 1.5],
    }


def plain(x: Tensor, given: dict[str, Any], activation: str = "silu_gated") -> Tensor:
    def linear(read: Tensor, at: int) -> Tensor:
        weight, lora_A, lora_B, bias, scaling = (given[name][at] for name in given)
        return torch.nn.functional.linear(read, weight, bias) + scaling * (read @ lora_A.t() @ lora_B.t())

    return linear(BETWEEN[activation](linear(x, 0), linear(x, 1)), 2)


def gradients(output: Tensor, x: Tensor, given: dict[str, Any]) -> tuple[Tensor, ...]:
    leaves = [x, *given["lora_As"], *given["lora_Bs"], *(bias for bias in given["biases"] if bias is not None)]
    return torch.autograd.grad(output.sin().sum(), leaves)


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """With programs that together hold every forward and every backward, of an adapter that is cast, too."""
    workload = replace(WORKLOAD, adapter_dtype=request.param)
    programs = list(every_phase(every_program(workload)))
    phases = {phase for program in programs for phase in (program.forward, program.backward)}
    assert phases == {phase for p in every_program(workload) for phase in (p.forward, p.backward)}
    assert len(phases) == 64 + 336
    return rendered(programs, workload, tmp_path_factory.mktemp("mlps") / request.param, "silu_gated")


def test_every_forward_and_backward_equals_plain_linears(module: ModuleType) -> None:
    """In float64, so that nothing is left to rounding; what kernels compute is torch's there."""
    x, given = operands()
    wanted = plain(x, given)
    expected = gradients(wanted, x, given)
    assert len(module.VARIANTS) >= 240
    for variant in module.VARIANTS:
        output = module.lora_mlp(x, **given, variant=variant)
        torch.testing.assert_close(output, wanted, msg=variant)
        torch.testing.assert_close(gradients(output, x, given), expected, msg=variant)
        with torch.no_grad():
            torch.testing.assert_close(module.lora_mlp(x, **given, variant=variant), wanted, msg=variant)


def test_a_checkpoint_that_computes_again_gives_the_same(module: ModuleType) -> None:
    """Of two dimensions and of three: it needs what is kept alone, and not the output."""
    x, given = operands()
    for read in (x, x.detach()[0].requires_grad_()):
        expected = gradients(plain(read, given), read, given)
        for variant in [*module.VARIANTS][::7]:

            def run(read: Tensor, variant: str = variant) -> Tensor:
                output: Tensor = module.lora_mlp(read, **given, variant=variant)
                return output

            again = checkpoint(run, read, use_reentrant=False)
            torch.testing.assert_close(gradients(again, read, given), expected, msg=variant)


def within_a_backward(run: Callable[[], None]) -> None:
    """Run it as a checkpoint computes again."""

    class Within(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, one: Tensor) -> Tensor:
            return one.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            with torch.enable_grad():
                run()
            return grad

    Within.apply(torch.ones(1, requires_grad=True)).backward()  # type: ignore[no-untyped-call]


def test_the_output_of_what_is_computed_again_can_be_used(module: ModuleType) -> None:
    """Within a backward, whoever asks: in two nodes the output is the same, and so are all gradients."""
    x, given = operands()
    wanted = plain(x, given)
    expected = gradients(wanted, x, given)
    found: list[tuple[Tensor, tuple[Tensor, ...]]] = []

    def run() -> None:
        for variant in [*module.VARIANTS][::7]:
            output = module.lora_mlp(x, **given, variant=variant)
            found.append((output.detach(), gradients(output, x, given)))

    within_a_backward(run)
    assert len(found) > 30
    for output, made in found:
        torch.testing.assert_close(output, wanted)
        torch.testing.assert_close(made, expected)


def test_what_was_computed_in_two_is_kept_as_it_was_in_one(module: ModuleType) -> None:
    """No tensor more, and none less."""
    x, given = operands()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    def run() -> None:
        for variant in [*module.VARIANTS][::7]:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                module.lora_mlp(x, **given, variant=variant)

    run()
    in_one = list(kept)
    kept.clear()
    within_a_backward(run)
    assert kept == in_one


@pytest.mark.parametrize("activation", BETWEEN)
def test_every_activation_equals_plain_linears(tmp_path: Path, activation: str) -> None:
    """Of all programs that torch runs alone."""
    module = rendered(None, replace(WORKLOAD, kernels=False), tmp_path / activation, activation)
    assert activation == module.ACTIVATION and len(module.VARIANTS) == 4
    x, given = operands()
    wanted = plain(x, given, activation)
    expected = gradients(wanted, x, given)
    for variant in module.VARIANTS:
        output = module.lora_mlp(x, **given, variant=variant)
        torch.testing.assert_close(output, wanted)
        torch.testing.assert_close(gradients(output, x, given), expected)


# Packages


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a package that has an MLP in each layout, at in_LAYOUT/."""
    place = tmp_path_factory.mktemp("packages_of_mlps")
    with pytest.MonkeyPatch.context() as patch:
        # Whatever its price is.
        patch.setattr(grouped, "_apart", lambda site, by_shape: Times(1.0, 1.0))
        patch.setattr(grouped, "_is_of", lambda group, mlp: False)
        for layout in LAYOUTS:
            out = place / f"in_{layout}"
            made = build_package(load_architecture("llama-9m"), 4, WORKLOAD, out=out, layout=layout)
            (out / made.folder).mkdir(parents=True)
            for file, text in made.files.items():
                (out / made.folder / file).write_text(text, encoding="utf-8")
            assert f"{MODULE}.py" in made.files
    yield place


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_package_proves_its_mlps(place: Path, layout: str) -> None:
    """The torch path and, in the interpreter, the kernels; its linears and groups as without any MLP."""
    # The kernels in one of the layouts: their text is the same, and the interpreter slow.
    which = "(mlps or plain_lora) and not kernels" if layout == FOLDER else "mlps"
    proves(place / f"in_{layout}" / PACKAGE, "test_equivalence.py", which, examples=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_their_types_are_right(place: Path, layout: str) -> None:
    types_are_right(place / f"in_{layout}" / PACKAGE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verify_proves_them(place: Path, layout: str) -> None:
    """Beside the linears and the groups of a folder."""
    names = ("linear_128x128_r4", MODULE)
    proof.load({name: place / f"in_{layout}" / PACKAGE / f"{name}.py" for name in names})
    checks = list(proof.checks(names, proof.TORCH, 1))
    titles = {check.title.rpartition(": ")[2] for check in checks if check.module == MODULE}
    assert {"mlps equal plain lora in float64", "mlps keep what is needed alone"} <= titles
    for check in checks:  # of both in one text
        if check.title.endswith(("equals plain lora in float64", "rounds no worse than plain lora")):
            assert "error" not in proof.outcome(check), check.title
    assert [check.title for check in proof.checks([MODULE], proof.KERNELS, 1)] == [
        "kernels of mlps round no worse than plain lora"
    ]
