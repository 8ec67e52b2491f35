"""The properties of generated modules, run in a process of their own.

A module may do anything when it is imported or run, also end its process, and whether Triton interprets its kernels is
decided before Triton is imported: so :mod:`.verify` starts this file as a program, once for the torch path and once for
the kernels, and reads what it prints.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest

from ..emit.render import SHARED, render_test, render_test_of_experts
from ..request.activations import ACTIVATIONS
from ..request.bases import BASES
from ..request.errors import one_line
from .interpreter import quicken

#: The two parts of a proof.
TORCH, KERNELS = "torch", "kernels"
#: Properties of the kernels alone begin so; that they run in a process of their own is what this file sees to.
_OF_KERNELS = "test_kernels_"
_LEFT_OUT = ("test_kernels_run_in_a_process_of_their_own",)
_PACKAGE = "_runlora_gen_verified"
#: How a line begins that imports from a file of the same folder.
_SIBLING = re.compile(rb"^from \.", re.MULTILINE)


@dataclass(frozen=True)
class Check:
    """One property of one module, with everything that it is parametrized with."""

    module: str
    title: str
    run: Callable[[], None]


@dataclass(frozen=True)
class _Group:
    """The module of a group, and its function."""

    name: str
    function: str


def _function_of(module: ModuleType) -> str:
    return next(str(name) for name in module.__all__ if name.startswith("lora_"))


def load(modules: Mapping[str, Path]) -> None:
    """Import module files of one folder by names, as members of a package of our own.

    Each must work alone, or with the other files of its folder if it says that it takes something from them.

    Raises:
        BaseException: whatever an import raises.
    """
    for name in [name for name in sys.modules if name.split(".")[0] == _PACKAGE]:
        del sys.modules[name]
    quicken()
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(path.parent) for path in modules.values() if _SIBLING.search(path.read_bytes())][:1]
    sys.modules[_PACKAGE] = package
    for name, path in modules.items():
        spec = importlib.util.spec_from_file_location(f"{_PACKAGE}.{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        setattr(package, name, module)


def checks(modules: Sequence[str], part: str, examples: int) -> Iterator[Check]:
    """The properties of modules that were loaded.

    Args:
        modules: their names.
        part: ``TORCH`` or ``KERNELS``.
        examples: cases that hypothesis draws for a property.
    """
    # The verdict counts, not the smallest counterexample: shrinking would take most of the time.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("verify", phases=phases)
    hypothesis.settings.load_profile("verify")
    os.environ["RUNLORA_EXAMPLES"] = str(examples)
    shared = [name for name in SHARED if f"{_PACKAGE}.{name}" in sys.modules]
    loaded = {name: sys.modules[f"{_PACKAGE}.{name}"] for name in modules}
    several = {
        name: _Group(name, _function_of(module)) for name, module in loaded.items() if hasattr(module, "LINEARS")
    }
    mlps = [group for name, group in several.items() if hasattr(loaded[name], "INTERMEDIATE_FEATURES")]
    groups = [group for group in several.values() if group not in mlps]
    lone = [name for name, module in loaded.items() if hasattr(module, "lora_linear")]
    stacks = [name for name, module in loaded.items() if hasattr(module, "lora_experts")]
    functions = [loaded[name].lora_linear for name in lone] + [loaded[name].lora_experts for name in stacks]
    dropout = any("dropout" in inspect.signature(function).parameters for function in functions)
    coded = [module.Quantized for module in loaded.values() if hasattr(module, "Quantized")]
    base = BASES[sys.modules[coded[0].__module__].BASE if coded else "plain"]
    sources = {}
    if lone or several:
        between = dict.fromkeys(loaded[mlp.name].ACTIVATION for mlp in mlps)
        sources["test_equivalence"] = render_test(
            lone,
            groups=groups,
            mlps=mlps,
            activations=[ACTIVATIONS[name] for name in between],
            dropout=dropout,
            base=base,
            shared=shared,
        )
    if stacks:
        between = dict.fromkeys(getattr(loaded[name], "ACTIVATION", None) for name in stacks)
        activations = [ACTIVATIONS[name] for name in between if name is not None]
        sources["test_experts"] = render_test_of_experts(
            stacks, activations=activations, dropout=dropout, shared=shared
        )
    for name, source in sources.items():
        for function in _properties(name, source):
            if function.__name__.startswith(_OF_KERNELS) == (part == KERNELS):
                yield from _expanded(function)


def _properties(name: str, source: str) -> list[Any]:
    """Those of a test's text."""
    tests = ModuleType(f"{_PACKAGE}.{name}")
    tests.__package__ = _PACKAGE
    sys.modules[tests.__name__] = tests  # hypothesis looks modules up by name
    exec(compile(ast.parse(source), "<properties>", "exec"), tests.__dict__)
    return [value for name, value in vars(tests).items() if name.startswith("test_") and name not in _LEFT_OUT]


def _expanded(function: Any) -> Iterator[Check]:
    """A property with all the arguments that pytest would give it."""
    axes: list[list[dict[str, Any]]] = []
    for mark in getattr(function, "pytestmark", ()):
        if mark.name == "parametrize":
            names, values = mark.args
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            rows = values if len(names) > 1 else [(value,) for value in values]
            axes.append([dict(zip(names, row, strict=True)) for row in rows])
    title = function.__name__.removeprefix("test_").replace("_", " ")
    for parts in itertools.product(*axes):
        given = {name: value for part in parts for name, value in part.items()}
        variant = f"{given['variant'] or 'as selected'}: " if "variant" in given else ""
        module = given["module"].__name__.rsplit(".", 1)[-1]
        yield Check(module, variant + title, _bound(function, given))


def _bound(function: Callable[..., None], given: Mapping[str, Any]) -> Callable[[], None]:
    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**given)

    return run


def outcome(check: Check) -> dict[str, str]:
    """Run a check: an empty dict, the ``error``, or why it was ``skipped``."""
    try:
        check.run()
    except KeyboardInterrupt:
        raise
    except pytest.skip.Exception as skip:
        return {"skipped": str(skip)}
    except BaseException as error:  # hypothesis raises groups, torch anything, a module SystemExit: all failed
        return {"error": reason(error)}
    return {}


def reason(error: BaseException) -> str:
    """An error on one line."""
    return one_line("".join(traceback.format_exception_only(error)))


def main() -> None:
    """Prove what the first argument names: one line of JSON for every step on what was standard output."""
    spec = json.loads(sys.argv[1])
    # Only our own lines go there: what a module prints goes nowhere.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def say(**line: object) -> None:
        channel.write(json.dumps(line) + "\n")

    try:
        load({name: Path(path) for name, path in spec["modules"].items()})
        found = list(checks(list(spec["modules"]), spec["part"], spec["examples"]))
    except BaseException as error:
        say(refused=reason(error))
        raise SystemExit(0) from None
    say(total=len(found))
    for check in found:
        say(module=check.module, title=check.title)
        say(done=True, **outcome(check))
    say(finished=True)


if __name__ == "__main__":
    main()
