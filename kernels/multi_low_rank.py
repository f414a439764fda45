"""Triton backend of multi_low_rank: y += s_i * (drop(x) A_i^T) B_i^T, i chosen row by row, with backward.

One kernel sorts the rows by adapter. A program of the others takes a block of rows of one adapter, which it finds from
the row counts, and reads A_i and B_i at the addresses that the table holds (`peftkern.ops._adapters`). Nothing is
gathered in memory, and the host never waits: as many programs start as there can be blocks at most, and the surplus
ends at once.

forward   shrink pass over x (h), expand pass on y
backward  shrink pass over dy (dh), expand pass on dx, a pass per gradient over the rows of each adapter in row splits,
          summed in order: no atomics, so always the same bits
Source of the method: Chen et al. 2023 (Punica, arXiv:2310.18547), section 4, for SGMV.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._column import row_splits
from ._common import dot, load_rows, long_dot, precision, refuse_common, round_to
from ._device import Device, Source, device_of, launch, on_device, sources
from ._dropout import Dropout, dropout_args, keep_mask, row_keys
from ._latent import sum_splits
from ._plan import planned
from ._sort import sort_rows
from ._tiles import Tile, cdiv, next_power_of_2, tile

_CELLS = 5  # columns of the table: address of A, address of B, rank, ranks before it, bits of the scale
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_LEAST_M = 16


def refuse(device: torch.device, dtype: torch.dtype, **dims: int) -> str | None:
    """Why this backend cannot run for x on `device` with `dtype` and sizes M, K, N; None when it can."""
    return refuse_common(device, dtype, **dims)


class _Call(NamedTuple):
    """What the passes of one call share; order and ends are those of `sort_rows`."""

    cells: Tensor
    order: Tensor
    ends: Tensor
    most: int
    ranks: int
    weights: torch.dtype
    aligned: bool


def forward(
    x: Tensor, cells: Tensor, index: Tensor, y: Tensor, most: int, ranks: int, dtype: int, aligned: bool, p: float,
    seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """y [M, N] += s_i h b_i^T in place -> h = drop(x) a_i^T [M, most] f32 (with dropout's 1 / (1 - p), without s_i).

    Rows without an adapter have an h of 0.
    """
    h = torch.zeros((x.shape[0], most), dtype=torch.float32, device=x.device)
    _update(x, cells, index, h, y, most, ranks, dtype, aligned, p, seed)
    return h


@planned
def _update(
    x: Tensor, cells: Tensor, index: Tensor, h: Tensor, y: Tensor, most: int, ranks: int, dtype: int, aligned: bool,
    p: float, seed: Tensor | None,
) -> None:  # fmt: skip
    with on_device(x):
        call = _Call(cells, *sort_rows(index, x.shape[0], cells.shape[0]), most, ranks, _DTYPES[dtype], aligned)
        product = precision(x.dtype, call.weights)
        _shrink(x, h, call, False, dropout_args(p, seed), product)
        _expand(h, y, call, True, dropout_args(0.0, None), product)


@planned
def backward(
    dy: Tensor, x: Tensor, cells: Tensor, index: Tensor, h: Tensor, dx: Tensor | None, most: int, ranks: int,
    dtype: int, aligned: bool, p: float, seed: Tensor | None, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx [M, K] += drop(dh a_i) in place -> all da_i = dh^T drop(x) [R_i, K], all db_i = s_i dy^T h [N, R_i], flat f32.

    dh = s_i dy b_i. What is not needed is empty.
    """
    drop, plain = dropout_args(p, seed), dropout_args(0.0, None)
    da, db = (torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(2))
    with on_device(x):
        call = _Call(cells, *sort_rows(index, x.shape[0], cells.shape[0]), most, ranks, _DTYPES[dtype], aligned)
        product = precision(x.dtype, call.weights)
        if need_b:
            db = _gradient(dy, h, call, True, plain, product)
        if need_a or dx is not None:
            dh = torch.empty((dy.shape[0], most), dtype=torch.float32, device=dy.device)
            _shrink(dy, dh, call, True, plain, product)
            if need_a:
                da = _gradient(x, dh, call, False, drop, product)
            if dx is not None:
                _expand(dh, dx, call, False, drop, product)
    return da, db


@triton.jit
def _find_block(ends_ptr, block, G, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """(adapter, first place, end of its places) of a block of sorted rows; adapter G where there is no such block.

    Adapter i has ceil(rows of i / BLOCK_M) blocks, one adapter's behind the other's.
    """
    adapters = tl.arange(0, BLOCK_G)
    ends = tl.load(ends_ptr + adapters, mask=adapters < G, other=0)
    starts = tl.load(ends_ptr + adapters - 1, mask=(adapters > 0) & (adapters < G), other=0)
    blocks = tl.where(adapters < G, (ends - starts + BLOCK_M - 1) // BLOCK_M, 0)
    upto = tl.cumsum(blocks, axis=0)
    adapter = tl.sum(((upto <= block) & (adapters < G)).to(tl.int32), axis=0)
    mine = adapters == adapter
    before = tl.sum(tl.where(mine, upto - blocks, 0), axis=0)
    start = tl.sum(tl.where(mine, starts, 0), axis=0) + (block - before) * BLOCK_M
    return adapter, start, tl.sum(tl.where(mine, ends, 0), axis=0)


@triton.jit
def _weight_offsets(offs_r, offs_c, R, C, OF_B: tl.constexpr):
    """[BLOCK_R, BLOCK_C] places of a tile in A_i [R, C] or, OF_B, of its transpose in B_i [C, R]."""
    if OF_B:
        at = offs_c.to(tl.int64)[None, :] * R + offs_r[:, None]
    else:
        at = offs_r.to(tl.int64)[:, None] * C + offs_c[None, :]
    return at


@triton.jit
def _weight_tile(
    cell_ptr,
    offs_r,
    offs_c,
    R,
    C,
    OF_B: tl.constexpr,
    ALIGNED: tl.constexpr,
    TYPE: tl.constexpr,
):
    """[BLOCK_R, BLOCK_C] tile of A_i [R, C] or, OF_B, of B_i^T from B_i [C, R]."""
    address = tl.load(cell_ptr + (1 if OF_B else 0))
    if TYPE == "bf16":
        base = address.to(tl.pointer_type(tl.bfloat16))
    elif TYPE == "fp16":
        base = address.to(tl.pointer_type(tl.float16))
    else:
        base = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    at = _weight_offsets(offs_r, offs_c, R, C, OF_B)
    return tl.load(base + at, mask=(offs_r < R)[:, None] & (offs_c < C)[None, :], other=0.0)


@triton.jit
def _scale(cell_ptr):
    return tl.load(cell_ptr + 4).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["threshold"])
def shrink_kernel(
    x_ptr,
    cells_ptr,
    order_ptr,
    ends_ptr,
    out_ptr,
    seed_ptr,
    C,
    G,
    MOST,
    stride_xm,
    inv_keep,
    threshold,
    OF_B: tl.constexpr,
    ALIGNED: tl.constexpr,
    TYPE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """out[m, r] = f * sum_c drop(x)[m, c] w_i[r, c], f32; f = s_i for B_i, else 1 / (1 - p)."""
    adapter, start, end = _find_block(ends_ptr, tl.program_id(0), G, BLOCK_M, BLOCK_G)
    if adapter < G:
        cell_ptr = cells_ptr + adapter * 5
        R = tl.load(cell_ptr + 2).to(tl.int32)
        offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        places = start + tl.arange(0, BLOCK_M)
        rows = tl.load(order_ptr + places, mask=places < end, other=0)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        if DROPOUT:
            key1, key2 = row_keys(seed_ptr, rows)
        if tl.program_id(1) * BLOCK_R < R:
            for block in range(0, tl.cdiv(C, BLOCK_C)):
                offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
                x = load_rows(x_ptr, stride_xm, rows, places < end, offs_c, C)
                w = _weight_tile(cell_ptr, offs_r, offs_c, R, C, OF_B, ALIGNED, TYPE)
                if DROPOUT:
                    x = tl.where(keep_mask(key1, key2, offs_c, threshold), x, 0.0)
                acc = long_dot(x, tl.trans(w), acc, PRECISION)
        acc *= _scale(cell_ptr) if OF_B else inv_keep
        # Zeros from R to MOST: what is saved has one width for all adapters, which bounds its loads: R, unknown to the
        # compiler, would break them into single elements.
        mask = (places < end)[:, None] & (offs_r < MOST)[None, :]
        tl.store(out_ptr + rows[:, None] * MOST + offs_r[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def expand_kernel(
    h_ptr,
    cells_ptr,
    order_ptr,
    ends_ptr,
    out_ptr,
    seed_ptr,
    C,
    G,
    MOST,
    inv_keep,
    threshold,
    OF_B: tl.constexpr,
    ALIGNED: tl.constexpr,
    TYPE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """out[m, c] += drop(f * sum_r h[m, r] w_i[r, c]), f = s_i for B_i, else 1; out is contiguous."""
    adapter, start, end = _find_block(ends_ptr, tl.program_id(0), G, BLOCK_M, BLOCK_G)
    if adapter < G:
        cell_ptr = cells_ptr + adapter * 5
        R = tl.load(cell_ptr + 2).to(tl.int32)
        offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        places = start + tl.arange(0, BLOCK_M)
        rows = tl.load(order_ptr + places, mask=places < end, other=0)
        mask = (places < end)[:, None] & (offs_c < C)[None, :]
        out_tile = out_ptr + rows[:, None] * C + offs_c[None, :]
        out = tl.load(out_tile, mask=mask, other=0.0)
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for r in range(0, R, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            h = load_rows(h_ptr, MOST, rows, places < end, offs_r, R)
            w = _weight_tile(cell_ptr, offs_r, offs_c, R, C, OF_B, ALIGNED, TYPE)
            acc = dot(h, w, acc, PRECISION)
        if OF_B:
            acc *= _scale(cell_ptr)
        if DROPOUT:
            key1, key2 = row_keys(seed_ptr, rows)
            acc = tl.where(keep_mask(key1, key2, offs_c, threshold), acc * inv_keep, 0.0)
        acc += out.to(tl.float32)
        tl.store(out_tile, round_to(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size", "splits", "threshold"])
def gradient_kernel(
    src_ptr,
    g_ptr,
    cells_ptr,
    order_ptr,
    ends_ptr,
    grad_ptr,
    seed_ptr,
    C,
    MOST,
    stride_srcm,
    size,
    splits,
    inv_keep,
    threshold,
    OF_B: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCKS_R: tl.constexpr,
):
    """grad_i[r, c] = f * sum over one split of the rows m of adapter i of g[m, r] drop(src)[m, c], at split * size.

    OF_B: grad_i is [C, R] and f = s_i; else [R, C] and f = 1 / (1 - p). An adapter without rows gets zeros.
    """
    adapter = tl.program_id(1) // BLOCKS_R
    block_r = tl.program_id(1) % BLOCKS_R
    cell_ptr = cells_ptr + adapter * 5
    R = tl.load(cell_ptr + 2).to(tl.int32)
    if block_r * BLOCK_R < R:
        offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
        start = tl.load(ends_ptr + adapter - 1, mask=adapter > 0, other=0)
        end = tl.load(ends_ptr + adapter)
        per_split = tl.cdiv(tl.cdiv(end - start, BLOCK_M), splits) * BLOCK_M
        first = start + tl.program_id(2) * per_split
        last = tl.minimum(first + per_split, end)
        acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
        for place in range(first, last, BLOCK_M):
            places = place + tl.arange(0, BLOCK_M)
            rows = tl.load(order_ptr + places, mask=places < last, other=0)
            src = load_rows(src_ptr, stride_srcm, rows, places < last, offs_c, C)
            g = load_rows(g_ptr, MOST, rows, places < last, offs_r, MOST)
            if DROPOUT:
                key1, key2 = row_keys(seed_ptr, rows)
                src = tl.where(keep_mask(key1, key2, offs_c, threshold), src, 0.0)
            acc = long_dot(tl.trans(src), g, acc, PRECISION)
        at = tl.program_id(2).to(tl.int64) * size + tl.load(cell_ptr + 3) * C
        at += _weight_offsets(offs_r, offs_c, R, C, OF_B)
        acc *= _scale(cell_ptr) if OF_B else inv_keep
        tl.store(grad_ptr + at, tl.trans(acc), mask=(offs_r < R)[:, None] & (offs_c < C)[None, :])


def _tile(name: str, call: _Call, rows: int, precision: str, device: Device) -> Tile:
    """The pass's tile, no taller than the adapters' share of the rows, nor than registers allow beside row numbers."""
    t = tile(f"multi_low_rank/{name}", precision, call.most, device.arch)
    tallest = 64 if precision in ("bf16", "fp16") and call.most <= 64 else 32
    share = next_power_of_2(max(1, cdiv(rows, call.cells.shape[0])))
    return t._replace(block_m=max(_LEAST_M, min(t.block_m, share, tallest)))


def _launch(
    kernel: Any, t: Tile, columns: int, call: _Call, of_b: bool, drop: Dropout, precision: str,
    src: Tensor, out: Tensor, c: int, *strides: int,
) -> None:  # fmt: skip
    """A pass whose programs take a block of rows of one adapter and one of the blocks of `columns`."""
    m, count = src.shape[0], call.cells.shape[0]
    # The most blocks that the rows can fall into: one more for each adapter that has a block that is not full.
    partly = min(count, m)
    launch(
        kernel, ((m - partly) // t.block_m + partly, columns),
        src, call.cells, call.order, call.ends, out, drop.seed, c, count, call.most, *strides,
        drop.inv_keep, drop.threshold,
        OF_B=of_b, ALIGNED=call.aligned, TYPE=_TYPES[call.weights], DROPOUT=drop.mode, PRECISION=precision,
        BLOCK_M=t.block_m, BLOCK_C=t.block_c, BLOCK_R=t.block_r, BLOCK_G=next_power_of_2(count),
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip


def _shrink(x: Tensor, out: Tensor, call: _Call, of_b: bool, drop: Dropout, precision: str) -> None:
    t = _tile("row", call, x.shape[0], precision, device_of(x))
    blocks_r = cdiv(call.most, t.block_r)
    _launch(shrink_kernel, t, blocks_r, call, of_b, drop, precision, x, out, x.shape[1], x.stride(0))


def _expand(h: Tensor, out: Tensor, call: _Call, of_b: bool, drop: Dropout, precision: str) -> None:
    c, t = out.shape[1], _tile("expand", call, out.shape[0], precision, device_of(out))
    _launch(expand_kernel, t, cdiv(c, t.block_c), call, of_b, drop, precision, h, out, c)


def _gradient(src: Tensor, g: Tensor, call: _Call, of_b: bool, drop: Dropout, precision: str) -> Tensor:
    (m, c), count, device = src.shape, call.cells.shape[0], device_of(src)
    t = _tile("column", call, m, precision, device)
    blocks_c, blocks_r = cdiv(c, t.block_c), cdiv(call.most, t.block_r)
    splits = row_splits(src, t, 2 * device.processors // (blocks_c * count), count)
    size = call.ranks * c
    partial = torch.empty((splits, size), dtype=torch.float32, device=src.device)
    launch(
        gradient_kernel, (blocks_c, count * blocks_r, splits),
        src, g, call.cells, call.order, call.ends, partial, drop.seed, c, call.most, src.stride(0), size,
        splits, drop.inv_keep, drop.threshold,
        OF_B=of_b, DROPOUT=drop.mode, PRECISION=precision,
        BLOCK_M=t.block_m, BLOCK_C=t.block_c, BLOCK_R=t.block_r, BLOCKS_R=blocks_r,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    return sum_splits(partial)


def aot_sources(device: Device) -> Iterator[Source]:
    """Kernel variants to compile ahead of time: ranks, dtypes, dropout, few and many rows, odd sizes."""
    return sources(device, _aot_calls())


def _aot_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    cases = [
        (8192, 8, 4096, 4096, 16, 16, bf16, bf16, 0.1),
        (8192, 8192, 4096, 4096, 16, 16, bf16, f32, 0.1),
        (8192, 8192, 4096, 4096, 8, 64, bf16, bf16, 0.1),
        (8192, 8192, 4096, 4096, 8, 64, bf16, f32, 0.0),
        (8192, 8192, 4096, 4096, 4, 128, bf16, bf16, 0.0),
        (2048, 16, 768, 768, 16, 8, f32, f32, 0.1),
        (64, 64, 4096, 4096, 32, 16, bf16, bf16, 0.0),
        (64, 64, 4096, 4096, 32, 16, f16, f32, 0.0),
        (7, 7, 33, 29, 3, 5, bf16, bf16, 0.1),
    ]
    for m, entries, k, n, count, r, dtype, weights, p in cases:
        name = f"multi_low_rank {m}x{k}-{n} {count} of r{r} {dtype} {weights} p{p}".replace("torch.", "")
        yield name, functools.partial(_aot_call, m, entries, k, n, count, r, dtype, weights, p)


def _aot_call(
    m: int, entries: int, k: int, n: int, count: int, r: int, dtype: torch.dtype, weights: torch.dtype, p: float
) -> None:
    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    cells, index = meta(count, _CELLS, dtype=torch.int64), meta(entries, dtype=torch.int64)
    seed = meta(1, dtype=torch.int64) if p else None
    sizes = (r, count * r, _DTYPES.index(weights), k % 16 == 0 and n % 16 == 0)
    h = forward(meta(m, k), cells, index, meta(m, n), *sizes, p, seed)
    backward(meta(m, n), meta(m, k), cells, index, h, meta(m, k), *sizes, p, seed, True, True)
