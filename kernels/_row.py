"""The row pass: out[m, r] = sum_c drop(x)[m, c] w[r, c]; reads x once, writes M * R."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import activation_grad, long_dot, long_pair_dot
from ._device import device_of, launch
from ._dropout import Dropout, keep_mask, row_keys
from ._tiles import cdiv, row_block_m, tile

#: Splits of the columns in the row pass at most.
MAX_COLUMN_SPLITS = 16
#: Programs of the row pass that a multiprocessor should have: the dropout hash keeps one of four warps waiting.
_ROW_PROGRAMS = 3


@triton.jit
def accumulate_rows(
    x_ptr,
    w_ptr,
    seed_ptr,
    offs_m,
    offs_r,
    M,
    K,
    R,
    stride_xm,
    stride_wr,
    stride_wk,
    w_half,
    block_start,
    block_end,
    threshold,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """[BLOCK_M, BLOCK_R] f32 tile of drop(x) w^T over a range of k blocks; the 1 / (1 - p) is left to the caller.

    PRECISION "pair": the second half of w is w_half elements after the first.
    Counting in blocks lets the compiler see that every tile starts at a multiple of BLOCK_K: 16-byte loads.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    x_rows = x_ptr + offs_m.to(tl.int64) * stride_xm
    w_rows = w_ptr + offs_r.to(tl.int64) * stride_wr
    if DROPOUT:
        key1, key2 = row_keys(seed_ptr, offs_m, DROPOUT)
    for block in range(block_start, block_end):
        offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(x_rows[:, None] + offs_k[None, :], mask=(offs_m < M)[:, None] & mask_k[None, :], other=0.0)
        w_tile = w_rows[None, :] + offs_k.to(tl.int64)[:, None] * stride_wk
        w = tl.load(w_tile, mask=mask_k[:, None] & (offs_r < R)[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(keep_mask(key1, key2, offs_k, threshold), x, 0.0)
        if PRECISION == "pair":
            rest = tl.load(w_tile + w_half, mask=mask_k[:, None] & (offs_r < R)[None, :], other=0.0)
            acc = long_pair_dot(x, w, rest, acc)
        else:
            acc = long_dot(x, w, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "blocks_per_split", "threshold"])
def row_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    pre_ptr,
    out_ptr,
    seed_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_wr,
    stride_wk,
    w_half,
    blocks_per_split,
    factor,
    threshold,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[split, m, r] = factor * sum_k drop(x)[m, k] w[r, k] (+ bias[r]) (* act'(pre[m, r])), f32."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    start = split * blocks_per_split
    end = min(start + blocks_per_split, tl.cdiv(K, BLOCK_K))
    acc = accumulate_rows(
        x_ptr, w_ptr, seed_ptr, offs_m, offs_r, M, K, R, stride_xm, stride_wr, stride_wk, w_half, start, end, threshold,
        DROPOUT, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    acc *= factor
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_r, mask=offs_r < R, other=0.0).to(tl.float32)[None, :]
    if pre_ptr is not None:
        acc *= activation_grad(tl.load(pre_ptr + offsets, mask=mask, other=0.0), ACT)
    tl.store(out_ptr + split.to(tl.int64) * M * R + offsets, acc, mask=mask)


def row_pass(
    x: Tensor,
    w: Tensor,
    factor: float,
    drop: Dropout,
    precision: str,
    bias: Tensor | None = None,
    pre: Tensor | None = None,
    act: str = "",
    may_split: bool = False,
    op: str = "",
) -> Tensor:
    """factor * drop(x) w^T (+ bias) (* act'(pre)) -> [splits, M, R] f32, whose sum over splits is the result.

    x [M, K], w [R, K], or [2, R, K] from `halves`, by any strides. More than one split only when `may_split`, with few
    rows and many columns; the bias and act'(pre) are then left to `expand_pass` or `latent_pass`. op: whose row of
    `_tiles` it may have of its own.
    """
    (m, k), r = x.shape, w.shape[-2]
    precision = "pair" if w.dim() == 3 else precision
    device = device_of(x)
    t, processors = tile(f"{op}/row", precision, r, device.arch), device.processors
    block_m = row_block_m(m, t, processors)
    blocks_m, blocks_r, blocks_k = cdiv(m, block_m), cdiv(r, t.block_r), cdiv(k, t.block_c)
    splits = 1
    if may_split:
        # Partials (8 R bytes per split and row) cost at most a quarter of reading x, unless processors were idle.
        affordable = max(k * x.element_size() // (32 * r), processors // (blocks_m * blocks_r))
        wanted = _ROW_PROGRAMS * processors // (blocks_m * blocks_r)
        splits = max(1, min(wanted, affordable, blocks_k // 4, MAX_COLUMN_SPLITS))
    per_split = cdiv(blocks_k, splits)
    splits = cdiv(blocks_k, per_split)
    out = torch.empty((splits, m, r), dtype=torch.float32, device=x.device)
    launch(
        row_kernel, (blocks_m, blocks_r, splits),
        x, w, bias if splits == 1 else None, pre if splits == 1 else None, out, drop.seed,
        m, k, r, x.stride(0), w.stride(-2), w.stride(-1), w.stride(0), per_split, float(factor), drop.threshold,
        ACT=act, DROPOUT=drop.mode, PRECISION=precision, BLOCK_M=block_m, BLOCK_K=t.block_c, BLOCK_R=t.block_r,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    return out
