"""What the paper calls a program: "Run LoRA Run" (arXiv 2312.03415) has forward1 to 4 and backward1 to 8."""

from __future__ import annotations

from .enumerate import Program


def paper_labels(program: Program) -> tuple[str, ...]:
    """The paper's labels, like ``forward1/backward5``; empty for a program that it left out.

    The paper keeps no intermediate, but its adapters need no cast: with them goes what casts once.
    """
    site = program.derivation
    goals = {goal: program.backward.way_of(goal).name for goal in program.backward.goals}
    backward = site.paper_backwards.get(tuple(goals.get(goal, "") for goal in site.paper_goals))
    casts_again = any(out in site.casts for operation in program.backward.operations for out in operation.outputs)
    if backward is None or casts_again or not set(program.kept) <= site.casts.keys():
        return ()
    return tuple(f"{forward}/{backward}" for forward in program.forward.way_of(site.outputs[0]).paper)
