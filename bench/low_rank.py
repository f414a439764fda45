"""low_rank: y = x Wᵀ + s · B(A · drop(x)), forward and backward with W frozen, against peers and the bare base."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern import dispatch, ops
from peftkern.ops.low_rank import reference

from . import _peers
from ._clock import Runner, Values
from ._measure import SHORT, Case, Cost, Gate, Options, passes

SCALE = 2.0
_HALF = torch.bfloat16
_GATED = (8192, 4096, 4096, 16)


@dataclass(frozen=True)
class Shape:
    """x [m, k], W [n, k], rank r, dropout p; x and W in dtype, A and B in adapter."""

    m: int
    k: int
    n: int
    r: int
    p: float
    dtype: torch.dtype
    adapter: torch.dtype
    train: bool = True
    bias: bool = True
    light: bool = False


def cases(options: Options) -> Iterator[Case]:
    """Shapes of small encoders on a CPU; hidden 768 to 8192, rank 8 to 256, 128 to 16k tokens on a GPU."""
    for shape in _shapes(options):
        yield _case(options, shape)


def _shapes(options: Options) -> Iterator[Shape]:
    f32 = torch.float32
    if options.quick:
        yield Shape(64, 96, 160, 8, 0.1, f32, f32)
        yield Shape(64, 96, 160, 8, 0.1, _HALF, f32)
        yield Shape(32, 96, 96, 8, 0.1, f32, f32, light=True)
        return
    if options.device.type == "cpu":
        for p in (0.1, 0.0):
            for k, n in ((384, 384), (384, 1536), (1536, 384), (768, 768)):
                yield Shape(1024, k, n, 8, p, f32, f32)
                yield Shape(1024, k, n, 8, p, _HALF, f32)
        for dtype in (f32, _HALF):
            yield Shape(1024, 768, 768, 64, 0.1, dtype, f32)
            yield Shape(512, 2048, 2048, 16, 0.1, dtype, f32)
            yield Shape(1, 64, 64, 8, 0.0, dtype, f32, train=False)
        return
    yield from _gpu_shapes()


def _gpu_shapes() -> Iterator[Shape]:
    """Without bias, as in a Llama. First what is gated, then one change at a time, then the grid of the heat map."""
    f32 = torch.float32
    kind: dict[str, Any] = {"dtype": _HALF, "adapter": f32, "bias": False}
    centre = kind | {"m": 8192, "k": 4096, "n": 4096, "r": 16, "p": 0.1}
    changes: list[dict[str, Any]] = [{}, {"p": 0.0}, {"adapter": _HALF}, {"k": 4096, "n": 14336}]
    changes += [{"m": 1, "p": 0.0, "train": False}, {"r": 64}, {"r": 256}, {"m": 1024, "k": 768, "n": 768, "r": 8}]
    changes += [{"k": 8192, "n": 8192}, {"m": 128}, {"adapter": _HALF, "p": 0.0}, {"dtype": f32, "m": 2048}]
    changes += [{"m": 32, "p": 0.0, "train": False}]
    for change in changes:
        yield Shape(**(centre | change))
    grid = [(h, m, 16) for h in (768, 2048, 4096, 8192) for m in (128, 1024, 8192, 16384)]
    grid += [(h, m, r) for r in (8, 64, 256) for h in (768, 8192) for m in (128, 8192)]
    for hidden, m, r in grid:
        yield Shape(m, hidden, hidden, r, 0.1, **kind, light=True)


def _case(options: Options, shape: Shape) -> Case:
    adapter = str(shape.adapter).removeprefix("torch.")
    label = f"{shape.m}x{shape.k}->{shape.n} r{shape.r} p{shape.p:g} {SHORT[shape.dtype]}/{SHORT[shape.adapter]}"
    label += ("" if shape.train else " no grad") + (" cell" if shape.light else "")
    config = {"M": shape.m, "N": shape.n, "R": shape.r, "p": shape.p, "adapter": adapter, "grad": shape.train}
    config |= {"hidden": shape.k, "tokens": shape.m, "rank": shape.r, "bias": shape.bias}
    inputs = functools.cache(lambda: Inputs(options.device, shape))
    providers = _peers.op_providers(
        options, lambda: _floor(inputs()), lambda mode: module(inputs(), _peers.LoraLinear, mode),
        lambda: _ours(inputs()), shape.light,
    )  # fmt: skip
    if shape.p == 0.0 and not options.quick:
        providers["addmm"] = lambda: module(inputs(), _peers.AddmmLoraLinear)
    if not (options.quick or shape.light):
        providers["peft"] = lambda: peft(inputs())
    if shape.p == 0.0 and not shape.bias and shape.train and shape.adapter == shape.dtype:
        providers["unsloth"] = lambda: module(inputs(), _peers.UnslothLoraLinear)
    x = ("K", "input width", shape.k)
    gates = []
    if options.device.type == "cuda" and not shape.light and (shape.m, shape.k, shape.n, shape.r) == _GATED:
        gates = [Gate(1.09, "forward"), Gate(1.18, "backward")]
    return Case(
        "low_rank", label, x, config, options.device, shape.dtype, providers,
        lambda: oracle(inputs()), lambda: cost(shape), gates=gates, light=shape.light,
    )  # fmt: skip


class Inputs:
    """Random tensors, the same for all providers of a case."""

    def __init__(self, device: torch.device, shape: Shape) -> None:
        rand, s = _peers.normal(device), shape
        self.shape = shape
        self.x, self.dy = rand(s.m, s.k).to(s.dtype), rand(s.m, s.n).to(s.dtype)
        self.weight = (rand(s.n, s.k) / s.k**0.5).to(s.dtype)
        self.bias = rand(s.n).to(s.dtype) if s.bias else None
        self.a = (rand(s.r, s.k) / s.k**0.5).to(s.adapter)
        self.b = (rand(s.n, s.r) / s.r**0.5).to(s.adapter)
        self.seed = torch.tensor([20240613], device=device)

    def linear(self) -> nn.Linear:
        """The frozen base layer."""
        base = nn.Linear(self.shape.k, self.shape.n, bias=self.bias is not None, device="meta")
        base.weight = nn.Parameter(self.weight, requires_grad=False)
        base.bias = None if self.bias is None else nn.Parameter(self.bias, requires_grad=False)
        return base

    def frozen(self) -> tuple[Tensor, ...]:
        """What the base layer holds."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


def runner(
    t: Inputs, function: Callable[[], Tensor], leaves: dict[str, Tensor], off: Callable[[], Tensor],
    on: Callable[[], Tensor] | None = None, backend: str = "",
) -> Runner:  # fmt: skip
    """function() with the gradients of `leaves`, or without a graph, as the shape says."""
    if not t.shape.train:
        return _peers.inference(function, backend=backend)
    parameters = (*t.frozen(), *(leaves[name] for name in ("a", "b")))
    return _peers.differentiable(function, leaves, t.dy, off=off, on=on, backend=backend, parameters=parameters)


def _floor(t: Inputs) -> Runner:
    x = _peers.leaf(t.x)
    if not t.shape.train:
        return _peers.inference(lambda: F.linear(x, t.weight, t.bias), gated=False)
    return _peers.differentiable(
        lambda: F.linear(x, t.weight, t.bias), {"x": x}, t.dy, parameters=t.frozen()
    )


def _ours(t: Inputs) -> Runner:
    x, a, b = _peers.leaf(t.x), _peers.leaf(t.a), _peers.leaf(t.b)

    def run(p: float = 0.0, seed: Tensor | None = None) -> Tensor:
        return ops.low_rank(x, a, b, scale=SCALE, weight=t.weight, bias=t.bias, p=p, seed=seed)

    s = t.shape
    backend = dispatch.choose("low_rank", x.device, s.dtype, M=s.m, K=s.k, N=s.n, R=s.r)
    on = (lambda: run(s.p, t.seed)) if s.p else None
    return runner(t, lambda: run(s.p), {"x": x, "a": a, "b": b}, run, on, backend)


def module(t: Inputs, kind: type[_peers.LoraLinear], mode: str | None = None) -> Runner:
    """A textbook module of `_peers`."""
    x, layer = _peers.leaf(t.x), kind(t.linear(), t.a.clone(), t.b.clone(), SCALE, t.shape.p)
    call = _peers.compiled(layer, mode)
    return of_layer(t, layer, call, x, layer.a, layer.b)


def peft(t: Inputs) -> Runner:
    """Hugging Face PEFT's layer."""
    layer, a, b = _peers.peft_linear(t.linear(), t.a, t.b, SCALE, t.shape.p)
    return of_layer(t, layer, layer, _peers.leaf(t.x), a, b)


def of_layer(
    t: Inputs, layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, a: Tensor, b: Tensor, backend: str = ""
) -> Runner:
    """A module with A and B in it; call runs it, maybe compiled."""

    def off() -> Tensor:
        with _peers.evaluation(layer):
            return call(x)

    return runner(t, lambda: call(x), {"x": x, "a": a, "b": b}, off, backend=backend)


def oracle(t: Inputs) -> Values:
    """What `Runner.check` of every provider returns, in float64."""
    x, a, b = (_peers.leaf(v.double()) for v in (t.x, t.a, t.b))
    weight, bias = t.weight.double(), None if t.bias is None else t.bias.double()

    def run(p: float = 0.0, seed: Tensor | None = None) -> Tensor:
        return reference(x, a, b, scale=SCALE, weight=weight, bias=bias, p=p, seed=seed)

    if not t.shape.train:
        return {"y": run().detach()}
    leaves, dy = {"x": x, "a": a, "b": b}, t.dy.double()
    values = _peers.evaluate(run, leaves, dy)
    if t.shape.p:
        values |= {f"{k}/dropout": v for k, v in _peers.evaluate(lambda: run(t.shape.p, t.seed), leaves, dy).items()}
    return values


def cost(s: Shape) -> Mapping[str, Cost]:
    """Least work by mode."""
    size, adapter = s.dtype.itemsize, (s.r * s.k + s.n * s.r) * s.adapter.itemsize
    base, update, moved = 2 * s.m * s.k * s.n, 2 * s.m * s.r * (s.k + s.n), (s.m * (s.k + s.n) + s.n * s.k) * size
    forward = Cost(base + update, moved + adapter)
    backward = Cost(base + 2 * update, moved + s.m * s.k * size + 2 * adapter)
    return passes(forward, backward)

