"""column_scale: y = x · s by columns, forward and backward, against plain PyTorch and a copy of as many bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern import dispatch, ops
from peftkern.ops.column_scale import reference

from . import _peers
from ._clock import Runner, Values
from ._measure import SHORT, Case, Cost, Options, passes

_HALF = torch.bfloat16
_NAMES = ("x", "s")


@dataclass(frozen=True)
class Shape:
    """x [m, c] in dtype, s [c] in adapter; without `train` the result takes the place of x and there is no graph."""

    m: int
    c: int
    dtype: torch.dtype
    adapter: torch.dtype = torch.float32
    train: bool = True


def cases(options: Options) -> Iterator[Case]:
    """Keys, values and feed-forward inputs of small encoders on a CPU; hidden 768 to 14336 on a GPU."""
    f32 = torch.float32
    if options.quick:
        shapes = [Shape(64, 96, f32), Shape(64, 96, _HALF), Shape(64, 96, _HALF, train=False)]
    elif options.device.type == "cpu":
        sizes = ((1, 768), (16, 64), (128, 384), (1024, 384), (1024, 1536), (2048, 768), (2048, 3072), (4096, 4096))
        kinds = ((f32, f32), (_HALF, f32), (_HALF, _HALF))
        shapes = [Shape(*size, *kind) for size in sizes for kind in kinds]
        shapes += [Shape(*size, dtype, train=False) for size in ((1, 768), (2048, 768)) for dtype in (f32, _HALF)]
    else:
        sizes = ((8192, 4096), (8192, 14336), (8192, 768), (8192, 1024), (1024, 4096), (128, 4096), (16384, 4096))
        shapes = [Shape(*size, _HALF, adapter) for adapter in (f32, _HALF) for size in sizes]
        shapes += [Shape(1, 4096, _HALF, train=False), Shape(8192, 4096, _HALF, train=False)]
    for shape in shapes:
        yield _case(options, shape)


def _case(options: Options, s: Shape) -> Case:
    label = f"{s.m}x{s.c} {SHORT[s.dtype]}/{SHORT[s.adapter]}" + ("" if s.train else " no grad")
    config = {"M": s.m, "adapter": str(s.adapter).removeprefix("torch."), "grad": s.train}
    inputs = functools.cache(lambda: _inputs(options.device, s))
    providers = _peers.op_providers(
        options, lambda: _floor(inputs(), s), lambda mode: _plain(inputs(), s, mode), lambda: _ours(inputs(), s)
    )
    x = ("C", "columns", s.c)
    return Case(
        "column_scale", label, x, config, options.device, s.dtype, providers, lambda: _oracle(inputs(), s),
        lambda: _cost(s),
    )  # fmt: skip


def _inputs(device: torch.device, s: Shape) -> dict[str, Tensor]:
    rand = _peers.normal(device)
    # Signs alone without a graph: however often x is scaled in place it neither vanishes nor overflows.
    scale = rand(s.c) if s.train else rand(s.c).sign()
    return {"x": rand(s.m, s.c).to(s.dtype), "s": scale.to(s.adapter), "dy": rand(s.m, s.c).to(s.dtype)}


def _floor(t: dict[str, Tensor], s: Shape) -> Runner:
    """Copies: x to y, and dy to dx while x is read."""
    x, dy = t["x"], t["dy"]
    y = torch.empty_like(x)
    if not s.train:
        return Runner(lambda: y.copy_(x))
    return Runner(lambda: torch.empty_like(x).copy_(x), lambda _: torch.maximum(x, dy))


def _ours(t: dict[str, Tensor], s: Shape) -> Runner:
    backend = dispatch.explain("column_scale", t["x"], t["s"]).backend
    if not s.train:
        x = t["x"].clone()
        timed = _peers.inference(lambda: ops.column_scale(x, t["s"], overwrite=True), backend=backend)
        timed.check = lambda: {"y": ops.column_scale(t["x"].clone(), t["s"], overwrite=True)}
        return timed
    leaves = _peers.leaves(t, _NAMES)

    def run() -> Tensor:
        return ops.column_scale(**leaves)

    return _peers.differentiable(run, leaves, t["dy"], off=run, backend=backend, parameters=(leaves["s"],))


def _plain(t: dict[str, Tensor], s: Shape, mode: str | None) -> Runner:
    if not s.train:
        return _peers.inference(lambda: (t["x"] * t["s"]).to(s.dtype))
    leaves = _peers.leaves(t, _NAMES)

    def run() -> Tensor:
        return (leaves["x"] * leaves["s"]).to(s.dtype)

    call = _peers.compiled(run, mode)
    return _peers.differentiable(call, leaves, t["dy"], off=call, parameters=(leaves["s"],))


def _oracle(t: dict[str, Tensor], s: Shape) -> Values:
    if not s.train:
        return {"y": reference(t["x"].double(), t["s"].double())}
    leaves = _peers.leaves(t, _NAMES, torch.float64)
    return _peers.evaluate(lambda: reference(**leaves), leaves, t["dy"].double())


def _cost(s: Shape) -> Mapping[str, Cost]:
    rows, scale = s.m * s.c * s.dtype.itemsize, s.c * s.adapter.itemsize
    forward = Cost(s.m * s.c, 2 * rows + scale)
    backward = Cost(3 * s.m * s.c, 3 * rows + 2 * scale)
    return passes(forward, backward)
