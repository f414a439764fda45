"""What all ops share: the record that tests and benchmarks walk over, and one autograd definition for every path."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from peftkern import dispatch
from peftkern.errors import BackendError
from peftkern.ops._draw import Draw

Kwargs = dict[str, Any]
_unsafe_view = torch.ops.aten._unsafe_view.default
# Looked up once: what follows a call is asked in each.
_dispatch_mode, _FAKE = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.FAKE
_transform = torch._C._functorch.peek_interpreter_stack


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
    Differentiating twice raises BackendError: kernels have no second derivative.
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
    function = _function(name, *(_one_by_one(*parts) if has_lists else parts))

    def call(*args: Any) -> Any:
        if compiling():
            return op(*args)
        if not torch.is_grad_enabled():
            return forward(*args)
        if not has_lists:
            return function.apply(*args)
        lengths = tuple(len(arg) if _is_tensors(arg) else None for arg in args)
        return function.apply(lengths, *_flat(args, lengths))

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
    name: str, forward: Callable[..., Any], setup_context: Callable[..., None], gradients: Callable[..., Any]
) -> Any:
    def run(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        setup_context(ctx, args, output)
        return output

    def backward(ctx: Any, *grads: Any) -> Any:
        # Forward has chosen the dtypes; autocast would choose others for the products in here.
        grad = next((grad for grad in grads if grad is not None), None)
        if grad is None or not (torch.is_grad_enabled() or autocasts(grad)):
            return gradients(ctx, *grads)
        with torch.no_grad(), without_autocast(grad):
            found = gradients(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        followed = (grad.detach().requires_grad_() if isinstance(grad, Tensor) else grad for grad in found)
        return _Once.apply(name, *followed)  # type: ignore[no-untyped-call]

    title = name.title().replace("_", "")  # whose backward is LowRankBackward, in messages and profiles
    return type(title, (torch.autograd.Function,), {"forward": staticmethod(run), "backward": staticmethod(backward)})


class _Once(torch.autograd.Function):
    """Gradients as they are, for a graph of the backward (`create_graph`): to go back through it raises."""

    @staticmethod
    def forward(ctx: Any, name: str, *grads: Tensor | None) -> Any:
        ctx.name = name
        return grads

    @staticmethod
    def backward(ctx: Any, *_grads: Any) -> Any:
        raise BackendError(
            f"{ctx.name}: its kernels have no second derivative; what is differentiated twice wants "
            "peftkern.use_backend('reference')"
        )


def _one_by_one(
    forward: Callable[..., Any], setup_context: Callable[..., None], gradients: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., None], Callable[..., Any]]:
    """The same for arguments behind `lengths`, whose lists of tensors autograd is given one by one."""

    def flat_forward(lengths: tuple[int | None, ...], *flat: Any) -> Any:
        return forward(*_nested(flat, lengths))

    def flat_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.lengths, *flat = inputs
        setup_context(_NestedContext(ctx), _nested(flat, ctx.lengths), output)

    def flat_gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return (None, *_flat(gradients(_NestedContext(ctx), *grads), ctx.lengths))

    return flat_forward, flat_setup_context, flat_gradients


class _NestedContext:
    """An autograd context whose `needs_input_grad` has a list in the place of every list of tensors."""

    def __init__(self, ctx: Any) -> None:
        self.__dict__.update(_ctx=ctx, needs_input_grad=_nested(ctx.needs_input_grad[1:], ctx.lengths))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ctx, name, value)


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
    if compiling():
        # A branch, since a probability that changes from call to call makes `grad` symbolic, and a constant is wanted.
        needed = True if grad else False
        return str(_choose_constant(op, x.device.type, dtype, needed, dispatch._forced))
    if transformed():
        if dispatch._forced not in (None, "reference"):
            raise BackendError(f"{op}: {dispatch._forced!r} was forced, and torch.func cannot see into its kernels")
        return "reference"
    return dispatch.choose(op, x.device, dtype, grad, **dims)


def compiling() -> bool:
    """Whether torch.compile, or a mode of fake tensors (make_fx), follows this call: ops opaque, sizes symbolic."""
    if torch.compiler.is_compiling():
        return True
    return _dispatch_mode(_FAKE) is not None


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation follows this call: they see PyTorch's own functions alone."""
    return forward_ad._current_level >= 0 or _transform() is not None


def tracked() -> bool:
    """Whether autograd, the compiler or a transform follows this call, so that its inputs must not be overwritten."""
    return torch.is_grad_enabled() or compiling() or transformed()


def writable(t: Tensor) -> bool:
    """Whether a result may take the place of `t`: `rows` are a view, and it is no leaf that trains.

    A contiguous tensor of one column may have any stride there, and `rows` copies where it is not 1.
    """
    return t.is_contiguous() and t.stride(-1) == 1 and not t.requires_grad


def rows(x: Tensor) -> Tensor:
    """View x [..., C] as [M, C] with unit column stride; copies only where the strides do not allow it."""
    if x.dim() == 2 and x.stride(1) == 1:  # a view of its own would cost a decoding step more than its arithmetic
        return x
    flat = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(math.prod(x.shape[:-1]), 0)
    return flat if flat.stride(1) == 1 else flat.clone(memory_format=torch.contiguous_format)


def shaped(flat: Tensor, lead: Tensor) -> Tensor:
    """flat [M, C], of which nobody else knows, with the leading dimensions of `lead`, whose `rows` are as many.

    What an autograd function gives out must not be a view: PyTorch forbids users to change such a one in place.
    """
    return flat if lead.dim() == 2 else _unsafe_view(flat, (*lead.shape[:-1], flat.shape[1]))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in this dtype: `x.to(dtype)` without the call where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Inside, products on x's device are taken in the dtypes that their factors have."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that F.linear would compute in for x: x's own, or autocast's."""
    dtype, device = x.dtype, x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or dtype == torch.float64:
        return dtype
    return torch.get_autocast_dtype(device)
