"""Where the time of a step of a model's layers goes: kernels by what they are for, and the clock and power meanwhile.

    python tools/profile_model.py --shape 8b --steps frozen:compiled,ours-bf16:compiled --json profile.json

The steps of tools/bench_model.py, each run back to back until the device is as warm as in training, then timed, then
recorded by torch's profiler. A step is named by a contender, or ``frozen``, and a mode. Needs transformers and peft
(the bench extra), and a GPU.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_model import MODES, SHAPES, Bench, checkpointed
from contenders import CONTENDERS, FROZEN, origin
from runlora_gen.measure.clock import Run

#: What kernels are for, by their names: the first that fits.
GROUPS = {
    "attention": r"cudnn|fmha|flash|attention",
    "between gate, up and down": r"mlp_activate|silu",
    "products": r"fused_gemm|nvjet|gemm",
    "LoRA's own passes": r"^_(p_db|pt_x|x_at|dx_da|sum_parts|add_parts)",
    "norms, rotary embeddings, sums": r"",
}
#: Of those that take the most.
MOST = 25
WARM_S = 2.0


def state_of_device() -> dict[str, float]:
    """Its clock in MHz and its power in W; nothing where nvidia-smi does not say."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
        clock, power = (float(value) for value in said.splitlines()[0].split(","))
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return {}
    return {"mhz": clock, "watts": power}


def sustained(run: Run) -> dict[str, Any]:
    """Seconds of a step back to back with others, when the device is warm; and its state amid them."""
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_S:
        run()
        torch.cuda.synchronize()
    count, start = 12, time.perf_counter()
    for _ in range(count):
        run()
    state = state_of_device()
    torch.cuda.synchronize()
    return {"ms": round((time.perf_counter() - start) / count * 1e3, 3), **state}


def recorded(run: Run, folder: Path, steps: int = 4) -> dict[str, Any]:
    """What the profiler says of some steps: milliseconds a step of each kernel, and of each group."""
    for _ in range(steps):
        run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    events = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    times: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for event in events:
        times[event["name"]] += event["dur"]
        counts[event["name"]] += 1
    span = max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)
    groups: collections.Counter[str] = collections.Counter()
    for name, us in times.items():
        groups[next(group for group, pattern in GROUPS.items() if re.search(pattern, name))] += us
    each = 1e-3 / steps
    return {
        "busy_ms": round(sum(times.values()) * each, 3),
        "span_ms": round(span * each, 3),
        "groups_ms": {group: round(groups[group] * each, 3) for group in GROUPS},
        "kernels": [
            {"name": name[:120], "ms": round(us * each, 3), "count": counts[name] / steps}
            for name, us in times.most_common(MOST)
        ],
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table of the groups, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--steps", default="frozen:compiled,ours-bf16:compiled", help="comma list of CONTENDER:MODE")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args(arguments)
    steps = [tuple(text.split(":")) for text in options.steps.split(",")]
    for step in steps:
        if len(step) != 2 or step[0] not in (FROZEN, *CONTENDERS) or step[1] not in MODES:
            known = f"{FROZEN} or some of {', '.join(CONTENDERS)}, and one of {', '.join(MODES)}"
            parser.error(f"--steps: {':'.join(step)} is not allowed; give CONTENDER:MODE, of {known}")
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    device = torch.device("cuda")
    setup = argparse.Namespace(
        contender=[CONTENDERS[name] for name in dict.fromkeys(name for name, _ in steps) if name != FROZEN],
        base="plain",
        profile=None,
        axolotl=None,
    )
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(options.shape, setup, folder, device)
        for contender, mode in steps:
            title = FROZEN if contender == FROZEN else CONTENDERS[contender].title
            layers = bench.steps[title]
            with checkpointed([layers], MODES[mode].checkpointing):
                run = layers.run(MODES[mode], "inductor")
                results[f"{title}, {mode}"] = {**sustained(run), **recorded(run, folder)}
            layers.forget()
            torch._dynamo.reset()
    print(f"{'ms':<34}" + "".join(f"{number:>9}" for number in range(1, len(results) + 1)))
    for group in GROUPS:
        print(f"{group:<34}" + "".join(f"{result['groups_ms'][group]:>9.2f}" for result in results.values()))
    for key in ("busy_ms", "ms", "mhz", "watts"):
        print(f"{key:<34}" + "".join(f"{result.get(key, float('nan')):>9.2f}" for result in results.values()))
    for number, title in enumerate(results, 1):
        print(f"{number}: {title}")
    if options.json:
        report = {
            **origin(device),
            "shape": options.shape,
            "steps": results,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
