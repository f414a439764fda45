"""The column pass: grad[r, c] = sum_m g[m, r] drop(src)[m, c]; reads src once, and sums columns on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import activation, dot, long_dot, long_pair_dot, of_rank
from ._device import device_of, launch
from ._dropout import Dropout, keep_mask, row_keys
from ._latent import halving, reduce_pass
from ._tiles import Tile, cdiv, tile

#: Programs of a column pass that a multiprocessor should have, and those with halves, of which it holds three.
_COLUMN_PROGRAMS, _PAIR_PROGRAMS = 4, 3


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


def row_splits(src: Tensor, t: Tile, wanted: int, weights: int = 1) -> int:
    """Splits of the rows of src, which belong to so many weights: `wanted` of them, unless that is too many.

    Writing and reading the partials (8 R bytes per split and column) costs at most half of reading src.
    """
    rows = src.shape[0]
    affordable = rows * src.element_size() // (16 * t.block_r * weights)
    return max(1, min(wanted, cdiv(rows, t.block_m) // 2, affordable))


class Gradients:
    """f32 gradients of several column passes over the same rows, summed over row splits at the end.

    With one split the passes write the outputs themselves; else a workspace [splits, sum of sizes], which `finish`
    sums in order. `columns` are the widths of the passes: together with the splits they fill the device. into: outputs
    that are there already, behind those of the shapes. op: as in `row_pass`.
    """

    def __init__(
        self, src: Tensor, columns: list[int], shapes: list[tuple[int, ...]], precision: str, rank: int, op: str = "",
        into: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        device = device_of(src)
        self.op = op
        halved = halving(src, rank, precision)
        t = tile(f"{op}/column", "pair" if halved else precision, rank, device.arch)
        rows = src.shape[0]
        blocks = cdiv(min(columns), t.block_c) * cdiv(rank, t.block_r)
        programs = _PAIR_PROGRAMS if halved else _COLUMN_PROGRAMS
        blocks_m = cdiv(rows, t.block_m)
        per_split = cdiv(blocks_m, row_splits(src, t, programs * device.processors // blocks))
        self.splits = cdiv(blocks_m, per_split)
        self.rows_per_split = per_split * t.block_m
        self.outputs = [torch.empty(shape, dtype=torch.float32, device=src.device) for shape in shapes] + [*into]
        sizes = [out.numel() for out in self.outputs]
        self.size = sum(sizes)
        self.partials = self.outputs
        if self.splits > 1 and sizes:
            self._workspace = torch.empty((self.splits, self.size), dtype=torch.float32, device=src.device)
            self.partials = list(torch.split(self._workspace[0], sizes))

    def finish(self) -> list[Tensor]:
        """The sums, in the order of the shapes."""
        if self.partials is not self.outputs:
            reduce_pass(self._workspace, self.outputs)
        return self.outputs


def column_pass(
    src: Tensor,
    g: Tensor,
    grads: Gradients,
    drop: Dropout,
    precision: str,
    grad: Tensor,
    grad_strides: tuple[int, int],
    grad_factor: float = 1.0,
    src_sum: Tensor | None = None,
    g_sum: Tensor | None = None,
    other: Tensor | None = None,
    act: str = "",
) -> None:
    """Weight gradient grad = grad_factor * act(g)^T drop(src), and column sums.

    other [M, C]: src_sum is then that of src * other, without grad_factor.
    src [M, C] · g [M, R] f32, or [2, M, R] from `halves` or `latent_pass`, without act · grad, src_sum [C], g_sum [R]:
    slots of `grads.partials`, grad by (R, C) strides.
    """
    (m, c), r = src.shape, g.shape[-1]
    precision = "pair" if g.dim() == 3 else of_rank(precision, r)
    t = tile(f"{grads.op}/column", precision, r, device_of(g).arch)
    blocks_r = cdiv(r, t.block_r)
    launch(
        column_kernel, (cdiv(c, t.block_c) + (g_sum is not None), blocks_r, grads.splits),
        src, g, other, grad, src_sum, g_sum, drop.seed,
        m, c, r, src.stride(0), 0 if other is None else other.stride(0), g.stride(0), *grad_strides,
        grads.size, grads.rows_per_split, float(grad_factor), drop.threshold,
        ACT=act, DROPOUT=drop.mode, PRECISION=precision, EVEN=c % t.block_c == 0,
        BLOCK_M=t.block_m, BLOCK_C=t.block_c, BLOCK_R=t.block_r,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
