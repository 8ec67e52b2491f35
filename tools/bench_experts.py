"""Time of one projection of LoRA experts: generated modules against the frozen projection.

    python tools/bench_experts.py --experts 128 --top-k 8 --tokens 4096 --hidden 2048 --width 768 --rank 8
        --json tools/results/experts_h100.json

Both projections of a mixture of experts run by themselves, on random weights and with random choices of experts: the
first one, which reads tokens, and the last, which combines rows to tokens by the router's weights. Loads: ``even``, of
random choices; ``uneven``, where one expert has a third of all rows; ``empty``, where 40 of 128 experts have none. All
contenders run interleaved, in random order, eagerly and as replays of CUDA graphs; what is reported is the ratio to the
frozen projection of the same round, as Transformers computes it (``over_frozen``), and to its two products of rows by
expert alone, without a gather or a sum of rows (``over_products``). A step is forward and backward, with the gradients
of the input and of the router's weights. ``split`` is LoRA as products of torch by expert.

How far outputs and gradients are from those in float64 of a loop over experts is reported over their size. Needs a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from bench_linear import environment
from bench_quantized import timed
from runlora_gen.measure.modules import render_module
from runlora_gen.request.experts import Experts
from runlora_gen.request.workload import Workload
from runlora_gen.search.ranges import decide_model
from torch import Tensor, nn

FROZEN, PRODUCTS = "frozen", "frozen, its products alone"
SCALING = 2.0
LOADS = ("even", "uneven", "empty")


@dataclass
class Problem:
    """One projection with its input, and how its rows are sorted."""

    site: Experts
    x: Tensor
    grad_output: Tensor
    weight: Tensor
    index: Tensor
    weights: Tensor
    routing: Any

    @property
    def expert_of_row(self) -> Tensor:
        """Of each sorted row."""
        return self.index.reshape(-1)[self.routing.rows]


class _Projection(nn.Module):
    """A contender."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem
        self.offs = problem.routing.starts[1:].contiguous()
        self.weight = problem.weight
        self.weights = nn.Parameter(problem.weights.clone())

    def rows_of(self, x: Tensor) -> Tensor:
        """The rows that experts read."""
        routing = self.problem.routing
        return x[routing.rows // routing.top_k] if self.problem.site.gathers else x

    def given(self, rows: Tensor) -> Tensor:
        """What is returned: rows, or the tokens that Transformers combines them to."""
        routing = self.problem.routing
        if self.problem.site.gathers:
            return rows
        weighed = rows * self.weights.reshape(-1)[routing.rows, None]
        return weighed[routing.places].view(*self.weights.shape, -1).sum(1).to(rows.dtype)


class Frozen(_Projection):
    """As Transformers computes it."""

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens or rows to rows or tokens."""
        return self.given(torch._grouped_mm(self.rows_of(x), self.problem.weight.mT, offs=self.offs))


class _TwoProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, gradient: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, weight, offs)
        ctx.shape = x.shape
        return torch._grouped_mm(rows, weight.mT, offs=offs)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        gradient, weight, offs = ctx.saved_tensors
        torch._grouped_mm(gradient, weight, offs=offs)
        return gradient.new_empty(ctx.shape), None, None, None, None


class Products(_Projection):
    """The two products of the frozen projection alone."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.rows = self.rows_of(problem.x.detach()).contiguous()
        self.gradient = torch.randn(self.rows.shape[0], problem.weight.shape[1], device="cuda", dtype=problem.x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Two products, whatever the input; of the output as many rows as are expected."""
        made: Tensor = _TwoProducts.apply(  # type: ignore[no-untyped-call]
            x, self.rows, self.gradient, self.problem.weight, self.offs
        )
        return made[: self.problem.grad_output.shape[0]]


class _Adapted(_Projection):
    def __init__(self, problem: Problem, rank: int) -> None:
        super().__init__(problem)
        experts, out_features, in_features = problem.weight.shape
        like: dict[str, Any] = {"device": "cuda", "dtype": problem.x.dtype}
        self.lora_A = nn.Parameter(torch.randn(experts, rank, in_features, **like) / in_features**0.5)
        self.lora_B = nn.Parameter(torch.randn(experts, out_features, rank, **like) * 0.1)


class Split(_Adapted):
    """Products of torch by expert, that of the adapter beside the large one."""

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens or rows to rows or tokens."""
        rows = self.rows_of(x)
        low = torch._grouped_mm(rows, self.lora_A.mT, offs=self.offs) * SCALING
        made = torch._grouped_mm(rows, self.problem.weight.mT, offs=self.offs)
        return self.given(made + torch._grouped_mm(low, self.lora_B.mT, offs=self.offs))


class Ours(_Adapted):
    """A generated module's function."""

    def __init__(self, problem: Problem, module: ModuleType, rank: int) -> None:
        super().__init__(problem, rank)
        self._function = module.lora_experts

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens or rows to rows or tokens."""
        more = {} if self.problem.site.gathers else {"weights": self.weights}
        output: Tensor = self._function(
            x, self.problem.weight, self.lora_A, self.lora_B, routing=self.problem.routing, scaling=SCALING, **more
        )
        return output


def choices(site: Experts, tokens: int, load: str) -> Tensor:
    """The experts of each token, random, by a load. The one that has a third of all rows has some of a token twice."""
    scores = torch.rand(tokens, site.experts, device="cuda")
    if load == "empty":
        scores[:, torch.randperm(site.experts)[: site.experts * 40 // 128]] = -1
    index = scores.topk(site.top_k).indices
    if load == "uneven":
        index[torch.rand(tokens, site.top_k, device="cuda") < 1 / 3] = 0
    return index


def problem_of(site: Experts, tokens: int, load: str, module: ModuleType) -> Problem:
    """Random weights, input and choices."""
    torch.manual_seed(0)
    like: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    index = choices(site, tokens, load)
    rows = tokens * site.top_k
    read, made = (tokens, rows) if site.gathers else (rows, tokens)
    return Problem(
        site,
        torch.randn(read, site.in_features, **like).requires_grad_(),
        torch.randn(made, site.out_features, **like),
        nn.Parameter(
            torch.randn(site.experts, site.out_features, site.in_features, **like) / site.in_features**0.5,
            requires_grad=False,
        ),
        index,
        torch.rand(tokens, site.top_k, **like),
        module.route(index, site.experts),
    )


def errors(ours: Ours) -> dict[str, float]:
    """How far outputs and gradients are from those in float64, in the mean square, relative; of few experts."""
    problem = ours.problem
    inputs = {"dX": problem.x, "dA": ours.lora_A, "dB": ours.lora_B}
    if not problem.site.gathers:
        inputs["dg"] = ours.weights
    output = ours(problem.x)
    found = dict(zip(inputs, torch.autograd.grad(output, list(inputs.values()), problem.grad_output), strict=True))
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    routing, starts = problem.routing, problem.routing.starts.tolist()
    rows = wide["dX"][routing.rows // routing.top_k] if problem.site.gathers else wide["dX"]
    parts = []
    for expert, (first, last) in enumerate(itertools.pairwise(starts)):
        low = rows[first:last] @ wide["dA"][expert].T @ wide["dB"][expert].T
        parts.append(rows[first:last] @ problem.weight[expert].double().T + SCALING * low)
    exact = torch.cat(parts)
    if not problem.site.gathers:
        exact = (exact[routing.places].view(*wide["dg"].shape, -1) * wide["dg"][..., None]).sum(1)
    wanted = dict(
        zip(inputs, torch.autograd.grad(exact, list(wide.values()), problem.grad_output.double()), strict=True)
    )
    pairs = {"Y": (output, exact), **{name: (found[name], wanted[name]) for name in inputs}}
    return {
        name: float(f"{((ours.double() - true).norm() / true.norm()).item():.3g}")
        for name, (ours, true) in pairs.items()
    }


def measure(site: Experts, options: argparse.Namespace, workload: Workload, folder: Path) -> list[dict[str, Any]]:
    """All contenders on one projection, by each load."""
    choice = decide_model(workload, (site,), options.rank, alone=True)[0]
    module = render_module(choice, options.rank, workload, folder / site.name)
    rows = []
    for load in options.loads.split(","):
        problem = problem_of(site, options.tokens, load, module)
        ours = Ours(problem, module, options.rank)
        made = {
            FROZEN: Frozen(problem),
            PRODUCTS: Products(problem),
            "split": Split(problem, options.rank),
            "generated": ours,
        }
        error = errors(ours)
        results = timed(made, problem.x, problem.grad_output, options.rounds, {"frozen": FROZEN, "products": PRODUCTS})
        loads = problem.routing.starts.diff()
        row = {
            "site": site.name,
            "tokens": options.tokens,
            "top_k": site.top_k,
            "rank": options.rank,
            "load": load,
            "rows_of_an_expert": {"least": int(loads.min()), "most": int(loads.max())},
            "chosen": choice.ranges[-1].decision.chosen.program.id,
            "errors": error,
            "results": results,
        }
        rows.append(row)
        print(f"{site.name}, {load}: {row['rows_of_an_expert']}, {row['chosen']}, {error}")
        for title, result in results.items():
            print(f"  {title:<30} {_shown(result)}", flush=True)
        del problem, ours, made
        torch.cuda.empty_cache()
    return rows


def _shown(result: dict[str, Any]) -> str:
    return "  ".join(
        f"{mode} {result[mode]['median_us']:7.1f} us x {result[mode]['over_frozen']['median']:.3f} "
        f"({result[mode]['over_products']['median']:.3f})"
        for mode in ("eager", "graph", "forward")
    )


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("experts", 128), ("top_k", 8), ("tokens", 4096), ("hidden", 2048), ("width", 768)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--profile", default="h100")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = {"date": datetime.date.today().isoformat(), **environment(), "profile": options.profile}
    workload = Workload(tokens=(options.tokens,), adapter_dtype="bf16", device=options.profile, launch="graph")
    sites = (
        Experts(options.experts, options.hidden, 2 * options.width, True, options.top_k, False, 1, ("gate_up_proj",)),
        Experts(options.experts, options.width, options.hidden, False, options.top_k, False, 1, ("down_proj",)),
    )
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for site in sites:
            rows += measure(site, options, workload, Path(name))
            if options.json:
                options.json.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
