"""Measure a machine: what the prices and the kernels' constants need to know of it, as a device profile.

Every operation of the table is run as the line of code that a module would hold, on buffers that change from call to
call, so that the cache is as cold as in training. All operations of one size are measured interleaved, in batches of
rounds, until the medians of two batches agree; what never agrees is left out and named.

Agreement alone would not do: beside one busy loop, a product on two threads takes twice as long, batch after batch
within 10 %. So a batch counts only if a copy of memory takes its usual time after it. A copy, because it shows others
at work (2.2 times as long beside that loop) but not the clocks, which are the machine's own: an H100 that took 1.3
times as long for products, after large ones had heated it, copied as before. (Nor does it show a core whose other
thread works for someone else: on a virtual machine small operations took twice as long for seconds, and copies did not.
All operations of a size are slow alike then.)
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import functools
import importlib.util
import math
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..algebra.derivation import Derivation
from ..algebra.enumerate import Program, enumerate_programs
from ..algebra.experts import ACTIVATED, COMBINED, GATHERED
from ..algebra.linear import FLOAT8, LINEAR, QUANTIZED
from ..algebra.liveness import wanted_operations
from ..algebra.lookup import Asked
from ..algebra.mlp import LINEARS, MLP
from ..algebra.operations import Convert, Fused, Map, Operation, Symbol, dimensions, products
from ..algebra.work import work
from ..cost.measured import measured_as
from ..cost.profile import FLOAT8 as FLOAT8_RATE
from ..cost.profile import MAX_PROFILE_BYTES, Profile, Size, check_title, parse_toml, read_profile, render_profile
from ..emit.code import line, tiles_key
from ..kernels.registry import KERNELS
from ..kernels.sites import columns_of, draws, operations_of, serves
from ..request.errors import SpecError, one_line, reason, shorten
from ..request.files import read_if_there
from ..request.workload import Workload
from ..search.candidates import goals
from .clock import Key, Run, captured, interleaved, repeated, seconds
from .machine import machine_name
from .modules import module_of_everything, module_of_experts, module_of_mlp
from .problem import ACTIVATION, TORCH_DTYPES, Nothing, Point, Problem, random_codes, random_float8

#: Rounds of a batch, whose median is one figure.
ROUNDS = 3
#: Sides of the square products that give the matrix rates, by the bytes of an element.
SQUARE = {"cuda": {2: 8192, 4: 4096}, "cpu": {2: 1024, 4: 1024}}
#: The most batches. Of 60 timings on an H100 all settled within 6, on two shared cores all but 0 to 2 of 170 within 12.
BATCHES = 12
#: The two lowest of so many last figures have to agree. The lowest, because others only ever make a machine slower; the
#: last, because a machine at rest can be faster at first than it ever is again (an H100 by 11 %, until it throttled).
RECENT = 5
#: How far the higher of two figures that agree may be above the lower, by the type of device. The first two did in 85 %
#: of the timings on an H100, and in half of those on two shared cores.
TOLERANCE: Mapping[str, float] = {"cuda": 0.03, "cpu": 0.1}
#: A machine at rest copies memory at the rate in its profile, up to this factor. Of 240 medians of three copies on two
#: cores at rest the slowest took 1.26 times as long; beside a busy loop they take from 1.6 times.
AT_REST = 1.3
#: How long a busy machine is waited for.
PATIENCE_S = 60.0
#: A timing lasts at least so long: shorter ones are repeated.
LEAST_S = 2e-4
#: Constants with which a kernel takes so much more are better, if it sums in fewer parts: these are memory of a step.
LEAN = 0.1
#: The largest number of sets of buffers that an operation goes through.
MOST_SETS = 8
#: Linears in a row that are compiled as one graph. What the longer row takes more is the linears' alone: guards, the
#: engine and whatever else comes once a step are in both.
ROWS = (2, 10)
#: Bytes of the last-level cache that is assumed of a CPU.
_CPU_CACHE = 2**25
#: The programs whose steps give the host's share: of torch's products alone, and with kernels.
_PLAIN = Asked({"Y": "base_first", "dX": "base_first", "dA": "pt_x", "dB": "dyt_s"}, keeps=("S",))
_FUSED = Asked({"Y": "fused", "dX": "fused", "dA": "pt_x", "dB": "one_pass"}, keeps=("S",))
#: Sizes (in_features, out_features), tokens and ranks that are measured where none are given, by the type of device.
GRID: Mapping[str, tuple[tuple[tuple[int, int], ...], tuple[int, ...], tuple[int, ...]]] = {
    "cuda": (
        (
            (512, 512),
            (512, 2048),
            (2048, 512),
            (1024, 4096),
            (4096, 1024),
            (2048, 2048),
            (4096, 12288),
            (12288, 4096),
            (5120, 5120),
            (5120, 13824),
            (13824, 5120),
            (8192, 8192),
            (8192, 28672),
            (2047, 5461),  # rows off 16 bytes
        ),
        (512, 2048, 4096, 8192, 16384),
        (8, 16, 64, 256),
    ),
    "cpu": (((256, 1024), (512, 512), (1024, 256), (1024, 1024), (1024, 4096)), (256, 1024, 4096), (8, 32, 128)),
}


#: The same of experts: how many there are, how many a token has, and their sizes.
GRID_OF_EXPERTS: Mapping[str, tuple[tuple[tuple[int, int, int, int], ...], tuple[int, ...], tuple[int, ...]]] = {
    "cuda": (
        ((128, 8, 2048, 1536), (128, 8, 768, 2048), (32, 4, 2880, 5760), (32, 4, 2880, 2880), (8, 2, 4096, 14336)),
        (1024, 4096, 16384),
        (8, 32),
    ),
    "cpu": (((8, 2, 256, 512),), (256, 1024), (8,)),
}


#: The same of gated MLPs: features of their input, and what gate and up make of it.
GRID_OF_MLPS: Mapping[str, tuple[tuple[tuple[int, int], ...], tuple[int, ...], tuple[int, ...]]] = {
    "cuda": (((2048, 8192), (4096, 14336), (5120, 13824), (8192, 28672)), (2048, 4096, 16384), (8, 16, 64)),
    "cpu": (((256, 1024), (1024, 4096)), (256, 1024), (8,)),
}


#: Times of a dtype that are known, by work and size.
Known = Mapping[str, Mapping[Size, float]]


@dataclass(frozen=True)
class Trial:
    """One thing to time: an operation, with constants in place of its kernel's own."""

    operation: Operation
    constants: tuple[tuple[str, int], ...] = ()


def points(shapes: Sequence[tuple[int, int]], tokens: Sequence[int], ranks: Sequence[int]) -> tuple[Point, ...]:
    """All sizes, ranks above a side of the linear left out, in an order that finishes one shape after the other."""
    return tuple(
        Point(count, in_features, out_features, rank)
        for in_features, out_features in shapes
        for count in tokens
        for rank in ranks
        if rank <= min(in_features, out_features)
    )


def points_of_experts(
    stacks: Sequence[tuple[int, int, int, int]], tokens: Sequence[int], ranks: Sequence[int]
) -> tuple[Point, ...]:
    """The same of experts: E, how many a token has, I and O."""
    return tuple(
        replace(point, experts=experts, top_k=top_k)
        for experts, top_k, *shape in stacks
        for point in points([(shape[0], shape[1])], tokens, ranks)
    )


def points_of_mlps(shapes: Sequence[tuple[int, int]], tokens: Sequence[int], ranks: Sequence[int]) -> tuple[Point, ...]:
    """The same of gated MLPs."""
    return tuple(replace(point, mlp=True) for point in points(shapes, tokens, ranks))


def tune(
    output: Path, *, device: str, dtypes: Sequence[str], sizes: Sequence[Point], title: str | None, quiet: bool
) -> None:
    """Measure this machine and write its profile; what the file holds already is not measured again.

    An operation whose time never agreed with itself gets no row at that size, and is named on stderr. That is no error:
    the prices take the ratio of its other sizes, and the same call again measures just what is missing.

    Args:
        output: the profile; rewritten after every size, so that an interrupted run can be resumed.
        device: ``cuda`` or ``cpu``.
        dtypes: dtypes to measure operations in.
        sizes: where to measure.
        title: how people call the machine; by default what the driver says.
        quiet: no progress bar; what was left out is named all the same.

    Raises:
        SpecError: there is no such device here, the file is another machine's or unreadable, or the machine is not at
            rest: it is busy for longer than ``PATIENCE_S``, or what all prices need (bandwidth, rates, launches) never
            agreed with itself.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SpecError("--device: 'cuda' is not there: torch sees no GPU; give cpu")
    if title is not None:
        try:
            check_title(title)
        except ValueError as error:
            raise SpecError(f"--{error}") from None
    torch.backends.cuda.matmul.allow_tf32 = False
    machine = torch.device(device)
    profile = _read(output, _source(machine))
    if profile is not None and title is not None:
        profile = replace(profile, title=title)
        _write(output, profile)
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise SpecError(f"--output: cannot write into {shorten(str(folder))}")
    with _Workbench(machine) as bench, _progress(quiet) as progress:
        if profile is None:
            basics = progress.add_task("bandwidth, rates, launches", total=None)
            profile = _basics(bench, title or _plain(machine_name(machine)))
            _write(output, profile)
            progress.remove_task(basics)
        bench.bytes_per_s = profile.memory_gb_per_s * 1e9
        if profile.compiled_host_us is None:
            launches = progress.add_task("launches of torch.compile", total=None)
            operator_us, kernel_us = _compiled_host_us(bench)
            profile = replace(profile, compiled_host_us=operator_us, compiled_kernel_host_us=kernel_us)
            _write(output, profile)
            progress.remove_task(launches)
        missing = [(d, point) for d in dtypes for point in sizes if bench.trials(d, point, profile.times.get(d, {}))]
        task = progress.add_task("kernels", total=len(missing))
        if bench.kernels:
            _compile_ahead(missing)
        left_out: dict[tuple[str, Operation, Size], str] = {}
        for dtype, point in missing:
            of = f" {point.experts} experts, {point.top_k} a token" if point.experts else " MLP" if point.mlp else ""
            label = f"{dtype} {point.tokens}:{point.in_features}x{point.out_features} r{point.rank}{of}"
            progress.update(task, description=label)
            try:
                unsettled = _measure(bench, profile, dtype, point)
                _write(output, profile)
                for trial, figures in unsettled.items():
                    left_out[dtype, trial.operation, _at(trial.operation, point)] = (
                        f"left out: {label}: {_described(trial)} {_disagreement(figures)}; "
                        "run again on an idle machine, what is finished is kept"
                    )
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                    raise
                Console(stderr=True).print(f"left out: {label} does not fit the memory", highlight=False)
            progress.advance(task)
    for (dtype, operation, at), named in left_out.items():
        if at not in profile.times.get(dtype, {}).get(
            work(operation), {}
        ):  # a size that shares its dimensions may have
            click.echo(named, err=True)
    for dtype in dtypes:
        for name in bench.never_timed(profile.times.get(dtype, {})):
            click.echo(
                f"warning: {dtype}: {name} has no time at any size: its price is a bare roofline beside measured ones",
                err=True,
            )


def _described(trial: Trial) -> str:
    constants = ", ".join(f"{name} = {value}" for name, value in trial.constants)
    return str(trial.operation) + (f" with {constants}" if constants else "")


def _disagreement(figures: Sequence[float]) -> str:
    if not figures:
        return "was never timed on a machine at rest"
    return f"took {', '.join(f'{figure * 1e6:.4g}' for figure in figures)} µs in batches that never agreed"


class _Workbench:
    """Runs operations as modules do: holds a module with all of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.kernels = self.on_gpu and importlib.util.find_spec("triton") is not None
        self._folder = tempfile.TemporaryDirectory()
        # One whose rates are of all dtypes.
        device_name = "h100" if self.on_gpu else "cpu"
        # Everything in one dtype: then there is nothing to cast.
        self.workload = Workload(adapter_dtype="bf16", device=device_name, launch="graph", kernels=self.kernels)
        self._modules: dict[str, ModuleType] = {}
        self.module = self.module_on("plain")
        timed = [op for op in operations_of(LINEAR) if not draws(op) and not isinstance(op, Convert)]
        if self.kernels:
            coded = [op for site in (QUANTIZED, FLOAT8) for op in operations_of(site) if _base_of(op) != "plain"]
            timed += [op for op in coded if isinstance(op, Fused) and self._able(op)]
        # One for all that do the same work.
        self._operations = tuple({work(op): op for op in reversed(timed)}.values())
        self._of_experts = tuple({work(op): op for op in reversed(self._timed_of_experts())}.values())
        # What is between the linears of an MLP; these are measured by themselves.
        self._of_mlps = tuple({work(op): op for op in reversed(self._timed_of_mlps())}.values())
        #: A square linear whose launches take longest. Operators of a CPU wait for their results: there calls count.
        self.launching = Point(1024, 256, 256, 8) if self.on_gpu else Point(8, 8, 8, 8)
        self.launching_dtype = torch.bfloat16 if self.on_gpu else torch.float32
        #: Rate of a copy of memory on this machine at rest; None before it was measured.
        self.bytes_per_s: float | None = None

    def module_on(self, base: str) -> ModuleType:
        """A module with all operations of a base."""
        if base not in self._modules:
            folder = Path(self._folder.name) / f"everything_on_{base}_{os.getpid()}"
            self._modules[base] = module_of_everything(replace(self.workload, base=base), folder)
        return self._modules[base]

    def _timed_of_experts(self) -> list[Operation]:
        """What experts do, each as one of their sites has it, but for kernels that others are priced for."""
        every = dict.fromkeys(op for site in _OF_EXPERTS for op in operations_of(site))
        own = [op for op in every if not isinstance(op, Convert)]
        return [op for op in own if not isinstance(op, Fused) or (self.kernels and measured_as(op) == work(op))]

    def _timed_of_mlps(self) -> list[Operation]:
        def is_between(operation: Operation) -> bool:
            return any(isinstance(step, Map) and step.activates for step in products(operation))

        return [op for op in operations_of(MLP) if is_between(op) and (self.kernels or not isinstance(op, Fused))]

    def module_for(self, operation: Operation) -> ModuleType:
        """A module that has an operation."""
        if operation in self._of_mlps:
            return self.module_of_mlp
        for site in _OF_EXPERTS:
            if operation in operations_of(site):
                return self.module_of_experts(site)
        return self.module_on(_base_of(operation))

    def module_of_experts(self, site: Derivation) -> ModuleType:
        """A module with all operations of a projection of experts."""
        name, gathers, activation = _OF_EXPERTS[site]
        if name not in self._modules:
            folder = Path(self._folder.name) / f"{name}_{os.getpid()}"
            self._modules[name] = module_of_experts(self.workload, folder, gathers, activation)
        return self._modules[name]

    @property
    def module_of_mlp(self) -> ModuleType:
        """A module with all operations of a gated MLP."""
        name = "mlp"
        if name not in self._modules:
            self._modules[name] = module_of_mlp(
                self.workload, Path(self._folder.name) / f"{name}_{os.getpid()}", ACTIVATION
            )
        return self._modules[name]

    def operations_at(self, point: Point) -> tuple[Operation, ...]:
        """What is timed at a size: of experts, of an MLP, or of a linear."""
        return self._of_experts if point.experts else self._of_mlps if point.mlp else self._operations

    def _able(self, operation: Fused) -> bool:
        """Whether this GPU has what a kernel needs."""
        return not KERNELS[operation.kernel].float8 or torch.cuda.get_device_capability(self.device) >= (8, 9)

    def __enter__(self) -> _Workbench:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    @cached_property
    def pair(self) -> torch.Tensor:
        """A source and a target to copy, much larger than any cache."""
        return torch.randn(2, 2**28 if self.on_gpu else 2**25, device=self.device)

    def copy(self) -> None:
        """Read one half of the pair and write the other."""
        self.pair[1].copy_(self.pair[0])

    def at_rest(self) -> bool:
        """Wait until a copy of memory takes its usual time, if that is known; whether it did at once.

        Raises:
            SpecError: it did not for ``PATIENCE_S``.
        """
        if self.bytes_per_s is None:
            return True
        until, at_once = time.monotonic() + PATIENCE_S, True
        while True:
            # Of three, since single ones mislead: one in a hundred at rest, up to six beside a busy loop.
            copied = self.pair.nbytes / statistics.median(seconds(self.copy, self.device) for _ in range(3))
            if 1 / AT_REST < copied / self.bytes_per_s < AT_REST:
                return at_once
            if time.monotonic() > until:
                raise SpecError(
                    f"tune: memory is copied at {copied / 1e9:.1f} GB/s, and was at {self.bytes_per_s / 1e9:.1f} when "
                    "the profile was begun; run again on an idle machine, what is finished is kept, or begin another"
                )
            time.sleep(0.2)
            at_once = False

    def never_timed(self, known: Known) -> list[str]:
        """Torch's operations without a time, where others of linears, or of experts, have some."""
        missing = []
        for operations in (self._operations, self._of_experts, self._of_mlps):
            single = [operation for operation in operations if not isinstance(operation, Fused)]
            lacking = [str(operation) for operation in single if work(operation) not in known]
            missing += lacking if len(lacking) < len(single) else []
        return missing

    def trials(self, dtype: str, point: Point, known: Known) -> list[Trial]:
        """What is to be timed at a size: what is not known of it, kernels with all their constants."""
        found = []
        for operation in self.operations_at(point):
            if _at(operation, point) in known.get(work(operation), {}):
                continue
            if not isinstance(operation, Fused):
                found.append(Trial(operation))
            elif self.kernels and serves(operation, dtype=dtype, rank=point.rank, dims=point.dims):
                kernel = KERNELS[operation.kernel]
                candidates = kernel.candidates if self.takes_large_tiles(dtype, point) else ()
                # What comes to the same constants is tried once.
                sets: dict[tuple[int, ...], Mapping[str, int]] = {}
                for constants in ({}, *candidates):
                    at = kernel.at({**kernel.tiles, **constants}, point.dims["T"], point.in_features, point.rank)
                    sets.setdefault(tuple(at.values()), constants)
                found += [Trial(operation, tuple(constants.items())) for constants in sets.values()]
        return found

    def takes_large_tiles(self, dtype: str, point: Point) -> bool:
        """Whether kernels run with the tuned constants here, and not with those for other GPUs and operands."""
        sides = (point.in_features, point.out_features)
        matrices = [torch.empty(2, side, device=self.device, dtype=TORCH_DTYPES[dtype]) for side in sides]
        return bool(self.module._tma_serves(*matrices))

    def runner(self, trial: Trial, sets: Sequence[Mapping[Symbol, Any]], dtype: torch.dtype) -> Callable[[], None]:
        """A call that runs a trial once on each set of buffers; of experts it has no biases."""
        operation = trial.operation
        module = self.module_for(operation)
        symbols = sorted({*operation.reads, *(operation.outputs if operation.accumulate else ())} - {COMBINED["b"]})
        key = None
        if isinstance(operation, Fused) and trial.constants:
            own = tiles_key(operation)
            key = f"{own} {dict(trial.constants)}".replace('"', "")
            module._TILES[key] = {**module._TILES[own], **dict(trial.constants)}
        namespace = {**vars(module), "scaling": 0.5, "b": None, "A_dtype": dtype, "B_dtype": dtype}
        namespace |= {"scaling_U": 0.5, "BU_dtype": dtype}
        namespace |= {f"{name}_dtype": dtype for name in ("A_down", "B_gate", "B_up")}
        namespace |= {f"scaling_{linear}": 0.5 for linear in LINEARS}
        namespace |= {f"need_{out}": True for out in operation.outputs}
        if _ROUTING in sets[0]:
            symbols = [*symbols, _ROUTING]
        exec(f"def run({', '.join(map(str, symbols))}):\n    {line(operation, tiles=key)}\n", namespace)
        run = namespace["run"]
        calls = [[tensors[symbol] for symbol in symbols] for tensors in sets]

        def run_all() -> None:
            for call in calls:
                run(*call)

        return run_all

    def sets(self, point: Point, trials: Sequence[Trial], dtype: torch.dtype) -> list[dict[Symbol, Any]]:
        """As many sets of random operands as fill the cache several times over."""
        symbols = sorted({s for trial in trials for s in (*trial.operation.reads, *trial.operation.outputs)})
        activations = sum(LINEAR[name].numel(point.dims) for name in ("X", "W", "dY")) * dtype.itemsize
        if point.experts:
            activations += (point.experts - 1) * point.in_features * point.out_features * dtype.itemsize
        if point.mlp:  # gate, up and what is made of them
            activations = 3 * point.tokens * point.out_features * dtype.itemsize
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size if self.on_gpu else _CPU_CACHE
        count = max(1, min(MOST_SETS, math.ceil(4 * cache / activations)))

        def drawn(symbol: Symbol) -> Any:
            shape = [point.dims[d] for d in symbol.shape]
            match symbol.store:
                case "code":
                    return random_codes(self.module_on("nf4").Quantized, (shape[0], shape[1]), self.device, dtype)
                case "code8":
                    made = random_float8(self.module_on("fp8").Quantized, (shape[0], shape[1]), self.device, dtype)
                    return made.codes if symbol == FLOAT8["Qt"] else made
                case "acc32":
                    return torch.rand(shape, device=self.device) + 3
            if symbol == COMBINED["g"]:  # as the router has them
                shape = [point.tokens, point.top_k]
            return torch.randn(shape, device=self.device, dtype=dtype)

        def routed() -> dict[Symbol, Any]:
            """How the rows of tokens that choose experts at random are sorted."""
            if not point.experts:
                return {}
            chosen = torch.rand(point.tokens, point.experts, device=self.device).topk(point.top_k).indices
            return {_ROUTING: self.module_of_experts(GATHERED).route(chosen, point.experts)}

        return [{symbol: drawn(symbol) for symbol in symbols} | routed() for _ in range(count)]


#: The sites of experts, whose operations are timed: what their modules are called, and which they are. An activation is
#: timed as the one that most models have.
_OF_EXPERTS: Mapping[Derivation, tuple[str, bool, str]] = {
    GATHERED: ("experts_that_gather", True, ""),
    COMBINED: ("experts_that_combine", False, ""),
    ACTIVATED: ("experts_that_activate", False, ACTIVATION),
}
#: How rows are sorted by expert, among what an operation of theirs is given.
_ROUTING = Symbol("routing", ())


def _base_of(operation: Operation) -> str:
    """A base whose modules have an operation."""
    stores = {symbol.store for symbol in (*operation.reads, *operation.outputs)}
    if "code8" in stores or (isinstance(operation, Fused) and KERNELS[operation.kernel].float8):
        return "fp8"
    return "nf4" if "code" in stores else "plain"


def _measure(bench: _Workbench, profile: Profile, dtype: str, point: Point) -> dict[Trial, list[float]]:
    """Time what is not known of one size, and put it into the profile.

    Returns:
        what was left out, with the medians of its batches, in seconds. A kernel is left out where the constants with
        the lowest time never agreed: nobody knows whether they are the best.
    """
    trials = bench.trials(dtype, point, profile.times.get(dtype, {}))
    sets = bench.sets(point, trials, TORCH_DTYPES[dtype])
    pool = torch.cuda.graph_pool_handle() if bench.on_gpu else None
    timed: dict[Trial, Run] = {}
    calls: dict[Trial, int] = {}
    for trial in trials:
        run = bench.runner(trial, sets, TORCH_DTYPES[dtype])
        try:
            run()
        except Exception as error:
            if type(error).__name__ == "OutOfResources" and trial.constants:
                continue  # these constants need more shared memory than there is
            raise
        # The lower of two: after one that was disturbed, all timings would be too short for the clock.
        calls[trial] = max(1, math.ceil(LEAST_S / min(seconds(run, bench.device) for _ in range(2))))
        timed[trial] = captured(run, calls[trial], pool=pool) if bench.on_gpu else repeated(run, calls[trial])
    figures = {
        trial: [figure / calls[trial] / len(sets) for figure in of_batches]
        for trial, of_batches in _settled(bench, timed, bench.device).items()
    }
    agreed = {trial: _agreed(of_batches, bench.device) for trial, of_batches in figures.items()}

    def at_best(trial: Trial) -> float:
        return agreed[trial] or min(figures[trial], default=0.0)

    unsettled = {}
    for operation in dict.fromkeys(trial.operation for trial in figures):
        best = _best({trial: at_best(trial) for trial in figures if trial.operation == operation}, dtype, point)
        median, at = agreed[best], _at(operation, point)
        if median is None:
            unsettled[best] = figures[best]
            continue
        profile.times.setdefault(dtype, {}).setdefault(work(operation), {})[at] = float(f"{median * 1e6:.4g}")
        if isinstance(operation, Fused) and bench.takes_large_tiles(dtype, point):
            profile.tiles.setdefault(dtype, {}).setdefault(work(operation), {})[at] = dict(best.constants)
    return unsettled


def _best(times: Mapping[Trial, float], dtype: str, point: Point) -> Trial:
    """The fastest of one operation, or of those that take little more (``LEAN``) the one that sums in fewest parts."""
    enough = (1 + LEAN) * min(times.values())
    fast = [trial for trial, time in times.items() if time <= enough]
    return min(fast, key=lambda trial: (_parts_bytes(trial, dtype, point), times[trial]))


def _parts_bytes(trial: Trial, dtype: str, point: Point) -> int:
    """Of the sums of a kernel, with these constants."""
    if not isinstance(trial.operation, Fused):
        return 0
    kernel = KERNELS[trial.operation.kernel]
    constants = {**kernel.tiles, **dict(trial.constants)}
    return kernel.parts_bytes(constants, point.tokens, point.out_features, point.rank, TORCH_DTYPES[dtype].itemsize)


def _settled(bench: _Workbench, runs: Mapping[Key, Run], device: torch.device) -> dict[Key, list[float]]:
    """Median seconds of each of ``runs`` in one batch after the other, until they agree, or there are ``BATCHES``.

    Batches during which the machine was found busy do not count. ``device`` is the one whose clock is read.

    Raises:
        SpecError: it stays busy.
    """
    figures: dict[Key, list[float]] = {key: [] for key in runs}
    bench.at_rest()
    for number in range(BATCHES):
        unsettled = {key: run for key, run in runs.items() if _agreed(figures[key], device) is None}
        if not unsettled:
            break
        times = interleaved(unsettled, ROUNDS, device, warmups=int(number == 0), seed=number)
        if bench.at_rest():
            for key in unsettled:
                figures[key].append(statistics.median(times[key]))
    return figures


def _agreed(figures: Sequence[float], device: torch.device) -> float | None:
    """The mean of the two lowest of the last figures, if they agree.

    There is no allowance for the clock's steps: what is timed lasts hundreds of them (``LEAST_S``).
    """
    lowest = sorted(figures[-RECENT:])[:2]
    agree = len(lowest) == 2 and lowest[1] <= lowest[0] * (1 + TOLERANCE[device.type])
    return statistics.mean(lowest) if agree else None


def _at(operation: Operation, point: Point) -> Size:
    return tuple(point.dims[dim] for dim in dimensions(operation))


def _compile_ahead(missing: Sequence[tuple[str, Point]]) -> None:
    """Fill Triton's cache on all cores: one after the other, compiling would take longest of all."""
    tasks = dict.fromkeys((dtype, point.rank, point.experts, point.mlp) for dtype, point in missing)
    context = multiprocessing.get_context("spawn")
    workers = min(12, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_compiler) as executor:
        jobs = [
            executor.submit(_compile, dtype, rank, experts, mlp, share, of)
            for dtype, rank, experts, mlp in tasks
            for of in [max(1, workers // len(tasks))]
            for share in range(of)
        ]
        for job in jobs:
            job.result()


_compiler: _Workbench | None = None


def _start_compiler() -> None:
    global _compiler
    _compiler = _Workbench(torch.device("cuda"))


def _compile(dtype: str, rank: int, experts: int, mlp: bool, share: int, of: int) -> None:
    """Run a share of the kernels' trials of one rank, in both ways in which a last wave of tiles may fill up."""
    assert _compiler is not None
    sizes = ((512, 512),) if experts or mlp else ((2048, 2048), (4096, 5120), (512, 512))
    for tokens, features in sizes:
        point = Point(tokens, features, features, rank, experts, min(2, experts) or 1, mlp)
        trials = [t for t in _compiler.trials(dtype, point, {}) if isinstance(t.operation, Fused)]
        for trial in trials[share::of]:
            with contextlib.suppress(Exception):  # what fails here fails again, and loudly, when it is measured
                _compiler.runner(trial, _compiler.sets(point, [trial], TORCH_DTYPES[dtype])[:1], TORCH_DTYPES[dtype])()
    torch.cuda.synchronize()


def _basics(bench: _Workbench, title: str) -> Profile:
    """A profile of copy bandwidth, matrix rates, and what a launch costs device and host.

    Raises:
        SpecError: one of them never agreed with itself, or the machine stays busy.
    """
    device, on_gpu = bench.device, bench.on_gpu
    bench.bytes_per_s = bench.pair.nbytes / _basic(bench, "a copy of memory", bench.copy, device)
    rates = {}
    for name, dtype in TORCH_DTYPES.items():
        size = SQUARE[device.type][dtype.itemsize]
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        product_s = _basic(bench, f"a product in {name}", lambda: left @ right, device)  # noqa: B023
        rates[name] = float(f"{2 * size**3 / product_s / 1e12:.4g}")
    if on_gpu and torch.cuda.get_device_capability(device) >= (8, 9):
        size = SQUARE[device.type][2]
        codes = [torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2)]
        one = torch.ones((), device=device)
        product_s = _basic(
            bench,
            "a product in fp8",
            lambda: torch._scaled_mm(codes[0], codes[1].t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
            device,
        )
        rates[FLOAT8_RATE] = float(f"{2 * size**3 / product_s / 1e12:.4g}")
    tiny = torch.randn(8, 8, device=device)
    calls = 500
    run = repeated(lambda: torch.add(tiny, tiny, out=tiny), calls)
    launch_s = _basic(bench, f"{calls} launches", captured(run) if on_gpu else run, device) / calls
    host_us, function_host_us, kernel_host_us = _eager_host_us(bench)
    return Profile(
        title=title,
        source=_source(device),
        date=datetime.date.today().isoformat(),
        memory_gb_per_s=round(bench.bytes_per_s / 1e9, 1),
        launch_us=round(launch_s * 1e6, 2),
        host_us=host_us,
        multiprocessors=torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else None,
        function_host_us=function_host_us,
        kernel_host_us=kernel_host_us,
        tflops=rates,
    )


def _basic(bench: _Workbench, name: str, run: Run, device: torch.device) -> float:
    """Seconds of what all prices need.

    Raises:
        SpecError: they never agreed, or the machine stays busy.
    """
    figures = _settled(bench, {name: run}, device)[name]
    agreed = _agreed(figures, device)
    if agreed is None:
        raise SpecError(
            f"tune: {name} {_disagreement(figures)}, and nothing can be priced without it: run again on an idle machine"
        )
    return agreed


def host_figures(device: str, at: Point | None = None) -> dict[str, float | None]:
    """The host's figures of this machine's profile alone, by their keys in the file.

    Args:
        device: ``cuda`` or ``cpu``.
        at: the size of the linears whose launches are timed, square and so small that the host takes longer; by default
            what ``tune`` takes.

    Raises:
        SpecError: the eager ones never agreed with themselves. Those of torch.compile are left out then, and named.
    """
    with _Workbench(torch.device(device)) as bench:
        bench.launching = at or bench.launching
        (eager, function, eager_kernel), (compiled, compiled_kernel) = _eager_host_us(bench), _compiled_host_us(bench)
    return {
        "host_us": eager,
        "function_host_us": function,
        "kernel_host_us": eager_kernel,
        "compiled_host_us": compiled,
        "compiled_kernel_host_us": compiled_kernel,
    }


class _Unsettled(RuntimeError):
    """Timings that contradict each other."""


def _eager_host_us(bench: _Workbench) -> tuple[float, float, float | None]:
    """Microseconds that the host needs for one operator, one autograd function and one kernel's launch, eagerly.

    Raises:
        SpecError: that never agreed with itself, or the machine stays busy.
    """
    seconds_of = functools.partial(_seconds_in_a_row, bench, lambda forward: forward, 50)
    try:
        function_s = seconds_of(None)
        operator_us, kernel_us = _host_us(bench, seconds_of, function_s)
        figures = (operator_us, round(function_s * 1e6, 2), kernel_us)
        if any(figure is not None and figure <= 0 for figure in figures):
            raise _Unsettled(f"longer rows took no longer ({figures} µs); run again on an idle machine")
    except _Unsettled as error:
        raise SpecError(f"tune: {error}; nothing can be priced without what eager launches cost the host") from None
    return figures


def _compiled_host_us(bench: _Workbench) -> tuple[float | None, float | None]:
    """The same under torch.compile; None, and a line on stderr, where that can't be measured.

    Raises:
        SpecError: the machine stays busy.
    """
    try:
        torch.compiler.reset()
        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        found = _host_us(bench, functools.partial(_seconds_in_a_row, bench, compiled, 20))
        if any(figure is not None and figure <= 0 for figure in found):
            raise RuntimeError(f"longer rows took no longer ({found[0]} and {found[1]} µs)")
    except SpecError:
        raise
    except Exception as error:  # whatever a compiler raises that is missing, or that fails
        what = one_line(str(error) or type(error).__name__)
        click.echo(f"left out: what torch.compile's launches cost the host, for --launch compile: {what}", err=True)
        return None, None
    return found


def _seconds_in_a_row(
    bench: _Workbench, made: Callable[[Callable[..., Any]], Callable[..., Any]], steps: int, variant: str | None
) -> float:
    """Host seconds of a linear's forward and backward, of those that several take more than few.

    All forwards come before all backwards, as in a model: else autograd's thread would alternate with this one.

    Args:
        bench: what is measured with.
        made: makes what is run of the forwards.
        steps: in a timing.
        variant: of the linears; None of functions in their place that do nothing.

    Raises:
        _Unsettled: a row never agreed with itself.
    """
    nothing: Any = Nothing.apply

    def row(count: int) -> Run:
        problems = [Problem(bench.launching, bench.device, bench.launching_dtype) for _ in range(count)]
        x, grad_output = problems[0].x, problems[0].grad_output
        trained = [x, *(factor for each in problems for factor in (each.lora_A, each.lora_B))]

        def forward(y: torch.Tensor) -> torch.Tensor:
            for each in problems:
                operands = (y, each.weight, each.lora_A, each.lora_B)
                linear = bench.module.lora_linear
                y = nothing(*operands) if variant is None else linear(*operands, scaling=0.5, variant=variant)
            return y

        run = made(forward)

        def step() -> None:
            torch.autograd.grad(run(x), trained, grad_output, allow_unused=variant is None)

        step()  # compiles
        return _steps(bench, step, steps)

    clock = torch.device("cpu")
    figures = _settled(bench, {count: row(count) for count in ROWS}, clock)
    few, many = (_agreed(figures[count], clock) for count in ROWS)
    if few is None or many is None:
        which = figures[ROWS[0] if few is None else ROWS[1]]
        what = f"{steps} steps of {variant or 'empty functions'} {_disagreement(which)}"
        raise _Unsettled(f"{what}; run again on an idle machine")
    return (many - few) / (ROWS[1] - ROWS[0]) / steps


def _steps(bench: _Workbench, step: Run, count: int) -> Run:
    def run() -> None:
        for _ in range(count):
            step()
        if bench.on_gpu:
            torch.cuda.synchronize()

    return run


def _host_us(
    bench: _Workbench, seconds_of: Callable[[str], float], function_s: float = 0.0
) -> tuple[float, float | None]:
    """Microseconds of one operator, and of one kernel's launch, from the seconds of two programs' steps.

    ``function_s``: of these, what the autograd function takes that runs them.
    """
    programs = enumerate_programs(LINEAR, goals(bench.workload), table=LINEAR.rows(lambda _: bench.kernels))
    wanted = frozenset({"dX", "dA", "dB"})

    def running(program: Program) -> list[Operation]:
        return [op for phase in (program.forward, program.backward) for op in wanted_operations(phase, wanted)]

    plain = _PLAIN.among(programs)
    operator_s = (seconds_of(plain.id) - function_s) / len(running(plain))
    if not bench.kernels:
        return round(operator_s * 1e6, 2), None
    fused = _FUSED.among(programs)
    dims = bench.launching.dims
    kernels = [op for op in running(fused) if isinstance(op, Fused)]
    launches = [KERNELS[op.kernel].launches_at(dims["T"], columns_of(op, dims)) for op in kernels]
    operators = len(running(fused)) - len(launches)
    kernel_s = (seconds_of(fused.id) - function_s - operators * operator_s) / sum(launches)
    return round(operator_s * 1e6, 2), round(kernel_s * 1e6, 2)


def _read(path: Path, source: str) -> Profile | None:
    """A profile that an earlier run began, if there is one."""
    label = f"--output: {shorten(str(path))}"
    data = read_if_there(path, label=label, limit=MAX_PROFILE_BYTES, kind="profile")
    if data is None:
        return None
    try:
        profile = read_profile(parse_toml(data))
    except ValueError as error:
        raise SpecError(f"{label} is no profile: {error}") from None
    if profile.source != source:
        raise SpecError(f"{label} is not of this machine: its source is {shorten(profile.source)}; give another file")
    return profile


def _write(path: Path, profile: Profile) -> None:
    """Write a profile, whole or not at all."""
    staged = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.unlink(missing_ok=True)  # whatever it is: to open a FIFO would wait for a reader
        with staged.open("x", encoding="utf-8") as file:
            file.write(render_profile(profile))
        staged.replace(path)
    except OSError as error:
        raise SpecError(f"--output: cannot write {shorten(str(path))}: {reason(error)}") from None


def _plain(name: str) -> str:
    """A driver's name as a title."""
    return re.sub(r"[^A-Za-z0-9 ()@.,:+/_-]", " ", name)[:60]


def _source(device: torch.device) -> str:
    software = f"torch {torch.__version__}"
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        software += f", Triton {version('triton')}"
    return f"measured by runlora-gen tune on {machine_name(device)}, {software}"


def _progress(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, quiet=quiet),
    )
