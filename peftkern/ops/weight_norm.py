"""Row norms of a weight with a low-rank update: ‖W + s·BA‖ per row, without building BA or the sum."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from peftkern.ops._draw import Draw
from peftkern.ops._op import Op, autograd, choose, compiling, kernel, transformed, without_autocast
from peftkern.ops._operands import number, of_one_dtype


def reference(weight: Tensor, a: Tensor, b: Tensor, *, scale: float = 1.0) -> Tensor:
    """‖W + s · B A‖₂ of every row, in f32, or f64 where an argument is f64.

    weight [N, K] · a [R, K] · b [N, R] -> [N].
    Source: Liu et al. 2024 (arXiv:2402.09353), eq. 5. The oracle: never optimise it.
    """
    _check(weight, a, b)
    wide = _wide(weight, a, b)
    with without_autocast(weight):
        summed = weight.to(wide) + scale * (b.to(wide) @ a.to(wide))
        norm: Tensor = torch.linalg.vector_norm(summed, dim=1)
    return norm


def weight_norm(weight: Tensor, a: Tensor, b: Tensor, *, scale: float = 1.0) -> Tensor:
    """‖W + s · B A‖₂ per row; arguments and result as `reference`.

    Every tile of W is read once, s · B A is added to it in registers and its squares are summed in f32. That costs as
    many operations as the factored form ‖W‖² + 2 s rowsum(B ∘ W Aᵀ) + s² rowsum(B A Aᵀ ∘ B), reads as many bytes, and
    has no cancellation where the update nearly undoes the weight. The gradients are factored: with u = dnorm / norm
    (0 for a row of zeros), da = s (u B)ᵀ W + s² ((u B)ᵀ B) A and db = s u (W Aᵀ + s B (A Aᵀ)); they do lose the digits
    that such a sum loses. W gets none.
    W may be the transposed view of a contiguous matrix (Conv1D, embeddings). Saves its arguments and the norm.
    Raises ValueError for shapes that do not chain.
    """
    _check(weight, a, b)
    scale = number("weight_norm", scale)
    weight = weight.detach() if weight.requires_grad else weight
    if a.dtype != b.dtype:
        a, b = of_one_dtype(a, b)
    backend = choose("weight_norm", weight, a, N=weight.shape[0], K=weight.shape[1], R=a.shape[0])
    if backend == "reference" or 0 in (*weight.shape, a.shape[0]):
        return reference(weight, a, b, scale=scale)
    norm: Tensor = _differentiable(weight, a, b, scale, backend)
    return norm


class _Kept(NamedTuple):
    """A norm, and what tells whether it is still that of its tensors."""

    key: tuple[Any, ...]
    storages: tuple[StorageWeakRef, ...]
    norm: Tensor

    def stale(self) -> bool:
        """A storage is gone, its address free for others; or the norm, made in inference mode, cannot be saved now."""
        if any(storage.expired() for storage in self.storages):  # type: ignore[no-untyped-call]
            return True
        return self.norm.is_inference() and not torch.is_inference_mode_enabled()


class NormCache:
    """The last norm of one (W, A, B, s), computed again only when one of them may have changed.

    It is given back while all three tensors keep their storage, their layout and their version counter, which every
    in-place change raises, optimizers' steps and load_state_dict among them. A swapped `.data`, `.to()` and a parameter
    put in another's place change the storage. A write through `.data` raises no counter: so that an optimizer that
    steps in that way is noticed too, the norm is also dropped when the gradient of A or B has been (`zero_grad`), and
    owners call `clear` where their weights may have been replaced, as on `train()` and `eval()`.

    Storages are held weakly: a cache keeps alive nothing but its norm. A copy of a cache, by deepcopy or pickle, starts
    empty. Under torch.compile it is not there: the norm is part of the graph. Neither is it while a CUDA graph is
    captured, whose replays see other weights, nor for tensors made in inference mode, which count no versions.
    `computed` counts the computations.
    """

    def __init__(self) -> None:
        self.computed = 0
        self._kept: _Kept | None = None  # at once, for threads that share the cache
        self._had_gradients = False

    def __call__(self, weight: Tensor, a: Tensor, b: Tensor, *, scale: float = 1.0) -> Tensor:
        """‖W + s · B A‖₂ per row, detached, and at least the smallest normal number, so that one may divide by it."""
        if compiling() or transformed():
            return _divisor(weight, a, b, scale)
        tensors = (weight, a, b)
        if any(t.is_inference() for t in tensors) or (a.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.clear()
            self.computed += 1
            return _divisor(weight, a, b, scale)
        has_gradients = a.grad is not None or b.grad is not None
        stepped = self._had_gradients and not has_gradients
        self._had_gradients = has_gradients
        key = (scale, *((t.data_ptr(), t._version, t.dtype, t.device, t.shape, t.stride()) for t in tensors))
        kept = self._kept
        if stepped or kept is None or key != kept.key or kept.stale():
            kept = self._kept = _Kept(key, tuple(_weak(t) for t in tensors), _divisor(weight, a, b, scale))
            self.computed += 1
        return kept.norm

    def clear(self) -> None:
        """Forget the norm."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def _weak(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _divisor(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    norm = weight_norm(weight, a.detach(), b.detach(), scale=scale)
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _wide(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def _transposed(weight: Tensor) -> bool:
    return weight.stride(1) != 1 and weight.stride(0) == 1


def _as_stored(weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """wide [P, Q] with unit column stride, up [P, R], down [R, Q]: W + BA is wide + up down, or its transpose."""
    if _transposed(weight):
        return weight.T, a.T.contiguous(), b.T.contiguous()
    return weight if weight.stride(1) == 1 else weight.contiguous(), b.contiguous(), a.contiguous()


def _forward(weight: Tensor, a: Tensor, b: Tensor, scale: float, backend: str) -> Tensor:
    forward = kernel(backend, "weight_norm").forward
    norm: Tensor = forward(*_as_stored(weight, a.float(), b.float()), scale, not _transposed(weight))
    return norm


def _backward(
    dnorm: Tensor, weight: Tensor, a: Tensor, b: Tensor, norm: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    a_, b_ = a.float(), b.float()
    u = torch.where(norm == 0, 0.0, dnorm / norm)[:, None]  # a NaN goes through
    products = kernel(backend, "weight_norm").backward(*_as_stored(weight, a_, u * b_))
    # wide is W: W Aᵀ and (u B)ᵀ W. wide is Wᵀ: Wᵀ (u B) and A Wᵀ.
    weight_a, b_weight = (products[1].T, products[0].T) if _transposed(weight) else products
    db = scale * u * (weight_a + scale * (b_ @ (a_ @ a_.T)))
    da = scale * (b_weight + scale * (((u * b_).T @ b_) @ a_))
    return da.to(a.dtype).contiguous(), db.to(b.dtype).contiguous()


def _fake(weight: Tensor, a: Any, b: Any, scale: Any, backend: Any) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=torch.float32)


def _backward_fake(
    dnorm: Any, weight: Any, a: Tensor, b: Tensor, norm: Any, scale: Any, backend: Any
) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, a, b, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(weight, a, b, output)


def _gradients(backward: Any, ctx: Any, dnorm: Tensor) -> tuple[Tensor | None, ...]:
    da, db = backward(dnorm, *ctx.saved_tensors, ctx.scale, ctx.backend)
    return None, da, db, None, None


_differentiable = autograd(
    "weight_norm",
    "(Tensor weight, Tensor a, Tensor b, float scale, str backend) -> Tensor",
    _forward,
    _fake,
    "(Tensor dnorm, Tensor weight, Tensor a, Tensor b, Tensor norm, float scale, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    _setup_context,
    _gradients,
)


def _check(weight: Tensor, a: Tensor, b: Tensor) -> None:
    two = weight.dim() == a.dim() == b.dim() == 2
    if not two or weight.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
        shapes = f"weight {tuple(weight.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)}"
        raise ValueError(f"{shapes}: want weight [N, K], a [R, K], b [N, R]")


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cases for tests and benchmarks: (readable id, keyword arguments)."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int, dt: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dt)

    def case(n: int, k: int, r: int, adapter: torch.dtype = dtype) -> dict[str, Any]:
        return {"weight": rand(n, k), "a": rand(r, k, dt=adapter), "b": rand(n, r, dt=adapter), "scale": 0.5}

    yield "29x33-r5", case(29, 33, 5)
    yield "97x200-r8", case(97, 200, 8)
    yield "one-by-one-r1", case(1, 1, 1)
    yield "no-rows", case(0, 16, 4)
    yield "r70", case(40, 1100, 70)
    transposed = case(50, 300, 6)
    yield "transposed", transposed | {"weight": rand(300, 50).T}
    yield "strided", transposed | {"weight": rand(50, 600)[:, ::2]}
    yield "row-strided", transposed | {"weight": rand(50, 340)[:, :300]}
    if dtype in (torch.bfloat16, torch.float16):
        yield "f32-adapters", case(67, 130, 8, torch.float32)
    dead = case(31, 120, 4)
    dead["weight"][30], dead["b"][30] = 0.0, 0.0
    yield "row-of-zeros", dead


def draw(draw: Draw) -> dict[str, Any]:
    """A random case, in which the update does not undo the weight: there the gradients have no digits to compare.

    At least two columns: of a row of one only the sign counts, in which PyTorch makes no error even where the update
    undoes nearly all of it, by chance.
    """
    n, k, r, adapter = draw.size(), max(2, draw.size()), draw.size(65), draw.adapter_dtype()
    a, b = draw.randn(r, k, dtype=adapter) / k**0.5, draw.randn(n, r, dtype=adapter) / r**0.5
    weight = (1.0 + 0.5 * draw.randn(n, k).tanh()) / k**0.5
    return {"weight": weight, "a": a, "b": 0.1 * b, "scale": draw.one_of([1.0, 0.5, -2.0])}


OP = Op(
    "weight_norm", weight_norm, reference, samples, draw=draw,
    frozen=("weight",), rows=("weight", "b"), compiled=("97x200-r8", "f32-adapters", "transposed"),
)  # fmt: skip
