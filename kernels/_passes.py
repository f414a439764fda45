"""The passes that low_rank and bottleneck are made of; each reads its large matrix once.

row pass     out[m, r] = sum_c drop(x)[m, c] w[r, c]                          reads x, writes M * R
expand pass  out[m, n] = base[m, n] + drop(factor (act(h) w + bias))[m, n]    reads base, writes out; on the way also
             out[m, n] = scale[n] out[m, n] + shift[n]
column pass  grad[r, c] = sum_m g[m, r] drop(src)[m, c]                       reads src; on the way also
             column sums of src (or src * other) and g
reduce       sums of partial gradients over the row splits, in a fixed order: no atomics, so always the same bits
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import activation, activation_grad, dot, keep_mask, long_dot, round_to, row_keys


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
        x_ptr, w_ptr, seed_ptr, offs_m, offs_r, M, K, R, stride_xm, stride_wr, stride_wk, start, end, threshold,
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


@triton.jit
def latent_tile(h_ptr, bias_ptr, offs_m, offs_r, M, R, splits, SPLIT: tl.constexpr):
    """h[m, r] = sum over splits of the row pass's partials (+ bias[r]), f32, 0 outside; SPLIT: splits > 1."""
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
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
def base_tile(base_ptr, stride_basem, offs_m, offs_n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tile of base [M, N], or f32 zeros without one. Loaded before the dots, to be in flight meanwhile."""
    if base_ptr is None:
        base = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        base = tl.load(base_ptr + offs_m.to(tl.int64)[:, None] * stride_basem + offs_n[None, :], mask=mask, other=0.0)
    return base


@triton.jit
def store_expanded(
    acc,
    base,
    bias_ptr,
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

    key1 and key2 are the rows' dropout keys, unused without dropout; factor holds dropout's 1 / (1 - p).
    """
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    acc *= factor
    if DROPOUT:
        acc = tl.where(keep_mask(key1, key2, offs_n, threshold), acc, 0.0)
    acc += base.to(tl.float32)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out_ptr + offsets, round_to(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "splits", "blocks_per_program", "threshold"])
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
    blocks_per_program,
    factor,
    threshold,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = base + keep * factor * (act(h) w + bias), w[r, n] by strides; h is summed over its splits and kept.

    scale, shift [N] f32 or none (with no dropout): out = scale * out + shift. MANY: R <= BLOCK_R, and a program sums,
    activates and splits its rows of h once for several blocks of columns.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid_n = tl.program_id(1)
    key1, key2 = offs_m, offs_m
    if DROPOUT:
        key1, key2 = row_keys(seed_ptr, offs_m, DROPOUT)
    offs_r = tl.arange(0, BLOCK_R)
    SPLIT: tl.constexpr = h_out_ptr is not None
    if MANY:
        h = latent_tile(h_ptr, h_bias_ptr, offs_m, offs_r, M, R, splits, SPLIT)
        if SPLIT:
            if pid_n == 0:
                store_latent(h_out_ptr, h, offs_m, offs_r, M, R)
        z = activation(h, ACT)
    start = pid_n * blocks_per_program
    end = min(start + blocks_per_program, tl.cdiv(N, BLOCK_N))
    offs_n = start * BLOCK_N + tl.arange(0, BLOCK_N)
    base = base_tile(base_ptr, stride_basem, offs_m, offs_n, M, N, BLOCK_M, BLOCK_N)
    for block in range(start, end):
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        if MANY:  # the next block's base is in flight during this one's dot: only its operands are pipelined for us
            next_base = base_tile(base_ptr, stride_basem, offs_m, offs_n + BLOCK_N, M, N, BLOCK_M, BLOCK_N)
        w_tile = w_ptr + offs_r.to(tl.int64)[:, None] * stride_wr + offs_n.to(tl.int64)[None, :] * stride_wn
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if MANY:
            w = tl.load(w_tile, mask=(offs_r < R)[:, None] & (offs_n < N)[None, :], other=0.0)
            acc = dot(z, w, acc, PRECISION)
        else:
            for r in range(0, R, BLOCK_R):
                inside = r + offs_r < R
                w = tl.load(
                    w_tile + tl.cast(r, tl.int64) * stride_wr, mask=inside[:, None] & (offs_n < N)[None, :], other=0.0
                )
                h = latent_tile(h_ptr, h_bias_ptr, offs_m, r + offs_r, M, R, splits, SPLIT)
                if SPLIT:
                    if block == 0:
                        store_latent(h_out_ptr, h, offs_m, r + offs_r, M, R)
                acc = dot(activation(h, ACT), w, acc, PRECISION)
        added = base.to(tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
            acc *= scale
            added *= scale
        if shift_ptr is not None:
            added += tl.load(shift_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
        store_expanded(acc, added, bias_ptr, out_ptr, key1, key2, offs_m, offs_n, M, N, factor, threshold, DROPOUT)
        if MANY:
            base = next_base


@triton.jit(do_not_specialize=["M", "rows_per_split", "stride_split", "threshold"])
def column_kernel(
    src_ptr,
    g_ptr,
    other_ptr,
    grad_ptr,
    src_sum_ptr,
    g_sum_ptr,
    seed_ptr,
    M,
    C,
    R,
    stride_srcm,
    stride_otherm,
    stride_gradr,
    stride_gradc,
    stride_split,
    rows_per_split,
    grad_factor,
    threshold,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Gradient of a weight over one split of the rows.

    grad[r, c] = grad_factor * sum_m act(g)[m, r] drop(src)[m, c], by strides, at grad_ptr + split * stride_split;
    src_sum[c] = grad_factor * sum_m drop(src)[m, c], or with other sum_m (src * other)[m, c]; g_sum[r] = sum_m g[m, r].
    A pointer that is None drops its part.
    """
    pid_c = tl.program_id(0)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    at_split = tl.program_id(2).to(tl.int64) * stride_split
    mask_c = offs_c < C
    mask_r = offs_r < R
    row_start = tl.program_id(2) * rows_per_split
    row_end = min(row_start + rows_per_split, M)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    src_sum = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    g_sum = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for m in range(row_start, row_end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        rows = offs_m.to(tl.int64)[:, None]
        mask_m = offs_m < row_end
        mask = mask_m[:, None] & mask_c[None, :]
        src = tl.load(src_ptr + rows * stride_srcm + offs_c[None, :], mask=mask, other=0.0)
        g = tl.load(g_ptr + rows * R + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if DROPOUT:
            key1, key2 = row_keys(seed_ptr, offs_m, DROPOUT)
            src = tl.where(keep_mask(key1, key2, offs_c, threshold), src, 0.0)
        acc = long_dot(tl.trans(src), activation(g, ACT), acc, PRECISION)
        # Sums over the rows of a tile wait until the end: inside the loop they would cost as much as the product.
        if src_sum_ptr is not None:
            summed = src.to(tl.float32)
            if other_ptr is not None:
                other = tl.load(other_ptr + rows * stride_otherm + offs_c[None, :], mask=mask, other=0.0)
                summed *= other.to(tl.float32)
            src_sum += summed
        if g_sum_ptr is not None:
            g_sum += g
    grad_tile = grad_ptr + at_split + offs_c.to(tl.int64)[:, None] * stride_gradc
    grad_tile += offs_r.to(tl.int64)[None, :] * stride_gradr
    tl.store(grad_tile, acc * grad_factor, mask=mask_c[:, None] & mask_r[None, :])
    if src_sum_ptr is not None:
        if tl.program_id(1) == 0:
            sums = tl.sum(src_sum, axis=0)
            if other_ptr is None:
                sums *= grad_factor
            tl.store(src_sum_ptr + at_split + offs_c, sums, mask=mask_c)
    if g_sum_ptr is not None:
        if pid_c == 0:
            tl.store(g_sum_ptr + at_split + offs_r, tl.sum(g_sum, axis=0), mask=mask_r)


@triton.jit(do_not_specialize=["size", "end0", "end1", "end2", "splits"])
def reduce_kernel(
    partial_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    out3_ptr,
    size,
    end0,
    end1,
    end2,
    splits,
    BLOCK: tl.constexpr,
):
    """Sum partial [splits, size] over the splits, first to last, and cut the sums into up to four outputs."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        acc += tl.load(partial_ptr + tl.cast(split, tl.int64) * size + offs, mask=mask, other=0.0)
    tl.store(out0_ptr + offs, acc, mask=offs < end0)
    if out1_ptr is not None:
        tl.store(out1_ptr + offs - end0, acc, mask=(offs >= end0) & (offs < end1))
    if out2_ptr is not None:
        tl.store(out2_ptr + offs - end1, acc, mask=(offs >= end1) & (offs < end2))
    if out3_ptr is not None:
        tl.store(out3_ptr + offs - end2, acc, mask=(offs >= end2) & mask)
