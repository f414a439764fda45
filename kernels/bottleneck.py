"""Triton backend of bottleneck: y = residual + drop(scale * (act(x D^T + b_d) U^T + b_u)), with backward.

x [M, K], down D [R, K], down_bias [R], up U [N, R], up_bias [N], residual and y [M, N]; x and y in f32, bf16 or f16,
the weights in one of the same types, independently; products accumulate in f32. The dropout mask over y is regenerated.

forward   one kernel that keeps a tile's latent in registers, or a row and an expand pass: x and residual read once
backward  row pass over dy (dpre), column pass over dy (d_up), expand pass (dx), column pass over x (d_down), reduction
Source of the method: Houlsby et al. 2019 (arXiv:1902.00751), section 2.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    Dropout,
    activation,
    dot,
    dropout_args,
    precision,
    refuse_common,
    row_keys,
)
from ._device import Device, Source, device_of, launch, on_device, sources
from ._launch import Gradients, column_pass, expand_pass, hash_rows, row_pass
from ._passes import accumulate_rows, base_tile, store_expanded
from ._tiles import MAX_BLOCK_R, cdiv, row_block_m, tile


def refuse(device: torch.device, dtype: torch.dtype, **dims: int) -> str | None:
    """Why this backend cannot run for x on `device` with `dtype` and sizes M, K, N, R; None when it can."""
    return refuse_common(device, dtype, **dims)


def forward(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y [M, N] in x's dtype, pre = x D^T + b_d [M, R] f32); act is relu, gelu (exact), silu or tanh."""
    plain = dropout_args(0.0, None)
    product = precision(x.dtype, down.dtype)
    y = torch.empty((x.shape[0], up.shape[0]), dtype=x.dtype, device=x.device)
    with on_device(x):
        drop = hash_rows(y, dropout_args(p, seed))
        if _one_kernel(x, up.shape[0], up.shape[1]):
            return y, _fused_forward(x, down, down_bias, up, up_bias, residual, y, act, scale, drop)
        pre = row_pass(x, down, 1.0, plain, product, bias=down_bias, may_split=True)
        pre = expand_pass(pre, up.T, residual, y, scale, drop, product, h_bias=down_bias, bias=up_bias, act=act)
    return y, pre


def backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    down: Tensor,
    up: Tensor,
    act: str,
    scale: float,
    p: float,
    seed: Tensor | None,
    add_dy: bool,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """(dx [M, K] in x's dtype or None, d_down [R, K], d_down_bias [R], d_up [N, R], d_up_bias [N], all f32).

    add_dy adds dy to dx: the residual was x itself, N == K.
    """
    plain = dropout_args(0.0, None)
    product = precision(x.dtype, down.dtype)
    (m, k), (n, r) = x.shape, up.shape
    dx = torch.empty((m, k), dtype=x.dtype, device=x.device) if need_dx else None
    with on_device(x):
        drop = hash_rows(dy, dropout_args(p, seed))
        factor = scale * drop.inv_keep
        dpre = row_pass(dy, up.T, factor, drop, product, pre=pre, act=act)[0]
        grads = Gradients(x, [k, n], [(r, k), (r,), (n, r), (n,)], product, r, op="bottleneck")
        d_down, d_down_bias, d_up, d_up_bias = grads.partials
        column_pass(
            dy, pre, grads, drop, product, act=act,
            grad=d_up, grad_strides=(1, r), grad_factor=factor, src_sum=d_up_bias,
        )  # fmt: skip
        if dx is not None:
            expand_pass(dpre[None], down, dy if add_dy else None, dx, 1.0, plain, product)
        column_pass(x, dpre, grads, plain, product, grad=d_down, grad_strides=(k, 1), g_sum=d_down_bias)
        sums = grads.finish()
    return dx, sums[0], sums[1], sums[2], sums[3]


@triton.jit(do_not_specialize=["M", "threshold"])
def fused_kernel(
    x_ptr,
    down_ptr,
    down_bias_ptr,
    up_ptr,
    up_bias_ptr,
    residual_ptr,
    y_ptr,
    pre_ptr,
    seed_ptr,
    M,
    K,
    N,
    R,
    stride_xm,
    stride_residualm,
    factor,
    threshold,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The whole forward of BLOCK_M rows; R <= BLOCK_R, the latent never leaves the registers (pre is only written)."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    pre = accumulate_rows(
        x_ptr, down_ptr, seed_ptr, offs_m, offs_r, M, K, R, stride_xm, K, 1, 0, tl.cdiv(K, BLOCK_K), threshold,
        False, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    if down_bias_ptr is not None:
        pre += tl.load(down_bias_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    pre_tile = pre_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    tl.store(pre_tile, pre, mask=(offs_m < M)[:, None] & mask_r[None, :])
    z = activation(pre, ACT)
    key1, key2 = offs_m, offs_m
    if DROPOUT:
        key1, key2 = row_keys(seed_ptr, offs_m, DROPOUT)
    offs_n = tl.arange(0, BLOCK_N)
    base = base_tile(residual_ptr, stride_residualm, offs_m, offs_n, M, N, BLOCK_M, BLOCK_N)
    for block in range(tl.cdiv(N, BLOCK_N)):
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        # The next tile of the residual is in flight during this one's dot: only dot operands are pipelined for us.
        next_base = base_tile(residual_ptr, stride_residualm, offs_m, offs_n + BLOCK_N, M, N, BLOCK_M, BLOCK_N)
        up_tile = up_ptr + offs_n.to(tl.int64)[None, :] * R + offs_r[:, None]
        up = tl.load(up_tile, mask=(offs_n < N)[None, :] & mask_r[:, None], other=0.0)
        acc = dot(z, up, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        store_expanded(acc, base, up_bias_ptr, y_ptr, key1, key2, offs_m, offs_n, M, N, factor, threshold, DROPOUT)
        base = next_base


def _one_kernel(x: Tensor, columns: int, rank: int) -> bool:
    """Whether x and y stay in the cache: launches then cost more than the fewer programs of one kernel."""
    size = x.shape[0] * (x.shape[1] + columns) * x.element_size()
    return rank <= MAX_BLOCK_R and size <= device_of(x).cache


def _fused_forward(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    act: str,
    scale: float,
    drop: Dropout,
) -> Tensor:
    (m, k), (n, r) = x.shape, up.shape
    product = precision(x.dtype, down.dtype)
    device = device_of(x)
    t = tile("fused", product, r, device.arch)
    block_m = row_block_m(m, t, device.processors)
    pre = torch.empty((m, r), dtype=torch.float32, device=x.device)
    launch(
        fused_kernel, (cdiv(m, block_m),),
        x, down, down_bias, up, up_bias, residual, y, pre, drop.seed,
        m, k, n, r, x.stride(0), 0 if residual is None else residual.stride(0),
        float(scale) * drop.inv_keep, drop.threshold,
        ACT=act, DROPOUT=drop.mode, PRECISION=product,
        BLOCK_M=block_m, BLOCK_K=t.block_c, BLOCK_N=t.block_c, BLOCK_R=t.block_r,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    return pre


def aot_sources(device: Device) -> Iterator[Source]:
    """Kernel variants to compile ahead of time: ranks, dtypes, activations, both forwards, small and odd sizes."""
    return sources(device, _aot_calls())


def _aot_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    f32, bf16 = torch.float32, torch.bfloat16
    cases = [
        (8192, 4096, 64, bf16, bf16, "gelu", 0.1),
        (8192, 4096, 64, bf16, f32, "silu", 0.1),
        (8192, 768, 64, bf16, bf16, "gelu", 0.1),
        (8192, 768, 128, bf16, f32, "gelu", 0.0),
        (2048, 768, 24, bf16, f32, "gelu", 0.1),
        (1024, 768, 48, f32, f32, "tanh", 0.1),
        (1024, 768, 128, f32, f32, "relu", 0.0),
        (7, 33, 1, bf16, bf16, "relu", 0.1),
    ]
    for m, k, r, dtype, weights, act, p in cases:
        name = f"bottleneck {m}x{k}-{k} r{r} {dtype} {weights} {act} p{p}".replace("torch.", "")
        yield name, functools.partial(_aot_call, m, k, r, dtype, weights, act, p)


def _aot_call(m: int, k: int, r: int, dtype: torch.dtype, weights: torch.dtype, act: str, p: float) -> None:
    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, down, up = meta(m, k), meta(r, k, dtype=weights), meta(k, r, dtype=weights)
    down_bias, up_bias = meta(r, dtype=weights), meta(k, dtype=weights)
    seed = meta(1, dtype=torch.int64) if p else None
    _, pre = forward(x, down, down_bias, up, up_bias, x, act, 0.5, p, seed)
    backward(meta(m, k), x, pre, down, up, act, 0.5, p, seed, True, True)
