"""Nothing outside a tensor is read or written: each lies in the middle of a larger buffer, sizes at block edges."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern.ops._draw import EDGES, Draw
from peftkern.ops._op import Op
from peftkern.testing import relative_error

from .conftest import device_of, samples, skip_unless_runs, trainable
from .layouts import described, poisoned

CASES = 6 if os.environ.get("TRITON_INTERPRET") == "1" else 40
MARGIN = 1024
"""Elements on either side: a multiple of every vector's width, so that alignment stays what the allocator gave."""


@dataclass(frozen=True)
class AtEdges(Draw):
    """Cases whose sizes are a block's edge, or one less or more."""

    def size(self, largest: int = 65) -> int:
        """15 to 17, 31 to 33 or 63 to 65, and at most `largest`."""
        return self.one_of([edge for edge in EDGES if edge <= min(largest, 65)])

    def lead(self, largest: int = 65) -> tuple[int, ...]:
        """Rows alone, two sequences of them, or as few as in decoding."""
        return self.one_of([(self.size(largest),), (2, self.size(17)), (self.one_of([1, 2, 4]),)])


def edge_cases(op: Op, backend: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Random cases at edges; the samples of an op that draws none."""
    if op.draw is None:
        return [kwargs for _, kwargs in samples(op, backend, dtype)]
    return [op.draw(AtEdges(Random(number), device_of(backend), dtype)) for number in range(CASES)]


# Inputs.


def enclosed(value: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous, with poison right before its first and right after its last element; and the whole buffer."""
    whole = poisoned(value, value.numel() + 2 * MARGIN)
    return whole[MARGIN : MARGIN + value.numel()].view(value.shape).copy_(value), whole


def framed(value: Tensor) -> tuple[Tensor, Tensor]:
    """The inside of a larger tensor: poisoned rows before and after, poisoned columns left and right."""
    if value.dim() == 0:
        return enclosed(value)
    frame = [0] * (value.dim() - 1) + [3] if value.dim() == 1 else [2] + [0] * (value.dim() - 2) + [3]
    whole = poisoned(value, *(size + 2 * extra for size, extra in zip(value.shape, frame, strict=True)))
    inside = whole
    for dim, (size, extra) in enumerate(zip(value.shape, frame, strict=True)):
        inside = inside.narrow(dim, extra, size)
    return inside.copy_(value), whole


def outputs_and_gradients(op: Op, kwargs: dict[str, Any], graph: bool) -> dict[str, Tensor]:
    """Of one call on `kwargs` as they lie, for an upstream gradient from a fixed seed; what is one tensor stays one."""
    leaves = {id(kwargs[k]): kwargs[k].detach().requires_grad_(True) for k in trainable(op, kwargs)} if graph else {}
    # Views of the leaves: autograd forbids writing in place into a leaf that requires grad.
    views = {key: leaf.view_as(leaf) for key, leaf in leaves.items()}
    with torch.set_grad_enabled(graph):
        out = op.run(**{k: views.get(id(v), v) for k, v in kwargs.items()})
    found = out if isinstance(out, tuple) else (out,)
    values = {f"output {i}": value for i, value in enumerate(found) if isinstance(value, Tensor)}
    if graph:
        main = next(value for value in values.values() if value.requires_grad)
        main.backward(torch.randn(main.shape, generator=torch.Generator().manual_seed(2)).to(main.device, main.dtype))
        named = {f"gradient of {k}": leaves[id(kwargs[k])].grad for k in trainable(op, kwargs)}
        values |= {key: value for key, value in named.items() if value is not None}
    return {key: value.detach() for key, value in values.items()}


def each(kwargs: dict[str, Any], function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """`function` of every tensor; what was one tensor stays one."""
    done = {id(v): function(v) for v in kwargs.values() if isinstance(v, Tensor)}
    return {k: done.get(id(v), v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def tolerance(kwargs: dict[str, Any]) -> float:
    """Other alignments take other paths, which may round otherwise."""
    return 4 * max(torch.finfo(v.dtype).eps for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point())


@pytest.mark.parametrize("layout", [enclosed, framed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_in_the_middle_of_a_buffer(
    op: Op, backend: str, dtype: torch.dtype, layout: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> None:
    """The results of plain copies, though poison lies around; and neither poison nor inputs are written to."""
    skip_unless_runs(op.name, backend, dtype)
    for kwargs in edge_cases(op, backend, dtype):
        want = outputs_and_gradients(op, kwargs, graph=True)
        laid = {id(v): layout(v) for v in kwargs.values() if isinstance(v, Tensor)}
        before = {key: whole.clone() for key, (_, whole) in laid.items()}
        inside = {k: laid[id(v)][0] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        got = outputs_and_gradients(op, inside, graph=True)
        assert list(got) == list(want)
        for key, value in want.items():
            where = f"{key}: {described(inside)}"
            assert got[key].isfinite().all(), where
            assert relative_error(got[key], value) <= tolerance(kwargs), where
        for key, (_, whole) in laid.items():
            assert torch.equal(bits(whole), bits(before[key])), f"written to: {described(inside)}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_written_in_place_stays_inside(op: Op, backend: str, dtype: torch.dtype) -> None:
    """Without a graph an op may take a tensor for its result: its surroundings stay as they were."""
    skip_unless_runs(op.name, backend, dtype)
    consuming = {"overwrite": True} if "overwrite" in inspect.signature(op.run).parameters else {}
    for kwargs in edge_cases(op, backend, dtype):
        want = outputs_and_gradients(op, each(kwargs, torch.clone), graph=False)
        laid = {id(v): enclosed(v) for v in kwargs.values() if isinstance(v, Tensor)}
        before = {key: whole.clone() for key, (_, whole) in laid.items()}
        inside = {k: laid[id(v)][0] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        got = outputs_and_gradients(op, inside | consuming, graph=False)
        for key, value in want.items():
            assert relative_error(got[key], value) <= tolerance(kwargs), f"{key}: {described(inside)}"
        for key, (_, whole) in laid.items():
            for side in (slice(MARGIN), slice(-MARGIN, None)):
                assert torch.equal(bits(whole[side]), bits(before[key][side])), described(inside)


# Outputs.


class GuardedAllocations(TorchDispatchMode):
    """Puts every fresh tensor into the middle of a larger buffer of ones: NaN as a number, -1 as an index.

    What is left unwritten is NaN then, as is what is read outside; `check` finds what is written outside. Tensors that
    C++ allocates inside a registered op are not seen.
    """

    ALLOCATES = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
    FILLS = ("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full")

    def __init__(self) -> None:
        super().__init__()
        self.guarded: list[tuple[Tensor, int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not isinstance(out, Tensor) or not out.numel() or out.dtype == torch.bool:
            return out
        if name in self.ALLOCATES or name in self.FILLS:
            return self.guard(out, filled=name in self.FILLS)
        return out

    def guard(self, out: Tensor, filled: bool) -> Tensor:
        """The same tensor elsewhere."""
        size, margin = out.untyped_storage().nbytes(), MARGIN * out.itemsize
        whole = torch.full((size + 2 * margin,), 255, dtype=torch.uint8, device=out.device)
        inside = torch.empty(0, dtype=out.dtype, device=out.device)
        inside.set_(whole.untyped_storage(), MARGIN + out.storage_offset(), out.shape, out.stride())
        if filled:
            inside.copy_(out)
        self.guarded.append((whole, margin, f"{out.dtype} {tuple(out.shape)}"))
        return inside

    def check(self) -> None:
        """Raise AssertionError where anything was written outside."""
        for whole, margin, told in self.guarded:
            for side, part in (("before", whole[:margin]), ("after", whole[-margin:])):
                assert bool((part == 255).all()), f"{int((part != 255).sum())} bytes written {side} {told}"


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no_graph"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_in_the_middle_of_a_buffer(op: Op, backend: str, dtype: torch.dtype, graph: bool) -> None:
    """All that an op allocates, outputs, gradients and scratch: filled, and nothing written around it."""
    skip_unless_runs(op.name, backend, dtype)
    allocated = 0
    for kwargs in edge_cases(op, backend, dtype):
        want = outputs_and_gradients(op, each(kwargs, torch.clone), graph)
        given = each(kwargs, torch.clone)
        with GuardedAllocations() as mode:
            got = outputs_and_gradients(op, given, graph)
        try:
            mode.check()
        except AssertionError as error:
            raise AssertionError(f"{error}: {described(kwargs)}") from error
        allocated += len(mode.guarded)
        for key, value in want.items():
            assert not value.is_floating_point() or got[key].isfinite().all(), f"{key}: {described(kwargs)}"
            assert relative_error(got[key], value) <= tolerance(kwargs), f"{key}: {described(kwargs)}"
    if not allocated:
        pytest.skip(f"{backend} {op.name}: allocates inside C++ operators alone, out of sight")


def test_the_guard_sees_what_is_written_outside() -> None:
    with GuardedAllocations() as mode:
        out = torch.empty(3, 5)
    assert out.shape == (3, 5) and out.isnan().all()
    out.zero_()
    mode.check()
    for offset, side in ((-1, "before"), (15, "after")):
        with GuardedAllocations() as mode:
            out = torch.empty(3, 5)
        out.as_strided((1,), (1,), out.storage_offset() + offset).zero_()
        with pytest.raises(AssertionError, match=rf"4 bytes written {side} torch.float32 \(3, 5\)"):
            mode.check()
