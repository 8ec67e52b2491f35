"""Time and memory of LoRA linears that share their input, forward and backward: together, one by one, and rivals.

All contenders run interleaved, in random order, in one process on the same random inputs; what is reported is the ratio
to the frozen linears, whose gradients autograd sums, in the same round (median, least, most). Run:

    python tools/bench_group.py --groups 4096:5120x5120+5120+5120,8192:5120x13824+13824 --rank 16 --profile h100

A group is TOKENS:INxOUT+OUT+OUT; of two linears that are gate and up, of three q, k and v.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from bench_linear import FLOOR, REFERENCE, STEPS, Autocast, environment, kernels, peft_linear, spread
from runlora_gen.measure.clock import Run, captured, interleaved, repeated
from runlora_gen.measure.memory import peak_bytes, saved_bytes
from runlora_gen.measure.modules import render_module
from runlora_gen.measure.problem import TORCH_DTYPES
from runlora_gen.request.groups import Group
from runlora_gen.request.layers import Layer
from runlora_gen.request.workload import Workload
from runlora_gen.search.candidates import Site
from runlora_gen.search.ranges import decide_model
from torch import Tensor, nn

APART, TOGETHER = "ours, one by one", "ours"
_LINEARS = {2: ("gate", "up"), 3: ("q", "k", "v")}


def parse_group(text: str) -> tuple[int, Group]:
    """Tokens and linears of TOKENS:INxOUT+OUT."""
    tokens, shape = text.split(":")
    in_features, widths = shape.split("x")
    out_features = tuple(map(int, widths.split("+")))
    linears = _LINEARS[len(out_features)]
    return int(tokens), Group(linears, int(in_features), out_features, False, 1, (linears,))


class OneByOne(nn.Module):
    """Several modules on one input."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of all."""
        return tuple(part(x) for part in self.parts)


class Together(nn.Module):
    """The linears of a group, as its module computes them."""

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        linears: Sequence[nn.Linear],
        rank: int,
        adapter_dtype: torch.dtype,
        dropout: float,
    ) -> None:
        super().__init__()
        self.function = functools.partial(function, dropout=dropout) if dropout else function
        self.weights = [linear.weight for linear in linears]

        def drawn(like: Tensor) -> nn.Parameter:
            return nn.Parameter(torch.randn_like(like, dtype=adapter_dtype) * 0.01)

        self.lora_As = nn.ParameterList([drawn(weight[:rank]) for weight in self.weights])
        self.lora_Bs = nn.ParameterList([drawn(weight[:, :rank]) for weight in self.weights])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of all."""
        scalings = [1.0] * len(self.weights)
        return self.function(x, self.weights, list(self.lora_As), list(self.lora_Bs), scalings=scalings)


def train(module: nn.Module, x: Tensor, grad_outputs: Sequence[Tensor]) -> None:
    """One forward and backward, with fresh gradients."""
    x.grad = None
    module.zero_grad(set_to_none=True)
    torch.autograd.backward(module(x), grad_outputs)


def generate(
    group: Group, rank: int, workload: Workload, folder: Path
) -> tuple[ModuleType, dict[int, ModuleType], dict[str, str]]:
    """The module of the group, those of its linears by their widths, and what was chosen."""
    lone = [Layer(group.in_features, width, False, 1, (f"to_{width}",)) for width in dict.fromkeys(group.out_features)]
    sites: tuple[Site, ...] = (group, *lone)
    together, *apart = (decide_model(workload, (site,), rank, alone=True)[0] for site in sites)
    chosen = {choice.layer.name: choice.ranges[-1].decision.chosen.program.id for choice in (together, *apart)}
    modules = {
        layer.out_features: render_module(choice, rank, workload, folder / f"linear_{layer.name}")
        for layer, choice in zip(lone, apart, strict=True)
    }
    return render_module(together, rank, workload, folder / group.name), modules, chosen


def measure(
    tokens: int,
    group: Group,
    rank: int,
    workload: Workload,
    generated: tuple[ModuleType, dict[int, ModuleType]],
    rounds: int,
) -> dict[str, Any]:
    """All contenders on one group."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, adapter_dtype = (TORCH_DTYPES[name] for name in (workload.dtype, workload.adapter_dtype))
    dropping = {"lora_dropout": workload.dropout} if workload.dropout else {}

    def draw(*size: int) -> Tensor:
        return torch.randn(1, tokens, *size, dtype=dtype, device=device)

    linears = [
        nn.Linear(group.in_features, width, bias=False, dtype=dtype, device=device).requires_grad_(False)
        for width in group.out_features
    ]
    together, apart = generated

    def ours(linear: nn.Linear) -> nn.Module:
        made = apart[linear.out_features].LoRALinear.from_linear(linear, rank, rank, adapter_dtype, **dropping)
        nn.init.normal_(made.lora_B, std=0.01)  # zeros would be timed otherwise
        layer: nn.Module = made
        return layer

    def peft(linear: nn.Linear) -> nn.Module:
        layer = peft_linear(linear, rank, adapter_dtype, workload.dropout)
        return layer if adapter_dtype == dtype else Autocast(layer, dtype)

    modules: dict[str, nn.Module] = {
        FLOOR: OneByOne(linears),
        REFERENCE: OneByOne(list(map(peft, linears))),
        APART: OneByOne(list(map(ours, linears))),
        TOGETHER: Together(getattr(together, f"lora_{group.kind}"), linears, rank, adapter_dtype, workload.dropout),
    }
    x = draw(group.in_features).requires_grad_()
    grad_outputs = [draw(width) for width in group.out_features]
    eager: dict[str, Callable[[], None]] = {
        name: functools.partial(train, module, x, grad_outputs) for name, module in modules.items()
    }
    replays: dict[str, Run] = {}
    for name, run in eager.items():
        run()
        if device.type == "cuda":
            replays[name] = captured(run, warmups=3)
    results: dict[str, Any] = {name: {} for name in modules}
    steps = STEPS if device.type == "cuda" else 1
    modes: dict[str, dict[str, Run]] = {"eager": {**eager}, "graph": replays}
    for mode, runs in modes.items():
        several = {name: repeated(run, steps) for name, run in runs.items()} if steps > 1 else runs
        times = interleaved(several, rounds, device, warmups=2, eager=mode == "eager")
        for name, values in times.items():
            results[name][mode] = {
                "median_us": round(statistics.median(values) / steps * 1e6, 1),
                f"over_{FLOOR}": spread(values, times[FLOOR]),
                f"over_{REFERENCE}": spread(values, times[REFERENCE]),
            }
    for name, module in modules.items():
        parameters = [*module.parameters(), *(linear.weight for linear in linears)]
        results[name]["saved_bytes"] = saved_bytes(functools.partial(module, x), parameters)
        x.grad = None
        module.zero_grad(set_to_none=True)
        results[name]["peak_bytes"] = peak_bytes(eager[name], device)
        if device.type == "cuda":
            results[name]["kernels"] = kernels(eager[name])
    return results


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", required=True, help="comma list of TOKENS:INxOUT+OUT")
    parser.add_argument("--rank", default="16", help="comma list")
    parser.add_argument("--dtype", choices=TORCH_DTYPES, default="bf16")
    parser.add_argument("--adapter-dtype", help="comma list: of the adapters [the same]")
    parser.add_argument("--dropout", default="0", help="comma list: of the adapters' input")
    parser.add_argument("--profile", default="h100", help="device profile that the choice is made for")
    parser.add_argument("--launch", default="graph", help="how it is told that steps are launched")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, help="where to write the results, after every row")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        cases = itertools.product(
            (options.adapter_dtype or options.dtype).split(","),
            map(float, options.dropout.split(",")),
            map(int, options.rank.split(",")),
            options.groups.split(","),
        )
        for adapter_dtype, dropout, rank, text in cases:
            tokens, group = parse_group(text)
            workload = Workload(
                tokens=(tokens,),
                dtype=options.dtype,
                adapter_dtype=adapter_dtype,
                dropout=dropout,
                device=options.profile,
                launch=options.launch,
            )
            together, apart, chosen = generate(group, rank, workload, Path(folder) / f"{len(rows)}")
            results = measure(tokens, group, rank, workload, (together, apart), options.rounds)
            case = {"group": text, "rank": rank, "adapter_dtype": adapter_dtype, "dropout": dropout}
            rows.append({**case, "chosen": chosen, "results": results})
            _print(rows[-1])
            if options.json:
                data = {
                    **environment(),
                    "date": datetime.date.today().isoformat(),
                    "dtype": options.dtype,
                    "profile": options.profile,
                    "launch": options.launch,
                    "rows": rows,
                }
                options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _print(row: dict[str, Any]) -> None:
    """One group for people."""
    case = f"{row['group']}, rank {row['rank']}, {row['adapter_dtype']} adapters, dropout {row['dropout']:g}"
    print(f"{case}  {next(iter(row['chosen'].values()))}")
    for name, result in row["results"].items():
        parts = [f"  {name:<18}"]
        for mode in ("graph", "eager"):
            if mode in result:
                ratio = result[mode][f"over_{FLOOR}"]
                parts.append(
                    f"{mode} {result[mode]['median_us']:9.1f} us  x {FLOOR} {ratio['median']:.3f} "
                    f"[{ratio['min']:.3f}, {ratio['max']:.3f}]"
                )
        parts.append(f"saved {result['saved_bytes'] / 2**20:.2f} MiB  peak {result['peak_bytes'] / 2**20:.2f} MiB")
        if "kernels" in result:
            parts.append(f"{result['kernels']} kernels")
        print("  ".join(parts), flush=True)


if __name__ == "__main__":
    main()
