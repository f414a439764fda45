"""Where kernels run: facts about the device, launches, and launches recorded for compilation ahead of time."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ._common import INTERPRETED


class Device(NamedTuple):
    """What a launch has to know about the device: table key, multiprocessors, last-level cache in bytes."""

    arch: str
    processors: int
    cache: int


class Launch(NamedTuple):
    """One recorded launch: the jit function, the grid, its positional arguments, constexprs and options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    keywords: dict[str, Any]


class Compiled(NamedTuple):
    """What Triton compiled for a launch, and the values of the constexprs, which its launcher takes as well."""

    kernel: Any
    constants: tuple[Any, ...]


class _Listening(threading.local):
    recorded: tuple[Device, list[Launch]] | None = None
    compiled: list[Compiled] | None = None


# Few processors and a small cache, so that small tests split as large inputs do on a GPU.
_INTERPRETER = Device("interpreter", 4, 1 << 14)
_listening = _Listening()
# What a launch compiled to: Triton finds it too, in 2.5 times as long, and launches are what a small call costs.
_compiled: dict[tuple[Any, ...], Compiled] = {}
#: Triton's options of every launch.
_ALWAYS = {"enable_fp_fusion": True}


@functools.cache
def _cuda_facts(index: int) -> Device:
    props = torch.cuda.get_device_properties(index)
    cache = int(getattr(props, "L2_cache_size", 0)) or 32 << 20
    if torch.version.hip is not None:
        return Device(str(props.gcnArchName).split(":")[0], props.multi_processor_count, cache)
    return Device(f"sm{props.major}{props.minor}", props.multi_processor_count, cache)


def device_of(x: torch.Tensor) -> Device:
    """Facts of x's device, cached."""
    if _listening.recorded is not None:
        return _listening.recorded[0]
    if x.device.type != "cuda":
        return _INTERPRETER
    return _cuda_facts(x.device.index)


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device: make it x's for the length of a `with`."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **keywords: Any) -> None:
    """Launch a kernel on the current device and stream, or note the launch inside `recording`.

    args are the kernel's arguments up to its constexprs, keywords the constexprs and Triton's options.
    """
    if _listening.recorded is not None:
        _listening.recorded[1].append(Launch(kernel, grid, args, keywords))
        return
    if INTERPRETED:
        kernel[grid](*args, **keywords, **_ALWAYS)
        return
    active = triton.runtime.driver.active
    device = active.get_current_device()
    key = (device, variant(kernel, args, keywords))
    found = _compiled.get(key)
    if found is None:
        constants = tuple(keywords[name] for name in kernel.arg_names[len(args) :])
        found = _compiled[key] = Compiled(kernel[grid](*args, **keywords, **_ALWAYS), constants)
    else:
        _run(found, grid, active.get_current_stream(device), args)
    if _listening.compiled is not None:
        _listening.compiled.append(found)


def _run(compiled: Compiled, grid: tuple[int, ...], stream: int, args: tuple[Any, ...]) -> None:
    kernel, values = compiled.kernel, (*args, *compiled.constants)
    enter, leave, metadata = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook, None
    if enter.calls or leave.calls:
        metadata = kernel.launch_metadata(grid, stream, *values)
    else:
        enter = leave = None
    x, y, z = (*grid, 1, 1)[:3]
    kernel.run(x, y, z, stream, kernel.function, kernel.packed_metadata, metadata, enter, leave, *values)


def compile_ahead(record: Launch) -> None:
    """Compile a recorded launch for the current device; the launch itself finds it in Triton's cache on disk."""
    record.kernel.warmup(*record.args, grid=(1,), **record.keywords, **_ALWAYS)


def variant(kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton may compile a launch anew for: the kernel, constexprs, options, and what it sees of each argument.

    That is its type, alignment to 16 bytes, and whether an integer is 1, a multiple of 16 or long.
    """
    seen: list[Any] = [kernel.fn, *keywords.items()]
    for arg in args:
        kind = type(arg)
        if kind is int:
            seen.append(1 if arg == 1 else (arg % 16 == 0, -(2**31) <= arg < 2**31))
        elif arg is None or kind is float:
            seen.append(kind)
        else:
            seen += (arg.dtype, arg.data_ptr() % 16 == 0, within_reach(arg))
    return tuple(seen)


def within_reach(arg: Tensor) -> bool:
    """Whether Triton for ROCm would reach everything of the tensor by offsets of 32 bits; elsewhere it does not ask."""
    return torch.version.hip is None or arg.untyped_storage().nbytes() < 2**31


@contextlib.contextmanager
def recording(device: Device) -> Iterator[list[Launch]]:
    """Collect the launches that calls on meta tensors would make on `device`; in this thread nothing runs."""
    launches: list[Launch] = []
    _listening.recorded = (device, launches)
    try:
        yield launches
    finally:
        _listening.recorded = None


def is_recording() -> bool:
    """Whether this thread is inside `recording`."""
    return _listening.recorded is not None


@contextlib.contextmanager
def noting() -> Iterator[list[Compiled]]:
    """Collect what this thread's launches run."""
    _listening.compiled = compiled = []
    try:
        yield compiled
    finally:
        _listening.compiled = None


class Source(NamedTuple):
    """What `triton.compile` needs for one kernel variant: name, jit function, types, constants, hints, options."""

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int], list[list[Any]]]
    options: dict[str, Any]


def sources(device: Device, calls: Iterator[tuple[str, Callable[[], object]]]) -> Iterator[Source]:
    """The kernel variants that calls on meta tensors would launch on `device`, named "call: kernel"."""
    for name, call in calls:
        with recording(device) as launches:
            call()
        for record in launches:
            yield _source(f"{name}: {record.kernel.fn.__name__}", record)


_OPTIONS = ("num_warps", "num_stages")
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def _source(name: str, record: Launch) -> Source:
    """Types and hints as Triton's own launcher finds them, for pointers aligned to 16 bytes."""
    arguments = dict(zip(record.kernel.arg_names, record.args, strict=False))
    arguments |= {key: value for key, value in record.keywords.items() if key not in _OPTIONS}
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attrs: dict[tuple[int], list[list[Any]]] = {}
    for position, parameter in enumerate(record.kernel.params):
        value = arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and special):
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0 and special):
            attrs[(position,)] = [["tt.divisibility", 16]]
    options = {key: value for key, value in record.keywords.items() if key in _OPTIONS}
    return Source(name, record.kernel, signature, constexprs, attrs, options | _ALWAYS)
