"""The expand pass: out[m, n] = base[m, n] + drop(factor (act(h) w + bias))[m, n]; reads base once, writes out.

On the way also out[m, n] = scale[n] out[m, n] + shift[n]. Where it is large, `latent_pass` makes act(h) ready for the
tensor cores, and a program keeps its columns of w.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import activation, dot, long_dot, round_to, two_halves
from ._device import device_of, launch
from ._dropout import Dropout, keep_mask, row_keys
from ._latent import latent_pass
from ._tiles import cdiv, tile

#: Columns that the programs of a multiprocessor keep between them in the expand pass.
_KEPT_COLUMNS = 256
#: Tiles of a program from which it keeps its columns.
_KEPT_TILES = 4


@triton.jit
def latent_tile(h_ptr, bias_ptr, offs_m, offs_r, end, M, R, splits, SPLIT: tl.constexpr):
    """h[m, r] = sum over splits of the row pass's partials (+ bias[r]), f32, 0 from row `end` on; SPLIT: splits > 1."""
    mask = (offs_m < end)[:, None] & (offs_r < R)[None, :]
    tile_ptr = h_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    h = tl.load(tile_ptr, mask=mask, other=0.0)
    if SPLIT:
        for split in range(1, splits):
            h += tl.load(tile_ptr + tl.cast(split, tl.int64) * M * R, mask=mask, other=0.0)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + offs_r, mask=offs_r < R, other=0.0).to(tl.float32)[None, :]
    return h


@triton.jit
def store_latent(out_ptr, h, offs_m, offs_r, M, R):
    """out[m, r] = h, contiguous."""
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    tl.store(out_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :], h, mask=mask)


@triton.jit
def base_tile(base_ptr, stride_basem, offs_m, offs_n, M, N, INSIDE: tl.constexpr = False):
    """Tile of base [M, N], or f32 zeros without one. INSIDE: nothing of it is outside."""
    if base_ptr is None:
        base = tl.zeros((offs_m.shape[0], offs_n.shape[0]), tl.float32)
    else:
        tile = base_ptr + offs_m.to(tl.int64)[:, None] * stride_basem + offs_n[None, :]
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        base = tl.load(tile) if INSIDE else tl.load(tile, mask=mask, other=0.0)
    return base


@triton.jit
def store_expanded(
    acc,
    base,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    key1,
    key2,
    offs_m,
    offs_n,
    M,
    N,
    factor,
    threshold,
    DROPOUT: tl.constexpr,
):
    """out[m, n] = base[m, n] + keep[m, n] * factor * (acc + bias)[m, n] in out's dtype; out is contiguous.

    scale, shift [N] f32 or none (with no dropout): out = scale * out + shift. key1 and key2 are the rows' dropout keys,
    unused without dropout; factor holds dropout's 1 / (1 - p).
    """
    added = base.to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
        added *= scale
        acc *= scale
    if shift_ptr is not None:
        added += tl.load(shift_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    acc *= factor
    if DROPOUT:
        acc = tl.where(keep_mask(key1, key2, offs_n, threshold), acc, 0.0)
    acc += added
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out_ptr + offsets, round_to(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "splits", "threshold"])
def expand_kernel(
    h_ptr,
    h_bias_ptr,
    h_out_ptr,
    w_ptr,
    bias_ptr,
    base_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    seed_ptr,
    M,
    N,
    R,
    stride_wr,
    stride_wn,
    stride_basem,
    splits,
    factor,
    threshold,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = base + keep * factor * (act(h) w + bias), w[r, n] by strides; h is summed over its splits and kept.

    scale, shift [N] f32 or none (with no dropout): out = scale * out + shift.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid_n = tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    key1, key2 = row_keys(seed_ptr, offs_m, DROPOUT)
    SPLIT: tl.constexpr = h_out_ptr is not None
    base = base_tile(base_ptr, stride_basem, offs_m, offs_n, M, N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        w_tile = w_ptr + offs_r.to(tl.int64)[:, None] * stride_wr + offs_n.to(tl.int64)[None, :] * stride_wn
        w = tl.load(w_tile, mask=(offs_r < R)[:, None] & (offs_n < N)[None, :], other=0.0)
        h = latent_tile(h_ptr, h_bias_ptr, offs_m, offs_r, M, M, R, splits, SPLIT)
        if SPLIT:
            if pid_n == 0:
                store_latent(h_out_ptr, h, offs_m, offs_r, M, R)
        acc = long_dot(activation(h, ACT), w, acc, PRECISION)
    store_expanded(
        acc, base, bias_ptr, scale_ptr, shift_ptr, out_ptr, key1, key2, offs_m, offs_n, M, N, factor, threshold, DROPOUT
    )


@triton.jit(do_not_specialize=["M", "rows_per_program", "threshold"])
def expand_columns_kernel(
    z_ptr,
    w_ptr,
    bias_ptr,
    base_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    seed_ptr,
    M,
    N,
    R,
    stride_wr,
    stride_wn,
    stride_basem,
    rows_per_program,
    factor,
    threshold,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What `expand_kernel` computes, from the latent that `latent_kernel` made; R <= BLOCK_R.

    A program keeps its columns of w and walks down rows, whose tiles of z and base are on their way meanwhile. EVEN:
    N is a multiple of BLOCK_N and R is BLOCK_R, so that loads need no masks.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    w_tile = w_ptr + offs_r.to(tl.int64)[:, None] * stride_wr + offs_n.to(tl.int64)[None, :] * stride_wn
    w = tl.load(w_tile, mask=(offs_r < R)[:, None] & (offs_n < N)[None, :], other=0.0)
    if PRECISION == "split":
        w, w_rest = two_halves(w)
    row_start = tl.program_id(1) * rows_per_program
    row_end = min(row_start + rows_per_program, M)
    for m in tl.range(row_start, row_end, BLOCK_M, num_stages=STAGES):
        offs_m = m + tl.arange(0, BLOCK_M)
        # Rows beyond the end read the last one: a load without a mask is a plain copy into shared memory.
        rows = tl.minimum(offs_m, row_end - 1)
        z_tile = z_ptr + rows.to(tl.int64)[:, None] * R + offs_r[None, :]
        z = tl.load(z_tile) if EVEN else tl.load(z_tile, mask=(offs_r < R)[None, :], other=0.0)
        base = base_tile(base_ptr, stride_basem, rows, offs_n, M, N, EVEN)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if PRECISION == "split":
            rest_tile = z_tile + tl.cast(M, tl.int64) * R
            z_rest = tl.load(rest_tile) if EVEN else tl.load(rest_tile, mask=(offs_r < R)[None, :], other=0.0)
            acc = dot(z_rest, w, acc, "bf16")
            acc = dot(z, w_rest, acc, "bf16")
            acc = dot(z, w, acc, "bf16")
        else:
            acc = dot(z, w, acc, PRECISION)
        key1, key2 = row_keys(seed_ptr, rows, DROPOUT)
        store_expanded(
            acc, base, bias_ptr, scale_ptr, shift_ptr, out_ptr, key1, key2, offs_m, offs_n, row_end, N, factor,
            threshold, DROPOUT,
        )  # fmt: skip


def expand_pass(
    h: Tensor,
    w: Tensor,
    base: Tensor | None,
    out: Tensor,
    factor: float,
    drop: Dropout,
    precision: str,
    h_bias: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "",
    pre: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [M, N] = base + drop(factor * (act(h) w + bias)) for h [splits, M, R] -> its sum over splits, act of it.

    The latter is [2, M, R], for `column_pass`, where halves were made on the way; else it is the sum again.

    w [R, N] by any strides; base [M, N] by any row stride, may be out itself. h_bias [R] is added only where the row
    pass left it out. With pre [M, R] it is not act(h) but h, times act'(pre) where the row pass left that out. With
    scale, shift [N] f32, and no dropout: out = scale * (base + factor * ...) + shift.
    """
    splits, m, r = h.shape
    n = out.shape[1]
    device = device_of(out)
    t = tile("dropout/expand_columns" if drop.mode else "expand_columns", precision, r, device.arch)
    blocks_m, blocks_n = cdiv(m, t.block_m), cdiv(n, t.block_c)
    programs = device.processors * _KEPT_COLUMNS // t.block_c
    # Elsewhere the latent pass costs more than it saves, or the addresses do not fit the registers.
    if r <= t.block_r and n % 16 == 0 and blocks_m * blocks_n >= _KEPT_TILES * programs:
        value, operand = latent_pass(h, h_bias, pre, act, precision)
        rows_per_program = t.block_m * cdiv(blocks_m * blocks_n, programs)
        launch(
            expand_columns_kernel, (blocks_n, cdiv(m, rows_per_program)),
            operand, w, bias, base, scale, shift, out, drop.seed,
            m, n, r, w.stride(0), w.stride(1), 0 if base is None else base.stride(0), rows_per_program,
            float(factor) * drop.inv_keep, drop.threshold,
            DROPOUT=drop.mode, PRECISION=precision, EVEN=n % t.block_c == 0 and r == t.block_r,
            BLOCK_M=t.block_m, BLOCK_N=t.block_c, BLOCK_R=t.block_r, STAGES=t.num_stages,
            num_warps=t.num_warps, num_stages=t.num_stages,
        )  # fmt: skip
        return value, operand if precision == "split" and out.dtype == torch.bfloat16 else value
    if pre is not None:
        h, act, splits = latent_pass(h, pre=pre, act=act)[0][None], "", 1
    t = tile("expand", precision, r, device.arch)
    h_out = torch.empty((m, r), dtype=torch.float32, device=h.device) if splits > 1 else None
    launch(
        expand_kernel, (cdiv(m, t.block_m), cdiv(n, t.block_c)),
        h, h_bias if splits > 1 else None, h_out, w, bias, base, scale, shift, out, drop.seed,
        m, n, r, w.stride(0), w.stride(1), 0 if base is None else base.stride(0), splits,
        float(factor) * drop.inv_keep, drop.threshold,
        ACT=act, DROPOUT=drop.mode, PRECISION=precision,
        BLOCK_M=t.block_m, BLOCK_N=t.block_c, BLOCK_R=t.block_r, num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    value = h[0] if h_out is None else h_out
    return value, value
