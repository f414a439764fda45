"""Low-rank update of a frozen linear map: y = base(x) + s · B(A · drop(x)), optionally with its columns scaled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from peftkern import dispatch
from peftkern.ops._draw import Draw
from peftkern.ops._op import (
    Op,
    autocast_dtype,
    autograd,
    cast,
    choose,
    kernel,
    requires_grad,
    rows,
    shaped,
    tracked,
    writable,
)
from peftkern.ops._operands import check_base, number, of_one_dtype, sizes
from peftkern.ops._scales import epilogue, operands, unfolded
from peftkern.ops.dropout import check_dropout, dropout, new_seed


def reference(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base_out: Tensor | None = None,
    column_scale: Tensor | None = None,
    rank_scale: Tensor | None = None,
    update_scale: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """base + s · (drop(x) Aᵀ) Bᵀ in the base's dtype, where base is x Wᵀ + bias, `base_out`, or nothing.

    With column_scale c [N] all but the bias is scaled: bias + c ⊙ (base - bias + s · (drop(x) Aᵀ) Bᵀ).
    rank_scale d [R] and update_scale e [N] scale the update alone: s · e ⊙ (d ⊙ drop(x) Aᵀ) Bᵀ.
    x [..., K] · a [R, K] · b [N, R] · weight [N, K] · bias [N] · base_out [..., N] -> [..., N].
    x f16/bf16/f32/f64; a, b and c may be f32 while x is half: update and scaling are then computed in f32. The result
    has base_out's dtype, x's without one.
    Source: Hu et al. 2021 (arXiv:2106.09685), eq. 3; column scale: Liu et al. 2024 (arXiv:2402.09353), eq. 5;
    rank and update scale: Kopiczko et al. 2024 (arXiv:2310.11454), eq. 2.
    The oracle: never optimise it.
    """
    _check(x, a, b, weight, bias, base_out, column_scale, rank_scale, update_scale)
    compute = torch.promote_types(torch.promote_types(x.dtype, a.dtype), b.dtype)
    hidden = dropout(x.to(compute), p, seed) @ a.to(compute).T
    if rank_scale is not None:
        hidden = hidden * rank_scale.to(compute)
    update = scale * (hidden @ b.to(compute).T)
    y = (update if update_scale is None else update * update_scale.to(compute)).to(x.dtype)
    if base_out is not None:
        return _onto(base_out, y, bias, column_scale)
    if weight is not None and column_scale is None:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)) + y
    if weight is not None:
        y = F.linear(x, weight.to(x.dtype)) + y
    return _scaled(y, bias, column_scale)


def _onto(base_out: Tensor, update: Tensor, bias: Tensor | None, column_scale: Tensor | None) -> Tensor:
    """bias + c ⊙ (base_out - bias + update) in base_out's dtype."""
    base = base_out if bias is None else base_out - bias.to(base_out.dtype)
    return _scaled(base + update.to(base.dtype), bias, column_scale)


def _scaled(y: Tensor, bias: Tensor | None, column_scale: Tensor | None) -> Tensor:
    y = y if column_scale is None else (column_scale * y).to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def low_rank(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base_out: Tensor | None = None,
    column_scale: Tensor | None = None,
    rank_scale: Tensor | None = None,
    update_scale: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Fused base + s · (drop(x) Aᵀ) Bᵀ; arguments and result as `reference`.

    With `weight` [N, K] the frozen linear itself runs inside, and backward writes dx once. With `base_out` the update
    lands on that tensor; `overwrite` says that it is a fresh one which nobody else reads, so that without a graph the
    result may take its place. With neither the update alone is returned. A call that is small and plain (no dropout, no
    scales, one dtype) is three products of PyTorch, faster there than any kernel's launch: see `_WORTH_A_CALL`. Saves
    x, h = drop(x) Aᵀ [M, R] in f32 and the seed; the dropout mask is regenerated in backward.

    The column scale is part of the same epilogue. When it is trained, the base's output z₀ (x Wᵀ, or `base_out`) is
    saved as well, M · N elements, and dc[n] = Σ_m dy · z₀ + s · Σ_r b ⊙ (dyᵀ h) comes from the pass over dy that db
    needs anyway. Taking z₀ + update back out of y as (y - bias) / c would save nothing extra where the next op keeps y,
    but has no answer for c = 0, and in half precision none for a bias much larger than what it is added to (keys and
    queries have such). Backward multiplies the rows of `weight` or dy by c, whichever is smaller, and the rows of b.

    Rank and update scale are folded into a copy of b that lives as long as the call, in backward again: what is saved
    are the two vectors. Their gradients come from db.

    A `weight` or `bias` that requires grad gets its gradient through the plain linear layer.
    Raises ValueError for shapes that do not chain, dtypes that are no floating ones, a seed that is none and for p
    outside [0, 1); TypeError for a scale that requires grad.
    """
    m, k, n, r = _check(x, a, b, weight, bias, base_out, column_scale, rank_scale, update_scale)
    if p != 0.0 or seed is not None:
        check_dropout(p, seed, x)
    if type(scale) is not float:
        scale = number("low_rank", scale)
    x = cast(x, autocast_dtype(x))
    if a.dtype != b.dtype:
        a, b = of_one_dtype(a, b)
    if p > 0.0 and seed is None:
        seed = new_seed(x.device)
    if base_out is not None and base_out.dtype != x.dtype:
        update = low_rank(x, a, b, scale=scale, rank_scale=rank_scale, update_scale=update_scale, p=p, seed=seed)
        return _onto(base_out, update, bias, column_scale)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled() and column_scale is not None:
        base_out = None if base_out is None else base_out - bias.to(base_out.dtype)
        y = low_rank(
            x, a, b, scale=scale, weight=weight, base_out=base_out, column_scale=column_scale, rank_scale=rank_scale,
            update_scale=update_scale, p=p, seed=seed,
        )  # fmt: skip
        return y + bias.to(y.dtype)
    if weight is not None and torch.is_grad_enabled() and requires_grad(weight, bias):
        base_out, weight = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)), None
        bias = bias if column_scale is not None else None
    scales = column_scale, rank_scale, update_scale
    plain = p == 0.0 and column_scale is None and rank_scale is None and update_scale is None
    plain = plain and x.dtype == a.dtype == b.dtype
    backend = choose("low_rank", x, a, M=m, K=k, N=n, R=r, plain=plain)
    if backend == "reference" or r == 0 or k == 0 or n == 0:
        if plain and r > 0 and k > 0:
            return _three_products(x, a, b, scale, weight, bias, base_out, overwrite)
        return reference(
            x, a, b, scale=scale, weight=weight, bias=bias, base_out=base_out, column_scale=column_scale,
            rank_scale=rank_scale, update_scale=update_scale, p=p, seed=seed,
        )  # fmt: skip
    if not tracked():
        if weight is not None and column_scale is None and not _update_first(x, backend):
            base_out, weight = F.linear(x, cast(weight, x.dtype), None if bias is None else cast(bias, x.dtype)), None
            overwrite = True
        if base_out is not None and overwrite and writable(base_out):
            if x.numel():
                kernel(backend, "low_rank").forward(
                    rows(x), *operands(x, a, b, rank_scale, update_scale), rows(base_out),
                    scale, p, seed, None, *epilogue(column_scale, bias, True),
                )  # fmt: skip
                increment_version(base_out)
            return base_out
    keep = column_scale is not None and column_scale.requires_grad and torch.is_grad_enabled()
    out: Tensor = _differentiable(x, a, b, weight, bias, base_out, *scales, scale, p, seed, backend, keep)[0]
    return out


def _three_products(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    weight: Tensor | None,
    bias: Tensor | None,
    base_out: Tensor | None,
    overwrite: bool,
) -> Tensor:
    """base + s · (x Aᵀ) Bᵀ as PyTorch has it, for sizes where a kernel of our own costs more to call than it saves."""
    if weight is not None:
        base_out = F.linear(x, cast(weight, x.dtype), None if bias is None else cast(bias, x.dtype))
        overwrite = True
    hidden = F.linear(x, a)
    if base_out is None:
        return scale * F.linear(hidden, b)
    if overwrite and not tracked() and writable(base_out):
        rows(base_out).addmm_(rows(hidden), b.T, alpha=scale)
        return base_out
    # Backward multiplies by the scale once here, and twice after addmm.
    return torch.add(base_out, F.linear(hidden, b), alpha=scale)


_WORTH_A_CALL = {torch.float32: 1 << 16, torch.bfloat16: 1 << 10, torch.float16: 1 << 10}
"""M · (K + N) from which the cpu backend is not slower than three products, forward and backward together, where they
are all that PyTorch needs: bench/overhead.py, 2 threads of an AMD EPYC."""
_WORTH_A_LAUNCH = 1 << 18
"""The same for the triton backend: a launch of Triton's costs what two or three of PyTorch's do (H200, small layers and
32 rows of a 4096 x 4096 layer in a decoding step)."""


def _call_costs_more(
    backend: str, dtype: torch.dtype, *, M: int, K: int = 0, N: int = 0, R: int = 0, plain: int = False
) -> str | None:
    least = {"cpu": _WORTH_A_CALL[dtype], "triton": _WORTH_A_LAUNCH}.get(backend, 0)
    if plain and M * (K + N) < least:
        return f"{M} x ({K} + {N}) elements, no dropout: below {least} torch's products are faster than the call"
    return None


dispatch.limit("low_rank", _call_costs_more)


def _forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_out: Tensor | None,
    column_scale: Tensor | None,
    rank_scale: Tensor | None,
    update_scale: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, h and, when the gradient of column_scale will want it, x Wᵀ (`base_out` is an input)."""
    x2, n = rows(x), b.shape[0]
    if weight is not None and column_scale is None and _update_first(x2, backend):
        y, shift = x.new_empty(x2.shape[0], n), None if bias is None else bias.detach().float().contiguous()
        small = operands(x, a, b, rank_scale, update_scale)
        h = kernel(backend, "low_rank").forward(x2, *small, y, scale, p, seed, None, None, shift, True)
        y.addmm_(x2, cast(weight, x.dtype).T)
        return shaped(y, x), h, None
    base: Tensor | None = None
    if weight is not None:
        inside = cast(bias, x.dtype) if bias is not None and column_scale is None else None
        base = F.linear(x2, cast(weight, x.dtype), inside)
    elif base_out is not None:
        base = base_out.reshape(x2.shape[0], n)
        base = base if base.stride(-1) == 1 else base.contiguous()
    if base is None:
        y = x.new_zeros(x2.shape[0], n)
    elif keep or base_out is not None:
        y = x.new_empty(x2.shape[0], n)
    else:
        y = base
    if x2.shape[0] == 0:
        h = x.new_empty(0, a.shape[0], dtype=torch.float32)
    else:
        h = kernel(backend, "low_rank").forward(
            x2, *operands(x, a, b, rank_scale, update_scale), y, scale, p, seed, None if base is y else base,
            *epilogue(column_scale, bias, base_out is not None),
        )  # fmt: skip
    kept = base if keep and weight is not None else None
    return shaped(y, x), h, kept


def _update_first(x: Tensor, backend: str) -> bool:
    """Whether to write bias and update first and let the base's product accumulate onto them: one pass over y less.

    On the CPU F.linear copies its bias into the output and accumulates as well; in half precision oneDNN's sum would
    take a pass of its own. On a GPU cuBLAS reads what it accumulates onto while it multiplies: 1% of its time.
    """
    if backend == "triton":
        return x.numel() > 0
    return backend == "cpu" and x.dtype == torch.float32 and x.numel() > 16 * x.shape[-1]


def _backward(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    column_scale: Tensor | None,
    rank_scale: Tensor | None,
    update_scale: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """dx, da, db, dc, and the gradients of rank and update scale.

    `bias` is given only where `base` holds it, which is not part of what is scaled.
    """
    need_x, need_a, need_b, need_c, need_d, need_e = needs
    dy2, x2 = rows(dy), rows(x)
    c = None if column_scale is None else column_scale.detach().float().contiguous()
    dx: Tensor | None = None
    first = need_x and backend == "triton"
    if first:
        dx = x.new_empty(x2.shape)
    elif need_x:
        dx = x.new_zeros(x2.shape) if weight is None else torch.mm(*_input_gradient(dy2, weight, c))
    if x2.shape[0] == 0:
        like = zip((a, b, column_scale, rank_scale, update_scale), needs[1:], strict=True)
        zeros = (t.new_zeros(t.shape) if need and t is not None else None for t, need in like)
        return None if dx is None else shaped(dx, x), *zeros
    base2 = rows(base) if need_c and base is not None else None
    dc = dy2.new_zeros(b.shape[0], dtype=torch.float32) if need_c else None
    wide_a, wide_b = operands(x, a, b, rank_scale, update_scale, c is not None)
    scaled = wide_b if c is None else (wide_b * c.to(wide_b.dtype)[:, None]).contiguous()
    da, db = kernel(backend, "low_rank").backward(
        dy2, x2, wide_a, scaled, h, dx, scale, p, seed, need_a, need_b or need_c or need_d or need_e,
        base2, None if base2 is None else dc, *[True] * first,
    )  # fmt: skip
    if first and dx is not None and weight is not None:
        dx.addmm_(*_input_gradient(dy2, weight, c))
    if dc is not None:
        dc += (wide_b * db).sum(1)
        if bias is not None:
            dc -= bias * dy2.sum(0, dtype=torch.float32)
    if c is not None and (need_b or need_d or need_e):
        db *= c[:, None]
    db, dd, de = unfolded(db, b, rank_scale, update_scale, need_b, need_d, need_e)
    return (
        None if dx is None else shaped(dx, x),
        cast(da, a.dtype) if need_a else None,
        None if db is None else cast(db, b.dtype),
        None if dc is None or column_scale is None else cast(dc, column_scale.dtype),
        None if dd is None or rank_scale is None else cast(dd, rank_scale.dtype),
        None if de is None or update_scale is None else cast(de, update_scale.dtype),
    )


def _input_gradient(dy: Tensor, weight: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factors of (c ⊙ dy) W, where c multiplies the smaller of the two."""
    weight = cast(weight, dy.dtype)
    if c is None:
        return dy, weight
    c = c.to(dy.dtype)
    return (dy, weight * c[:, None]) if weight.shape[1] < dy.shape[0] else (dy * c, weight)


def _fake(
    x: Tensor, a: Tensor, b: Tensor, weight: Any, bias: Any, base_out: Any, column_scale: Any, rank_scale: Any,
    update_scale: Any, scale: Any, p: Any, seed: Any, backend: str, keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    m, n = math.prod(x.shape[:-1]), b.shape[0]
    kept = x.new_empty(m, n) if keep and weight is not None else None
    return x.new_empty(*x.shape[:-1], n), x.new_empty(m, a.shape[0], dtype=torch.float32), kept


def _backward_fake(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, h: Any, weight: Any, bias: Any, base: Any, column_scale: Any,
    rank_scale: Any, update_scale: Any, scale: Any, p: Any, seed: Any, backend: str, needs: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    like = (x, a, b, column_scale, rank_scale, update_scale)
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if need else None
        for t, need in zip(like, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, a, b, weight, bias, base_out, column_scale, rank_scale, update_scale, ctx.scale, ctx.p, seed = inputs[:12]
    ctx.backend, keep = inputs[12:]
    base = (output[2] if base_out is None and weight is not None else base_out) if keep else None
    bias = bias if keep and base_out is not None else None
    ctx.save_for_backward(x, a, b, output[1], weight, bias, base, column_scale, rank_scale, update_scale, seed)
    ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
    ctx.set_materialize_grads(False)


def _gradients(backward: Any, ctx: Any, dy: Tensor | None, *_others: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 14
    x, a, b, h, weight, bias, base, c, d, e, seed = ctx.saved_tensors
    need = ctx.needs_input_grad
    needs = [*need[:3], *need[6:9]]
    dx, da, db, *scales = (
        grad if wanted else None
        for grad, wanted in zip(
            backward(dy, x, a, b, h, weight, bias, base, c, d, e, ctx.scale, ctx.p, seed, ctx.backend, needs),
            needs,
            strict=True,
        )
    )
    d_base = None
    if need[5]:
        d_base = dy if c is None else dy * c.to(dy.dtype)
    return dx, da, db, None, None, d_base, *scales, None, None, None, None, None


_differentiable = autograd(
    "low_rank",
    "(Tensor x, Tensor a, Tensor b, Tensor? weight, Tensor? bias, Tensor? base_out, Tensor? column_scale, "
    "Tensor? rank_scale, Tensor? update_scale, float scale, float p, Tensor? seed, str backend, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    "(Tensor dy, Tensor x, Tensor a, Tensor b, Tensor h, Tensor? weight, Tensor? bias, Tensor? base, "
    "Tensor? column_scale, Tensor? rank_scale, Tensor? update_scale, float scale, float p, Tensor? seed, str backend, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _setup_context,
    _gradients,
)


def _check(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_out: Tensor | None,
    column_scale: Tensor | None,
    rank_scale: Tensor | None,
    update_scale: Tensor | None,
) -> tuple[int, int, int, int]:
    """M, K, N, R."""
    m, k, n, r = sizes(x, a, b)
    check_base(x, k, n, weight, base_out)
    inside = weight is not None or (base_out is not None and column_scale is not None)
    if bias is not None and (not inside or bias.shape != (n,)):
        raise ValueError(
            f"bias {tuple(bias.shape)}: want [N] = {(n,)}, together with weight, or with base_out and column_scale"
        )
    columns, ranks = ("column_scale", column_scale, "N", n), ("rank_scale", rank_scale, "R", r)
    for name, vector, letter, size in (columns, ("update_scale", update_scale, "N", n), ranks):
        if vector is not None and vector.shape != (size,):
            raise ValueError(f"{name} {tuple(vector.shape)}: want [{letter}] = {(size,)}")
    return m, k, n, r


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
    yield "bias-rows40", case((5, 8), 50, 61, 8) | {"bias": rand(61), "p": 0.1, "seed": seed}
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
    scaled = case((3, 5), 72, 50, 8) | {"column_scale": rand(50)}
    scaled["column_scale"][:2] = torch.tensor([0.0, 1e-3])
    yield "scaled", scaled | {"bias": rand(50), "p": 0.1, "seed": seed}
    if dtype in (torch.bfloat16, torch.float16):
        mixed = case((67,), 40, 56, 8, torch.float32) | {"bias": 8 * rand(56), "p": 0.1, "seed": seed}
        yield "scaled-f32-adapters", mixed | {"column_scale": rand(56, dt=torch.float32)}
    yield "scaled-few-rows", case((3,), 40, 130, 4) | {"column_scale": rand(130)}
    yield "scaled-update", without | {"column_scale": rand(40)}
    onto = without | {"base_out": rand(6, 3, 40), "column_scale": rand(40), "p": 0.2, "seed": seed}
    yield "scaled-onto-base", onto | {"bias": rand(40)}
    yield "scaled-onto-strided-base", onto | {"base_out": rand(6, 3, 80)[..., ::2]}
    vectors = {"rank_scale": rand(8), "update_scale": rand(50)}
    yield "two-scales", case((3, 5), 72, 50, 8) | vectors | {"bias": rand(50), "p": 0.1, "seed": seed}
    yield "three-scales", scaled | vectors
    if dtype in (torch.bfloat16, torch.float16):
        f32 = {name: v.float() for name, v in vectors.items()}
        yield "two-scales-f32-adapters", case((67,), 40, 50, 8, torch.float32) | f32
    yield "rank-scale-onto-base", without | {"base_out": rand(6, 3, 40), "rank_scale": rand(4)}
    yield "update-scale-update-only", without | {"update_scale": rand(40)}
    yield "two-scales-zero-rows", case((0,), 16, 16, 4) | {"rank_scale": rand(4), "update_scale": rand(16)}
    yield "scaled-zero-rows", case((0,), 16, 16, 4) | {"column_scale": rand(16)}


def draw(draw: Draw) -> dict[str, Any]:
    """A random case."""
    lead, k, n, r, adapter = draw.lead(), draw.size(), draw.size(), draw.size(65), draw.adapter_dtype()
    p, seed = draw.dropout()
    a, b = draw.randn(r, k, dtype=adapter) / k**0.5, draw.randn(n, r, dtype=adapter) / r**0.5
    case = {"x": draw.randn(*lead, k), "a": a, "b": b, "scale": draw.one_of([1.0, 0.5, -2.0]), "p": p, "seed": seed}
    case["column_scale"] = draw.maybe(draw.randn(n, dtype=adapter))
    case["rank_scale"] = draw.maybe(draw.randn(r, dtype=adapter))
    case["update_scale"] = draw.maybe(draw.randn(n, dtype=adapter))
    base = draw.one_of(["weight", "base_out", "neither"])
    if base == "weight":
        return case | {"weight": draw.randn(n, k) / k**0.5, "bias": draw.maybe(draw.randn(n))}
    return case | ({"base_out": draw.randn(*lead, n)} if base == "base_out" else {})


OP = Op(
    "low_rank", low_rank, reference, samples, draw=draw,
    frozen=("weight", "bias"), rows=("x", "base_out"),
    compiled=("3d-bias-r16", "dropout-r8", "onto-base", "scaled", "scaled-onto-base", "two-scales"),
)  # fmt: skip
