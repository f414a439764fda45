"""Checks of operands that several ops have."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def chained(x: Tensor, down: Tensor, up: Tensor) -> bool:
    """Whether the shapes are x [..., K], down [R, K], up [N, R]."""
    wide, first, second = x.shape, down.shape, up.shape
    if len(first) != 2 or len(second) != 2 or len(wide) < 1:
        return False
    return wide[-1] == first[1] and first[0] == second[1]


def check_base(lead: Sequence[int], k: int, n: int, weight: Tensor | None, base_out: Tensor | None) -> None:
    """Raise ValueError unless what an update is added to is weight [N, K], base_out [..., N] or nothing."""
    if weight is not None and weight.shape != (n, k):
        raise ValueError(f"weight {tuple(weight.shape)}: want [N, K] = {(n, k)}")
    if base_out is not None and (weight is not None or base_out.shape != (*lead, n)):
        raise ValueError(f"base_out {tuple(base_out.shape)}: want {(*lead, n)}, without weight")
