"""Bodies that matter on a GPU, run on every device there is: on a CPU they prove the body, on a GPU the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import peftkern as pk
from peftkern.ops._op import Op

from ..ops import conftest as ops
from ..ops.conftest import OPS


class Place(NamedTuple):
    """Where a test runs: a device, and the backend that is forced there."""

    device: torch.device
    backend: str


PLACES = [
    pytest.param(Place(torch.device("cpu"), "cpu"), id="cpu"),
    *(
        pytest.param(Place(torch.device("cuda"), name), id=f"cuda-{name}", marks=pytest.mark.gpu)
        for name in ("triton", "cuda")
    ),
]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A device that is there, with its backend forced."""
    found: Place = request.param
    if found.device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")
    with pk.use_backend(found.backend):
        yield found


@pytest.fixture(params=OPS, ids=lambda op: op.name)
def op(request: pytest.FixtureRequest) -> Op:
    """One op."""
    found: Op = request.param
    return found


def cases(op: Op, place: Place, dtype: torch.dtype = torch.float32) -> list[tuple[str, dict[str, Any]]]:
    """The op's samples that torch.compile is tested on: the typical ones. Skips with dispatch's own reason."""
    skip_unless_runs(op.name, place, dtype)
    return [item for item in op.samples(place.device, dtype) if item[0] in op.compiled]


def skip_unless_runs(op: str, place: Place, dtype: torch.dtype) -> None:
    """Skip with the reason that dispatch gives for a call with gradients."""
    ops.skip_unless_runs(op, place.backend, dtype, place.device)


class Call:
    """An op's arguments as copies of their own, whose floating-point ones require grad unless they are frozen.

    What was one tensor under two names stays one. Calling it gives every output and gradient.
    """

    def __init__(self, op: Op, kwargs: dict[str, Any]) -> None:
        self.op = op
        copies: dict[int, Tensor] = {}
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and id(value) not in copies:
                trains = value.is_floating_point() and name not in op.frozen
                copies[id(value)] = _same_strides(value).requires_grad_(trains)
        self.kwargs = {k: copies[id(v)] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        self.tensors = list(copies.values())
        self.leaves = [tensor for tensor in self.tensors if tensor.requires_grad]

    def fill(self, other: Call | None) -> None:
        """Take over another call's values in place; NaN (and 0 for integers) without one."""
        with torch.no_grad():
            for index, tensor in enumerate(self.tensors):
                if other is not None:
                    tensor.copy_(other.tensors[index])
                else:
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 0)

    def __call__(self, run: Any = None) -> list[Tensor]:
        """Outputs, then the gradients of half the sum of squares of what is differentiable."""
        # A view: autograd forbids writing in place into a leaf that requires grad.
        views = {id(tensor): tensor.view_as(tensor) for tensor in self.tensors}
        arguments = {k: views[id(v)] if isinstance(v, Tensor) else v for k, v in self.kwargs.items()}
        out = (run or self.op.run)(**arguments)
        outputs = [value for value in ((out,) if isinstance(out, Tensor) else out) if isinstance(value, Tensor)]
        roots = [value for value in outputs if value.requires_grad]
        grads = torch.autograd.grad(roots, self.leaves, [root.detach() for root in roots], allow_unused=True)
        return [value.detach() for value in outputs] + [grad for grad in grads if grad is not None]


def _same_strides(value: Tensor) -> Tensor:
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return copy.copy_(value.detach())


def assert_equal(got: list[Tensor], want: list[Tensor], what: str) -> None:
    """The same bits: every backend is deterministic."""
    assert len(got) == len(want), what
    for index, (one, two) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(one, two), f"{what}: value {index} differs by {float((one - two).abs().max())}"
