"""The docstrings of autograd functions: the formulas with their FLOPs, bytes and times, and why this program."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from dataclasses import replace

from ..algebra.enumerate import Phase
from ..algebra.liveness import saved_activations, wanted_operations
from ..algebra.mlp import OF_MLPS
from ..algebra.operations import Contract, Operation, products
from ..algebra.schedule import schedule
from ..cost.measured import by_bare_roofline, is_measured_itself
from ..cost.price import price_frozen, price_in, price_phase
from ..cost.rounding import FLOAT8_MANTISSA_BITS, rounding_error
from ..cost.setting import Setting
from ..cost.vector import DEVICE_BOUND, HOST_BOUND, OperationCost, PhaseCost
from ..request.workload import Workload
from ..search.choose import Decision, ForwardDecision
from ..search.criterion import Priced
from .units import show_bound, show_bytes, show_count, show_time

#: Before the second result of a formula, and each after it.
_RESULT = re.compile(r", (?=\w+(?:\[\w+\])? = )")
#: Columns of a formula's line, beside which its price stands; a longer sum goes on below.
_COLUMNS = 48


def program_text(candidate: Priced, decision: Decision, workload: Workload, reason: str, width: int) -> Iterable[str]:
    """The docstring's body: the formulas with their FLOPs and bytes, the price, and why the runner-up lost."""
    program, cost, setting = candidate.program, candidate.cost, decision.setting
    for title, phase, total in (
        ("Forward", program.forward, cost.forward),
        ("Backward", program.backward, cost.backward),
    ):
        yield from _price_table(title, phase, total, setting)
    kept = ", ".join(map(str, saved_activations(program, setting.gradients))) or "nothing"
    yield ""
    sentences = [
        f"Saved for the backward beside the parameters: {kept} ({show_bytes(cost.saved_bytes)}).",
        f"Temporaries: at most {show_bytes(cost.workspace_bytes)}.",
        *_priced_at(setting, workload, cost.device_s, cost.host_s, decision.host_share),
    ]
    if cost.update_error:
        sentences.append(f"Relative rounding error of the update: {cost.update_error:.2g}.")
    sentences += _of_float8(program.operations)
    if reason:
        sentences.append(f"{reason}.")
    for sentence in sentences:
        yield from textwrap.wrap(sentence, width - 4, break_on_hyphens=False)


def forward_text(phase: Phase, decision: ForwardDecision, workload: Workload, width: int) -> Iterable[str]:
    """The same of a forward alone."""
    setting = decision.setting
    cost = price_phase(phase, setting)
    yield from _price_table("Where no gradient is wanted", phase, cost, setting)
    yield ""
    frozen = replace(setting, gradients=frozenset())
    priced = _priced_at(frozen, workload, cost.device_s, cost.host_s, decision.host_share)
    for sentence in (*priced, *_of_float8(phase.operations)):
        yield from textwrap.wrap(sentence, width - 4, break_on_hyphens=False)


def _of_float8(operations: Iterable[Operation]) -> list[str]:
    """What is to be said where products round their input to float8."""
    rounded = [
        str(operation.outputs[0])
        for operation in operations
        if any(isinstance(step, Contract) and step.coded for step in products(operation))
    ]
    if not rounded:
        return []
    error = rounding_error(1.0, FLOAT8_MANTISSA_BITS)
    return [f"Relative error of {' and of '.join(rounded)} through what is rounded to float8: {error:.2g}."]


def _price_table(title: str, phase: Phase, total: PhaseCost, setting: Setting) -> Iterable[str]:
    wanted = wanted_operations(phase, setting.gradients)
    ordered: list[Operation] = [s.operation for s in schedule(phase, setting.bytes_of).steps if s.operation in wanted]
    prices: list[tuple[str, OperationCost | PhaseCost]] = [
        (operation.formula, price_in(operation, setting, phase.is_forward)) for operation in ordered
    ]
    # What yields several results has a line for each, and its price on the last.
    columns = max(len(line) for formula, _ in prices for line in _lines(formula))
    prices.append(("in all", total))
    yield from ("", f"{title}::", "")
    for formulas, price in prices:
        *others, formula = _lines(formulas)
        yield from (f"    {other}" for other in others)
        yield (
            f"    {formula:<{columns}}  {show_count(price.flops, 'FLOP'):>11}  {show_bytes(price.bytes_moved):>10}  "
            f"{show_time(price.device_s):>12}"
        )


def _lines(formula: str) -> list[str]:
    """Those of a formula: one for each result, more where it is a long sum."""
    lines: list[str] = []
    for result in _RESULT.split(formula):
        first, *terms = result.split(" + ")
        lines.append(first)
        for term in terms:
            if len(lines[-1]) + len(term) + 3 <= _COLUMNS:
                lines[-1] += f" + {term}"
            else:
                lines.append(f"{' ' * (result.index('=') + 1)}+ {term}")
    return lines


def _priced_at(
    setting: Setting, workload: Workload, device_s: float, host_s: float, host_share: float
) -> Iterable[str]:
    """What it was priced for, and what it takes beside what is frozen."""
    frozen_device, frozen_host = (price_frozen(setting, share) for share in (DEVICE_BOUND, HOST_BOUND))
    adapter = f", the adapter in {setting.adapter_dtype.name}," if setting.casts else ""
    linear = "experts" if setting.experts else "linears" if len(setting.derivation.outputs) > 1 else "linear"
    linear = "MLP" if setting.derivation in OF_MLPS else linear
    yield (
        f"Priced at {setting.tokens} tokens in {setting.dtype.name}{adapter} {_priced_by(setting)}: "
        f"{device_s / frozen_device:.3f} times the frozen {linear} ({show_time(frozen_device)}) on the device."
    )
    if workload.launch == "graph":
        yield "Launches cost nothing: they are replayed as a graph."
        return
    how = "Under torch.compile" if workload.launch == "compile" else "Launched eagerly"
    yield (
        f"{how} it takes the host {host_s / frozen_host:.2f} times the frozen {linear} "
        f"({show_time(frozen_host)}); a step of the whole model is bound by {show_bound(host_share)}."
    )


def _priced_by(setting: Setting) -> str:
    device = setting.device
    if by_bare_roofline(setting) or not device.meter.times_for(setting.dtype.name):
        return f"by the roofline of {device.title}"
    if device.measured_on is None or is_measured_itself(setting):
        return f"by what was measured on {device.title}"
    own = " and, of codes, on it" if setting.derivation.coded and device.times_for(setting.dtype.name) else ""
    return f"by the roofline of {device.title} with efficiencies measured on {device.measured_on.title}{own}"
