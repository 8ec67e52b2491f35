"""Fine-tune a small Llama or mixture of experts with LoRA, with PEFT's layers or on generated modules: both losses.

    python tools/train_example.py                                             # both, on what device there is
    python tools/train_example.py --adapter ours --dtype bf16 --adapter-dtype fp32 --json ours.json
    python tools/train_example.py --plot losses.png peft.json ours.json       # a picture of earlier runs

The text is made here, and tokens are its bytes: the base learns sums in words, with all its weights; then the adapters
learn products, over the frozen base. Every contender starts from the same base and adapters, and sees the same batches.

``--experts 16 --top-k 4``: a mixture of experts (Qwen3's) in place of the Llama, with adapters on the stacks of experts
and in attention.

``--base nf4`` (or int8, fp8, ...): the frozen base is quantized after it has learnt. Where that is to float8, PEFT runs
on the same weights in ``--dtype``, as the kernels of Transformers' linears of float8 come from a hub.

What a training script needs is two lines: ``get_peft_model``, and ``runlora_gen.accelerate``. Needs transformers and
peft (the bench extra), for the picture matplotlib.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from coded import coded, decoded
from contenders import Setup, accelerated, adapters, peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from runlora_gen.generation import profile_of
from runlora_gen.measure.machine import machine_name
from runlora_gen.measure.memory import peak_bytes
from runlora_gen.request.workload import CHOICES
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAPTERS = {"peft": "PEFT", "ours": "generated modules"}
_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_ONES += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
#: Steps whose time does not count: the first ones compile kernels.
_WARMUPS = 3
#: Steps at the end whose mean loss is told.
_LAST = 50


def words(number: int) -> str:
    """A number below 1000 in English."""
    if number >= 100:
        rest = f" and {words(number % 100)}" if number % 100 else ""
        return f"{_ONES[number // 100]} hundred{rest}"
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10 - 2] + (f"-{_ONES[number % 10]}" if number % 10 else "")


def corpus(kind: str, size: int, seed: int) -> bytes:
    """Text of at least so many bytes: lines of ``sums`` or of ``products``."""
    source = random.Random(seed)
    sign, compute = ("plus", int.__add__) if kind == "sums" else ("times", int.__mul__)
    lines: list[str] = []
    length = 0
    while length < size:
        a, b = source.randrange(32), source.randrange(32)
        if a * b < 1000:
            lines.append(f"{words(a)} {sign} {words(b)} is {words(compute(a, b))}.\n")
            length += len(lines[-1])
    return "".join(lines).encode()


def batches(text: bytes, batch: int, sequence: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Random pieces of a text without an end, as tokens."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - sequence, (batch,), generator=generator)
        yield torch.stack([tokens[start : start + sequence] for start in starts.tolist()]).to(device)


def base_model(options: argparse.Namespace) -> nn.Module:
    """A small Llama or mixture of experts over bytes, with random weights."""
    transformers: Any = import_module("transformers")
    torch.manual_seed(options.seed)
    heads = max(1, options.hidden // 64)
    experts = {
        "num_experts": options.experts,
        "num_experts_per_tok": options.top_k,
        "moe_intermediate_size": options.hidden * 5 // 4,
        "num_key_value_heads": heads,
        "head_dim": options.hidden // heads,
    }
    config = transformers.AutoConfig.for_model(
        "qwen3_moe" if options.experts else "llama",
        vocab_size=256,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 5 // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        max_position_embeddings=options.sequence,
        use_cache=False,
        **(experts if options.experts else {}),
    )
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(options.device)


def targets(options: argparse.Namespace) -> dict[str, Any]:
    """What gets adapters, as PEFT takes it."""
    if not options.experts:
        return {"target_modules": "all-linear"}
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "target_parameters": stacks}


def train(model: Any, data: Iterator[Tensor], steps: int, rate: float, report: Callable[[int, float], None]) -> float:
    """Train what wants gradients.

    Args:
        model: of Transformers, or PEFT's around it.
        data: batches of tokens.
        steps: how many.
        rate: of learning.
        report: is told the loss of each step.

    Returns:
        Seconds of a step, without the first ones.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    start = time.perf_counter()
    for step in range(steps):
        if step == min(_WARMUPS, steps - 1):
            _wait(model)
            start = time.perf_counter()
        tokens = next(data)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, float(loss))
    _wait(model)
    return (time.perf_counter() - start) / max(1, steps - _WARMUPS)


def _wait(model: nn.Module) -> None:
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()


def finetune(adapter: str, base: nn.Module, options: argparse.Namespace, report: Callable[[int, float], None]) -> Any:
    """One contender: losses, tokens a second, peak memory of a step with the weights."""
    torch.manual_seed(options.seed + 1)
    frozen = copy.deepcopy(base).to(DTYPES[options.dtype]).requires_grad_(False)
    dtype, ours = DTYPES[options.dtype], adapter != "peft"
    if options.base in ("fp8", "fp8-block") and not ours:
        frozen = decoded(frozen, options.base)
    elif options.base != "plain":
        frozen = coded(frozen, options.base, options.device, dtype)
    wide = options.adapter_dtype == "fp32"
    model: Any = peft_model(frozen, options.rank, wide=wide, targets=targets(options))
    generator = torch.Generator().manual_seed(options.seed + 1)
    for lora_A, _ in adapters(model):  # on float8 PEFT rounds what it draws
        bound = lora_A.shape[1] ** -0.5
        lora_A.data = (torch.rand(lora_A.shape, generator=generator) * 2 * bound - bound).to(lora_A)
    with tempfile.TemporaryDirectory() as folder:
        if ours:
            workload = {"float8": options.float8, "launch": options.launch}
            tokens = options.batch * options.sequence
            setup = Setup(options.rank, tokens, Path(folder), profile_of(model)[0], workload=workload)
            accelerated(model, setup, "packages")
        losses: list[float] = []

        def told(step: int, loss: float) -> None:
            losses.append(loss)
            report(step, loss)

        text = corpus("products", 1 << 17, options.seed + 2)
        data = batches(text, options.batch, options.sequence, options.seed + 3, options.device)
        step_s = train(model, data, options.steps, options.rate, told)
        tokens_of_one = next(data)

        def step() -> None:
            model.zero_grad()
            model(input_ids=tokens_of_one, labels=tokens_of_one).loss.backward()

        model.zero_grad()
        peak = peak_bytes(step, options.device) + sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "losses": losses,
        "tokens_per_s": round(options.batch * options.sequence / step_s),
        "peak_bytes": peak,
    }


def apart(runs: dict[str, dict[str, Any]]) -> str:
    """What the losses of both are at the end, and how far they are from each other at most."""
    peft, ours = (runs[name]["losses"] for name in ADAPTERS)
    means = (f"{statistics.fmean(losses[-_LAST:]):.4f}" for losses in (peft, ours))
    largest = max(abs(a - b) for a, b in zip(peft, ours, strict=True))
    return (
        f"loss of the last {min(_LAST, len(ours))} steps {' and '.join(means)}, {largest:.1e} apart at most in a step"
    )


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Both loss curves, and their difference below."""
    matplotlib: Any = import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = import_module("matplotlib.pyplot")
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(7, 5), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    peft, ours = (runs[name]["losses"] for name in ADAPTERS)
    for name, losses, style in (("peft", peft, "-"), ("ours", ours, "--")):
        above.plot(range(1, len(losses) + 1), losses, style, label=ADAPTERS[name])
    above.set_ylabel("loss")
    above.legend()
    differences = [b - a for a, b in zip(peft, ours, strict=True)]
    below.plot(range(1, len(differences) + 1), differences, color="black", linewidth=0.8)
    below.axhline(0, color="gray", linewidth=0.5)
    below.set_ylabel("ours − PEFT")
    below.set_xlabel("step")
    figure.savefig(path, dpi=150)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="peft,ours", help="peft, ours, or both by a comma [both]")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pretrain", type=int, default=100, metavar="STEPS", help="of the base on sums")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="of the frozen base")
    parser.add_argument("--base", default="plain", choices=CHOICES["base"], help="how its weights are stored")
    parser.add_argument("--float8", default="both", choices=CHOICES["float8"], help="see runlora-gen --help")
    parser.add_argument("--launch", default="eager", choices=CHOICES["launch"], help="see runlora-gen --help")
    parser.add_argument("--adapter-dtype", default="fp32", choices=("fp32", "same"), help="of the adapters")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=0, help="of each layer; none: a Llama [0]")
    parser.add_argument("--top-k", type=int, default=2, help="experts of a token")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-3, help="of learning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, help="[cuda if there is one, else cpu]")
    parser.add_argument("--json", type=Path, help="where to write losses, speed and memory")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="a picture of both losses and their difference")
    parser.add_argument("runs", nargs="*", type=Path, help="with --plot: results of earlier runs, and nothing is run")
    options = parser.parse_args(arguments)
    options.adapter = options.adapter.split(",")
    unknown = [name for name in options.adapter if name not in ADAPTERS]
    if unknown:
        parser.error(f"--adapter: {unknown[0]} is not allowed; give some of {', '.join(ADAPTERS)}")
    for name in ("steps", "rank", "hidden", "layers", "batch", "sequence"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: {getattr(options, name)} is not allowed; give a whole number from 1")
    if options.experts and not 1 <= options.top_k <= options.experts:
        parser.error(f"--top-k: {options.top_k} is not allowed; give a number from 1 to {options.experts}")
    if options.experts and options.base != "plain":
        parser.error("--base: experts are of plain weights")
    if options.runs and not options.plot:
        parser.error("results of earlier runs are for --plot")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: needs matplotlib (the bench extra)")
    if options.plot and not options.runs and set(options.adapter) != set(ADAPTERS):
        parser.error("--plot: needs both, peft and ours")
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return options


def main() -> None:
    """Train, tell, write."""
    options = parsed()
    if options.runs:
        runs: dict[str, Any] = {}
        for path in options.runs:
            runs |= json.loads(path.read_text(encoding="utf-8"))["runs"]
        missing = [name for name in ADAPTERS if name not in runs]
        if missing:
            sys.exit(f"--plot: no run of {missing[0]} in {', '.join(map(str, options.runs))}")
        plot(runs, options.plot)
        return
    runs = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]}"), console=Console(stderr=True)) as progress:

        def bar(title: str, steps: int) -> Callable[[int, float], None]:
            task = progress.add_task(title, total=steps, loss="")
            return lambda step, loss: progress.update(task, completed=step + 1, loss=f"{loss:.3f}")

        base = base_model(options)
        text = corpus("sums", 1 << 17, options.seed)
        data = batches(text, options.batch, options.sequence, options.seed, options.device)
        if options.pretrain:
            train(base, data, options.pretrain, options.rate, bar("base", options.pretrain))
        for name in options.adapter:
            runs[name] = finetune(name, base, options, bar(ADAPTERS[name], options.steps))
    for name, run in runs.items():
        first, last = run["losses"][0], run["losses"][-1]
        memory = f"peak {run['peak_bytes'] / 2**20:.0f} MiB"
        print(f"{ADAPTERS[name]:<18} loss {first:.3f} to {last:.3f}, {run['tokens_per_s']} tokens/s, {memory}")
    if len(runs) == len(ADAPTERS):
        print(apart(runs))
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("runs", "json", "plot")}
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
        facts = {"machine": machine_name(options.device), "versions": versions}
        written = {**facts, "settings": {**settings, "device": str(options.device)}, "runs": runs}
        options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(runs, options.plot)


if __name__ == "__main__":
    main()
