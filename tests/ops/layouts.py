"""The ways in which a tensor can lie in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor


def poisoned(value: Tensor, *shape: int) -> Tensor:
    """A buffer like `value`, full of what must never be read: NaN, or a number that is no valid index."""
    fill = math.nan if value.is_floating_point() else (value.dtype == torch.bool or -(2**31))
    return torch.full(shape, fill, dtype=value.dtype, device=value.device)


def padded(value: Tensor) -> Tensor:
    """Rows further apart than they are long, and not aligned."""
    wide = poisoned(value, *value.shape[:-1], value.shape[-1] + 5)
    return wide[..., 3:-2].copy_(value)


def spread(value: Tensor) -> Tensor:
    """Every other column."""
    wide = poisoned(value, *value.shape[:-1], 2 * value.shape[-1])
    return wide[..., 1::2].copy_(value)


def transposed(value: Tensor) -> Tensor:
    """Column-major in the last two dimensions."""
    return value.mT.contiguous().mT if value.dim() > 1 else value


def permuted(value: Tensor) -> Tensor:
    """All dimensions in reverse order."""
    order = tuple(reversed(range(value.dim())))
    return value.permute(order).contiguous().permute(order)


def expanded(value: Tensor) -> Tensor:
    """The first dimension with stride 0: other values, the same shape. Integers stay: they are indices."""
    repeats = value.is_floating_point() and value.dim() > 1 and value.numel() > 0
    return value[:1].clone().expand_as(value) if repeats else value


LAYOUTS: list[Callable[[Tensor], Tensor]] = [torch.clone, padded, spread, transposed, permuted, expanded]


def relayout(kwargs: dict[str, Any], random: Random) -> dict[str, Any]:
    """Every tensor laid out anew; what was one tensor stays one. Half of them stay contiguous."""
    done: dict[int, Tensor] = {}

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in done:
            choice = random.randrange(2 * len(LAYOUTS))
            done[id(value)] = LAYOUTS[choice if choice < len(LAYOUTS) else 0](value)
        return done[id(value)]

    return {key: move(value) for key, value in kwargs.items()}


def described(kwargs: dict[str, Any]) -> str:
    """The case in one line, for a failure's report."""

    def one(value: Any) -> Any:
        return f"{value.dtype} {tuple(value.shape)} by {value.stride()}" if isinstance(value, Tensor) else value

    return ", ".join(f"{key}={one(value)}" for key, value in kwargs.items())
