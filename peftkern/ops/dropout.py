"""Counter-based dropout: the mask is a pure function of (seed, row, column), so that nothing is saved for backward."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_LOW = 0xFFFFFFFF


def new_seed(device: torch.device) -> Tensor:
    """Draw a seed, int64 [1] on `device`, from torch's own generator: checkpointing and `manual_seed` replay it."""
    return torch.randint(2**62, (1,), device=device)


def check_dropout(p: float, seed: Tensor | None, x: Tensor) -> None:
    """Raise ValueError for p outside [0, 1), and for a seed that is not int64 [1] on x's device."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability {p}: want 0 <= p < 1")
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
        came = f"{seed.dtype} {tuple(seed.shape)} on {seed.device}" if isinstance(seed, Tensor) else repr(seed)
        raise ValueError(f"seed {came}: want a tensor, int64 [1] on {x.device}")


def threshold(p: float) -> int:
    """p in units of 2⁻¹⁶, rounded: elements whose random bits are below it are dropped."""
    return min(int(p * 2**16 + 0.5), 2**16 - 1)


def keep_scale(p: float) -> float:
    """1 / (1 - p) of the p that `threshold` has rounded, so that dropout leaves the expectation as it is."""
    return 2**16 / (2**16 - threshold(p))


def random_bits(seed: Tensor, rows: int, columns: int) -> Tensor:
    """16 random bits for every element of a [rows, columns] matrix, as int64: kept where they are >= `threshold(p)`.

    They are the upper half of a * c + b modulo 2³²: strongly universal hashing (Dietzfelbinger 1996, "Universal hashing
    and k-wise independent random variables via integer arithmetic without primes") of a key c for each pair of columns,
    by words a and b (a multiple of 2¹⁶) that splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom number
    generators") makes of seed and row. c is a fixed mix of the odd column's index, which takes away the regular steps
    that a * index would make; the odd column's word is the even one's times the golden ratio of 2³².
    """
    z = seed.reshape(1) + (torch.arange(rows, device=seed.device) + 1) * _GOLDEN
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    z = (z ^ _shift(z, 31))[:, None]
    c = torch.arange(1, columns + 1, 2, device=seed.device) * 0x21F0AAAD & _LOW
    c = (c ^ (c >> 15)) * 0xD35A2D97 & _LOW
    even = (z & _LOW) * c + (_shift(z, 48) << 16)
    return (torch.stack((even, even * 0x9E3779B1), -1) >> 16 & 0xFFFF).flatten(1)[:, :columns]


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Zero each element of x [..., C] with probability p and scale the rest by 1 / (1 - p); p to 16 bits.

    Rows are the flattened leading dimensions. The same seed gives the same mask on every backend and device.
    `seed` int64 [1] on x's device, or None when p is 0. Raises ValueError for p outside [0, 1).
    Source: Srivastava et al. 2014, "Dropout".
    """
    check_dropout(p, seed, x)
    if p == 0.0 or seed is None:
        return x
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    keep = random_bits(seed, rows, columns) >= threshold(p)
    return torch.where(keep.view(x.shape), x * keep_scale(p), torch.zeros((), dtype=x.dtype, device=x.device))


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 seen as unsigned."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
