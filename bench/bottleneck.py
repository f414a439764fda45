"""bottleneck: y = x + drop(U · relu(D · x + b_d) + b_u), against plain PyTorch and its six matrix products alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern import dispatch, ops
from peftkern.ops.bottleneck import reference

from . import _peers
from ._clock import Runner, Values
from ._measure import SHORT, Case, Cost, Gate, Options, passes

_HALF = torch.bfloat16
_LIMIT = 1.15
"""Gate on a CPU: forward and backward at most so many times the six products alone, dropout included."""
_KINK = 1e-4
_NAMES = ("x", "down", "up", "down_bias", "up_bias")


@dataclass(frozen=True)
class Shape:
    """x [m, k], D [r, k], U [k, r], dropout p; x in dtype, the adapter in adapter."""

    m: int
    k: int
    r: int
    p: float
    dtype: torch.dtype
    adapter: torch.dtype
    light: bool = False


def cases(options: Options) -> Iterator[Case]:
    """2048 rows of small encoders on a CPU; hidden 768 to 8192 and bottlenecks of 16 to 256 on a GPU."""
    f32 = torch.float32
    if options.quick:
        shapes = [Shape(64, 96, 12, 0.1, f32, f32), Shape(64, 96, 12, 0.1, _HALF, f32)]
    elif options.device.type == "cpu":
        sizes = ((384, 24), (768, 48), (768, 64), (2048, 128))
        kinds = ((f32, f32), (_HALF, f32), (_HALF, _HALF))
        shapes = [Shape(2048, k, r, p, *kind) for p in (0.1, 0.0) for k, r in sizes for kind in kinds]
    else:
        sweep = [(8192, 4096, 64, 0.1), (8192, 4096, 64, 0.0), (1024, 768, 48, 0.1), (8192, 8192, 256, 0.1)]
        sweep += [(8192, 4096, 16, 0.1), (128, 4096, 64, 0.1)]
        shapes = [Shape(*size, _HALF, f32) for size in sweep] + [Shape(*size, _HALF, _HALF) for size in sweep[:2]]
        grid = [(h, m, 64) for h in (768, 2048, 4096, 8192) for m in (128, 1024, 8192, 16384)]
        grid += [(h, m, r) for r in (16, 256) for h in (768, 8192) for m in (128, 8192)]
        shapes += [Shape(m, h, r, 0.1, _HALF, f32, light=True) for h, m, r in grid]
    for shape in shapes:
        yield _case(options, shape)


def _case(options: Options, s: Shape) -> Case:
    config = {"M": s.m, "R": s.r, "p": s.p, "adapter": str(s.adapter).removeprefix("torch."), "activation": "relu"}
    config |= {"hidden": s.k, "tokens": s.m, "rank": s.r}
    label = f"{s.m}x{s.k}-{s.r} p{s.p:g} {SHORT[s.dtype]}/{SHORT[s.adapter]}" + (" cell" if s.light else "")
    inputs = functools.cache(lambda: _inputs(options.device, s))
    providers = _peers.op_providers(
        options, lambda: _floor(inputs()), lambda mode: _plain(inputs(), s, mode), lambda: _ours(inputs(), s), s.light
    )
    x = ("K", "hidden width", s.k)
    gates = []
    if options.device.type == "cuda" and (s.m, s.k, s.r, s.light) == (8192, 4096, 64, False):
        gates = [Gate(50.0, "forward", ""), Gate(66.0, "backward", "")]
    elif options.device.type == "cpu" and s.m == 2048:
        gates = [Gate(_LIMIT)]
    return Case(
        "bottleneck", label, x, config, options.device, s.dtype, providers, lambda: _oracle(inputs(), s),
        lambda: _cost(s), gates=gates, light=s.light,
    )  # fmt: skip


def _inputs(device: torch.device, s: Shape) -> dict[str, Tensor]:
    rand = _peers.normal(device)
    t = {
        "x": rand(s.m, s.k).to(s.dtype),
        "down": (rand(s.r, s.k) / s.k**0.5).to(s.adapter),
        "up": (rand(s.k, s.r) / s.r**0.5).to(s.adapter),
        "down_bias": rand(s.r).to(s.adapter),
        "up_bias": rand(s.k).to(s.adapter),
        "dy": rand(s.m, s.k).to(s.dtype),
        "seed": torch.tensor([20240613], device=device),
    }
    # Where the latent is next to relu's kink, rounding decides what the gradient is: such rows are zero.
    pre = F.linear(t["x"].double(), t["down"].double(), t["down_bias"].double())
    t["x"][(pre.abs() < _KINK).any(1)] = 0.0
    return t


def _floor(t: dict[str, Tensor]) -> Runner:
    """The six products alone: two of the forward, four of the backward.

    On a CPU in the dtype the adapter is computed in: f32 where it is kept in f32, with x and dy converted beforehand.
    On a GPU, where f32 products would take several times as long, in the dtype of x.
    """
    compute = torch.promote_types(t["x"].dtype, t["down"].dtype) if t["x"].device.type == "cpu" else t["x"].dtype
    x, dy, down, up = (t[name].to(compute) for name in ("x", "dy", "down", "up"))
    z = x @ down.T

    def forward() -> tuple[Tensor, Tensor]:
        return torch.mm(x, down.T), torch.mm(z, up.T)

    def backward(_: object) -> tuple[Tensor, ...]:
        return torch.mm(dy.T, z), torch.mm(dy, up), torch.mm(z.T, x), torch.mm(z, down)

    return Runner(forward, backward)


def _ours(t: dict[str, Tensor], s: Shape) -> Runner:
    leaves = _peers.leaves(t, _NAMES)

    def run(p: float = 0.0, seed: Tensor | None = None) -> Tensor:
        return ops.bottleneck(**leaves, residual=leaves["x"], p=p, seed=seed)  # type: ignore[arg-type]

    backend = dispatch.choose("bottleneck", t["x"].device, s.dtype, M=s.m, K=s.k, N=s.k, R=s.r)
    on = (lambda: run(s.p, t["seed"])) if s.p else None
    weights = tuple(leaves[name] for name in _NAMES[1:])
    return _peers.differentiable(
        lambda: run(s.p), leaves, t["dy"], off=run, on=on, backend=backend, parameters=weights
    )


def _plain(t: dict[str, Tensor], s: Shape, mode: str | None) -> Runner:
    leaves = _peers.leaves(t, _NAMES)

    def run(p: float = 0.0) -> Tensor:
        x, down, up, down_bias, up_bias = leaves.values()
        z = F.relu(F.linear(x.to(down.dtype), down, down_bias))
        return x + F.dropout(F.linear(z, up, up_bias), p, training=p > 0).to(x.dtype)

    call = _peers.compiled(run, mode)
    weights = tuple(leaves[name] for name in _NAMES[1:])
    return _peers.differentiable(lambda: call(s.p), leaves, t["dy"], off=run, parameters=weights)


def _oracle(t: dict[str, Tensor], s: Shape) -> Values:
    leaves, dy = _peers.leaves(t, _NAMES, torch.float64), t["dy"].double()

    def run(p: float = 0.0, seed: Tensor | None = None) -> Tensor:
        return reference(**leaves, residual=leaves["x"], p=p, seed=seed)  # type: ignore[arg-type]

    values = _peers.evaluate(run, leaves, dy)
    if s.p:
        values |= {f"{k}/dropout": v for k, v in _peers.evaluate(lambda: run(s.p, t["seed"]), leaves, dy).items()}
    return values


def _cost(s: Shape) -> Mapping[str, Cost]:
    product, rows, adapter = 2 * s.m * s.k * s.r, s.m * s.k * s.dtype.itemsize, 2 * s.k * s.r * s.adapter.itemsize
    forward = Cost(2 * product, 2 * rows + adapter)
    backward = Cost(4 * product, 3 * rows + 2 * adapter)
    return passes(forward, backward)
