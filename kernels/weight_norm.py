"""Triton backend of weight_norm: norms of the rows or columns of wide + s * up down, and what their gradients need.

wide [P, Q] in f32, bf16 or f16 with any row stride; up [P, R] and down [R, Q] in f32; sums in f32.

forward   one pass over wide, whose tiles get s * up down added in registers; squares are summed over splits in order
backward  row pass and column pass over wide
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._column import Gradients, column_pass
from ._common import dot, load_rows, precision, refuse_common
from ._device import Device, Source, device_of, launch, on_device, sources
from ._dropout import dropout_args
from ._latent import reduce_pass
from ._plan import planned
from ._row import row_pass
from ._tiles import cdiv, tile


def refuse(device: torch.device, dtype: torch.dtype, **dims: int) -> str | None:
    """Why this backend cannot run for a weight on `device` with `dtype` and sizes N, K, R; None when it can."""
    return refuse_common(device, dtype, **dims)


@planned
def forward(wide: Tensor, up: Tensor, down: Tensor, scale: float, by_row: bool) -> Tensor:
    """Norms of the rows (by_row), or else of the columns, of wide + scale * up down -> [P] or [Q] f32."""
    (p, q), r = wide.shape, up.shape[1]
    product = precision(wide.dtype, up.dtype)
    # An update may undo most of the weight.
    product = "split3" if product == "split" else product
    device = device_of(wide)
    t = tile("weight_norm/expand", product, r, device.arch)
    blocks = (cdiv(p, t.block_m), cdiv(q, t.block_c))
    kept, summed = blocks if by_row else blocks[::-1]
    splits = max(1, min(cdiv(4 * device.processors, kept), summed // 2))
    per_split = cdiv(summed, splits)
    splits = cdiv(summed, per_split)
    size = p if by_row else q
    with on_device(wide):
        partial = torch.empty((splits, size), dtype=torch.float32, device=wide.device)
        launch(
            norm_kernel, (kept, splits),
            wide, up, down, partial, p, q, r, wide.stride(0), size, per_split, float(scale),
            BY_ROW=by_row, PRECISION=product, BLOCK_P=t.block_m, BLOCK_Q=t.block_c, BLOCK_R=t.block_r,
            ONE_BLOCK=r <= t.block_r, STAGES=t.num_stages, num_warps=t.num_warps, num_stages=t.num_stages,
        )  # fmt: skip
        norms = torch.empty(size, dtype=torch.float32, device=wide.device)
        reduce_pass(partial, [norms], root=True)
    return norms


@planned
def backward(wide: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """wide down^T [P, R] and up^T wide [R, Q], f32."""
    q, r = wide.shape[1], up.shape[1]
    product, plain = precision(wide.dtype, up.dtype), dropout_args(0.0, None)
    with on_device(wide):
        left = row_pass(wide, down, 1.0, plain, product, op="weight_norm")[0]
        grads = Gradients(wide, [q], [(r, q)], product, r)
        column_pass(wide, up, grads, plain, product, grad=grads.partials[0], grad_strides=(q, 1))
        (right,) = grads.finish()
    return left, right


@triton.jit
def _tile_offsets(offs, block, BY_ROW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Rows and columns of a tile: one of them is `offs`, the other the block-th block."""
    if BY_ROW:
        offs_p = offs
        offs_q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    else:
        offs_p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        offs_q = offs
    return offs_p, offs_q


@triton.jit(do_not_specialize=["blocks_per_split"])
def norm_kernel(
    wide_ptr,
    up_ptr,
    down_ptr,
    out_ptr,
    P,
    Q,
    R,
    stride_widep,
    size,
    blocks_per_split,
    scale,
    BY_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[split, i] = sum of (wide + scale * up down)^2 over one split of the other axis; `size` is the length of i."""
    kept = tl.program_id(0)
    split = tl.program_id(1)
    start = split * blocks_per_split
    if BY_ROW:
        end = min(start + blocks_per_split, tl.cdiv(Q, BLOCK_Q))
        sums = tl.zeros((BLOCK_P,), tl.float32)
        offs = kept * BLOCK_P + tl.arange(0, BLOCK_P)
    else:
        end = min(start + blocks_per_split, tl.cdiv(P, BLOCK_P))
        sums = tl.zeros((BLOCK_Q,), tl.float32)
        offs = kept * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_r = tl.arange(0, BLOCK_R)
    if ONE_BLOCK:  # what the blocks of the other axis share
        if BY_ROW:
            shared = load_rows(up_ptr, R, offs, offs < P, offs_r, R)
        else:
            shared = load_rows(down_ptr, Q, offs_r, offs_r < R, offs, Q)
    for block in tl.range(start, end, num_stages=STAGES):
        offs_p, offs_q = _tile_offsets(offs, block, BY_ROW, BLOCK_P, BLOCK_Q)
        mask = (offs_p < P)[:, None] & (offs_q < Q)[None, :]
        wide = tl.load(wide_ptr + offs_p.to(tl.int64)[:, None] * stride_widep + offs_q[None, :], mask=mask, other=0.0)
        acc = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
        if ONE_BLOCK and BY_ROW:
            acc = dot(shared, load_rows(down_ptr, Q, offs_r, offs_r < R, offs_q, Q), acc, PRECISION)
        elif ONE_BLOCK:
            acc = dot(load_rows(up_ptr, R, offs_p, offs_p < P, offs_r, R), shared, acc, PRECISION)
        else:
            for r in range(0, R, BLOCK_R):
                up = load_rows(up_ptr, R, offs_p, offs_p < P, r + offs_r, R)
                down = load_rows(down_ptr, Q, r + offs_r, r + offs_r < R, offs_q, Q)
                acc = dot(up, down, acc, PRECISION)
        total = wide.to(tl.float32) + acc * scale
        sums += tl.sum(total * total, axis=1 if BY_ROW else 0)
    tl.store(out_ptr + split.to(tl.int64) * size + offs, sums, mask=offs < size)


def aot_sources(device: Device) -> Iterator[Source]:
    """Kernel variants to compile ahead of time: dtypes, ranks, both layouts, small and odd sizes."""
    return sources(device, _aot_calls())


def _aot_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    cases = [
        (4096, 4096, 16, torch.bfloat16),
        (4096, 4096, 128, torch.bfloat16),
        (4096, 4096, 16, torch.float32),
        (768, 768, 8, torch.float16),
        (29, 33, 1, torch.bfloat16),
    ]
    for p, q, r, dtype in cases:
        for by_row in (True, False):
            name = f"weight_norm {p}x{q} r{r} {dtype} {'rows' if by_row else 'columns'}".replace("torch.", "")
            yield name, functools.partial(_aot_call, p, q, r, dtype, by_row)


def _aot_call(p: int, q: int, r: int, dtype: torch.dtype, by_row: bool) -> None:
    wide = torch.empty(p, q, dtype=dtype, device="meta")
    up, down = torch.empty(p, r, device="meta"), torch.empty(r, q, device="meta")
    forward(wide, up, down, 0.5, by_row)
    backward(wide, up, down)
