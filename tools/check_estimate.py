"""``runlora-gen estimate`` against measured steps: the table of docs/estimate.md.

    python tools/check_estimate.py

Reads what tools/bench_model.py wrote, and runs nothing but the estimate: no torch, no GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from runlora_gen.forecast.estimate import Batch, Estimate, estimate
from runlora_gen.request.architecture import Architecture, family_projections
from runlora_gen.request.decoder import Decoder
from runlora_gen.request.workload import Workload

RESULTS = Path(__file__).parent / "results" / "model_h100.json"
#: Contenders of the benchmark: how the estimate calls them, and their adapters' dtype.
CONTENDERS = {
    "frozen": ("frozen", "fp32"),
    "PEFT, 16-bit adapters": ("peft", "bf16"),
    "PEFT default (fp32 adapters, autocast)": ("peft", "fp32"),
    "ours": ("ours", "fp32"),
    "ours, 16-bit adapters": ("ours", "bf16"),
}
MODES = {"eager": False, "checkpointing": True}


@dataclass(frozen=True)
class Compared:
    """One contender on one shape in one mode: milliseconds and bytes, measured and estimated."""

    shape: str
    contender: str
    mode: str
    measured_ms: float
    estimated_ms: float
    measured_bytes: int
    estimated_bytes: int

    @property
    def time_off(self) -> float:
        """Relative error."""
        return self.estimated_ms / self.measured_ms - 1

    @property
    def peak_off(self) -> float:
        """Relative error."""
        return self.estimated_bytes / self.measured_bytes - 1

    def row(self) -> str:
        """A line of the table."""
        mode = "" if self.mode == "eager" else f", {self.mode}"
        mib = (f"{value / 2**20:.0f}" for value in (self.measured_bytes, self.estimated_bytes))
        times = f"{self.measured_ms:.1f} | {self.estimated_ms:.1f} | {self.time_off:+.1%}"
        return f"| {self.shape}, {self.contender}{mode} | {times} | {' | '.join(mib)} | {self.peak_off:+.1%} |"


def model(row: dict[str, Any]) -> Architecture:
    """The layers that a row was measured on."""
    sizes = {
        "num_hidden_layers": row["layers"],
        "hidden_size": row["hidden"],
        "intermediate_size": row["intermediate"],
        "num_attention_heads": row["heads"],
        "num_key_value_heads": row["kv_heads"],
    }
    linears = family_projections(sizes, "llama")
    decoder = Decoder(
        layers=row["layers"],
        hidden=row["hidden"],
        intermediate=row["intermediate"],
        heads=row["heads"],
        kv_heads=row["kv_heads"],
        head_dim=row["hidden"] // row["heads"],
        head_norms=False,
        vocab=None,
        tied=False,
        projections=linears,
    )
    return Architecture(row["shape"], "llama", "live", linears, decoder=decoder)


def compared(report: dict[str, Any]) -> Iterator[Compared]:
    """All rows, contenders and modes that the estimate knows."""
    for row in report["rows"]:
        architecture = model(row)

        @cache
        def guesses(adapter_dtype: str, checkpointing: bool) -> dict[str, Estimate]:
            tokens = (row["batch"] * row["sequence"],)  # noqa: B023  # called within this round
            # What was measured are lone linears.
            fields = {"adapter_dtype": adapter_dtype, "device": report["profile"], "groups": "none"}
            workload = Workload(tokens=tokens, **fields)
            batch = Batch(row["batch"], row["sequence"], checkpointing=checkpointing, body=True)  # noqa: B023
            return estimate(architecture, row["rank"], workload, batch)  # noqa: B023

        for contender, (way, adapter_dtype) in CONTENDERS.items():
            result = row["results"].get(contender, {})
            for mode, checkpointing in MODES.items():
                measured = result.get(mode, {})
                if "median_ms" not in measured:
                    continue
                guess = guesses(adapter_dtype, checkpointing)[way]
                yield Compared(
                    row["shape"],
                    contender,
                    mode,
                    measured["median_ms"],
                    guess.time_s * 1e3,
                    measured["peak_bytes"],
                    guess.memory.step,
                )


def table(rows: list[Compared]) -> str:
    """For people."""
    head = "| | ms, measured | estimated | off | peak MiB, measured | estimated | off |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *(row.row() for row in rows)])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, help="what tools/bench_model.py wrote")
    options = parser.parse_args()
    rows = list(compared(json.loads(options.results.read_text(encoding="utf-8"))))
    print(table(rows))
    for name, values in (("time", [r.time_off for r in rows]), ("peak", [r.peak_off for r in rows])):
        print(f"{name}: at most {max(map(abs, values)):.1%} off")


if __name__ == "__main__":
    main()
