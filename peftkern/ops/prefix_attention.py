"""Attention over a prefix and a text, softmax(q [Pk; K]ᵀ · s + mask) [Pv; V], without building the concatenation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern import dispatch
from peftkern.ops._op import Op, autocast_dtype, autograd, cast, choose, kernel, transformed
from peftkern.ops._operands import check_floating, number
from peftkern.ops.dropout import check_dropout, dropout, new_seed


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pk: Tensor,
    pv: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """drop(softmax(q [pk; k]ᵀ · scale + mask)) [pv; v], in q's dtype, the softmax in f32 or wider.

    q [B, Hq, S, D] · k, v [B, Hkv, L, D] · pk, pv [Hkv, T, D] or [B, Hkv, T, D], of any floating dtype
    -> [B, Hq, S, D]. Hq is a multiple of Hkv: query head h reads key head h // (Hq / Hkv).
    Every query sees all T rows of the prefix. Of the text, query i sees keys up to L - S + i with `causal`, and those
    that `mask` [B or 1, Hq or 1, S or 1, L] keeps: bool (True is seen) or additive. A query that sees no text attends
    to the prefix alone. scale: 1/√D unless given. Dropout of the weights by `seed`, rows [B · Hq · S], columns [T + L].
    Source: Li & Liang 2021 (arXiv:2101.00190), section 4.2. The oracle: never optimise it.
    """
    _check(q, k, v, pk, pv, mask)
    (b, hq, s, d), (hkv, length) = q.shape, k.shape[1:3]
    keys, values = (
        torch.cat([prefix.to(q.dtype).expand(b, hkv, -1, -1), text], 2).repeat_interleave(hq // hkv, 1)
        for prefix, text in ((pk, k), (pv, v))
    )
    scores = (q @ keys.mT) * (d**-0.5 if scale is None else scale)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    prefix, text = scores[..., : pk.shape[-2]], scores[..., pk.shape[-2] :]
    if mask is not None:
        text = text.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else text + mask
    if causal:
        seen = torch.arange(length, device=q.device) <= torch.arange(s, device=q.device)[:, None] + (length - s)
        text = text.masked_fill(~seen, -math.inf)
    weights = torch.cat([prefix, text], -1).softmax(-1).to(q.dtype)
    return dropout(weights, p, seed) @ values


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pk: Tensor,
    pv: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Fused attention with a prefix; arguments and result as `reference`.

    Saves its inputs, the output, and of each query the highest score and the sum of exponentials; gradients of a
    prefix [Hkv, T, D] are summed over the batch in a fixed order. `mask` gets no gradient. On a GPU many queries
    without dropout go to PyTorch's fused attention over the concatenation, which is faster there. Raises ValueError for
    shapes that do not fit, dtypes that are no floating ones, a seed that is none and for p outside [0, 1); TypeError
    for a scale that requires grad.
    """
    _check(q, k, v, pk, pv, mask)
    check_dropout(p, seed, q)
    dtype = autocast_dtype(q)
    q, k, v = cast(q, dtype), cast(k, dtype), cast(v, dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else number("prefix_attention", scale)
    if p > 0.0 and seed is None:
        seed = new_seed(q.device)
    backend = choose(
        "prefix_attention", q, pk, D=q.shape[3], T=pk.shape[-2], L=k.shape[2], S=q.shape[2],
        rows=math.prod(q.shape[:3]), plain=p == 0.0,
    )  # fmt: skip
    empty = 0 in (*q.shape, *k.shape, *pk.shape)
    if backend == "reference" and p == 0.0 and q.is_cuda and not empty and not transformed():
        return _concatenated(q, k, v, pk, pv, mask, causal, scale)
    if backend == "reference" or empty:
        return reference(q, k, v, pk, pv, mask=mask, causal=causal, scale=scale, p=p, seed=seed)
    if mask is not None:
        mask = _rows(mask.detach() if mask.dtype == torch.bool else mask.detach().to(torch.float32))
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out: Tensor = _differentiable(q, k, v, pk, pv, mask, causal, scale, p, seed, backend)[0]
    return out


def _concatenated(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """The same as PyTorch has it: its fused attention over the concatenation."""
    (b, hq, s, _), (hkv, length), t = q.shape, k.shape[1:3], pk.shape[-2]
    keys, values = (
        torch.cat([prefix.to(q.dtype).expand(b, hkv, -1, -1), text], 2) for prefix, text in ((pk, k), (pv, v))
    )
    bias: Any = None
    if causal and mask is None and 1 < s <= length:  # every query sees the whole prefix, so that the corner is the end
        from torch.nn.attention.bias import causal_lower_right  # brings torch._dynamo

        bias = causal_lower_right(s, t + length)
    elif mask is not None or (causal and s > 1):
        seen = torch.ones(1, 1, s, length, dtype=torch.bool, device=q.device) if mask is None else mask.detach()
        seen = seen if seen.dtype == torch.bool else seen.to(q.dtype)
        if causal:
            hidden = torch.ones(s, length, dtype=torch.bool, device=q.device).triu(length - s + 1)
            seen = seen.masked_fill(hidden, False if seen.dtype == torch.bool else -math.inf)
        bias = F.pad(seen, (t, 0), value=seen.dtype == torch.bool)
    if hq != hkv and s == 1 and mask is None:  # a group's queries as rows of one head: its keys are not repeated
        return F.scaled_dot_product_attention(q.reshape(b, hkv, hq // hkv, -1), keys, values, scale=scale).view(q.shape)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scale, enable_gqa=hq != hkv)


_FEW_QUERIES = 16
"""Queries of a head up to which not building the concatenation is worth more than PyTorch's faster products."""


def _concatenation_is_faster(
    backend: str, _dtype: torch.dtype, *, S: int = 0, plain: int = False, **_sizes: int
) -> str | None:
    if backend == "triton" and plain and S > _FEW_QUERIES:
        return f"{S} queries a head, no dropout: attention over the concatenation is faster above {_FEW_QUERIES}"
    return None


dispatch.limit("prefix_attention", _concatenation_is_faster)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pk: Tensor,
    pv: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    q, k, v = (_rows(t) for t in (q, k, v))
    out, norm = kernel(backend, "prefix_attention").forward(
        q, k, v, _prefix(pk, q), _prefix(pv, q), mask, causal, scale, p, seed
    )
    return out, norm


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pk: Tensor,
    pv: Tensor,
    mask: Tensor | None,
    out: Tensor,
    norm: Tensor,
    causal: bool,
    scale: float,
    p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, dout = (_rows(t) for t in (q, k, v, dout))
    dq, dk, dv, dpk, dpv = kernel(backend, "prefix_attention").backward(
        dout, q, k, v, _prefix(pk, q), _prefix(pv, q), mask, out, norm, causal, scale, p, seed
    )
    if pk.dim() == 3:
        dpk, dpv = dpk.sum(0), dpv.sum(0)
    return dq, dk, dv, dpk.to(pk.dtype), dpv.to(pv.dtype)


def _rows(t: Tensor) -> Tensor:
    """Unit stride along the last dimension; copies only where it has another."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _prefix(prefix: Tensor, q: Tensor) -> Tensor:
    """[B, Hkv, T, D] in q's dtype, expanded over the batch without a copy."""
    rows = _rows(prefix.to(q.dtype))
    return rows if rows.dim() == 4 else rows.expand(q.shape[0], -1, -1, -1)


def _fake(q: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(2, *q.shape[:3], dtype=torch.float32)


def _backward_fake(
    _dout: Tensor, q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape),
        pk.new_empty(pk.shape), pv.new_empty(pv.shape),
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, pk, pv, mask, ctx.causal, ctx.scale, ctx.p, seed, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, pk, pv, mask, output[0], output[1], seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(backward: Any, ctx: Any, dout: Tensor | None, _dnorm: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 11
    q, k, v, pk, pv, mask, out, norm, seed = ctx.saved_tensors
    grads = backward(dout, q, k, v, pk, pv, mask, out, norm, ctx.causal, ctx.scale, ctx.p, seed, ctx.backend)
    return (*(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), *(None,) * 6)


_differentiable = autograd(
    "prefix_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor pk, Tensor pv, Tensor? mask, bool causal, float scale, float p, "
    "Tensor? seed, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor pk, Tensor pv, Tensor? mask, Tensor out, Tensor norm, "
    "bool causal, float scale, float p, Tensor? seed, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _setup_context,
    _gradients,
)


def _check(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, mask: Tensor | None) -> None:
    check_floating("q", q)
    if not _chained(q, k, v, pk, pv):
        shapes = [tuple(t.shape) for t in (q, k, v, pk, pv)]
        raise ValueError(
            f"q, k, v, pk, pv {shapes}: want q [B, Hq, S, D], k and v [B, Hkv, L, D], "
            "pk and pv [Hkv, T, D] or [B, Hkv, T, D], Hq a multiple of Hkv"
        )
    if mask is None:
        return
    (b, hq, s), length = q.shape[:3], k.shape[2]
    # Not `in`: dynamo finds no integer in a tuple of symbolic ones.
    fits = mask.dim() == 4 and all(n == 1 or n == want for n, want in zip(mask.shape[:3], (b, hq, s), strict=True))
    if not fits or mask.shape[3] != length or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"mask {mask.dtype} {tuple(mask.shape)}: want bool or floating [{b} or 1, {hq} or 1, {s} or 1, {length}]"
        )


def _chained(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> bool:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or pk.dim() not in (3, 4) or pk.shape != pv.shape:
        return False
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        return False
    if pk.dim() == 4 and pk.shape[0] != q.shape[0]:
        return False
    return pk.shape[-3] == k.shape[1] and pk.shape[-1] == q.shape[3]


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cases for tests and benchmarks: (readable id, keyword arguments)."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int, dt: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dt)

    def case(b: int, hq: int, hkv: int, s: int, length: int, t: int, d: int, dt: torch.dtype = dtype) -> dict[str, Any]:
        return {
            "q": rand(b, hq, s, d),
            "k": rand(b, hkv, length, d),
            "v": rand(b, hkv, length, d),
            "pk": rand(hkv, t, d, dt=dt),
            "pv": rand(hkv, t, d, dt=dt),
        }

    def padded(b: int, length: int, left: bool) -> Tensor:
        keep = torch.arange(length) < (length - 2 * torch.arange(b))[:, None]
        return (keep.flip(1) if left else keep)[:, None, None, :].to(device)

    def heads_last(b: int, h: int, n: int, d: int) -> Tensor:
        return rand(b, n, h, d).transpose(1, 2)

    seed = torch.tensor([987654321], device=device)
    yield "full", case(2, 3, 3, 9, 9, 5, 16)
    yield "causal", case(2, 2, 2, 17, 17, 4, 32) | {"causal": True}
    yield "cached", case(2, 4, 2, 5, 23, 3, 8) | {"causal": True}
    yield "longer-queries", case(2, 2, 2, 19, 13, 6, 16) | {"causal": True}
    yield "grouped", case(2, 6, 2, 11, 11, 7, 24) | {"causal": True, "scale": 0.4}
    yield "decode", case(1, 8, 2, 1, 67, 20, 24)
    yield "one-key-each", case(6, 4, 4, 1, 1, 1, 16)
    yield "right-padded", case(3, 2, 2, 12, 12, 6, 16) | {"mask": padded(3, 12, False)}
    yield "left-padded-causal", case(4, 2, 1, 13, 13, 6, 40) | {"mask": padded(4, 13, True), "causal": True}
    blind = torch.ones(3, 1, 9, 9, dtype=torch.bool).tril()
    blind[1, :, :5] = False
    yield "rows-without-text", case(3, 2, 2, 9, 9, 3, 16) | {"mask": blind.to(device)}
    yield "additive", case(2, 4, 2, 6, 10, 3, 16) | {"mask": rand(2, 4, 6, 10)}
    lowest = torch.zeros(1, 1, 8, 8, dtype=dtype, device=device).masked_fill(
        ~torch.ones(8, 8, dtype=torch.bool, device=device).tril(), torch.finfo(dtype).min
    )
    yield "lowest-as-mask", case(4, 2, 2, 8, 8, 3, 8) | {"mask": lowest}
    yield "odd-tiles", case(1, 2, 1, 70, 73, 21, 66) | {"causal": True}
    yield "odd-tiles-padded", case(2, 1, 1, 67, 67, 33, 128) | {"mask": padded(2, 67, False)}
    per_row = case(3, 2, 2, 5, 5, 4, 16)
    yield "prefix-per-row", per_row | {"pk": rand(3, 2, 4, 16), "pv": rand(3, 2, 4, 16)}
    swapped = case(2, 4, 2, 10, 10, 5, 16)
    swapped |= {"q": heads_last(2, 4, 10, 16), "k": heads_last(2, 2, 10, 16), "v": heads_last(2, 2, 10, 16)}
    yield "heads-last", swapped | {"causal": True}
    yield "strided", case(2, 2, 2, 6, 6, 5, 16) | {"q": rand(2, 2, 6, 32)[..., ::2], "v": rand(2, 2, 6, 40)[..., :16]}
    yield "dropout", case(2, 4, 2, 19, 19, 5, 16) | {"causal": True, "p": 0.3, "seed": seed}
    yield "dropout-decode", case(2, 4, 2, 1, 33, 5, 16) | {"p": 0.2, "seed": seed, "scale": 0.1}
    yield "no-text", case(2, 2, 2, 3, 0, 5, 16)
    yield "empty-batch", case(0, 2, 2, 3, 3, 5, 16)
    if dtype in (torch.bfloat16, torch.float16):
        yield "f32-prefix", case(2, 4, 2, 9, 9, 5, 32, torch.float32) | {"causal": True}


OP = Op(
    "prefix_attention", prefix_attention, reference, samples,
    frozen=("mask",), rows=("q", "k", "v", "mask"), compiled=("grouped", "right-padded", "dropout"),
    # Backward takes Σ p dp as dout · out, in one pass, as flash attention does: with few keys it does not cancel as
    # exactly as the softmax that keeps all probabilities. Seen in f32: up to 2.8 times PyTorch's error.
    factor=3.0,
)  # fmt: skip
