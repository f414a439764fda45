"""Checks of operands that several ops have."""

from __future__ import annotations

import math

from torch import Tensor


def sizes(x: Tensor, down: Tensor, up: Tensor, names: str = "x, a, b") -> tuple[int, int, int, int]:
    """M, K, N and R of x [..., K], down [R, K] and up [N, R], whose names are given; ValueError for other shapes."""
    wide, first, second = x.shape, down.shape, up.shape
    if wide and len(first) == len(second) == 2:
        (r, k), (n, ranks) = first, second
        if wide[-1] == k and r == ranks:
            return (x.numel() // k if k else math.prod(wide[:-1])), k, n, r
    x_name, a, b = names.split(", ")
    shapes = f"{x_name} {tuple(wide)}, {a} {tuple(first)}, {b} {tuple(second)}"
    raise ValueError(f"{shapes}: want {x_name} [..., K], {a} [R, K], {b} [N, R]")


def check_base(x: Tensor, k: int, n: int, weight: Tensor | None, base_out: Tensor | None) -> None:
    """Raise ValueError unless what an update is added to is weight [N, K], base_out [..., N] or nothing."""
    if weight is not None and weight.shape != (n, k):
        raise ValueError(f"weight {tuple(weight.shape)}: want [N, K] = {(n, k)}")
    if base_out is not None and (weight is not None or base_out.shape != (*x.shape[:-1], n)):
        raise ValueError(f"base_out {tuple(base_out.shape)}: want {(*x.shape[:-1], n)}, without weight")
