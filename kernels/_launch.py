"""Launches of the passes: grids, row and column splits, workspaces. No host synchronisation anywhere."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ._common import Dropout
from ._device import device_of, launch
from ._passes import column_kernel, expand_kernel, reduce_kernel, row_kernel
from ._tiles import row_block_m, tile

#: Splits of the columns in the row pass at most: each reads and writes M * R more.
MAX_COLUMN_SPLITS = 16


def row_pass(
    x: Tensor,
    w: Tensor,
    factor: float,
    drop: Dropout,
    precision: str,
    bias: Tensor | None = None,
    pre: Tensor | None = None,
    act: str = "",
    may_split: bool = False,
    op: str = "",
) -> Tensor:
    """factor * drop(x) w^T (+ bias) (* act'(pre)) -> [splits, M, R] f32, whose sum over splits is the result.

    x [M, K], w [R, K] by any strides. More than one split only when `may_split`, with few rows and many columns; the
    bias is then left to `expand_pass`. op: whose row of `_tiles` it may have of its own.
    """
    (m, k), r = x.shape, w.shape[0]
    device = device_of(x)
    t, processors = tile(f"{op}/row", precision, r, device.arch), device.processors
    block_m = row_block_m(m, t, processors)
    blocks_m, blocks_r, blocks_k = triton.cdiv(m, block_m), triton.cdiv(r, t.block_r), triton.cdiv(k, t.block_c)
    splits = 1
    if may_split:
        splits = max(1, min(processors // (blocks_m * blocks_r), blocks_k // 4, MAX_COLUMN_SPLITS))
    per_split = triton.cdiv(blocks_k, splits)
    splits = triton.cdiv(blocks_k, per_split)
    out = torch.empty((splits, m, r), dtype=torch.float32, device=x.device)
    launch(
        row_kernel, (blocks_m, blocks_r, splits),
        x, w, bias if splits == 1 else None, pre, out, drop.seed,
        m, k, r, x.stride(0), w.stride(0), w.stride(1), per_split, float(factor), drop.threshold,
        ACT=act, DROPOUT=drop.enabled, PRECISION=precision, BLOCK_M=block_m, BLOCK_K=t.block_c, BLOCK_R=t.block_r,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    return out


def expand_pass(
    h: Tensor,
    w: Tensor,
    base: Tensor | None,
    out: Tensor,
    factor: float,
    drop: Dropout,
    precision: str,
    h_bias: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """out [M, N] = base + drop(factor * (act(h) w + bias)) for h [splits, M, R] -> h [M, R], summed over splits.

    w [R, N] by any strides; base [M, N] by any row stride, may be out itself. h_bias [R] is added only where the row
    pass left it out. With scale and shift [N] f32, and no dropout: out = scale * (base + factor * ...) + shift.
    """
    splits, m, r = h.shape
    n = out.shape[1]
    t = tile("expand", precision, r, device_of(out).arch)
    h_out = torch.empty((m, r), dtype=torch.float32, device=h.device) if splits > 1 else None
    launch(
        expand_kernel, (triton.cdiv(m, t.block_m), triton.cdiv(n, t.block_c)),
        h, h_bias if splits > 1 else None, h_out, w, bias, base, scale, shift, out, drop.seed,
        m, n, r, w.stride(0), w.stride(1), 0 if base is None else base.stride(0), splits,
        float(factor), drop.inv_keep, drop.threshold,
        ACT=act, DROPOUT=drop.enabled, PRECISION=precision, BLOCK_M=t.block_m, BLOCK_N=t.block_c, BLOCK_R=t.block_r,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    return h.view(m, r) if h_out is None else h_out


class Gradients:
    """f32 gradients of several column passes over the same rows, summed over row splits at the end.

    With one split the passes write the outputs themselves; else a workspace [splits, sum of sizes], which `finish`
    sums in order. `columns` are the widths of the passes: together with the splits they fill the device.
    """

    def __init__(
        self, src: Tensor, columns: list[int], shapes: list[tuple[int, ...]], precision: str, rank: int
    ) -> None:
        device = device_of(src)
        t = tile("column", precision, rank, device.arch)
        rows = src.shape[0]
        blocks = triton.cdiv(min(columns), t.block_c) * triton.cdiv(rank, t.block_r)
        blocks_m = triton.cdiv(rows, t.block_m)
        # Writing and reading the partials (8 R bytes per split and column) costs at most half of reading src.
        affordable = rows * src.element_size() // (16 * t.block_r)
        splits = max(1, min(4 * device.processors // blocks, blocks_m // 2, affordable))
        per_split = triton.cdiv(blocks_m, splits)
        self.splits = triton.cdiv(blocks_m, per_split)
        self.rows_per_split = per_split * t.block_m
        self.outputs = [torch.empty(shape, dtype=torch.float32, device=src.device) for shape in shapes]
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


def reduce_pass(partial: Tensor, outputs: list[Tensor]) -> None:
    """outputs (up to four, f32) = partial [splits, size] summed over the splits and cut in order."""
    splits, size = partial.shape
    ends = [sum(out.numel() for out in outputs[: i + 1]) for i in range(3)]
    pointers = [*outputs, None, None, None][:4]
    launch(reduce_kernel, (triton.cdiv(size, 1024),), partial, *pointers, size, *ends, splits, BLOCK=1024, num_warps=4)


def column_pass(
    src: Tensor,
    g: Tensor,
    grads: Gradients,
    drop: Dropout,
    precision: tuple[str, str],
    grad: Tensor | None = None,
    grad_strides: tuple[int, int] = (0, 0),
    grad_factor: float = 1.0,
    src_sum: Tensor | None = None,
    g_sum: Tensor | None = None,
    w: Tensor | None = None,
    base: Tensor | None = None,
    out: Tensor | None = None,
    other: Tensor | None = None,
    act: str = "",
) -> None:
    """Weight gradient grad = grad_factor * act(g)^T drop(src) and input gradient out = base + drop(g w) in one pass.

    other [M, C]: src_sum is then that of src * other, without grad_factor.
    src [M, C] · g [M, R] f32 · grad, src_sum [C], g_sum [R]: slots of `grads.partials`, grad by (R, C) strides
    · w [R, C] with base and out [M, C] only where `_tiles.dx_rides_along`.
    """
    (m, c), r = src.shape, g.shape[1]
    t = tile("column", precision[0], r, device_of(g).arch)
    blocks_r = triton.cdiv(r, t.block_r)
    launch(
        column_kernel, (triton.cdiv(c, t.block_c), blocks_r, grads.splits),
        src, g, w, base, out, other, grad, src_sum, g_sum, drop.seed,
        m, c, r, src.stride(0), 0 if base is None else base.stride(0), 0 if other is None else other.stride(0),
        *grad_strides,
        grads.size, grads.rows_per_split, float(grad_factor), drop.inv_keep, drop.threshold,
        ACT=act, DROPOUT=drop.enabled, PRECISION=precision[0], OUT_PRECISION=precision[1],
        BLOCK_M=t.block_m, BLOCK_C=t.block_c, BLOCK_R=t.block_r,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
