"""What serves both parts of prefix_attention, prefix and text: tiles, walks over the keys, and the pass over keys."""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from ._common import dot, load_rows, round_to
from ._dropout import keep_mask_at, row_keys


class Tile(NamedTuple):
    """Queries and keys of a tile, and the launch options."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (pass, 16-bit products) -> width of a head up to which a row holds. Registers and spills are in the table of aot.py.
_Rows = dict[int, Tile]
_TILES: dict[tuple[str, bool], _Rows] = {
    ("forward", True): {64: Tile(128, 32, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    ("forward", False): {64: Tile(32, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
    ("few", True): {64: Tile(16, 128, 4, 3), 128: Tile(16, 64, 4, 3), 256: Tile(16, 32, 4, 3)},
    ("few", False): {64: Tile(16, 32, 4, 2), 256: Tile(16, 16, 4, 2)},
    ("queries", True): {64: Tile(64, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 2)},
    ("queries", False): {64: Tile(16, 16, 8, 2), 256: Tile(16, 16, 8, 2)},
    ("keys", True): {64: Tile(64, 64, 8, 1), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
    ("keys", False): {64: Tile(16, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
}

# Where an architecture's registers or instructions want another row than the one above: with these nothing spills.
_OVERRIDES: dict[tuple[str, str, bool], _Rows] = {
    ("sm80", "forward", True): {64: Tile(64, 32, 8, 3), 128: Tile(128, 32, 8, 2)},
    ("sm80", "queries", True): {64: Tile(64, 32, 8, 2), 256: Tile(32, 16, 8, 1)},
    ("sm80", "keys", True): {64: Tile(64, 32, 8, 2)},
    ("sm100", "keys", True): {64: Tile(32, 64, 8, 2)},
    ("gfx942", "forward", True): {128: Tile(128, 32, 8, 2)},
    ("gfx942", "few", True): {128: Tile(16, 64, 4, 2)},
    ("gfx942", "queries", True): {64: Tile(64, 32, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 16, 8, 1)},
    ("gfx942", "keys", True): {64: Tile(32, 64, 4, 2), 128: Tile(32, 32, 4, 2), 256: Tile(16, 32, 8, 1)},
}


@functools.cache
def tile(name: str, half: bool, width: int, arch: str) -> Tile:
    """Tile of a pass ("forward", "few", "queries", "keys") for heads of this width, on an architecture."""
    rows = _TILES[name, half] | _OVERRIDES.get((arch, name, half), {})
    return rows[min(limit for limit in rows if width <= limit)]


@triton.jit
def mask_at(mask_ptr, b, h, offs_m, stride_mb, stride_mh, stride_ms, MASK: tl.constexpr):
    """[BLOCK_M, 1] pointers to the queries' rows of the mask, of one head or of h [BLOCK_M]; none without a mask."""
    mask_rows = mask_ptr
    if MASK != 0:
        mask_rows = mask_ptr + b * stride_mb + (h * stride_mh + offs_m.to(tl.int64) * stride_ms)[:, None]
    return mask_rows


@triton.jit
def scores_tile(
    q,
    k_rows,
    mask_rows,
    offs_m,
    offs_n,
    offs_d,
    S,
    N,
    D,
    stride_kn,
    scale,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] f32 scores, -inf where a query does not see a key. MASK: 0 none, 1 bool, 2 additive."""
    k_tile = k_rows + offs_n.to(tl.int64)[None, :] * stride_kn + offs_d[:, None]
    k = tl.load(k_tile, mask=(offs_n < N)[None, :] & (offs_d < D)[:, None], other=0.0)
    s = dot(q, k, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION) * scale
    seen = (offs_n < N)[None, :] & (offs_m >= 0)[:, None]
    if CAUSAL:
        seen = seen & (offs_n[None, :] <= offs_m[:, None] + (N - S))
    if MASK != 0:
        inside = (offs_m < S)[:, None] & (offs_n < N)[None, :]
        m = tl.load(mask_rows + offs_n[None, :], mask=inside, other=0)
        if MASK == 1:
            seen = seen & (m != 0)
        else:
            s += m
    return tl.where(seen, s, float("-inf"))


@triton.jit
def walk(
    q,
    k_rows,
    v_rows,
    mask_rows,
    acc,
    top,
    total,
    key1,
    key2,
    offs_m,
    offs_d,
    S,
    N,
    D,
    begin,
    end,
    first_column,
    stride_kn,
    stride_vn,
    scale,
    threshold,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over keys [begin, end) of one part: (sum of weighted values, highest score, sum of weights).

    SPLIT: these may be the first keys that a query meets, and it may see none of them.
    """
    for start in range(begin, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        s = scores_tile(
            q, k_rows, mask_rows, offs_m, offs_n, offs_d, S, N, D, stride_kn, scale, CAUSAL, MASK, PRECISION, BLOCK_M,
            BLOCK_N,
        )  # fmt: skip
        v = load_rows(v_rows, stride_vn, offs_n, offs_n < N, offs_d, D)
        higher = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher) if SPLIT else higher
        fade = tl.exp(top - shift)
        p = tl.exp(s - shift[:, None])
        total = total * fade + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(keep_mask_at(key1, key2, first_column + offs_n, threshold), p, 0.0)
        acc = dot(p, v, acc * fade[:, None], PRECISION)
        top = higher
    return acc, top, total


@triton.jit
def weights_and_slopes(s, top, inv_sum, dp, delta, key1, key2, columns, inv_keep, threshold, DROPOUT: tl.constexpr):
    """(what the values were multiplied with, gradient of the scores) from scores and gradient of the weights."""
    p = tl.exp(s - top[:, None]) * inv_sum[:, None]
    dropped = p
    if DROPOUT:
        keep = keep_mask_at(key1, key2, columns, threshold)
        dropped = tl.where(keep, p * inv_keep, 0.0)
        dp = tl.where(keep, dp * inv_keep, 0.0)
    return dropped, p * (dp - delta[:, None])


@triton.jit
def walk_back(
    q,
    dout,
    dq,
    top,
    inv_sum,
    delta,
    k_rows,
    v_rows,
    mask_rows,
    key1,
    key2,
    offs_m,
    offs_d,
    S,
    N,
    D,
    end,
    first_column,
    stride_kn,
    stride_vn,
    scale,
    inv_keep,
    threshold,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq plus what keys [0, end) of one part give, without the scale."""
    for start in range(0, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        s = scores_tile(
            q, k_rows, mask_rows, offs_m, offs_n, offs_d, S, N, D, stride_kn, scale, CAUSAL, MASK, PRECISION, BLOCK_M,
            BLOCK_N,
        )  # fmt: skip
        v = load_rows(v_rows, stride_vn, offs_n, offs_n < N, offs_d, D)
        k = load_rows(k_rows, stride_kn, offs_n, offs_n < N, offs_d, D)
        dp = dot(dout, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        _, ds = weights_and_slopes(
            s, top, inv_sum, dp, delta, key1, key2, first_column + offs_n, inv_keep, threshold, DROPOUT
        )
        dq = dot(ds, k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=["S", "N", "first_column", "threshold"])
def keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    top_ptr,
    sum_ptr,
    delta_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    seed_ptr,
    Hq,
    GROUP,
    S,
    N,
    D,
    first_column,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_mb,
    stride_mh,
    stride_ms,
    stride_dob,
    stride_doh,
    stride_dos,
    scale,
    inv_keep,
    threshold,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk and dv [B, Hkv, N, D], contiguous, of one block of keys: summed over the heads of the group, in order."""
    n0 = tl.program_id(0) * BLOCK_N
    offs_n = n0 + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    heads = Hq // GROUP
    b = (tl.program_id(1) // heads).to(tl.int64)
    kvh = (tl.program_id(1) % heads).to(tl.int64)
    k_rows = k_ptr + b * stride_kb + kvh * stride_kh
    v = load_rows(v_ptr + b * stride_vb + kvh * stride_vh, stride_vn, offs_n, offs_n < N, offs_d, D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first = 0
    if CAUSAL:
        first = max(0, n0 - (N - S)) // BLOCK_M * BLOCK_M
    for g in range(GROUP):
        h = kvh * GROUP + g
        for start in range(first, S, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            row = (b * Hq + h) * S + offs_m
            q = load_rows(q_ptr + b * stride_qb + h * stride_qh, stride_qs, offs_m, offs_m < S, offs_d, D)
            dout = load_rows(dout_ptr + b * stride_dob + h * stride_doh, stride_dos, offs_m, offs_m < S, offs_d, D)
            top = tl.load(top_ptr + row, mask=offs_m < S, other=float("inf"))
            inv_sum = 1.0 / tl.load(sum_ptr + row, mask=offs_m < S, other=1.0)
            delta = tl.load(delta_ptr + row, mask=offs_m < S, other=0.0)
            mask_rows = mask_at(mask_ptr, b, h, offs_m, stride_mb, stride_mh, stride_ms, MASK)
            s = scores_tile(
                q, k_rows, mask_rows, offs_m, offs_n, offs_d, S, N, D, stride_kn, scale, CAUSAL, MASK, PRECISION,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
            key1, key2 = row_keys(seed_ptr, row, DROPOUT)
            dp = dot(dout, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            dropped, ds = weights_and_slopes(
                s, top, inv_sum, dp, delta, key1, key2, first_column + offs_n, inv_keep, threshold, DROPOUT
            )
            dv = dot(tl.trans(dropped), dout, dv, PRECISION)
            dk = dot(tl.trans(ds), q, dk, PRECISION)
    at = ((b * heads + kvh) * N + offs_n)[:, None] * D + offs_d[None, :]
    inside = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    tl.store(dk_ptr + at, round_to(dk * scale, dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, round_to(dv, dv_ptr.dtype.element_ty), mask=inside)
