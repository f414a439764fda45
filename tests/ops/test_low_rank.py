"""low_rank: what its column scale saves and writes, its gradient where the scale hides what it scaled; small calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import peftkern as pk
from peftkern.memory import saved_bytes
from peftkern.ops import low_rank
from peftkern.ops.low_rank import reference
from peftkern.testing import assert_as_good_as_torch

from .conftest import device_of, skip_unless_cpu_comes_first, skip_unless_runs

M, K, N, R = 48, 80, 56, 8


def inputs(backend: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    device = device_of(backend)
    shapes = {"x": (M, K), "a": (R, K), "b": (N, R), "weight": (N, K), "bias": (N,), "column_scale": (N,)}
    tensors = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    return {name: t.to(dtype) if name in ("x", "weight", "bias") else t for name, t in tensors.items()}


@pytest.mark.parametrize("trained", [True, False])
def test_a_trained_scale_saves_the_base_output_once_more_and_a_frozen_one_nothing(backend: str, trained: bool) -> None:
    skip_unless_runs("low_rank", backend)
    if backend == "reference":
        pytest.skip("reference: plain autograd saves what it likes")
    given = inputs(backend)
    kept = [given[name].requires_grad_() for name in ("a", "b")] + [given["weight"], given["bias"]]
    given["column_scale"].requires_grad_(trained)
    kept.append(given["column_scale"])
    given["x"].requires_grad_()
    saved = saved_bytes(lambda: low_rank(**given, p=0.1), kept)
    assert saved == 4 * (M * K + M * R + trained * M * N) + 8


def test_without_a_graph_the_base_output_is_scaled_in_place(backend: str) -> None:
    skip_unless_runs("low_rank", backend)
    if backend == "reference":
        pytest.skip("reference: writes nothing in place")
    given = inputs(backend)
    del given["weight"]
    base_out = torch.randn(M, N, device=given["x"].device)
    want = reference(**given, base_out=base_out.clone())
    with torch.no_grad():
        kept = low_rank(**given, base_out=base_out)
        got = low_rank(**given, base_out=base_out, overwrite=True)
    assert got is base_out and kept is not base_out
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(kept, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_a_scale_at_zero_and_under_a_large_bias(backend: str, dtype: torch.dtype) -> None:
    """Neither 0 · z nor, in bf16, 100 + z lets z be found again in the output."""
    skip_unless_runs("low_rank", backend, dtype)
    given = inputs(backend, dtype)
    given["column_scale"][::2] = 0.0
    given["bias"] *= 100.0
    assert_as_good_as_torch(reference, low_rank, given, grads=["x", "a", "b", "column_scale"])


def test_a_trained_bias_is_not_scaled(backend: str) -> None:
    skip_unless_runs("low_rank", backend)
    given = inputs(backend)
    given["bias"].requires_grad_()
    base_out = torch.nn.functional.linear(given["x"], given["weight"], given["bias"])
    del given["weight"]
    (d_bias,) = torch.autograd.grad(low_rank(**given, base_out=base_out).sum(), given["bias"])
    torch.testing.assert_close(d_bias, torch.full_like(d_bias, M))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_and_many_columns(backend: str, dtype: torch.dtype) -> None:
    """Kernels then split the columns, and something has to add up the parts."""
    skip_unless_runs("low_rank", backend, dtype)
    torch.manual_seed(0)
    shapes = {"x": (3, 2100), "a": (4, 2100), "b": (1900, 4), "weight": (1900, 2100)}
    kwargs = {name: torch.randn(shape, device=device_of(backend)).to(dtype) / 8 for name, shape in shapes.items()}
    assert_as_good_as_torch(reference, low_rank, kwargs, grads=["x", "a", "b"])


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"column_scale \(2,\): want \[N\] = \(3,\)"):
        low_rank(torch.ones(2, 4), torch.ones(1, 4), torch.ones(3, 1), column_scale=torch.ones(2))
    with pytest.raises(ValueError, match="together with weight, or with base_out and column_scale"):
        low_rank(torch.ones(2, 4), torch.ones(1, 4), torch.ones(3, 1), bias=torch.ones(3), base_out=torch.ones(2, 3))


@pytest.mark.parametrize("lead", [(1,), (2, 3)], ids=str)
def test_a_small_plain_call_runs_three_products_of_torch(lead: tuple[int, ...]) -> None:
    skip_unless_cpu_comes_first("low_rank")
    x, a, b, weight = torch.randn(*lead, 64), torch.randn(8, 64), torch.randn(48, 8), torch.randn(48, 64)
    told = pk.explain("low_rank", x, a, b, weight=weight)
    assert told.backend == "reference"
    a.requires_grad_()
    y = low_rank(x, a, b, scale=0.5, weight=weight)
    assert y.grad_fn.name() == "AddBackward0"
    expected = reference(x, a, b, scale=0.5, weight=weight)
    torch.testing.assert_close(y, expected)
    with torch.no_grad():
        torch.testing.assert_close(low_rank(x, a, b, scale=0.5, weight=weight), expected)


def test_a_large_call_and_one_with_dropout_or_scales_run_the_kernel() -> None:
    skip_unless_cpu_comes_first("low_rank")
    x, a, b = torch.randn(1024, 64), torch.randn(8, 64), torch.randn(48, 8)
    assert pk.explain("low_rank", x, a, b).backend == "cpu"
    small = pk.explain("low_rank", x[:1], a, b)
    assert "1 x (64 + 48) elements, no dropout: below 65536" in small.refused["cpu"]
    scales = {"column_scale": torch.ones(48), "rank_scale": torch.ones(8), "update_scale": torch.ones(48)}
    for name, value in {"p": 0.1, **scales}.items():
        assert pk.explain("low_rank", x[:1], a, b, **{name: value}).backend == "cpu"
    assert pk.explain("low_rank", x[:1].bfloat16(), a, b).backend == "cpu"  # f32 adapters: torch would copy x
