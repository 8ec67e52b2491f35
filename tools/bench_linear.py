"""Time and memory of one LoRA linear, forward and backward: generated modules against their rivals.

All contenders run interleaved, in random order, in one process on the same random inputs; what is reported is the
ratio to the frozen linear and to PEFT in the same round (median, least, most), because clocks drift. On a GPU each
contender is timed eagerly and as the replay of a CUDA graph. Run:

    python tools/bench_linear.py --arch llama-250m --rank 8,128 --tokens 2048 --dtype fp32 --json OUT.json
    python tools/bench_linear.py --arch llama-250m --rank 8 --tokens 1,16,128 --chosen-for 2048 --inference --dtype fp32
    python tools/bench_linear.py --shapes 4096:5120x5120,8192:5120x13824 --rank 16 --dtype bf16 --profile h200

A rival that is no package is given as ``--rival NAME=FILE.py``: a file with ``make(linear, rank) -> torch.nn.Module``.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from runlora_gen.algebra.paper import paper_labels
from runlora_gen.from_model import meta
from runlora_gen.measure.clock import Run, captured, interleaved, repeated
from runlora_gen.measure.machine import machine_name
from runlora_gen.measure.memory import peak_bytes, saved_bytes
from runlora_gen.measure.modules import import_file, one_choice, render_module
from runlora_gen.measure.problem import TORCH_DTYPES, Point
from runlora_gen.request.architecture import load_architecture
from runlora_gen.request.layers import Layer, layers
from runlora_gen.request.workload import Workload
from runlora_gen.search.choose import Decision
from runlora_gen.search.ranges import LayerChoice, decide_model
from torch import Tensor, nn

REFERENCE = "peft"
PLAIN = "plain"
FLOOR = "frozen"


class PlainLoRA(nn.Module):
    """PEFT's formula, as autograd differentiates it, without PEFT's bookkeeping."""

    def __init__(self, linear: nn.Linear, rank: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = linear
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A = nn.Parameter(torch.randn_like(linear.weight[:rank]) * 0.01)
        self.lora_B = nn.Parameter(torch.randn_like(linear.weight[:, :rank]) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        base: Tensor = self.linear(x)
        return base + F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B) * 1.0


class Autocast(nn.Module):
    """A module under autocast, as PEFT is trained by default: its adapters in fp32."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        with torch.autocast(x.device.type, self.dtype):
            output: Tensor = self.module(x)
            return output


def peft_linear(linear: nn.Linear, rank: int, dtype: torch.dtype, dropout: float = 0.0) -> nn.Module:
    """PEFT's own layer over a linear, its adapters in a dtype and not zero."""
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.layer import Linear as PeftLinear

    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout)
    return filled(PeftLinear(linear, adapter_name="default", config=config, r=rank, lora_alpha=rank), dtype)


def filled(peft: nn.Module, dtype: torch.dtype) -> nn.Module:
    """One of PEFT's layers with random adapters in a dtype."""
    base: Any = peft.base_layer
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=dtype, device=base.weight.device) * 0.01
    return peft


def peft_linear_of_4_bits(linear: Any, rank: int, dtype: torch.dtype) -> nn.Module:
    """The same over bitsandbytes' linear of 4 bits."""
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    config = LoraConfig(r=rank, lora_alpha=rank)
    return filled(Linear4bit(linear, adapter_name="default", config=config, r=rank, lora_alpha=rank), dtype)


def contenders(
    linear: nn.Linear, rank: int, generated: dict[str, ModuleType], rivals: dict[str, Path], dropout: float = 0.0
) -> dict[str, Callable[[], nn.Module]]:
    """How to make everything that is compared, over one shared frozen linear."""
    dtype = linear.weight.dtype
    dropping = {"lora_dropout": dropout} if dropout else {}

    def ours(module: ModuleType) -> nn.Module:
        layer: Any = module.LoRALinear.from_linear(linear, r=rank, lora_alpha=rank, **dropping)
        nn.init.normal_(layer.lora_B, std=0.01)  # zeros would be timed otherwise
        assert isinstance(layer, nn.Module)
        return layer

    makers: dict[str, Callable[[], nn.Module]] = {
        FLOOR: lambda: linear,
        PLAIN: lambda: PlainLoRA(linear, rank, dropout),
        REFERENCE: lambda: peft_linear(linear, rank, dtype, dropout),
    }
    if linear.weight.is_cuda:
        makers["peft fp32 adapters, autocast"] = lambda: Autocast(
            peft_linear(linear, rank, torch.float32, dropout), dtype
        )
        compiled: Any = torch.compile
        makers["peft compiled"] = lambda: compiled(peft_linear(linear, rank, dtype, dropout))
    for name, path in rivals.items():
        makers[name] = functools.partial(import_file(path, f"rival_{name}").make, linear, rank)
    for name, module in generated.items():
        makers[name] = functools.partial(ours, module)
    return makers


def infer(module: nn.Module, x: Tensor, grad_output: Tensor) -> None:
    """One forward where no gradient is wanted."""
    with torch.no_grad():
        module(x)


def train(module: nn.Module, x: Tensor, grad_output: Tensor) -> None:
    """One forward and backward, with fresh gradients."""
    x.grad = None
    module.zero_grad(set_to_none=True)
    module(x).backward(grad_output)


def kernels(run: Callable[[], None]) -> int:
    """GPU kernels that one call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if event.device_type.name == "CUDA")


def generate(
    layer: Layer, rank: int, workload: Workload, folder: Path, *, paper: bool = False
) -> tuple[ModuleType, str, float]:
    """Generate and import the module of one layer shape; also the chosen variant's id and its host's priced µs.

    ``paper``: the cheapest of the paper's own pairs that merges nothing, instead of the choice.
    """
    choice = decide_model(workload, (layer,), rank, alone=True)[0]
    if paper:
        decision = choice.ranges[-1].decision
        labelled = [c for c in decision.candidates if paper_labels(c.program) and not c.program.lossy_in_16_bit]
        best = min(labelled, key=lambda candidate: (candidate.cost.time_s, candidate.program.id))
        choice = one_choice(layer, workload, replace(decision, chosen=best, fallback=best))
    chosen = _decision(choice).chosen
    return render_module(choice, rank, workload, folder), chosen.program.id, round(chosen.cost.host_s * 1e6, 1)


def _decision(choice: LayerChoice) -> Decision:
    """The one for the asked token count."""
    return choice.ranges[-1].decision


#: Steps that a GPU runs back to back for one timing: as in training, the host may run ahead of the device.
STEPS = 4
#: Forwards that a CPU runs so: one of a single token takes less than the clock tells apart.
FORWARDS = 20


def measure(
    layer: Layer,
    rank: int,
    tokens: int,
    dtype: torch.dtype,
    generated: dict[str, ModuleType],
    rivals: dict[str, Path],
    rounds: int,
    skip: frozenset[str],
    inference: bool = False,
    dropout: float = 0.0,
) -> dict[str, Any]:
    """All contenders on one shape. One that fails is reported with its error.

    ``inference``: the forward alone, without gradients.
    """
    step = infer if inference else train
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = (layer.in_features, layer.out_features)
    linear = nn.Linear(*size, bias=False, dtype=dtype, device=device).requires_grad_(False)
    x = torch.randn(1, tokens, layer.in_features, dtype=dtype, device=device, requires_grad=True)
    grad_output = torch.randn(1, tokens, layer.out_features, dtype=dtype, device=device)
    modules: dict[str, nn.Module] = {}
    results: dict[str, Any] = {}
    replays: dict[str, Run] = {}
    for name, make in contenders(linear, rank, generated, rivals, dropout).items():
        if name in skip:
            continue
        try:
            module = make()
            step(module, x, grad_output)
            if device.type == "cuda":
                replays[name] = captured(functools.partial(step, module, x, grad_output), warmups=3)
            modules[name] = module
            results[name] = {}
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            replays.pop(name, None)
    eager = {name: functools.partial(step, module, x, grad_output) for name, module in modules.items()}
    steps = STEPS if device.type == "cuda" else FORWARDS if inference else 1
    modes: dict[str, dict[str, Run]] = {"eager": {**eager}, "graph": replays}
    for mode, runs in modes.items():
        if steps > 1:
            runs = {name: repeated(run, steps) for name, run in runs.items()}
        times = interleaved(runs, rounds, device, warmups=2, eager=mode == "eager")
        for name, values in times.items():
            results[name][mode] = {
                "median_us": round(statistics.median(values) / steps * 1e6, 1),
                **{
                    f"over_{other}": spread(values, times[other])
                    for other in (FLOOR, REFERENCE, PLAIN)
                    if other in times
                },
            }
    for name, module in modules.items() if not inference else ():
        results[name]["saved_bytes"] = saved_bytes(functools.partial(module, x), module.parameters())
        x.grad = None
        module.zero_grad(set_to_none=True)
        results[name]["peak_bytes"] = peak_bytes(eager[name], device)
        if device.type == "cuda":
            results[name]["kernels"] = kernels(eager[name])
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
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("peft", "triton"):
        versions[name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        return {"machine": machine_name(torch.device("cuda")), "cuda": torch.version.cuda, "versions": versions}
    return {"machine": machine_name(torch.device("cpu")), "versions": versions}


def print_row(row: dict[str, Any]) -> None:
    """One shape for people."""
    print(f"{row['tokens']} tokens, {row['shape']}, rank {row['rank']}  chosen {row['chosen']}")
    for name, result in row["results"].items():
        if "error" in result:
            print(f"  {name:<28} {result['error']}")
            continue
        parts = [f"  {name:<28}"]
        for mode in ("graph", "eager"):
            if mode in result:
                over = [result[mode][f"over_{other}"] for other in (FLOOR, REFERENCE)]
                ratios = "  ".join(
                    f"x {other} {o['median']:.3f} [{o['min']:.3f}, {o['max']:.3f}]"
                    for other, o in zip((FLOOR, REFERENCE), over, strict=True)
                )
                parts.append(f"{mode} {result[mode]['median_us']:9.1f} us  {ratios}")
        if "saved_bytes" not in result:
            print("  ".join(parts), flush=True)
            continue
        parts.append(f"saved {result['saved_bytes'] / 2**20:.2f} MiB  peak {result['peak_bytes'] / 2**20:.2f} MiB")
        if "kernels" in result:
            parts.append(f"{result['kernels']} kernels")
        print("  ".join(parts), flush=True)


def wanted(options: argparse.Namespace) -> Iterator[tuple[int, Layer, int]]:
    """Token counts, layer shapes and ranks to measure."""
    for rank in map(int, options.rank.split(",")):
        if options.shapes:
            for text in options.shapes.split(","):
                point = Point.parse(text, rank)
                yield point.tokens, point.layer, rank
        else:
            for layer in layers(load_architecture(options.arch, others=meta)):
                for tokens in map(int, options.tokens.split(",")):
                    yield tokens, layer, rank


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="llama-250m")
    parser.add_argument("--shapes", help="comma list of TOKENS:INxOUT, instead of --arch and --tokens")
    parser.add_argument("--rank", default="8,128", help="comma list")
    parser.add_argument("--tokens", default="2048", help="comma list")
    parser.add_argument("--chosen-for", type=int, help="token count that modules are generated for [the measured one]")
    parser.add_argument("--inference", action="store_true", help="forwards alone, without gradients")
    parser.add_argument("--dtype", choices=TORCH_DTYPES, default="fp32")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapter's input")
    parser.add_argument("--profile", default="cpu", help="device profile that the choice is made for")
    parser.add_argument("--rival", action="append", default=[], metavar="NAME=FILE", help="another contender")
    parser.add_argument("--skip", default="", help="comma list of contenders to leave out")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, help="where to write the results, after every row")
    options = parser.parse_args()
    skip = frozenset(options.skip.split(","))
    if skip & {FLOOR, REFERENCE}:
        parser.error(f"--skip: {FLOOR} and {REFERENCE} can't be left out: all is held against them")
    rivals = {name: Path(path) for name, _, path in (text.partition("=") for text in options.rival)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens, layer, rank in wanted(options):
            # Never keep more than PEFT: the input, x lora_Aᵀ, and the adapter's casts; a mask.
            kept = (options.chosen_for or tokens) * (layer.in_features + rank) + rank * (
                layer.in_features + layer.out_features
            )
            limit = kept * TORCH_DTYPES[options.dtype].itemsize
            limit += (options.chosen_for or tokens) * layer.in_features if options.dropout else 0
            workload = Workload(
                tokens=(options.chosen_for or tokens,),
                dtype=options.dtype,
                device=options.profile,
                max_saved_bytes=limit,
                dropout=options.dropout,
            )
            place = Path(folder) / str(len(rows))
            generated, chosen, host_us = {}, {}, {}
            variants = {"generated": (workload, False)}
            if torch.cuda.is_available():
                graph = replace(workload, launch="graph")
                narrow, narrow_graph = (replace(w, adapter_dtype=options.dtype) for w in (workload, graph))
                variants = {
                    **({} if options.dropout else {"paper's best": (replace(narrow_graph, kernels=False), True)}),
                    "generated, torch only": (replace(narrow, kernels=False), False),
                    "generated for eager": (workload, False),
                    "generated for eager, 16-bit adapters": (narrow, False),
                    "generated": (graph, False),
                    "generated, 16-bit adapters": (narrow_graph, False),
                }
            for number, (name, (load_, paper)) in enumerate(variants.items()):
                generated[name], chosen[name], host_us[name] = generate(
                    layer, rank, load_, place / f"v{number}_{len(rows)}", paper=paper
                )
            dtype = TORCH_DTYPES[options.dtype]
            result = measure(
                layer,
                rank,
                tokens,
                dtype,
                generated,
                rivals,
                options.rounds,
                skip,
                inference=options.inference,
                dropout=options.dropout,
            )
            rows.append(
                {
                    "tokens": tokens,
                    "shape": layer.name,
                    "rank": rank,
                    "chosen": chosen,
                    "priced_host_us": host_us,
                    "results": result,
                }
            )
            print_row(rows[-1])
            if options.json:
                settings = {k: v for k, v in vars(options).items() if k not in ("json", "rival")} | {
                    "rivals": list(rivals)
                }
                report = {"date": datetime.date.today().isoformat(), **settings, **environment(), "rows": rows}
                options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    mode = "graph" if torch.cuda.is_available() else "eager"
    ratios = [row["results"]["generated"][mode][f"over_{REFERENCE}"]["median"] for row in rows]
    print(f"mean over {REFERENCE}: {statistics.mean(ratios):.3f}, worst {max(ratios):.3f}")


if __name__ == "__main__":
    main()
