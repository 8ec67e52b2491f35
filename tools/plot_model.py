"""The README's picture of the model benchmark: what a step with LoRA costs over the frozen one.

    python tools/plot_model.py tools/results/model_h200.json docs/model_h200.png --shape 8b

Needs matplotlib (the bench extra).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

CONTENDERS = {
    "PEFT default (fp32 adapters, autocast)": "PEFT, its default",
    "PEFT, 16-bit adapters": "PEFT, bf16 adapters",
    "axolotl, 16-bit adapters": "axolotl, bf16 adapters",
    "ours": "ours, fp32 adapters",
}
MODES = ("eager", "compiled", "checkpointing")


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--shape", default="8b")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    report = json.loads(options.results.read_text(encoding="utf-8"))
    (row,) = (row for row in report["rows"] if row["shape"] == options.shape)
    figure, panels = pyplot.subplots(1, len(MODES), figsize=(9, 2.6), sharey=True, layout="constrained")
    names = list(reversed(CONTENDERS))
    for panel, mode in zip(panels, MODES, strict=True):
        extra = [100 * (row["results"][name][mode]["over_frozen"]["median"] - 1) for name in names]
        bars = panel.barh([CONTENDERS[name] for name in names], extra, color=["#2a7f62", *["#b8bcc2"] * 3])
        panel.bar_label(bars, fmt="%+.0f %%", padding=2)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_xlim(-40, 50)
        panel.set_title(mode if mode != "checkpointing" else "activation checkpointing")
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    machine = report["machine"].removeprefix("NVIDIA ").split()[0]
    figure.suptitle(
        "What LoRA adds to the time of a frozen training step "
        f"(Llama-3-8B layers, {row['batch'] * row['sequence']} tokens, {machine})"
    )
    figure.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
