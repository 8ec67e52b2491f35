"""The check of the cost model: predicted against measured time of all variants, end to end, and what a choice costs.

    python tools/validate_cost_model.py measure --device cuda -o tools/results/variants_h200_bf16.json
    python tools/validate_cost_model.py report tools/results/variants_h200_bf16.json --profile h200 --figure docs/x.png

``measure`` runs forward and backward of every enumerated program, and of the ten predicted fastest with every choice
of kernels for single products; on a GPU as the replay of a CUDA graph, all of a shape interleaved in random order.
``report`` prices the same programs from a device profile and prints, for each shape, the rank correlation of
predicted and measured times (Spearman) and the regret: the time of the chosen program over that of the fastest which
the same constraints allow. Likewise for the criterion flops, which is the paper's: the mean over the programs that
have the least FLOPs, over the fastest; among all programs, and among torch's alone. Shapes whose very sizes are in
the profile are left out of the summary.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from runlora_gen.algebra.enumerate import Program
from runlora_gen.algebra.operations import Fused
from runlora_gen.algebra.work import work
from runlora_gen.cost.lower import choices, with_kernels
from runlora_gen.cost.price import price
from runlora_gen.cost.setting import Setting
from runlora_gen.emit.code import tiles_key
from runlora_gen.emit.kernel_notes import kernel_constants
from runlora_gen.measure.clock import captured, interleaved, seconds
from runlora_gen.measure.machine import machine_name
from runlora_gen.measure.modules import one_choice, render_module
from runlora_gen.measure.problem import TORCH_DTYPES, Point, Problem
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import enumerated, programs_for
from runlora_gen.search.choose import decide
from runlora_gen.search.criterion import Priced

FROZEN = "frozen"
LEAST_S = 2e-4
#: Shapes that no tuning grid holds: Llama's sizes from 60m to 70b, TOKENS:INxOUT:RANK.
SHAPES = {
    "cuda": (
        "512:512x1376:8 16384:1376x512:64 1024:768x768:16 2048:768x2560:64 4096:2560x768:32 16384:768x2560:8 "
        "2048:2048x5461:8 8192:5461x2048:32 12288:2560x6848:16 1024:3200x3200:8 4096:3200x8640:32 "
        "512:4096x4096:16 2048:4096x4096:8 4096:4096x4096:64 16384:4096x4096:16 1000:4096x11008:16 3072:4096x11008:64 "
        "8192:11008x4096:8 6144:4096x11008:512 2048:8192x1024:16 8192:8192x1024:64 512:8192x1024:512 "
        "1024:28672x8192:16 4096:28672x8192:8"
    ),
    "cpu": (
        "512:512x1376:8 2048:1376x512:32 512:768x768:16 2048:768x768:128 512:768x2560:64 512:512x384:256 3000:768x512:8"
    ),
}
_TICKS = (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5)
#: So many of the programs that are predicted fastest are also run with every choice of kernels for single products.
LOWERED = 10


def workload_for(dtype: str, profile: str) -> Workload:
    """Everything allowed that loses no updates, as the device alone sees it."""
    return Workload(dtype=dtype, adapter_dtype=dtype, device=profile, launch="graph")


def variants(program: Program, setting: Setting) -> list[Program]:
    """A program with every choice of kernels for its single products."""
    return [with_kernels(program, chosen) for chosen in choices(program, setting)]


def candidates(workload: Workload, setting: Setting) -> list[Program]:
    """All enumerated programs with torch's products, and those with kernels in their place that may be the fastest."""
    plain = enumerated(workload, setting)
    found = {program.id: program for program in plain}
    pairs = zip(plain, programs_for(workload, setting), strict=True)
    fastest = sorted(pairs, key=lambda pair: price(pair[1], setting).time_s)[:LOWERED]
    if any(program.kernels for program in plain):
        for program, _ in fastest:
            found |= {variant.id: variant for variant in variants(program, setting)}
    return list(found.values())


def measure_shape(
    module: ModuleType,
    programs: Sequence[Program],
    point: Point,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
) -> dict[str, float]:
    """Seconds of a step of every program, and of the frozen linear."""
    torch.manual_seed(0)
    problem = Problem(point, device, dtype)
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    steps: dict[str, Callable[[], object]] = {}
    calls: dict[str, int] = {}
    for name in (FROZEN, *(program.id for program in programs)):
        run = functools.partial(problem.step, module, None if name == FROZEN else name)
        if device.type == "cuda":
            once = captured(run, pool=pool)
            once()
            calls[name] = max(1, math.ceil(LEAST_S / seconds(once, device)))
            steps[name] = once if calls[name] == 1 else captured(run, calls[name], pool=pool)
        else:
            run()
            calls[name], steps[name] = 1, run
    times = interleaved(steps, rounds, device)
    return {name: statistics.median(values) / calls[name] for name, values in times.items()}


def measure(options: argparse.Namespace) -> None:
    """Run all variants on all shapes; results are written after every shape."""
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    modules: dict[frozenset[str], ModuleType] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(options.shapes.split()):
            point = Point.parse(text)
            workload = workload_for(options.dtype, options.profile)
            setting = point.setting(workload)
            programs = candidates(workload, setting)
            # A module of many variants takes seconds to make: one serves all shapes that have the same programs.
            ids = frozenset(program.id for program in programs)
            if ids not in modules:
                decision = replace(
                    decide(workload, setting),
                    candidates=tuple(Priced(program, price(program, setting)) for program in programs),
                )
                place = Path(folder) / f"m{number}"
                choice = one_choice(point.layer, workload, decision)
                modules[ids] = render_module(choice, point.rank, workload, place, all_variants=True)
            module = modules[ids]
            tiles: Any = getattr(module, "_TILES", {})
            for operation in {op for p in programs for op in p.operations if isinstance(op, Fused)}:
                tiles[tiles_key(operation)] = kernel_constants(operation, setting)
            times = measure_shape(module, programs, point, device, TORCH_DTYPES[options.dtype], options.rounds)
            rows.append({"shape": text, "us": {name: round(time * 1e6, 2) for name, time in times.items()}})
            print(f"{text}: {len(times)} steps, frozen {times[FROZEN] * 1e6:.1f} us", file=sys.stderr, flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            options.output.write_text(json.dumps(_report(options, rows)) + "\n", encoding="utf-8")


def _report(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = sorted({name for row in rows for name in row["us"]})
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine_name(torch.device(options.device)),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "names": names,
        "rows": [{"shape": row["shape"], "us": [row["us"].get(name) for name in names]} for row in rows],
    }


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, the mean rank for ties."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    for _, group in itertools.groupby(enumerate(order, 1), key=lambda pair: values[pair[1]]):
        members = list(group)
        for _, index in members:
            found[index] = statistics.mean(position for position, _ in members)
    return found


def judge(row: dict[str, float], text: str, dtype: str, profile: str) -> dict[str, Any]:
    """Predicted against measured on one shape."""
    workload = workload_for(dtype, profile)
    setting = Point.parse(text).setting(workload)
    programs = {program.id: program for base in enumerated(workload, setting) for program in variants(base, setting)}
    measured = {name: time for name, time in row.items() if name in programs}
    predicted = {name: price(programs[name], setting).time_s * 1e6 for name in measured}
    allowed = {
        name for name in measured if not (setting.dtype.half and programs[name].lossy_in_16_bit)
    }  # as decide() allows
    best = min(allowed, key=measured.__getitem__)
    result: dict[str, Any] = {
        "shape": text,
        "programs": len(measured),
        "spearman": statistics.correlation(
            ranks([predicted[n] for n in measured]), ranks([measured[n] for n in measured])
        ),
        "frozen": row[FROZEN],
        "points": [(predicted[name], measured[name]) for name in measured],
        "tuned": _tuned(setting),
    }
    chosen = decide(workload, setting).chosen.program
    # Of the choices of kernels for single products only some were run; else torch's products stand for them.
    result["chosen"] = chosen.id if chosen.id in measured else chosen.plain_id
    result["time"] = measured[result["chosen"]] / measured[best]
    # FLOPs can't tell those apart that have the fewest: any of them may be taken.
    for kind, names in (("flops", allowed), ("torch_flops", {n for n in allowed if not programs[n].kernels})):
        flops = {name: price(programs[name], setting).flops for name in names}
        least = [measured[name] for name in names if flops[name] == min(flops.values())]
        result[kind] = statistics.mean(least) / min(measured[name] for name in names)
    return result


def _tuned(setting: Setting) -> bool:
    """Whether the profile was measured at this very shape."""
    dims = tuple(setting.dims[d] for d in "TIO")
    times = setting.device.meter.times_for(setting.dtype.name)
    return any(at == dims for at, _ in times.get(work(setting.derivation.base[0]), ()))


def report(options: argparse.Namespace) -> None:
    """Print the table in Markdown, and draw the figure."""
    data = json.loads(options.results.read_text(encoding="utf-8"))
    judged = []
    for row in data["rows"]:
        times = {name: time for name, time in zip(data["names"], row["us"], strict=True) if time is not None}
        judged.append(judge(times, row["shape"], data["dtype"], options.profile))
    print("| tokens, in→out, rank | programs | Spearman | chosen by time | regret | by FLOPs | by FLOPs, torch only |")
    print("|---|---|---|---|---|---|---|")
    for j in judged:
        point = Point.parse(j["shape"])
        mark = " (tuned on)" if j["tuned"] else ""
        print(
            f"| {point.tokens}, {point.in_features}→{point.out_features}, {point.rank}{mark} "
            f"| {j['programs']} | {j['spearman']:.3f} "
            f"| {j['chosen']} | {j['time']:.3f} | {j['flops']:.3f} | {j['torch_flops']:.3f} |"
        )
    held = [j for j in judged if not j["tuned"]]
    for criterion in ("time", "flops", "torch_flops"):
        regrets = [j[criterion] for j in held]
        print(f"\nregret by {criterion}: median {statistics.median(regrets):.3f}, worst {max(regrets):.3f}", end="")
    correlations = [j["spearman"] for j in held]
    print(f"\nSpearman: median {statistics.median(correlations):.3f}, least {min(correlations):.3f}")
    if options.figure:
        draw(judged, data, options.figure)


def draw(judged: list[dict[str, Any]], data: dict[str, Any], path: Path) -> None:
    """One point a variant: predicted and measured time over the frozen linear's measured time."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 6), layout="constrained")
    for j in judged:
        predicted, measured = ([point[i] / j["frozen"] for point in j["points"]] for i in range(2))
        axes.scatter(predicted, measured, s=3, alpha=0.5, linewidths=0)
    low, high = axes.get_xlim()[0], max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], color="black", linewidth=0.8)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="predicted time ÷ frozen linear",
        ylabel="measured time ÷ frozen linear",
        xticks=_TICKS,
        yticks=_TICKS,
        title=f"{sum(j['programs'] for j in judged)} steps on {len(judged)} shapes, {data['machine']}, {data['dtype']}",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="run all variants")
    measuring.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    measuring.add_argument("--dtype", choices=TORCH_DTYPES)
    measuring.add_argument(
        "--profile", help="device profile: which kernels' constants and single-product kernels to run"
    )
    measuring.add_argument("--shapes", help="TOKENS:INxOUT:RANK, separated by spaces")
    measuring.add_argument("--rounds", type=int, default=7)
    measuring.add_argument("-o", "--output", type=Path, required=True)
    measuring.set_defaults(run=measure)
    reporting = commands.add_parser("report", help="predicted against measured")
    reporting.add_argument("results", type=Path)
    reporting.add_argument("--profile", required=True)
    reporting.add_argument("--figure", type=Path)
    reporting.set_defaults(run=report)
    options = parser.parse_args()
    if options.run is measure:
        on_gpu = options.device == "cuda"
        options.dtype = options.dtype or ("bf16" if on_gpu else "fp32")
        options.profile = options.profile or ("h200" if on_gpu else "cpu")
        options.shapes = options.shapes or SHAPES[options.device]
    options.run(options)


if __name__ == "__main__":
    main()
