"""Plans for a budget of memory: steps of a whole model, as they were predicted and as they are.

    python tools/bench_plans.py --shape 8b --points 6 --json tools/results/plans_h200.json

A language model of Transformers with random weights, head and loss. From its front of plans some are taken, evenly, the
fastest and the least among them; each is the budget of a model of its own, which ``accelerate`` plans. All are timed in
rounds, in random order, with the frozen step, whose gradient flows through all layers, and with that under
checkpointing. Peaks are of all that is there, with weights, adapters and their gradients, as a budget has them.

Needs transformers and peft (the bench extra), and a GPU but for the tiny shape.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import runlora_gen
import torch
from bench_model import SHAPES, Shape, ratios
from check_estimate import VOCABULARY
from contenders import causal, origin, peft_model, unformatted
from runlora_gen.forecast.estimate import Batch, Estimate, steps_of
from runlora_gen.forecast.plan import every_plan, front
from runlora_gen.from_model.live import read_model
from runlora_gen.generation import profile_of
from runlora_gen.measure.clock import interleaved
from runlora_gen.measure.memory import peak_bytes
from runlora_gen.request.workload import Workload
from torch import Tensor, nn

FROZEN, CHECKPOINTED = "frozen", "frozen, checkpointing"


class Step:
    """Forward and backward of a language model."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self._ids = model.train(), ids

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        output = self.model(input_ids=self._ids, labels=self._ids)
        output.loss.backward()  # with logits that are still there, as a plan has it

    def peak(self, device: torch.device) -> int:
        """With weights, adapters and their gradients."""
        self.model.zero_grad(set_to_none=True)
        peak = peak_bytes(self, device)
        self.model.zero_grad(set_to_none=True)
        return peak + sum(p.numel() * p.element_size() for p in self.model.parameters())


def built(shape: Shape, device: torch.device) -> nn.Module:
    """The same weights each time, frozen."""
    transformers, masking = (import_module(name) for name in ("transformers", "transformers.masking_utils"))
    transformers.AttentionInterface.register("causal", causal)
    masking.AttentionMaskInterface.register("causal", lambda *args, **options: None)
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.layers,
        vocab_size=VOCABULARY,
        attn_implementation="causal",
        use_cache=False,
    )
    torch.manual_seed(0)
    with device:
        model: nn.Module = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    return model.requires_grad_(False)


def flowing(model: Any) -> nn.Module:
    """A frozen model through all of whose layers the gradient flows."""
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model  # type: ignore[no-any-return]


def predicted(estimate: Estimate) -> dict[str, float]:
    """Milliseconds, and bytes."""
    return {"ms": round(estimate.time_s * 1e3, 3), "peak_bytes": estimate.memory.peak}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [name for name, shape in SHAPES.items() if not shape.experts]
    parser.add_argument("--shape", default="8b", choices=shapes)
    parser.add_argument("--layers", type=int, help="of the model [those of the shape]")
    parser.add_argument("--points", type=int, default=6, help="plans that are measured")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--profile", help="device profile that plans are priced for [this device's]")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    shape = SHAPES[options.shape]
    shape = replace(shape, layers=options.layers or shape.layers)
    ids = torch.randint(VOCABULARY, (shape.batch, shape.sequence), device=device)
    frozen = built(shape, device)
    profile = options.profile or profile_of(frozen)[0]
    fields: dict[str, Any] = {"adapter_dtype": "bf16", "device": profile}
    workload, batch = Workload(tokens=(shape.tokens,), **fields), Batch(shape.batch, shape.sequence)
    steps = steps_of(read_model(frozen).architecture, shape.rank, workload, batch)
    points = front(every_plan(steps))
    count = min(options.points, len(points))
    chosen = [points[round(at * (len(points) - 1) / max(1, count - 1))] for at in range(count)]
    runs = {FROZEN: Step(flowing(frozen), ids), CHECKPOINTED: Step(flowing(built(shape, device)), ids)}
    runs[CHECKPOINTED].model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    every = replace(batch, checkpointing=True)
    rows: dict[str, dict[str, Any]] = {
        FROZEN: {"predicted": predicted(steps.frozen())},
        CHECKPOINTED: {
            "predicted": predicted(steps_of(read_model(frozen).architecture, shape.rank, workload, every).frozen())
        },
    }
    with tempfile.TemporaryDirectory() as folder, unformatted():
        for number, plan in enumerate(chosen):
            model = peft_model(built(shape, device), shape.rank, wide=False)
            report = runlora_gen.accelerate(
                model,
                Path(folder) / str(number),
                tokens=shape.tokens,
                sequence=shape.sequence,
                memory_budget=plan.estimate.memory.peak,
                **fields,
            )
            title = f"plan {number + 1}"
            runs[title] = Step(model, ids)
            rows[title] = {
                **asdict(plan.ways),
                "norms": report.norms,
                "rotary": report.rotary,
                "predicted": predicted(plan.estimate),
            }
    for run in runs.values():
        run()
        run()
    for title, run in runs.items():
        rows[title]["peak_bytes"] = run.peak(device)
    times = interleaved(runs, options.rounds, device, eager=True)
    print(f"{'':<22}{'ms':>9}{'predicted':>11}{'x frozen':>10}{'peak MiB':>10}{'predicted':>11}")
    for title, row in rows.items():
        row |= {"median_ms": round(statistics.median(times[title]) * 1e3, 3)}
        row |= {"over_frozen": ratios(times[title], times[FROZEN])}
        foreseen = row["predicted"]
        print(
            f"{title:<22}{row['median_ms']:>9.2f}{foreseen['ms']:>11.2f}{row['over_frozen']['median']:>10.3f}"
            f"{row['peak_bytes'] / 2**20:>10.0f}{foreseen['peak_bytes'] / 2**20:>11.0f}"
        )
    if options.json:
        report = {
            **origin(device, profile),
            "rounds": options.rounds,
            "shape": {"name": options.shape, **{k: v for k, v in asdict(shape).items() if v is not None}},
            "results": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
