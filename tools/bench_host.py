"""What the host needs: of a launch, and of a LoRA linear forward and backward, eager and compiled.

    python tools/bench_host.py --profile h100 --json tools/results/host_h100.json

Launches are timed in a loop, each call on the same tensors, against torch's ``addmm(out=)`` in the same rounds, in
random order: as they are made, and through Triton's Python (what a version of Triton is left with whose C function is
not known). Linears are timed in a chain of them, all forwards before all backwards as in a model, so that autograd's
thread does not alternate with the main one: microseconds of the host a linear, of the frozen linear, of the plain
formula in autograd, of an autograd function that does nothing, and of generated variants. The device is idle before
each timing and has less to do than the host. On a CPU
the tool runs, and says nothing.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import triton
from runlora_gen.measure.clock import repeated
from runlora_gen.measure.machine import machine_name
from runlora_gen.measure.modules import module_of_everything
from runlora_gen.measure.problem import Nothing
from runlora_gen.measure.tune import host_figures
from runlora_gen.request.workload import Workload
from torch import Tensor, nn

DTYPE = torch.bfloat16
#: Calls in a timing of launches, and linears in a chain.
CALLS, LINEARS = 200, 12
#: Variants of a linear: all kernels, those that matter, and torch's products alone.
VARIANTS = (
    "fused/fused-pt_x-one_pass/keep-s/kernel-s-da",
    "fused/fused-pt_x-one_pass/keep-s",
    "base_first/base_first-pt_x-dyt_s/keep-s",
)
Step = Callable[[Tensor], Tensor]


def host_seconds(run: Callable[[], object]) -> float:
    """Seconds until a call has launched all, the device idle before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rounds(runs: Mapping[str, Callable[[], object]], number: int, share: int) -> dict[str, list[float]]:
    """Microseconds of each, a ``share`` of a call, in rounds of random order; the first three warm up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for again in range(number + 3):
        for name in random.sample(list(runs), len(runs)):
            seconds = host_seconds(runs[name])
            if again >= 3:
                found[name].append(seconds / share * 1e6)
    return found


def against(found: Mapping[str, list[float]], base: str) -> dict[str, Any]:
    """Medians, and the ratios to one of them in the same rounds: median, least, most."""
    rows = {}
    for name, times in found.items():
        ratios = [one / other for one, other in zip(times, found[base], strict=True)]
        over = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        rows[name] = {
            "us": round(statistics.median(times), 2),
            f"over {base}": {key: round(value, 3) for key, value in over.items()},
        }
    return rows


def launches(module: ModuleType, X: Tensor, W: Tensor, A: Tensor, B: Tensor) -> dict[str, Callable[[], object]]:
    """Calls of each kernel, and of torch's GEMM."""
    S, out = X @ A.t(), X @ W.t()
    dY = torch.randn_like(out)
    calls: dict[str, Callable[[], object]] = {
        "addmm(out=)": lambda: torch.addmm(out, X, W.t(), out=out),
        "mm": lambda: X @ W.t(),
        "fused_gemm": lambda: module._fused_gemm(X, W, S, B, None, tiles="Y"),
        "x_at": lambda: module._x_at(X, A, 2.0, tiles="S"),
        "p_db": lambda: module._p_db(dY, B, S, 2.0, DTYPE, tiles="P, dB"),
        "pt_x": lambda: module._pt_x(S, X, DTYPE, tiles="dA"),
    }
    for call in calls.values():
        call()
    return {name: repeated(call, CALLS) for name, call in calls.items()}


def chains(module: ModuleType, X: Tensor, weights: list[tuple[Tensor, nn.Parameter, nn.Parameter]]) -> dict[str, Step]:
    """Contenders: each maps the input of a chain to its output."""
    apply: Any = Nothing.apply

    def nothing(h: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        output: Tensor = apply(h, weight, lora_A, lora_B)
        return output

    def generated(variant: str, h: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        output: Tensor = module.lora_linear(h, weight, lora_A, lora_B, scaling=2.0, variant=variant)
        return output

    def chain(linear: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Step:
        def run(h: Tensor) -> Tensor:
            for weight, lora_A, lora_B in weights:
                h = linear(h, weight, lora_A, lora_B)
            return h

        return run

    found = {
        "frozen": chain(lambda h, W, A, B: F.linear(h, W)),
        "plain formula": chain(lambda h, W, A, B: F.linear(h, W) + F.linear(F.linear(h, A), B) * 2.0),
        "empty function": chain(nothing),
    }
    for variant in VARIANTS:
        found[variant] = chain(functools.partial(generated, variant))
    return found


def measure_chains(
    steps: Mapping[str, Step], X: Tensor, weights: list[tuple[Tensor, nn.Parameter, nn.Parameter]], number: int
) -> dict[str, Any]:
    """Microseconds of the host a linear, forward and backward."""
    x = X.clone().requires_grad_()
    grad = torch.randn_like(X)

    def step(run: Step) -> None:
        run(x).backward(grad)  # type: ignore[no-untyped-call]
        x.grad = None
        for _, lora_A, lora_B in weights:
            lora_A.grad = lora_B.grad = None

    runs = {name: functools.partial(step, run) for name, run in steps.items()}
    return against(rounds(runs, number, LINEARS), "frozen")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="h100", help="device profile that constants are chosen for")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the tool")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--width", type=int, default=2048, help="in_features and out_features")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--no-compile", action="store_true", help="eager steps alone")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    workload = Workload(device=options.profile, launch="graph", dtype="bf16", adapter_dtype="bf16")

    def draw(*shape: int) -> Tensor:
        drawn: Tensor = torch.randn(shape, device=options.device, dtype=DTYPE) * shape[-1] ** -0.5
        return drawn

    width, rank = options.width, options.rank
    X = draw(options.tokens, width)
    weights = [
        (draw(width, width), nn.Parameter(draw(rank, width)), nn.Parameter(draw(width, rank))) for _ in range(LINEARS)
    ]
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine_name(X.device),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "shape": {"tokens": options.tokens, "width": width, "rank": rank, "dtype": "bf16"},
    }
    with tempfile.TemporaryDirectory() as folder:
        module: Any = module_of_everything(workload, Path(folder) / "direct")
        W, A, B = weights[0][0], weights[0][1].detach(), weights[0][2].detach()
        with torch.no_grad():
            runs = launches(module, X, W, A, B)
            through: Any = module_of_everything(workload, Path(folder) / "through")
            through._direct = lambda *_: None
            runs |= {
                f"{name}, through Triton": run for name, run in launches(through, X, W, A, B).items() if "_" in name
            }
            results["launch"] = against(rounds(runs, options.rounds, CALLS), "addmm(out=)")
        steps = chains(module, X, weights)
        results["eager"] = measure_chains(steps, X, weights, options.rounds)
        if not options.no_compile:
            del steps["empty function"]
            compiled = {name: torch.compile(run, fullgraph=True) for name, run in steps.items()}
            results["compiled"] = measure_chains(compiled, X, weights, options.rounds)
        if options.device == "cuda":
            results["of a profile"] = host_figures(options.device)
    for part in ("launch", "eager", "compiled"):
        for name, row in results.get(part, {}).items():
            median, least, most = next(value for key, value in row.items() if key.startswith("over")).values()
            print(f"{part:9} {name:46} {row['us']:7.2f} us  x {median:.2f} ({least:.2f}-{most:.2f})")
    for name, figure in results.get("of a profile", {}).items():
        print(f"profile   {name:46} {figure:7.2f} us")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
