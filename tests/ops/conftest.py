"""Every op test runs on every backend that can run here; the others are skipped with dispatch's own reason.

With TRITON_INTERPRET=1 only triton runs, through its interpreter: `make test` starts that as a second process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import peftkern as pk
from peftkern import dispatch
from peftkern.ops._op import Op, every

OPS: list[Op] = every()
BACKENDS = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else dispatch.ORDER
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def device_of(backend: str) -> torch.device:
    """Where a backend's tests put their tensors."""
    on_gpu = backend == "cuda" or (backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1")
    return torch.device("cuda" if on_gpu and torch.cuda.is_available() else "cpu")


def skip_unless_runs(
    op: str, backend: str, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> None:
    """Skip with the reason that dispatch gives for a call with gradients."""
    reason = dispatch._refusal(backend, op, device or device_of(backend), dtype, grad=True)
    if reason is not None:
        pytest.skip(f"{backend} {op}: {reason}")


def skip_unless_cpu_comes_first(op: str) -> None:
    """Skip a test of what the cpu backend leaves to torch, where it is not there or the interpreter comes before it."""
    told = pk.explain(op, torch.ones(1024, 768))
    if told.backend != "cpu":
        pytest.skip(str(told))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The forced backend."""
    with pk.use_backend(request.param):
        yield request.param


@pytest.fixture(params=OPS, ids=lambda op: op.name)
def op(request: pytest.FixtureRequest) -> Op:
    """One op."""
    return request.param


def samples(op: Op, backend: str, dtype: torch.dtype) -> list[tuple[str, dict[str, Any]]]:
    """The op's own cases on the backend's device."""
    return list(op.samples(device_of(backend), dtype))


def trainable(op: Op, kwargs: dict[str, Any]) -> list[str]:
    """Names of the adapter weights and inputs; the backbone's frozen tensors are none."""
    floating = [k for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return [key for key in floating if key not in op.frozen]


def trained(op: Op, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A copy whose adapter weights and inputs require grad."""
    names = trainable(op, kwargs)
    copy = {k: v.detach().clone().requires_grad_(True) if k in names else v for k, v in kwargs.items()}
    return tied(kwargs, copy)


def tied(kwargs: dict[str, Any], copy: dict[str, Any]) -> dict[str, Any]:
    """`residual is x` must survive the copy: it selects the fused sequential form."""
    same = kwargs.get("residual") is not None and kwargs["residual"] is kwargs["x"]
    return copy | {"residual": copy["x"]} if same else copy


def first(output: Any) -> torch.Tensor:
    """The floating-point output of an op."""
    return output if isinstance(output, torch.Tensor) else output[0]
