"""Results as CSV (Liger's columns and ours), JSON, a plot and a table. Needs no torch."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._row import NOTHING, Row

if TYPE_CHECKING:
    from ._run import Result

OURS, FLOOR, PEER = "peftkern", "floor", "peft"
COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label",
    "x_value", "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp",
    "version", "cpu_name", "torch_version", "triton_version", "backend", "gbps", "tflops", "percent_of_floor",
    "ratio_to_floor_50", "ratio_to_floor_20", "ratio_to_floor_80", "status", "note",
)  # fmt: skip


def write(result: Result, folder: Path, stem: str) -> list[Path]:
    """Write FOLDER/STEM.csv, .json and, where matplotlib is installed, .png, each atomically; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    files = {".csv": csv_text(result, stamp).encode(), ".json": json_text(result, stamp).encode()}
    picture = plot(result)
    if picture is not None:
        files[".png"] = picture
    written = []
    for suffix, content in files.items():
        _replace(folder / (stem + suffix), content)
        written.append(folder / (stem + suffix))
    return written


def csv_text(result: Result, stamp: str) -> str:
    """One line per row, NaN as an empty field."""
    machine = result.machine
    versions = machine.get("versions", {})
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in result.rows:
        values = dataclasses.asdict(row)
        values |= dict(zip(("y_value_50", "y_value_20", "y_value_80"), row.y, strict=True))
        ratio = row.ratios.get(FLOOR, NOTHING)
        values |= dict(zip(("ratio_to_floor_50", "ratio_to_floor_20", "ratio_to_floor_80"), ratio, strict=True))
        values |= {
            "extra_benchmark_config_str": json.dumps(row.config),
            "gpu_name": machine.get("gpu_name", ""),
            "cpu_name": machine.get("cpu_name", ""),
            "timestamp": stamp,
            "version": versions.get("peftkern", ""),
            "torch_version": versions.get("torch", ""),
            "triton_version": versions.get("triton", ""),
        }
        writer.writerow({column: _field(values[column]) for column in COLUMNS})
    return out.getvalue()


def json_text(result: Result, stamp: str) -> str:
    """The whole result: machine, GPU tests, gates, rows with their ratios to every other provider."""
    whole = {
        "format": 1,
        "timestamp": stamp,
        "machine": result.machine,
        "arguments": result.arguments,
        "gpu_tests": result.tests,
        "seconds": round(result.seconds, 1),
        "crashes": result.crashes,
        "complete": not any(row.status == "not run" for row in result.rows),
        "gates": gates(result),
        "rows": [row.to_dict() for row in result.rows],
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def gates(result: Result) -> list[dict[str, Any]]:
    """What was asked of the results and what came: reported, never asserted. `met` is None where it was not measured.

    Every case with a limit on its ratio to the floor, and every case that Hugging Face PEFT also ran: not slower.
    """
    found: list[dict[str, Any]] = []
    for row in result.rows:
        if row.kernel_provider != OURS or not _is_whole(row):
            continue
        what = "full pass" if row.kernel_operation_mode == "full" else "forward without grad"
        limit = row.config.get("limit")
        if limit is not None:
            found.append(_gate(row, f"{what} <= {limit:g} x floor", row.ratios.get(FLOOR, NOTHING), limit))
        if PEER in row.ratios:
            found.append(_gate(row, f"{what} not slower than Hugging Face PEFT", row.ratios[PEER], 1.0))
    return found


def _is_whole(row: Row) -> bool:
    """Whether this is the time of all that the case does: forward and backward, or inference alone."""
    whole = row.kernel_operation_mode == "full" or row.config.get("grad") is False
    return whole and row.metric_name == "speed"


def _gate(row: Row, wanted: str, ratio: tuple[float, float, float], limit: float) -> dict[str, Any]:
    measured = not math.isnan(ratio[0])
    return {
        "case": f"{row.kernel_name} {name(row)}",
        "wanted": wanted,
        "ratio": [round(value, 4) for value in ratio] if measured else None,
        "met": ratio[0] <= limit if measured else None,
    }


def name(row: Row) -> str:
    """The case, with the way it was launched where there are two."""
    return str(row.config.get("case", "")) + (" [graph]" if row.config.get("launch") == "graph" else "")


def table(result: Result) -> str:
    """One line per case and provider: times of forward, backward and both, ratio to the floor, share of the ceiling."""
    lines = [_head(result)]
    times = ("fwd ms", "bwd ms", "full ms")
    header = ("case", "provider", "backend", *times, "x floor (20-80 %)", "% floor", "saved MiB", "")
    body: list[tuple[str, ...]] = [header]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in result.rows:
        groups.setdefault((row.kernel_name, name(row), row.kernel_provider), []).append(row)
    previous = ""
    for (kernel, case, provider), rows in groups.items():
        title = f"{kernel} {case}"
        body.append((title if title != previous else "", provider, *_cells(rows, result.rows)))
        previous = title
    widths = [max(len(line[i]) for line in body) for i in range(len(header) - 1)]
    for line in body:
        cells = [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        ]
        lines.append("  ".join([*cells, line[-1]]).rstrip())
    lines += ["", *_gate_lines(result)]
    return "\n".join(lines)


def _cells(rows: list[Row], everything: list[Row]) -> tuple[str, ...]:
    speed = {row.kernel_operation_mode: row for row in rows if row.metric_name == "speed" and row.status == "ok"}
    saved = next((row for row in rows if row.config.get("memory") == "saved for backward"), None)
    whole = speed.get("full") or speed.get("forward")
    notes = [f"{row.status}: {row.note}" for row in rows if row.status != "ok"]
    times = [f"{speed[mode].y[0]:.4g}" if mode in speed else "" for mode in ("forward", "backward", "full")]
    ratio, share = "", ""
    if whole is not None:
        middle, low, high = whole.ratios.get(FLOOR, NOTHING)
        ratio = "" if math.isnan(middle) else f"{middle:.3f} ({low:.3f}-{high:.3f})"
        share = "" if math.isnan(whole.percent_of_floor) else f"{whole.percent_of_floor:.0f}"
    size = f"{saved.y[0]:.2f}" if saved is not None and saved.status == "ok" else ""
    return whole.backend if whole else "", *times, ratio, share, size, "; ".join(notes)


def _head(result: Result) -> str:
    machine = result.machine
    versions = machine.get("versions", {})
    device = machine.get("gpu_name") or machine.get("cpu_name", "")
    isa = machine.get("active_isa") or "no compiled CPU kernels"
    parts = [f"{device}, {machine.get('threads', '?')} threads, {isa}"]
    parts += [f"{key} {versions[key]}" for key in ("torch", "triton", "peft", "peftkern") if versions.get(key)]
    parts += [f"revision {machine.get('git_revision') or 'unknown'}"]
    parts += [f"{key} {value:.4g}" for key, value in machine.get("ceilings", {}).items()]
    head = " | ".join(parts)
    if machine.get("load_average", 0.0) > 0.5 and machine.get("device") == "cpu":
        head += f"\nThe machine was busy when this began (load {machine['load_average']:.1f}): expect noise."
    if result.tests is not None:
        head += f"\nGPU tests: {result.tests['outcome']}: {result.tests.get('summary', '')}"
        head += "".join(f"\n  {line}" for line in result.tests.get("failures", []))
    return head


def _gate_lines(result: Result) -> list[str]:
    lines = []
    for gate in gates(result):
        word = {True: "met", False: "MISSED", None: "not measured"}[gate["met"]]
        ratio = gate["ratio"]
        shown = f" {ratio[0]:.3f} ({ratio[1]:.3f}-{ratio[2]:.3f})" if ratio else ""
        lines.append(f"gate {word}: {gate['case']}: {gate['wanted']}{shown}")
    return lines


def plot(result: Result) -> bytes | None:
    """Bars of the whole pass over the floor, one group per case; None without matplotlib or without any ratio."""
    try:
        import matplotlib
    except ImportError:
        return None
    bars: dict[str, dict[str, tuple[float, float, float]]] = {}
    for row in result.rows:
        if _is_whole(row) and FLOOR in row.ratios:
            bars.setdefault(f"{row.kernel_name} {name(row)}", {})[row.kernel_provider] = row.ratios[FLOOR]
    if not bars:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    providers = sorted({provider for group in bars.values() for provider in group}, key=lambda p: (p != OURS, p))
    height = 0.8 / len(providers)
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.16 * len(providers) * len(bars)))
    for index, provider in enumerate(providers):
        there = [place for place, group in enumerate(bars.values()) if provider in group]
        y, ratios = [p + index * height for p in there], [list(bars.values())[p][provider] for p in there]
        spread = [[r[0] - r[1] for r in ratios], [r[2] - r[0] for r in ratios]]
        axes.barh(y, [r[0] for r in ratios], height, xerr=spread, label=provider, error_kw={"elinewidth": 0.7})
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(bars))], list(bars), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("forward + backward (or inference), time over the frozen floor (median, 20-80 %)")
    axes.set_title(f"{result.machine.get('gpu_name') or result.machine.get('cpu_name', '')}", fontsize=9)
    axes.legend(fontsize=7)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
    return out.getvalue()


def slug(machine: dict[str, Any]) -> str:
    """Folder name of a device: lower-case letters, digits and dashes."""
    device = machine.get("gpu_name") or f"cpu {machine.get('cpu_name', '')} {machine.get('threads', '')} threads"
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _field(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def _replace(path: Path, content: bytes) -> None:
    """Write beside the file, then rename: a reader sees the old file or the new one, never a part."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
