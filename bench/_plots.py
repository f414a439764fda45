"""The two pictures: every case over its floor, and where ours is faster or slower than eager PyTorch."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from ._row import Quantiles, Row

if TYPE_CHECKING:
    from ._supervise import Result

OURS, FLOOR, YARDSTICK = "peftkern", "floor", "torch"
Cells = dict[tuple[float, float], float]
"""(hidden, tokens) -> time of ours over that of eager PyTorch, the worst of the cases that share a cell."""


def is_whole(row: Row) -> bool:
    """Whether this is the time of all that the case does: forward and backward, or inference alone."""
    whole = row.kernel_operation_mode == "full" or row.config.get("grad") is False
    return whole and row.metric_name == "speed"


def case_name(row: Row) -> str:
    """The case, with the way it was launched where there are two."""
    return str(row.config.get("case", "")) + (" [graph]" if row.config.get("launch") == "graph" else "")


def pictures(result: Result) -> dict[str, bytes]:
    """PNG files by the end of their name; none without matplotlib, or without anything to show."""
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("Agg")
    kernels = list(dict.fromkeys(row.kernel_name for row in result.rows))
    found = {"-heat.png": heat_map(result)}
    found |= {f"-{name}.png" if len(kernels) > 1 else ".png": bars(result, name) for name in kernels}
    return {end: picture for end, picture in found.items() if picture is not None}


def bars(result: Result, kernel: str) -> bytes | None:
    """The whole pass over the floor, one group of bars per case of a kernel that is no cell of the heat map alone."""
    groups: dict[str, dict[str, Quantiles]] = {}
    for row in result.rows:
        whole = is_whole(row) and FLOOR in row.ratios and not row.config.get("light")
        if whole and row.kernel_name == kernel:
            groups.setdefault(f"{row.kernel_name} {case_name(row)}", {})[row.kernel_provider] = row.ratios[FLOOR]
    if not groups:
        return None
    from matplotlib import pyplot

    providers = sorted({provider for group in groups.values() for provider in group}, key=lambda p: (p != OURS, p))
    height = 0.8 / len(providers)
    # A picture of 65,536 pixels or more cannot be drawn.
    figure, axes = pyplot.subplots(figsize=(10, min(400.0, 1.2 + 0.12 * len(providers) * len(groups))))
    for index, provider in enumerate(providers):
        there = [place for place, group in enumerate(groups.values()) if provider in group]
        y, ratios = [p + index * height for p in there], [list(groups.values())[p][provider] for p in there]
        spread = [[r[0] - r[1] for r in ratios], [r[2] - r[0] for r in ratios]]
        axes.barh(y, [r[0] for r in ratios], height, xerr=spread, label=provider, error_kw={"elinewidth": 0.7})
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(groups))], list(groups), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("forward + backward (or inference), time over the frozen floor (median, 20-80 %)")
    axes.set_title(_device(result), fontsize=9)
    axes.legend(fontsize=7)
    return _png(figure)


def heat_cells(result: Result) -> dict[tuple[str, str], dict[float, Cells]]:
    """(op, how it was launched) -> rank -> cells."""
    found: dict[tuple[str, str], dict[float, Cells]] = {}
    for row in result.rows:
        place = _place(row)
        if row.kernel_provider != OURS or not is_whole(row) or YARDSTICK not in row.ratios or place is None:
            continue
        hidden, tokens, rank = place
        launch = str(row.config.get("launch", ""))
        cells = found.setdefault((row.kernel_name, launch), {}).setdefault(rank, {})
        ratio = row.ratios[YARDSTICK][0]
        if not math.isnan(ratio):
            cells[hidden, tokens] = max(ratio, cells.get((hidden, tokens), 0.0))
    return {key: {rank: cells for rank, cells in ranks.items() if cells} for key, ranks in found.items()}


def _place(row: Row) -> tuple[float, float, float] | None:
    """hidden, tokens and rank of an op's case; None for a training step."""
    config = row.config
    if row.kernel_name == "step":
        return None
    tokens = config.get("tokens", config.get("M", config.get("B", math.nan) * config.get("S", 1)))
    place = (config.get("hidden", row.x_value), tokens, config.get("rank", config.get("R", config.get("T", 0))))
    return None if any(math.isnan(value) for value in place) else place


def heat_map(result: Result) -> bytes | None:
    """Time of ours over eager PyTorch's: a panel per op, launch and rank, rows hidden, columns tokens; > 1 in red."""
    panels = {key: ranks for key, ranks in heat_cells(result).items() if ranks}
    if not panels:
        return None
    from matplotlib import pyplot

    width = max(len(ranks) for ranks in panels.values())
    size = (3.4 * width, 2.6 * len(panels))
    figure, grid = pyplot.subplots(len(panels), width, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.set_axis_off()
    for line, ((kernel, launch), ranks) in zip(grid, panels.items(), strict=True):
        for axes, (rank, cells) in zip(line, sorted(ranks.items()), strict=False):
            _panel(axes, cells)
            axes.set_title(kernel + (f" r{rank:g}" if rank else "") + (f" [{launch}]" if launch else ""), fontsize=8)
    figure.suptitle(f"{_device(result)}: time over eager PyTorch's (above 1: slower)", fontsize=9)
    return _png(figure)


_DARK = 0.7
"""Of a cell's log2: beyond it the map is so dark that text must be white."""


def _panel(axes: Any, cells: Cells) -> None:
    hiddens, tokens = sorted({h for h, _ in cells}), sorted({t for _, t in cells})
    colours = [[math.log2(cells[h, t]) if (h, t) in cells else math.nan for t in tokens] for h in hiddens]
    axes.set_axis_on()
    axes.imshow(colours, cmap="RdYlGn_r", vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(range(len(tokens)), [f"{t:g}" for t in tokens], fontsize=6)
    axes.set_yticks(range(len(hiddens)), [f"{h:g}" for h in hiddens], fontsize=6)
    for y, hidden in enumerate(hiddens):
        for x, token in enumerate(tokens):
            if (hidden, token) in cells:
                ratio = cells[hidden, token]
                dark = abs(math.log2(ratio)) > _DARK
                colour = "white" if dark else "darkred" if ratio > 1 else "black"
                weight = "bold" if ratio > 1 else "normal"
                axes.text(x, y, f"{ratio:.2f}", ha="center", va="center", fontsize=6, color=colour, weight=weight)


def _device(result: Result) -> str:
    return str(result.machine.get("gpu_name") or result.machine.get("cpu_name", ""))


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
    return out.getvalue()
