"""The rows of the paper's tables anew: whole models, PEFT against generated modules, on one GPU.

    python tools/paper_table.py --packages build/paper --profile h100 --prepare     # anywhere: generates
    python tools/paper_table.py --packages build/paper --profile h100 --json tools/results/paper_h100.json

Models by their configs, with random weights and random data; forward and backward with the loss, LoRA in all linears
but the output embedding, eager. Both share the base weights, and run in rounds, in random order; the speedup is how
much longer PEFT's step takes than ours, of the same round (median, least, most). The batch is the paper's, or the
largest of its eighths that fits, which is said then. Dtypes are the paper's where it names one, else bf16. Adapters
have the model's dtype (``--adapters same``), as in the paper, or float32 over bf16 under autocast, as PEFT's default
(``--adapters fp32``).

Needs transformers and peft (the bench extra). ``--tiny --device cpu`` tries everything out without a GPU.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from bench_model import measured_before, ratios
from contenders import CONTENDERS, Setup, fill_adapters
from runlora_gen.generation import profile_of
from runlora_gen.measure.clock import Run, interleaved, repeated
from runlora_gen.measure.machine import machine_name
from runlora_gen.measure.memory import peak_bytes
from torch import Tensor, nn

#: Steps back to back in one timing.
STEPS = 2
#: Losses of both that are further apart than this come from different models.
MOST_DEVIATION = 0.02
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Row:
    """A row of the paper.

    Attributes:
        model: one of ``MODELS``.
        dtype: of weights and activations.
        batch, sequence, rank: as in the paper; a ViT's sequence follows from its image, and is 0 here.
        speedup: over PEFT, in percent.
        saved_mb: memory that PEFT needs beyond the paper's code, or None if it is not told.
    """

    model: str
    dtype: str
    batch: int
    sequence: int
    rank: int
    speedup: float
    saved_mb: int | None = None

    @property
    def name(self) -> str:
        """By which it is chosen."""
        return f"{self.model}-{self.dtype}-s{self.sequence}-r{self.rank}"


#: Tables of "Run LoRA Run: Faster and Lighter LoRA Implementations" (https://arxiv.org/abs/2312.03415).
ROWS = (
    Row("llama-60m", "bf16", 64, 1024, 8, 13.6, 56),
    Row("llama-130m", "bf16", 64, 1024, 8, 14.9, 84),
    Row("llama-250m", "bf16", 60, 1024, 32, 15.9, 630),
    Row("llama-250m", "bf16", 58, 1024, 128, 16.9, 2434),
    Row("llama-350m", "bf16", 46, 1024, 256, 16.1, 3862),
    Row("llama-1.3b", "bf16", 24, 1024, 512, 12.7, 4034),
    Row("opt-350m", "bf16", 42, 512, 128, 28.3),
    Row("roberta-large", "bf16", 64, 512, 128, 22.7),
    Row("llama-250m", "bf16", 58, 2048, 128, 17.8),
    Row("llama-250m", "fp32", 34, 2048, 256, 16.0),
    Row("vit-base", "fp32", 100, 0, 32, 14.4),
    Row("roberta-base", "fp32", 64, 512, 128, 11.9),
)


@dataclass(frozen=True)
class Model:
    """A model of Transformers: its config's class and values, and the class that has the loss."""

    config: str
    auto: str
    values: dict[str, Any]


def _llama(hidden: int, intermediate: int, heads: int, layers: int, vocabulary: int) -> Model:
    values = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "use_cache": False,
    }
    return Model("LlamaConfig", "AutoModelForCausalLM", values)


def _bert_like(hidden: int, layers: int, heads: int, **values: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": 4 * hidden, **values}


_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_OPT = {
    "hidden_size": 1024,
    "ffn_dim": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": 512,
    "do_layer_norm_before": False,
    "use_cache": False,
}
MODELS = {
    "llama-60m": _llama(512, 1376, 8, 8, 32000),
    "llama-130m": _llama(768, 2048, 12, 12, 32000),
    "llama-250m": _llama(768, 2560, 16, 24, 32100),
    "llama-350m": _llama(1024, 2736, 16, 24, 32000),
    "llama-1.3b": _llama(2048, 5461, 32, 24, 32100),
    "opt-350m": Model("OPTConfig", "AutoModelForCausalLM", _OPT),
    "roberta-large": Model("RobertaConfig", "AutoModelForMaskedLM", _bert_like(1024, 24, 16, **_ROBERTA)),
    "roberta-base": Model("RobertaConfig", "AutoModelForMaskedLM", _bert_like(768, 12, 12, **_ROBERTA)),
    "vit-base": Model("ViTConfig", "AutoModelForImageClassification", _bert_like(768, 12, 12, num_labels=1000)),
}


def tiny(row: Row) -> Row:
    """The same in a size that any machine runs."""
    return replace(row, batch=2, sequence=min(row.sequence, 16), rank=min(row.rank, 8))


def base_model(row: Row, device: torch.device, *, small: bool) -> nn.Module:
    """Frozen, with random weights, in training mode."""
    transformers, model = import_module("transformers"), MODELS[row.model]
    values = {**model.values, **({"num_hidden_layers": 1} if small else {})}
    if small and "vocab_size" in values:
        values["vocab_size"] = 128
    torch.manual_seed(0)
    with device:
        made: nn.Module = getattr(transformers, model.auto).from_config(getattr(transformers, model.config)(**values))
    return made.to(DTYPES[row.dtype]).requires_grad_(False).train()


def batch_of(row: Row, model: Any, device: torch.device) -> dict[str, Tensor]:
    """Random inputs and labels."""
    if row.sequence:
        tokens = torch.randint(3, model.config.vocab_size, (row.batch, row.sequence), device=device)
        return {"input_ids": tokens, "labels": tokens}
    size, labels = model.config.image_size, model.config.num_labels
    return {
        "pixel_values": torch.randn(row.batch, 3, size, size, device=device, dtype=DTYPES[row.dtype]),
        "labels": torch.randint(labels, (row.batch,), device=device),
    }


def sharing(model: nn.Module) -> nn.Module:
    """The model once more, with the same weights in the same memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def pair_of(row: Row, adapters: str) -> tuple[str, str]:
    """PEFT's contender and ours."""
    if row.dtype == "fp32":
        return "peft-fp32", "ours"
    return ("peft-bf16", "ours-bf16") if adapters == "same" else ("peft-default", "ours")


def setup_of(row: Row, options: argparse.Namespace, model: nn.Module) -> Setup:
    """Packages lie in a folder for each row and profile."""
    profile = options.profile or profile_of(model)[0]
    return Setup(row.rank, row.batch * max(row.sequence, 1), options.packages / f"{row.name}-{profile}", profile)


def prepare(row: Row, options: argparse.Namespace) -> None:
    """Generate what a row needs; no weights are made."""
    for adapters in adapters_of(row, options):
        model = base_model(row, torch.device("meta"), small=options.tiny)
        CONTENDERS[pair_of(row, adapters)[1]].build(model, setup_of(row, options, model))


def adapters_of(row: Row, options: argparse.Namespace) -> list[str]:
    """The kinds of adapters to measure: over a float32 base there is one."""
    return ["same"] if row.dtype == "fp32" else list(options.adapters)


class Pair:
    """PEFT's model and ours on the same weights."""

    def __init__(self, row: Row, adapters: str, base: nn.Module, options: argparse.Namespace) -> None:
        self.row, self.device = row, torch.device(options.device)
        self.titles = pair_of(row, adapters)
        self.models: dict[str, nn.Module] = {}
        self.layers = 0
        for key in self.titles:
            self.models[key], facts = CONTENDERS[key].build(sharing(base), setup_of(row, options, base))
            self.layers = facts.get("layers", self.layers)
            fill_adapters(self.models[key])
        self.inputs: dict[str, Tensor] = {}

    def loss(self, key: str) -> Tensor:
        """Of the batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=CONTENDERS[key].autocast):
            loss: Tensor = self.models[key](**self.inputs).loss
        return loss

    def run(self, key: str) -> Run:
        """A step, which leaves no gradients."""
        trained = [parameter for parameter in self.models[key].parameters() if parameter.requires_grad]

        def step() -> None:
            torch.autograd.backward(self.loss(key))
            for parameter in trained:
                parameter.grad = None

        return step

    def fitted(self, start: int) -> int:
        """The largest batch that both have room for, not above ``start``; its inputs are there then."""
        batch = start
        while True:
            self.inputs = batch_of(replace(self.row, batch=batch), next(iter(self.models.values())), self.device)
            try:
                for key in self.titles:
                    repeated(self.run(key), 2)()
                return batch
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
            for model in self.models.values():
                model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
            batch = max(1, batch - max(1, start // 8))

    @torch.no_grad()
    def deviation(self) -> float:
        """Of our loss from PEFT's, without dropout."""
        values = []
        for key in self.titles:
            self.models[key].eval()
            values.append(float(self.loss(key)))
            self.models[key].train()
        return abs(values[1] / values[0] - 1)


def measure(row: Row, adapters: str, base: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """One row with one kind of adapters."""
    pair = Pair(row, adapters, base, options)
    batch = pair.fitted(row.batch)
    deviation = pair.deviation()
    runs = {key: pair.run(key) for key in pair.titles}
    peaks = {key: peak_bytes(run, pair.device) for key, run in runs.items()}
    many = {key: repeated(run, STEPS) for key, run in runs.items()}
    times = interleaved(many, options.rounds, pair.device, warmups=1, eager=True)
    theirs, ours = pair.titles
    over_ours = ratios(times[theirs], times[ours])
    return {
        "adapters": adapters,
        "batch": batch,
        "rounds": options.rounds,
        "layers": pair.layers,
        "median_ms": {key: round(statistics.median(times[key]) / STEPS * 1e3, 2) for key in pair.titles},
        "speedup_percent": {name: round((value - 1) * 100, 2) for name, value in over_ours.items()},
        "peak_bytes": peaks,
        "saved_mb": round((peaks[theirs] - peaks[ours]) / 1e6, 1),
        "loss_deviation": deviation,
    }


def print_result(row: Row, result: dict[str, Any]) -> None:
    """A line of the table."""
    batch = f"b {result['batch']}" + ("" if result["batch"] == row.batch else f" (paper: {row.batch})")
    saved = "" if row.saved_mb is None else f" ({row.saved_mb})"
    speedup = "{median:6.1f} % ({min:.1f} to {max:.1f})".format(**result["speedup_percent"])
    print(
        f"{row.name:<28} {batch}, {result['adapters']} adapters:\n"
        f"  faster by {speedup}, paper {row.speedup} %; saved {result['saved_mb']:.0f} MB{saved}",
        flush=True,
    )


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", default="all", help=f"comma list of numbers from 1, or of {', '.join(names)}")
    parser.add_argument("--adapters", default="same,fp32", help="comma list of same, fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--profile", help="device profile that the choice is made for [this device's]")
    parser.add_argument("--packages", type=Path, help="where generated packages are, or are put [a temporary folder]")
    parser.add_argument("--prepare", action="store_true", help="only generate the packages")
    parser.add_argument("--tiny", action="store_true", help="one layer and little data, to try it out")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help="no row begins later")
    parser.add_argument("--json", type=Path, help="where to write the results, after every row")
    options = parser.parse_args(arguments)
    wanted = names if options.rows == "all" else options.rows.split(",")
    wanted = [names[int(text) - 1] if text.isdigit() and 0 < int(text) <= len(names) else text for text in wanted]
    options.adapters = options.adapters.split(",")
    for name, values, known in (("rows", wanted, names), ("adapters", options.adapters, ["same", "fp32"])):
        unknown = [text for text in values if text not in known]
        if unknown:
            parser.error(f"--{name}: {unknown[0]} is not allowed; give some of {', '.join(known)}")
    if options.prepare and not (options.packages and options.profile):
        parser.error("--prepare: needs --packages and --profile")
    if not options.prepare and options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; to try it out: --device cpu --tiny")
    options.rows = [row for row in ROWS if row.name in wanted]
    if options.tiny:
        options.rows = [tiny(row) for row in options.rows]
    return options


def main() -> None:
    """Measure, print the table, write the JSON."""
    options, start = parsed(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options.packages = options.packages or Path(folder)
        if options.prepare:
            for row in options.rows:
                prepare(row, options)
            return
        _measure_rows(options, start)


def _measure_rows(options: argparse.Namespace, start: float) -> None:
    device = torch.device(options.device)
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine_name(device),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers", "peft")},
    }
    rows = measured_before(options.json, report, key="row")
    problems = []
    for row in options.rows:
        if time.perf_counter() - start > options.limit:
            problems.append(f"{row.name}: left out: out of time")
            continue
        base = base_model(row, device, small=options.tiny)
        entry = rows.setdefault(row.name, {"row": row.name, "paper": asdict(row), "results": {}})
        for adapters in adapters_of(row, options):
            result = measure(row, adapters, base, options)
            entry["results"][adapters] = result
            print_result(row, result)
            if not result["loss_deviation"] <= MOST_DEVIATION:
                problems.append(f"{row.name}: our loss is off by {result['loss_deviation']:.3g}")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        del base
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**report, "rows": list(rows.values())}, indent=1)
            options.json.write_text(text + "\n", encoding="utf-8")
        print(f"{row.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
