"""Checks of operands that several ops have."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor


def sizes(x: Tensor, down: Tensor, up: Tensor, names: str = "x, a, b") -> tuple[int, int, int, int]:
    """M, K, N and R of x [..., K], down [R, K] and up [N, R], whose names are given; ValueError for other shapes."""
    wide, first, second = x.shape, down.shape, up.shape
    if wide and x.is_floating_point() and len(first) == len(second) == 2:
        (r, k), (n, ranks) = first, second
        if wide[-1] == k and r == ranks:
            return (x.numel() // k if k else math.prod(wide[:-1])), k, n, r
    x_name, a, b = names.split(", ")
    check_floating(x_name, x)
    shapes = f"{x_name} {tuple(wide)}, {a} {tuple(first)}, {b} {tuple(second)}"
    raise ValueError(f"{shapes}: want {x_name} [..., K], {a} [R, K], {b} [N, R]")


def check_base(x: Tensor, k: int, n: int, weight: Tensor | None, base_out: Tensor | None) -> None:
    """Raise ValueError unless what an update is added to is weight [N, K], base_out [..., N] or nothing."""
    if weight is not None and weight.shape != (n, k):
        raise ValueError(f"weight {tuple(weight.shape)}: want [N, K] = {(n, k)}")
    if base_out is not None and (weight is not None or base_out.shape != (*x.shape[:-1], n)):
        raise ValueError(f"base_out {tuple(base_out.shape)}: want {(*x.shape[:-1], n)}, without weight")


def check_floating(name: str, x: Tensor) -> None:
    """Raise ValueError for a tensor of integers."""
    if not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}: want a floating-point one")


def number(op: str, scale: Any) -> float:
    """The op's scale; TypeError for a tensor that requires grad, since it would get none."""
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise TypeError(f"{op}: the scale requires grad: want a number; for a trained one multiply an operand by it")
    return scale  # type: ignore[no-any-return]


def of_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the widest of their dtypes: a kernel is made for one."""
    wide = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return [t.to(wide) for t in tensors]
