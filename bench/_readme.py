"""README's figures, written from the committed result files and from nothing else; needs no torch.

Between the markers stand the tables of every folder of bench/results, the CPUs' (cpu, cpu-*) before the GPUs', each
with what it was measured on. Where the kernels have changed since, it says so; where there is no GPU's, that too.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
from pathlib import Path
from typing import Any

from ._plots import FLOOR, OURS, YARDSTICK, case_name, is_whole
from ._report import PEER
from ._row import NOTHING, Row
from ._sources import kernel_hash, root

BEGIN, END = "<!-- benchmark figures: begin -->", "<!-- benchmark figures: end -->"
_PEERS = {PEER: "Hugging Face PEFT", "adapterhub": "AdapterHub", "addmm": "in-place addmm", YARDSTICK: "eager PyTorch"}
_PEERS |= {name: name for name in ("torch.compile", "torch.compile max-autotune", "peft+liger", "unsloth")}
_OPS_SHOWN = 4
"""Cases of each op that the tables show, the first ones of the file: the most telling."""
_CASES_NAMED = 4
"""Cases named for each mark that was missed; the file has them all."""
_WIDTH = 150
_STEPS = (
    "Whole steps, adapters in f32, LoRA of rank 8: time over the *frozen floor*, the same model with a gradient "
    "flowing through it and no adapter; medians of interleaved rounds, 20 to 80 % in brackets."
)
_OPS = (
    "Forward and backward: time over the least that any implementation does (low_rank: the base layer; "
    "bottleneck: its matrix products; prompt_concat: a copy of the output; others: see their file in bench/)."
)
_LAUNCHES = (
    "[graph]: under CUDA graphs. Elsewhere every sample starts from an idle GPU, so that what Python takes to launch "
    "counts in full: where that is longer than the work, as on small shapes, capture graphs (or torch.compile with "
    "mode=\"reduce-overhead\")."
)
OLDER = "**Measured on an older revision: the kernels have changed since.**"
NO_GPU = "No GPU figure has been measured."


def main(how: str | Path, folder: Path | None = None) -> int:
    """ "write" the section or "check" it; exit code 1 when the check fails."""
    top = folder or root()
    readme = top / "README.md"
    text = readme.read_text("utf-8")
    wanted = replaced(text, figures(top))
    if str(how) == "write":
        readme.write_text(wanted, "utf-8")
        return 0
    if wanted != text:
        print("README.md: not the figures of bench/results; `make readme-figures` writes them", file=sys.stderr)
    return int(wanted != text)


def replaced(text: str, section: str) -> str:
    """The text with `section` between the markers; ValueError without them."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no section between {BEGIN} and {END}")
    return f"{head}{begin}\n{section}\n{end}{tail}"


def figures(top: Path) -> str:
    """The whole section as Markdown."""
    folders = sorted(path for path in (top / "bench" / "results").iterdir() if path.is_dir())
    cpus = [folder for folder in folders if folder.name.split("-")[0] == "cpu"]
    gpus = [folder for folder in folders if folder not in cpus]
    parts = [section for folder in (*cpus, *gpus) if (section := _device_section(folder, top))]
    if not any(list(folder.glob("*.json")) for folder in gpus):
        parts.append(NO_GPU)
    return "\n\n".join(parts)


def _device_section(folder: Path, top: Path) -> str:
    """Heading, provenance and tables of one device's folder; "" without a result."""
    files = [json.loads(path.read_text("utf-8")) | {"path": path} for path in sorted(folder.glob("*.json"))]
    files = sorted((file for file in files if not file["arguments"]["quick"]), key=lambda file: str(file["timestamp"]))
    if not files:
        return ""
    # A case that two files hold comes from the later one.
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for file in files:
        for row in file["rows"]:
            latest[row["kernel_name"], row["config"].get("case", "")] = file
    rows: list[Row] = []
    for file in files:
        rows += [
            Row.from_dict(row) for row in file["rows"]
            if latest[row["kernel_name"], row["config"].get("case", "")] is file
        ]  # fmt: skip
    machine = files[-1]["machine"]
    name = machine["gpu_name"] or f"{machine['cpu_name']}, {machine['active_isa'] or 'no compiled kernels'}"
    parts = [f"### Figures: {name}", *(_provenance(file, top) for file in files)]
    if machine["device"] == "cuda":
        parts.append(textwrap.fill(_LAUNCHES, _WIDTH))
    parts += _tables(rows)
    return "\n\n".join(parts)


def _provenance(file: dict[str, Any], top: Path) -> str:
    machine, versions = file["machine"], file["machine"]["versions"]
    where = f"CUDA {machine['cuda']}" if machine["device"] == "cuda" else f"{machine['threads']} threads"
    parts = [where, *(f"{key} {versions[key]}" for key in ("torch", "triton", "peft") if versions.get(key))]
    parts += [f"revision {machine['git_revision'] or 'unknown'}", str(file["timestamp"])[:10]]
    text = f"[{file['path'].name}]({file['path'].relative_to(top).as_posix()}): {', '.join(parts)}."
    if machine["device"] == "cpu" and machine["load_average"] > 0.5:
        load = f"{machine['load_average']:.1f}"
        text += f" Other work ran on the machine (load {load}): read the order, not the second digit."
    tests = file.get("tests")
    if tests is not None:
        text += f" Correctness tests before the run: {tests['outcome']} ({tests['summary']})."
    gates = [gate for gate in file.get("gates", ()) if gate["met"] is not None]
    if gates:
        text += f" {sum(gate['met'] for gate in gates)} of {len(gates)} gates met"
        missed: dict[str, list[str]] = {}
        for gate in gates:
            if not gate["met"]:
                missed.setdefault(gate["wanted"], []).append(gate["case"])
        marks = [f"{wanted}: {_named(cases)}" for wanted, cases in missed.items()]
        text += f"; missed: {'; '.join(marks)}." if missed else "."
    if not file["complete"]:
        text += " The time budget cut the run short."
    if machine["kernel_sources_sha256"] != kernel_hash(machine["device"], top):
        text += f" {OLDER}"
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _named(cases: list[str]) -> str:
    more = len(cases) - _CASES_NAMED
    return ", ".join(cases[:_CASES_NAMED]) + (f" and {more} more" if more > 0 else "")


def _tables(rows: list[Row]) -> list[str]:
    steps = [row for row in rows if row.kernel_name == "step"]
    ops = [row for row in rows if row.kernel_name != "step" and not row.config.get("light")]
    single = _table(ops, _OPS, _OPS_SHOWN)
    if single:
        single = ["<details><summary>Ops alone</summary>", *single, "</details>"]
    return [*_table(steps, _STEPS, None), *single]


def _table(rows: list[Row], title: str, most: int | None) -> list[str]:
    """One line per case: time of ours and of each peer over the floor, bytes saved for backward."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.kernel_name} {case_name(row)}", []).append(row)
    groups = {case: found for case, found in groups.items() if _ratio(found, OURS)}
    if most is not None:
        kept: dict[str, int] = {}
        for case, found in list(groups.items()):
            kernel = found[0].kernel_name + str(found[0].config.get("launch"))
            kept[kernel] = kept.get(kernel, 0) + 1
            if kept[kernel] > most:
                del groups[case]
    if not groups:
        return []
    peers = [name for name in _PEERS if any(_ratio(found, name) for found in groups.values())]
    saved = any(_saved(found) for found in groups.values())
    head = [" ", "peftkern", *(_PEERS[name] for name in peers), *(["saved for backward, MiB: peftkern / PEFT"] * saved)]
    lines = [_line(head), "|" + "---|" * len(head)]
    for case, found in groups.items():
        cells = [_ratio(found, OURS), *(_ratio(found, name) for name in peers), *([_saved(found)] * saved)]
        size = f", {found[0].x_value:g} {found[0].x_name}" if found[0].kernel_name == "step" else ""
        lines.append(_line([case.removeprefix("step ") + size, *cells]))
    return [textwrap.fill(title, _WIDTH), "\n".join(lines)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ratio(rows: list[Row], provider: str) -> str:
    for row in rows:
        if row.kernel_provider == provider and is_whole(row) and row.status == "ok":
            middle, low, high = row.ratios.get(FLOOR, NOTHING)
            return "" if math.isnan(middle) else f"{middle:.2f} ({low:.2f}-{high:.2f})"
    return ""


def _saved(rows: list[Row]) -> str:
    found = {row.kernel_provider: row.y[0] for row in rows if row.config.get("memory") == "saved for backward"}
    if OURS not in found:
        return ""
    return f"{found[OURS]:.3g} / " + (f"{found[PEER]:.3g}" if PEER in found else "-")
