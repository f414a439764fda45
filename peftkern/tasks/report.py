"""Any number of finished runs side by side: a table for the terminal, report.md and a PNG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from peftkern.errors import ConfigError
from peftkern.tasks.curves import plot_curves
from peftkern.tasks.run import HISTORY, RunResult
from peftkern.tasks.settings import METRICS

MARKDOWN, PICTURE, CURVES = "report.md", "report.png", "curves.png"
_SHOWN = ("precision", "recall", "f1", "accuracy")
_SHORT = {
    "precision": "P", "recall": "R", "f1": "F1", "accuracy": "acc.", "s/epoch": "s per\nepoch", "peak MiB": "peak\nMiB",
}  # fmt: skip


def compare(runs: Sequence[Path | str], folder: Path | str) -> Table:
    """Write report.md, report.png and curves.png into `folder`, and return the table for `rich`.

    Raises ConfigError when there is no run, a folder holds none, or token and text classification are mixed.
    """
    results = [RunResult.load(run) for run in runs]
    if not results:
        raise ConfigError("report: name at least one run folder")
    if len({result.task for result in results}) > 1:
        raise ConfigError(f"report: {', '.join(sorted({r.task for r in results}))} have no metric in common")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = labels(results)
    (folder / MARKDOWN).write_text(_markdown(results, names), encoding="utf-8")
    _picture(results, names, folder / PICTURE)
    histories = {
        name: json.loads((Path(result.folder) / HISTORY).read_text(encoding="utf-8"))
        for name, result in zip(names, results, strict=True)
    }
    trained = {name: history for name, history in histories.items() if any("loss" in entry for entry in history)}
    if trained:
        plot_curves(trained, METRICS[results[0].task][0], folder / CURVES)
    return table(results, names)


def labels(results: Sequence[RunResult]) -> list[str]:
    """A name per run: its folder's, with as many parents as it takes to tell the runs apart."""
    depth = 1
    paths = [Path(result.folder).resolve().parts for result in results]
    while depth < 4 and len({path[-depth:] for path in paths}) < len(paths):
        depth += 1
    names = ["/".join(path[-depth:]) for path in paths]
    return [name if names.count(name) == 1 else f"{name} #{number}" for number, name in enumerate(names, 1)]


def table(results: Sequence[RunResult], names: Sequence[str], title: str = "") -> Table:
    """Test metrics (development where there is no test set), parameters, time and memory, a row per run.

    Fits 80 columns: long names are folded and figures never cut.
    """
    shown = Table(title=title or None, box=box.SIMPLE_HEAD, padding=0)
    header, rows = _cells(results, names)
    best = max((_scores(result)[1].get("f1", 0.0) for result in results), default=0.0)
    aside = {"accuracy"} if results[0].task == "token-classification" else set()  # of tags, most of them O
    if len({_scores(result)[0] for result in results}) == 1:
        aside.add("set")
    kept = [i for i, column in enumerate(header) if column not in aside]
    for column in (header[i] for i in kept):
        left = column in ("run", "method", "set")
        shown.add_column(
            _SHORT.get(column, column), justify="left" if left else "right", no_wrap=column != "run", overflow="fold"
        )
    for result, row in zip(results, rows, strict=True):
        is_best = _scores(result)[1].get("f1") == best and len(results) > 1
        shown.add_row(*(row[i] for i in kept), style="bold" if is_best else None)
    return shown


def _scores(result: RunResult) -> tuple[str, dict[str, float]]:
    return ("test", result.test) if result.test else ("dev", result.dev)


def _cells(results: Sequence[RunResult], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    header = ["run", "method", "set", *_SHOWN, "trainable", "share", "s/epoch", "peak MiB"]
    rows = []
    for name, result in zip(names, results, strict=True):
        split, scores = _scores(result)
        rows.append(
            [
                name,
                result.method,
                split,
                *(f"{scores[metric]:.3f}" for metric in _SHOWN),
                f"{result.trainable:,}",
                f"{100 * result.share:.2f}%",
                f"{result.seconds_per_epoch:.1f}" if result.seconds_per_epoch else "-",
                f"{result.peak_bytes / 2**20:,.0f}",
            ]
        )
    return header, rows


def _markdown(results: Sequence[RunResult], names: Sequence[str]) -> str:
    header, rows = _cells(results, names)
    lines = ["# Comparison of runs", ""]
    lines += [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    kinds = ", ".join(sorted({result.peak_kind for result in results}))
    devices = "; ".join(sorted({result.device for result in results}))
    lines += [
        "",
        "precision, recall and F1 are over whole entities (seqeval)."
        if results[0].task == "token-classification"
        else "precision, recall and F1 are means over the classes (macro).",
        f"s/epoch counts training steps only. Peak memory: {kinds}. Device: {devices}.",
        "",
        "| run | data | model | options | seed | epochs | steps | versions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in zip(names, results, strict=True):
        versions = ", ".join(f"{package} {version}" for package, version in run.versions.items())
        options = ", ".join(f"{key}={value}" for key, value in run.options.items()) or "-"
        cells: list[Any] = [name, run.data, run.model, options, run.seed, f"{run.epochs:g}", run.steps, versions]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", f"![metrics]({PICTURE})", ""])


def _picture(results: Sequence[RunResult], names: Sequence[str], path: Path) -> None:
    """Bars of the metrics, trainable parameters, seconds per epoch and peak memory."""
    figure = Figure(figsize=(12, 1.6 + 0.45 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 4, sharey=True, width_ratios=[2, 1, 1, 1])
    rows = range(len(results))
    height = 0.8 / len(_SHOWN)
    for number, metric in enumerate(_SHOWN):
        values = [_scores(result)[1][metric] for result in results]
        axes[0].barh([row + (number - 1.5) * height for row in rows], values, height, label=metric)
    axes[0].set(xlim=(0, 1), yticks=list(rows), yticklabels=names)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize="x-small")
    columns: dict[str, list[float]] = {
        "trainable parameters": [result.trainable for result in results],
        "seconds per epoch": [result.seconds_per_epoch for result in results],
        "peak memory, MiB": [result.peak_bytes / 2**20 for result in results],
    }
    for axis, (title, values) in zip(axes[1:], columns.items(), strict=True):
        axis.barh(list(rows), values, color="tab:gray")
        axis.set_xlabel(title)
    if (top := max(columns["trainable parameters"])) > 0:
        # Linear up to 1000, where ticks at powers of ten would lie on one another: 0 alone is marked there.
        axes[1].set_xscale("symlog", linthresh=1000)
        axes[1].set_xticks([0, *(10**power for power in range(3, 12, 2 if top > 1e6 else 1) if 10**power <= 2 * top)])
    figure.savefig(path, dpi=120)
