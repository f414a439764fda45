"""A row pass and an expand pass of the same rows in one kernel; the latent stays in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import activation, activation_grad, dot
from ._device import device_of, launch
from ._dropout import Dropout, row_keys
from ._expand import base_tile, store_expanded
from ._row import accumulate_rows
from ._tiles import MAX_BLOCK_R, cdiv, row_block_m, tile

#: Columns of x and out together up to which a program takes whole rows: more take longer than a second launch.
_SHORT_ROWS = 2048


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


def one_kernel(x: Tensor, out: Tensor, rank: int) -> bool:
    """Whether `both_passes` is faster than a launch for each: x and out stay in the cache and their rows are short.

    Not for f32 of large rank, whose sums over it would be chains of as many roundings.
    """
    small = (x.numel() + out.numel()) * x.element_size() <= device_of(x).cache
    most = MAX_BLOCK_R // 2 if x.dtype == torch.float32 else MAX_BLOCK_R
    return small and rank <= most and x.shape[1] + out.shape[1] <= _SHORT_ROWS


def both_passes(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    base: Tensor | None,
    out: Tensor,
    precision: str,
    drop: Dropout,
    inward: bool,
    factors: tuple[float, float],
    act: str = "",
    w_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    pre: Tensor | None = None,
) -> Tensor:
    """h = factors[0] * x w^T (+ w_bias) (* act'(pre)), out = base + factors[1] * (act(h) v + v_bias) -> h [M, R] f32.

    Dropout is that of x (`inward`) or of what is added to base, its 1 / (1 - p) in the factors. w [R, K] and v [R, N]
    by any strides. With pre it is h that is multiplied by v.
    """
    (m, k), (r, n) = x.shape, v.shape
    device = device_of(x)
    t = tile("both", precision, r, device.arch)
    block_m = row_block_m(m, t, device.processors)
    h = torch.empty((m, r), dtype=torch.float32, device=x.device)
    launch(
        both_kernel, (cdiv(m, block_m),),
        x, w, w_bias, v, v_bias, pre, base, out, h, drop.seed,
        m, k, n, r, x.stride(0), *w.stride(), *v.stride(), 0 if base is None else base.stride(0),
        float(factors[0]), float(factors[1]), drop.threshold,
        ACT=act, DROPOUT=drop.mode, INWARD=inward, PRECISION=precision,
        BLOCK_M=block_m, BLOCK_K=t.block_c, BLOCK_N=t.block_c, BLOCK_R=t.block_r, STAGES=t.num_stages,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    return h
