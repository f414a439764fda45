"""Sums over the splits of a pass, in a fixed order (no atomics, so always the same bits), and what is made of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import activation, activation_grad, round_to, two_halves
from ._device import launch
from ._tiles import cdiv

#: Rank above which, and elements of x from which, "split" products get the halves of their smaller factor.
_HALVED_RANK, _HALVED = 32, 1 << 22
#: Sums that a program of the reduction or of the latent pass makes.
_SUMS = 512


@triton.jit
def split_sums(partial_ptr, offs, size, splits, AT_ONCE: tl.constexpr):
    """Sums of partial [splits, size] over the splits, first to last, f32; AT_ONCE loads are in flight at a time."""
    acc = tl.zeros(offs.shape, tl.float32)
    for start in range(0, splits, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            here = partial_ptr + tl.cast(start + i, tl.int64) * size
            mask = offs < tl.where(start + i < splits, size, 0)
            acc += tl.load(here + offs, mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["size", "splits"])
def latent_kernel(
    h_ptr,
    bias_ptr,
    pre_ptr,
    sum_ptr,
    out_ptr,
    size,
    R,
    splits,
    ACT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sum [M, R] f32 = h summed over its splits (+ bias[r]) (* act'(pre)); out = act(sum), or sum itself with pre.

    size = M * R. PARTS 2: out [2, M, R] holds act(sum) as the sum of two bf16; 0: no out.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    h = split_sums(h_ptr, offs, size, splits, 1)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + offs % R, mask=mask, other=0.0).to(tl.float32)
    if pre_ptr is not None:
        h *= activation_grad(tl.load(pre_ptr + offs, mask=mask, other=0.0), ACT)
    if sum_ptr is not None:
        tl.store(sum_ptr + offs, h, mask=mask)
    if PARTS:
        z = h if pre_ptr is not None else activation(h, ACT)
        if PARTS == 2:
            first, second = two_halves(z)
            tl.store(out_ptr + offs, first, mask=mask)
            tl.store(out_ptr + size + offs, second, mask=mask)
        else:
            tl.store(out_ptr + offs, round_to(z, out_ptr.dtype.element_ty), mask=mask)


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


def halving(x: Tensor, rank: int, precision: str) -> bool:
    """Whether "split" products with x are worth a launch that makes the halves of their smaller factor."""
    return precision == "split" and x.dtype == torch.bfloat16 and rank > _HALVED_RANK and x.numel() >= _HALVED


def halves(w: Tensor, x: Tensor, precision: str) -> Tensor:
    """w as [2, *w.shape] bf16, whose sum it is to 2^-17, where that is worth it; else w, halved tile by tile."""
    return latent_pass(w[None], precision="split")[1] if halving(x, min(w.shape), precision) else w


@triton.jit(do_not_specialize=["size", "end0", "end1", "end2", "splits"])
def reduce_kernel(
    partial_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    out3_ptr,
    size,
    end0,
    end1,
    end2,
    splits,
    ROOT: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum partial [splits, size] over the splits, first to last, and cut the sums into up to four outputs.

    ROOT takes the square roots of the sums.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = split_sums(partial_ptr, offs, size, splits, AT_ONCE)
    if ROOT:
        acc = tl.sqrt_rn(acc)
    tl.store(out0_ptr + offs, acc, mask=offs < end0)
    if out1_ptr is not None:
        tl.store(out1_ptr + offs - end0, acc, mask=(offs >= end0) & (offs < end1))
    if out2_ptr is not None:
        tl.store(out2_ptr + offs - end1, acc, mask=(offs >= end1) & (offs < end2))
    if out3_ptr is not None:
        tl.store(out3_ptr + offs - end2, acc, mask=(offs >= end2) & mask)


def reduce_pass(partial: Tensor, outputs: list[Tensor], root: bool = False) -> None:
    """outputs (up to four, f32) = partial [splits, size] summed over the splits and cut in order; root: its root."""
    splits, size = partial.shape
    ends = [sum(out.numel() for out in outputs[: i + 1]) for i in range(3)]
    pointers = [*outputs, None, None, None][:4]
    launch(
        reduce_kernel, (cdiv(size, _SUMS),), partial, *pointers, size, *ends, splits,
        ROOT=root, AT_ONCE=8, BLOCK=_SUMS, num_warps=4,
    )  # fmt: skip


def sum_splits(partial: Tensor) -> Tensor:
    """partial [splits, ...] f32 -> their sum [...], the first to the last."""
    if partial.shape[0] == 1:
        return partial[0]
    total = torch.empty(partial.shape[1:], dtype=torch.float32, device=partial.device)
    reduce_pass(partial.view(partial.shape[0], -1), [total])
    return total
