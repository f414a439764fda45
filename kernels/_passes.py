"""The passes that low_rank and bottleneck are made of; each reads its large matrix once.

row pass     out[m, r] = sum_c drop(x)[m, c] w[r, c]                          reads x, writes M * R
expand pass  out[m, n] = base[m, n] + drop(factor (act(h) w + bias))[m, n]    reads base, writes out; on the way also
             out[m, n] = scale[n] out[m, n] + shift[n]
             large: a latent pass makes act(h) ready for the tensor cores, and a program keeps its columns of w
both         a row and an expand pass of the same rows, the latent in registers
column pass  grad[r, c] = sum_m g[m, r] drop(src)[m, c]                       reads src; on the way also
             column sums of src (or src * other) and g
reduce       sums of partial gradients over the row splits, in a fixed order: no atomics, so always the same bits
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import (
    activation,
    activation_grad,
    dot,
    keep_mask,
    long_dot,
    long_pair_dot,
    round_to,
    row_keys,
    two_halves,
)


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
    key1, key2 = offs_m, offs_m
    if DROPOUT:
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


@triton.jit(do_not_specialize=["M", "threshold"])
def both_kernel(
    x_ptr,
    w_ptr,
    w_bias_ptr,
    v_ptr,
    v_bias_ptr,
    pre_ptr,
    base_ptr,
    out_ptr,
    h_ptr,
    seed_ptr,
    M,
    K,
    N,
    R,
    stride_xm,
    stride_wr,
    stride_wk,
    stride_vr,
    stride_vn,
    stride_basem,
    w_factor,
    v_factor,
    threshold,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    INWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h = w_factor * x w^T (+ w_bias) (* act'(pre)), out = base + v_factor * (act(h) v + v_bias) for whole rows.

    With pre it is h that is multiplied by v. R <= BLOCK_R: h never leaves the registers, it is only written. INWARD:
    the dropout is that of x, not of what is added to base.
    """
    OUTWARD: tl.constexpr = 0 if INWARD else DROPOUT
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    mask = (offs_m < M)[:, None] & mask_r[None, :]
    latent_offsets = offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    h = accumulate_rows(
        x_ptr, w_ptr, seed_ptr, offs_m, offs_r, M, K, R, stride_xm, stride_wr, stride_wk, 0, 0, tl.cdiv(K, BLOCK_K),
        threshold, DROPOUT if INWARD else 0, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    h *= w_factor
    if w_bias_ptr is not None:
        h += tl.load(w_bias_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    if pre_ptr is not None:
        h *= activation_grad(tl.load(pre_ptr + latent_offsets, mask=mask, other=0.0), ACT)
    tl.store(h_ptr + latent_offsets, h, mask=mask)
    z = h if pre_ptr is not None else activation(h, ACT)
    key1, key2 = offs_m, offs_m
    if OUTWARD:
        key1, key2 = row_keys(seed_ptr, offs_m, OUTWARD)
    for block in tl.range(tl.cdiv(N, BLOCK_N), num_stages=STAGES):
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        base = base_tile(base_ptr, stride_basem, offs_m, offs_n, M, N)
        v_tile = v_ptr + offs_n.to(tl.int64)[None, :] * stride_vn + offs_r.to(tl.int64)[:, None] * stride_vr
        v = tl.load(v_tile, mask=(offs_n < N)[None, :] & mask_r[:, None], other=0.0)
        acc = dot(z, v, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        store_expanded(
            acc, base, v_bias_ptr, None, None, out_ptr, key1, key2, offs_m, offs_n, M, N, v_factor, threshold, OUTWARD
        )


@triton.jit(do_not_specialize=["size", "splits"])
def latent_kernel(
    h_ptr,
    bias_ptr,
    pre_ptr,
    sum_ptr,
    out_ptr,
    size,
    R,
    splits,
    ACT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sum [M, R] f32 = h summed over its splits (+ bias[r]) (* act'(pre)); out = act(sum), or sum itself with pre.

    size = M * R. PARTS 2: out [2, M, R] holds act(sum) as the sum of two bf16; 0: no out.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    h = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        h += tl.load(h_ptr + tl.cast(split, tl.int64) * size + offs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + offs % R, mask=mask, other=0.0).to(tl.float32)
    if pre_ptr is not None:
        h *= activation_grad(tl.load(pre_ptr + offs, mask=mask, other=0.0), ACT)
    if sum_ptr is not None:
        tl.store(sum_ptr + offs, h, mask=mask)
    if PARTS:
        z = h if pre_ptr is not None else activation(h, ACT)
        if PARTS == 2:
            first, second = two_halves(z)
            tl.store(out_ptr + offs, first, mask=mask)
            tl.store(out_ptr + size + offs, second, mask=mask)
        else:
            tl.store(out_ptr + offs, round_to(z, out_ptr.dtype.element_ty), mask=mask)


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
        key1, key2 = rows, rows
        if DROPOUT:
            key1, key2 = row_keys(seed_ptr, rows, DROPOUT)
        store_expanded(
            acc, base, bias_ptr, scale_ptr, shift_ptr, out_ptr, key1, key2, offs_m, offs_n, row_end, N, factor,
            threshold, DROPOUT,
        )  # fmt: skip


@triton.jit
def column_sums(
    g_ptr, g_half, row_start, row_end, offs_r, R, PAIR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
):
    """[BLOCK_R] f32 sums of g [M, R], or of a pair, over a range of rows."""
    sums = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for m in range(row_start, row_end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        tile = g_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
        mask = (offs_m < row_end)[:, None] & (offs_r < R)[None, :]
        sums += tl.load(tile, mask=mask, other=0.0).to(tl.float32)
        if PAIR:
            sums += tl.load(tile + g_half, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(sums, axis=0)


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
    g_half,
    stride_gradr,
    stride_gradc,
    stride_split,
    rows_per_split,
    grad_factor,
    threshold,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Gradient of a weight over one split of the rows.

    grad[r, c] = grad_factor * sum_m act(g)[m, r] drop(src)[m, c], by strides, at grad_ptr + split * stride_split;
    src_sum[c] = grad_factor * sum_m drop(src)[m, c], or with other sum_m (src * other)[m, c]; g_sum[r] = sum_m g[m, r].
    A pointer that is None drops its part. PRECISION "pair": the second half of g, which is not activated, is g_half
    elements after the first. EVEN: C is a multiple of BLOCK_C.
    """
    pid_c = tl.program_id(0)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    at_split = tl.program_id(2).to(tl.int64) * stride_split
    mask_c = offs_c < C
    mask_r = offs_r < R
    row_start = tl.program_id(2) * rows_per_split
    row_end = min(row_start + rows_per_split, M)
    if g_sum_ptr is not None:
        if pid_c * BLOCK_C >= C:  # one more program than blocks of columns
            g_sum = column_sums(g_ptr, g_half, row_start, row_end, offs_r, R, PRECISION == "pair", BLOCK_M, BLOCK_R)
            tl.store(g_sum_ptr + at_split + offs_r, g_sum, mask=mask_r)
            return
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    # Column sums of src are a product with ones where there are tensor cores, else they wait in a tile until the end.
    BY_ONES: tl.constexpr = src_sum_ptr is not None and other_ptr is None and src_ptr.dtype.element_ty != tl.float32
    src_sum = tl.zeros((BLOCK_C, 16) if BY_ONES else (BLOCK_M, BLOCK_C), tl.float32)
    for m in range(row_start, row_end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < row_end
        # Rows beyond the end, where g is 0, read the last one: without a mask a load is a plain copy.
        rows = tl.minimum(offs_m, row_end - 1).to(tl.int64)[:, None]
        src_tile = src_ptr + rows * stride_srcm + offs_c[None, :]
        mask = mask_m[:, None] & mask_c[None, :]
        if EVEN and src_sum_ptr is None:
            src = tl.load(src_tile)
        else:
            src = tl.load(src_tile, mask=mask, other=0.0)
        g_tile = g_ptr + rows * R + offs_r[None, :]
        g = tl.load(g_tile, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if DROPOUT:
            key1, key2 = row_keys(seed_ptr, offs_m, DROPOUT)
            src = tl.where(keep_mask(key1, key2, offs_c, threshold), src, 0.0)
        if PRECISION == "pair":
            rest = tl.load(g_tile + g_half, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
            acc = long_pair_dot(tl.trans(src), g, rest, acc)
        else:
            acc = long_dot(tl.trans(src), activation(g, ACT), acc, PRECISION)
        if BY_ONES:
            kind: tl.constexpr = "fp16" if src.dtype == tl.float16 else "bf16"
            src_sum += dot(tl.trans(src), tl.full((BLOCK_M, 16), 1.0, src.dtype), tl.zeros_like(src_sum), kind)
        elif src_sum_ptr is not None:
            summed = src.to(tl.float32)
            if other_ptr is not None:
                other = tl.load(other_ptr + rows * stride_otherm + offs_c[None, :], mask=mask, other=0.0)
                summed *= other.to(tl.float32)
            src_sum += summed
    grad_tile = grad_ptr + at_split + offs_c.to(tl.int64)[:, None] * stride_gradc
    grad_tile += offs_r.to(tl.int64)[None, :] * stride_gradr
    tl.store(grad_tile, acc * grad_factor, mask=mask_c[:, None] & mask_r[None, :])
    if src_sum_ptr is not None:
        if tl.program_id(1) == 0:
            # Every column of a product with ones is the sum.
            sums = tl.max(src_sum, axis=1) if BY_ONES else tl.sum(src_sum, axis=0)
            if other_ptr is None:
                sums *= grad_factor
            tl.store(src_sum_ptr + at_split + offs_c, sums, mask=mask_c)


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
    ROOT: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum partial [splits, size] over the splits, first to last, and cut the sums into up to four outputs.

    ROOT takes the square roots of the sums. AT_ONCE loads are in flight at a time.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            here = partial_ptr + tl.cast(start + i, tl.int64) * size
            acc += tl.load(here + offs, mask=offs < tl.where(start + i < splits, size, 0), other=0.0)
    if ROOT:
        acc = tl.sqrt_rn(acc)
    tl.store(out0_ptr + offs, acc, mask=offs < end0)
    if out1_ptr is not None:
        tl.store(out1_ptr + offs - end0, acc, mask=(offs >= end0) & (offs < end1))
    if out2_ptr is not None:
        tl.store(out2_ptr + offs - end1, acc, mask=(offs >= end1) & (offs < end2))
    if out3_ptr is not None:
        tl.store(out3_ptr + offs - end2, acc, mask=(offs >= end2) & mask)
