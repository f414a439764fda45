"""The number of threads changes no bit: work is split by shape alone, and sums are taken in one order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern as pk
from peftkern.ops._op import Op
from peftkern.testing import relative_error

from .conftest import BACKENDS, first, samples, skip_unless_runs, trained

ROWS = 700
"""Rows that are worth a second thread."""
OF_PYTORCH = ("weight", "bias", "norm_weight", "norm_bias")
"""Arguments of the frozen linear map and of the layer norm, which PyTorch computes where they are given."""
SUMS = {
    "mm", "addmm", "bmm", "baddbmm", "native_layer_norm", "native_layer_norm_backward", "sum", "mean", "index_put",
    "index_put_", "_index_put_impl_", "_unsafe_index_put", "scatter_add", "embedding_dense_backward",
}  # fmt: skip
"""Sums that PyTorch takes in an order that follows the threads."""


class PyTorchSums(TorchDispatchMode):
    """Whether PyTorch itself summed anything."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or func.overloadpacket.__name__ in SUMS
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def with_rows(op: Op, kwargs: dict[str, Any], count: int) -> dict[str, Any]:
    """The case with its rows repeated until there are `count`."""

    def grow(value: Tensor) -> Tensor:
        return value.repeat(-(-count // value.shape[0]), *[1] * (value.dim() - 1))[:count]

    given = {k: v for k, v in kwargs.items() if k in op.rows and isinstance(v, Tensor)}
    named = {k: v for k, v in given.items() if v.shape[0] and next(iter(given.values())).dim() > 1}
    grown = {id(value): grow(value) for value in named.values()}
    return kwargs | {key: grown[id(value)] for key, value in named.items()}


def results(op: Op, kwargs: dict[str, Any], threads: int) -> tuple[dict[str, Tensor], set[str]]:
    """Output and gradients of one call, and which of them kernels of this project computed from end to end."""
    torch.set_num_threads(threads)
    copy = trained(op, kwargs)
    with PyTorchSums() as forward:
        out = first(op.run(**copy))
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    with PyTorchSums() as backward:
        out.backward(upstream)
    leaves = {key: value for key, value in copy.items() if isinstance(value, Tensor) and value.requires_grad}
    gradients = {f"gradient of {key}": leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    ours = set() if forward.seen else {"output"}
    return {"output": out.detach(), **gradients}, ours if forward.seen or backward.seen else ours | set(gradients)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="cpu: only triton runs in this process")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_and_two_threads_give_the_same_bits(op: Op, dtype: torch.dtype) -> None:
    """What PyTorch has summed on the way, the frozen product above all, is the same to rounding."""
    skip_unless_runs(op.name, "cpu", dtype)
    compared = set()
    with pk.use_backend("cpu"):
        for name, kwargs in samples(op, "cpu", dtype):
            alone = {k: v for k, v in kwargs.items() if k not in OF_PYTORCH or k in op.rows}
            for case in (alone, kwargs, with_rows(op, alone, ROWS)):
                try:
                    want, ours = results(op, case, 1)
                except ValueError:  # of some samples another argument has as many rows, and was not repeated
                    assert case is not alone and case is not kwargs
                    continue
                compared |= ours
                got, _ = results(op, case, 2)
                for key, value in want.items():
                    assert relative_error(got[key], value) < 8 * torch.finfo(dtype).eps, f"{name}: {key}"
                    assert key not in ours or torch.equal(got[key], value), f"{name}: {key}"
    assert "output" in compared, "PyTorch summed in every case"
