"""Which layers keep what, so that a whole step takes the least time within a budget of memory.

A layer keeps all that its backward reads; or all but what its norms give; or neither that nor what gate and up give;
or its input alone. The layers of a model are alike, so that a plan is three numbers, and all triples of them are
priced: of a model of L layers there are (L + 1)(L + 2)(L + 3) / 6. In which order the kinds stand is no choice: where
the backward of a layer makes more again than that of another one, the most is alive at once if it stands behind that
one, so the first layers are those that keep their input alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..request.architecture import Architecture
from ..request.errors import SpecError
from ..request.workload import Workload
from .estimate import Batch, Estimate, Steps, Ways, check_modelled, steps_of

MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What layers keep, and what a step of the model takes then.

    Attributes:
        ways: how many layers keep less.
        layers: how many there are.
        estimate: time and memory.
    """

    ways: Ways
    layers: int
    estimate: Estimate

    @property
    def order(self) -> tuple[float, int]:
        """Of two plans that fit the lesser one is better."""
        return self.estimate.time_s, self.estimate.memory.peak


def every_plan(steps: Steps) -> list[Plan]:
    """All plans of a model, those that keep the most first."""
    count = steps.layers
    remade = count if steps.remade is not None else 0
    renormed = count if steps.renormed is not None else 0
    every = [
        Ways(first, more, again)
        for first in range(count + 1)
        for more in range(min(remade, count - first) + 1)
        for again in range(min(renormed, count - first - more) + 1)
    ]
    return [Plan(ways, count, steps.ours(ways)) for ways in every]


def front(plans: Sequence[Plan]) -> list[Plan]:
    """Those that no other one beats in both time and peak memory, from the fastest to the one that takes least."""
    kept: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: plan.order):
        if not kept or plan.estimate.memory.peak < kept[-1].estimate.memory.peak:
            kept.append(plan)
    return kept


def plan_within(plans: Sequence[Plan], budget: int) -> Plan:
    """The fastest of some plans whose peak is within a budget.

    Args:
        plans: of one model and batch.
        budget: in bytes: weights, adapters with their gradients, and all that a step takes.

    Raises:
        SpecError: there is none; the message names the least that one of them takes.
    """
    fitting = [plan for plan in plans if plan.estimate.memory.peak <= budget]
    if not fitting:
        # In the unit that both are told in: what is named is enough.
        least = min(plan.estimate.memory.peak for plan in plans)
        raise SpecError(
            f"--memory-budget: {budget // MIB} MiB is too little for a step, which takes {-(-least // MIB)} MiB at "
            "least, where each layer keeps its input alone; give more, or fewer tokens"
        )
    return min(fitting, key=lambda plan: plan.order)


def plan_for(architecture: Architecture, rank: int, workload: Workload) -> tuple[Plan, Steps]:
    """The plan that a workload asks for, at the largest of its token counts, and the steps that it is of.

    Raises:
        SpecError: none fits its ``memory_budget``, or the model's steps are not modelled.
    """
    assert workload.memory_budget is not None
    if workload.launch == "compile":
        raise SpecError("--memory-budget: needs --launch eager or graph; what torch.compile keeps is its own choice")
    check_modelled(architecture, "--memory-budget")
    tokens = max(workload.tokens)
    length = workload.sequence or tokens
    steps = steps_of(architecture, rank, workload, Batch(tokens // length, length))
    return plan_within(every_plan(steps), workload.memory_budget), steps
