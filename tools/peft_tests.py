"""Run PEFT's own tests of LoRA on layers that are accelerated by generated modules.

    python tools/peft_tests.py PATH_TO_PEFT_SOURCE --json tools/results/peft_tests.json

The path is PEFT's source with its tests, of the version that is installed (an unpacked ``pip download --no-binary :all:
--no-deps peft``). Its ``tests/test_custom_models.py`` is run twice, unchanged: as it is, and with every LoRA layer
accelerated as soon as PEFT has put it in, by one generated module that serves all shapes and ranks (generated modules
accept any). This file is the plugin of pytest that does that, too. The result counts the tests that pass on generated
modules, those that pass with accelerated layers that they save, merge or switch and never call, and the others by their
reason and by the case that they test.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Where the plugin writes, and whether it switches our layers on.
_RECORD, _OURS = "RUNLORA_PEFT_TESTS_RECORD", "RUNLORA_PEFT_TESTS_OURS"
TESTS = "tests/test_custom_models.py"
Record = dict[str, Any]


# The plugin


class _AnyRank(int):
    """As a package's rank: equal to every other."""

    def __ne__(self, other: object) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


class _AnyShape(dict[tuple[int, int], Any]):
    """As a package's linears: one for every shape, which counts its calls."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self._linear = linear
        self.calls = 0

    def __contains__(self, shape: object) -> bool:
        return True

    def __getitem__(self, shape: tuple[int, int]) -> Any:
        self.calls += 1
        return self._linear


class Plugin:
    """Selects the tests of LoRA, switches our layers on, and records what each test ran on."""

    def __init__(self, record: Path, ours: bool) -> None:
        self._record = record
        self._ours = ours
        self._found: dict[str, Record] = {}
        self._left: collections.Counter[str] = collections.Counter()
        self._accelerated = 0
        self._linears: _AnyShape | None = None
        if ours:
            self._switch_on()

    def _switch_on(self) -> None:
        from peft.tuners import lora
        from runlora_gen import generate
        from runlora_gen.into_model.packages import imported

        folder = Path(tempfile.mkdtemp())
        options: dict[str, Any] = {"dtype": "fp32", "device": "cpu", "kernels": False, "dropout": 0.1}
        (path,) = generate("llama-9m", rank=4, output=folder, target_modules=["q_proj"], **options)
        with_peft = imported(path).with_peft
        (linear,) = with_peft.LINEARS.values()
        shutil.rmtree(folder)
        self._linears = with_peft.LINEARS = _AnyShape(linear)
        with_peft.RANK = _AnyRank()
        tuners: Any = lora.LoraModel
        judge, inject = with_peft._why_not, tuners.inject_adapter

        def why_not(layer: Any, **options: Any) -> Any:
            reason = judge(layer, **options)
            if reason is not None and options.get("training", True):
                self._left[reason] += 1
            return reason

        def inject_adapter(tuner: Any, *args: Any, **options: Any) -> Any:
            made = inject(tuner, *args, **options)
            with warnings.catch_warnings():  # the tests count PEFT's
                warnings.simplefilter("ignore")
                with contextlib.suppress(ValueError):  # there is no LoRA layer
                    self._accelerated += len(with_peft.accelerate(tuner.model).accelerated)
            return made

        with_peft._why_not, tuners.inject_adapter = why_not, inject_adapter

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Keep the tests that make a LoRA layer: a parameter of theirs, or their own code, names its config."""
        chosen = [item for item in items if _tests_lora(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    def pytest_runtest_setup(self, item: Any) -> None:
        self._left.clear()
        self._accelerated = 0
        if self._linears is not None:
            self._linears.calls = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        record = self._found.setdefault(report.nodeid.partition("::")[2], {"outcome": "passed"})
        if report.outcome != "passed":
            record["outcome"] = report.outcome
            record["reason"] = _said(report)
        record["calls"] = self._linears.calls if self._linears is not None else 0
        record["accelerated"] = self._accelerated
        record["left"] = sorted(self._left)

    def pytest_sessionfinish(self) -> None:
        self._record.write_text(json.dumps(self._found), encoding="utf-8")


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
        setattr(stand_in, name, None)
        sys.modules[module] = stand_in


# The tool


def run(source: Path, expression: str | None, *, ours: bool) -> dict[str, Record]:
    """What became of each test.

    Raises:
        SystemExit: pytest did not get as far as running them.
    """
    with tempfile.TemporaryDirectory() as folder, _as_package(source) as root:
        record = Path(folder, "record.json")
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        environment |= {_RECORD: str(record), _OURS: str(int(ours)), "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-p", "peft_tests", "-q", "--no-header", "--tb=no", TESTS]
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
        if record["outcome"] == "failed":
            group = "fails_without_ours" if plain[test]["outcome"] == "failed" else "broken"
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
    return re.sub("^(True|False)-", "", case.rpartition("-")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("source", type=Path, help="PEFT's source, with its tests")
    parser.add_argument("-k", dest="expression", help="as pytest takes it: some of the tests")
    parser.add_argument("--json", type=Path, help="where to write the result; by default it is printed")
    options = parser.parse_args()
    if not (options.source / TESTS).exists():
        parser.error(f"{options.source} has no {TESTS}")
    found = summary(*(run(options.source, options.expression, ours=ours) for ours in (False, True)))
    versions = {name: importlib.metadata.version(name) for name in ("peft", "torch", "transformers")}
    result = {"date": datetime.date.today().isoformat(), "versions": versions, "file": TESTS, **found}
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
