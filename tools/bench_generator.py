"""Wall time of whole generator processes: for a new user, for one who knows its functions formatted, and unchanged;
explanations of the largest architecture.

    python tools/bench_generator.py --json OUT.json

Of the generator that this Python has installed: from a checkout an unchanged run chooses anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GENERATE = ["--arch", "llama-13b", "--rank", "8", "-o"]
EXPLAIN = ["explain", "--arch", "llama-3.1-405b", "--rank", "8"]
#: Seconds of wall time that each may take.
TARGETS = {"cold": 1.2, "formatted before": None, "unchanged": 0.5, "explain": 2.0, "explain --all": None}


def run(arguments: list[str], cache: Path) -> float:
    """Seconds of one process of a user with this cache."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    start = time.perf_counter()
    command = [sys.executable, "-m", "runlora_gen", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in TARGETS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            out, cache = Path(folder) / "out", Path(folder) / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            for name in ("cold", "formatted before"):
                shutil.rmtree(out, ignore_errors=True)
                times[name].append(run([*GENERATE, str(out)], cache))
            times["unchanged"].append(run([*GENERATE, str(out)], cache))
            times["explain"].append(run(EXPLAIN, cache))
            times["explain --all"].append(run([*EXPLAIN, "--all"], cache))
    results: dict[str, Any] = {}
    for name, target in TARGETS.items():
        values = times[name]
        results[name] = {
            "median_s": round(statistics.median(values), 3),
            "min_s": round(min(values), 3),
            "max_s": round(max(values), 3),
            "target_s": target,
        }
        print(f"{name:<16} {results[name]}")
    if options.json:
        report = {"date": datetime.date.today().isoformat(), "python": platform.python_version(), "results": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
