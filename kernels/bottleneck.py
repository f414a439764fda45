"""Triton backend of bottleneck: y = residual + drop(scale * (act(x D^T + b_d) U^T + b_u)), with backward.

x [M, K], down D [R, K], down_bias [R], up U [N, R], up_bias [N], residual and y [M, N]; x and y in f32, bf16 or f16,
the weights in one of the same types, independently; products accumulate in f32. The dropout mask over y is regenerated.

forward   one kernel that keeps a tile's latent in registers, or a row and an expand pass: x and residual read once
backward  the same over dy (dpre, dx), column pass over dy (d_up), column pass over x (d_down), reduction
Source of the method: Houlsby et al. 2019 (arXiv:1902.00751), section 2.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._both import both_passes, one_kernel
from ._column import Gradients, column_pass
from ._common import precision, refuse_common
from ._device import Device, Source, on_device, sources
from ._dropout import dropout_args, hash_rows
from ._expand import expand_pass
from ._latent import halves, latent_pass
from ._plan import planned
from ._row import row_pass


def refuse(device: torch.device, dtype: torch.dtype, **dims: int) -> str | None:
    """Why this backend cannot run for x on `device` with `dtype` and sizes M, K, N, R; None when it can."""
    return refuse_common(device, dtype, **dims)


@planned
def forward(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y [M, N] in x's dtype, pre = x D^T + b_d [M, R] f32); act is relu, gelu (exact), silu or tanh."""
    plain = dropout_args(0.0, None)
    product = precision(x.dtype, down.dtype)
    y = torch.empty((x.shape[0], up.shape[0]), dtype=x.dtype, device=x.device)
    with on_device(x):
        drop = hash_rows(y, dropout_args(p, seed))
        if one_kernel(x, y, up.shape[1]):
            factors = 1.0, scale * drop.inv_keep
            return y, both_passes(x, down, up.T, residual, y, product, drop, False, factors, act, down_bias, up_bias)
        pre = row_pass(x, halves(down, x, product), 1.0, plain, product, bias=down_bias, may_split=True)
        pre, _ = expand_pass(pre, up.T, residual, y, scale, drop, product, h_bias=down_bias, bias=up_bias, act=act)
    return y, pre


@planned
def backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    down: Tensor,
    up: Tensor,
    act: str,
    scale: float,
    p: float,
    seed: Tensor | None,
    add_dy: bool,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """(dx [M, K] in x's dtype or None, d_down [R, K], d_down_bias [R], d_up [N, R], d_up_bias [N], all f32).

    add_dy adds dy to dx: the residual was x itself, N == K.
    """
    plain = dropout_args(0.0, None)
    product = precision(x.dtype, down.dtype)
    (m, k), (n, r) = x.shape, up.shape
    dx = torch.empty((m, k), dtype=x.dtype, device=x.device) if need_dx else None
    with on_device(x):
        drop = hash_rows(dy, dropout_args(p, seed))
        factor = scale * drop.inv_keep
        base = dy if add_dy else None
        grads = Gradients(x, [k, n], [(r, k), (r,), (n, r), (n,)], product, r, op="bottleneck")
        d_down, d_down_bias, d_up, d_up_bias = grads.partials
        z, z_act = pre, act
        if dx is not None and one_kernel(dy, dx, r):
            dpre = both_passes(dy, up.T, down, base, dx, product, drop, True, (factor, 1.0), act, pre=pre)
        else:
            up_halves = halves(up, dy, product)
            partial = row_pass(dy, up_halves.mT, factor, drop, product, pre=pre, act=act, may_split=True)
            if up_halves is not up:
                z, z_act = latent_pass(pre[None], act=act, precision=product)[1], ""
            if dx is None:
                dpre = latent_pass(partial, pre=pre, act=act)[0]
            else:
                dpre = expand_pass(partial, down, base, dx, 1.0, plain, product, act=act, pre=pre)[1]
        column_pass(
            dy, z, grads, drop, product, act=z_act,
            grad=d_up, grad_strides=(1, r), grad_factor=factor, src_sum=d_up_bias,
        )  # fmt: skip
        column_pass(x, dpre, grads, plain, product, grad=d_down, grad_strides=(k, 1), g_sum=d_down_bias)
        sums = grads.finish()
    return dx, sums[0], sums[1], sums[2], sums[3]


def aot_sources(device: Device) -> Iterator[Source]:
    """Kernel variants to compile ahead of time: ranks, dtypes, activations, both forwards, small and odd sizes."""
    return sources(device, _aot_calls())


def _aot_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    f32, bf16 = torch.float32, torch.bfloat16
    cases = [
        (8192, 4096, 64, bf16, bf16, "gelu", 0.1),
        (8192, 4096, 64, bf16, f32, "silu", 0.1),
        (8192, 768, 64, bf16, bf16, "gelu", 0.1),
        (8192, 768, 128, bf16, f32, "gelu", 0.0),
        (2048, 768, 24, bf16, f32, "gelu", 0.1),
        (1024, 768, 48, f32, f32, "tanh", 0.1),
        (1024, 768, 128, f32, f32, "relu", 0.0),
        (7, 33, 1, bf16, bf16, "relu", 0.1),
    ]
    for m, k, r, dtype, weights, act, p in cases:
        name = f"bottleneck {m}x{k}-{k} r{r} {dtype} {weights} {act} p{p}".replace("torch.", "")
        yield name, functools.partial(_aot_call, m, k, r, dtype, weights, act, p)


def _aot_call(m: int, k: int, r: int, dtype: torch.dtype, weights: torch.dtype, act: str, p: float) -> None:
    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, down, up = meta(m, k), meta(r, k, dtype=weights), meta(k, r, dtype=weights)
    down_bias, up_bias = meta(r, dtype=weights), meta(k, dtype=weights)
    seed = meta(1, dtype=torch.int64) if p else None
    _, pre = forward(x, down, down_bias, up, up_bias, x, act, 0.5, p, seed)
    backward(meta(m, k), x, pre, down, up, act, 0.5, p, seed, True, True)
