"""Operands that do not fit together raise ValueError with what came and what was wanted, in every op that has them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peftkern import ops

K, N, R = 6, 5, 2
CHAINS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "low_rank": ops.low_rank,
    "bottleneck": ops.bottleneck,
    "weight_norm": ops.weight_norm,
    "multi_low_rank": lambda x, a, b: ops.multi_low_rank(x, [a], [b], torch.zeros(N, dtype=torch.int64), scales=[1.0]),
}
BASES: dict[str, Callable[..., Tensor]] = {
    "low_rank": ops.low_rank,
    "multi_low_rank": lambda x, a, b, **base: ops.multi_low_rank(
        x, [a], [b], torch.zeros(N, dtype=torch.int64), scales=[1.0], **base
    ),
}


@pytest.mark.parametrize("op", CHAINS)
def test_shapes_that_do_not_chain(op: str) -> None:
    fitting = {"x": (N, K), "a": (R, K), "b": (N, R)}
    CHAINS[op](*(torch.randn(shape) for shape in fitting.values()))
    for wrong in ({"x": (N, K + 1)}, {"x": ()}, {"a": (R + 1, K)}, {"a": (K,)}, {"b": (N, R + 1)}, {"b": (R,)}):
        with pytest.raises(ValueError, match="want "):
            CHAINS[op](*(torch.randn(shape) for shape in (fitting | wrong).values()))


@pytest.mark.parametrize("op", BASES)
def test_a_base_that_does_not_fit(op: str) -> None:
    x, a, b = torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
    weight, base_out = torch.randn(N, K), torch.randn(N, N)
    assert BASES[op](x, a, b, weight=weight).shape == BASES[op](x, a, b, base_out=base_out).shape == (N, N)
    with pytest.raises(ValueError, match=r"weight \(6, 5\): want \[N, K\] = \(5, 6\)"):
        BASES[op](x, a, b, weight=weight.T)
    for wrong in ({"base_out": base_out[:-1]}, {"weight": weight, "base_out": base_out}):
        with pytest.raises(ValueError, match=r"base_out \(\d, 5\): want \(5, 5\), without weight"):
            BASES[op](x, a, b, **wrong)
