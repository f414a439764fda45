"""Low-rank update of a frozen linear map: y = base(x) + s · B(A · drop(x))."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.ops._op import Op, autocast_dtype, autograd, choose, kernel, rows, tracked
from peftkern.ops.dropout import check_probability, dropout, new_seed


def reference(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base_out: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """base + s · (drop(x) Aᵀ) Bᵀ in x's dtype, where base is x Wᵀ + bias, `base_out`, or nothing.

    x [..., K] · a [R, K] · b [N, R] · weight [N, K] · bias [N] · base_out [..., N] -> [..., N].
    x f16/bf16/f32/f64; a and b may be f32 while x is half: the update is then computed in f32.
    Source: Hu et al. 2021 (arXiv:2106.09685), eq. 3. The oracle: never optimise it.
    """
    _check(x, a, b, weight, bias, base_out)
    compute = torch.promote_types(x.dtype, a.dtype)
    hidden = dropout(x.to(compute), p, seed) @ a.to(compute).T
    delta = scale * (hidden @ b.to(compute).T)
    if weight is not None:
        base_out = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return delta.to(x.dtype) if base_out is None else (base_out + delta.to(base_out.dtype))


def low_rank(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base_out: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Fused base + s · (drop(x) Aᵀ) Bᵀ; arguments and result as `reference`.

    With `weight` [N, K] the frozen linear itself runs inside, and backward writes dx once. With `base_out` the update
    lands on that tensor, which is consumed: without a graph it is written in place. With neither the update alone
    is returned. Saves x, h = drop(x) Aᵀ [M, R] in f32 and the seed; the dropout mask is regenerated in backward.
    A `weight` or `bias` that requires grad gets its gradient through the plain linear layer.
    Raises ValueError for shapes that do not chain and for p outside [0, 1).
    """
    _check(x, a, b, weight, bias, base_out)
    check_probability(p)
    x = x.to(autocast_dtype(x))
    if p > 0.0 and seed is None:
        seed = new_seed(x.device)
    if weight is not None and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        base_out, weight, bias = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)), None, None
    backend = choose("low_rank", x, a, M=math.prod(x.shape[:-1]), K=a.shape[1], N=b.shape[0], R=a.shape[0])
    if backend == "reference" or min(a.shape[0], a.shape[1], b.shape[0]) == 0:
        return reference(
            x, a, b, scale=scale, weight=weight, bias=bias, base_out=base_out, p=p, seed=seed
        )
    if base_out is not None and not tracked() and _writable(base_out, x):
        if x.numel():
            kernel(backend, "low_rank").forward(
                rows(x), a.contiguous(), b.contiguous(), base_out.view(-1, b.shape[0]), scale, p, seed
            )
        return base_out
    y: Tensor = _differentiable(x, a, b, weight, bias, base_out, scale, p, seed, backend)[0]
    return y


def _writable(base_out: Tensor, x: Tensor) -> bool:
    return base_out.is_contiguous() and base_out.dtype == x.dtype and not base_out.requires_grad


def _forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_out: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    x2 = rows(x)
    shape = (*x.shape[:-1], b.shape[0])
    if weight is not None:
        y = F.linear(x2, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    elif base_out is None:
        y = x.new_zeros(x2.shape[0], b.shape[0])
    else:
        y = base_out.to(x.dtype).reshape(x2.shape[0], -1).clone(memory_format=torch.contiguous_format)
    if x2.shape[0] == 0:
        return y.view(shape), x.new_empty(0, a.shape[0], dtype=torch.float32)
    h = kernel(backend, "low_rank").forward(x2, a.contiguous(), b.contiguous(), y, scale, p, seed)
    return y.view(shape), h


def _backward(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    h: Tensor,
    weight: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    backend: str,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dy2, x2 = rows(dy), rows(x)
    none = x.new_empty(0)
    dx: Tensor | None = None
    if need_x:
        dx = x.new_zeros(x2.shape) if weight is None else torch.mm(dy2, weight.to(dy.dtype))
    if x2.shape[0] == 0:
        return (
            none if dx is None else dx.view(x.shape),
            torch.zeros_like(a) if need_a else none,
            torch.zeros_like(b) if need_b else none,
        )
    da, db = kernel(backend, "low_rank").backward(
        dy2, x2, a.contiguous(), b.contiguous(), h, dx, scale, p, seed, need_a, need_b
    )
    return (
        none if dx is None else dx.view(x.shape),
        da.to(a.dtype) if need_a else none,
        db.to(b.dtype) if need_b else none,
    )


def _fake(
    x: Tensor, a: Tensor, b: Tensor, weight: Any, bias: Any, base_out: Any, scale: Any, p: Any, seed: Any, backend: str
) -> tuple[Tensor, Tensor]:
    m = math.prod(x.shape[:-1])
    return x.new_empty(*x.shape[:-1], b.shape[0]), x.new_empty(m, a.shape[0], dtype=torch.float32)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    h: Any,
    weight: Any,
    scale: Any,
    p: Any,
    seed: Any,
    backend: str,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    none = x.new_empty(0)
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else none,
        a.new_empty(a.shape) if need_a else none,
        b.new_empty(b.shape) if need_b else none,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, a, b, weight, _bias, base_out, ctx.scale, ctx.p, seed, ctx.backend = inputs
    ctx.base_dtype = None if base_out is None else base_out.dtype
    ctx.save_for_backward(x, a, b, output[1], weight, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(backward: Any, ctx: Any, dy: Tensor | None, _dh: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    x, a, b, h, weight, seed = ctx.saved_tensors
    need_x, need_a, need_b = ctx.needs_input_grad[:3]
    dx, da, db = backward(
        dy, x, a, b, h, weight, ctx.scale, ctx.p, seed, ctx.backend, need_x, need_a, need_b
    )
    d_base = dy.to(ctx.base_dtype) if ctx.needs_input_grad[5] else None
    return (
        dx if need_x else None,
        da if need_a else None,
        db if need_b else None,
        None,
        None,
        d_base,
        None,
        None,
        None,
        None,
    )


_differentiable = autograd(
    "low_rank",
    "(Tensor x, Tensor a, Tensor b, Tensor? weight, Tensor? bias, Tensor? base_out, float scale, float p, "
    "Tensor? seed, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    "(Tensor dy, Tensor x, Tensor a, Tensor b, Tensor h, Tensor? weight, float scale, float p, Tensor? seed, "
    "str backend, bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _setup_context,
    _gradients,
)


def _check(
    x: Tensor, a: Tensor, b: Tensor, weight: Tensor | None, bias: Tensor | None, base_out: Tensor | None
) -> None:
    if a.dim() != 2 or b.dim() != 2 or x.dim() < 1 or x.shape[-1] != a.shape[1] or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)}: want x [..., K], a [R, K], b [N, R]"
        )
    n, k = b.shape[0], a.shape[1]
    if weight is not None and weight.shape != (n, k):
        raise ValueError(f"weight {tuple(weight.shape)}: want [N, K] = {(n, k)}")
    if bias is not None and (weight is None or bias.shape != (n,)):
        raise ValueError(f"bias {tuple(bias.shape)}: want [N] = {(n,)}, together with weight")
    if base_out is not None and (weight is not None or base_out.shape != (*x.shape[:-1], n)):
        raise ValueError(f"base_out {tuple(base_out.shape)}: want {(*x.shape[:-1], n)}, without weight")


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cases for tests and benchmarks: (readable id, keyword arguments)."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int, dt: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dt)

    def case(lead: tuple[int, ...], k: int, n: int, r: int, adapter: torch.dtype = dtype) -> dict[str, Any]:
        a, b = rand(r, k, dt=adapter) / k**0.5, rand(n, r, dt=adapter) / r**0.5
        return {"x": rand(*lead, k), "a": a, "b": b, "scale": 0.5, "weight": rand(n, k) / k**0.5}

    seed = torch.tensor([1234567890123], device=device)
    yield "7x33-29-r5", case((7,), 33, 29, 5)
    yield "3d-bias-r16", case((2, 5), 64, 48, 16) | {"bias": rand(48)}
    yield "dropout-r8", case((4, 9), 130, 70, 8) | {"p": 0.3, "seed": seed}
    yield "one-row-r1", case((1,), 17, 19, 1)
    yield "zero-rows", case((0,), 16, 16, 4)
    yield "r70-rows67", case((67,), 96, 40, 70) | {"p": 0.1, "seed": seed}
    if dtype in (torch.bfloat16, torch.float16):
        yield "f32-adapters", case((5, 13), 72, 40, 8, torch.float32) | {"p": 0.1, "seed": seed}
    strided = case((6,), 40, 24, 4)
    yield "strided", strided | {"x": rand(6, 80)[:, ::2]}
    yield "row-strided", strided | {"x": rand(6, 80)[:, :40]}
    without = case((6, 3), 24, 40, 4)
    del without["weight"]
    yield "update-only", without
    yield "onto-base", without | {"base_out": rand(6, 3, 40), "p": 0.2, "seed": seed}


OP = Op(
    "low_rank", low_rank, reference, samples,
    frozen=("weight", "bias"), rows=("x", "base_out"), compiled=("3d-bias-r16", "dropout-r8", "onto-base"),
)  # fmt: skip
