"""From its third call on a Triton op repeats its plan, and computes what it computed before, to the bit."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import peftkern as pk
from peftkern.ops._op import Op

from .conftest import first, samples, skip_unless_runs, trained

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from peftkern.kernels import _common, _device, _plan  # noqa: E402


class Interpreted:
    """What stands for a compiled kernel: runs through the interpreter, on tensors or on addresses of such."""

    function = packed_metadata = None

    def __init__(self, interpret: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.interpret = interpret
        self.dtypes = [arg.dtype if isinstance(arg, Tensor) else None for arg in args]

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        values = list(rest[6:])
        for place, dtype in enumerate(self.dtypes):
            if dtype is not None and isinstance(values[place], int):
                values[place] = _tensor_at(values[place], dtype)
        self.interpret(*values, grid=(x, y, z), warmup=False)


def _tensor_at(address: int, dtype: torch.dtype) -> Tensor:
    """One element at this address; the interpreter's pointers go on behind it."""
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


class Counts(NamedTuple):
    """The launches that Python works out, and the plans that are repeated instead."""

    launches: list[Any]
    plans: list[Any]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """What calls come to. Without a GPU the interpreter plays the compiler and the driver."""
    if not torch.cuda.is_available():
        if not _common.INTERPRETED:
            pytest.skip("no CUDA or ROCm device, and TRITON_INTERPRET is not 1")
        _interpret_what_is_launched(monkeypatch)
    found = Counts([], [])
    variant, repeat = _device.variant, _plan._Plan.repeat

    def launched(*args: Any) -> Any:
        found.launches.append(args[0])
        return variant(*args)

    def repeated(self: _plan._Plan, *args: Any) -> Any:
        found.plans.append(self)
        return repeat(self, *args)

    monkeypatch.setattr(_device, "variant", launched)
    monkeypatch.setattr(_plan._Plan, "repeat", repeated)
    return found


def _interpret_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    original = InterpretedFunction.run

    def run(self: InterpretedFunction, *args: Any, **keywords: Any) -> Interpreted:
        original(self, *args, **keywords)
        return Interpreted(functools.partial(original, self), args)

    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _device: 0)
    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(_device, "_compiled", {})
    for module in (_device, _plan):
        monkeypatch.setattr(module, "INTERPRETED", False)


def _call(op: Op, kwargs: dict[str, Any]) -> list[Tensor]:
    copy = trained(op, kwargs)
    out = first(op.run(**copy))
    out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype))
    leaves = [v for v in copy.values() if isinstance(v, Tensor) and v.requires_grad]
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_repeated_call_is_the_first_to_the_bit(op: Op, dtype: torch.dtype, counts: Counts) -> None:
    skip_unless_runs(op.name, "triton", dtype)
    cases = samples(op, "triton", dtype)
    if _common.INTERPRETED:
        cases = [(name, kwargs) for name, kwargs in cases if name in op.compiled]
    repeats = 0
    with pk.use_backend("triton"):
        for name, kwargs in cases:
            first_call, _second = _call(op, kwargs), _call(op, kwargs)  # kept, so that the third has other memory
            counts.launches.clear()
            counts.plans.clear()
            torch.use_deterministic_algorithms(True)  # what a plan allocates is NaN until it is written
            try:
                third = _call(op, kwargs)
            finally:
                torch.use_deterministic_algorithms(False)
            assert all(torch.equal(one, two) for one, two in zip(first_call, third, strict=True)), name
            assert not counts.launches, name
            repeats += len(counts.plans)
    assert repeats > 0
