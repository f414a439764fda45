"""weight_norm: ‖W + s · BA‖ per row, forward alone (DoRA detaches it), against plain PyTorch and reading W once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern import dispatch, ops
from peftkern.ops.weight_norm import reference

from . import _peers
from ._clock import Runner, Values
from ._measure import SHORT, Case, Cost, Gate, Options

_SCALE = 2.0
_HALF = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """W [n, k] in dtype, A [r, k] and B [n, r] in f32; transposed: W is a view of a [k, n]."""

    n: int
    k: int
    r: int
    dtype: torch.dtype
    transposed: bool = False


def cases(options: Options) -> Iterator[Case]:
    """Layers of small encoders on a CPU; widths of 768 to 8192 and ranks of 8 to 128 on a GPU."""
    f32 = torch.float32
    if options.quick:
        shapes = [Shape(96, 160, 8, f32), Shape(96, 160, 8, _HALF, True)]
    elif options.device.type == "cpu":
        sizes = ((384, 384, 8), (1536, 384, 8), (384, 1536, 8), (2048, 2048, 16), (768, 768, 64))
        shapes = [Shape(*size, dtype) for dtype in (f32, _HALF) for size in sizes]
        shapes += [Shape(768, 3072, 8, dtype, True) for dtype in (f32, _HALF)]
    else:
        sizes = ((4096, 4096, 16), (768, 768, 8), (8192, 8192, 16), (14336, 4096, 16), (4096, 4096, 128))
        shapes = [Shape(*size, _HALF) for size in sizes] + [Shape(4096, 4096, 16, f32)]
        shapes += [Shape(4096, 4096, 16, _HALF, True)]
    for shape in shapes:
        yield _case(options, shape)


def _case(options: Options, s: Shape) -> Case:
    label = f"{s.n}x{s.k} r{s.r} {SHORT[s.dtype]}" + " transposed" * s.transposed
    config = {"N": s.n, "R": s.r, "transposed": s.transposed}
    inputs = functools.cache(lambda: _inputs(options.device, s))
    providers = _peers.op_providers(
        options,
        lambda: _peers.inference(lambda: inputs()[0].sum(), gated=False),
        lambda mode: _plain(inputs(), mode),
        lambda: _ours(inputs(), s),
    )
    x = ("K", "input width", s.k)
    marked = options.device.type == "cuda" and s == Shape(4096, 4096, 16, _HALF)
    return Case(
        "weight_norm", label, x, config, options.device, s.dtype, providers, lambda: _oracle(inputs()),
        lambda: _cost(s), gates=[Gate(15.0, "forward", "")] if marked else [],
    )  # fmt: skip


def _inputs(device: torch.device, s: Shape) -> tuple[Tensor, Tensor, Tensor]:
    rand = _peers.normal(device)
    weight = rand(s.k, s.n).T if s.transposed else rand(s.n, s.k)
    return (weight / s.k**0.5).to(s.dtype), rand(s.r, s.k) / s.k**0.5, rand(s.n, s.r) / s.r**0.5


def _plain(tensors: tuple[Tensor, Tensor, Tensor], mode: str | None) -> Runner:
    call = _peers.compiled(functools.partial(reference, scale=_SCALE), mode)
    return _peers.inference(lambda: call(*tensors))


def _ours(tensors: tuple[Tensor, Tensor, Tensor], s: Shape) -> Runner:
    backend = dispatch.choose("weight_norm", tensors[0].device, s.dtype, N=s.n, K=s.k, R=s.r)
    return _peers.inference(lambda: ops.weight_norm(*tensors, scale=_SCALE), backend=backend)


def _oracle(tensors: tuple[Tensor, Tensor, Tensor]) -> Values:
    return {"y": reference(*(t.double() for t in tensors), scale=_SCALE)}


def _cost(s: Shape) -> Mapping[str, Cost]:
    moved = s.n * s.k * s.dtype.itemsize + 4 * (s.r * (s.n + s.k) + s.n)
    return {"forward": Cost(2 * s.n * s.k * s.r + 3 * s.n * s.k, moved)}
