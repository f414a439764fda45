"""What all ops share: the record that tests and benchmarks walk over, and one autograd definition for every path."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern import dispatch
from peftkern.errors import BackendError
from peftkern.ops._draw import Draw

Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Op:
    """An op as tests and benchmarks see it: `run(**kwargs)` against `reference(**kwargs)` for kwargs of `samples`.

    frozen: names of floating-point arguments that never require grad. rows: names of the arguments that share the
    leading dimension of the first one, the batch. compiled: ids of the samples that torch.compile is tested on.
    draw: a random case, contiguous, for the property test, which lays tensors out anew (where tensors are stride-0
    views, so that their values repeat); without it that test varies the layout of `samples` alone.
    factor: how many times PyTorch's own error in the same dtype the op may err; more than twice wants a reason.
    """

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype], Iterator[tuple[str, Kwargs]]]
    frozen: tuple[str, ...] = ()
    rows: tuple[str, ...] = ("x",)
    compiled: tuple[str, ...] = ()
    draw: Callable[[Draw], Kwargs] | None = None
    factor: float = 2.0


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

    forward, backward and their fakes return tensors, None for what is not wanted. `gradients(backward, ctx, *grads)`
    turns upstream gradients into one gradient per argument of `forward`; for an argument that is a list of tensors
    (Tensor[]) into a list, and `ctx.needs_input_grad` has a list in its place.
    Eager calls go straight to an autograd function (a registered op costs tens of microseconds per call from Python);
    torch.compile sees `torch.ops.peftkern.<name>` and `<name>_backward`, opaque and with shapes known.
    """
    op = torch.library.custom_op(f"peftkern::{name}", _filled(forward), mutates_args=(), schema=schema)
    op.register_fake(_filled(fake))
    op_backward = torch.library.custom_op(
        f"peftkern::{name}_backward", _filled(backward), mutates_args=(), schema=backward_schema
    )
    op_backward.register_fake(_filled(backward_fake))
    op.register_autograd(functools.partial(gradients, op_backward), setup_context=setup_context)

    has_lists = "Tensor[]" in schema
    parts = forward, setup_context, functools.partial(gradients, backward)
    function = _function(*(_one_by_one(*parts) if has_lists else parts))
    function.__name__ = function.__qualname__ = name

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        if not torch.is_grad_enabled():
            return forward(*args)
        if not has_lists:
            return function.apply(*args)  # type: ignore[no-untyped-call]
        lengths = tuple(len(arg) if _is_tensors(arg) else None for arg in args)
        return function.apply(lengths, *_flat(args, lengths))  # type: ignore[no-untyped-call]

    return call


def _filled(function: Callable[..., Any]) -> Callable[..., Any]:
    """With an empty tensor for every None that it returns: a registered op must return tensors."""

    @functools.wraps(function)
    def filled(*args: Any) -> Any:
        out = function(*args)
        if not isinstance(out, tuple):
            return out
        like = next(arg for arg in args if isinstance(arg, Tensor))
        return tuple(like.new_empty(0) if item is None else item for item in out)

    return filled


def _function(
    forward: Callable[..., Any], setup_context: Callable[..., None], gradients: Callable[..., Any]
) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = forward(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradients(ctx, *grads)

    return Function


def _one_by_one(
    forward: Callable[..., Any], setup_context: Callable[..., None], gradients: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., None], Callable[..., Any]]:
    """The same for arguments behind `lengths`, whose lists of tensors autograd is given one by one."""

    def flat_forward(lengths: tuple[int | None, ...], *flat: Any) -> Any:
        return forward(*_nested(flat, lengths))

    def flat_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.lengths, *flat = inputs
        with _nested_needs(ctx):
            setup_context(ctx, _nested(flat, ctx.lengths), output)

    def flat_gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        with _nested_needs(ctx):
            found = gradients(ctx, *grads)
        return (None, *_flat(found, ctx.lengths))

    return flat_forward, flat_setup_context, flat_gradients


@contextmanager
def _nested_needs(ctx: Any) -> Iterator[None]:
    needs = ctx.needs_input_grad
    ctx.needs_input_grad = _nested(needs[1:], ctx.lengths)
    try:
        yield
    finally:
        ctx.needs_input_grad = needs


def requires_grad(*args: Any) -> bool:
    """Whether any of the tensors, lists of tensors looked into, requires grad."""
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.requires_grad:
                return True
        elif isinstance(arg, (list, tuple)) and requires_grad(*arg):
            return True
    return False


def _is_tensors(arg: Any) -> bool:
    return isinstance(arg, list) and all(isinstance(item, Tensor) for item in arg)


def _flat(args: Iterable[Any], lengths: Iterable[int | None]) -> list[Any]:
    flat: list[Any] = []
    for arg, length in zip(args, lengths, strict=True):
        flat.extend([arg] if length is None else arg)
    return flat


def _nested(flat: Iterable[Any], lengths: Iterable[int | None]) -> tuple[Any, ...]:
    items = iter(flat)
    return tuple(next(items) if n is None else list(itertools.islice(items, n)) for n in lengths)


def kernel(backend: str, op: str) -> dispatch.Backend:
    """The loaded backend; `dispatch.choose` has already found that it runs."""
    loaded = dispatch.load(backend, op)
    if isinstance(loaded, str):
        raise BackendError(f"{op}: backend {backend!r}: {loaded}")
    return loaded


def _choose_constant(op: str, device: str, dtype: torch.dtype, grad: bool, _forced: str | None) -> str:
    return dispatch.choose(op, torch.device(device), dtype, grad, M=_UNKNOWN_ROWS)


# What torch.compiler.assume_constant_result does, without importing torch._dynamo, which takes longer than torch.
_choose_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


_UNKNOWN_ROWS = 1 << 30
"""Sizes may be symbolic when compiling; a kernel that serves few rows alone is then not the one to take."""


def choose(op: str, x: Tensor, adapter: Tensor, grad: int = False, **dims: int) -> str:
    """Backend for x and an adapter weight; `grad`: one that has a backward.

    When compiling, sizes may be symbolic, so that the choice rests on device and dtype alone.
    """
    dtype = adapter.dtype if adapter.dtype == torch.float64 else x.dtype
    if torch.compiler.is_compiling():
        # A branch, since a probability that changes from call to call makes `grad` symbolic, and a constant is wanted.
        needed = True if grad else False
        return str(_choose_constant(op, x.device.type, dtype, needed, dispatch._forced))
    return dispatch.choose(op, x.device, dtype, grad, **dims)


def tracked() -> bool:
    """Whether autograd or the compiler follows this call, so that its inputs must not be overwritten."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def rows(x: Tensor) -> Tensor:
    """View x [..., C] as [M, C] with unit column stride; copies only where the strides do not allow it."""
    if x.dim() == 2 and x.stride(1) == 1:  # a view of its own would cost a decoding step more than its arithmetic
        return x
    flat = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(math.prod(x.shape[:-1]), 0)
    return flat if flat.stride(1) == 1 else flat.clone(memory_format=torch.contiguous_format)


def shaped(flat: Tensor, like: Tensor) -> Tensor:
    """flat [M, C] in the shape of `like`: the same where that is a matrix, as in `rows`."""
    return flat if like.dim() == 2 else flat.view(like.shape)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in this dtype: `x.to(dtype)` without the call where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that F.linear would compute in for x: x's own, or autocast's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
