"""What the choice saw, as plain data (for ``--json`` and the manifest) and as a table for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..algebra.paper import paper_labels
from ..cost.device import load_device
from ..cost.measured import by_bare_roofline
from ..cost.price import price_frozen
from ..cost.vector import DEVICE_BOUND, HOST_BOUND
from ..forecast.estimate import Batch, Estimate
from ..forecast.gain import Gain, Side, shared_stem
from ..forecast.plan import Plan
from ..request.architecture import Architecture
from ..request.experts import Experts
from ..request.groups import Group
from ..request.mlps import Mlp
from ..request.workload import Workload
from ..search.candidates import Site
from ..search.choose import Decision
from ..search.criterion import Priced
from ..search.ranges import LayerChoice, Range
from .units import show_bound, show_bytes, show_count, show_duration, show_reason

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Version of the layout of ``explain --json`` and of the manifest.
SCHEMA_VERSION = 2


def variant_data(candidate: Priced, decision: Decision) -> dict[str, Any]:
    """One candidate: what it is, its whole cost vector, and whether it is on the Pareto front."""
    program = candidate.program
    labels = paper_labels(program)
    return {
        "id": program.id,
        "forward": program.forward.name,
        "backward": program.backward.name,
        "keeps": [str(symbol) for symbol in program.kept],
        "by_kernel": [str(symbol) for symbol in program.by_kernel],
        "paper": labels[0] if labels else None,
        "paper_labels": list(labels),
        **candidate.cost.as_dict(),
        "pareto": program.id in decision.front,
    }


def choice_data(choice: LayerChoice) -> dict[str, Any]:
    """What was chosen for one layer shape; of its candidates those that mattered, and how many there were."""
    return {
        **asdict(choice.layer),
        "ranges": [_range_data(part) for part in choice.ranges],
        "forwards": [
            {
                "last_tokens": part.last_tokens,
                "tokens": part.decision.setting.tokens,
                "chosen": part.decision.chosen.name,
                "on_16_bit_weights": part.decision.fallback.name,
            }
            for part in choice.forwards
        ],
    }


def _range_data(part: Range[Decision]) -> dict[str, Any]:
    decision = part.decision
    listed = {c.program.id: c for c in (decision.chosen, decision.fallback)}
    if decision.runner_up is not None:
        listed[decision.runner_up.program.id] = decision.runner_up
    listed |= {c.program.id: c for c in decision.candidates if c.program.id in decision.front}
    return {
        "last_tokens": part.last_tokens,
        "tokens": decision.setting.tokens,
        "host_share": decision.host_share,
        "chosen": decision.chosen.program.id,
        "on_16_bit_weights": decision.fallback.program.id,
        "runner_up": None if decision.runner_up is None else decision.runner_up.program.id,
        "reason": show_reason(decision),
        "programs": decision.programs,
        "pareto": len(decision.front),
        "variants": [variant_data(candidate, decision) for candidate in listed.values()],
    }


def site_data(site: Site, rank: int, decision: Decision) -> dict[str, Any]:
    """One layer shape, group or shape of experts with all candidates in one setting."""
    own: dict[str, Any] = {"linears": site.linears} if isinstance(site, Group | Mlp) else {}
    if isinstance(site, Mlp):
        own |= {"intermediate_features": site.intermediate_features, "activation": site.activation}
    if isinstance(site, Experts):
        own = {"experts": site.experts, "gathers": site.gathers, "top_k": site.top_k, "activation": site.activation}
    return {
        "name": site.name,
        **own,
        "in_features": site.in_features,
        "out_features": site.out_features,
        "rank": rank,
        "count": site.count,
        "projections": site.projections,
        "host_share": decision.host_share,
        "chosen": decision.chosen.program.id,
        "on_16_bit_weights": decision.fallback.program.id,
        "runner_up": None if decision.runner_up is None else decision.runner_up.program.id,
        "reason": show_reason(decision),
        "variants": [variant_data(candidate, decision) for candidate in decision.candidates],
    }


def gain_data(found: Gain) -> dict[str, Any]:
    """The whole model: all its LoRA linears and experts in one step."""

    def side(one: Side) -> dict[str, Any]:
        return {
            "time_us": _us(one.time_s(found.host_share)),
            "device_us": _us(one.times.device_s),
            "host_us": _us(one.times.host_s),
            "kept_bytes": one.kept_bytes,
        }

    return {
        "linears": found.linears,
        "stacks": found.stacks,
        "host_share": found.host_share,
        "frozen": side(found.frozen),
        "peft": side(found.peft),
        "ours": side(found.ours),
        "step": {"device_us": _us(found.step.device_s), "host_us": _us(found.step.host_s)},
    }


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def adapted(found: Gain) -> str:
    """What has adapters, counted: ``280 LoRA linears and 96 stacks of experts``."""
    stacks = f"{found.stacks} stack{'' if found.stacks == 1 else 's'} of experts"
    if not found.linears:
        return f"LoRA on {stacks}"
    return f"{found.linears} LoRA linears" + (f" and {stacks}" if found.stacks else "")


def gain_lines(found: Gain, decisions: Sequence[Decision], workload: Workload) -> Iterable[str]:
    """Three lines for the whole model: time, memory, and what decides; then what else is to be known of experts."""
    ours, frozen, peft = (side.time_s(found.host_share) for side in (found.ours, found.frozen, found.peft))
    compiled = workload.launch == "compile"
    theirs = "PEFT unfused" if compiled else "PEFT"  # its passes are priced one by one, which torch.compile fuses
    yield (
        f"time     {show_duration(ours)} a step: {ours / frozen:.2f} × frozen ({show_duration(frozen)}), "
        f"{ours / peft:.2f} × {theirs} ({show_duration(peft)})"
    )
    kept = (show_bytes(side.kept_bytes) for side in (found.ours, found.peft, found.frozen))
    yield "memory   {} kept for the backward; PEFT {}, frozen {}".format(*kept)
    device, host = show_duration(found.step.device_s), show_duration(found.step.host_s)
    by = {"time": "", "memory": "least memory; ", "flops": "fewest FLOPs; "}[workload.criterion]
    step, short = "compiled" if compiled else "a step", compiled or by  # a line has 80 columns
    if workload.launch == "graph":
        bound = f"the device ({device} a step), under CUDA graphs"
    elif found.host_share == DEVICE_BOUND:
        bound = f"the device ({device} {step}" + ("" if short else f"; the host {host}") + ")"
    elif found.host_share == HOST_BOUND:
        bound = f"the host ({host} {step}" + ("" if short else f"; the device {device}") + ")"
    else:
        longer = max(found.step.device_s, found.step.host_s)
        bound = f"device and host alike ({show_duration(longer)} {step})"
    kernels = sum(bool(decision.chosen.program.kernels) for decision in decisions)
    yield f"decides  {by}{bound}: kernels in {kernels} of {len(decisions)} shapes"
    if any(by_bare_roofline(decision.setting) for decision in decisions):
        yield "experts  by the bare roofline, which flatters the frozen ones; tune measures"
    if workload.dropout and any(decision.setting.experts for decision in decisions):
        yield "PEFT     has no dropout on experts: it is priced without"


_WAYS = {"frozen": "frozen", "peft": "PEFT", "ours": "ours", "plan": "plan"}


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan as JSON: layers, time in microseconds, memory in bytes."""
    return {
        "layers": plan.layers,
        **asdict(plan.ways),
        "time_us": _us(plan.estimate.time_s),
        "peak_bytes": plan.estimate.memory.peak,
    }


def planned_ways(plan: Plan, workload: Workload) -> str:
    """What a plan comes to, in a line."""
    peak, budget = (show_bytes(size) for size in (plan.estimate.memory.peak, workload.memory_budget or 0))
    return f"{show_ways(plan)}: {peak} of {budget} at {max(workload.tokens)} tokens, without the optimizer"


def plan_lines(plan: Plan, workload: Workload) -> list[str]:
    """What a module says of a plan."""
    step, most = plan.estimate, max(workload.tokens)
    text = (
        f"Planned for {show_bytes(workload.memory_budget or 0)} at {most} tokens of {workload.dtype} on "
        f"{load_device(workload.device).title}: {show_duration(step.time_s)} and {show_bytes(step.memory.peak)} a "
        "step, as predicted: forward and backward with head and loss, weights, adapters and their gradients, without "
        "the optimizer."
    )
    return textwrap.wrap(text, 88)


@dataclass(frozen=True)
class Predicted:
    """A step of a model, as it was predicted.

    Attributes:
        architecture, rank, workload, batch: what was asked for.
        found: the ways to train it.
        plan: that for the workload's budget of memory, or None.
        front: the plans that no other one beats, if they were asked for.
    """

    architecture: Architecture
    rank: int
    workload: Workload
    batch: Batch
    found: Mapping[str, Estimate]
    plan: Plan | None = None
    front: Sequence[Plan] = ()


def estimate_data(step: Predicted) -> dict[str, Any]:
    """A predicted step as JSON: times in microseconds, memory in bytes; with the plan and the front, if asked for."""
    workload, batch, plan = step.workload, step.batch, step.plan
    more = {} if plan is None else {"memory_budget": workload.memory_budget, "plan": plan_data(plan)}
    return {
        "arch": step.architecture.name,
        "rank": step.rank,
        "batch": batch.size,
        "sequence": batch.length,
        "checkpointing": batch.checkpointing,
        "dtype": workload.dtype,
        "adapter_dtype": workload.adapter_dtype,
        "base": workload.base,
        "device": workload.device,
        **{
            way: {
                "time_us": _us(one.time_s),
                "device_us": _us(one.times.device_s),
                "host_us": _us(one.times.host_s),
                "start_us": _us(one.start_s),
                "peak_bytes": one.memory.peak,
                "memory": asdict(one.memory),
            }
            for way, one in step.found.items()
        },
        **more,
        **({"front": [plan_data(point) for point in step.front]} if step.front else {}),
    }


def estimate_lines(step: Predicted) -> Iterable[str]:
    """A predicted step for people: a line for each way, and for the plan and those of the front if there are any."""
    workload, batch, plan = step.workload, step.batch, step.plan
    device, frozen = load_device(workload.device), step.found["frozen"]
    checkpointing = ", checkpointing" if batch.checkpointing else ""
    yield f"{step.architecture.name}, rank {step.rank}, {batch.size} x {batch.length} tokens{checkpointing}"
    base = f" on a base in {workload.base}" if workload.quantized else ""
    yield f"{workload.dtype}{base}, adapters {workload.adapter_dtype}, {device.title}"
    yield ""
    yield "            step x frozen   tokens/s       peak    weights       kept  bound by"
    rows = {**step.found, **({} if plan is None else {"plan": plan.estimate})}
    for way, one in rows.items():
        memory = one.memory
        bound = "host" if one.time_s == one.times.host_s else "device"
        sizes = "".join(f"{show_bytes(size):>11}" for size in (memory.peak, memory.weights, memory.forward))
        yield (
            f"{_WAYS[way]:<6}{show_duration(one.time_s):>10}{one.time_s / frozen.time_s:>9.2f}"
            f"{batch.tokens / one.time_s:>11,.0f}{sizes}  {bound}"
        )
    yield ""
    if plan is not None:
        yield from textwrap.wrap(f"The plan, for {show_bytes(workload.memory_budget or 0)}: {show_ways(plan)}.", 80)
        yield ""
    yield "Forward and backward with head and loss, eager, full causal attention by a flash"
    yield "kernel; no optimizer step. Peak: weights, adapters, what is kept, intermediates."
    if step.front:
        yield from _front_lines(step.front, frozen)


def show_ways(plan: Plan) -> str:
    """What layers keep, in words."""
    ways, parts = plan.ways, list[str]()
    for number, does in (
        (ways.checkpointed, "in {} the input alone is kept"),
        (ways.remade, "in {} gate and up are made again"),
        (ways.renormed, "in {} what norms give is made again"),
    ):
        if number:
            parts.append(does.format(f"{number} more" if parts else f"{number} of {plan.layers} layers"))
    return ", ".join(parts) or "all layers keep what their backward reads"


#: Lines of a front that a terminal shows.
_MOST_POINTS = 16


def _front_lines(points: Sequence[Plan], frozen: Estimate) -> Iterable[str]:
    """A front for people, from the fastest plan to the one that takes the least memory; of many some, evenly."""
    shown = min(len(points), _MOST_POINTS)
    places = sorted({round(at * (len(points) - 1) / max(1, shown - 1)) for at in range(shown)})
    yield ""
    yield f"{len(places)} of {len(points)} plans that no other beats in both, and how many layers do what:"
    yield "      step x frozen       peak  input alone  gate, up again  norms again  all"
    for point in (points[place] for place in places):
        one, ways = point.estimate, point.ways
        yield (
            f"{show_duration(one.time_s):>10}{one.time_s / frozen.time_s:>9.2f}{show_bytes(one.memory.peak):>11}"
            f"{ways.checkpointed:>13}{ways.remade:>16}{ways.renormed:>13}"
            f"{point.layers - ways.checkpointed - ways.remade - ways.renormed:>5}"
        )


#: Beside other columns in 80: of a program's name.
_COLUMNS_OF_A_PROGRAM = 30


def gain_table(sites: Sequence[Site], decisions: Sequence[Decision]) -> RenderableType:
    """One line a site: how often the model has it, what was chosen, and its ratio to what is frozen."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("n", justify="right", no_wrap=True)
    rows = [
        (
            str(site.count),
            site.name,
            f"{decision.chosen.program.forward.name}/{decision.chosen.program.backward.name}",
            f"{decision.chosen.cost.time_s / price_frozen(decision.setting, decision.host_share):.2f}",
            ",".join(site.linears) if isinstance(site, Group | Mlp) else shared_stem(site.projections),
        )
        for site, decision in zip(sites, decisions, strict=True)
    ]
    # In a terminal of 80 columns the last column is folded, and where that is not enough the others as well.
    fits = sum(max(len(row[at]) for row in rows) for at in (0, 1, 2)) <= 62
    table.add_column("in×out", overflow="fold", no_wrap=fits, min_width=None if fits else 16)
    table.add_column("forward/backward", overflow="fold", no_wrap=fits, min_width=None if fits else 24)
    table.add_column("× frozen", justify="right", no_wrap=True)
    table.add_column("projections", overflow="fold", min_width=None if fits else 8)
    for count, name, program, *rest in rows:
        if not fits and len(program) > _COLUMNS_OF_A_PROGRAM:
            halves = zip(program.split("/"), ("/", ""), strict=True)  # lines end where parts of a name do
            lines = (line for half, end in halves for line in textwrap.wrap(half + end, _COLUMNS_OF_A_PROGRAM))
            program = "\n".join(lines)
        table.add_row(count, name, program, *rest)
    return table


def explain_table(site: Site, rank: int, decision: Decision, *, show_all: bool) -> Iterable[RenderableType]:
    """The readable form: the Pareto variants, the paper's, the chosen one and why; ``show_all``: every program."""
    from rich.table import Table
    from rich.text import Text

    setting = decision.setting
    frozen = price_frozen(setting, decision.host_share)
    if isinstance(site, Group | Mlp):
        served = "; ".join(" with ".join(dict.fromkeys(names)) for names in site.projections)
    else:
        served = ", ".join(site.projections)
    yield Text(
        f"{site.name}  rank {rank}  ({served}; {site.count} in the model)  "
        f"{setting.tokens} tokens, {setting.dtype.name}, {setting.device.title}",
        style="bold",
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("variant (forward/backward: dX-dA-dB/kept/kernels)", overflow="fold", min_width=24)
    table.add_column("paper", overflow="fold")
    for title in ("FLOPs", "saved", "workspace", "moved", "launches", "time µs", "× frozen", "update error"):
        table.add_column(title, justify="right", no_wrap=True)
    ranked = sorted(decision.candidates, key=lambda c: (c.cost.time_s, c.program.id))
    for candidate in ranked:
        program, cost = candidate.program, candidate.cost
        labels = paper_labels(program)
        on_front, is_chosen = program.id in decision.front, program == decision.chosen.program
        if not (show_all or on_front or labels or is_chosen):
            continue
        table.add_row(
            ("→" if is_chosen else " ") + ("*" if on_front else " "),
            program.id,
            _paper(labels),
            show_count(cost.flops),
            show_bytes(cost.saved_bytes),
            show_bytes(cost.workspace_bytes),
            show_bytes(cost.bytes_moved),
            str(cost.launches),
            f"{cost.time_s * 1e6:,.1f}",
            f"{cost.time_s / frozen:.3f}",
            f"{cost.update_error:.2g}" if cost.update_error else "-",
            style="green" if is_chosen else None,
        )
    yield table
    yield Text(f"→ chosen: {decision.chosen.program.id}   * on the Pareto front")
    yield Text(f"  the step of the whole model is bound by {show_bound(decision.host_share)}: that is the time here")
    yield Text(f"  the runner-up lost: {show_reason(decision)}")
    if decision.fallback.program != decision.chosen.program:
        yield Text(f"  on 16-bit weights: {decision.fallback.program.id}")


def _paper(labels: tuple[str, ...]) -> str:
    """``forward2/backward5`` and ``forward4/backward5`` as ``forward2|4/backward5``."""
    if not labels:
        return ""
    forwards, backward = [label.split("/")[0] for label in labels], labels[0].split("/")[1]
    return "|".join([forwards[0], *(name.removeprefix("forward") for name in forwards[1:])]) + f"/{backward}"
