"""What is chosen for the catalogue, at which price: a table that refactorings must leave as it is.

``python tests/record.py`` writes it anew, which takes half an hour of one core; test_record.py compares.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

from runlora_gen.algebra.paper import paper_labels
from runlora_gen.request.architecture import architecture_names, load_architecture
from runlora_gen.request.layers import layers
from runlora_gen.request.workload import CHOICES, Workload
from runlora_gen.search.choose import Decision
from runlora_gen.search.criterion import Priced
from runlora_gen.search.ranges import decide_model

TABLE = Path(__file__).with_name("record.json")

#: Architecture, rank, launch and criterion.
Case = tuple[str, int, str, str]


def cases() -> list[Case]:
    """All that are recorded."""
    return list(itertools.product(architecture_names(), (8, 64), ("eager", "graph"), CHOICES["criterion"]))


def chosen(case: Case) -> list[dict[str, Any]]:
    """Of every layer shape: the choice over token counts, the count of candidates, and a digest of all prices."""
    name, rank, launch, criterion = case
    workload = Workload(launch=launch, criterion=criterion)
    table = []
    for choice in decide_model(workload, layers(load_architecture(name)), rank):
        decided = choice.with_all(workload).ranges[-1].decision
        table.append(
            {
                "layer": choice.layer.name,
                "ranges": [_range(part.decision, part.last_tokens) for part in choice.ranges],
                "forwards": [
                    [part.last_tokens, part.decision.chosen.name, part.decision.fallback.name]
                    for part in choice.forwards
                ],
                "candidates": choice.ranges[-1].decision.programs,
                "prices": _digest(decided),
            }
        )
    return table


def _range(decision: Decision, last_tokens: int | None) -> list[Any]:
    chosen, fallback = decision.chosen, decision.fallback
    runner_up = decision.runner_up and decision.runner_up.program.id
    return [last_tokens, chosen.program.id, fallback.program.id, runner_up, round(decision.host_share, 9)]


def _digest(decision: Decision) -> str:
    def line(priced: Priced) -> str:
        cost = priced.cost
        exact = (cost.flops, cost.bytes_moved, cost.launches, cost.saved_bytes, cost.workspace_bytes)
        # Sums in another order differ in their last bits.
        near = (f"{value:.9g}" for value in (cost.device_s, cost.host_s, cost.update_error))
        on_front = priced.program.id in decision.front
        return " ".join(map(str, (priced.program.id, *paper_labels(priced.program), *exact, *near, on_front)))

    return _short("\n".join(map(line, decision.candidates)))


def recorded(case: Case) -> dict[str, str]:
    """The same in short, by the layer shape."""
    return {row["layer"]: _short(json.dumps(row)) for row in chosen(case)}


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read() -> dict[str, dict[str, str]]:
    """The table, by the words of a case."""
    table: dict[str, dict[str, str]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def key(case: Case) -> str:
    """A case in words."""
    return " ".join(map(str, case))


if __name__ == "__main__":
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(recorded, cases(), chunksize=4)
        rows = {key(case): result for case, result in zip(cases(), results, strict=True)}
    lines = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
