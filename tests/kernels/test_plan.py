"""A plan launches what its function would, at the right addresses, and is made only where it can."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language", reason="triton is not installed")

from peftkern.kernels._plan import planned  # noqa: E402

from peftkern.kernels import _common, _device, _plan  # noqa: E402

from .listener import Listener  # noqa: E402

pytestmark = pytest.mark.skipif(_common.INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled")


@triton.jit
def _kernel(x_ptr, out_ptr, other_ptr, count, scale, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < count, other=0.0) * scale
    if other_ptr is not None:
        x += tl.load(other_ptr + offs, mask=offs < count, other=0.0)
    tl.store(out_ptr + offs, x, mask=offs < count)


def _launch(x: Tensor, out: Tensor, other: Tensor | None, scale: float) -> None:
    _device.launch(_kernel, (2, x.shape[0]), x, out, other, x.numel(), scale, BLOCK=64, num_warps=4)


def three_launches(x: Tensor, other: Tensor | None, scale: float) -> tuple[Tensor, None, Tensor]:
    """x's rows from the second on, by way of a part of the memory that is kept inside, into two outputs."""
    inside = [torch.empty(shape, dtype=x.dtype) for shape in ((5,), (2, 3, 8), (7,))]
    first, second = torch.empty((1, 3, 8), dtype=x.dtype), torch.empty((3, 8), dtype=x.dtype)
    _launch(x[1:], inside[1][1], inside[0], scale)
    _launch(inside[1][1], first, other, 1.0)
    _launch(inside[2], second, None, 2.0)
    return first[0], None, second


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Listener:
    return Listener.active(monkeypatch, _kernel)


@pytest.fixture
def worked_out(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The launches that Python works out."""
    found: list[Any] = []
    variant = _device.variant
    monkeypatch.setattr(_device, "variant", lambda *args: found.append(args) or variant(*args))
    return found


def _arguments() -> tuple[Tensor, Tensor, float]:
    return torch.zeros(4, 8), torch.zeros(3, 8), 0.5


_POINTERS, _HOOKS = slice(9, 12), slice(6, 9)


def test_a_plan_launches_what_the_function_would(listener: Listener, worked_out: list[Any]) -> None:
    function = planned(three_launches)
    for _ in range(2):
        function(*_arguments())
    direct = listener.calls[3:]
    listener.calls.clear()
    worked_out.clear()
    x, other, scale = _arguments()
    first, nothing, second = function(x, other, scale)
    assert not worked_out and nothing is None
    assert (first.shape, second.shape, first.dtype) == ((3, 8), (3, 8), torch.float32)
    assert len(listener.calls) == 3
    for repeated, once in zip(listener.calls, direct, strict=True):
        assert repeated[: _POINTERS.start] == once[: _POINTERS.start]  # grid, stream, binary, hooks
        assert repeated[_POINTERS.stop :] == once[_POINTERS.stop :]
    (x_at, half, start), (half_again, first_at, other_at), (end, second_at, none) = (
        call[_POINTERS] for call in listener.calls
    )
    assert x_at == x.data_ptr() + 8 * 4 and other_at == other.data_ptr() and none is None
    assert (first_at, second_at) == (first.data_ptr(), second.data_ptr())
    # 20, 192 and 28 bytes, each from a multiple of 256 on.
    assert (half - start, half_again - start, end - start) == (256 + 96, 256 + 96, 512)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, other, scale: (x, None, scale),
        lambda x, other, scale: (x, other, 0.25),
        lambda x, other, scale: (x.to(torch.bfloat16), other, scale),
        lambda x, other, scale: (torch.zeros(5, 8), other, scale),
        lambda x, other, scale: (torch.zeros(4, 16)[:, :8], other, scale),
        lambda x, other, scale: (torch.zeros(33)[1:].view(4, 8), other, scale),
        lambda x, other, scale: (x, other.to("meta"), scale),
    ],
    ids=["none", "value", "dtype", "shape", "strides", "alignment", "device"],
)
def test_another_kind_of_arguments_has_a_plan_of_its_own(
    change: Callable[..., Any], listener: Listener, worked_out: list[Any]
) -> None:
    function = planned(three_launches)
    for _ in range(3):
        function(*_arguments())
    worked_out.clear()
    function(*change(*_arguments()))
    assert len(worked_out) == 3
    worked_out.clear()
    function(*_arguments())
    assert not worked_out


def test_the_precision_that_torch_may_use_is_part_of_the_kind(listener: Listener, worked_out: list[Any]) -> None:
    function = planned(three_launches)
    for _ in range(3):
        function(*_arguments())
    worked_out.clear()
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        function(*_arguments())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(worked_out) == 3


def _computes(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _launch(x + 1, out, None, 1.0)
    return out


def _copies(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _launch(x.T.contiguous(), out, None, 1.0)
    return out


def _returns_a_part(x: Tensor) -> Tensor:
    out = torch.empty(2, *x.shape)
    _launch(x, out, None, 1.0)
    return out[1]


def _returns_its_argument(x: Tensor) -> Tensor:
    _launch(x, x, None, 1.0)
    return x


def _returns_one_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x)
    _launch(x, out, None, 1.0)
    return out, out


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("function", [_computes, _copies, _returns_a_part, _returns_its_argument, _returns_one_twice])
def test_what_a_plan_cannot_repeat_is_called(
    function: Callable[..., Any], inference: bool, listener: Listener, worked_out: list[Any]
) -> None:
    run, x = planned(function), torch.zeros(4, 8)
    with torch.inference_mode(inference):
        for _ in range(4):
            worked_out.clear()
            run(x)
            assert len(worked_out) == 1


def test_inference_mode_has_plans_too(listener: Listener, worked_out: list[Any]) -> None:
    function = planned(three_launches)
    with torch.inference_mode():
        for _ in range(3):
            worked_out.clear()
            function(*_arguments())
    assert not worked_out


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_hears_of_launches_behind_a_plan(name: str, listener: Listener) -> None:
    function = planned(three_launches)
    for _ in range(3):
        function(*_arguments())
    listener.calls.clear()
    hooks, hook = getattr(triton.knobs.runtime, name), lambda _metadata: None
    hooks.add(hook)
    try:
        function(*_arguments())
    finally:
        hooks.remove(hook)
    assert len(listener.calls) == 3 and all(None not in call[_HOOKS] for call in listener.calls)


def test_plans_are_not_kept_without_end(
    listener: Listener, worked_out: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_plan, "_MOST_PLANS", 2)
    function = planned(three_launches)
    for scale in (0.5, 0.5, 0.25, 0.125, 0.5):
        function(*_arguments()[:2], scale)
    assert len(worked_out) == 15  # the third kind made room
    worked_out.clear()
    for _ in range(2):
        function(*_arguments())
    assert len(worked_out) == 3


def test_while_one_thread_records_another_launches(listener: Listener) -> None:
    """Backward runs on a thread of its own, and a plan may be made in any."""
    function = planned(three_launches)
    with _device.recording(_device.Device("sm90", 132, 50 << 20)) as launches:
        thread = threading.Thread(target=lambda: function(*_arguments()))
        thread.start()
        thread.join()
    assert launches == [] and len(listener.calls) == 3
