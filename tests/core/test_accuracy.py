"""The yardstick measures: it passes what is as good as torch and catches each way of being worse."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from peftkern.testing import assert_as_good_as_torch, relative_error


def reference(x: Tensor, w: Tensor, s: float = 1.0) -> Tensor:
    return s * (x @ w.T)


class Double(torch.autograd.Function):
    """x Wᵀ with a right output and a gradient of W that is 1% too large."""

    @staticmethod
    def forward(ctx, x, w, s):
        ctx.save_for_backward(x, w)
        ctx.s = s
        return s * (x @ w.T)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return ctx.s * dy @ w, 1.01 * ctx.s * dy.T @ x, None


def kwargs(dtype: torch.dtype, grad: bool = True) -> dict:
    return {
        "x": torch.randn(37, 65).to(dtype).requires_grad_(grad),
        "w": torch.randn(29, 65).to(dtype).requires_grad_(grad),
        "s": 0.5,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_passes_another_order_of_summation(dtype):
    def halves(x, w, s):
        return s * (x.float()[:, :32] @ w.float()[:, :32].T + x.float()[:, 32:] @ w.float()[:, 32:].T).to(x.dtype)

    assert_as_good_as_torch(reference, halves, kwargs(dtype))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x, w, s: s * (x.bfloat16() @ w.bfloat16().T).float(), "output"),
        (lambda x, w, s: s * (x @ w.T) * (1 + 3e-6), "output"),
        (lambda x, w, s: Double.apply(x, w, s), "grad of w"),
        (lambda x, w, s: s * (x.detach() @ w.T), "grad of x"),
        (lambda x, w, s: (s * (x @ w.T)).to(torch.float64), "wanted torch.float32"),
        (lambda x, w, s: s * (x @ w.T)[:-1], "wanted torch.float32"),
        (lambda x, w, s: s * (x @ w.T) + torch.zeros(29).index_fill(0, torch.tensor(3), torch.nan), "inf"),
        (lambda x, w, s: (s * (x @ w.T)).detach(), "nothing requires grad"),
    ],
    ids=["bf16 inside", "3e-6 off", "wrong dw", "no dx", "dtype", "shape", "NaN", "no graph"],
)
def test_catches(run, message):
    with pytest.raises(AssertionError, match=message):
        assert_as_good_as_torch(reference, run, kwargs(torch.float32))


def test_half_precision_must_accumulate_in_float32():
    def rounded(x, w, s):  # every partial product is rounded to bf16
        total = torch.zeros(x.shape[0], w.shape[0], dtype=x.dtype)
        for k in range(x.shape[1]):
            total = total + x[:, k : k + 1] * w[:, k]
        return s * total

    with pytest.raises(AssertionError, match="output"):
        assert_as_good_as_torch(reference, rounded, kwargs(torch.bfloat16))


class Pair(NamedTuple):
    value: Tensor
    index: Tensor


def test_integer_outputs_are_equal():
    def run(x, off=0):
        return Pair(2 * x, torch.arange(3) + off)

    assert_as_good_as_torch(run, run, {"x": torch.ones(3)}, grads=["x"])
    with pytest.raises(AssertionError, match="index: 3 integers differ"):
        assert_as_good_as_torch(run, lambda x: run(x, 1), {"x": torch.ones(3)}, grads=["x"])


def test_in_place_functions_and_shared_inputs():
    def run(x, y):
        return y.add_(x)

    x = torch.randn(5, requires_grad=True)
    assert_as_good_as_torch(lambda x, y: x + y, run, {"x": x, "y": torch.randn(5)})
    assert_as_good_as_torch(lambda x, y: x + y, lambda x, y: x * 2 if x is y else x + y + 1, {"x": x, "y": x})


def test_strides_reach_the_function():
    x = torch.randn(6, 8)[:, ::2].requires_grad_(True)
    seen = []
    assert_as_good_as_torch(torch.neg, lambda input: seen.append(input.stride()) or torch.neg(input), {"input": x})
    assert seen == [(8, 2)]


def test_gradients_cannot_be_forgotten():
    with pytest.raises(ValueError, match="no tensor requires grad"):
        assert_as_good_as_torch(reference, reference, kwargs(torch.float32, grad=False))
    assert_as_good_as_torch(reference, reference, kwargs(torch.float32, grad=False), grads=())
    with pytest.raises(ValueError, match="'v' is no floating-point tensor"):
        assert_as_good_as_torch(reference, reference, kwargs(torch.float32), grads=["v"])


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(1 / 34**0.5)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.tensor([torch.nan]), torch.tensor([torch.inf])) == float("inf")
    assert relative_error(torch.tensor([torch.inf, 1.0]), torch.tensor([torch.inf, 1.0])) == 0


class Chained(torch.autograd.Function):
    """x · s with a gradient of s summed in f32, one row after the other, and then multiplied by `wrong`."""

    @staticmethod
    def forward(ctx, x, s, wrong):
        ctx.save_for_backward(x)
        ctx.wrong = wrong
        return (x * s).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        sums = torch.zeros(x.shape[-1])
        for d, row in zip(dy.float(), x.float(), strict=True):
            sums += d * row
        return None, sums * ctx.wrong, None


def test_moves_the_upstream_gradient():
    """Equal rows move as one: only the upstream gradient shows that the sum over them cancels, here to 1 to 4 %."""
    generator = torch.Generator().manual_seed(215)
    x = torch.randn(1, 3, generator=generator, dtype=torch.float64).half().expand(128, 3)
    given = {"x": x, "s": torch.ones(3, requires_grad=True)}

    def plain(x, s):
        return (x * s).to(x.dtype)

    assert_as_good_as_torch(plain, lambda x, s: Chained.apply(x, s, 1.0), given)
    with pytest.raises(AssertionError, match="grad of s"):
        assert_as_good_as_torch(plain, lambda x, s: Chained.apply(x, s, 1 + 2e-4), given)
