"""Triton backend of low_rank: y = c * (base + s * (drop(x) A^T) B^T) + shift, with backward.

x [M, K], a [R, K], b [N, R], y [M, N]; x, y in f32, bf16 or f16 with any row stride for x and dy; a and b in one of the
same types, independently; products accumulate in f32. The dropout mask is regenerated from (seed, row, column).

forward   row pass over x (h), expand pass on y: x read once, y written once, and read where the base came first
backward  dy pass (dh, db, base_dot), x pass (dx, da), reduction; for larger ranks a row and a column pass over dy, an
          expand pass (dx), a column pass over x (da), reduction
Source of the method: Hu et al. 2021 (arXiv:2106.09685), eq. 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._both import both_passes, one_kernel
from ._column import Gradients, column_pass
from ._common import dot, long_dot, of_rank, precision, refuse_common, round_to
from ._device import Device, Source, device_of, launch, on_device, sources
from ._dropout import Dropout, dropout_args, hash_rows, keep_mask, row_keys
from ._expand import expand_pass, latent_tile
from ._latent import halves, sum_splits
from ._plan import planned
from ._row import row_pass
from ._tiles import cdiv, tile


def refuse(device: torch.device, dtype: torch.dtype, **dims: int) -> str | None:
    """Why this backend cannot run for x on `device` with `dtype` and sizes M, K, N, R; None when it can."""
    return refuse_common(device, dtype, **dims)


@planned
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
    plain = dropout_args(0.0, None)
    with on_device(x):
        if base is None and column_scale is None and shift is None and one_kernel(x, y, a.shape[0]):
            return both_passes(x, a, b.T, None, y, product, drop, True, (drop.inv_keep, scale))
        h = row_pass(x, halves(a, x, product), drop.inv_keep, drop, product, may_split=True)
        return expand_pass(h, b.T, base, y, scale, plain, product, scale=column_scale, shift=shift)[0]


@planned
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
    shapes = ([(r, k)] if need_a else []) + ([(n, r)] if need_b else [])
    with on_device(x):
        grads = Gradients(x, [k, n], shapes, product, r, into=[] if base_dot is None else [base_dot])
        slots = list(grads.partials)
        da_slot = slots.pop(0) if need_a else None
        db_slot = slots.pop(0) if need_b else None
        dot_slot = slots.pop(0) if base_dot is not None else None
        dh: Tensor | None = None
        if need_dh and db_slot is not None and 1 < r <= _ONE_DY_PASS and dy.element_size() == 2:
            dh = _dy_pass(dy, b, h, db_slot, grads, scale, product, base, dot_slot)
        elif db_slot is not None:
            column_pass(
                dy, halves(h, dy, product), grads, plain, product,
                grad=db_slot, grad_strides=(1, r), grad_factor=scale, src_sum=dot_slot, other=base,
            )  # fmt: skip
        if need_dh and dh is None:
            dh = row_pass(dy, halves(b, dy, product).mT, scale, plain, product, may_split=True)
        if dh is not None:
            drop = hash_rows(x, dropout_args(p, seed))
            if first and dx is not None and da_slot is not None and r <= _ONE_X_PASS:
                _x_pass(x, a, dh, dx, da_slot, grads, drop, product)
            else:
                if dx is not None:
                    g = expand_pass(dh, a, None if first else dx, dx, 1.0, drop, product)[1]
                else:
                    g = halves(sum_splits(dh), x, product)
                if da_slot is not None:
                    column_pass(
                        x, g, grads, drop, product, grad=da_slot, grad_strides=(k, 1), grad_factor=drop.inv_keep
                    )
        sums = grads.finish()
    return sums.pop(0) if need_a else None, sums.pop(0) if need_b else None


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


#: Largest rank that `dy_kernel` takes: it writes 8 R bytes for the latent's gradient per row and block of columns.
#: For rank 1, whose loads are odd, the compiler's code spills.
_ONE_DY_PASS = 32


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
        PRECISION=of_rank(precision, r), BLOCK_M=t.block_m, BLOCK_N=t.block_c, BLOCK_R=t.block_r,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    return partial


@triton.jit(do_not_specialize=["M", "dh_splits", "rows_per_split", "stride_split", "threshold"])
def x_kernel(
    x_ptr,
    a_ptr,
    dh_ptr,
    dx_ptr,
    da_ptr,
    seed_ptr,
    M,
    K,
    R,
    stride_xm,
    dh_splits,
    stride_split,
    rows_per_split,
    inv_keep,
    threshold,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What the latent's gradient gives on both sides of the dropout, whose mask is made once.

    dx[m, k] = drop(dh a)[m, k]; da[split of m, r, k] = sum_m dh[m, r] drop(x)[m, k]. SPLIT: dh is the sum of dh_splits.
    EVEN: K is a multiple of BLOCK_K.
    """
    pid_k = tl.program_id(0)
    split = tl.program_id(1)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_k = offs_k < K
    mask_r = offs_r < R
    weight_tile = offs_r.to(tl.int64)[:, None] * K + offs_k[None, :]
    a = tl.load(a_ptr + weight_tile, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    row_start = split * rows_per_split
    row_end = min(row_start + rows_per_split, M)
    for m in tl.range(row_start, row_end, BLOCK_M, num_stages=STAGES):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < row_end
        # Rows beyond the end, where dh is 0, read the last one: without a mask a load is a plain copy.
        rows = tl.minimum(offs_m, row_end - 1).to(tl.int64)[:, None]
        x_tile = x_ptr + rows * stride_xm + offs_k[None, :]
        x = tl.load(x_tile) if EVEN else tl.load(x_tile, mask=mask_k[None, :], other=0.0)
        dh = latent_tile(dh_ptr, None, offs_m, offs_r, row_end, M, R, dh_splits, SPLIT) * inv_keep
        dx = round_to(dot(dh, a, tl.zeros((BLOCK_M, BLOCK_K), tl.float32), PRECISION), x.dtype)
        if DROPOUT:
            key1, key2 = row_keys(seed_ptr, offs_m, DROPOUT)
            keep = keep_mask(key1, key2, offs_k, threshold)
            x, dx = tl.split(tl.where(keep[:, :, None], tl.join(x, dx), 0.0))
        mask = mask_m[:, None] if EVEN else mask_m[:, None] & mask_k[None, :]
        tl.store(dx_ptr + rows * K + offs_k[None, :], dx, mask=mask)
        acc = long_dot(tl.trans(x), dh, acc, PRECISION)
    da_tile = da_ptr + split.to(tl.int64) * stride_split + offs_r.to(tl.int64)[None, :] * K + offs_k[:, None]
    tl.store(da_tile, acc, mask=mask_k[:, None] & mask_r[None, :])


#: Largest rank that `x_kernel` takes: for larger ones the gradient does not fit the registers beside dx.
_ONE_X_PASS = 32
#: Elements that its programs may read between them to sum the splits of dh; above, a launch costs less.
_SUMMED_IN_PLACE = 1 << 22


def _x_pass(
    x: Tensor, a: Tensor, dh: Tensor, dx: Tensor, da: Tensor, grads: Gradients, drop: Dropout, precision: str
) -> None:
    (m, k), r = x.shape, a.shape[0]
    t = tile("x", precision, r, device_of(x).arch)
    blocks_k = cdiv(k, t.block_c)
    if blocks_k * dh.numel() > _SUMMED_IN_PLACE:
        dh = sum_splits(dh)[None]
    launch(
        x_kernel, (blocks_k, grads.splits),
        x, a, dh, dx, da, drop.seed, m, k, r, x.stride(0), dh.shape[0], grads.size, grads.rows_per_split,
        drop.inv_keep, drop.threshold,
        DROPOUT=drop.mode, PRECISION=of_rank(precision, r), SPLIT=dh.shape[0] > 1, EVEN=k % t.block_c == 0,
        BLOCK_M=t.block_m, BLOCK_K=t.block_c, BLOCK_R=t.block_r, STAGES=t.num_stages,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip


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
