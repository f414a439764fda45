"""Compile every Triton kernel ahead of time, without a GPU: python -m peftkern.kernels.aot --out FILE.

The kernels are found by listing this folder: every module without a leading underscore that has `aot_sources`. Each
variant is compiled for sm_80, sm_90, sm_100 and gfx942 and becomes one JSON row: kernel, target, dtypes, configuration,
shared memory, registers, spills. The exit status is 1 when a variant does not compile, asks for more shared memory than
the target has, or when a module has no variants.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._common import INTERPRETED
from ._device import Device, Source

Row = dict[str, Any]


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


def modules() -> list[str]:
    """Names of the kernel modules of this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != Path(__file__).stem)


def variants(module: str, target: str) -> dict[str, Source]:
    """The module's distinct kernel variants on a target, each under the name of the first call that needs it."""
    loaded = importlib.import_module(f"{__package__}.{module}")
    found: dict[str, Source] = {}
    seen: set[str] = set()
    for source in loaded.aot_sources(TARGETS[target].device):
        key = repr((source.fn.fn.__qualname__, source.signature, source.constexprs, source.attrs, source.options))
        if key not in seen:
            seen.add(key)
            found[f"{source.name} #{len(seen)}"] = source
    return found


def compile_source(source: Source, target: str) -> Row:
    """Compile one variant and describe the result; raises what the compiler raises."""
    ast = ASTSource(source.fn, source.signature, source.constexprs, source.attrs)
    compiled = triton.compile(ast, target=TARGETS[target].gpu, options=source.options)
    call, _, _ = source.name.partition(": ")
    row: Row = {
        "kernel": source.fn.fn.__name__,
        "call": call,
        "target": target,
        "dtypes": {name: kind[1:] for name, kind in source.signature.items() if kind.startswith("*")},
        "config": {name: value for name, value in source.constexprs.items() if value is not None},
        "num_warps": source.options["num_warps"],
        "num_stages": source.options.get("num_stages"),
        "shared_bytes": compiled.metadata.shared,
        "triton": triton.__version__,
    }
    return row | (_cuda_usage(compiled.asm["cubin"]) if "cubin" in compiled.asm else _hip_usage(compiled.asm["amdgcn"]))


def _cuda_usage(cubin: bytes) -> Row:
    """Registers per thread and bytes of spills (the stack frame) as cuobjdump reads them; unknown without it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return {"registers": None, "spill_bytes": None}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(found[1]) if found else None, "spill_bytes": int(found[2]) if found else None}


def _hip_usage(assembly: str) -> Row:
    """Vector registers per lane and bytes of spills per lane from the kernel's metadata."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    return {
        "registers": int(registers[1]) if registers else None,
        "spill_bytes": 4 * int(spills[1]) if spills else None,
    }


def _told(error: Exception) -> str:
    """Type and end of the message: a compilation error begins with the whole source."""
    return f"{type(error).__name__}: {str(error)[-2000:]}"


def _compile_share(module: str, target: str, share: int, shares: int) -> list[Row]:
    """One worker's part of a module's variants: sources are not picklable, so that each worker records its own."""
    rows = []
    for index, (name, source) in enumerate(variants(module, target).items()):
        if index % shares != share:
            continue
        begin = time.perf_counter()
        try:
            row = compile_source(source, target)
            if row["shared_bytes"] > TARGETS[target].shared:
                row["error"] = f"{row['shared_bytes']} bytes of shared memory, {target} has {TARGETS[target].shared}"
        except Exception as error:
            row = {"kernel": source.fn.fn.__name__, "call": name, "target": target, "error": _told(error)}
        rows.append(row | {"seconds": round(time.perf_counter() - begin, 2)})
    return rows


def run(names: Iterable[str], targets: Iterable[str], jobs: int) -> Iterator[list[Row]]:
    """Compile the modules for the targets in `jobs` processes; rows come as they are ready."""
    shares = 4
    # A fresh interpreter per worker: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        tasks = [
            pool.submit(_compile_share, name, target, share, shares)
            for name in names
            for target in targets
            for share in range(shares)
        ]
        for done in as_completed(tasks):
            yield done.result()


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m peftkern.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this target; may be repeated")
    parser.add_argument("--kernel", choices=modules(), action="append", help="only this module; may be repeated")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter's kernels cannot be compiled")
    names, targets = options.kernel or modules(), options.target or list(TARGETS)
    rows: list[Row] = []
    for part in run(names, targets, options.jobs):
        rows += part
        if sys.stderr.isatty():
            print(f"\r{len(rows)} variants compiled", end="", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: (row["call"], row["kernel"], row["target"]))
    options.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    failed = [row for row in rows if "error" in row]
    for row in failed:
        print(f"{row['target']} {row['kernel']} ({row['call']}): {row['error']}", file=sys.stderr)
    for name in names:
        if not any(row["call"].startswith(f"{name} ") for row in rows):
            failed.append({})
            print(f"{name}: aot_sources gave nothing", file=sys.stderr)
    spilling = [row for row in rows if row.get("spill_bytes")]
    print(f"{len(rows)} variants, {len(failed)} failed, {len(spilling)} with spills -> {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
