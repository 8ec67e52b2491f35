"""What each idea costs or saves: keep S, M or nothing; merged, split or fused; in time and memory, over shapes.

    python tools/ablation.py --device cuda --json tools/results/ablation_h200_bf16.json --figure docs/ablation_h200.png

All variants of a shape run interleaved in random order on the same inputs, on a GPU as replayed CUDA graphs. Prints a
Markdown table of the ratio to the frozen linear in the same round (median), the saved bytes and the peak of one step.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from runlora_gen.algebra.enumerate import Program
from runlora_gen.algebra.lookup import Asked
from runlora_gen.algebra.operations import Fused
from runlora_gen.cost.price import price
from runlora_gen.cost.setting import Setting
from runlora_gen.measure.clock import captured, interleaved
from runlora_gen.measure.machine import machine_name
from runlora_gen.measure.memory import peak_bytes, saved_bytes
from runlora_gen.measure.modules import one_choice, render_module
from runlora_gen.measure.problem import TORCH_DTYPES, Point, Problem
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import enumerated
from runlora_gen.search.choose import decide
from runlora_gen.search.criterion import Priced

FROZEN = "frozen linear"
_SPLIT = {"Y": "base_first", "dX": "base_first", "dA": "pt_x", "dB": "dyt_s"}
_MERGED = {**_SPLIT, "Y": "merged", "dX": "merged"}
_FUSED = {**_SPLIT, "Y": "fused", "dX": "fused", "dB": "one_pass"}
#: What is compared: how people call it, and the program.
VARIANTS = {
    "split, S kept": Asked(_SPLIT, keeps=("S",)),
    "split, S recomputed": Asked(_SPLIT),
    "split, low-rank product first, S kept": Asked({**_SPLIT, "Y": "lowrank_first", "dX": "lowrank_first"}, ("S",)),
    "merged, S and M kept": Asked(_MERGED, keeps=("S", "M")),
    "merged, M kept, S recomputed": Asked(_MERGED, keeps=("M",)),
    "merged, nothing kept": Asked(_MERGED),
    "full gradient, nothing kept": Asked({**_SPLIT, "dA": "bt_g", "dB": "g_at"}),
    "fused, S kept": Asked(_FUSED, keeps=("S",)),
    "fused GEMMs only, S kept": Asked({**_FUSED, "dB": "dyt_s"}, keeps=("S",)),
    "fused, nothing kept": Asked(_FUSED),
}
SHAPES = {
    "cuda": "2048:5120x5120 16384:5120x5120 8192:5120x13824 8192:13824x5120",
    "cpu": "256:768x768 2048:768x768 2048:768x2560 2048:2560x768",
}
ROUNDS = 15


def compared(workload: Workload, setting: Setting) -> dict[str, Program]:
    """The programs by their names; those with fused kernels where such can serve.

    Raises:
        ValueError: one of them is not there, or not one program.
    """
    programs = enumerated(workload, setting)
    served = {kernel for program in programs for kernel in program.kernels}

    def kernels_of(asked: Asked) -> set[str]:
        operations = (operation for way in asked.rows(setting.derivation) for operation in way.operations)
        return {operation.kernel for operation in operations if isinstance(operation, Fused)}

    return {name: asked.among(programs) for name, asked in VARIANTS.items() if kernels_of(asked) <= served}


def measure_shape(text: str, rank: int, dtype: str, profile: str, device: torch.device) -> dict[str, dict[str, float]]:
    """Time over the frozen linear, saved and peak bytes of every variant on one shape."""
    point = Point.parse(text, rank)
    workload = Workload(
        tokens=(point.tokens,),
        dtype=dtype,
        adapter_dtype=dtype,
        device=profile,
        launch="graph",
        allow_lossy_merge=True,
    )
    setting = point.setting(workload)
    programs = compared(workload, setting)
    decision = replace(
        decide(workload, setting),
        candidates=tuple(Priced(program, price(program, setting)) for program in programs.values()),
    )
    torch.manual_seed(0)

    problem = Problem(point, device, TORCH_DTYPES[dtype])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / text.replace(":", "_")
        module = render_module(one_choice(point.layer, workload, decision), rank, workload, place, all_variants=True)
        named: dict[str, str | None] = {FROZEN: None}
        named |= {name: program.id for name, program in programs.items()}
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        runs: dict[str, Callable[[], object]] = {}
        for name, variant in named.items():
            run = functools.partial(problem.step, module, variant)
            runs[name] = captured(run, pool=pool) if device.type == "cuda" else run
        times = interleaved(runs, ROUNDS, device, warmups=2)
        for variant in named.values():
            problem.step(module, variant)  # workspaces of libraries are there before memory is counted
        return {
            name: {
                "over_frozen": round(
                    statistics.median(a / b for a, b in zip(times[name], times[FROZEN], strict=True)), 4
                ),
                "us": round(statistics.median(times[name]) * 1e6, 1),
                "saved_bytes": saved_bytes(
                    functools.partial(problem.forward, module, variant),
                    (problem.weight, problem.lora_A, problem.lora_B),
                ),
                "peak_bytes": peak_bytes(functools.partial(problem.step, module, variant), device),
            }
            for name, variant in named.items()
        }


def print_table(rows: dict[str, dict[str, dict[str, float]]]) -> None:
    """One line a variant, one column a shape: time over frozen, saved MiB, peak MiB."""
    print("| | " + " | ".join(rows) + " |")
    print("|---|" + "---|" * len(rows))
    for name in (name for name in VARIANTS if any(name in results for results in rows.values())):
        cells = []
        for results in rows.values():
            cell = results.get(name)
            cells.append(
                f"{cell['over_frozen']:.2f} · {cell['saved_bytes'] / 2**20:.0f} · {cell['peak_bytes'] / 2**20:.0f}"
                if cell
                else "-"
            )
        print(f"| {name} | " + " | ".join(cells) + " |")


def draw_figure(rows: dict[str, dict[str, dict[str, float]]], title: str, path: Path) -> None:
    """Time over the frozen linear's, one panel a shape."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(rows), figsize=(3.2 * len(rows), 4), layout="constrained", sharey=True, squeeze=False
    )
    names = [name for name in VARIANTS if any(name in results for results in rows.values())]
    for panel, (shape, results) in zip(panels[0], rows.items(), strict=True):
        values = [results.get(name, {}).get("over_frozen", 0.0) for name in names]
        panel.barh(range(len(names)), values)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set(
            yticks=range(len(names)), yticklabels=names, xlabel="time ÷ frozen linear", title=shape, xlim=(0.9, None)
        )
    panels[0, 0].invert_yaxis()  # shared
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print the table, write JSON and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=TORCH_DTYPES)
    parser.add_argument("--profile", help="device profile whose kernel constants are used")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shapes", help="TOKENS:INxOUT, separated by spaces")
    parser.add_argument("--from-json", type=Path, help="draw an earlier run anew instead of measuring")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    if options.from_json:
        report: dict[str, Any] = json.loads(options.from_json.read_text(encoding="utf-8"))
    else:
        on_gpu = options.device == "cuda"
        dtype = options.dtype or ("bf16" if on_gpu else "fp32")
        profile = options.profile or ("h200" if on_gpu else "cpu")
        device = torch.device(options.device)
        rows = {
            shape: measure_shape(shape, options.rank, dtype, profile, device)
            for shape in (options.shapes or SHAPES[options.device]).split()
        }
        report = {
            "date": datetime.date.today().isoformat(),
            "machine": machine_name(device),
            "torch": torch.__version__,
            "dtype": dtype,
            "rank": options.rank,
            "rows": rows,
        }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_table(report["rows"])
    if options.figure:
        title = f"{report['machine']}, {report['dtype']}, rank {report['rank']}"
        draw_figure(report["rows"], title, options.figure)


if __name__ == "__main__":
    main()
