"""Triton backend of low_rank: y = c * (base + s * (drop(x) A^T) B^T) + shift, with backward.

x [M, K], a [R, K], b [N, R], y [M, N]; x, y in f32, bf16 or f16 with any row stride for x and dy; a and b in one of the
same types, independently; products accumulate in f32. The dropout mask is regenerated from (seed, row, column).

forward   row pass over x (h), expand pass on y: x read once, y written once, and read where the base came first
backward  dy pass (dh, db, base_dot; for larger ranks a row and a column pass), expand pass (dx), column pass over x
          (da), reduction
Source of the method: Hu et al. 2021 (arXiv:2106.09685), eq. 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import dot, dropout_args, long_dot, precision, refuse_common
from ._device import Device, Source, device_of, launch, on_device, sources
from ._launch import Gradients, column_pass, expand_pass, hash_rows, row_pass, sum_splits
from ._tiles import cdiv, tile


def refuse(device: torch.device, dtype: torch.dtype, **dims: int) -> str | None:
    """Why this backend cannot run for x on `device` with `dtype` and sizes M, K, N, R; None when it can."""
    return refuse_common(device, dtype, **dims)


def forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    y: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    base: Tensor | None = None,
    column_scale: Tensor | None = None,
    shift: Tensor | None = None,
    first: bool = False,
) -> Tensor:
    """y [M, N] = c * (base + scale * h b^T) + shift -> h = drop(x) a^T [M, R] f32 (with 1 / (1 - p), without scale).

    base None: in place on y, or with `first` no base at all. column_scale c and shift [N] f32, 1 and 0 if None.
    """
    drop = dropout_args(p, seed)
    product = precision(x.dtype, a.dtype)
    base = y if base is None and not first else base
    with on_device(x):
        h = row_pass(x, a, drop.inv_keep, drop, product, may_split=True)
        plain = dropout_args(0.0, None)
        return expand_pass(h, b.T, base, y, scale, plain, product, scale=column_scale, shift=shift)


def backward(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    h: Tensor,
    dx: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    need_a: bool,
    need_b: bool,
    base: Tensor | None = None,
    base_dot: Tensor | None = None,
    first: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] += drop(dh a) in place -> da = dh^T drop(x) [R, K] f32, db = scale dy^T h [N, R] f32.

    dh = scale dy b; with `first`, dx = drop(dh a). What is not needed is neither computed nor returned (None).
    With base [M, N], and need_b, base_dot [N] f32 becomes sum_m dy * base.
    """
    plain = dropout_args(0.0, None)
    product = precision(x.dtype, a.dtype)
    (n, r), k = b.shape, x.shape[1]
    need_dh = need_a or dx is not None
    shapes = ([(r, k)] if need_a else []) + ([(n, r)] if need_b else []) + ([(n,)] if base is not None else [])
    with on_device(x):
        grads = Gradients(x, [k, n], shapes, product, r)
        slots = list(grads.partials)
        da_slot = slots.pop(0) if need_a else None
        db_slot = slots.pop(0) if need_b else None
        dot_slot = slots.pop(0) if base is not None else None
        dh = None
        if need_dh and db_slot is not None and _one_dy_pass(dy, r):
            dh = _dy_pass(dy, b, h, db_slot, grads, scale, product, base, dot_slot)
        elif db_slot is not None:
            column_pass(
                dy, h, grads, plain, product,
                grad=db_slot, grad_strides=(1, r), grad_factor=scale, src_sum=dot_slot, other=base,
            )  # fmt: skip
        if need_dh and dh is None:
            dh = sum_splits(row_pass(dy, b.T, scale, plain, product, may_split=True))
        if dh is not None:
            drop = hash_rows(x, dropout_args(p, seed))
            if dx is not None:
                expand_pass(dh[None], a, None if first else dx, dx, 1.0, drop, product)
            if da_slot is not None:
                column_pass(x, dh, grads, drop, product, grad=da_slot, grad_strides=(k, 1), grad_factor=drop.inv_keep)
        sums = grads.finish()
    da, db = (sums.pop(0) if need_a else None), (sums.pop(0) if need_b else None)
    if base_dot is not None:
        base_dot.copy_(sums[0])
    return da, db


@triton.jit(do_not_specialize=["M", "rows_per_split", "stride_split"])
def dy_kernel(
    dy_ptr,
    b_ptr,
    h_ptr,
    dh_ptr,
    db_ptr,
    base_ptr,
    base_dot_ptr,
    M,
    N,
    R,
    stride_dym,
    stride_basem,
    stride_split,
    rows_per_split,
    scale,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One reading of dy for both gradients of the latent.

    dh[chunk of n, m, r] = scale * sum_n dy[m, n] b[n, r] over the chunk; db[split of m, n, r] = scale * sum_m dy h;
    base_dot[split of m, n] = sum_m dy base.
    """
    pid_n = tl.program_id(0)
    split = tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    mask_r = offs_r < R
    weight_tile = offs_n.to(tl.int64)[:, None] * R + offs_r[None, :]
    weight_mask = mask_n[:, None] & mask_r[None, :]
    b = tl.load(b_ptr + weight_tile, mask=weight_mask, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    dots = tl.zeros((BLOCK_N,), tl.float32)
    row_start = split * rows_per_split
    row_end = min(row_start + rows_per_split, M)
    for m in range(row_start, row_end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        rows = offs_m.to(tl.int64)[:, None]
        mask_m = offs_m < row_end
        dy = tl.load(dy_ptr + rows * stride_dym + offs_n[None, :], mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        mask = mask_m[:, None] & mask_r[None, :]
        h = tl.load(h_ptr + rows * R + offs_r[None, :], mask=mask, other=0.0)
        dh = dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), PRECISION)
        tl.store(dh_ptr + pid_n.to(tl.int64) * M * R + rows * R + offs_r[None, :], dh * scale, mask=mask)
        acc = long_dot(tl.trans(dy), h, acc, PRECISION)
        if base_ptr is not None:
            base_tile = base_ptr + rows * stride_basem + offs_n[None, :]
            base = tl.load(base_tile, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
            dots += tl.sum(dy.to(tl.float32) * base.to(tl.float32), axis=0)
    if base_ptr is not None:
        tl.store(base_dot_ptr + split.to(tl.int64) * stride_split + offs_n, dots, mask=mask_n)
    tl.store(db_ptr + split.to(tl.int64) * stride_split + weight_tile, acc * scale, mask=weight_mask)


def _one_dy_pass(dy: Tensor, rank: int) -> bool:
    """Whether dy is larger than the cache while the partials of dh (8 R bytes per row and chunk) stay well below it."""
    return rank <= 32 and dy.element_size() == 2 and dy.numel() * 2 > device_of(dy).cache // 2


def _dy_pass(
    dy: Tensor,
    b: Tensor,
    h: Tensor,
    db: Tensor,
    grads: Gradients,
    scale: float,
    precision: str,
    base: Tensor | None,
    base_dot: Tensor | None,
) -> Tensor:
    (m, n), r = dy.shape, b.shape[1]
    t = tile("dy", precision, r, device_of(dy).arch)
    chunks = cdiv(n, t.block_c)
    partial = torch.empty((chunks, m, r), dtype=torch.float32, device=dy.device)
    launch(
        dy_kernel, (chunks, grads.splits),
        dy, b, h, partial, db, base, base_dot, m, n, r, dy.stride(0), 0 if base is None else base.stride(0),
        grads.size, grads.rows_per_split, float(scale),
        PRECISION=precision, BLOCK_M=t.block_m, BLOCK_N=t.block_c, BLOCK_R=t.block_r,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    return sum_splits(partial)


def aot_sources(device: Device) -> Iterator[Source]:
    """Kernel variants to compile ahead of time: ranks, dtypes, dropout, small and odd sizes."""
    return sources(device, _aot_calls())


def _aot_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    cases = [
        (8192, 4096, 4096, 16, bf16, bf16, 0.1),
        (8192, 4096, 4096, 64, bf16, bf16, 0.1),
        (8192, 4096, 4096, 128, bf16, bf16, 0.1),
        (8192, 4096, 4096, 16, bf16, f32, 0.1),
        (8192, 4096, 4096, 64, bf16, f32, 0.1),
        (8192, 4096, 4096, 16, f16, f32, 0.0),
        (8192, 4096, 4096, 16, f32, f32, 0.1),
        (8192, 4096, 4096, 64, f32, f32, 0.1),
        (1024, 768, 768, 8, bf16, f32, 0.1),
        (1, 4096, 4096, 16, bf16, bf16, 0.0),
        (7, 33, 29, 1, bf16, bf16, 0.1),
    ]
    scaled = [(8192, 4096, 4096, 16, bf16, f32, 0.1), (8192, 4096, 4096, 128, bf16, bf16, 0.1)]
    scaled += [(1024, 768, 768, 8, f32, f32, 0.1), (7, 33, 29, 1, bf16, f32, 0.0)]
    for case, on_columns in [*((case, False) for case in cases), *((case, True) for case in scaled)]:
        m, k, n, r, dtype, weights, p = case
        name = f"low_rank {m}x{k}-{n} r{r} {dtype} {weights} p{p}".replace("torch.", "")
        yield name + " scaled" * on_columns, functools.partial(_aot_call, *case, on_columns)


def _aot_call(
    m: int, k: int, n: int, r: int, dtype: torch.dtype, weights: torch.dtype, p: float, scaled: bool = False
) -> None:
    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, dy, a, b = meta(m, k), meta(m, n), meta(r, k, dtype=weights), meta(n, r, dtype=weights)
    seed = meta(1, dtype=torch.int64) if p else None
    base, columns = (meta(m, n), meta(n, dtype=torch.float32)) if scaled else (None, None)
    h = forward(x, a, b, meta(m, n), 0.5, p, seed, base, columns, columns)
    backward(dy, x, a, b, h, meta(m, k), 0.5, p, seed, True, True, base, columns)
