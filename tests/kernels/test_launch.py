"""A launch that was compiled before goes to the driver as Triton would send it; here the driver only listens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language", reason="triton is not installed")

from peftkern.kernels import _common, _device  # noqa: E402

from .listener import Listener  # noqa: E402

pytestmark = pytest.mark.skipif(_common.INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled")


@triton.jit(do_not_specialize=["rows"])
def _kernel(x_ptr, out_ptr, other_ptr, rows, columns, scale, WITH: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < rows * columns, other=0.0) * scale
    if other_ptr is not None:
        x += tl.load(other_ptr + offs, mask=offs < rows * columns, other=0.0)
    tl.store(out_ptr + offs, x, mask=(offs < rows * columns) & WITH)


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Listener:
    return Listener.active(monkeypatch, _kernel)


def calls() -> Iterator[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]]:
    """Grids and arguments that Triton compiles anew for, each, and some that it does not."""
    x, out, half = torch.zeros(65), torch.zeros(65), torch.zeros(65, dtype=torch.bfloat16)
    options = {"WITH": True, "BLOCK": 64, "num_warps": 4, "num_stages": 2}
    yield (4,), (x, out, None, 8, 8, 0.5), options
    yield (5, 2), (x, out, None, 9, 8, 2.0), options  # rows are not specialised on
    yield (4, 1, 3), (x, out, out, 8, 8, 0.5), options
    yield (4,), (x[1:], out, None, 8, 8, 0.5), options
    yield (4,), (half, out, None, 8, 8, 0.5), options
    yield (4,), (x, out, None, 8, 1, 0.5), options
    yield (4,), (x, out, None, 8, 16, 0.5), options
    yield (4,), (x, out, None, 8, 2**40, 0.5), options
    yield (4,), (x, out, None, 2**40, 8, 0.5), options
    yield (4,), (x, out, None, 8, 8, 0.5), options | {"WITH": False}
    yield (4,), (x, out, None, 8, 8, 0.5), options | {"num_warps": 8}


_HOOKS = slice(6, 9)
"""Of what is given to a launcher: metadata for the hooks, the hook before and the one after."""


def test_a_launch_is_what_triton_would_launch(listener: Listener) -> None:
    functions = set()
    for grid, args, keywords in calls():
        listener.calls.clear()
        _kernel[grid](*args, **keywords, enable_fp_fusion=True)
        for _ in range(2):  # the first may go through Triton, the second does not
            _device.launch(_kernel, grid, *args, **keywords)
        tritons, _, mine = listener.calls
        assert mine[_HOOKS] == (None, None, None)
        pairs = list(zip(mine[:6] + mine[9:], tritons[:6] + tritons[9:], strict=True))
        assert all(one is two or (not isinstance(one, torch.Tensor) and one == two) for one, two in pairs), pairs
        functions.add(mine[4])
    assert len(functions) == 10


def test_the_second_launch_does_not_ask_triton(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, args, keywords = next(calls())
    _device.launch(_kernel, grid, *args, **keywords)
    monkeypatch.setattr(type(_kernel), "run", lambda *_args, **_keywords: pytest.fail("Triton was asked"))
    _device.launch(_kernel, grid, *args, **keywords)
    assert len(listener.calls) == 2


def test_what_was_compiled_ahead_is_found(listener: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded launch, compiled as the benchmark does before the tests run, leaves nothing to compile."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    for grid, args, keywords in calls():
        with _device.recording(_device.Device("sm90", 132, 50 << 20)) as launches:
            _device.launch(_kernel, grid, *args, **keywords)
        _device.compile_ahead(launches[0])
        cached = set(tmp_path.iterdir())
        _device.launch(_kernel, grid, *args, **keywords)
        assert cached and set(tmp_path.iterdir()) == cached, (args, keywords)


def test_a_profiler_hears_of_every_launch(listener: Listener) -> None:
    grid, args, keywords = next(calls())
    hooks, hook = triton.knobs.runtime, lambda _metadata: None
    _device.launch(_kernel, grid, *args, **keywords)
    hooks.launch_enter_hook.add(hook)
    try:
        _device.launch(_kernel, grid, *args, **keywords)
    finally:
        hooks.launch_enter_hook.remove(hook)
    metadata, enter, leave = listener.calls[1][_HOOKS]
    assert metadata is not None and enter is hooks.launch_enter_hook and leave is hooks.launch_exit_hook
