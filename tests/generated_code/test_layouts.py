"""Modules in both layouts: the same names, the same bits; in the folder one base class and one set of operators."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ..quickened import quickened

STANDALONE, FOLDER = LAYOUTS = ("standalone", "folder")
#: Three shapes; at so many tokens there are kernels.
SPEC = ("--arch", "llama-9m", "--rank", "4", "--adapter-dtype", "bf16", "--launch", "graph", "--tokens", "65536")
PACKAGE = "llama_9m_r4"
SHAPES = ("128x128", "128x352", "352x128")
every_shape = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture(scope="module")
def place(run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the path, with the package in each layout at my_STANDALONE/lora/ and my_FOLDER/lora/."""
    pytest.importorskip("triton", minversion="3.4")
    place = tmp_path_factory.mktemp("layouts")
    for layout in LAYOUTS:
        run(*SPEC, "--layout", layout, "-o", place / f"my_{layout}" / "lora").ok()
    sys.path.insert(0, str(place))
    yield place
    sys.path.remove(str(place))
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def packages(place: Path) -> dict[str, Any]:
    """The packages, vendored into others."""
    return {layout: importlib.import_module(f"my_{layout}.lora.{PACKAGE}") for layout in LAYOUTS}


def module_of(package: Any, shape: str) -> ModuleType:
    return importlib.import_module(f"{package.__name__}.linear_{shape}_r4")


@every_shape
def test_public_names_and_signatures_are_the_same(packages: dict[str, Any], shape: str) -> None:
    alone, inside = (module_of(package, shape) for package in packages.values())
    assert alone.__all__ == inside.__all__
    for name in alone.__all__:
        first, second = getattr(alone, name), getattr(inside, name)
        if name == "VARIANTS":
            assert list(first) == list(second) and [f.__doc__ for f in first.values()] == [
                f.__doc__ for f in second.values()
            ]
        elif name in ("LoRALinear", "lora_linear"):
            assert inspect.signature(first) == inspect.signature(second)
            assert first.__module__ == alone.__name__ and second.__module__ == inside.__name__
        else:
            assert first == second
    for name in (name for name in vars(alone.LoRALinear) if not name.startswith("_")):
        first, second = getattr(alone.LoRALinear, name), getattr(inside.LoRALinear, name)
        assert not callable(first) or inspect.signature(first) == inspect.signature(second)


def run(module: Any, shape: str, variant: str | None, dtype: torch.dtype, tokens: int) -> dict[str, Tensor]:
    """Output and gradients on random operands that depend on the shape alone."""
    in_features, out_features = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, trains: bool = True) -> Tensor:
        return (torch.randn(size, generator=generator) / 8).to(dtype).requires_grad_(trains)

    x, weight = draw(tokens, in_features), draw(out_features, in_features, trains=False)
    lora_A, lora_B, bias = draw(4, in_features), draw(out_features, 4), draw(out_features)
    output = module.lora_linear(x, weight, lora_A, lora_B, bias, scaling=0.5, variant=variant)
    wanted = (x, lora_A, lora_B, bias)
    gradients = torch.autograd.grad(output, wanted, draw(tokens, out_features, trains=False))
    with torch.no_grad():
        decoded = module.lora_linear(x[:2], weight, lora_A, lora_B, bias, scaling=0.5)
    return {"output": output.detach(), "decoded": decoded, **dict(zip(module.TRAINS, gradients, strict=True))}


@every_shape
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_outputs_and_gradients_are_the_same_bits(
    packages: dict[str, Any], shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16-bit floats go through the kernels, float16 in Triton's interpreter too."""
    alone, inside = (module_of(package, shape) for package in packages.values())
    kernels = importlib.import_module(f"{packages[FOLDER].__name__}.kernels")
    launched: list[str] = []
    planned = kernels._planned

    def note(plan: Any, *rest: Any) -> Any:
        found = planned(plan, *rest)
        launched.extend([plan.__name__] if found[0] is not None else [])
        return found

    monkeypatch.setattr(kernels, "_planned", note)
    for variant in (None, *alone.VARIANTS):
        for tokens in (33, 200):
            first, second = (run(module, shape, variant, dtype, tokens) for module in (alone, inside))
            assert all(torch.equal(value, second[name]) for name, value in first.items()), variant
    if dtype == torch.float16:
        assert "_plan_fused_gemm" in launched
    if dtype == torch.float64:
        assert not launched


@every_shape
def test_kernels_have_the_constants_of_their_module(packages: dict[str, Any], shape: str) -> None:
    alone = module_of(packages[STANDALONE], shape)
    kernels = importlib.import_module(f"{packages[FOLDER].__name__}.kernels")
    for table in ("_TILES", "_SMALL_TILES"):
        found = {key: value for key, value in getattr(kernels, table).items() if key.startswith(f"{shape} ")}
        assert found == {f"{shape} {key}": value for key, value in getattr(alone, table).items()}
    text = Path(str(module_of(packages[FOLDER], shape).__file__)).read_text(encoding="utf-8")
    assert set(re.findall(r'tiles="(.*?)"', text)) == {key for key in kernels._TILES if key.startswith(f"{shape} ")}


def test_a_layer_of_any_module_is_the_folder_s_lora_linear(packages: dict[str, Any]) -> None:
    package = packages[FOLDER]
    layers = [module_of(package, shape).LoRALinear() for shape in SHAPES]
    layers += [module_of(package, shape).LoRALinear.from_linear(nn.Linear(5, 3), r=2) for shape in SHAPES]
    for layer in layers:
        assert isinstance(layer, package.LoRALinear) and package.adapters.is_lora_layer(layer)
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(again) is type(layer) and again.state_dict().keys() == layer.state_dict().keys()
    assert len({type(layer) for layer in layers}) == len(SHAPES)
    model = nn.Sequential(nn.Linear(128, 352), nn.Linear(352, 128), nn.LayerNorm(128))
    package.inject_lora(model)
    assert [isinstance(module, package.LoRALinear) for module in model] == [True, True, False]
    # Wrappers make classes of a layer's.
    wrapped: Any = type("Wrapped", (type("Wrapper", (), {}), type(layers[0])), {})
    assert isinstance(wrapped(), package.LoRALinear)


def test_the_base_class_alone_computes_nothing(packages: dict[str, Any]) -> None:
    base = packages[FOLDER].LoRALinear
    for make in (lambda: base(5, 3), lambda: base.from_linear(nn.Linear(5, 3))):
        with pytest.raises(TypeError, match="abstract class LoRALinear"):
            make()


def test_standalone_modules_share_no_class_and_have_a_tuple_of_them(packages: dict[str, Any]) -> None:
    package = packages[STANDALONE]
    assert not hasattr(package, "LoRALinear")
    for shape in SHAPES:
        module = module_of(package, shape)
        assert module.LoRALinear.__mro__[1] is nn.Module
        assert isinstance(module.LoRALinear(), tuple(package.shapes.LAYERS.values()))


def test_operators_are_registered_once_a_folder(packages: dict[str, Any], place: Path) -> None:
    package = packages[FOLDER]
    kernels = importlib.import_module(f"{package.__name__}.kernels")
    modules = [module_of(package, shape) for shape in SHAPES]
    assert not any(hasattr(module, "_LIBRARY") for module in modules)
    assert all(module._fused_gemm is kernels._fused_gemm for module in modules)
    assert len({module_of(packages[STANDALONE], shape)._LIBRARY.ns for shape in SHAPES}) == len(SHAPES)
    # The same folder under another name has operators of its own.
    shutil.copytree(place / f"my_{FOLDER}", place / "my_other")
    other = importlib.import_module(f"my_other.lora.{PACKAGE}.kernels")
    assert other._LIBRARY.ns != kernels._LIBRARY.ns


@every_shape
def test_it_compiles_whole(packages: dict[str, Any], shape: str) -> None:
    module = module_of(packages[FOLDER], shape)
    layer = module.LoRALinear()
    x = torch.randn(7, layer.in_features, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, expected in ((compiled(x), layer(x)),):
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, expected)))


#: One module with one program, with a kernel: the interpreter takes seconds for each more.
ONE_PROGRAM = ("--target-modules", "q_proj", "--train", "b", "--no-input-grad", "--layout", FOLDER)


def test_verify_proves_a_folder_and_a_file_of_it(run, tmp_path: Path) -> None:
    """With the other files of the folder, also where no manifest says what is what."""
    pytest.importorskip("triton", minversion="3.4")
    run(*SPEC, *ONE_PROGRAM, "-o", tmp_path).ok()
    folder = (tmp_path / PACKAGE).rename(tmp_path / "any name")
    (folder / "manifest.json").unlink()
    module = folder / "linear_128x128_r4.py"
    outcome = run("verify", folder, "--examples", "1", "--require-kernels").ok()
    assert outcome.out.startswith(f"{module}: proved, ") and outcome.out.count("\n") == 1
    path = folder / "kernels.py"
    text = path.read_text(encoding="utf-8")
    assert text.count("acc = tl.dot(left_tile, right_tile, acc)") == 1
    path.write_text(text.replace("tl.dot(left_tile, right_tile, acc)", "tl.dot(left_tile, right_tile)"))
    failed = run("verify", module, "--examples", "1", "-x")
    assert failed.code == 1 and "FAILED 1 of " in failed.out
    (folder / "base.py").unlink()
    assert "can't be imported: ModuleNotFoundError" in run("verify", module).error()


def test_the_emitted_test_passes(run, tmp_path: Path) -> None:
    """As a user runs it, in the folder: kernels in a process of their own, in Triton's interpreter without a GPU."""
    pytest.importorskip("triton", minversion="3.4")
    run(*SPEC, *ONE_PROGRAM[:2], "--layout", FOLDER, "-o", tmp_path).ok()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", PACKAGE]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=quickened({**environment, "RUNLORA_EXAMPLES": "1"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
