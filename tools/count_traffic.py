"""Launches and bytes of every operation, as a GPU's counters see them, beside what they are priced at.

    ncu --profile-from-start off --metrics dram__bytes_read.sum,dram__bytes_write.sum --print-units base --csv \
        --log-file traffic.csv python tools/count_traffic.py run
    python tools/count_traffic.py report traffic.csv --json tools/results/traffic_h100_bf16.json

``run`` runs each operation of the table once, as the line of code that a module holds, in bf16 and with cold caches
(the profiler flushes them), with a kernel between two operations that ``report`` knows. The tensors are larger than the
cache; what of the results is still there when a kernel ends is not counted as written.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
from pathlib import Path
from typing import Any

import torch
from runlora_gen.algebra.operations import Fused, Operation
from runlora_gen.cost.device import load_device
from runlora_gen.cost.measured import setting_at
from runlora_gen.cost.roofline import roofline
from runlora_gen.cost.setting import DTYPES
from runlora_gen.measure.machine import machine_name
from runlora_gen.measure.problem import Point
from runlora_gen.measure.tune import Trial
from runlora_gen.measure.tune import _Workbench as Workbench

POINT = Point(16384, 5120, 5120, 16)
#: The kernel that stands between two operations: torch's, which spins.
MARK = "spin_kernel"


def run() -> None:
    """Run all operations between marks, each once where the profiler looks."""
    device: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    with Workbench(torch.device("cuda")) as bench:
        for operation in bench._operations:
            trial = Trial(operation)
            call = bench.runner(trial, bench.sets(POINT, [trial], torch.bfloat16)[:1], torch.bfloat16)
            call()
            torch.cuda.synchronize()
            device.cudaProfilerStart()
            call()
            torch.cuda._sleep(1000)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            device.cudaProfilerStop()


def report(path: Path) -> dict[str, Any]:
    """What was counted of each operation, and what it is priced at."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith('"ID"'))
    segments: list[dict[str, dict[str, float]]] = [{}]
    for row in csv.DictReader(lines[start:]):
        if MARK in row["Kernel Name"]:
            if segments[-1]:
                segments.append({})
            continue
        counters = segments[-1].setdefault(row["ID"], {"name": row["Kernel Name"][:60]})  # type: ignore[dict-item]
        counters[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    with Workbench(torch.device("cuda")) as bench:
        operations: tuple[Operation, ...] = bench._operations
    rows = []
    for operation, kernels in zip(operations, segments, strict=False):
        setting = setting_at(POINT.dims, DTYPES["bf16"], load_device("h100"))
        priced = roofline(operation, setting)
        rows.append(
            {
                "operation": _printed(operation),
                "kernel": isinstance(operation, Fused),
                "priced": {"launches": priced.launches, "bytes": priced.bytes_moved},
                "counted": {
                    "launches": len(kernels),
                    "read": round(sum(k["dram__bytes_read.sum"] for k in kernels.values())),
                    "written": round(sum(k["dram__bytes_write.sum"] for k in kernels.values())),
                },
                "names": [str(kernel["name"]) for kernel in kernels.values()],
            }
        )
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine_name(torch.device("cuda")),
        "torch": torch.__version__,
        "dtype": "bf16",
        "at": POINT.dims,
        "rows": rows,
    }


def _printed(operation: Operation) -> str:
    return f"{operation.kernel}: {operation.formula}" if isinstance(operation, Fused) else operation.formula


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="run all operations; under ncu")
    reporting = commands.add_parser("report", help="what was counted, beside the prices")
    reporting.add_argument("csv", type=Path, help="what ncu wrote")
    reporting.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.command == "run":
        run()
        return
    data = report(options.csv)
    if options.json:
        options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    for row in data["rows"]:
        counted, priced = row["counted"], row["priced"]
        total = counted["read"] + counted["written"]
        print(
            f"{row['operation']:<44} launches {counted['launches']} ({priced['launches']})  "
            f"{total / 2**20:8.1f} MiB ({priced['bytes'] / 2**20:8.1f})  x {total / priced['bytes']:.3f}"
        )


if __name__ == "__main__":
    main()
