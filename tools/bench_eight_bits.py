"""Time of one LoRA linear on a base of 8 bits: generated modules against the frozen linear in bfloat16.

    python tools/bench_eight_bits.py --base fp8 --shapes 2048:5120x5120,8192:5120x5120,8192:5120x13824 --rank 16
        --json tools/results/fp8_h100.json

All contenders share one random weight: its codes, or what is made of them in bfloat16. They run interleaved, in random
order, on the same random inputs, eagerly and as replays of CUDA graphs; what is reported is the ratio to the frozen
linear of the same round: that in bfloat16, and one that makes its weight of the codes by the generated kernel. A step
is forward and backward, the rounding of activations and gradients to float8 included; ``forward`` is one without
gradients. On the base ``fp8`` the generated modules are those of ``--float8`` both, forward and none; on ``int8``
bitsandbytes' own linear and PEFT's layer on it run beside them. (Transformers' FP8Linear takes its kernels from a hub.)

Beside them the kernels alone, over the time in which their bytes are read and written at the rate of the device's
memory, and torch's product of float8, in TFLOP/s; and how far outputs and gradients are from those in float64 of the
same codes, over their size.

Needs PEFT and a GPU; for ``int8`` also bitsandbytes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from bench_linear import environment, peft_linear
from bench_quantized import CALLS, FrozenStep, all_of, shown, timed
from coded import float8_codes
from runlora_gen.cost.device import load_device
from runlora_gen.measure.clock import interleaved
from runlora_gen.measure.modules import module_of_everything, render_module
from runlora_gen.measure.problem import Point
from runlora_gen.request.workload import Workload
from runlora_gen.search.ranges import decide_model
from torch import Tensor, nn

FLOOR = "frozen bf16"
OWN_FLOOR = "frozen, weight by the generated kernel"


class Frozen(nn.Module):
    """A frozen linear whose weight is made of its codes, in the forward and again in the backward."""

    def __init__(self, made: Callable[[], Tensor]) -> None:
        super().__init__()
        self._made = made

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        output: Tensor = FrozenStep.apply(x, self._made)  # type: ignore[no-untyped-call]
        return output


class Ours(nn.Module):
    """A generated module's function on codes, with an adapter in bfloat16."""

    def __init__(self, module: ModuleType, codes: Any, rank: int) -> None:
        super().__init__()
        rows, columns = codes[0].shape
        self.lora_A = nn.Parameter(torch.randn(rank, columns, device="cuda", dtype=torch.bfloat16) / columns**0.5)
        self.lora_B = nn.Parameter(torch.randn(rows, rank, device="cuda", dtype=torch.bfloat16) * 0.01)
        self._function, self._codes = module.lora_linear, module.Quantized(*codes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        output: Tensor = self._function(x, self._codes, self.lora_A, self.lora_B, scaling=1.0)
        return output


def codes_of(weight: Tensor, base: str) -> tuple[Tensor, Tensor, tuple[int, int], float, torch.dtype]:
    """A weight's codes as a generated module takes them, each block's largest magnitude as the largest code."""
    if base == "int8":
        scale, columns = weight.abs().amax(1, keepdim=True), weight.shape[1]
        return (weight * (127 / scale)).round().to(torch.int8), scale, (1, columns), 1 / 127, torch.bfloat16
    return *float8_codes(weight, base), 1.0, torch.bfloat16


def generated(point: Point, workload: Workload, folder: Path) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The modules, and the variant that each has."""
    modules, chosen = {}, {}
    for way in ("both", "forward", "none") if workload.stored.rows else ("both",):
        choice = decide_model(replace(workload, float8=way), (point.layer,), point.rank, alone=True)[0]
        name = f"generated, float8 {way}" if workload.stored.rows else "generated"
        modules[name] = render_module(choice, point.rank, workload, folder / way)
        chosen[name] = choice.ranges[-1].decision.chosen.program.id
    return modules, chosen


def of_bitsandbytes(codes: Any, point: Point) -> dict[str, nn.Module]:
    """Its linear on the same codes, frozen and under PEFT's layer."""
    from bitsandbytes.nn.modules import Int8Params, Linear8bitLt
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear8bitLt as PeftLinear

    linear: Any = Linear8bitLt(point.in_features, point.out_features, bias=False, has_fp16_weights=False)
    scale = codes[1].view(-1)
    linear.weight = Int8Params(codes[0], requires_grad=False, CB=codes[0], SCB=scale)
    linear = linear.cuda()
    layer: Any = PeftLinear(linear, adapter_name="default", config=LoraConfig(r=point.rank), r=point.rank)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
    return {"bitsandbytes, frozen": linear, "peft on bitsandbytes": layer.cuda().to(torch.bfloat16)}


def measure(point: Point, workload: Workload, folder: Path, rounds: int) -> dict[str, Any]:
    """All contenders at one size."""
    torch.manual_seed(0)
    dtype, device = torch.bfloat16, torch.device("cuda")
    weight = torch.randn(point.out_features, point.in_features, device=device) / point.in_features**0.5
    codes = codes_of(weight, workload.base)
    modules, chosen = generated(point, workload, folder)
    everything = module_of_everything(workload, folder / "everything")
    own = everything.Quantized(*codes)
    plain = nn.Linear(point.in_features, point.out_features, bias=False, device=device, dtype=dtype)
    plain.weight = nn.Parameter(everything._dequantized(own), requires_grad=False)
    made: dict[str, nn.Module] = {
        FLOOR: plain,
        OWN_FLOOR: Frozen(lambda: everything._rescale(own, tiles="W")),
        "peft on bf16": peft_linear(plain, point.rank, dtype),
        **{name: Ours(module, codes, point.rank) for name, module in modules.items()},
    }
    if workload.base == "int8":
        made |= of_bitsandbytes(codes, point)
    x = torch.randn(1, point.tokens, point.in_features, dtype=dtype, device=device, requires_grad=True)
    grad_output = torch.randn(1, point.tokens, point.out_features, dtype=dtype, device=device)
    of_bnb = [name for name in made if "bitsandbytes" in name]  # its outliers wait for the host
    floors = {"frozen": FLOOR, "own": OWN_FLOOR}
    results = timed(made, x, grad_output, rounds, floors, eager_alone=of_bnb)
    for name, module in made.items():
        if isinstance(module, Ours):
            results[name]["error"] = errors(module, x, grad_output, everything._dequantized(own, torch.float64))
    return {
        "tokens": point.tokens,
        "shape": f"{point.in_features}x{point.out_features}",
        "rank": point.rank,
        "chosen": chosen,
        "results": results,
        "kernels": kernels_alone(point, workload, everything, rounds),
    }


def errors(module: Ours, x: Tensor, grad_output: Tensor, weight: Tensor) -> dict[str, float]:
    """How far output and gradients are from those in float64, for a few tokens, in the mean square, relative."""
    few, gradient = x[:, :256].detach().requires_grad_(), grad_output[:, :256]
    output = module(few)
    found = (output.detach(), *torch.autograd.grad(output, (few, module.lora_A, module.lora_B), gradient))
    wide = few.detach().double().requires_grad_()
    lora_A, lora_B = (factor.detach().double().requires_grad_() for factor in (module.lora_A, module.lora_B))
    exact = F.linear(wide, weight) + F.linear(F.linear(wide, lora_A), lora_B)
    wanted = (exact.detach(), *torch.autograd.grad(exact, (wide, lora_A, lora_B), gradient.double()))
    named = zip(("Y", "dX", "dA", "dB"), found, wanted, strict=True)
    return {name: float(f"{((ours.double() - true).norm() / true.norm()).item():.3g}") for name, ours, true in named}


def kernels_alone(point: Point, workload: Workload, module: ModuleType, rounds: int) -> dict[str, Any]:
    """What it takes to make a weight, over the time of its bytes; and the rate of torch's product of float8."""
    dtype, device = torch.bfloat16, torch.device("cuda")
    size = (point.out_features, point.in_features)
    codes = [module.Quantized(*codes_of(torch.randn(size, device=device), workload.base)) for _ in range(CALLS)]
    lora_A = torch.randn(point.rank, point.in_features, device=device, dtype=dtype)
    lora_B = torch.randn(point.out_features, point.rank, device=device, dtype=dtype)

    runs = {
        "rescale": all_of(lambda n: module._rescale(codes[n], tiles="W")),
        "rescale_merged": all_of(lambda n: module._rescale_merged(codes[n], lora_A, lora_B, 0.5, tiles="M")),
    }
    if workload.stored.rows:
        x = torch.randn(point.tokens, point.in_features, device=device).to(torch.float8_e4m3fn)
        ones = torch.ones(point.tokens, 1, device=device)
        scales = [each.scale.t().contiguous() for each in codes]
        runs["torch._scaled_mm"] = all_of(
            lambda n: torch._scaled_mm(x, codes[n].codes.t(), ones, scales[n], out_dtype=dtype, use_fast_accum=True)
        )
    times = interleaved(runs, rounds, device, warmups=2)
    median = {name: statistics.median(values) / CALLS for name, values in times.items()}
    limit = size[0] * size[1] * 3 / load_device(workload.device).bytes_per_s
    found: dict[str, Any] = {name: {"median_us": round(value * 1e6, 2)} for name, value in median.items()}
    for name in ("rescale", "rescale_merged"):
        found[name]["over_bytes"] = round(median[name] / limit, 3)
    if "torch._scaled_mm" in found:
        product = 2 * point.tokens * size[0] * size[1]
        found["torch._scaled_mm"]["tflops"] = round(product / median["torch._scaled_mm"] / 1e12)
    return found


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="2048:5120x5120,8192:5120x5120,8192:5120x13824")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--base", default="fp8", choices=("int8", "fp8", "fp8-block"))
    parser.add_argument("--profile", default="h100")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = {"date": datetime.date.today().isoformat(), **environment()}
    report |= {"base": options.base, "profile": options.profile}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for number, text in enumerate(options.shapes.split(",")):
            point = Point.parse(text, options.rank)
            workload = Workload(
                tokens=(point.tokens,), adapter_dtype="bf16", device=options.profile, launch="graph", base=options.base
            )
            row = measure(point, workload, Path(name) / f"shape_{number}", options.rounds)
            rows.append(row)
            print(f"{row['tokens']} tokens, {row['shape']}, rank {row['rank']}: {row['chosen']}; {row['kernels']}")
            for title, result in row["results"].items():
                print(f"  {title:<40} {shown(result)}  {result.get('error', '')}", flush=True)
            if options.json:
                options.json.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
