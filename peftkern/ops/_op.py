"""What all ops share: the record that tests and benchmarks walk over, and one autograd definition for every path."""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern import dispatch
from peftkern.errors import BackendError

Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Op:
    """An op as tests and benchmarks see it: `run(**kwargs)` against `reference(**kwargs)` for kwargs of `samples`.

    frozen: names of floating-point arguments that never require grad. rows: names of the arguments that share the
    leading dimension of the first one, the batch. compiled: ids of the samples that torch.compile is tested on.
    """

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype], Iterator[tuple[str, Kwargs]]]
    frozen: tuple[str, ...] = ()
    rows: tuple[str, ...] = ("x",)
    compiled: tuple[str, ...] = ()


def every() -> list[Op]:
    """Every op: the modules of `peftkern.ops`, in the order of their names."""
    package = importlib.import_module("peftkern.ops")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    found = (getattr(importlib.import_module(f"peftkern.ops.{name}"), "OP", None) for name in names)
    return [op for op in found if op is not None]


def autograd(
    name: str,
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward_schema: str,
    backward: Callable[..., Any],
    backward_fake: Callable[..., Any],
    setup_context: Callable[..., None],
    gradients: Callable[..., Any],
) -> Callable[..., Any]:
    """Build the differentiable function of an op from its forward and backward.

    `gradients(backward, ctx, *grads)` turns upstream gradients into one gradient per argument of `forward`.
    Eager calls go straight to an autograd function (a registered op costs tens of microseconds per call from Python);
    torch.compile sees `torch.ops.peftkern.<name>` and `<name>_backward`, opaque and with shapes known.
    """
    op = torch.library.custom_op(f"peftkern::{name}", forward, mutates_args=(), schema=schema)
    op.register_fake(fake)
    op_backward = torch.library.custom_op(
        f"peftkern::{name}_backward", backward, mutates_args=(), schema=backward_schema
    )
    op_backward.register_fake(backward_fake)
    op.register_autograd(functools.partial(gradients, op_backward), setup_context=setup_context)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = forward(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradients(backward, ctx, *grads)

    Function.__name__ = Function.__qualname__ = name

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return Function.apply(*args)  # type: ignore[no-untyped-call]
        return forward(*args)

    return call


def kernel(backend: str, op: str) -> dispatch.Backend:
    """The loaded backend; `dispatch.choose` has already found that it runs."""
    loaded = dispatch.load(backend, op)
    if isinstance(loaded, str):
        raise BackendError(f"{op}: backend {backend!r}: {loaded}")
    return loaded


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose_constant(op: str, device: str, dtype: torch.dtype, _forced: str | None) -> str:
    return dispatch.choose(op, torch.device(device), dtype)


def choose(op: str, x: Tensor, adapter: Tensor, **dims: int) -> str:
    """Backend for x and an adapter weight.

    When compiling, sizes may be symbolic, so that the choice rests on device and dtype alone.
    """
    dtype = adapter.dtype if adapter.dtype == torch.float64 else x.dtype
    if torch.compiler.is_compiling():
        return str(_choose_constant(op, x.device.type, dtype, dispatch._forced))
    return dispatch.choose(op, x.device, dtype, **dims)


def tracked() -> bool:
    """Whether autograd or the compiler follows this call, so that its inputs must not be overwritten."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def rows(x: Tensor) -> Tensor:
    """View x [..., C] as [M, C] with unit column stride; copies only where the strides do not allow it."""
    flat = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(math.prod(x.shape[:-1]), 0)
    return flat if flat.stride(1) == 1 else flat.clone(memory_format=torch.contiguous_format)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that F.linear would compute in for x: x's own, or autocast's."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
