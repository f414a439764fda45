"""Scale each column of an activation by its own factor: y = x · s."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from peftkern import dispatch
from peftkern.ops._draw import Draw
from peftkern.ops._op import Op, autograd, cast, choose, kernel, rows, shaped, tracked, writable
from peftkern.ops._operands import check_floating


def reference(x: Tensor, s: Tensor, *, overwrite: bool = False) -> Tensor:
    """y[..., c] = x[..., c] · s[c] in x's dtype; computed in f32 where s is f32 and x is half.

    x [..., C] f16/bf16/f32/f64 · s [C] -> [..., C]. `overwrite` changes nothing here.
    Source: Liu et al. 2022 (arXiv:2205.05638), section 3.3. The oracle: never optimise it.
    """
    _check(x, s)
    compute = torch.promote_types(x.dtype, s.dtype)
    return (x.to(compute) * s.to(compute)).to(x.dtype)


def column_scale(x: Tensor, s: Tensor, *, overwrite: bool = False) -> Tensor:
    """Fused x · s; arguments and result as `reference`.

    overwrite: x is a fresh tensor that nobody else reads, so that without a graph the result may take its place.
    Saves s, and x where s requires grad; backward reads x and dy once for both gradients. The gradient of s is summed
    in f32, in an order that depends on the shape alone. Raises ValueError for shapes that do not fit.
    """
    _check(x, s)
    backend = choose("column_scale", x, s, **_sizes(x, s))
    if backend == "reference" or s.shape[0] == 0:
        y = x * s  # the reference without its conversions, which cost more than the product of a few rows
        return y if y.dtype == x.dtype else y.to(x.dtype)
    if overwrite and not tracked() and writable(x):
        if x.numel():
            flat = rows(x)
            kernel(backend, "column_scale").forward(flat, s.contiguous(), flat)
            increment_version(x)
        return x
    out: Tensor = _differentiable(x, s, backend)
    return out


def _forward(x: Tensor, s: Tensor, backend: str) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        kernel(backend, "column_scale").forward(rows(x), s.contiguous(), rows(y))
    return y


def _backward(
    dy: Tensor, x: Tensor | None, s: Tensor, backend: str, need_x: bool, need_s: bool
) -> tuple[Tensor | None, Tensor | None]:
    if dy.numel() == 0:
        return torch.empty_like(dy) if need_x else None, torch.zeros_like(s) if need_s else None
    x2 = rows(x) if need_s and x is not None else None
    dx, ds = kernel(backend, "column_scale").backward(rows(dy), x2, s.contiguous(), need_x)
    return shaped(dx, dy) if need_x else None, cast(ds, s.dtype) if need_s else None


def _fake(x: Tensor, s: Tensor, backend: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _backward_fake(
    dy: Tensor, x: Tensor | None, s: Tensor, backend: str, need_x: bool, need_s: bool
) -> tuple[Tensor | None, Tensor | None]:
    dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device) if need_x else None
    return dx, s.new_empty(s.shape) if need_s else None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, s, ctx.backend = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, s)
    ctx.set_materialize_grads(False)


def _gradients(backward: Any, ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    x, s = ctx.saved_tensors
    need_x, need_s = ctx.needs_input_grad[:2]
    dx, ds = backward(dy, x, s, ctx.backend, need_x, need_s)
    return dx if need_x else None, ds if need_s else None, None


_differentiable = autograd(
    "column_scale",
    "(Tensor x, Tensor s, str backend) -> Tensor",
    _forward,
    _fake,
    "(Tensor dy, Tensor? x, Tensor s, str backend, bool need_x, bool need_s) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    _setup_context,
    _gradients,
)


_MIXED_FROM, _SAME_FROM = 1 << 17, 1 << 19
"""Elements of x from which the cpu backend is not slower, forward and backward together, where s is wider than x (so
that plain PyTorch makes an f32 copy) and where it is not: bench/column_scale.py, 2 threads of an AMD EPYC."""


def _sizes(x: Tensor, s: Tensor) -> dict[str, int]:
    c = s.shape[0]
    return {"M": x.numel() // c if c else 0, "C": c, "mixed": int(s.dtype.itemsize > x.dtype.itemsize)}


def _launch_costs_more(backend: str, dtype: torch.dtype, *, M: int, C: int = 0, mixed: int = 0) -> str | None:
    least = _MIXED_FROM if mixed else _SAME_FROM
    if backend == "cpu" and 0 < C and M * C < least:  # C is not known while compiling
        return f"{M} x {C} elements: below {least} one multiplication by torch is faster than the launch"
    return None


dispatch.limit("column_scale", _launch_costs_more)


def _check(x: Tensor, s: Tensor) -> None:
    check_floating("x", x)
    if s.dim() != 1 or x.shape[-1:] != s.shape:
        raise ValueError(f"x {tuple(x.shape)}, s {tuple(s.shape)}: want x [..., C], s [C]")


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cases for tests and benchmarks: (readable id, keyword arguments)."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int, dt: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dt)

    yield "7x33", {"x": rand(7, 33), "s": rand(33)}
    yield "3d-64", {"x": rand(2, 5, 64), "s": rand(64)}
    yield "vector", {"x": rand(19), "s": rand(19)}
    yield "one-row", {"x": rand(1, 130), "s": rand(130)}
    yield "one-column", {"x": rand(3, 1), "s": rand(1)}
    yield "zero-rows", {"x": rand(0, 16), "s": rand(16)}
    yield "zero-columns", {"x": rand(3, 0), "s": rand(0)}
    yield "many-rows", {"x": rand(1031, 5), "s": rand(5)}
    yield "wide", {"x": rand(3, 5003), "s": rand(5003)}
    if dtype in (torch.bfloat16, torch.float16):
        yield "f32-scale", {"x": rand(5, 13, 72), "s": rand(72, dt=torch.float32)}
    yield "strided", {"x": rand(6, 80)[:, ::2], "s": rand(80)[::2]}
    yield "row-strided", {"x": rand(6, 80)[:, :40], "s": rand(40)}
    yield "transposed", {"x": rand(40, 6).T, "s": rand(40)}


def draw(draw: Draw) -> dict[str, Any]:
    """A random case."""
    c = draw.size()
    return {"x": draw.randn(*draw.lead(), c), "s": draw.randn(c, dtype=draw.adapter_dtype())}


OP = Op("column_scale", column_scale, reference, samples, draw=draw, compiled=("3d-64", "7x33"))
