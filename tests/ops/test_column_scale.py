"""What is particular to column_scale: what it saves, where it writes, and from which size its kernels run."""

from __future__ import annotations

import pytest
import torch

import peftkern as pk
from peftkern.memory import saved_bytes
from peftkern.ops.column_scale import reference
from peftkern.testing import assert_as_good_as_torch

from .conftest import DTYPES, device_of, skip_unless_cpu_comes_first, skip_unless_runs
from .test_all_ops import _WideAllocations

scale = pk.ops.column_scale


def inputs(backend: str, m: int = 48, c: int = 80, dtype: torch.dtype = torch.float32, grad: str = "xs") -> tuple:
    device = device_of(backend)
    x = torch.randn(m, c).to(device, dtype).requires_grad_("x" in grad)
    return x, torch.randn(c, device=device, requires_grad="s" in grad)


@pytest.mark.parametrize(("grad", "rows"), [("xs", 48), ("s", 48), ("x", 0)])
def test_saves_x_only_where_the_scale_trains(backend: str, grad: str, rows: int) -> None:
    skip_unless_runs("column_scale", backend)
    if backend == "reference":
        pytest.skip("reference: plain autograd saves what it likes")
    x, s = inputs(backend, grad=grad)
    assert saved_bytes(lambda: scale(x, s), [s]) == 4 * rows * 80


def test_half_precision_input_is_never_copied_to_f32(backend: str) -> None:
    skip_unless_runs("column_scale", backend, torch.bfloat16)
    if backend == "reference":
        pytest.skip("reference: computes in f32 by design")
    x, s = inputs(backend, dtype=torch.bfloat16)
    with _WideAllocations(x.numel()) as mode:
        scale(x, s).sum().backward()
    assert not mode.seen


@pytest.mark.parametrize("grad", ["x", "s", "xs"])
@pytest.mark.parametrize("m", [1, 2, 63, 64, 65, 129, 700])
def test_each_gradient_alone(backend: str, grad: str, m: int) -> None:
    skip_unless_runs("column_scale", backend)
    x, s = inputs(backend, m, 70, grad="")
    assert_as_good_as_torch(reference, scale, {"x": x, "s": s}, grads=list(grad))


@pytest.mark.parametrize("number", [13, 68, 215])
def test_a_sum_that_cancels_over_equal_rows(backend: str, number: int) -> None:
    """The gradient of the scale is a sum of 128 terms that nearly cancels, for rows that are one row with stride 0."""
    skip_unless_runs("column_scale", backend, torch.float16)
    generator, device = torch.Generator().manual_seed(number), device_of(backend)
    x = torch.randn(1, 3, generator=generator, dtype=torch.float64).to(device, torch.float16).expand(128, 3)
    s = torch.randn(3, generator=generator, dtype=torch.float64).to(device, torch.float32)
    assert_as_good_as_torch(reference, scale, {"x": x, "s": s}, grads=["x", "s"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overwrites_a_fresh_tensor_without_a_graph(backend: str, dtype: torch.dtype) -> None:
    skip_unless_runs("column_scale", backend, dtype)
    x, s = inputs(backend, dtype=dtype, grad="")
    want, given = scale(x, s), x.clone()
    with torch.no_grad():
        y = scale(given, s, overwrite=True)
    assert torch.equal(y, want)
    assert (y.data_ptr() == given.data_ptr()) is (backend != "reference")


def test_overwrites_nothing_that_is_still_read(backend: str) -> None:
    skip_unless_runs("column_scale", backend)
    x, s = inputs(backend, grad="s")
    before = x.clone()
    scale(x, s, overwrite=True).sum().backward()
    assert torch.equal(x, before) and torch.allclose(s.grad, before.sum(0), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        wide = before.repeat(1, 2)
        strided = wide[:, ::2]
        y = scale(strided, s, overwrite=True)
        assert torch.equal(wide, before.repeat(1, 2)) and torch.equal(y, strided * s)
        scale(before, s)
        assert torch.equal(before, x)


def test_small_sizes_are_left_to_torch() -> None:
    skip_unless_cpu_comes_first("column_scale")
    x, s = torch.ones(4, 8), torch.ones(8)
    told = pk.explain("column_scale", x, s)
    assert told.backend == "reference"
    assert "4 x 8 elements: below" in told.refused["cpu"]
    with pk.use_backend("reference"):
        assert pk.explain("column_scale", x, s).backend == "reference"


def test_half_input_with_an_f32_scale_goes_to_the_kernel_sooner() -> None:
    skip_unless_cpu_comes_first("column_scale")
    x = torch.ones(512, 384, dtype=torch.bfloat16)
    assert pk.explain("column_scale", x, torch.ones(384)).backend == "cpu"
    assert pk.explain("column_scale", x, torch.ones(384, dtype=torch.bfloat16)).backend == "reference"


@pytest.mark.parametrize(("x", "s"), [((4, 8), (7,)), ((4, 8), (1,)), ((4, 8), (8, 1)), ((), (1,))])
def test_shapes_that_do_not_fit_raise(x: tuple, s: tuple) -> None:
    with pytest.raises(ValueError, match=r"want x \[\.\.\., C\], s \[C\]"):
        scale(torch.ones(x), torch.ones(s))
