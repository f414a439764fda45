"""The yardstick of every numerical test: an implementation may err twice as much as PyTorch does in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Values = dict[str, Tensor]
_HALF = (torch.bfloat16, torch.float16)
MIXED = 2.0**-16
"""What an f32 result may err by where tensors of 16 bits take part."""
_STEP = 2.0**-23  # by which inputs are moved to see how far results move


def assert_as_good_as_torch(
    reference: Callable[..., Any],
    run: Callable[..., Any],
    kwargs: Mapping[str, Any],
    *,
    grads: Iterable[str] | None = None,
    factor: float = 2.0,
) -> None:
    """Check `run(**kwargs)` against `reference` in float64; raise AssertionError with every tensor that is off.

    The oracle is `reference` with all floating-point tensors of `kwargs` in float64, the budget of each tensor is
    `factor` times the error of `reference` in the dtypes given, plus a floor of about an eighth of the dtype's epsilon
    (more for a handful of elements, where PyTorch's own error may be nil by chance). Where that is not enough, because
    PyTorch was lucky in an ill-conditioned case, the budget is at least what the float64 result changes by when every
    input and upstream gradient moves by half an epsilon, and by up to 8 epsilons more for one element (8 / √n for n):
    moves of many inputs cancel, the roundings of a sum taken in one chain less so, and few elements do not average them
    out. Upstream gradients move because backward rounds terms of a sum one by one, which is a move of each of them;
    equal rows (stride 0) move as one and do not show how far such a sum cancels. Random cases on the CPU needed 3 to 8
    of these 8; in a search of 1000 to 3000 an op a few f32 gradients of at most 3.2 epsilons needed more.
    Results in f32 of a case with 16-bit tensors in it are held to 2⁻¹⁶, a 128th of what bf16 rounds those by: kernels
    may multiply an f32 weight with them in two 16-bit parts. Errors are ‖got - want‖ / ‖want‖.
    Compared are all outputs and, for an upstream gradient drawn from a fixed seed, the gradients of the tensors named
    in `grads`; None means those that require grad, and it is a ValueError when none does, since half of the test would
    be missing. Shape and dtype must be those of `reference`, integer outputs equal. One tensor given under two names
    stays one.
    """
    names = _differentiated(kwargs, grads)
    want = _evaluate(reference, kwargs, names, torch.float64)
    torchs = _evaluate(reference, kwargs, names, None)
    got = _evaluate(run, kwargs, names, None)
    if list(got) != list(want):
        raise AssertionError(f"got {list(got)}, wanted {list(want)}")
    least = MIXED if any(isinstance(v, Tensor) and v.dtype in _HALF for v in kwargs.values()) else 0.0

    def failing(moved: Mapping[str, float]) -> list[str]:
        lines = (_compare(k, got[k], torchs[k], want[k], factor, moved.get(k, 0.0), least) for k in want)
        return [line for line in lines if line]

    failures = failing({})
    if failures:
        failures = failing(_conditioning(reference, kwargs, names, want))
    if failures:
        raise AssertionError("less accurate than torch allows:\n  " + "\n  ".join(failures))


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖ in float64; ∞ unless both have the same NaN and infinities.

    Where `want` is zero, or empty, the numerator alone.
    """
    got, want = got.detach().double(), want.detach().double()
    finite = want.isfinite()
    if not torch.equal(got.where(~finite, 0.0).nan_to_num(), want.where(~finite, 0.0).nan_to_num()):
        return math.inf
    if not torch.equal(got.isfinite(), finite):
        return math.inf
    norm = float(want[finite].norm())
    return float((got - want)[finite].norm()) / (norm or 1.0)


def _differentiated(kwargs: Mapping[str, Any], grads: Iterable[str] | None) -> list[str]:
    floating = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    if grads is None:
        names = [name for name, value in floating.items() if value.requires_grad]
        if floating and not names:
            raise ValueError("no tensor requires grad: name those to differentiate in `grads`, or pass () for none")
        return names
    names = list(grads)
    if unknown := [name for name in names if name not in floating]:
        raise ValueError(f"grads={names}: {unknown[0]!r} is no floating-point tensor of {list(kwargs)}")
    return names


def _conditioning(
    reference: Callable[..., Any], kwargs: Mapping[str, Any], names: list[str], want: Values
) -> dict[str, float]:
    """Relative change of each float64 value for a relative change of all inputs by 1: the largest of eight tries."""
    tries = [_evaluate(reference, kwargs, names, torch.float64, torch.Generator().manual_seed(i)) for i in range(8)]
    floating = [key for key, value in want.items() if value.is_floating_point()]
    return {key: max(relative_error(values[key], want[key]) for values in tries) / _STEP for key in floating}


def _evaluate(
    function: Callable[..., Any],
    kwargs: Mapping[str, Any],
    names: list[str],
    dtype: torch.dtype | None,
    noise: torch.Generator | None = None,
) -> Values:
    """Outputs and gradients on fresh copies, so that functions may write in place; what was one tensor stays one."""
    wanted = {id(kwargs[name]) for name in names}
    tensors = {id(v): v for v in kwargs.values() if isinstance(v, Tensor)}
    copies = {key: _copy(value, dtype) for key, value in tensors.items()}
    for key, copy in copies.items():
        if noise is not None and copy.is_floating_point():
            _move(copy, noise)
        copy.requires_grad_(key in wanted)
    # The function sees a view: autograd forbids writing in place into a leaf that requires grad.
    aliases = {key: copy.expand(tensors[key].shape) for key, copy in copies.items()}
    outputs = _named_outputs(function(**{k: aliases[id(v)] if isinstance(v, Tensor) else v for k, v in kwargs.items()}))
    values = {key: value.detach() for key, value in outputs.items()}
    roots = {key: value for key, value in outputs.items() if value.requires_grad}
    if not names:
        return values
    if not roots:
        raise AssertionError(f"no output depends on {names}: nothing requires grad")
    leaves = {id(kwargs[name]): (name, copies[id(kwargs[name])]) for name in reversed(names)}
    upstream = [_upstream(index, value) for index, value in enumerate(roots.values())]
    if noise is not None:
        for gradient in upstream:
            _move(gradient, noise)
    found = torch.autograd.grad(
        list(roots.values()), [leaf for _, leaf in leaves.values()], upstream, allow_unused=True
    )
    for (name, leaf), gradient in zip(leaves.values(), found, strict=True):
        values[f"grad of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return values


def _move(value: Tensor, noise: torch.Generator) -> None:
    step = 2 * torch.rand(value.shape, generator=noise, dtype=torch.float64) - 1
    value.mul_(1 + _STEP * step.to(value.device))


def _copy(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Same values and strides, NaN in the gaps between them; of an expanded dimension the one slice that it repeats."""
    target = dtype if dtype is not None and value.is_floating_point() else value.dtype
    value = value.detach()
    for dim, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        if stride == 0 and size > 1:
            value = value.narrow(dim, 0, 1)
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    gap = math.nan if target.is_floating_point else -1
    storage = torch.full((max(last + 1, 0),), gap, dtype=target, device=value.device)
    return storage.as_strided(value.shape, value.stride()).copy_(value)


def _named_outputs(result: Any) -> Values:
    """Tensors of a tensor, tuple, named tuple, dataclass-like or mapping result; None entries are left out."""
    if isinstance(result, Tensor):
        return {"output": result}
    if isinstance(result, Mapping):
        items = list(result.items())
    elif hasattr(result, "_asdict"):
        items = list(result._asdict().items())
    elif isinstance(result, (tuple, list)):
        items = [(f"output {index}", value) for index, value in enumerate(result)]
    else:
        items = list(vars(result).items())
    return {str(key): value for key, value in items if isinstance(value, Tensor)}


def _upstream(index: int, output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + index)
    # Rounded to bf16 at once, so that every dtype is given the same numbers.
    drawn = torch.randn(output.shape, generator=generator).bfloat16()
    return drawn.to(output.device, output.dtype)


def _compare(
    key: str, got: Tensor, torchs: Tensor, want: Tensor, factor: float, condition: float, least: float
) -> str | None:
    if got.shape != torchs.shape or got.dtype != torchs.dtype:
        have, need = (f"{t.dtype} {tuple(t.shape)}" for t in (got, torchs))
        return f"{key}: is {have}, wanted {need}"
    if not got.is_floating_point():
        return None if torch.equal(got, torchs) else f"{key}: {int((got != torchs).sum())} integers differ"
    epsilon = torch.finfo(got.dtype).eps
    few = 1.0 / math.sqrt(max(got.numel(), 1))
    floor = max(epsilon * (0.125 + 0.5 * few), least * (1.0 + 4.0 * few) if got.dtype == torch.float32 else 0.0)
    error, own = relative_error(got, want), relative_error(torchs, want)
    budget = max(factor * own, condition * epsilon * (0.5 + 8.0 * few)) + floor
    if error <= budget or (math.isinf(own) and torch.equal(got.nan_to_num(), torchs.nan_to_num())):
        return None
    return f"{key}: error {error:.3g}, torch's own in {got.dtype} {own:.3g}, budget {budget:.3g}"
