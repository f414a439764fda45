"""How low_rank's scales reach kernels that know the last one only: folded into operands, out of gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def folded(b: Tensor, rank_scale: Tensor | None, update_scale: Tensor | None) -> Tensor:
    """e ⊙ b ⊙ d in b's dtype, b itself where there are no such scales."""
    out = b if rank_scale is None else b * rank_scale
    out = out if update_scale is None else out * update_scale[:, None]
    return out.to(b.dtype).contiguous()


def operands(
    x: Tensor, a: Tensor, b: Tensor, rank_scale: Tensor | None, update_scale: Tensor | None, widen: bool = False
) -> tuple[Tensor, Tensor]:
    """a and b as the kernels take them, the scales folded into b without a rounding that x's dtype would not make.

    widen: another scale is going to be.
    """
    if widen or rank_scale is not None or update_scale is not None:
        compute = torch.promote_types(x.dtype, b.dtype)
        a, b = a.to(compute), folded(b.to(compute), rank_scale, update_scale)
    return a.contiguous(), b.contiguous()


def epilogue(column_scale: Tensor | None, bias: Tensor | None, in_base: bool) -> tuple[Tensor | None, Tensor | None]:
    """c and shift, f32 [N], of y = c ⊙ (base + update) + shift; `in_base`: base holds the bias, which is not scaled."""
    if column_scale is None:
        return None, None
    c = column_scale.detach().float().contiguous()
    if bias is None:
        return c, None
    shift = bias.detach().float().contiguous()
    return c, (1.0 - c) * shift if in_base else shift


def unfolded(
    g: Tensor, b: Tensor, d: Tensor | None, e: Tensor | None, need_b: bool, need_d: bool, need_e: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """From the gradient g [N, R] of e ⊙ b ⊙ d those of b, d and e."""
    if d is None and e is None:
        return (g if need_b else None), None, None
    dd = de = None
    if need_d or need_e:
        product = g * b
        if need_d:  # sums of N terms as one product
            dd = product.sum(0) if e is None else e.to(product.dtype) @ product
        if need_e:
            de = product.sum(1) if d is None else product @ d.to(product.dtype)
    return (folded(g, d, e) if need_b else None), dd, de
