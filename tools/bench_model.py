"""A training step of Llama's layers as Transformers runs them: frozen, and with generated modules in all linears.

    python tools/bench_model.py --shapes 13b,8b,1b --json tools/results/step_h100.json

All contenders are timed in rounds, in random order, on the same random inputs with one attention for all; what is
reported is the ratio to the frozen step of the same round (median, least, most). Also what host and device need of a
step by themselves (the host: until everything is launched; the device: the replay of a CUDA graph), and the same of the
frozen linears alone, whose difference to the frozen step is what the model does beside its linears. Needs a GPU, and
transformers (the bench extra).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from runlora_gen.measure.clock import Run, captured, interleaved, repeated, seconds
from runlora_gen.measure.machine import machine_name
from runlora_gen.measure.memory import peak_bytes
from runlora_gen.measure.modules import import_file, render_module
from runlora_gen.ranges import decide_model
from runlora_gen.spec.layers import Layer
from runlora_gen.spec.workload import Workload
from torch import Tensor, nn

FROZEN = "frozen"
#: Steps back to back in one timing: as in training, the host may run ahead of the device.
STEPS = 3


@dataclass(frozen=True)
class Shape:
    """A part of a model, and a batch."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    batch: int
    sequence: int
    rank: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.sequence

    @property
    def sites(self) -> tuple[Layer, ...]:
        """Its linears by shape."""
        kv = self.hidden // self.heads * self.kv_heads
        counts: dict[tuple[int, int], int] = {}
        for size in (
            *((self.hidden, out) for out in (self.hidden, kv, kv, self.hidden)),
            *[(self.hidden, self.intermediate)] * 2,
            (self.intermediate, self.hidden),
        ):
            counts[size] = counts.get(size, 0) + self.layers
        return tuple(Layer(*size, False, count, ("linear",)) for size, count in counts.items())


SHAPES = {
    "13b": Shape(5120, 13824, 40, 40, layers=3, batch=2, sequence=2048, rank=8),
    "8b": Shape(4096, 14336, 32, 8, layers=4, batch=4, sequence=4096, rank=16),
    "1b": Shape(2048, 8192, 32, 8, layers=8, batch=1, sequence=1024, rank=16),
}


def causal(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> tuple[Tensor, None]:
    """One attention for all contenders: Transformers picks another kernel where it builds a mask."""
    output = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=options.get("scaling"), enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2).contiguous(), None


def llama(shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Layers with random weights, frozen."""
    transformers, masking = (import_module(name) for name in ("transformers", "transformers.masking_utils"))
    transformers.AttentionInterface.register("causal", causal)
    masking.AttentionMaskInterface.register("causal", lambda *args, **options: None)
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.layers,
        vocab_size=32,
        attn_implementation="causal",
        use_cache=False,
        dtype=dtype,
    )
    with device:
        model: nn.Module = transformers.LlamaModel(config).to(dtype)
    return model.requires_grad_(False)


def with_modules(model: nn.Module, modules: dict[tuple[int, int], Any], rank: int) -> None:
    """Put generated layers in place of all linears."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            layer = modules[linear.in_features, linear.out_features].LoRALinear.from_linear(linear, rank, rank)
            nn.init.normal_(layer.lora_B, std=0.01)  # zeros would be timed otherwise
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)


def step(model: Callable[..., Any], trained: Sequence[Tensor], x: Tensor, grad_output: Tensor) -> None:
    """Forward and backward, with fresh gradients."""
    for leaf in (x, *trained):
        leaf.grad = None
    model(inputs_embeds=x).last_hidden_state.backward(grad_output)


def host_seconds(run: Run, rounds: int = 7) -> float:
    """What the host needs to launch a step on an idle device."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


def device_seconds(run: Run, device: torch.device, rounds: int = 7) -> float:
    """What the device needs of a step, replayed as a graph."""
    replay = captured(run, warmups=3)
    replay()
    return statistics.median(seconds(replay, device) for _ in range(rounds))


def linears_alone(model: nn.Module, shape: Shape, device: torch.device, dtype: torch.dtype) -> Run:
    """Forward and backward of all frozen linears, and of nothing else."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    xs, gradients = (
        {size: torch.randn(shape.tokens, size, device=device, dtype=dtype) for size in sizes}
        for sizes in ({linear.in_features for linear in linears}, {linear.out_features for linear in linears})
    )
    inputs = {size: x.requires_grad_() for size, x in xs.items()}

    def run() -> None:
        for linear in linears:
            x = inputs[linear.in_features]
            torch.autograd.grad(linear(x), x, gradients[linear.out_features])

    return run


def generated(shape: Shape, workload: Workload, folder: Path) -> tuple[dict[tuple[int, int], Any], dict[str, str]]:
    """Modules by the sizes of their linears, and what was chosen for each."""
    modules, chosen = {}, {}
    for choice in decide_model(workload, shape.sites, shape.rank):
        layer = choice.layer
        modules[layer.in_features, layer.out_features] = render_module(
            choice, shape.rank, workload, folder / f"{folder.name}_{layer.name}"
        )
        chosen[layer.name] = choice.ranges[-1].decision.chosen.program.id
    return modules, chosen


def measure(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All contenders on one shape."""
    shape, device, dtype = SHAPES[name], torch.device("cuda"), torch.bfloat16
    torch.manual_seed(0)
    workload = Workload(tokens=(shape.tokens,), device=options.profile)
    workloads = {
        "generated": workload,
        "generated for graphs": replace(workload, launch="graph"),
        "generated, torch only": replace(workload, kernels=False),
        "generated for graphs, 16-bit adapters": replace(workload, launch="graph", adapter_dtype="bf16"),
    }
    x = torch.randn(shape.batch, shape.sequence, shape.hidden, device=device, dtype=dtype, requires_grad=True)
    grad_output = torch.randn_like(x)
    models: dict[str, nn.Module] = {FROZEN: llama(shape, device, dtype)}
    results: dict[str, Any] = {FROZEN: {}}
    packages = {
        contender: generated(shape, load, folder / f"{name}_{number}")
        for number, (contender, load) in enumerate(workloads.items())
    }
    for text in options.rival:
        contender, _, path = text.partition("=")
        files = Path(path).glob("linear_*.py")
        loaded = [import_file(file, f"rival_{contender.replace(' ', '_')}_{file.stem}") for file in files]
        packages[contender] = ({(m.IN_FEATURES, m.OUT_FEATURES): m for m in loaded}, {})
    for contender, (modules, chosen) in packages.items():
        if not all((site.in_features, site.out_features) in modules for site in shape.sites):
            continue
        models[contender] = llama(shape, device, dtype)
        with_modules(models[contender], modules, shape.rank)
        results[contender] = {"chosen": chosen}
    trained = {c: [p for p in model.parameters() if p.requires_grad] for c, model in models.items()}
    runs: dict[str, Run] = {
        c: functools.partial(step, model, trained[c], x, grad_output) for c, model in models.items()
    }
    for run in runs.values():
        repeated(run, 3)()
    for contender, run in runs.items():
        results[contender]["host_ms"] = round(host_seconds(run) * 1e3, 3)
        results[contender]["peak_bytes"] = peak_bytes(run, device)
    modes: dict[str, dict[str, Run]] = {"eager": {**runs}}
    if options.compiled:
        modes["compiled"] = {
            c: functools.partial(step, torch.compile(model), trained[c], x, grad_output) for c, model in models.items()
        }
        for run in modes["compiled"].values():
            repeated(run, 3)()
    for mode, contenders in modes.items():
        many = {contender: repeated(run, STEPS) for contender, run in contenders.items()}
        times = interleaved(many, options.rounds, device, warmups=1, eager=True)
        for contender, values in times.items():
            ratios = [mine / frozen for mine, frozen in zip(values, times[FROZEN], strict=True)]
            results[contender][mode] = {
                "median_ms": round(statistics.median(values) / STEPS * 1e3, 3),
                "over_frozen": {
                    "median": round(statistics.median(ratios), 4),
                    "min": round(min(ratios), 4),
                    "max": round(max(ratios), 4),
                },
            }
    for contender, run in runs.items():
        results[contender]["device_ms"] = round(device_seconds(run, device) * 1e3, 3)
    alone = linears_alone(models[FROZEN], shape, device, dtype)
    repeated(alone, 3)()
    linears = {
        "host_ms": round(host_seconds(alone) * 1e3, 3),
        "device_ms": round(device_seconds(alone, device) * 1e3, 3),
    }
    rest = {
        kind: round((results[FROZEN][f"{kind}_ms"] - linears[f"{kind}_ms"]) / linears[f"{kind}_ms"], 3)
        for kind in ("host", "device")
    }
    return {"shape": name, **vars(shape), "linears_alone": linears, "rest_over_linears": rest, "results": results}


def print_row(row: dict[str, Any]) -> None:
    """One shape for people."""
    print(f"{row['shape']}: beside its linears × {row['rest_over_linears']}")
    for contender, result in row["results"].items():
        modes = "  ".join(
            f"{mode} {result[mode]['median_ms']:8.2f} ms x {result[mode]['over_frozen']['median']:.3f}"
            for mode in ("eager", "compiled")
            if mode in result
        )
        alone = f"host {result['host_ms']:7.2f}  device {result['device_ms']:7.2f} ms"
        print(f"  {contender:<38} {modes}  {alone}  peak {result['peak_bytes'] / 2**20:.0f} MiB", flush=True)


def measured_before(path: Path | None, report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of the same day, machine and versions, by their shapes: a run of some shapes keeps the others'."""
    former = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {"rows": []}
    if any(former.get(name) != value for name, value in report.items()):
        return {}
    return {row["shape"]: row for row in former["rows"]}


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma list of " + ", ".join(SHAPES))
    parser.add_argument("--profile", default="h100", help="device profile that the choice is made for")
    parser.add_argument("--rival", action="append", default=[], metavar="NAME=FOLDER", help="other generated modules")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compiled", action="store_true", help="also under torch.compile")
    parser.add_argument("--json", type=Path, help="where to write the results, after every shape")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine_name(torch.device("cuda")),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers")},
        "profile": options.profile,
    }
    rows = measured_before(options.json, report)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.shapes.split(","):
            rows[name] = measure(name, options, Path(folder))
            torch.cuda.empty_cache()
            print_row(rows[name])
            if options.json:
                text = json.dumps({**report, "rows": list(rows.values())}, indent=1)
                options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
