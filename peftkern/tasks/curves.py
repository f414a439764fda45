"""Learning curves of one or several runs as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

History = Sequence[Mapping[str, Any]]


def plot_curves(histories: Mapping[str, History], metric: str, path: Path) -> None:
    """Training loss per step and development `metric` per epoch, one line per name, side by side into `path`.

    `histories`: name -> the Trainer's log history.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, score = figure.subplots(1, 2)
    for name, history in histories.items():
        steps = [entry for entry in history if "loss" in entry]
        loss.plot([entry["step"] for entry in steps], [entry["loss"] for entry in steps], label=name, linewidth=1)
        evaluations = [entry for entry in history if f"eval_{metric}" in entry]
        x = [entry["epoch"] for entry in evaluations]
        score.plot(x, [entry[f"eval_{metric}"] for entry in evaluations], marker="o", markersize=3, label=name)
    loss.set(xlabel="step", ylabel="training loss", yscale="log")
    score.set(xlabel="epoch", ylabel=f"development {metric}", ylim=(0, 1))
    for axes in (loss, score):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
