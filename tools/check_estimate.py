"""``runlora-gen estimate`` against measured steps: the tables of docs/estimate.md.

    python tools/check_estimate.py

Reads what tools/bench_model.py and tools/bench_plans.py wrote, and runs nothing but the estimate: no torch, no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from runlora_gen.algebra.experts import ACTIVATED, COMBINED
from runlora_gen.forecast.estimate import Batch, Estimate, Ways, estimate, steps_of
from runlora_gen.request.architecture import Architecture, architecture_of, decoder_types, family_projections
from runlora_gen.request.decoder import Decoder, Router
from runlora_gen.request.experts import Stack
from runlora_gen.request.workload import Workload

RESULTS = Path(__file__).parent / "results" / "model_h100.json"
#: Of mixtures of experts; of these shapes those that are estimated.
RESULTS_OF_EXPERTS = RESULTS.with_name("model_experts_h100.json")
#: With groups, MLPs as a whole and norms that keep their input as it is.
RESULTS_OF_BLOCKS = RESULTS.with_name("model_h200.json")
#: Gemma's, whose norms have an offset.
RESULTS_OF_GEMMA = RESULTS.with_name("model_gemma_h200.json")
#: Of tools/bench_plans.py.
RESULTS_OF_PLANS = RESULTS.with_name("plans_h200.json")
#: Contenders of the benchmark: how the estimate calls them, and their adapters' dtype.
CONTENDERS = {
    "frozen": ("frozen", "fp32"),
    "PEFT, 16-bit adapters": ("peft", "bf16"),
    "PEFT default (fp32 adapters, autocast)": ("peft", "fp32"),
    "ours": ("ours", "fp32"),
    "ours, 16-bit adapters": ("ours", "bf16"),
}
MODES = {"eager": False, "checkpointing": True}
#: Of tools/bench_plans.py's model.
VOCABULARY = 32000


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


def model(row: dict[str, Any], *, chained: bool = False) -> Architecture:
    """The layers that a row was measured on; ``chained``: with both projections of experts as a chain."""
    model_type, mixture = row.get("model_type", "llama"), bool(row.get("experts"))
    sizes = {
        "num_hidden_layers": row["layers"],
        "hidden_size": row["hidden"],
        "moe_intermediate_size" if mixture else "intermediate_size": row["intermediate"],
        "num_attention_heads": row["heads"],
        "num_key_value_heads": row["kv_heads"],
        "head_dim": row.get("head_dim") or row["hidden"] // row["heads"],
    }
    if not mixture:
        return replace(architecture_of({**sizes, "model_type": model_type}), name=row["shape"])
    linears = family_projections(sizes, model_type)
    decoder = Decoder(
        layers=row["layers"],
        hidden=row["hidden"],
        intermediate=row["intermediate"],
        heads=row["heads"],
        kv_heads=row["kv_heads"],
        head_dim=sizes["head_dim"],
        head_norms=True,
        vocab=None,
        tied=False,
        projections=linears,
        router=Router(normed=False, float32=False),
    )
    stacks = tuple(
        Stack(
            name,
            row["experts"],
            *features,
            gathers=name != "down_proj",
            top_k=row["top_k"],
            bias=False,
            count=row["layers"],
            activation="silu_gated" if chained else "",
        )
        for name, features in (
            ("gate_up_proj", (row["hidden"], 2 * row["intermediate"])),
            ("down_proj", (row["intermediate"], row["hidden"])),
        )
    )
    adapted = () if row.get("adapted") == "experts" else linears
    return Architecture(row["shape"], model_type, "live", adapted, decoder=decoder, stacks=stacks)


def _is_chained(result: dict[str, Any]) -> bool:
    """Whether modules made what is between the projections of experts: some of their ways are of no others."""
    ways = {way.name for way in ACTIVATED.table} - {way.name for way in COMBINED.table}
    return any(ways & set(re.split("[-/]", chosen)) for chosen in result.get("chosen", {}).values())


def compared(report: dict[str, Any]) -> Iterator[Compared]:
    """All rows, contenders and modes that the estimate knows."""
    for row in report["rows"]:
        if row.get("model_type", "llama") not in decoder_types():
            continue

        chosen = (name for result in row["results"].values() for name in result.get("chosen", {}))
        blocks = any(name.startswith("mlp_") for name in chosen)
        turned = any(result.get("rotary") for result in row["results"].values())

        @cache
        def guesses(adapter_dtype: str, checkpointing: bool, chained: bool) -> dict[str, Estimate]:
            tokens = (row["batch"] * row["sequence"],)  # noqa: B023  # called within this round
            fields = {"adapter_dtype": adapter_dtype, "device": report["profile"]}
            if not blocks:  # noqa: B023  # what was measured are lone linears, and norms as Transformers has them
                fields |= {"groups": "none", "norms": "none"}
            if not turned:  # noqa: B023  # before rotary embeddings were made in one kernel
                fields |= {"rotary": "none"}
            workload = Workload(tokens=tokens, **fields)
            batch = Batch(row["batch"], row["sequence"], checkpointing=checkpointing, body=True)  # noqa: B023
            return estimate(model(row, chained=chained), row["rank"], workload, batch)  # noqa: B023

        for contender, (way, adapter_dtype) in CONTENDERS.items():
            result = row["results"].get(contender, {})
            for mode, checkpointing in MODES.items():
                measured = result.get(mode, {})
                if "median_ms" not in measured:
                    continue
                guess = guesses(adapter_dtype, checkpointing, _is_chained(result))[way]
                yield Compared(
                    row["shape"],
                    contender,
                    mode,
                    measured["median_ms"],
                    guess.time_s * 1e3,
                    measured["peak_bytes"],
                    guess.memory.step,
                )


def planned(report: dict[str, Any]) -> Iterator[Compared]:
    """Steps of plans, and frozen ones, with head and loss; peaks are of all that is there."""
    shape = report["shape"]
    layers = model({**shape, "shape": shape["name"]})
    assert layers.decoder is not None
    whole = replace(layers, decoder=replace(layers.decoder, vocab=VOCABULARY))
    tokens = (shape["batch"] * shape["sequence"],)
    rotary = "auto" if any(row.get("rotary") for row in report["results"].values()) else "none"
    workload = Workload(tokens=tokens, adapter_dtype="bf16", device=report["profile"], rotary=rotary)
    for title, row in report["results"].items():
        batch = Batch(shape["batch"], shape["sequence"], checkpointing=title.endswith("checkpointing"))
        steps = steps_of(whole, shape["rank"], workload, batch)
        if title.startswith("frozen"):
            guess = steps.frozen()
        else:
            guess = steps.ours(Ways(row["checkpointed"], row["remade"], row["renormed"]))
        yield Compared(
            shape["name"], title, "eager", row["median_ms"], guess.time_s * 1e3, row["peak_bytes"], guess.memory.peak
        )


def table(rows: list[Compared]) -> str:
    """For people."""
    head = "| | ms, measured | estimated | off | peak MiB, measured | estimated | off |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *(row.row() for row in rows)])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results",
        type=Path,
        nargs="*",
        default=[RESULTS, RESULTS_OF_EXPERTS, RESULTS_OF_BLOCKS, RESULTS_OF_GEMMA, RESULTS_OF_PLANS],
        help="what tools/bench_model.py wrote, or tools/bench_plans.py",
    )
    options = parser.parse_args()
    for file in options.results:
        report = json.loads(file.read_text(encoding="utf-8"))
        rows = list(compared(report) if "rows" in report else planned(report))
        print(table(rows))
        for name, values in (("time", [r.time_off for r in rows]), ("peak", [r.peak_off for r in rows])):
            print(f"{name}: at most {max(map(abs, values)):.1%} off")


if __name__ == "__main__":
    main()
