"""Launches of the passes: grids, row and column splits, workspaces. No host synchronisation anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import Dropout, hash_rows_kernel
from ._device import device_of, launch
from ._passes import column_kernel, expand_kernel, reduce_kernel, row_kernel
from ._tiles import cdiv, row_block_m, tile

#: Splits of the columns in the row pass at most.
MAX_COLUMN_SPLITS = 16
#: Programs of the row pass that a multiprocessor should have: the dropout hash keeps one of four warps waiting.
_ROW_PROGRAMS = 3
#: Programs of the expand pass that a multiprocessor should have before any of them takes several blocks of columns.
_EXPAND_PROGRAMS = 8
#: Blocks of columns that such a program takes at most.
_EXPAND_BLOCKS = 8
#: Elements from which rows are hashed once, for all tiles of a row: a launch costs more than the hashes of fewer.
_HASH_ROWS = 1 << 22
#: Rows of the largest tile, which may reach beyond the last row.
_MOST_ROWS = 256


def hash_rows(x: Tensor, drop: Dropout) -> Dropout:
    """The same dropout on the rows of x [M, C], prepared for passes that walk down the rows."""
    if drop.seed is None or x.numel() < _HASH_ROWS:
        return drop
    blocks = cdiv(x.shape[0], _MOST_ROWS)
    hashes = torch.empty(blocks * _MOST_ROWS, dtype=torch.int64, device=x.device)
    launch(hash_rows_kernel, (blocks,), drop.seed, hashes, BLOCK=_MOST_ROWS, num_warps=4)
    return drop._replace(mode=2, seed=hashes)


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
    blocks_m, blocks_r, blocks_k = cdiv(m, block_m), cdiv(r, t.block_r), cdiv(k, t.block_c)
    splits = 1
    if may_split:
        # Partials (8 R bytes per split and row) cost at most a quarter of reading x, unless processors were idle.
        affordable = max(k * x.element_size() // (32 * r), processors // (blocks_m * blocks_r))
        wanted = _ROW_PROGRAMS * processors // (blocks_m * blocks_r)
        splits = max(1, min(wanted, affordable, blocks_k // 4, MAX_COLUMN_SPLITS))
    per_split = cdiv(blocks_k, splits)
    splits = cdiv(blocks_k, per_split)
    out = torch.empty((splits, m, r), dtype=torch.float32, device=x.device)
    launch(
        row_kernel, (blocks_m, blocks_r, splits),
        x, w, bias if splits == 1 else None, pre, out, drop.seed,
        m, k, r, x.stride(0), w.stride(0), w.stride(1), per_split, float(factor), drop.threshold,
        ACT=act, DROPOUT=drop.mode, PRECISION=precision, BLOCK_M=block_m, BLOCK_K=t.block_c, BLOCK_R=t.block_r,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    return out


def sum_splits(partial: Tensor) -> Tensor:
    """partial [splits, ...] f32 -> their sum [...], the first to the last."""
    if partial.shape[0] == 1:
        return partial[0]
    total = torch.empty(partial.shape[1:], dtype=torch.float32, device=partial.device)
    reduce_pass(partial.view(partial.shape[0], -1), [total])
    return total


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
    pass left it out. With scale, shift [N] f32, and no dropout: out = scale * (base + factor * ...) + shift.
    """
    splits, m, r = h.shape
    n = out.shape[1]
    device = device_of(out)
    t = tile("expand", precision, r, device.arch)
    blocks_m, blocks_n = cdiv(m, t.block_m), cdiv(n, t.block_c)
    per_program = 1
    if r <= t.block_r and n % 16 == 0:  # elsewhere the addresses of two blocks do not fit the registers
        per_program = max(1, min(_EXPAND_BLOCKS, blocks_m * blocks_n // (_EXPAND_PROGRAMS * device.processors)))
    h_out = torch.empty((m, r), dtype=torch.float32, device=h.device) if splits > 1 else None
    launch(
        expand_kernel, (blocks_m, cdiv(blocks_n, per_program)),
        h, h_bias if splits > 1 else None, h_out, w, bias, base, scale, shift, out, drop.seed,
        m, n, r, w.stride(0), w.stride(1), 0 if base is None else base.stride(0), splits, per_program,
        float(factor) * drop.inv_keep, drop.threshold,
        ACT=act, DROPOUT=drop.mode, PRECISION=precision, MANY=per_program > 1,
        BLOCK_M=t.block_m, BLOCK_N=t.block_c, BLOCK_R=t.block_r, num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    return h.view(m, r) if h_out is None else h_out


class Gradients:
    """f32 gradients of several column passes over the same rows, summed over row splits at the end.

    With one split the passes write the outputs themselves; else a workspace [splits, sum of sizes], which `finish`
    sums in order. `columns` are the widths of the passes: together with the splits they fill the device. op: as in
    `row_pass`.
    """

    def __init__(
        self, src: Tensor, columns: list[int], shapes: list[tuple[int, ...]], precision: str, rank: int, op: str = ""
    ) -> None:
        device = device_of(src)
        self.op = op
        t = tile(f"{op}/column", precision, rank, device.arch)
        rows = src.shape[0]
        blocks = cdiv(min(columns), t.block_c) * cdiv(rank, t.block_r)
        blocks_m = cdiv(rows, t.block_m)
        # Writing and reading the partials (8 R bytes per split and column) costs at most half of reading src.
        affordable = rows * src.element_size() // (16 * t.block_r)
        splits = max(1, min(4 * device.processors // blocks, blocks_m // 2, affordable))
        per_split = cdiv(blocks_m, splits)
        self.splits = cdiv(blocks_m, per_split)
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
    launch(reduce_kernel, (cdiv(size, 1024),), partial, *pointers, size, *ends, splits, BLOCK=1024, num_warps=4)


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
    src [M, C] · g [M, R] f32 · grad, src_sum [C], g_sum [R]: slots of `grads.partials`, grad by (R, C) strides.
    """
    (m, c), r = src.shape, g.shape[1]
    t = tile(f"{grads.op}/column", precision, r, device_of(g).arch)
    blocks_r = cdiv(r, t.block_r)
    launch(
        column_kernel, (cdiv(c, t.block_c), blocks_r, grads.splits),
        src, g, other, grad, src_sum, g_sum, drop.seed,
        m, c, r, src.stride(0), 0 if other is None else other.stride(0), *grad_strides,
        grads.size, grads.rows_per_split, float(grad_factor), drop.threshold,
        ACT=act, DROPOUT=drop.mode, PRECISION=precision,
        BLOCK_M=t.block_m, BLOCK_C=t.block_c, BLOCK_R=t.block_r,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
