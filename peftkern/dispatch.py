"""Which backend runs an op, and why each other one does not.

A backend of an op is an object with `forward` and `backward`, found by name and never listed anywhere:
`cuda` and `cpu` are libraries that register `torch.ops.peftkern_<backend>.<op>_forward`, `triton` is the module
`peftkern.kernels.<op>`, `reference` is the plain PyTorch function of the op's own file. A library may leave out
`<op>_backward`, for an op that it serves without gradients only, and may register `<op>_most_rows() -> int`, the
number of rows M above which another backend is the better one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch

from peftkern.errors import BackendError, near

ORDER = ("cuda", "triton", "cpu", "reference")
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ASK_DOCTOR = "; `peftkern doctor` says how to build it"
_forced: str | None = os.environ.get("PEFTKERN_BACKEND") or None
_limits: dict[str, Callable[..., str | None]] = {}
_ask_lock = threading.RLock()
_asking: int | None = None  # the thread in which `explain` runs an op as far as its choice of a backend


@dataclass(frozen=True)
class Backend:
    """Two functions over 2-D views, whose arguments are fixed by the op's file; `trains`: it has a backward."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    refuse: Callable[..., str | None]
    trains: bool = True


def limit(op: str, reason: Callable[..., str | None]) -> None:
    """Register the sizes from which an op's kernels are worth their launch, as its benchmark shows.

    reason(backend, dtype, **dims) says why plain PyTorch is faster there, or None. It is not asked about a backend that
    is forced, nor where the sizes are not known.
    """
    _limits[op] = reason


@dataclass(frozen=True)
class Explanation:
    """The backend that runs, and for every other one the reason why it does not."""

    op: str
    backend: str
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.refused.items()])


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op of this process inside the block; one that cannot run raises BackendError.

    The environment variable PEFTKERN_BACKEND does the same for the whole process.
    """
    global _forced
    previous, _forced = _forced, _known(name)
    try:
        yield
    finally:
        _forced = previous


def choose(op: str, device: torch.device, dtype: torch.dtype, grad: int = False, **dims: int) -> str:
    """Name of the backend that runs `op` on tensors of this device and dtype, with a backward if `grad`.

    `dims` are the sizes that it may judge by.
    """
    if _asking is not None and _asking == threading.get_ident():
        raise _Question(device, dtype, grad, dims)
    return _choose(op, device, dtype, _forced, grad, **dims)


class _Question(Exception):
    """What an op chooses by (device, dtype, grad, dims), raised instead of an answer while `explain` asks for it."""


@functools.lru_cache(maxsize=4096)
def _choose(op: str, device: torch.device, dtype: torch.dtype, forced: str | None, grad: int, **dims: int) -> str:
    if forced is not None:
        reason = _refusal(_known(forced), op, device, dtype, grad, **dims)
        if reason is None:
            return forced
        others = _explain(op, device, dtype, None, grad, **dims)
        raise BackendError(f"{op}: backend {forced!r} was forced and cannot run: {reason}\nWithout force: {others}")
    refused = (_refusal(name, op, device, dtype, grad, **dims) or _slow(name, op, dtype, **dims) for name in ORDER)
    return next(name for name, reason in zip(ORDER, refused, strict=True) if reason is None)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend runs `op` on these arguments, and why each other one does not.

    The op itself is asked: it runs as far as its choice, so that autocast, sizes and whether a gradient is wanted count
    as they do in a call. Arguments that are no full call are judged by the first tensor's device and dtype alone.
    Raises ValueError for an unknown op, and when no argument is a floating-point tensor.
    """
    known = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent / "ops")]) if not m.name.startswith("_")]
    if op not in known:
        raise ValueError(f"unknown op {op!r}{near(op, known)}: want one of {', '.join(known)}")
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if not tensors:
        raise ValueError(f"explain({op!r}, ...): give the op's own arguments, among them a floating-point tensor")
    device, dtype, grad, dims = _ask(op, args, kwargs) or (tensors[0].device, tensors[0].dtype, False, {})
    return _explain(op, device, dtype, _forced, grad, **dims)


def _ask(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """(device, dtype, grad, dims) by which the op chooses for these arguments; None where it does not take them."""
    global _asking
    run = getattr(importlib.import_module(f"peftkern.ops.{op}"), op)
    devices = {t.device for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_cuda}
    with _ask_lock, torch.random.fork_rng(devices=devices):  # a seed may be drawn on the way
        _asking = threading.get_ident()
        try:
            run(*args, **kwargs)
        except _Question as question:
            return question.args
        except (AttributeError, IndexError, TypeError, ValueError):
            pass
        finally:
            _asking = None
    return None


def _explain(
    op: str, device: torch.device, dtype: torch.dtype, forced: str | None, grad: int = False, **dims: int
) -> Explanation:
    refused: dict[str, str] = {}
    chosen = ""
    for name in ORDER:
        reason = _refusal(name, op, device, dtype, grad, **dims)
        if forced is None:
            reason = reason or _slow(name, op, dtype, **dims)
        elif name != forced:
            reason = reason or f"backend {forced!r} is forced"
        if reason is None and chosen:
            reason = f"{chosen} comes first"
        if reason is None:
            chosen = name
        else:
            refused[name] = reason
    return Explanation(op, chosen or "none", refused)


@functools.cache
def load(name: str, op: str) -> Backend | str:
    """Load one backend of one op, or return the reason why it is not there."""
    if name == "triton":
        return _load_triton(op)
    library = load_library(name)
    if isinstance(library, str):
        return library
    namespace = getattr(torch.ops, f"peftkern_{name}")
    if not hasattr(namespace, f"{op}_forward"):
        return f"no {name} kernel exists for {op}"
    forward = getattr(namespace, f"{op}_forward").default
    most = getattr(namespace, f"{op}_most_rows")() if hasattr(namespace, f"{op}_most_rows") else None
    refuse = functools.partial(_too_many_rows, most)
    if not hasattr(namespace, f"{op}_backward"):
        return Backend(name, forward, _no_backward, refuse, trains=False)
    return Backend(name, forward, getattr(namespace, f"{op}_backward").default, refuse)


def _no_backward(*_args: Any) -> Any:
    raise BackendError("this backend has no backward")


def _too_many_rows(most: int | None, _device: torch.device, _dtype: torch.dtype, **dims: int) -> str | None:
    rows = dims.get("M", 0)
    return f"M = {rows} rows: it is made for at most {most}" if most is not None and rows > most else None


@functools.cache
def load_library(name: str) -> Path | str:
    """Load the compiled library of `cpu` or `cuda` and return its path, or the reason why it cannot be loaded."""
    if name == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    stem = {"cpu": "_C", "cuda": "_cuda"}[name]
    # In this package's own folders: the finder of an editable install would offer another checkout's library.
    spec = PathFinder.find_spec(f"peftkern.{stem}", sys.modules["peftkern"].__path__)
    if spec is None or spec.origin is None:
        return f"the compiled extension peftkern/{stem} is not built{ASK_DOCTOR}"
    library = Path(spec.origin)
    try:
        if name == "cpu":
            importlib.import_module("peftkern._C")
        else:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except (ImportError, OSError) as error:
        return f"{library.name} does not load with torch {torch.__version__}: {error}"
    return library


def _load_triton(op: str) -> Backend | str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec(f"peftkern.kernels.{op}") is None:
        return f"no triton kernel exists for {op}"
    try:
        module = importlib.import_module(f"peftkern.kernels.{op}")
    except Exception as error:
        return f"peftkern.kernels.{op} does not import: {error}"
    return Backend("triton", module.forward, module.backward, module.refuse)


def _refusal(
    name: str, op: str, device: torch.device, dtype: torch.dtype, grad: int = False, **dims: int
) -> str | None:
    if name == "reference":
        return None
    if dtype not in _NATIVE_DTYPES:
        return f"dtype {dtype}: want float32, bfloat16 or float16"
    if name in ("cpu", "cuda") and device.type != name:
        return f"tensor is on {device.type}"
    backend = load(name, op)
    if isinstance(backend, str):
        return backend
    if grad and not backend.trains:
        return "it has no backward, and a gradient is wanted"
    return backend.refuse(device, dtype, **dims)


def _slow(name: str, op: str, dtype: torch.dtype, **dims: int) -> str | None:
    """Why plain PyTorch is faster than this backend at these sizes, or None."""
    if name == "reference" or not dims or op not in _limits:
        return None
    return _limits[op](name, dtype, **dims)


def _known(name: str) -> str:
    if name not in ORDER:
        raise BackendError(f"unknown backend {name!r}{near(name, ORDER)}: want one of {', '.join(ORDER)}")
    return name
