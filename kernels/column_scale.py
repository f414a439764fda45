"""Triton backend of column_scale: y = x * s by columns, with backward.

x, dy, y, dx [M, C] in f32, bf16 or f16, x and dy with any row stride; s [C] in one of the same types, independently.
Bound by memory: forward reads x and writes y, backward reads x and dy once and writes dx on the way to ds, whose
partial sums over splits of the rows are added in order.
Source of the method: Liu et al. 2022 (arXiv:2205.05638), section 3.3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import INTERPRETED, refuse_common, round_to
from ._device import Device, Source, device_of, launch, on_device, sources
from ._latent import sum_splits
from ._plan import planned
from ._tiles import cdiv, next_power_of_2

# 16 bytes a lane of bf16 in rows of 512 columns; 8 KiB a tile, of which a multiprocessor holds several.
_BLOCK_C = 64 if INTERPRETED else 512
_BLOCK_M = 8
_MOST_SPLITS = 256


def refuse(device: torch.device, dtype: torch.dtype, **dims: int) -> str | None:
    """Why this backend cannot run for x on `device` with `dtype` and sizes M, C; None when it can."""
    return refuse_common(device, dtype, **dims)


@planned
def forward(x: Tensor, s: Tensor, y: Tensor) -> None:
    """y [M, C] = x * s; y may be x itself."""
    (m, c), block_c = x.shape, _block_c(x)
    with on_device(x):
        launch(
            scale_kernel, (cdiv(m, _BLOCK_M) * cdiv(c, block_c),),
            x, s, y, m, c, x.stride(0), y.stride(0), BLOCK_M=_BLOCK_M, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip


@planned
def backward(dy: Tensor, x: Tensor | None, s: Tensor, need_dx: bool) -> tuple[Tensor | None, Tensor | None]:
    """(dx = dy * s [M, C] in dy's dtype, ds = sum over rows of dy * x [C] f32); None for what is not wanted.

    x is None where ds is not wanted.
    """
    m, c = dy.shape
    dx = torch.empty((m, c), dtype=dy.dtype, device=dy.device) if need_dx else None
    if x is None:
        if dx is not None:
            forward(dy, s, dx)
        return dx, None
    block_c = _block_c(dy)
    blocks_m, blocks_c = cdiv(m, _BLOCK_M), cdiv(c, block_c)
    # Four programs a multiprocessor, while the partial sums stay a sixteenth of what is read.
    splits = max(1, min(4 * device_of(dy).processors // blocks_c, blocks_m // 8, _MOST_SPLITS))
    per_split = cdiv(blocks_m, splits)
    splits = cdiv(blocks_m, per_split)
    partial = torch.empty((splits, c), dtype=torch.float32, device=dy.device)
    with on_device(dy):
        launch(
            backward_kernel, (splits, blocks_c),
            dy, x, s, dx, partial, m, c, dy.stride(0), x.stride(0), per_split * _BLOCK_M,
            BLOCK_M=_BLOCK_M, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
        return dx, sum_splits(partial)


def _block_c(x: Tensor) -> int:
    return min(max(16, next_power_of_2(x.shape[1])), _BLOCK_C)


@triton.jit(do_not_specialize=["M"])
def scale_kernel(
    x_ptr, s_ptr, y_ptr, M, C, stride_xm, stride_ym, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One tile of y = x * s; neighbours in the grid are neighbours in a row."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_m = (pid // blocks_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    s = tl.load(s_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_c[None, :], mask=mask, other=0.0)
    y = round_to(x.to(tl.float32) * s[None, :], y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_c[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def backward_kernel(
    dy_ptr,
    x_ptr,
    s_ptr,
    dx_ptr,
    partial_ptr,
    M,
    C,
    stride_dym,
    stride_xm,
    rows_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial[split, c] = sum of dy * x over the split's rows, and dx = dy * s where dx is wanted."""
    split = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    s = tl.load(s_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    row_start = split * rows_per_split
    row_end = min(row_start + rows_per_split, M)
    for m in range(row_start, row_end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        rows = offs_m.to(tl.int64)[:, None]
        mask = (offs_m < row_end)[:, None] & mask_c[None, :]
        dy = tl.load(dy_ptr + rows * stride_dym + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows * stride_xm + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += dy * x
        if dx_ptr is not None:
            dx = round_to(dy * s[None, :], dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + rows * C + offs_c[None, :], dx, mask=mask)
    tl.store(partial_ptr + split.to(tl.int64) * C + offs_c, tl.sum(acc, axis=0), mask=mask_c)


def aot_sources(device: Device) -> Iterator[Source]:
    """Kernel variants to compile ahead of time: dtypes, with and without dx, small and odd sizes."""
    return sources(device, _aot_calls())


def _aot_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    cases = [
        (8192, 4096, bf16, f32, True),
        (8192, 4096, bf16, bf16, False),
        (8192, 14336, f16, f32, True),
        (1024, 768, f32, f32, True),
        (1, 4096, bf16, f32, True),
        (7, 33, bf16, f32, False),
    ]
    for m, c, dtype, scale, need_dx in cases:
        name = f"column_scale {m}x{c} {dtype} {scale} {'dx' if need_dx else 'no dx'}".replace("torch.", "")
        yield name, functools.partial(_aot_call, m, c, dtype, scale, need_dx)


def _aot_call(m: int, c: int, dtype: torch.dtype, scale: torch.dtype, need_dx: bool) -> None:
    x, y, dy = (torch.empty((m, c), dtype=dtype, device="meta") for _ in range(3))
    s = torch.empty(c, dtype=scale, device="meta")
    forward(x, s, y)
    backward(dy, x, s, need_dx)
