"""Kernels before the first step: each compiled once for all modules that have it; ``warmup`` leaves a model as it is.

Triton compiles nothing where its interpreter runs, so what is said of compilations runs in processes of their own, with
a stand-in for a GPU's driver.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runlora_gen
import torch
from runlora_gen.into_model.packages import imported
from torch import nn

LAYOUTS = ("standalone", "folder")
SIZES = [(128, 128), (128, 352), (352, 128)]
#: Three shapes; at all token counts there are kernels.
SPEC = ("--arch", "llama-9m", "--rank", "4", "--adapter-dtype", "bf16", "--launch", "graph", "--device", "h100")
PACKAGE = "llama_9m_r4"

KEYS = """
import importlib, sys
import triton

def keys(package):
    modules = [module for name, module in sys.modules.items() if name.startswith(package + ".")]
    found = {}
    for module in modules:
        for name, kernel in vars(module).items():
            if isinstance(kernel, triton.JITFunction):
                found.setdefault(name, []).append(kernel.cache_key)
    return found

for package in sys.argv[1:]:
    importlib.import_module(package)
first, changed = map(keys, sys.argv[1:])
assert len(first["_p_db_kernel"]) == 5, first  # three linears and two groups
assert all(len(set(several)) == 1 for several in first.values()), first
assert len({several[0] for several in first.values()}) == len(first)
assert len(set(changed["_p_db_kernel"])) == 2 and len(set(changed["_store_tile"])) == 1, changed
assert set(first["_p_db_kernel"]) < set(changed["_p_db_kernel"])
"""

DRIVER = """
import collections, contextlib, importlib, sys, threading, time
import torch, triton
from torch import nn
from triton.backends.compiler import GPUTarget

compiled, launched, threads = [], collections.Counter(), set()

class Compiled:
    function = packed_metadata = None
    def __init__(self, name):
        self.name = name
    def launch_metadata(self, *_):
        return None
    def run(self, *_):
        launched[self.name] += 1
    def __getitem__(self, grid):
        return self.run

def compile(src, target=None, options=None, **_):
    compiled.append((src.hash(), str(sorted(options.items()))))
    threads.add(threading.get_ident())
    time.sleep(0.05)
    return Compiled(src.fn.__name__)

class Driver:
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

triton.compiler.compile = compile
triton.runtime.driver.set_active(Driver())
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.device = torch.random.fork_rng = lambda *_: contextlib.nullcontext()
torch.cuda.synchronize = lambda *_: None
package = importlib.import_module(sys.argv[1])
for name, module in list(sys.modules.items()):
    if name.startswith(sys.argv[1]):
        if hasattr(module, "_kernels_serve"):
            module._kernels_serve, module._multiprocessors = lambda *_: True, lambda _: 132
        if hasattr(module, "_is_whole_on_gpu"):
            module._is_whole_on_gpu = lambda _: True
model = nn.Sequential(*(nn.Linear(*size, bias=False, dtype=torch.bfloat16) for size in SIZES * 2))
package.inject_lora(model)
state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
random = torch.random.get_rng_state()
hook = triton.knobs.runtime.jit_cache_hook
report = package.warmup(model, 512, threads=2)
assert report.layers == 3 and 4 <= len(report.kernels) < 15 and not report.nothing, report
assert f"{len(report.kernels)} kernels for 3 kinds of layers in " in str(report)
ahead, rest = compiled[: len(report.kernels)], compiled[len(report.kernels) :]
assert len(set(ahead)) == len(ahead), "compiled twice"
assert set(rest) <= set(ahead), "compiled in the step itself"  # those of other modules, which are on disk
assert len(threads - {threading.get_ident()}) == 2
assert set(launched) == set(report.kernels)
assert triton.knobs.runtime.jit_cache_hook is hook
assert all(parameter.grad is None for parameter in model.parameters())
assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
assert torch.equal(torch.random.get_rng_state(), random)
before = len(compiled)
assert package.warmup(model, [512]).kernels == () and len(compiled) == before
model[0].requires_grad_(False)  # another kind of layer, which has no kernels of its own
assert package.warmup(model, 512).layers == 4
"""


@pytest.fixture(scope="module")
def place(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package in each layout, in a package named like it."""
    pytest.importorskip("triton", minversion="3.4")
    place = tmp_path_factory.mktemp("warmup")
    for layout in LAYOUTS:
        run(*SPEC, "--tokens", "65536", "--layout", layout, "-o", place / layout).ok()
    return place


def process(place: Path, code: str, *arguments: str) -> None:
    """Run code beside the packages, with Triton itself."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(place), "TRITON_CACHE_DIR": str(place / "cache")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_one_kernel_has_one_key_in_all_modules(place: Path) -> None:
    """Also where it stands at other lines; and another one where its source differs."""
    changed = place / "changed" / PACKAGE
    changed.mkdir(parents=True)
    for path in (place / "standalone" / PACKAGE).glob("*.*"):
        text = path.read_text(encoding="utf-8")
        if path.name == "linear_128x128_r4.py":
            head, kernel, tail = text.partition("def _p_db_kernel")
            assert kernel and "stop = min(start + span, O)" in tail
            text = head + kernel + tail.replace("stop = min(start + span, O)", "stop = min(start + span, O + 0)", 1)
        (changed / path.name).write_text(text, encoding="utf-8")
    process(place, KEYS, f"standalone.{PACKAGE}", f"changed.{PACKAGE}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_kernel_is_compiled_once_and_ahead(place: Path, layout: str) -> None:
    process(place, f"SIZES = {SIZES}\n{DRIVER}", f"{layout}.{PACKAGE}")


@pytest.fixture(scope="module")
def package(place: Path) -> Any:
    folder = place / "standalone" / PACKAGE
    return imported(folder)


def model_of(package: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(128, 352), nn.Linear(352, 128))
    package.inject_lora(model)
    return model


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_there_is_nothing_to_compile(package: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(package)
    for report in (package.warmup(model), runlora_gen.warmup(model, (512, 1024), threads=2)):
        assert report.kernels == () and str(report).startswith("nothing to compile: no layer lies on a GPU")
    assert capsys.readouterr().err == ""  # it is no terminal


def test_without_kernels_there_is_nothing_to_compile(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warming = sys.modules[f"{package.__name__}.warmup"]
    monkeypatch.setattr(warming, "_is_whole_on_gpu", lambda _: True)
    monkeypatch.setattr(warming, "KERNELS", False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "the modules run everything through torch" in str(package.warmup(model_of(package)))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "Triton's interpreter runs the kernels" in str(package.warmup(model_of(package)))


def test_a_terminal_is_told_in_one_line(
    package: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys.modules[f"{package.__name__}.warmup"], "KERNELS", False)
    package.warmup(model_of(package), progress=False)
    assert capsys.readouterr().err == ""
    package.warmup(model_of(package))
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("numbers", [{"tokens": 0}, {"tokens": ()}, {"tokens": [512, -1]}, {"threads": 0}])
def test_numbers_are_above_zero(package: Any, numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give whole numbers above 0"):
        package.warmup(model_of(package), **numbers)


def test_a_model_without_layers(package: Any) -> None:
    with pytest.raises(ValueError, match="model has no layers that run on llama_9m_r4"):
        package.warmup(nn.Linear(128, 128))
    with pytest.raises(ValueError, match="no generated layers in it"):
        runlora_gen.warmup(nn.Linear(128, 128))


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft (the test extra)")
def test_layers_of_peft(package: Any) -> None:
    """One of each kind, on detached tensors; none of a layer that would run PEFT's own code."""
    import peft

    model = nn.Sequential(nn.Linear(128, 352), nn.Linear(352, 128), nn.Linear(352, 128))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "1", "2"])
    wrapped = peft.get_peft_model(model, config)
    package.accelerate(wrapped)
    warming = sys.modules[f"{package.__name__}.warmup"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warming, "_is_whole_on_gpu", lambda _: True)
        cases = warming._cases(wrapped)
        assert [tuple(case.weight.shape) for case in cases] == [(352, 128), (128, 352)]
        (given,), (other,) = (case.operands for case in cases)
        assert [given.scaling, other.scaling] == [2.0, 2.0]
        base = model[0].base_layer
        weight, bias = warming.weight_of(given), warming.bias_of(given)
        assert weight.data_ptr() == base.weight.data_ptr() and bias.data_ptr() == base.bias.data_ptr()
        assert given.lora_A.is_leaf and given.lora_A.requires_grad and not weight.requires_grad
        base.register_forward_hook(lambda *_: None)
        assert len(warming._cases(wrapped)) == 1


def test_reports_add_up(package: Any) -> None:
    report = package.WarmupReport(2, ("a", "b", "a"), 1.5)
    assert str(report) == "3 kernels for 2 kinds of layers in 1.5 s (2 × a, 1 × b)"
    none = package.WarmupReport(0, (), 0.0, "why")
    assert report + none == none + report == report and (none + none).nothing == "why"
