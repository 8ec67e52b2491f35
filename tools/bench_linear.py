"""Time and memory of one LoRA linear, forward and backward: generated modules against their rivals.

All contenders run interleaved, round-robin, in one process on the same inputs; what is reported is the ratio to the
frozen linear and to PEFT in the same round (median, least, most), because clocks drift. Run:

    python tools/bench_linear.py --arch llama-250m --rank 8,128 --tokens 2048 --dtype fp32 --json OUT.json
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from runlora_gen.emit.nodes import module_name
from runlora_gen.emit.package import build_package
from runlora_gen.spec.architecture import load_architecture
from runlora_gen.spec.layers import Layer, layers
from runlora_gen.spec.workload import Workload
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REFERENCE = "peft"
FLOOR = "frozen"


class PlainLoRA(nn.Module):
    """PEFT's formula, as autograd differentiates it, without PEFT's bookkeeping."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Parameter(torch.randn_like(linear.weight[:rank]) * 0.01)
        self.lora_B = nn.Parameter(torch.randn_like(linear.weight[:, :rank]) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        base: Tensor = self.linear(x)
        return base + F.linear(F.linear(x, self.lora_A), self.lora_B) * 1.0


def contenders(linear: nn.Linear, rank: int, generated: ModuleType) -> dict[str, nn.Module]:
    """Everything that is compared, over one shared frozen linear."""
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.layer import Linear as PeftLinear

    ours = generated.LoRALinear.from_linear(linear, r=rank, lora_alpha=rank)
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0)
    peft = PeftLinear(linear, adapter_name="default", config=config, r=rank, lora_alpha=rank)
    peft.to(linear.weight.dtype)
    for parameter in (ours.lora_B, *(layer.weight for layer in peft.lora_B.values())):
        nn.init.normal_(parameter, std=0.01)  # zeros would be timed otherwise
    return {FLOOR: linear, "plain": PlainLoRA(linear, rank), REFERENCE: peft, "generated": ours}


def step(module: nn.Module, x: Tensor, grad_output: Tensor) -> None:
    """One forward and backward, with fresh gradients."""
    x.grad = None
    module.zero_grad(set_to_none=True)
    module(x).backward(grad_output)


def seconds(run: Callable[[], None]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward, beside the parameters; a tensor saved twice counts once."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.append(tensor)  # so that no address is used twice
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(kept.values())


def peak_bytes(module: nn.Module, x: Tensor, grad_output: Tensor) -> int:
    """Peak of bytes that torch's CPU allocator hands out during one step, above its start, gradients included."""
    x.grad = None
    module.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(module, x, grad_output)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def generate(arch: str, layer: Layer, rank: int, workload: Workload) -> tuple[ModuleType, str]:
    """Generate and import the module of one layer shape; also the id of the chosen variant."""
    package = build_package(load_architecture(arch).restricted(layer.projections), rank, workload)
    name = module_name(layer, rank)
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(package.files[f"{name}.py"], f"{name}.py", "exec"), module.__dict__)
    ranges = next(ranges for found, ranges in package.layers if found.name == layer.name)
    return module, ranges[-1].decision.chosen.program.id


def measure(
    layer: Layer, rank: int, tokens: int, dtype: torch.dtype, generated: ModuleType, rounds: int
) -> dict[str, Any]:
    """All contenders on one shape."""
    torch.manual_seed(0)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=dtype).requires_grad_(False)
    modules = contenders(linear, rank, generated)
    x = torch.randn(1, tokens, layer.in_features, dtype=dtype, requires_grad=True)
    grad_output = torch.randn(1, tokens, layer.out_features, dtype=dtype)
    times: dict[str, list[float]] = {name: [] for name in modules}
    for number in range(rounds + 2):
        # Each round starts with another contender: nobody always runs after the same one.
        names = list(modules)[number % len(modules) :] + list(modules)[: number % len(modules)]
        for name in names:
            elapsed = seconds(lambda module=modules[name]: step(module, x, grad_output))  # type: ignore[misc]
            if number >= 2:
                times[name].append(elapsed)
    results: dict[str, Any] = {}
    for name, module in modules.items():
        results[name] = {
            "median_ms": round(statistics.median(times[name]) * 1e3, 3),
            **{f"over_{other}": spread(times[name], times[other]) for other in (FLOOR, REFERENCE)},
            "saved_bytes": saved_bytes(module, x),
            "peak_bytes": peak_bytes(module, x, grad_output),
        }
    return results


def spread(times: list[float], others: list[float]) -> dict[str, float]:
    """Ratios round by round: median, least, most."""
    ratios = [ours / theirs for ours, theirs in zip(times, others, strict=True)]
    return {
        "median": round(statistics.median(ratios), 4),
        "min": round(min(ratios), 4),
        "max": round(max(ratios), 4),
    }


def environment() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{len(models)} x {models[0]}" if models else cpu
    versions = {name: importlib.metadata.version(name) for name in ("torch", "peft", "runlora-gen")}
    return {"cpu": cpu, "threads": torch.get_num_threads(), "python": platform.python_version(), "versions": versions}


def print_row(row: dict[str, Any]) -> None:
    """One shape for people."""
    print(f"{row['shape']} rank {row['rank']}  chosen {row['chosen']}")
    for name, result in row["results"].items():
        floor, peft = result[f"over_{FLOOR}"], result[f"over_{REFERENCE}"]
        print(
            f"  {name:<10} {result['median_ms']:8.2f} ms  x frozen {floor['median']:.3f} [{floor['min']:.3f}, "
            f"{floor['max']:.3f}]  x {REFERENCE} {peft['median']:.3f} [{peft['min']:.3f}, {peft['max']:.3f}]  "
            f"saved {result['saved_bytes'] / 2**20:.2f} MiB  peak {result['peak_bytes'] / 2**20:.2f} MiB"
        )


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="llama-250m")
    parser.add_argument("--rank", default="8,128", help="comma list")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--profile", default="cpu", help="device profile that the choice is made for")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for rank in map(int, options.rank.split(",")):
        for layer in layers(load_architecture(options.arch)):
            # Never keep more than PEFT: the input and x lora_Aᵀ.
            limit = options.tokens * (layer.in_features + rank) * DTYPES[options.dtype].itemsize
            workload = Workload(
                tokens=(options.tokens,), dtype=options.dtype, device=options.profile, max_saved_bytes=limit
            )
            module, chosen = generate(options.arch, layer, rank, workload)
            result = measure(layer, rank, options.tokens, DTYPES[options.dtype], module, options.rounds)
            rows.append({"shape": layer.name, "rank": rank, "count": layer.count, "chosen": chosen, "results": result})
            print_row(rows[-1])
    ratios = [row["results"]["generated"][f"over_{REFERENCE}"]["median"] for row in rows]
    print(f"mean over {REFERENCE}: {statistics.mean(ratios):.3f}, worst {max(ratios):.3f}")
    if options.json:
        report = {"date": datetime.date.today().isoformat(), **vars(options), **environment(), "rows": rows}
        report["json"] = None
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
