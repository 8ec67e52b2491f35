"""A picture of the plans of a model: what a step takes, in time and in memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ..forecast.estimate import Steps, Ways
from ..forecast.plan import Plan
from ..request.errors import SpecError, reason, shorten

#: What can be drawn, by the ending of the file.
FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: str) -> None:
    """Refuse what can't be drawn, before anything is priced.

    Raises:
        SpecError: another kind of file, or there is no matplotlib.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise SpecError(f"--picture: {shorten(path)} is not allowed; give a file that ends in {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise SpecError("--picture: needs matplotlib: pip install matplotlib")


def draw(path: Path, title: str, steps: Steps, front: Sequence[Plan], plan: Plan | None, budget: int | None) -> None:
    """Draw a front, with what the frozen model and PEFT take beside it, each with checkpointing and without.

    Args:
        path: the file; its ending says of which kind.
        title: what stands above.
        steps: of the model.
        front: its plans.
        plan, budget: the plan that was asked for, and the bytes that it fits in.

    Raises:
        SpecError: it can't be written.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    gib = 2**30
    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
    peaks = [point.estimate.memory.peak / gib for point in front]
    axes.plot(peaks, [point.estimate.time_s for point in front], color="#1b6e53", lw=2, label="plans")
    for name, of, color in (("frozen", steps.frozen, "#777777"), ("PEFT", steps.peft, "#b5483a")):
        for checkpointed, marker, more in ((0, "o", ""), (steps.layers, "s", ", checkpointing")):
            one = of(Ways(checkpointed))
            axes.plot(one.memory.peak / gib, one.time_s, marker, color=color, label=f"{name}{more}", ls="none")
    if plan is not None and budget is not None:
        axes.axvline(budget / gib, color="#1b6e53", lw=0.8, ls=":")
        one = plan.estimate
        axes.plot(one.memory.peak / gib, one.time_s, "D", color="#1b6e53", label="the plan for the budget", ls="none")
    axes.set(title=title, xlabel="peak memory of a step, GiB (predicted)", ylabel="time of a step, s (predicted)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize="small")
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise SpecError(f"--picture: cannot write {shorten(str(path))}: {reason(error)}") from None
    finally:
        pyplot.close(figure)
