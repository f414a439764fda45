"""What a result was measured on: device, versions, revision, hash of the kernel sources, measured ceilings."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import peftkern
from peftkern import dispatch

from ._measure import Ceilings
from ._sources import git_revision, kernel_hash, root

_SMALL = 256
"""Side of the matrices that are multiplied first."""
_TOO_LONG = 0.3
"""Seconds of a product that is not measured."""
Layout = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
_LAYOUTS: tuple[Layout, ...] = (lambda x, w: (x, w.T), lambda dy, w: (dy, w), lambda dy, x: (dy.T, x))
"""The products of a linear layer's forward and backward."""
_PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "unsloth", "numpy")


def describe(device: torch.device) -> dict[str, Any]:
    """JSON-ready facts; unknown ones are empty strings."""
    cuda = device.type == "cuda"
    gpu = torch.cuda.get_device_properties(device) if cuda else None
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "device": device.type,
        "cpu_name": cpu_name(),
        "gpu_name": torch.cuda.get_device_name(device) if cuda else "",
        "gpu_gib": round(gpu.total_memory / 2**30, 1) if gpu is not None else None,
        "gpu_processors": gpu.multi_processor_count if gpu is not None else None,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "active_isa": _active_isa(),
        "cuda": torch.version.cuda or torch.version.hip or "",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions | {"peftkern": peftkern.__version__},
        "git_revision": git_revision(root()),
        "kernel_sources_sha256": kernel_hash(device.type),
        "backend_forced": os.environ.get("PEFTKERN_BACKEND", ""),
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def ceilings(device: torch.device, quick: bool) -> Ceilings:
    """Measured rates: a large copy, and square matrix products on random data in f32 and bf16; best of a few."""
    cuda = device.type == "cuda"
    size = 2**22 if quick else 2**28 if cuda else 2**24
    sides = {torch.float32: 4096 if cuda else 1536, torch.bfloat16: 8192 if cuda else 1536}
    return Ceilings(
        _copy_rate(size, device),
        {dtype: _product_rate(_SMALL if quick else side, dtype, device) for dtype, side in sides.items()},
    )


def _copy_rate(size: int, device: torch.device) -> float:
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _best(lambda: target.copy_(source), device)


def _product_rate(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of square products of this size, in the fastest of their layouts.

    On a CPU without bf16 instructions layouts differ by ten times and more, and one product of 1536 takes ten seconds
    while the time budget runs: a small one chooses the layout there, and serves alone where a large one takes too long.
    """
    layouts: Sequence[Layout] = _LAYOUTS
    if device.type == "cpu" and side > _SMALL:
        rates = {layout: _rate_of(_SMALL, layout, dtype, device) for layout in layouts}
        layouts = [max(layouts, key=lambda layout: rates[layout])]
        if 2 * side**3 / rates[layouts[0]] > _TOO_LONG:
            return rates[layouts[0]]
    return max(_rate_of(side, layout, dtype, device) for layout in layouts)


def _rate_of(side: int, layout: Layout, dtype: torch.dtype, device: torch.device) -> float:
    pair = layout(*(torch.randn(side, side, device=device).to(dtype) for _ in range(2)))
    out = torch.empty(side, side, dtype=dtype, device=device)
    return 2 * side**3 / _best(lambda: torch.mm(*pair, out=out), device)


def ceilings_dict(found: Ceilings) -> dict[str, float]:
    """JSON-ready: GB/s and TFLOP/s."""
    rates = {f"{str(dtype).removeprefix('torch.')}_tflops": rate / 1e12 for dtype, rate in found.products.items()}
    return {"copy_gbps": found.copy / 1e9, **rates}


def ceilings_from(found: dict[str, float]) -> Ceilings:
    """The inverse of ceilings_dict."""
    ends = "_tflops"
    products = {getattr(torch, key.removesuffix(ends)): v * 1e12 for key, v in found.items() if key.endswith(ends)}
    return Ceilings(found["copy_gbps"] * 1e9, products)


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
