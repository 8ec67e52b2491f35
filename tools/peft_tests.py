"""Run PEFT's own tests of LoRA on layers that are accelerated by generated modules.

    python tools/peft_tests.py PATH_TO_PEFT_SOURCE --json tools/results/peft_tests.json
    python tools/peft_tests.py PATH_TO_PEFT_SOURCE --file tests/test_target_parameters.py --json experts.json

The path is PEFT's source with its tests, of the version that is installed (an unpacked ``pip download --no-binary :all:
--no-deps peft``). One of its files is run twice, unchanged: as it is, and with every LoRA layer accelerated as soon as
PEFT has put it in, by one generated module that serves all shapes and ranks (generated modules accept any); stacks of
experts by one for each of the two kinds, chained or apart. This file is the plugin of pytest that does that, too. The
result counts the tests that pass on generated modules, those that pass with accelerated layers that they save, merge or
switch and never call, and the others by their reason and by the case that they test.

Nothing is loaded from the Hub. Of three of its tiny models, which the tests of experts load, the Hub's cache holds
stand-ins: models of the same classes, as tiny, with random weights. Tests that load others fail both times.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

#: Where the plugin writes, and whether it switches our layers on.
_RECORD, _OURS = "RUNLORA_PEFT_TESTS_RECORD", "RUNLORA_PEFT_TESTS_OURS"
FILE = "tests/test_custom_models.py"
#: Stand-ins for the models of the Hub, as Transformers' config is called and what it is given.
STAND_INS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssConfig", {"num_local_experts": 4, "dtype": "bfloat16"}),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "intermediate_size_mlp": 32},
    ),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaConfig", {}),
}
_SIZES = {
    "vocab_size": 200,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: What PEFT's own code calls for a stack of experts, and ours does not: tests that count its calls can't pass on ours.
_PEFT_ALONE = "_LoraFactorsProxy"
Record = dict[str, Any]


# The plugin


class _AnyRank(int):
    """As a package's rank: equal to every other."""

    def __ne__(self, other: object) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


class _AnyShape(dict[tuple[Any, ...], Any]):
    """As a package's linears or stacks of experts: one for every shape, or of each kind, which counts its calls."""

    calls = 0

    def __contains__(self, shape: object) -> bool:
        return True

    def __getitem__(self, shape: tuple[Any, ...]) -> Any:
        self.calls += 1
        return self.get(shape)

    def get(self, shape: tuple[Any, ...], _: Any = None) -> Any:
        """What is there for a shape, which is no call of it."""
        # What stands behind the sizes of a stack is its kind.
        return next(module for own, module in self.items() if own[3:] == shape[3:])


class _Counted:
    """As what computes experts, which counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.calls, self._function = 0, function

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self._function(*args, **options)


class Plugin:
    """Selects the tests of LoRA, switches our layers on, and records what each test ran on."""

    def __init__(self, record: Path, ours: bool) -> None:
        self._record = record
        self._ours = ours
        self._found: dict[str, Record] = {}
        self._left: collections.Counter[str] = collections.Counter()
        self._accelerated = 0
        self._watches = False
        self._served: list[_AnyShape | _Counted] = []
        if ours:
            self._switch_on()

    def _switch_on(self) -> None:
        from peft.tuners import lora
        from runlora_gen.request.workload import Workload
        from transformers import Qwen3MoeConfig

        linears = _package("llama-9m", target_modules=["q_proj"], dropout=0.1)
        linears.with_peft.LINEARS = _AnyShape(linears.with_peft.LINEARS)
        linears.with_peft.RANK = _AnyRank()
        self._served = [linears.with_peft.LINEARS]
        packages = [linears]
        # Chained with the activation between them; and apart, for experts that have another one.
        for chained in (True, False):
            with mock.patch.object(Workload, "chains_experts", chained):
                experts = _package(Qwen3MoeConfig(), target_parameters=["gate_up_proj", "down_proj"])
            experts.experts.EXPERTS = _AnyShape(experts.experts.EXPERTS)
            experts.experts_with_peft.RANK = _AnyRank()
            # A package looks its modules up when it judges layers, too.
            experts.experts_with_peft.computed = _Counted(experts.experts_with_peft.computed)
            self._served.append(experts.experts_with_peft.computed)
            packages.append(experts)
        for package in packages:
            self._watch(package, stacks=package is not linears)
        tuners: Any = lora.LoraModel
        inject = tuners.inject_adapter

        def inject_adapter(tuner: Any, *args: Any, **options: Any) -> Any:
            made = inject(tuner, *args, **options)
            with warnings.catch_warnings():  # the tests count PEFT's
                warnings.simplefilter("ignore")
                for package in packages:
                    with contextlib.suppress(ValueError):  # there is no such LoRA layer
                        self._accelerated += len(package.accelerate(tuner.model).accelerated)
            return made

        tuners.inject_adapter = inject_adapter

    def _watch(self, package: Any, *, stacks: bool) -> None:
        """Show a package the layers of its kind alone, and keep why it leaves some."""
        with_peft, here = package.with_peft, package.peft_layers
        judge = with_peft._why_not

        def lora_layers(model: Any) -> dict[str, Any]:
            layers = here.lora_layers(model).items()
            return {
                name: layer for name, layer in layers if here.is_stack(layer) == stacks and _is_free(layer, package)
            }

        def why_not(layer: Any, **options: Any) -> Any:
            reason = judge(layer, **options)
            if reason is not None and options.get("training", True):
                self._left[reason] += 1
            return reason

        with_peft.lora_layers, with_peft._why_not = lora_layers, why_not

    def pytest_collection_finish(self) -> None:
        """PEFT's tests ask the Hub for a model once; for the stand-ins never."""
        sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES.update(dict.fromkeys(STAND_INS, 0))

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Keep the tests that make a LoRA layer: a parameter of theirs, or their own code, names its config."""
        chosen = [item for item in items if _tests_lora(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    def pytest_runtest_setup(self, item: Any) -> None:
        self._left.clear()
        self._accelerated = 0
        self._watches = _PEFT_ALONE in item.function.__code__.co_names
        for served in self._served:
            served.calls = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        record = self._found.setdefault(report.nodeid.partition("::")[2], {"outcome": "passed"})
        if report.outcome != "passed":
            record["outcome"] = report.outcome
            record["reason"] = _said(report)
        record["calls"] = sum(served.calls for served in self._served)
        record["accelerated"] = self._accelerated
        record["left"] = sorted(self._left)
        record["watches"] = self._watches

    def pytest_sessionfinish(self) -> None:
        self._record.write_text(json.dumps(self._found), encoding="utf-8")


def _is_free(layer: Any, package: Any) -> bool:
    """Whether no other package runs a layer."""
    kind = type(layer)
    return not hasattr(kind, "replaces") or kind.__module__.startswith(f"{package.__name__}.")


def _package(model: Any, **options: Any) -> Any:
    from runlora_gen import generate
    from runlora_gen.into_model.packages import imported

    with tempfile.TemporaryDirectory() as folder:
        (path,) = generate(model, rank=4, output=folder, dtype="fp32", device="cpu", kernels=False, **options)
        return imported(path)


def _tests_lora(item: Any) -> bool:
    callspec = getattr(item, "callspec", None)
    values = list(callspec.params.values()) if callspec is not None else []
    names = [getattr(value, "__name__", type(value).__name__) for value in values]
    if any(name.endswith("Config") for name in names):
        return "LoraConfig" in names
    return "LoraConfig" in item.function.__code__.co_names


def _said(report: Any) -> str:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash is not None else str(report.longrepr)).partition("\n")[0][:200]


def pytest_configure(config: Any) -> None:
    """Called by pytest, as whose plugin this file was named."""
    if _RECORD in os.environ:
        _stand_in("diffusers", "StableDiffusionPipeline")
        _stand_in("datasets", "load_dataset")
        plugin = Plugin(Path(os.environ[_RECORD]), os.environ.get(_OURS) == "1")
        config.pluginmanager.register(plugin, "runlora-peft-tests")


def _stand_in(module: str, name: str) -> None:
    """What PEFT's tests import by the way, for others of its files."""
    try:
        importlib.import_module(module)
    except ImportError:
        stand_in = types.ModuleType(module)
        setattr(stand_in, name, type(name, (), {}))
        sys.modules[module] = stand_in


# The tool


def fill_cache(folder: Path) -> None:
    """Put the stand-ins into a cache of the Hub's, where Transformers finds what it has loaded before."""
    import torch

    transformers: Any = importlib.import_module("transformers")
    for name, (config, options) in STAND_INS.items():
        cached = folder / f"models--{name.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40, encoding="utf-8")
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**_SIZES, **options))
        model.save_pretrained(cached / "snapshots" / ("0" * 40))


def run(source: Path, file: str, expression: str | None, cache: Path, *, ours: bool) -> dict[str, Record]:
    """What became of each test.

    Raises:
        SystemExit: pytest did not get as far as running them.
    """
    with tempfile.TemporaryDirectory() as folder, _as_package(source) as root:
        record = Path(folder, "record.json")
        given = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        paths = [str(Path(__file__).parent), *given]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        environment |= {_RECORD: str(record), _OURS: str(int(ours)), "TRITON_INTERPRET": "1"}
        environment |= {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", "-p", "peft_tests", "-q", "--no-header", "--tb=no", file]
        command += ["-p", "no:cacheprovider", "-p", "no:randomly", *(["-k", expression] if expression else [])]
        done = subprocess.run(command, cwd=root, env=environment, stdout=sys.stderr, check=False)
        if done.returncode not in (0, 1) or not record.exists():
            raise SystemExit(f"pytest ended with {done.returncode}, and ran no tests")
        found: dict[str, Record] = json.loads(record.read_text(encoding="utf-8"))
        return found


@contextlib.contextmanager
def _as_package(source: Path) -> Iterator[Path]:
    """The tests import each other as a package, which PEFT's source distribution has without its __init__.py."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(source / "tests", Path(folder, "tests"))
        Path(folder, "tests", "__init__.py").touch()
        yield Path(folder)


def summary(plain: dict[str, Record], ours: dict[str, Record]) -> Record:
    """Each test in one group: what passed and failed with our layers, and what had none of them, with the reason."""
    counts = collections.Counter(passed_on_ours=0, passed_without_a_call=0, broken=0, fails_without_ours=0, left_out=0)
    reasons: dict[str, dict[str, collections.Counter[str]]] = {}
    for test, record in ours.items():
        reason = record.get("reason", "")
        if record["outcome"] == "failed" and plain[test]["outcome"] == "failed":
            group = "fails_without_ours"
        elif record["outcome"] == "failed" and record["watches"]:
            group, reason = "left_out", f"it watches PEFT's {_PEFT_ALONE}, which ours does not call"
        elif record["outcome"] == "failed":
            group = "broken"
        elif record["outcome"] == "skipped":
            group, reason = "left_out", f"PEFT skips it: {reason}"
        elif record["calls"]:
            group = "passed_on_ours"
        elif record["accelerated"]:
            group = "passed_without_a_call"
        else:
            group, reason = "left_out", "; ".join(record["left"]) or "it makes no LoRA layer"
        counts[group] += 1
        if reason:
            reasons.setdefault(group, {}).setdefault(reason, collections.Counter())[_case(test)] += 1
    return {
        "tests": len(ours),
        **counts,
        "calls_of_ours": sum(record["calls"] for record in ours.values()),
        "reasons": reasons,
    }


def _case(test: str) -> str:
    """The adapter and model that a test is given, as PEFT's table of cases names them, else the test's name."""
    name, _, parameters = test.partition("[")
    case, config, _ = parameters.partition("-LoraConfig")
    if not config:
        return name
    return case if "/" in case else re.sub("^(True|False)-", "", case.rpartition("-")[0])  # one has the model alone


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("source", type=Path, help="PEFT's source, with its tests")
    parser.add_argument("--file", default=FILE, help=f"of its tests, in its source [{FILE}]")
    parser.add_argument("-k", dest="expression", help="as pytest takes it: some of the tests")
    parser.add_argument("--json", type=Path, help="where to write the result; by default it is printed")
    options = parser.parse_args()
    if not (options.source / options.file).exists():
        parser.error(f"{options.source} has no {options.file}")
    with tempfile.TemporaryDirectory() as cache:
        fill_cache(Path(cache))
        chosen = options.source, options.file, options.expression, Path(cache)
        found = summary(*(run(*chosen, ours=ours) for ours in (False, True)))
    versions = {name: importlib.metadata.version(name) for name in ("peft", "torch", "transformers")}
    result = {"date": datetime.date.today().isoformat(), "versions": versions, "file": options.file, **found}
    text = json.dumps(result, indent=2) + "\n"
    if options.json:
        options.json.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    for group, reasons in found["reasons"].items():
        for reason, cases in reasons.items():
            print(f"{group} {sum(cases.values())}: {reason} ({next(iter(cases))}, …)", file=sys.stderr)
    line = "{passed_on_ours} of {tests} passed on ours, {passed_without_a_call} with ours and no call, {broken} broken"
    print(line.format(**found), file=sys.stderr)
    sys.exit(1 if found["broken"] else 0)


if __name__ == "__main__":
    main()
