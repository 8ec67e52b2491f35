"""Time of one LoRA linear on a base of 4 bits: generated modules against PEFT's layer and bitsandbytes' own linear.

    python tools/bench_quantized.py --shapes 2048:5120x5120,8192:5120x5120,8192:5120x13824 --rank 16
        --json tools/results/quantized_h100.json

All contenders share the codes of one weight, which bitsandbytes quantized, its scales too. They run interleaved, in
random order, on the same random inputs, eagerly and as replays of CUDA graphs; what is reported is the ratio to the
frozen linear of the same round: bitsandbytes' own, and one that makes its weight by the generated kernel. A step is
forward and backward; ``forward`` is one without gradients. ``ways`` are variants asked for by what they do: with the
update added to the weight before its one rounding (``in_pass``), or to the product (``fused``).

Beside them the kernels alone: what it takes to make a weight, and a weight with the update in it, over the time in
which their bytes are read and written at the rate of the device's memory.

Needs bitsandbytes and PEFT, and a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import statistics
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from bench_linear import environment, peft_linear_of_4_bits, spread, train
from runlora_gen.algebra.lookup import Asked
from runlora_gen.cost.device import load_device
from runlora_gen.cost.lower import lowered
from runlora_gen.cost.price import price
from runlora_gen.measure.clock import Run, captured, interleaved, repeated
from runlora_gen.measure.memory import peak_bytes, saved_bytes
from runlora_gen.measure.modules import module_of_everything, one_choice, render_module
from runlora_gen.measure.problem import Point
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import enumerated
from runlora_gen.search.choose import Decision
from runlora_gen.search.criterion import Priced
from runlora_gen.search.ranges import decide_model
from torch import Tensor, nn

FLOOR = "frozen"
OWN_FLOOR = "frozen, weight by the generated kernel"
_BACKWARD = {"dA": "pt_x", "dB": "one_pass", "P": "one_pass"}
#: Variants by what they do.
WAYS = {
    "fused, fused": Asked({"Y": "fused", "dX": "fused", **_BACKWARD}, keeps=("S",)),
    "in_pass, fused": Asked({"Y": "merged", "M": "in_pass", "dX": "fused", **_BACKWARD}),
    "in_pass, in_pass": Asked({"Y": "merged", "M": "in_pass", "dX": "merged", **_BACKWARD}),
}
#: Steps back to back in one timing.
STEPS = 4
#: Calls of a kernel in one timing, each on another weight: the cache holds none of them.
CALLS = 8


class FrozenStep(torch.autograd.Function):
    """Y = X Wᵀ and dX = dY W, W made of its codes in both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, made: Callable[[], Tensor]) -> Tensor:
        ctx.made = made
        return F.linear(x, made())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output @ ctx.made(), None


class Frozen(nn.Module):
    """A frozen linear of 4 bits, whose weight the kernel of a generated module makes."""

    def __init__(self, linear: Any, module: ModuleType) -> None:
        super().__init__()
        self.weight = linear.weight
        self._made = functools.partial(module._dequantize, module.Quantized.of(linear.weight), tiles="W")

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        output: Tensor = FrozenStep.apply(x, self._made)  # type: ignore[no-untyped-call]
        return output


def quantized_linear(point: Point, dtype: torch.dtype, base: str) -> Any:
    """bitsandbytes' linear of 4 bits, random, its scales quantized too."""
    from bitsandbytes.nn.modules import Linear4bit

    linear: Any = Linear4bit(  # type: ignore[no-untyped-call]
        point.in_features, point.out_features, bias=False, compute_dtype=dtype, quant_type=base
    )
    nn.init.normal_(linear.weight, std=0.02)
    return linear.to(dtype).cuda().requires_grad_(False)


def asked(point: Point, workload: Workload, everything: Decision, asked: Asked, folder: Path) -> ModuleType:
    """The module of one variant."""
    setting = everything.setting
    program = lowered(asked.among(enumerated(workload, setting)), setting)
    candidate = Priced(program, price(program, setting))
    decision = replace(everything, chosen=candidate, fallback=candidate)
    return render_module(one_choice(point.layer, workload, decision), point.rank, workload, folder)


def timed(
    made: Mapping[str, nn.Module],
    x: Tensor,
    grad_output: Tensor,
    rounds: int,
    floors: Mapping[str, str],
    *,
    eager_alone: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """Times in each mode, with the ratios to the frozen linears of the same rounds, and what is kept and needed.

    Args:
        made: all contenders, by their titles.
        x, grad_output: of a step.
        rounds: of each mode.
        floors: the frozen linears, by what the ratios to them are called.
        eager_alone: contenders that no graph can hold.
    """
    results: dict[str, dict[str, Any]] = {name: {} for name in made}

    def forward(module: nn.Module) -> None:
        with torch.no_grad():
            module(x)

    steps = {name: functools.partial(train, module, x, grad_output) for name, module in made.items()}
    able = [name for name in made if name not in eager_alone]
    modes: dict[str, dict[str, Run]] = {"eager": {**steps}}
    modes["graph"] = {name: captured(steps[name], warmups=3) for name in able}
    modes["forward"] = {name: captured(functools.partial(forward, made[name]), warmups=3) for name in able}
    for mode, runs in modes.items():
        many = {name: repeated(run, STEPS) for name, run in runs.items()}
        times = interleaved(many, rounds, x.device, warmups=2, eager=mode == "eager")
        for name, values in times.items():
            results[name][mode] = {
                "median_us": round(statistics.median(values) / STEPS * 1e6, 1),
                **{f"over_{key}": spread(values, times[of]) for key, of in floors.items()},
            }
    for name, module in made.items():
        results[name]["saved_bytes"] = saved_bytes(functools.partial(module, x), [*module.parameters(), x])
        results[name]["peak_bytes"] = peak_bytes(steps[name], x.device)
        x.grad = None
        module.zero_grad(set_to_none=True)
    return results


def shown(result: Mapping[str, Any]) -> str:
    """The modes of a contender, for people."""
    return "  ".join(
        f"{mode} {result[mode]['median_us']:8.1f} us x {result[mode]['over_frozen']['median']:.3f} "
        f"({result[mode]['over_own']['median']:.3f})"
        for mode in ("eager", "graph", "forward")
        if mode in result
    )


def measure(point: Point, workload: Workload, folder: Path, rounds: int) -> dict[str, Any]:
    """All contenders at one size."""
    torch.manual_seed(0)
    dtype, device = torch.bfloat16, torch.device("cuda")
    linear = quantized_linear(point, dtype, workload.base)
    choice = decide_model(workload, (point.layer,), point.rank, alone=True)[0]
    decision = choice.ranges[-1].decision
    generated = {"generated": render_module(choice, point.rank, workload, folder / "chosen")}
    for number, (name, way) in enumerate(WAYS.items()):
        generated[name] = asked(point, workload, decision, way, folder / f"way_{number}")
    makers: dict[str, Callable[[], nn.Module]] = {
        FLOOR: lambda: linear,
        OWN_FLOOR: lambda: Frozen(linear, generated["fused, fused"]),
        "peft": lambda: peft_linear_of_4_bits(linear, point.rank, dtype),
        "peft fp32 adapters": lambda: peft_linear_of_4_bits(linear, point.rank, torch.float32),
    }

    def ours(module: ModuleType) -> nn.Module:
        layer: Any = module.LoRALinear.from_linear(linear, point.rank, point.rank)
        nn.init.normal_(layer.lora_B, std=0.01)
        assert isinstance(layer, nn.Module)
        return layer

    makers |= {name: functools.partial(ours, module) for name, module in generated.items()}
    x = torch.randn(1, point.tokens, point.in_features, dtype=dtype, device=device, requires_grad=True)
    grad_output = torch.randn(1, point.tokens, point.out_features, dtype=dtype, device=device)
    made = {name: make() for name, make in makers.items()}
    results = timed(made, x, grad_output, rounds, {"frozen": FLOOR, "own": OWN_FLOOR})
    return {
        "tokens": point.tokens,
        "shape": f"{point.in_features}x{point.out_features}",
        "rank": point.rank,
        "chosen": decision.chosen.program.id,
        "results": results,
    }


def all_of(make: Callable[[int], Tensor]) -> Run:
    """A replay of ``CALLS`` calls, which are told their number."""

    def run() -> None:
        for number in range(CALLS):
            make(number)

    return captured(run, warmups=3)


def kernels_alone(point: Point, workload: Workload, folder: Path, rounds: int) -> dict[str, Any]:
    """What it takes to make a weight, in microseconds and over the time of its bytes."""
    from bitsandbytes.functional import dequantize_4bit

    dtype, device = torch.bfloat16, torch.device("cuda")
    module = module_of_everything(workload, folder / "everything")
    linears = [quantized_linear(point, dtype, workload.base) for _ in range(CALLS)]
    codes = [module.Quantized.of(linear.weight) for linear in linears]
    lora_A = torch.randn(point.rank, point.in_features, device=device, dtype=dtype)
    lora_B = torch.randn(point.out_features, point.rank, device=device, dtype=dtype)

    runs = {
        "bitsandbytes": all_of(lambda n: dequantize_4bit(linears[n].weight.data, linears[n].weight.quant_state)),
        "dequantize": all_of(lambda n: module._dequantize(codes[n], tiles="W")),
        "dequantize_merged": all_of(lambda n: module._dequantize_merged(codes[n], lora_A, lora_B, 0.5, tiles="M")),
    }
    times = interleaved(runs, rounds, device, warmups=2)
    count = point.in_features * point.out_features
    limit = count * (0.5 + 1 / 64 + 2) / load_device(workload.device).bytes_per_s
    return {
        name: {
            "median_us": round(statistics.median(values) / CALLS * 1e6, 2),
            "over_bytes": round(statistics.median(values) / CALLS / limit, 3),
        }
        for name, values in times.items()
    }


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="2048:5120x5120,8192:5120x5120,8192:5120x13824")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--base", default="nf4", choices=("nf4", "fp4"))
    parser.add_argument("--profile", default="h100")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = {"date": datetime.date.today().isoformat(), **environment()}
    report["versions"]["bitsandbytes"] = importlib.metadata.version("bitsandbytes")
    report |= {"base": options.base, "profile": options.profile}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for number, text in enumerate(options.shapes.split(",")):
            point = Point.parse(text, options.rank)
            workload = Workload(
                tokens=(point.tokens,), adapter_dtype="bf16", device=options.profile, launch="graph", base=options.base
            )
            folder = Path(name) / f"shape_{number}"
            row = measure(point, workload, folder, options.rounds)
            row["kernels"] = kernels_alone(point, workload, folder, options.rounds)
            rows.append(row)
            print(f"{row['tokens']} tokens, {row['shape']}, rank {row['rank']}: {row['chosen']}; {row['kernels']}")
            for title, result in row["results"].items():
                print(f"  {title:<40} {shown(result)}  peak {result['peak_bytes'] / 2**20:.0f} MiB", flush=True)
            if options.json:
                options.json.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
