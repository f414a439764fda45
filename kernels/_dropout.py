"""Seeded dropout: the hash of peftkern/ops/dropout.py, and its launch arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import launch
from ._tiles import cdiv

_ODD = tl.constexpr(0x9E3779B1)
#: Elements from which rows are hashed once, for all tiles of a row: a launch costs more than the hashes of fewer.
_HASH_ROWS = 1 << 22
#: Rows of the largest tile, which may reach beyond the last row.
_MOST_ROWS = 256


@triton.jit
def _row_hash(seed_ptr, rows):
    """splitmix64 of (seed, row), uint64."""
    z = tl.load(seed_ptr).to(tl.uint64) + (rows.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def row_keys(seed_ptr, rows, DROPOUT: tl.constexpr = 1):
    """a and b of every row, uint32, of which `_pair_bits` makes its random bits.

    DROPOUT 2: seed_ptr is what `hash_rows` made, read instead of computed: 64-bit products cost as much as the rest.
    0: nothing is dropped, and the words mean nothing.
    """
    a, b = rows, rows
    if DROPOUT != 0:
        z = tl.load(seed_ptr + rows).to(tl.uint64) if DROPOUT == 2 else _row_hash(seed_ptr, rows)
        a, b = z.to(tl.uint32), (z >> 32).to(tl.uint32) & 0xFFFF0000
    return a, b


@triton.jit
def hash_rows_kernel(seed_ptr, out_ptr, BLOCK: tl.constexpr):
    """out[m] = `_row_hash` of row m."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + rows, _row_hash(seed_ptr, rows).to(tl.int64))


@triton.jit
def _pair_bits(a, b, odd):
    """[rows, pairs] uint32: the bits that decide about the even column of each pair; times _ODD, about the odd one."""
    c = odd * 0x21F0AAAD
    c = (c ^ (c >> 15)) * 0xD35A2D97
    return a[:, None] * c[None, :] + b[:, None]


@triton.jit
def keep_mask(a, b, cols, threshold):
    """[rows, cols] bool, True where dropout keeps the element. `threshold` is int32 bits of a uint32.

    cols are consecutive, from an even one. A product and a comparison an element; in pairs, because the compiler spoils
    rows of comparisons that are all alike by packing them. Bits below the threshold's upper 16 decide nothing.
    """
    pairs: tl.constexpr = cols.shape[0] // 2
    bits = _pair_bits(a, b, tl.max(tl.reshape(cols.to(tl.uint32), [pairs, 2]), axis=1))
    limit = threshold.to(tl.uint32)
    return tl.interleave(bits >= limit, bits * _ODD >= limit)


@triton.jit
def keep_mask_at(a, b, cols, threshold):
    """The same for any columns, with bits of their own for each."""
    c = cols.to(tl.uint32)
    bits = _pair_bits(a, b, c | 1) * tl.where((c & 1) == 1, _ODD, 1).to(tl.uint32)[None, :]
    return bits >= threshold.to(tl.uint32)


class Dropout(NamedTuple):
    """Launch arguments of dropout: `mode` is a constexpr, `threshold` int32 bits, `inv_keep` = 1 / (1 - p).

    p is a multiple of 2⁻¹⁶, the nearest; the threshold is its 16 bits above 16 zeros. mode: 0 none, 1 `seed` is the
    seed, 2 `seed` holds what `row_keys` reads for each row.
    """

    mode: int
    threshold: int
    inv_keep: float
    seed: Tensor | None


def dropout_args(p: float, seed: Tensor | None) -> Dropout:
    """Launch arguments for probability p in [0, 1) and an int64 seed tensor on the device (never read by the host)."""
    if p == 0.0:
        return Dropout(0, 0, 1.0, None)
    if not 0.0 < p < 1.0:
        raise ValueError(f"p must be in [0, 1), got {p}")
    if seed is None:
        raise ValueError(f"dropout with p={p} needs a seed tensor, got None")
    dropped = min(int(p * 2**16 + 0.5), 2**16 - 1)
    threshold = dropped << 16
    return Dropout(1, threshold - 2**32 if threshold >= 2**31 else threshold, 2**16 / (2**16 - dropped), seed)


def hash_rows(x: Tensor, drop: Dropout) -> Dropout:
    """The same dropout on the rows of x [M, C], prepared for passes that walk down the rows."""
    if drop.seed is None or x.numel() < _HASH_ROWS:
        return drop
    # A tile may begin anywhere, and the last one reads the hashes of up to so many rows that are not there.
    blocks = cdiv(x.shape[0] + _MOST_ROWS - 1, _MOST_ROWS)
    hashes = torch.empty(blocks * _MOST_ROWS, dtype=torch.int64, device=x.device)
    launch(hash_rows_kernel, (blocks,), drop.seed, hashes, BLOCK=_MOST_ROWS, num_warps=4)
    return drop._replace(mode=2, seed=hashes)
