"""Launch plans: what a call of a kernel module allocates and launches, found once and then repeated.

Tile, splits, grid, strides and the compiled kernel of every launch follow from the arguments' shapes, strides, types
and values. Working them out takes Python longer than small kernels run. A plan keeps the answer: a later call of the
same kind allocates, adds offsets to addresses and launches. Like a CUDA graph, but for any tensors and any stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._common import INTERPRETED, tf32_allowed
from ._device import Compiled, Launch, device_of, is_recording, noting, on_device, recording, within_reach

_Function = TypeVar("_Function", bound=Callable[..., Any])
#: Kinds of arguments that a function has plans for at most; then it begins anew.
_MOST_PLANS = 4096
#: Bytes that the parts of a workspace are aligned to.
_ALIGNED = 256
#: In the place of a plan: this kind has been called once, and may never be again.
_CALLED: Any = object()
_ALLOCATIONS = frozenset(
    getattr(torch.ops.aten, name) for name in ("empty", "empty_strided", "empty_like", "new_empty")
)


class _Step(NamedTuple):
    """One launch: the launcher and what it takes before and after the stream, its pointers still missing in `values`.

    pointers: (place in values, number of the memory, bytes after its start).
    """

    run: Callable[..., None]
    grid: tuple[int, int, int]
    binary: tuple[Any, Any]
    values: tuple[Any, ...]
    pointers: tuple[tuple[int, int, int], ...]


class _Plan(NamedTuple):
    """Memories are numbered: the tensors among the arguments, then `outputs`, then the workspace of so many bytes.

    results: the number of an output, or None, for what is returned; not a tuple where that is a single tensor.
    """

    outputs: list[tuple[torch.Size, torch.dtype]]
    workspace: int
    steps: list[_Step]
    results: tuple[int | None, ...] | int | None

    def repeat(self, like: Tensor, addresses: list[int]) -> Any:
        """The call for arguments at these addresses, on the device of `like`."""
        device = like.device
        outputs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.outputs]
        addresses.extend([out.data_ptr() for out in outputs])
        if self.workspace:
            workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
            addresses.append(workspace.data_ptr())
        with on_device(like):
            active = triton.runtime.driver.active
            stream = active.get_current_stream(active.get_current_device())
            for run, grid, binary, constants, pointers in self.steps:
                values = list(constants)
                for place, memory, offset in pointers:
                    values[place] = addresses[memory] + offset
                run(*grid, stream, *binary, None, None, None, *values)
        if isinstance(self.results, tuple):
            return tuple([None if at is None else outputs[at] for at in self.results])
        return None if self.results is None else outputs[self.results]


class _Allocations(TorchDispatchMode):
    """Keeps the tensors that are made meanwhile; `computed`: something else than making and viewing them happened."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.computed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _ALLOCATIONS:
            self.made.append(out)
        elif not func.is_view:
            self.computed = True
        return out


def planned(function: _Function) -> _Function:
    """Run `function` by a plan from its third call with arguments of one kind on.

    It takes tensors and hashable values, by position; what it does may depend on nothing else, and not on whether two
    of the tensors share memory. It allocates, views and launches; it returns new tensors that are whole allocations, or
    None. Where it does something else it is always called itself, as it is under a profiler, which hears of launches.
    """
    plans: dict[tuple[Any, ...], _Plan | None] = {}  # None where there can be none

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        hooks = triton.knobs.runtime
        if INTERPRETED or is_recording() or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            return function(*args)
        like: Tensor | None = None
        addresses: list[int] = []
        kind: list[Any] = [tf32_allowed()]
        for arg in args:
            if isinstance(arg, Tensor):
                like = arg if like is None else like
                addresses.append(address := arg.data_ptr())
                kind += (arg.shape, arg.stride(), arg.dtype, arg.device, address % 16, within_reach(arg))
            else:
                kind.append(arg)
        if like is None:
            return function(*args)
        key = tuple(kind)
        plan = plans.get(key)
        if isinstance(plan, _Plan):
            return plan.repeat(like, addresses)
        if plan is _CALLED:
            with noting() as compiled:
                result = function(*args)
            plans[key] = _plan(function, args, like, compiled)
            return result
        if key not in plans:
            if len(plans) >= _MOST_PLANS:
                plans.clear()
            plans[key] = _CALLED
        return function(*args)

    return call  # type: ignore[return-value]


def _plan(function: Callable[..., Any], args: Sequence[Any], like: Tensor, compiled: list[Compiled]) -> _Plan | None:
    """The plan of a call that launched `compiled`, or None where it did not only allocate, view and launch."""
    metas = [
        torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device="meta") if isinstance(arg, Tensor) else arg
        for arg in args
    ]
    with recording(device_of(like)) as launches, _Allocations() as allocations:
        result = function(*metas)
    results = result if isinstance(result, tuple) else (result,)
    made = {_memory(t): t for t in allocations.made}
    returned = {_memory(t): t for t in results if t is not None}
    places = {_memory(t): (i, 0) for i, t in enumerate(t for t in metas if isinstance(t, Tensor))}
    inputs, workspace = len(places), 0
    places |= {memory: (inputs + i, 0) for i, memory in enumerate(returned)}
    for memory, tensor in made.items():
        if memory not in returned:
            places[memory] = inputs + len(returned), workspace
            workspace += -(-tensor.untyped_storage().nbytes() // _ALIGNED) * _ALIGNED
    if (
        allocations.computed
        or any(memory not in made or not _is_all_of(t, made[memory]) for memory, t in returned.items())
        or len(returned) < sum(t is not None for t in results)
        # Under inference_mode a copy may pass for a view, such as that of `contiguous`.
        or any(_memory(arg) not in places for one in launches for arg in one.args if isinstance(arg, Tensor))
        or len(launches) != len(compiled)
    ):
        return None
    numbers = {memory: i for i, memory in enumerate(returned)}
    at = tuple(None if t is None else numbers[_memory(t)] for t in results)
    return _Plan(
        [(t.shape, t.dtype) for t in returned.values()],
        workspace,
        [_step(one, launch, places) for one, launch in zip(compiled, launches, strict=True)],
        at if isinstance(result, tuple) else at[0],
    )


def _step(compiled: Compiled, launch: Launch, places: dict[int, tuple[int, int]]) -> _Step:
    values, pointers = [*launch.args, *compiled.constants], []
    for place, arg in enumerate(launch.args):
        if isinstance(arg, Tensor):
            memory, start = places[_memory(arg)]
            pointers.append((place, memory, start + arg.storage_offset() * arg.element_size()))
            values[place] = None
    kernel, (x, y, z) = compiled.kernel, (*launch.grid, 1, 1)[:3]
    return _Step(kernel.run, (x, y, z), (kernel.function, kernel.packed_metadata), tuple(values), tuple(pointers))


def _memory(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _is_all_of(view: Tensor, whole: Tensor) -> bool:
    return view.is_contiguous() and view.dtype == whole.dtype and view.numel() == whole.numel()
