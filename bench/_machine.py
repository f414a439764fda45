"""What a result was measured on: device, versions, revision, hash of the kernel sources, measured ceilings."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import peftkern
from peftkern import dispatch

from ._measure import Ceilings

_PACKAGES = ("torch", "triton", "transformers", "peft", "numpy")


def describe(device: torch.device) -> dict[str, Any]:
    """JSON-ready facts; unknown ones are empty strings."""
    root = Path(peftkern.__file__).resolve().parents[1]
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "device": device.type,
        "cpu_name": cpu_name(),
        "gpu_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "active_isa": _active_isa(),
        "cuda": torch.version.cuda or torch.version.hip or "",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions | {"peftkern": peftkern.__version__},
        "git_revision": git_revision(root),
        "kernel_sources_sha256": kernel_hash(root),
        "backend_forced": os.environ.get("PEFTKERN_BACKEND", ""),
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def git_revision(root: Path) -> str:
    """Short revision of the checkout, with "+changes" when sources differ from it; "" outside a checkout."""
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    sources = ["peftkern", "kernels", "csrc", "bench", ":!bench/results"]
    try:
        revision = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, check=True, text=True)
        status = [*git, "status", "--porcelain", "--", *sources]
        changed = subprocess.run(status, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return revision.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def kernel_hash(root: Path) -> str:
    """SHA-256 over names and contents of the kernel sources: kernels/, csrc/ and the ops with their dispatch.

    In an installed package csrc/ is absent, so that the hash is another one.
    """
    package = Path(peftkern.__file__).resolve().parent
    kernels = Path(importlib.import_module("peftkern.kernels").__path__[0])
    folders = {"kernels": kernels, "csrc": root / "csrc", "ops": package / "ops"}
    digest = hashlib.sha256()
    for name, folder in folders.items():
        files = sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".json"))
        for path in files:
            digest.update(f"{name}/{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    digest.update((package / "dispatch.py").read_bytes())
    return digest.hexdigest()


def ceilings(device: torch.device, quick: bool) -> Ceilings:
    """Measured rates: a large copy, and square matrix products on random data in f32 and bf16; best of a few."""
    cuda = device.type == "cuda"
    size = 2**22 if quick else 2**28 if cuda else 2**24
    sides = {torch.float32: 4096 if cuda else 1536, torch.bfloat16: 8192 if cuda else 1536}
    return Ceilings(
        _copy_rate(size, device),
        {dtype: _product_rate(256 if quick else side, dtype, device) for dtype, side in sides.items()},
    )


def _copy_rate(size: int, device: torch.device) -> float:
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _best(lambda: target.copy_(source), device)


def _product_rate(side: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * side**3 / _best(lambda: torch.mm(left, right, out=out), device)


def ceilings_dict(found: Ceilings) -> dict[str, float]:
    """JSON-ready: GB/s and TFLOP/s."""
    rates = {f"{str(dtype).removeprefix('torch.')}_tflops": rate / 1e12 for dtype, rate in found.products.items()}
    return {"copy_gbps": found.copy / 1e9, **rates}


def _best(run: Any, device: torch.device, repeats: int = 7) -> float:
    seconds = []
    for _ in range(repeats + 2):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _active_isa() -> str:
    if isinstance(dispatch.load_library("cpu"), str):
        return ""
    return str(sys.modules["peftkern._C"].active_isa())


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
