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

from ._plots import FLOOR, OURS, YARDSTICK, case_name, is_whole, pictures
from ._row import NOTHING, Quantiles, Row

if TYPE_CHECKING:
    from ._supervise import Result

PEER = "peft"
_EQUAL = 1.02
"""Where dispatch has fallen back the same code runs twice: so much is noise."""
COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label",
    "x_value", "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp",
    "version", "cpu_name", "torch_version", "triton_version", "backend", "gbps", "tflops", "percent_of_floor",
    "ratio_to_floor_50", "ratio_to_floor_20", "ratio_to_floor_80", "status", "note",
)  # fmt: skip


def write(result: Result, folder: Path, stem: str) -> list[Path]:
    """Write FOLDER/STEM.csv, .json and, where matplotlib is installed, pictures, each atomically; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    files = {".csv": csv_text(result, stamp).encode(), ".json": json_text(result, stamp).encode()}
    written = []
    # The pictures come last: whatever they do, the figures are on disk.
    for found in (files, pictures(result)):
        for suffix, content in found.items():
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
        "build": result.build,
        "tests": result.tests,
        "seconds": round(result.seconds, 1),
        "crashes": result.crashes,
        "complete": not any(row.status == "not run" for row in result.rows),
        "gates": gates(result),
        "rows": [row.to_dict() for row in result.rows],
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def gates(result: Result) -> list[dict[str, Any]]:
    """What was asked of the results and what came: reported, never asserted. `met` is None where it was not measured.

    The gates that cases carry, no case slower than Hugging Face PEFT, and no op slower than eager PyTorch.
    """
    found: list[dict[str, Any]] = []
    for row in result.rows:
        if row.kernel_provider != OURS:
            continue
        found += [_mark(row, gate) for gate in row.config.get("gates", ())]
        if not is_whole(row):
            continue
        what = "full pass" if row.kernel_operation_mode == "full" else "forward without grad"
        if PEER in row.ratios:
            found.append(_gate(row, f"{what} not slower than Hugging Face PEFT", row.ratios[PEER], 1.0))
        if YARDSTICK in row.ratios and row.kernel_name != "step":
            found.append(_gate(row, f"{what} not slower than eager PyTorch", row.ratios[YARDSTICK], _EQUAL))
    return found


def _mark(row: Row, gate: dict[str, Any]) -> dict[str, Any]:
    """A gate of the row's own case: a ratio to another provider, or microseconds."""
    peak, against = gate["metric"] == "peak", gate["against"]
    what = "peak memory" if peak else {"full": "full pass"}.get(gate["mode"], gate["mode"])
    if against:
        return _gate(row, f"{what} <= {gate['limit']:.3g} x {against}", row.ratios.get(against, NOTHING), gate["limit"])
    micro = (row.y[0] * 1e3, row.y[1] * 1e3, row.y[2] * 1e3)
    return _gate(row, f"{what} <= {gate['limit']:g} us", micro, gate["limit"])


def _gate(row: Row, wanted: str, value: Quantiles, limit: float) -> dict[str, Any]:
    measured = not math.isnan(value[0])
    return {
        "case": f"{row.kernel_name} {case_name(row)}",
        "wanted": wanted,
        "value": [round(v, 4) for v in value] if measured else None,
        "met": value[0] <= limit if measured else None,
    }


def table(result: Result) -> str:
    """One line per case and provider: times of forward, backward and both, ratios to the floor and to eager PyTorch,
    share of the ceiling; of the heat map's cells ours alone."""
    lines = [_head(result)]
    times = ("fwd ms", "bwd ms", "full ms")
    header = ("case", "provider", "backend", *times, "x floor (20-80 %)", "x eager", "% floor", "saved MiB", "")
    body: list[tuple[str, ...]] = [header]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in result.rows:
        if row.kernel_provider == OURS or row.status != "ok" or not row.config.get("light"):
            groups.setdefault((row.kernel_name, case_name(row), row.kernel_provider), []).append(row)
    previous = ""
    for (kernel, case, provider), rows in groups.items():
        title = f"{kernel} {case}"
        body.append((title if title != previous else "", provider, *_cells(rows)))
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


def _cells(rows: list[Row]) -> tuple[str, ...]:
    speed = {row.kernel_operation_mode: row for row in rows if row.metric_name == "speed" and row.status == "ok"}
    saved = next((row for row in rows if row.config.get("memory") == "saved for backward"), None)
    whole = speed.get("full") or speed.get("forward")
    notes = [f"{row.status}: {row.note}" for row in rows if row.status != "ok"]
    times = [f"{speed[mode].y[0]:.4g}" if mode in speed else "" for mode in ("forward", "backward", "full")]
    ratio, eager, share = "", "", ""
    if whole is not None:
        middle, low, high = whole.ratios.get(FLOOR, NOTHING)
        ratio = "" if math.isnan(middle) else f"{middle:.3f} ({low:.3f}-{high:.3f})"
        versus = whole.ratios.get(YARDSTICK, NOTHING)[0]
        eager = "" if math.isnan(versus) else f"{versus:.3f}"
        share = "" if math.isnan(whole.percent_of_floor) else f"{whole.percent_of_floor:.0f}"
    size = f"{saved.y[0]:.2f}" if saved is not None and saved.status == "ok" else ""
    return whole.backend if whole else "", *times, ratio, eager, share, size, "; ".join(notes)


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
    for what, part in (("extension", result.build), ("correctness tests", result.tests)):
        if part is not None:
            head += f"\n{what}: {part['outcome']}" + (f" ({part['summary']})" if part.get("summary") else "")
            head += "".join(f"\n  {line}" for line in part.get("failures", []))
    return head


def _gate_lines(result: Result) -> list[str]:
    """Every gate that a case carries; of those on all cases the ones that are missed, and how many are met."""
    lines, found = [], gates(result)
    for gate in found:
        word = {True: "met", False: "MISSED", None: "not measured"}[gate["met"]]
        value = gate["value"]
        shown = f" {value[0]:.3f} ({value[1]:.3f}-{value[2]:.3f})" if value else ""
        if not (gate["met"] and "not slower" in gate["wanted"]):
            lines.append(f"gate {word}: {gate['case']}: {gate['wanted']}{shown}")
    met, measured = (sum(gate["met"] is value for gate in found) for value in (True, None))
    return [*lines, f"{met} of {len(found) - measured} gates met, {measured} not measured"]


def slug(machine: dict[str, Any]) -> str:
    """Folder name of a device: lower-case letters, digits and dashes."""
    device = machine.get("gpu_name") or "cpu"
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
