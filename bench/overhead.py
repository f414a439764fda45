"""What a call costs: low_rank and the attached module on layers so small that Python and dispatch are most of the time.

First one row through a 64x64 layer. Then the sizes at which the compiled kernel overtakes three products of PyTorch, by
which `peftkern.ops.low_rank` chooses: "kernel" and "products" are the same function with either of them forced.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import peftkern as pk
from peftkern import dispatch, ops

from . import _peers
from ._clock import Runner
from ._measure import FLOOR, OURS, SHORT, YARDSTICK, Case, Gate, Options
from .low_rank import SCALE, Inputs, Shape, cost, module, of_layer, oracle, peft, runner

_F32, _BF16 = torch.float32, torch.bfloat16
_CALL = Shape(1, 64, 64, 8, 0.0, _F32, _F32)
_MICROSECONDS = 25.0
"""Gate on the attached module without a graph, on a CPU."""


def cases(options: Options) -> Iterator[Case]:
    """The call without a graph, the same with its backward, and on a CPU the crossing."""
    for train in (False, True):
        yield _call(options, dataclasses.replace(_CALL, train=train))
    if options.device.type == "cpu":
        for dtype in (_F32, _BF16):
            for width in (64,) if options.quick else (64, 256, 768):
                for m in (16,) if options.quick else (1, 16, 64, 256):
                    yield _crossing(options, Shape(m, width, width, 8, 0.0, dtype, dtype))


def _call(options: Options, shape: Shape) -> Case:
    inputs = functools.cache(lambda: Inputs(options.device, shape))
    providers: dict[str, Callable[[], Runner]] = {
        FLOOR: lambda: _linear(inputs()),
        YARDSTICK: lambda: module(inputs(), _peers.LoraLinear),
        OURS: lambda: _attached(inputs()),
        "low_rank": lambda: _op(inputs()),
    }
    if not options.quick:
        providers["peft"] = lambda: peft(inputs())
    gated = options.device.type == "cpu" and not options.quick and not shape.train
    case = _case(options, shape, "call" if shape.train else "call no grad", inputs, providers)
    return dataclasses.replace(case, gates=[Gate(_MICROSECONDS, "forward", "")] if gated else [])


def _crossing(options: Options, shape: Shape) -> Case:
    inputs = functools.cache(lambda: Inputs(options.device, shape))
    providers: dict[str, Callable[[], Runner]] = {
        FLOOR: lambda: _linear(inputs()),
        OURS: lambda: _op(inputs()),
        "kernel": lambda: _op(inputs(), "cpu"),
        "products": lambda: _op(inputs(), "reference"),
    }
    return _case(options, shape, "crossing", inputs, providers)


def _case(
    options: Options, shape: Shape, what: str, inputs: Callable[[], Inputs], providers: dict[str, Callable[[], Runner]]
) -> Case:
    label = f"{what} {shape.m}x{shape.k}->{shape.n} r{shape.r} {SHORT[shape.dtype]}"
    config = {"M": shape.m, "N": shape.n, "R": shape.r, "p": shape.p, "grad": shape.train}
    config |= {"hidden": shape.k, "tokens": shape.m, "rank": shape.r}
    return Case(
        "overhead", label, ("K", "input width", shape.k), config, options.device, shape.dtype, providers,
        lambda: oracle(inputs()), lambda: cost(shape),
    )  # fmt: skip


def _linear(t: Inputs) -> Runner:
    """The frozen layer alone, called as a module."""
    x, base = _peers.leaf(t.x), t.linear()
    if not t.shape.train:
        return _peers.inference(lambda: base(x), gated=False)
    return _peers.differentiable(lambda: base(x), {"x": x}, t.dy, parameters=t.frozen())


def _op(t: Inputs, backend: str | None = None) -> Runner:
    """The op, with the backend that dispatch chooses or this one."""
    x, a, b = _peers.leaf(t.x), _peers.leaf(t.a), _peers.leaf(t.b)

    def run() -> Tensor:
        return ops.low_rank(x, a, b, scale=SCALE, weight=t.weight, bias=t.bias)

    def forced() -> Tensor:
        with dispatch.use_backend(str(backend)):
            return run()

    chosen = backend or dispatch.explain("low_rank", x, a, b).backend
    call = run if backend is None else forced
    return runner(t, call, {"x": x, "a": a, "b": b}, call, backend=chosen)


def _attached(t: Inputs) -> Runner:
    """A layer of a model to which LoRA has been attached."""
    holder = nn.Sequential()
    holder.add_module("proj", t.linear())
    r = t.shape.r
    pk.attach(holder, pk.LoraConfig(r=r, lora_alpha=SCALE * r, lora_dropout=t.shape.p, target_modules=["proj"]))
    trained = {name.split(".")[-1]: p for name, p in holder.train().named_parameters() if p.requires_grad}
    for name, value in (("a", t.a), ("b", t.b)):
        trained[name].data.copy_(value)
    chosen = dispatch.explain("low_rank", t.x, trained["a"], trained["b"]).backend
    proj = holder.get_submodule("proj")
    return of_layer(t, proj, proj, _peers.leaf(t.x), trained["a"], trained["b"], backend=chosen)
