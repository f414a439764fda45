"""prompt_concat: embedding look-up, prompt, mask, positions and labels in one pass, against torch.cat and a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern import dispatch, ops
from peftkern.ops.prompt_concat import IGNORED, Prompted, reference

from . import _peers
from ._clock import Runner, Values
from ._measure import SHORT, Case, Cost, Gate, Options, passes

_HALF = torch.bfloat16
_VOCABULARY = 8192


@dataclass(frozen=True)
class Shape:
    """ids [b, s], table [V, h] in dtype, prompt [t, h] in f32; padded on the left or on the right."""

    b: int
    s: int
    t: int
    h: int
    dtype: torch.dtype
    left: bool = False


def cases(options: Options) -> Iterator[Case]:
    """Batches of an encoder, and of a causal model with left padding."""
    f32 = torch.float32
    if options.quick:
        shapes = [Shape(2, 16, 4, 32, f32), Shape(2, 16, 4, 32, _HALF, left=True)]
    elif options.device.type == "cpu":
        shapes = [Shape(8, 128, 20, 384, dtype, left) for dtype in (f32, _HALF) for left in (False, True)]
        shapes += [Shape(16, 512, 20, 768, f32), Shape(8, 512, 20, 2048, _HALF)]
    else:
        shapes = [Shape(16, 512, 20, 4096, _HALF, left) for left in (False, True)]
        shapes += [Shape(16, 512, 20, 768, _HALF), Shape(16, 512, 20, 8192, _HALF), Shape(1, 128, 20, 4096, _HALF)]
        shapes += [Shape(16, 1024, 100, 4096, _HALF)]
    for shape in shapes:
        yield _case(options, shape)


def _case(options: Options, s: Shape) -> Case:
    side = "left" if s.left else "right"
    label = f"B{s.b} S{s.s} T{s.t} H{s.h} {side} {SHORT[s.dtype]}/f32"
    config = {"B": s.b, "S": s.s, "T": s.t, "padding": side, "adapter": "float32"}
    config |= {"hidden": s.h, "tokens": s.b * s.s, "rank": s.t}
    inputs = functools.cache(lambda: _inputs(options.device, s))
    providers = _peers.op_providers(
        options, lambda: _floor(inputs()), lambda mode: _plain(inputs(), s, mode), lambda: _ours(inputs(), s)
    )
    x = ("H", "hidden width", s.h)
    return Case(
        "prompt_concat", label, x, config, options.device, s.dtype, providers, lambda: _oracle(inputs()),
        lambda: _cost(s), gates=[Gate(1.3, "forward")] if options.device.type == "cuda" else [],
    )  # fmt: skip


def _inputs(device: torch.device, s: Shape) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(_VOCABULARY, (s.b, s.s), generator=generator, device=device)
    pads = torch.arange(s.b, device=device)[:, None] * (s.s // (2 * s.b))
    place = torch.arange(s.s, device=device)
    return {
        "ids": ids,
        "table": torch.randn(_VOCABULARY, s.h, generator=generator, device=device).to(s.dtype),
        "prompt": torch.randn(s.t, s.h, generator=generator, device=device),
        "mask": (place >= pads if s.left else place < s.s - pads).to(torch.int64),
        "labels": ids.roll(-1, 1),
        "dy": torch.randn(s.b, s.t + s.s, s.h, generator=generator, device=device).to(s.dtype),
    }


def _floor(t: dict[str, Tensor]) -> Runner:
    """A copy of as many bytes as come out; backward reads the prompt rows once."""
    source, rows = t["dy"], t["prompt"].shape[0]
    return Runner(lambda: source.clone(), lambda _: source[:, :rows].sum(0))


def _runner(
    t: dict[str, Tensor], prompt: Tensor, function: Callable[[], Prompted], backend: str = ""
) -> Runner:
    def check() -> Values:
        out = function()
        (gradient,) = torch.autograd.grad(out.embeds, [prompt], t["dy"])
        return _values(out, gradient)

    def backward(out: Prompted) -> None:
        torch.autograd.grad(out.embeds, [prompt], t["dy"])

    return Runner(function, backward, check, backend=backend, parameters=(prompt, t["table"]))


def _values(out: Prompted, gradient: Tensor) -> Values:
    labels = out.mask if out.labels is None else out.labels
    whole = {"mask": out.mask, "positions": out.positions, "labels": labels}
    return {"y": out.embeds.detach(), "d prompt": gradient} | {k: v.float() for k, v in whole.items()}


def _ours(t: dict[str, Tensor], s: Shape) -> Runner:
    prompt = _peers.leaf(t["prompt"])
    backend = dispatch.choose("prompt_concat", prompt.device, s.dtype, B=s.b, S=s.s, T=s.t, H=s.h)
    return _runner(t, prompt, lambda: ops.prompt_concat(prompt, **_arguments(t)), backend)


def _arguments(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t[name] for name in ("ids", "table", "mask", "labels")}


def _plain(t: dict[str, Tensor], s: Shape, mode: str | None) -> Runner:
    """torch.cat for right padding, which is what people write; the gather of the reference for left padding."""
    prompt = _peers.leaf(t["prompt"])

    def run() -> Prompted:
        if s.left:
            return reference(prompt, **_arguments(t))
        rows = prompt.to(s.dtype).expand(s.b, -1, -1)
        embeds = torch.cat([rows, F.embedding(t["ids"], t["table"])], 1)
        mask = torch.cat([t["mask"].new_ones(s.b, s.t), t["mask"]], 1)
        labels = torch.cat([t["labels"].new_full((s.b, s.t), IGNORED), t["labels"]], 1)
        return Prompted(embeds, mask, (mask.cumsum(1) - 1).clamp(0), labels)

    return _runner(t, prompt, _peers.compiled(run, mode))


def _oracle(t: dict[str, Tensor]) -> Values:
    prompt = _peers.leaf(t["prompt"].double())
    out = reference(prompt, **(_arguments(t) | {"table": t["table"].double()}))
    (gradient,) = torch.autograd.grad(out.embeds, [prompt], t["dy"].double())
    return _values(out, gradient)


def _cost(s: Shape) -> Mapping[str, Cost]:
    out, prompt = s.b * (s.t + s.s) * s.h * s.dtype.itemsize, s.t * s.h
    forward = Cost(0, out + s.b * s.s * s.h * s.dtype.itemsize + prompt * 4)
    backward = Cost(s.b * prompt, s.b * prompt * s.dtype.itemsize + prompt * 4)
    return passes(forward, backward)
