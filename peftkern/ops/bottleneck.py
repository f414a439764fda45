"""Bottleneck adapter: y = r + drop(s · (U · act(D · norm(x) + b_d) + b_u))."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.errors import near
from peftkern.ops._draw import Draw
from peftkern.ops._op import Op, autocast_dtype, autograd, cast, choose, kernel, rows, shaped
from peftkern.ops._operands import number, of_one_dtype, sizes
from peftkern.ops.dropout import check_dropout, dropout, new_seed

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def reference(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    activation: str = "relu",
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """residual + drop(s · (act(norm(x) Dᵀ + b_d) Uᵀ + b_u)) in x's dtype, or a wider residual's; gelu is exact (erf).

    x [..., K] · down [R, K] · up [N, R] · down_bias [R] · up_bias [N] · residual [..., N] · norm_weight, norm_bias [K]
    -> [..., N]. Adapter weights may be f32 while x is half: the adapter is then computed in f32.
    Source: Houlsby et al. 2019 (arXiv:1902.00751), section 2.1; scale and parallel form He et al. 2022
    (arXiv:2110.04366), table 1. The oracle: never optimise it.
    """
    _check(x, down, up, down_bias, up_bias, residual, norm_weight, norm_bias, activation)
    compute = torch.promote_types(torch.promote_types(x.dtype, down.dtype), up.dtype)
    normed = _norm(x, norm_weight, norm_bias, norm_eps).to(compute)
    pre = F.linear(normed, down.to(compute), None if down_bias is None else down_bias.to(compute))
    out = F.linear(ACTIVATIONS[activation](pre), up.to(compute), None if up_bias is None else up_bias.to(compute))
    out = dropout(scale * out, p, seed).to(x.dtype)
    return out if residual is None else residual + out


def bottleneck(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    activation: str = "relu",
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Fused bottleneck adapter; arguments and result as `reference`.

    Pass `residual=x` for the sequential adapter: its gradient is then added in the same pass.
    Saves x, the pre-activation [M, R] in f32 and the seed; the dropout mask is regenerated in backward.
    Raises ValueError for shapes that do not chain, dtypes that are no floating ones, an unknown activation, a seed that
    is none and for p outside [0, 1); TypeError for a scale that requires grad.
    """
    m, k, n, r = _check(x, down, up, down_bias, up_bias, residual, norm_weight, norm_bias, activation)
    check_dropout(p, seed, x)
    scale = number("bottleneck", scale)
    dtype = autocast_dtype(x)
    if residual is not None and residual.dtype != dtype:
        added = bottleneck(
            x, down, up, down_bias=down_bias, up_bias=up_bias, norm_weight=norm_weight, norm_bias=norm_bias,
            norm_eps=norm_eps, activation=activation, scale=scale, p=p, seed=seed,
        )  # fmt: skip
        return residual + added
    own = residual is x and norm_weight is None
    x = cast(x, dtype)
    if down.dtype != up.dtype:
        down, up = of_one_dtype(down, up)
    if p > 0.0 and seed is None:
        seed = new_seed(x.device)
    backend = choose("bottleneck", x, down, M=m, K=k, N=n, R=r)
    if backend == "reference" or k == 0 or n == 0 or r == 0:
        return reference(
            x,
            down,
            up,
            down_bias=down_bias,
            up_bias=up_bias,
            residual=residual,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            norm_eps=norm_eps,
            activation=activation,
            scale=scale,
            p=p,
            seed=seed,
        )
    x = _norm(x, norm_weight, norm_bias, norm_eps)
    residual = None if own else residual
    y: Tensor = _differentiable(x, down, down_bias, up, up_bias, residual, own, activation, scale, p, seed, backend)[0]
    return y


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)


def _forward(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    own: bool,
    activation: str,
    scale: float,
    p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    x2 = rows(x)
    if x2.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], up.shape[0]), x.new_empty(0, down.shape[0], dtype=torch.float32)
    r2 = x2 if own else None if residual is None else rows(residual)
    y, pre = kernel(backend, "bottleneck").forward(
        x2, down.contiguous(), None if down_bias is None else down_bias.contiguous(),
        up.contiguous(), None if up_bias is None else up_bias.contiguous(),
        None if r2 is None else r2.contiguous(), activation, scale, p, seed,
    )  # fmt: skip
    return shaped(y, x), pre


def _backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    down: Tensor,
    up: Tensor,
    own: bool,
    activation: str,
    scale: float,
    p: float,
    seed: Tensor | None,
    backend: str,
    need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    dy2, x2 = rows(dy), rows(x)
    r, n = down.shape[0], up.shape[0]
    if x2.shape[0] == 0:
        return (
            x.new_zeros(x.shape), down.new_zeros(down.shape), down.new_zeros(r), up.new_zeros(up.shape), up.new_zeros(n)
        )  # fmt: skip
    dx, d_down, d_down_bias, d_up, d_up_bias = kernel(backend, "bottleneck").backward(
        dy2, x2, pre, down.contiguous(), up.contiguous(), activation, scale, p, seed, own, need_x
    )
    return (
        shaped(dx, x) if need_x else None,
        cast(d_down, down.dtype),
        cast(d_down_bias, down.dtype),
        cast(d_up, up.dtype),
        cast(d_up_bias, up.dtype),
    )


def _fake(x: Tensor, down: Tensor, _db: Any, up: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    m = math.prod(x.shape[:-1])
    return x.new_empty(*x.shape[:-1], up.shape[0]), x.new_empty(m, down.shape[0], dtype=torch.float32)


def _backward_fake(
    dy: Tensor, x: Tensor, pre: Tensor, down: Tensor, up: Tensor, *rest: Any
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if rest[-1] else None
    return (
        dx,
        down.new_empty(down.shape),
        down.new_empty(down.shape[0]),
        up.new_empty(up.shape),
        up.new_empty(up.shape[0]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, down, down_bias, up, up_bias, _, ctx.own, ctx.activation, ctx.scale, ctx.p, seed, ctx.backend = inputs
    ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (down_bias, up_bias)]
    ctx.save_for_backward(x, output[1], down, up, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(backward: Any, ctx: Any, dy: Tensor | None, _dpre: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 12
    x, pre, down, up, seed = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx, d_down, d_down_bias, d_up, d_up_bias = backward(
        dy, x, pre, down, up, ctx.own, ctx.activation, ctx.scale, ctx.p, seed, ctx.backend, need[0]
    )
    grads = (
        dx,
        d_down,
        cast(d_down_bias, ctx.bias_dtypes[0]) if need[2] else None,
        d_up,
        cast(d_up_bias, ctx.bias_dtypes[1]) if need[4] else None,
        dy,
    )
    return tuple(grad if needed else None for grad, needed in zip(grads, need, strict=False)) + (None,) * 6


_differentiable = autograd(
    "bottleneck",
    "(Tensor x, Tensor down, Tensor? down_bias, Tensor up, Tensor? up_bias, Tensor? residual, bool own, "
    "str activation, float scale, float p, Tensor? seed, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    "(Tensor dy, Tensor x, Tensor pre, Tensor down, Tensor up, bool own, str activation, float scale, float p, "
    "Tensor? seed, str backend, bool need_x) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _setup_context,
    _gradients,
)


def _check(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
) -> tuple[int, int, int, int]:
    """M, K, N, R."""
    m, k, n, r = sizes(x, down, up, "x, down, up")
    if down_bias is not None and down_bias.shape != (r,):
        raise ValueError(f"down_bias {tuple(down_bias.shape)}: want [R] = {(r,)}")
    if up_bias is not None and up_bias.shape != (n,):
        raise ValueError(f"up_bias {tuple(up_bias.shape)}: want [N] = {(n,)}")
    if residual is not None and residual.shape != (*x.shape[:-1], n):
        raise ValueError(f"residual {tuple(residual.shape)}: want [..., N] = {(*x.shape[:-1], n)}")
    for name, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector is not None and vector.shape != (k,):
            raise ValueError(f"{name} {tuple(vector.shape)}: want [K] = {(k,)}")
    if norm_bias is not None and norm_weight is None:
        raise ValueError("norm_bias without norm_weight: want both, norm_weight alone, or neither")
    if not isinstance(activation, str):
        raise ValueError(f"activation {activation!r}: want a name, one of {', '.join(ACTIVATIONS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation {activation!r}{near(activation, ACTIVATIONS)}: want one of {', '.join(ACTIVATIONS)}"
        )
    return m, k, n, r


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cases for tests and benchmarks: (readable id, keyword arguments)."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int, dt: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dt)

    def case(lead: tuple[int, ...], k: int, n: int, r: int, dt: torch.dtype = dtype) -> dict[str, Any]:
        return {
            "x": rand(*lead, k),
            "down": rand(r, k, dt=dt) / k**0.5,
            "up": rand(n, r, dt=dt) / r**0.5,
            "down_bias": rand(r, dt=dt),
            "up_bias": rand(n, dt=dt),
        }

    seed = torch.tensor([987654321], device=device)
    for activation in ACTIVATIONS:
        yield f"{activation}-9x40-32-r7", case((9,), 40, 32, 7) | {"activation": activation, "scale": 0.7}
    own = case((3, 5), 66, 66, 16)
    yield "sequential", own | {"residual": own["x"]}
    yield "sequential-dropout", own | {"residual": own["x"], "p": 0.25, "seed": seed, "activation": "gelu"}
    yield "parallel", own | {"residual": rand(3, 5, 66)}
    yield "norm", own | {"residual": own["x"], "norm_weight": rand(66), "norm_bias": rand(66)}
    bare = case((1,), 17, 19, 1)
    yield "one-row-no-bias", {key: bare[key] for key in ("x", "down", "up")}
    yield "zero-rows", case((0,), 16, 16, 4)
    yield "r70-rows67", case((67,), 96, 40, 70) | {"p": 0.1, "seed": seed, "activation": "silu"}
    strided = case((6,), 40, 24, 4)
    yield "strided", strided | {"x": rand(6, 80)[:, ::2]}
    yield "row-strided", strided | {"x": rand(6, 80)[:, :40]}
    if dtype in (torch.bfloat16, torch.float16):
        mixed = case((5, 13), 72, 72, 8, torch.float32)
        yield "f32-adapters", mixed | {"residual": mixed["x"], "p": 0.1, "seed": seed}


def draw(draw: Draw) -> dict[str, Any]:
    """A random case."""
    lead, k, r, dt = draw.lead(), draw.size(), draw.size(65), draw.adapter_dtype()
    form = draw.one_of(["sequential", "parallel", "update alone"])
    n = k if form == "sequential" else draw.size()
    p, seed = draw.dropout()
    x = draw.randn(*lead, k)
    case = {
        "x": x, "down": draw.randn(r, k, dtype=dt) / k**0.5, "up": draw.randn(n, r, dtype=dt) / r**0.5,
        "down_bias": draw.maybe(draw.randn(r, dtype=dt)), "up_bias": draw.maybe(draw.randn(n, dtype=dt)),
        "activation": draw.one_of(list(ACTIVATIONS)), "scale": draw.one_of([1.0, 0.5, -2.0]), "p": p, "seed": seed,
    }  # fmt: skip
    if form == "update alone":
        return case
    return case | {"residual": x if form == "sequential" else draw.randn(*lead, n)}


OP = Op(
    "bottleneck", bottleneck, reference, samples, draw=draw,
    rows=("x", "residual"), compiled=("sequential-dropout", "parallel", "norm"),
)  # fmt: skip
