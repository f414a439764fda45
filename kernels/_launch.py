"""Launches of the passes: grids, row and column splits, workspaces. No host synchronisation anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import Dropout, hash_rows_kernel, of_rank
from ._device import device_of, launch
from ._passes import (
    both_kernel,
    column_kernel,
    expand_columns_kernel,
    expand_kernel,
    latent_kernel,
    reduce_kernel,
    row_kernel,
)
from ._tiles import MAX_BLOCK_R, cdiv, row_block_m, tile

#: Splits of the columns in the row pass at most.
MAX_COLUMN_SPLITS = 16
#: Programs of the row pass that a multiprocessor should have: the dropout hash keeps one of four warps waiting.
_ROW_PROGRAMS = 3
#: Rank above which, and elements of x from which, "split" products get the halves of their smaller factor.
_HALVED_RANK, _HALVED = 32, 1 << 22
#: Columns of x and out together up to which a program takes whole rows: more take longer than a second launch.
_SHORT_ROWS = 2048
#: Programs of a column pass that a multiprocessor should have, and those with halves, of which it holds three.
_COLUMN_PROGRAMS, _PAIR_PROGRAMS = 4, 3
#: Columns that the programs of a multiprocessor keep between them in the expand pass.
_KEPT_COLUMNS = 256
#: Tiles of a program from which it keeps its columns.
_KEPT_TILES = 4
#: Elements from which rows are hashed once, for all tiles of a row: a launch costs more than the hashes of fewer.
_HASH_ROWS = 1 << 22
#: Sums that a program of the reduction or of the latent pass makes.
_SUMS = 512
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

    x [M, K], w [R, K], or [2, R, K] from `halves`, by any strides. More than one split only when `may_split`, with few
    rows and many columns; the bias and act'(pre) are then left to `expand_pass` or `latent_pass`. op: whose row of
    `_tiles` it may have of its own.
    """
    (m, k), r = x.shape, w.shape[-2]
    precision = "pair" if w.dim() == 3 else precision
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
        x, w, bias if splits == 1 else None, pre if splits == 1 else None, out, drop.seed,
        m, k, r, x.stride(0), w.stride(-2), w.stride(-1), w.stride(0), per_split, float(factor), drop.threshold,
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


def halving(x: Tensor, rank: int, precision: str) -> bool:
    """Whether "split" products with x are worth a launch that makes the halves of their smaller factor."""
    return precision == "split" and x.dtype == torch.bfloat16 and rank > _HALVED_RANK and x.numel() >= _HALVED


def halves(w: Tensor, x: Tensor, precision: str) -> Tensor:
    """w as [2, *w.shape] bf16, whose sum it is to 2^-17, where that is worth it; else w, halved tile by tile."""
    return latent_pass(w[None], precision="split")[1] if halving(x, min(w.shape), precision) else w


def latent_pass(
    h: Tensor, bias: Tensor | None = None, pre: Tensor | None = None, act: str = "", precision: str | None = None
) -> tuple[Tensor, Tensor]:
    """h [splits, M, R] -> (its sum over splits (+ bias) (* act'(pre)) [M, R] f32, act of that as an operand).

    bias and pre are for the sum of several splits: the row pass has seen to a single one. With pre the operand is the
    sum itself. precision: of the product that it is for, [1, M, R] in its type or for "split" [2, M, R] bf16; None for
    no operand, the sum again.
    """
    splits, m, r = h.shape
    if splits == 1:
        bias, pre, act = None, None, "" if pre is not None else act
    parts = 0 if precision is None else 2 if precision == "split" else 1
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "split": torch.bfloat16}.get(precision or "", torch.float32)
    if dtype == torch.float32 and (pre is not None or not act):
        parts = 0
    value = torch.empty((m, r), dtype=torch.float32, device=h.device) if splits > 1 else h[0]
    operand = torch.empty((parts, m, r), dtype=dtype, device=h.device) if parts else value
    if splits > 1 or parts:
        launch(
            latent_kernel, (cdiv(m * r, _SUMS),),
            h, bias, pre, value if splits > 1 else None, operand if parts else None, m * r, r, splits,
            ACT=act, PARTS=parts, BLOCK=_SUMS, num_warps=4,
        )  # fmt: skip
    return value, operand


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
    pre: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [M, N] = base + drop(factor * (act(h) w + bias)) for h [splits, M, R] -> its sum over splits, act of it.

    The latter is [2, M, R], for `column_pass`, where halves were made on the way; else it is the sum again.

    w [R, N] by any strides; base [M, N] by any row stride, may be out itself. h_bias [R] is added only where the row
    pass left it out. With pre [M, R] it is not act(h) but h, times act'(pre) where the row pass left that out. With
    scale, shift [N] f32, and no dropout: out = scale * (base + factor * ...) + shift.
    """
    splits, m, r = h.shape
    n = out.shape[1]
    device = device_of(out)
    t = tile("dropout/expand_columns" if drop.mode else "expand_columns", precision, r, device.arch)
    blocks_m, blocks_n = cdiv(m, t.block_m), cdiv(n, t.block_c)
    programs = device.processors * _KEPT_COLUMNS // t.block_c
    # Elsewhere the latent pass costs more than it saves, or the addresses do not fit the registers.
    if r <= t.block_r and n % 16 == 0 and blocks_m * blocks_n >= _KEPT_TILES * programs:
        value, operand = latent_pass(h, h_bias, pre, act, precision)
        rows_per_program = t.block_m * cdiv(blocks_m * blocks_n, programs)
        launch(
            expand_columns_kernel, (blocks_n, cdiv(m, rows_per_program)),
            operand, w, bias, base, scale, shift, out, drop.seed,
            m, n, r, w.stride(0), w.stride(1), 0 if base is None else base.stride(0), rows_per_program,
            float(factor) * drop.inv_keep, drop.threshold,
            DROPOUT=drop.mode, PRECISION=precision, EVEN=n % t.block_c == 0 and r == t.block_r,
            BLOCK_M=t.block_m, BLOCK_N=t.block_c, BLOCK_R=t.block_r, STAGES=t.num_stages,
            num_warps=t.num_warps, num_stages=t.num_stages,
        )  # fmt: skip
        return value, operand if precision == "split" and out.dtype == torch.bfloat16 else value
    if pre is not None:
        h, act, splits = latent_pass(h, pre=pre, act=act)[0][None], "", 1
    t = tile("expand", precision, r, device.arch)
    h_out = torch.empty((m, r), dtype=torch.float32, device=h.device) if splits > 1 else None
    launch(
        expand_kernel, (cdiv(m, t.block_m), cdiv(n, t.block_c)),
        h, h_bias if splits > 1 else None, h_out, w, bias, base, scale, shift, out, drop.seed,
        m, n, r, w.stride(0), w.stride(1), 0 if base is None else base.stride(0), splits,
        float(factor) * drop.inv_keep, drop.threshold,
        ACT=act, DROPOUT=drop.mode, PRECISION=precision,
        BLOCK_M=t.block_m, BLOCK_N=t.block_c, BLOCK_R=t.block_r, num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    value = h[0] if h_out is None else h_out
    return value, value


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
        programs = _PAIR_PROGRAMS if halving(src, rank, precision) else _COLUMN_PROGRAMS
        splits = max(1, min(programs * device.processors // blocks, blocks_m // 2, affordable))
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


def reduce_pass(partial: Tensor, outputs: list[Tensor], root: bool = False) -> None:
    """outputs (up to four, f32) = partial [splits, size] summed over the splits and cut in order; root: its root."""
    splits, size = partial.shape
    ends = [sum(out.numel() for out in outputs[: i + 1]) for i in range(3)]
    pointers = [*outputs, None, None, None][:4]
    launch(
        reduce_kernel, (cdiv(size, _SUMS),), partial, *pointers, size, *ends, splits,
        ROOT=root, AT_ONCE=8, BLOCK=_SUMS, num_warps=4,
    )  # fmt: skip


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
