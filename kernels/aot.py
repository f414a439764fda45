"""Compile every Triton kernel ahead of time, without a GPU, and keep the result as a table: bench/results/aot.json.

The kernels are found by listing this folder: every module without a leading underscore that has `aot_sources`. Each
variant is compiled for sm_80, sm_90, sm_100 and gfx942 and becomes one row: kernel, first call that needs it, target,
dtypes of its pointers, configuration, registers, bytes of spills and of shared memory, and a key made of everything
that the compiler sees. A variant whose key the table already has is not compiled again, so that the committed table is
also the cache. The exit status is 1 when a variant does not compile, spills, asks for more shared memory than the
target has, or when a module has no variants. With --check nothing is written: the table must hold the present variants.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._common import INTERPRETED
from ._device import Device, Source

Row = dict[str, Any]
TABLE = Path(__file__).resolve().parents[1] / "bench" / "results" / "aot.json"
_SHARED = ("call", "kernel", "dtypes", "config")
_FIGURES = ("key", "registers", "spill_bytes", "shared_bytes")
_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Target(NamedTuple):
    """A compilation target: Triton's, the device that launches are recorded for, shared memory per program in bytes."""

    gpu: GPUTarget
    device: Device
    shared: int


TARGETS = {
    "sm80": Target(GPUTarget("cuda", 80, 32), Device("sm80", 108, 40 << 20), 163 << 10),
    "sm90": Target(GPUTarget("cuda", 90, 32), Device("sm90", 132, 50 << 20), 227 << 10),
    "sm100": Target(GPUTarget("cuda", 100, 32), Device("sm100", 148, 126 << 20), 227 << 10),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), Device("gfx942", 304, 4 << 20), 64 << 10),
}


class Variant(NamedTuple):
    """One kernel variant on one target: its row as far as it is known without compiling, and what is compiled."""

    row: Row
    source: Source


def modules() -> list[str]:
    """Names of the kernel modules of this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != Path(__file__).stem)


def variants(names: Iterable[str], targets: Iterable[str]) -> dict[str, Variant]:
    """The distinct variants of the modules on the targets by key; each bears the name of the first call that needs it.

    Modules share kernels, and calls share variants: what the compiler would see twice is there once. Variants of a call
    that differ in nothing but hints (strides that 16 divides) are numbered.
    """
    found: dict[str, Variant] = {}
    texts: dict[Any, str] = {}
    named: dict[tuple[str, ...], int] = {}
    for module in names:
        loaded = importlib.import_module(f"{__package__}.{module}")
        for target in targets:
            for source in loaded.aot_sources(TARGETS[target].device):
                if source.fn not in texts:
                    texts[source.fn] = source_text(source.fn)
                key = _key(source, texts[source.fn], target)
                if key in found:
                    continue
                row = _identity(source, target)
                name = (*(row[part] for part in _SHARED), target)
                named[name] = named.get(name, 0) + 1
                row["call"] += f" #{named[name]}" if named[name] > 1 else ""
                found[key] = Variant(row | {"key": key}, source)
    return found


def source_text(fn: Any) -> str:
    """A kernel's source with that of the jit functions it calls and the constants it reads."""
    seen: dict[str, str] = {}

    def visit(function: Any) -> None:
        if function.fn.__qualname__ in seen:
            return
        seen[function.fn.__qualname__] = inspect.getsource(function.fn)
        for name in sorted(function.fn.__code__.co_names):
            value = function.fn.__globals__.get(name)
            if isinstance(value, triton.JITFunction):
                visit(value)
            elif isinstance(value, tl.constexpr):
                seen[name] = f"{name} = {value.value!r}\n"

    visit(fn)
    return "".join(seen.values())


def _key(source: Source, text: str, target: str) -> str:
    seen = (text, source.signature, source.constexprs, source.attrs, source.options, TARGETS[target].gpu)
    return hashlib.sha256(repr((triton.__version__, *seen)).encode()).hexdigest()[:16]


def _identity(source: Source, target: str) -> Row:
    call, _, kernel = source.name.partition(": ")
    constants = {name: value for name, value in source.constexprs.items() if value not in (None, "")}
    launch = {name: source.options[name] for name in ("num_warps", "num_stages") if name in source.options}
    return {
        "kernel": kernel,
        "call": call,
        "target": target,
        "dtypes": " ".join(kind[1:] for kind in source.signature.values() if kind.startswith("*")),
        "config": " ".join(f"{name}={value}" for name, value in (constants | launch).items()),
    }


def compile_source(source: Source, target: str) -> Row:
    """Compile one variant: registers, spill_bytes and shared_bytes; raises what the compiler raises."""
    ast = ASTSource(source.fn, source.signature, source.constexprs, source.attrs)
    compiled = triton.compile(ast, target=TARGETS[target].gpu, options=source.options)
    assembly = compiled.asm
    usage = _cuda_usage(assembly["cubin"]) if "cubin" in assembly else _hip_usage(assembly["amdgcn"])
    return usage | {"shared_bytes": compiled.metadata.shared}


def _cuda_usage(cubin: bytes) -> Row:
    """Registers per thread and bytes of spills (the stack frame) as cuobjdump reads them; unknown without it."""
    tool = _NVIDIA_TOOLS / "cuobjdump"
    if not tool.exists():
        return {"registers": None, "spill_bytes": None}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(found[1]) if found else None, "spill_bytes": int(found[2]) if found else None}


def _hip_usage(assembly: str) -> Row:
    """Vector registers per lane and bytes of scratch per lane, where spills go, from the kernel's metadata."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    return {
        "registers": int(registers[1]) if registers else None,
        "spill_bytes": int(scratch[1]) if scratch else None,
    }


def compiled_row(variant: Variant) -> Row:
    """The variant's row with what the compiler says, or with the "error" that rules it out."""
    target = variant.row["target"]
    try:
        row = variant.row | compile_source(variant.source, target)
    except Exception as error:
        # The end of the message: a compilation error begins with the whole source.
        return variant.row | {"error": f"{type(error).__name__}: {str(error)[-2000:]}"}
    if row["spill_bytes"]:
        row["error"] = f"spills {row['spill_bytes']} bytes: choose a smaller tile or more warps in _tiles.py"
    if row["shared_bytes"] > TARGETS[target].shared:
        row["error"] = f"{row['shared_bytes']} bytes of shared memory, {target} has {TARGETS[target].shared}"
    return row


def _compile_share(names: list[str], targets: list[str], keys: list[str]) -> list[Row]:
    """One worker's part: sources are not picklable, so that each worker records its own."""
    found = variants(names, targets)
    return [compiled_row(found[key]) for key in keys]


def run(names: list[str], targets: list[str], keys: list[str], jobs: int) -> Iterator[list[Row]]:
    """Compile the variants with these keys in `jobs` processes; rows come as they are ready."""
    # A fresh interpreter per worker: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    shares = [keys[start : start + 8] for start in range(0, len(keys), 8)]
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for done in as_completed([pool.submit(_compile_share, names, targets, share) for share in shares]):
            yield done.result()


def versions() -> dict[str, str]:
    """The compilers behind the figures: Triton, and the assemblers that it ships."""
    found = {"triton": str(triton.__version__)}
    for name in ("ptxas", "ptxas-blackwell"):
        tool = _NVIDIA_TOOLS / name
        text = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout if tool.exists() else ""
        version = re.search(r"V([\d.]+)", text)
        found[name] = version[1] if version else ""
    return found


def read_table(path: Path) -> dict[str, Any]:
    """The table in a file, one row per variant and target, or an empty one; the inverse of `table_text`."""
    if not path.is_file():
        return {"compilers": {}, "rows": []}
    table: dict[str, Any] = json.loads(path.read_text("utf-8"))
    rows = []
    for line in table["rows"]:
        shared = {name: line[name] for name in _SHARED}
        rows += [
            shared | {"target": target} | dict(zip(table["figures"], line[target], strict=False))
            for target in TARGETS
            if target in line
        ]
    return {"compilers": table["compilers"], "rows": rows}


def table_text(rows: Iterable[Row]) -> str:
    """JSON with a line per variant and the figures of each target in it, in an order that compiling does not change."""
    lines: dict[tuple[str, ...], Row] = {}
    for row in rows:
        line = lines.setdefault(tuple(row[name] for name in _SHARED), {name: row[name] for name in _SHARED})
        line[row["target"]] = [row.get(name) for name in _FIGURES] + ([row["error"]] if "error" in row else [])
    ordered = ({name: line[name] for name in (*_SHARED, *TARGETS) if name in line} for _, line in sorted(lines.items()))
    text = ",\n".join(json.dumps(line) for line in ordered)
    head = f'{{"compilers": {json.dumps(versions())},\n"figures": {json.dumps([*_FIGURES, "error"])},\n'
    return f'{head}"rows": [\n{text}\n]}}\n'


def differences(table: dict[str, Any], found: dict[str, Variant]) -> list[str]:
    """How a table differs from the present variants, one line each; keys count only for the same Triton."""
    same = table["compilers"].get("triton") == triton.__version__

    def name(row: Row) -> str:
        label = f"{row['target']} {row['kernel']} ({row['call']}) [{row['dtypes']}] {row['config']}"
        return f"{label} key {row['key']}" if same else label

    listed, present = {name(row) for row in table["rows"]}, {name(variant.row) for variant in found.values()}
    lines = [f"not in the table: {line}" for line in sorted(present - listed)]
    lines += [f"no longer a variant: {line}" for line in sorted(listed - present)]
    return lines + [f"{name(row)}: {row['error']}" for row in table["rows"] if "error" in row]


def check(table: dict[str, Any], found: dict[str, Variant], sample: int) -> list[str]:
    """`differences`, and the rows that compiling `sample` of the variants, spread over kernels and targets, belies."""
    lines = differences(table, found)
    if lines or table["compilers"] != versions():
        return lines
    figures = ("registers", "spill_bytes", "shared_bytes")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(table["rows"], key=lambda row: str(row["key"])):
        groups.setdefault((row["kernel"], row["target"]), []).append(row)
    firsts = sorted((group[0] for group in groups.values()), key=lambda row: str(row["key"]))
    for row in firsts[:sample]:
        again = compiled_row(found[row["key"]])
        if any(row[figure] != again.get(figure) for figure in figures):
            was, now = ({figure: r.get(figure) for figure in figures} for r in (row, again))
            lines.append(f"{row['target']} {row['kernel']} ({row['call']}): the table says {was}, compiled it is {now}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options, parser = _parse(arguments)
    names, targets = options.kernel or modules(), options.target or list(TARGETS)
    found = variants(names, targets)
    silent = [name for name in names if not variants([name], targets)]
    for name in silent:
        print(f"{name}: aot_sources gave nothing", file=sys.stderr)
    # An installed package has no table: only a checkout keeps one.
    whole = not (options.kernel or options.target) and TABLE.parent.is_dir()
    out: Path | None = options.out or (TABLE if whole else None)
    if options.check:
        if out is None:
            parser.error("--check compares the whole table: give no --kernel and no --target, or a table with --out")
        lines = check(read_table(out), found, options.sample)
        print("\n".join([*lines, f"{out}: {len(found)} variants, {len(lines)} differences"]))
        if lines:
            print("`make aot` brings the table up to date", file=sys.stderr)
        return 1 if lines or silent else 0
    known = {row["key"]: row for row in read_table(out)["rows"] if "error" not in row} if out else {}
    rows = [known[key] | variant.row for key, variant in found.items() if key in known and not options.fresh]
    missing = [key for key in found if key not in known or options.fresh]
    for part in run(names, targets, missing, options.jobs) if missing else ():
        rows += part
        if sys.stderr.isatty():
            print(f"\r{len(rows)} of {len(found)} variants", end="", file=sys.stderr, flush=True)
    failed = [row for row in rows if "error" in row]
    for row in failed:
        print(f"{row['target']} {row['kernel']} ({row['call']}) {row['config']}: {row['error']}", file=sys.stderr)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(table_text(rows), "utf-8")
    print(f"{len(rows)} variants, {len(missing)} compiled, {len(failed)} failed -> {out or 'no file'}")
    return 1 if failed or silent else 0


def _parse(arguments: list[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(prog="python -m peftkern.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help=f"the table (default: {TABLE}; with --kernel or --target: none)")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this target; may be repeated")
    parser.add_argument("--kernel", choices=modules(), action="append", help="only this module; may be repeated")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--fresh", action="store_true", help="compile everything, whatever the table holds")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the table is not up to date")
    parser.add_argument("--sample", type=int, default=0, help="with --check: compile so many variants and compare")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter's kernels cannot be compiled")
    return options, parser


if __name__ == "__main__":
    sys.exit(main())
