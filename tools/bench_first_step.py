"""Seconds until a first step is done: its kernels compiled in it, read from Triton's cache, or compiled by ``warmup``.

    python tools/bench_first_step.py --shapes 1b,8b --json tools/results/first_step_h100.json

Each row is a process of its own with two layers of a model: a step of the frozen layers, so that torch has loaded what
is its own; then ``warmup``, where the row has it; then two steps with adapters. Kernels are counted by the binaries
that are new in Triton's cache. With ``own lines`` a kernel begins at the line at which it stands, as Triton has it by
default: then it is compiled for each module. Rows that would begin after ``--limit`` are left out.

Needs transformers and peft (the bench extra), and a GPU but for the tiny shape.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import runlora_gen
import torch
from bench_model import MODES, SHAPES, Step, layers_of
from contenders import CONTENDERS, FROZEN, Contender, Setup
from runlora_gen.generation import profile_of
from runlora_gen.measure.machine import machine_name
from torch import nn

LAYERS = 2


@dataclass(frozen=True)
class Row:
    """How a process runs.

    Attributes:
        cache: whether Triton's is ``empty`` or ``filled`` by an earlier row.
        warmup: whether that is called before the first step.
        own_lines: whether kernels begin at the lines at which they stand.
    """

    cache: str
    warmup: bool
    own_lines: bool = False

    @property
    def title(self) -> str:
        """For people."""
        lines = ", own lines" if self.own_lines else ""
        return f"{self.cache} cache, {'warmup' if self.warmup else 'no warmup'}{lines}"


#: The one with a filled cache takes that of the row before.
ROWS = (Row("empty", False), Row("filled", False), Row("empty", True), Row("filled", True), Row("empty", False, True))


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """What this process takes, with the options of its row."""
    device = torch.device(options.device)
    shape = replace(SHAPES[options.shapes[0]], layers=LAYERS)
    size = shape.batch, shape.sequence, shape.hidden
    x = torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad_output = torch.randn_like(x)

    def step_of(contender: Contender) -> Step:
        layers = layers_of(shape, device, torch.bfloat16)
        setup = Setup(shape.rank, shape.tokens, options.packages, profile_of(layers)[0])
        return Step(contender, layers, setup, x, grad_output)

    def timed(act: Callable[[], Any]) -> float:
        start = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return round(time.perf_counter() - start, 3)

    def binaries() -> int:
        return sum(1 for _ in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))

    timed(step_of(Contender(FROZEN, lambda model, _: (model, {}))).run(MODES["eager"], ""))
    step = step_of(CONTENDERS[options.contender])
    if options.own_lines:
        _to_own_lines(step.layers)
    run, before, result = step.run(MODES["eager"], ""), binaries(), {}
    if options.warmup:
        result["warmup_s"] = timed(lambda: print(runlora_gen.warmup(step.layers, shape.tokens), file=sys.stderr))
        result["compiled_ahead"] = binaries() - before
    return {**result, "first_step_s": timed(run), "compiled": binaries() - before, "second_step_s": timed(run)}


def _to_own_lines(model: nn.Module) -> None:
    """Kernels as Triton has them by default; before any is compiled."""
    package = next(type(m).__module__.rpartition(".")[0] for m in model.modules() if hasattr(type(m), "replaces"))
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{package}."):
            for kernel in vars(module).values():
                if hasattr(kernel, "starting_line_number"):
                    kernel.starting_line_number = kernel.fn.__code__.co_firstlineno


def in_process(row: Row, shape: str, options: argparse.Namespace, packages: Path, cache: Path) -> dict[str, Any]:
    """The results of a row."""
    command = [sys.executable, __file__, "--worker", "--shapes", shape, "--device", options.device]
    command += ["--contender", options.contender, "--packages", str(packages)]
    command += [f"--{name.replace('_', '-')}" for name in ("warmup", "own_lines") if getattr(row, name)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1b,8b", help="comma list of " + ", ".join(SHAPES))
    parser.add_argument("--contender", default="ours-graph", choices=sorted(c for c in CONTENDERS if "ours" in c))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--limit", type=float, default=200, metavar="SECONDS", help="after which no row begins")
    parser.add_argument("--json", type=Path, help="where to write the results, after every row")
    for name in ("worker", "warmup", "own-lines"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--packages", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.shapes = options.shapes.split(",")
    unknown = [name for name in options.shapes if name not in SHAPES]
    if unknown:
        parser.error(f"--shapes: {unknown[0]} is not allowed; give some of {', '.join(SHAPES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; a dry run: --device cpu --shapes tiny")
    return options


def main() -> None:
    """Measure, print a line a row, write the JSON."""
    start = time.perf_counter()
    options = parsed()
    if options.worker:
        print(json.dumps(measured(options)))
        return
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine_name(torch.device(options.device)),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers", "peft")},
        "contender": options.contender,
        "layers": LAYERS,
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape in options.shapes:
            cache = folder
            for number, row in enumerate(ROWS):
                if time.perf_counter() - start > options.limit:
                    print(f"{shape}: {row.title}: left out: out of time", file=sys.stderr)
                    continue
                if row.cache == "empty":
                    cache = folder / f"{shape}_{number}"
                    cache.mkdir()
                result = in_process(row, shape, options, folder / shape, cache)
                rows.append({"shape": shape, **asdict(row), **result})
                ahead = f"warmup {result['warmup_s']:.2f} s, " if row.warmup else ""
                print(
                    f"{shape}: {row.title}: {ahead}first step {result['first_step_s']:.2f} s, "
                    f"second {result['second_step_s']:.3f} s, {result['compiled']} kernels compiled",
                    flush=True,
                )
                if options.json:
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    options.json.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
