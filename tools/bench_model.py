"""A training step of a model's layers as Transformers runs them: the model benchmark.

    python tools/bench_model.py --shapes 13b,8b --axolotl .rivals/axolotl --json tools/results/model_h100.json
    python tools/bench_model.py --shapes 13b,8b,1b --contenders generated,generated-graph,generated-torch
        --modes eager --alone --json tools/results/step_h100.json

Frozen layers with random weights get adapters in all linears, in each contender's way, the same in all of them: of
Llama, of Gemma, or of mixtures of experts, with the experts' stacks (``-experts``: in these alone).
A step is forward and backward, with the gradient of the layers' input, as in the middle of a model. All contenders
have one attention, and are timed in rounds, in random order, on the same inputs; what is reported is the ratio to the
frozen step of the same round and mode (median, least, most), and the peak memory of a step. How far outputs and
gradients are from PEFT's says whether a contender computes the same. What a result file has already of the same machine
and versions is kept, with its date if that is another one, so that a long measurement can be made in several runs.

``--base nf4``: linears that bitsandbytes quantized, to 4 bits or to int8, in all contenders and in the frozen step.
``--base fp8``: generated modules on linears of float8; the others, and the frozen step, on the same weights in bf16, as
the kernels of Transformers' linears of float8 come from a hub.

Modes are eager, compiled, ``replayed`` (compiled with ``mode="reduce-overhead"``, which replays CUDA graphs) and both
of the first with checkpointing.

``--alone``: also what host and device need of a step by themselves, eager and compiled (the host: until everything is
launched; the device: the replay of a CUDA graph), and the same of the frozen linears alone, whose difference to the
frozen step is what the model does beside its linears.

Needs transformers and peft (the bench extra), and a GPU but for the tiny shape. A contender is added in
tools/contenders.py, a shape or a mode here.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import json
import math
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from coded import coded, decoded
from contenders import (
    CONTENDERS,
    FROZEN,
    Contender,
    Setup,
    Unavailable,
    adapters,
    causal,
    fill_adapters,
    from_folder,
    origin,
)
from runlora_gen.generation import profile_of
from runlora_gen.measure.clock import Run, captured, interleaved, repeated, seconds
from runlora_gen.measure.memory import peak_bytes
from runlora_gen.request.workload import CHOICES
from torch import Tensor, nn

#: Steps back to back in one timing: as in training, the host may run ahead of the device.
STEPS = 3
#: Outputs or gradients that are further than this from PEFT's are of something else: bf16 alone makes some 0.01, and
#: products of float8, each with an error of 0.027, some 0.15 over four layers.
MOST_DEVIATION = {"fp8": 0.2}
_MOST_DEVIATION = 0.1
#: What the titles of generated contenders begin with.
OURS = ("ours", "generated")
#: Of a shape, what Llamas do without.
_BESIDE_LLAMAS = ("model_type", "head_dim", "experts", "top_k", "adapted")
_START = time.perf_counter()
#: The frozen model, eager and without checkpointing, in the rounds of the other modes.
_PLAIN = "frozen, eager"


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
    model_type: str = "llama"
    head_dim: int | None = None
    experts: int = 0
    top_k: int = 0
    adapted: str = "all"  # or the experts alone

    @property
    def targets(self) -> dict[str, Any]:
        """What gets adapters, as PEFT takes it."""
        if not self.experts:
            return {"target_modules": "all-linear"}
        stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        # Not the routers, of which all-linear takes the weights as parameters.
        attention = ["q_proj", "k_proj", "v_proj", "o_proj"] if self.adapted == "all" else []
        return {"target_modules": attention, "target_parameters": stacks}

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.sequence


SHAPES = {
    "13b": Shape(5120, 13824, 40, 40, layers=3, batch=2, sequence=2048, rank=8),
    "8b": Shape(4096, 14336, 32, 8, layers=4, batch=4, sequence=4096, rank=16),
    "1b": Shape(2048, 8192, 32, 8, layers=8, batch=1, sequence=1024, rank=16),
    "gemma-7b": Shape(
        3072, 24576, 16, 16, layers=3, batch=4, sequence=2048, rank=16, model_type="gemma", head_dim=256,
    ),
    "tiny": Shape(64, 160, 4, 2, layers=2, batch=2, sequence=16, rank=4),
    "qwen3-30b-a3b": Shape(
        2048, 768, 32, 4, layers=2, batch=2, sequence=2048, rank=8, model_type="qwen3_moe", head_dim=128, experts=128,
        top_k=8,
    ),
    "gpt-oss-20b": Shape(
        2880, 2880, 64, 8, layers=2, batch=2, sequence=2048, rank=8, model_type="gpt_oss", head_dim=64, experts=32,
        top_k=4,
    ),
    "tiny-moe": Shape(
        64, 96, 4, 2, layers=2, batch=2, sequence=16, rank=4, model_type="qwen3_moe", head_dim=16, experts=8, top_k=2
    ),
}  # fmt: skip
SHAPES |= {f"{name}-experts": replace(shape, adapted="experts") for name, shape in SHAPES.items() if shape.experts}


@dataclass(frozen=True)
class Mode:
    """How a step runs."""

    compiled: bool = False
    checkpointing: bool = False
    replayed: bool = False


MODES = {
    "eager": Mode(),
    "compiled": Mode(compiled=True),
    "replayed": Mode(compiled=True, replayed=True),
    "checkpointing": Mode(checkpointing=True),
    "compiled-checkpointing": Mode(compiled=True, checkpointing=True),
}


def layers_of(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    base: str = "plain",
    storage: torch.dtype = torch.uint8,
) -> nn.Module:
    """Layers with random weights, frozen, always the same.

    ``base``: how they are stored, as ``Workload`` has it; ``storage``: codes in tensors of this dtype.
    """
    transformers, masking = (import_module(name) for name in ("transformers", "transformers.masking_utils"))
    transformers.AttentionInterface.register("causal", causal)
    masking.AttentionMaskInterface.register("causal", lambda *args, **options: None)
    config = transformers.AutoConfig.for_model(
        shape.model_type,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.layers,
        vocab_size=32,
        attn_implementation="causal",
        use_cache=False,
        dtype=dtype,
        **({} if shape.head_dim is None else {"head_dim": shape.head_dim}),
        **_of_experts(shape),
    )
    torch.manual_seed(0)
    with device:
        model: nn.Module = transformers.AutoModel.from_config(config).to(dtype)
    return (model if base == "plain" else coded(model, base, device, dtype, storage)).requires_grad_(False)


def _of_experts(shape: Shape) -> dict[str, Any]:
    """What a config says of a shape's experts; the names for it are not those of all families."""
    if not shape.experts:
        return {}
    return {
        "num_experts": shape.experts,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "moe_intermediate_size": shape.intermediate,
        "decoder_sparse_step": 1,
        "pad_token_id": None,
        "eos_token_id": None,
    }


class Step:
    """Forward and backward of a contender, with fresh gradients.

    Attributes:
        title: of the contender.
        layers: the model of Transformers in it.
        exact: whether it computes what PEFT without dropout does.
        facts: what is to be said of it.
    """

    def __init__(self, contender: Contender, layers: nn.Module, setup: Setup, x: Tensor, grad_output: Tensor) -> None:
        self.title, self.exact, self.layers = contender.title, contender.exact, layers
        self._autocast, self._x, self._grad_output = contender.autocast, x, grad_output
        self._model, self.facts = contender.build(layers, setup)
        fill_adapters(self._model)
        self._leaves = [x, *(parameter for parameter in self._model.parameters() if parameter.requires_grad)]

    def own_bytes(self) -> int:
        """Of its weights and inputs."""
        tensors = (*self._model.parameters(), *self._model.buffers(), self._x, self._grad_output)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def forget(self) -> None:
        """Free the gradients."""
        for leaf in self._leaves:
            leaf.grad = None

    def run(self, mode: Mode, backend: str) -> Run:
        """The step in a mode; the caller switches checkpointing on and off."""
        model = self._model

        def forward(x: Tensor) -> Tensor:
            output: Tensor = model(inputs_embeds=x).last_hidden_state
            return output

        call: Any = forward
        if mode.compiled:
            whole = self.title.startswith(OURS)
            how = "reduce-overhead" if mode.replayed else None
            call = torch.compile(_own_code(forward, self.title), backend=backend, fullgraph=whole, mode=how)

        def step() -> None:
            self.forget()
            if mode.replayed:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            with torch.autocast(self._x.device.type, torch.bfloat16, enabled=self._autocast):
                output = call(self._x)
            torch.autograd.backward(output, self._grad_output)

        return step

    @torch.no_grad()
    def results(self, run: Run) -> dict[str, list[Tensor]]:
        """What a step computes: its output, and the gradients of the input and of the adapters."""
        with torch.autocast(self._x.device.type, torch.bfloat16, enabled=self._autocast):
            output = self._model(inputs_embeds=self._x).last_hidden_state
        with torch.enable_grad():
            run()
        pairs = adapters(self._model)
        assert self._x.grad is not None
        return {
            "output": [output],
            "dX": [self._x.grad.clone()],
            "dA": [a.grad.clone() for a, _ in pairs if a.grad is not None],
            "dB": [b.grad.clone() for _, b in pairs if b.grad is not None],
        }


def _own_code(function: Any, name: str) -> Callable[[Tensor], Tensor]:
    """The function with a code object of its own, by which torch.compile keeps what it compiled: no contender has to
    look through what was compiled for the others, and none of them meets the limit of recompilations.
    """
    code = function.__code__.replace(co_name=f"forward_{name}")
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


def deviation(mine: Mapping[str, list[Tensor]], theirs: Mapping[str, list[Tensor]]) -> dict[str, float]:
    """Norm of the difference over the norm, over all layers."""

    def norm(tensors: list[Tensor]) -> float:
        return math.sqrt(sum(float(tensor.float().pow(2).sum()) for tensor in tensors))

    return {
        name: round(
            norm([a.float() - b.float() for a, b in zip(mine[name], theirs[name], strict=True)]) / norm(theirs[name]), 5
        )
        for name in theirs
    }


@contextmanager
def checkpointed(steps: list[Step], enabled: bool) -> Iterator[None]:
    """Within it the layers of these steps run under activation checkpointing, if it is enabled."""
    if not enabled:
        yield
        return
    for step in steps:
        layers: Any = step.layers
        layers.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        for step in steps:
            layers = step.layers
            layers.gradient_checkpointing_disable()


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


class Bench:
    """All contenders on one shape."""

    def __init__(self, name: str, options: argparse.Namespace, folder: Path, device: torch.device) -> None:
        self.name, self.options, self.device = name, options, device
        self.shape, self.dtype = SHAPES[name], torch.bfloat16
        self.results: dict[str, Any] = {}
        usual = {} if self.shape.experts else {key: getattr(Shape, key) for key in _BESIDE_LLAMAS}
        facts = {key: value for key, value in asdict(self.shape).items() if value != usual.get(key, ...)}
        self.row: dict[str, Any] = {"shape": name, **facts, "results": self.results}
        torch.manual_seed(1)
        size = self.shape.batch, self.shape.sequence, self.shape.hidden
        self._x = torch.randn(size, device=device, dtype=self.dtype, requires_grad=True)
        self._grad_output = torch.randn_like(self._x)
        self._folder = folder
        self.steps: dict[str, Step] = {}
        frozen = Contender(FROZEN, lambda model, _: (model, {}))
        self._plain = self._step(frozen)  # its checkpointing is never switched on
        for contender in (frozen, *options.contender):
            try:
                with self._phase(contender.title, "made"):
                    self.steps[contender.title] = self._step(contender)
            except Unavailable as reason:
                print(f"{name}: {contender.title} is left out: {reason}", file=sys.stderr)
        self.results |= {title: dict(step.facts) for title, step in self.steps.items()}

    def _step(self, contender: Contender) -> Step:
        base = self.options.base
        if base.startswith("fp8") and not contender.title.startswith(OURS):
            layers = decoded(layers_of(self.shape, self.device, self.dtype), base).requires_grad_(False)
        else:
            layers = layers_of(self.shape, self.device, self.dtype, base)
        profile = self.options.profile or profile_of(layers)[0]
        axolotl, targets = self.options.axolotl, self.shape.targets
        setup = Setup(self.shape.rank, self.shape.tokens, self._folder, profile, axolotl=axolotl, targets=targets)
        return Step(contender, layers, setup, self._x, self._grad_output)

    @contextmanager
    def _phase(self, title: str, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        print(f"{self.name}: {title}: {what} in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)

    def deviations(self) -> None:
        """From PEFT's with the most precise adapters that are measured."""
        precise = (CONTENDERS[key].title for key in ("peft-fp32", "peft-bf16", "peft-default"))
        titles = [title for title in precise if title in self.steps]
        if not titles:
            return
        reference = self.steps[titles[0]]
        theirs = reference.results(reference.run(MODES["eager"], ""))
        for title, step in self.steps.items():
            if step.exact and title not in (FROZEN, reference.title):
                mine = step.results(step.run(MODES["eager"], ""))
                self.results[title]["deviation"] = {"from": reference.title, **deviation(mine, theirs)}
                step.forget()
        reference.forget()

    def mode(self, name: str) -> None:
        """Times and peaks in one mode; a contender that fails there is reported and left out."""
        mode, plain = MODES[name], {}
        with checkpointed(list(self.steps.values()), mode.checkpointing):
            runs: dict[str, Run] = {}
            for title, step in self.steps.items():
                if time.perf_counter() - _START > self.options.limit and title != FROZEN:
                    print(f"{self.name}: {title}: {name}: left out: out of time", file=sys.stderr, flush=True)
                    continue
                run = step.run(mode, self.options.backend)
                try:
                    with self._phase(title, f"{name}: first steps"):
                        repeated(run, 3)()
                        # What graphs replay lies in pools that are there before a step.
                        peak = {} if mode.replayed else self._peak(step, run)
                except Exception as error:
                    if title == FROZEN:
                        raise
                    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                    self.results[title][name] = {"failed": text}
                    print(f"{self.name}: {title}: {name}: failed: {text}", file=sys.stderr)
                    continue
                runs[title] = run
                self.results[title][name] = peak
            if name != "eager":
                plain[_PLAIN] = self._plain.run(MODES["eager"], "")
                repeated(plain[_PLAIN], 2)()
            many = {title: repeated(run, STEPS) for title, run in {**runs, **plain}.items()}
            with self._phase(f"{len(many)} contenders", f"{name}: {self.options.rounds} rounds"):
                times = interleaved(many, self.options.rounds, self.device, warmups=1, eager=True)
        for title in runs:
            self.results[title][name] = {
                "median_ms": round(statistics.median(times[title]) / STEPS * 1e3, 3),
                "over_frozen": ratios(times[title], times[FROZEN]),
                **({"over_frozen_eager": ratios(times[title], times[_PLAIN])} if plain else {}),
                **self.results[title][name],
            }
            if self.options.alone and mode.compiled and not mode.replayed:
                self.results[title][name] |= self._alone(runs[title])
        self.row["rounds"] = self.options.rounds
        if mode.compiled:
            torch._dynamo.reset()

    def _peak(self, step: Step, run: Run) -> dict[str, int]:
        """Above what is there before a step, and with the weights and inputs of this contender."""
        for other in (self._plain, *self.steps.values()):
            other.forget()
        peak = peak_bytes(run, self.device)
        step.forget()
        return {"peak_bytes": peak, "peak_total_bytes": peak + step.own_bytes()}

    def _alone(self, run: Run) -> dict[str, float]:
        return {
            "host_ms": round(host_seconds(run) * 1e3, 3),
            "device_ms": round(device_seconds(run, self.device) * 1e3, 3),
        }

    def alone(self) -> None:
        """Host and device by themselves, of eager steps; of compiled ones their mode has them."""
        runs = {title: step.run(MODES["eager"], "") for title, step in self.steps.items()}
        for title, run in runs.items():
            repeated(run, 3)()
            self.results[title] |= self._alone(run)
            if "eager" in self.results[title]:
                self.results[title]["peak_bytes"] = self.results[title]["eager"]["peak_bytes"]
        alone = linears_alone(self._plain.layers, self.shape, self.device, self.dtype)
        repeated(alone, 3)()
        linears = self._alone(alone)
        rest = {
            kind: round((self.results[FROZEN][f"{kind}_ms"] - linears[f"{kind}_ms"]) / linears[f"{kind}_ms"], 3)
            for kind in ("host", "device")
        }
        self.row |= {"linears_alone": linears, "rest_over_linears": rest}


def ratios(mine: list[float], theirs: list[float]) -> dict[str, float]:
    """Of the same rounds."""
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return {
        "median": round(statistics.median(ratios), 4),
        "min": round(min(ratios), 4),
        "max": round(max(ratios), 4),
    }


def print_row(row: dict[str, Any]) -> None:
    """One shape for people: each mode's ratio to the frozen step in it, and the peak with weights."""
    frozen = row["results"][FROZEN]
    modes = [mode for mode in MODES if mode in frozen]
    for mode in modes:
        over = frozen[mode].get("over_frozen_eager", {"median": 1.0})["median"]
        print(f"{row['shape']} {mode}: frozen {frozen[mode]['median_ms']:.2f} ms, {over:.3f} of the eager one")
        for title, result in row["results"].items():
            if "median_ms" in result.get(mode, {}):
                ratio = "{median:.3f} ({min:.3f}-{max:.3f})".format(**result[mode]["over_frozen"])
                peak = result[mode].get("peak_total_bytes")
                print(f"  {title:<40} x {ratio}" + ("" if peak is None else f"  {peak / 2**20:8.0f} MiB"))
            elif mode in result:
                print(f"  {title:<40} failed: {result[mode]['failed'][:30]}")
    for title, result in row["results"].items():
        for mode, alone in (("eager", result), *((mode, result.get(mode, {})) for mode in modes)):
            if "device_ms" in alone:
                print(f"  {title:<40} {mode}: host {alone['host_ms']:.2f} ms, device {alone['device_ms']:.2f} ms")
    sys.stdout.flush()


def wrong(row: dict[str, Any], base: str = "plain") -> list[str]:
    """What failed, or computed something else."""
    lines, most = [], MOST_DEVIATION.get(base, _MOST_DEVIATION)
    for title, result in row["results"].items():
        lines += [f"{title}: {mode}: failed" for mode in MODES if "failed" in result.get(mode, {})]
        off = {name: value for name, value in result.get("deviation", {}).items() if name != "from"}
        if any(not value <= most for value in off.values()):
            lines.append(f"{title}: computes something else than PEFT: {off}")
    return [f"{row['shape']}: {line}" for line in lines]


def merged(former: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """A row with what an earlier run had of other contenders, modes or measurements of the same shape."""
    if former is None:
        return row
    results = {title: {**result, **row["results"].get(title, {})} for title, result in former["results"].items()}
    return {**former, **row, "results": {**row["results"], **results}}


def measured_before(path: Path | None, report: dict[str, Any], *, key: str = "shape") -> dict[str, dict[str, Any]]:
    """Rows of the same machine and versions, by their names: a run of some rows keeps the others.

    Measurements of another day than the report's get its date.
    """
    former = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {"rows": []}
    if any(former.get(name) != value for name, value in report.items() if name != "date"):
        return {}
    for row in former["rows"] if former.get("date") != report["date"] else ():
        for result in row["results"].values():
            modes = [found for found in result.values() if isinstance(found, dict) and "over_frozen" in found]
            for measured in modes or [result]:
                measured.setdefault("date", former["date"])
    return {row[key]: row for row in former["rows"]}


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the contenders that it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "peft-bf16,peft-default,peft-fp32,peft-dropout,axolotl,ours,ours-bf16"
    parser.add_argument("--shapes", default="13b,8b", help="comma list of " + ", ".join(SHAPES))
    parser.add_argument("--contenders", default=default, help="comma list of " + ", ".join(CONTENDERS))
    parser.add_argument("--modes", default="eager,checkpointing,compiled", help="comma list of " + ", ".join(MODES))
    parser.add_argument("--base", default="plain", choices=CHOICES["base"], help="how weights are stored")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--profile", help="device profile that the choice is made for [this device's]")
    parser.add_argument("--axolotl", type=Path, help="the folder src/axolotl of axolotl's sources")
    parser.add_argument("--rival", action="append", default=[], metavar="NAME=FOLDER", help="other generated modules")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), metavar="SECONDS", help="after which no contender begins a mode"
    )
    parser.add_argument("--alone", action="store_true", help="also host and device by themselves")
    parser.add_argument("--json", type=Path, help="where to write the results, after every mode")
    options = parser.parse_args(arguments)
    for name, known in (("shapes", SHAPES), ("contenders", CONTENDERS), ("modes", MODES)):
        names = [text for text in getattr(options, name).split(",") if text]
        setattr(options, name, names)
        unknown = [text for text in names if text not in known]
        if unknown:
            parser.error(f"--{name}: {unknown[0]} is not allowed; give some of {', '.join(known)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; a dry run: --device cpu --shapes tiny")
    if options.device == "cpu" and options.alone:
        parser.error("--alone: needs a GPU")
    options.contender = [CONTENDERS[name] for name in options.contenders]
    for text in options.rival:
        title, _, path = text.partition("=")
        options.contender.append(Contender(title, from_folder(Path(path))))
    return options


def main() -> None:
    """Measure, print a table, write the JSON."""
    options = parsed()
    device = torch.device(options.device)
    # Else it goes on in eager mode, in silence. PEFT's parametrizations of experts do: ours are of one graph.
    torch._dynamo.config.fail_on_recompile_limit_hit = not any(SHAPES[name].experts for name in options.shapes)
    report = origin(device, options.profile)
    if options.base != "plain":
        report["base"] = options.base
        if not options.base.startswith("fp8"):
            report["bitsandbytes"] = importlib.metadata.version("bitsandbytes")
    rows = measured_before(options.json, report)
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.shapes:
            bench = Bench(name, options, Path(folder) / name, device)
            bench.deviations()
            former = rows.get(name)
            measurements: list[Callable[[], None]] = [functools.partial(bench.mode, mode) for mode in options.modes]
            for measurement in (*measurements, *([bench.alone] if options.alone else [])):
                measurement()
                rows[name] = merged(former, bench.row)
                if options.json:
                    text = json.dumps({**report, "rows": list(rows.values())}, indent=1)
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    options.json.write_text(text + "\n", encoding="utf-8")
            print_row(bench.row)
            problems += wrong(bench.row, options.base)
            del bench, measurements, measurement
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
