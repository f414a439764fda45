"""prefix_attention: prefix and text apart, against torch.cat of both and scaled_dot_product_attention."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern import dispatch, ops
from peftkern.ops.prefix_attention import reference

from . import _peers
from ._clock import Runner, Values
from ._measure import SHORT, Case, Cost, Options, passes

_HALF = torch.bfloat16
_NAMES = ("q", "k", "v", "pk", "pv")
_FOUND = (("y", "dy"), *((f"d {name}", name) for name in _NAMES))
"""What the gate compares, and the inputs of the same shapes. Decoding steps have no gradients."""


@dataclass(frozen=True)
class Shape:
    """q [b, hq, s, d], k and v [b, hkv, length, d], prefix [hkv, t, d]; kind: full, causal or padded."""

    b: int
    hq: int
    hkv: int
    s: int
    length: int
    t: int
    d: int
    kind: str
    dtype: torch.dtype


def cases(options: Options) -> Iterator[Case]:
    """Encoders with padding, causal models with grouped queries, and decoding steps."""
    if options.quick:
        shapes = [(2, 2, 2, 16, 16, 4, 16, "padded"), (2, 4, 2, 16, 16, 4, 16, "causal")]
        shapes += [(2, 4, 2, 1, 33, 4, 16, "full")]
    elif options.device.type == "cpu":
        shapes = [(8, 12, 12, 128, 128, 20, 64, kind) for kind in ("padded", "causal")]
        shapes += [(8, 6, 6, 128, 128, 20, 64, "full"), (2, 12, 12, 512, 512, 20, 64, "causal")]
        shapes += [(2, 16, 4, 256, 256, 20, 128, "causal"), (8, 12, 12, 16, 16, 20, 64, "padded")]
        shapes += [(4, 16, 4, 1, 512, 20, 64, "full"), (8, 12, 12, 1, 256, 20, 64, "full")]
    else:
        shapes = [(16, 16, 16, 512, 512, 20, 64, "padded"), (8, 32, 8, 1024, 1024, 20, 128, "causal")]
        shapes += [(2, 32, 8, 4096, 4096, 100, 128, "causal"), (32, 32, 8, 1, 2048, 20, 128, "full")]
    for dtype in (_HALF,) if options.device.type == "cuda" else (torch.float32, _HALF):
        for shape in shapes:
            yield _case(options, Shape(*shape, dtype))


def _case(options: Options, s: Shape) -> Case:
    label = f"B{s.b} H{s.hq}/{s.hkv} S{s.s} L{s.length} T{s.t} D{s.d} {s.kind} {SHORT[s.dtype]}"
    config = {"B": s.b, "Hq": s.hq, "Hkv": s.hkv, "S": s.s, "T": s.t, "D": s.d, "kind": s.kind}
    inputs = functools.cache(lambda: _inputs(options.device, s))
    providers = _peers.op_providers(
        options, lambda: _floor(inputs(), s), lambda mode: _plain(inputs(), s, mode), lambda: _ours(inputs(), s)
    )
    x = ("L", "keys of the text", s.length)
    return Case(
        "prefix_attention", label, x, config, options.device, s.dtype, providers, lambda: _oracle(inputs(), s),
        lambda: _cost(s),
    )  # fmt: skip


def _inputs(device: torch.device, s: Shape) -> dict[str, Tensor]:
    draw = _peers.normal(device)

    def rand(*size: int) -> Tensor:
        return draw(*size).to(s.dtype)

    found = {"q": rand(s.b, s.s, s.hq, s.d).transpose(1, 2)}
    found |= {name: rand(s.b, s.length, s.hkv, s.d).transpose(1, 2) for name in ("k", "v")}
    found |= {name: rand(s.hkv, s.t, s.d) for name in ("pk", "pv")}
    found["dy"] = rand(s.b, s.hq, s.s, s.d)
    if s.kind == "padded":
        pads = torch.arange(s.b, device=device)[:, None] * (s.length // (2 * s.b))
        found["mask"] = (torch.arange(s.length, device=device) < s.length - pads)[:, None, None, :]
    return found


def _runner(call: Callable[[], Tensor], leaves: dict[str, Tensor], t: dict[str, Tensor], s: Shape, name: str) -> Runner:
    """Decoding steps have no backward."""
    if s.s == 1:
        return _peers.inference(call, backend=name)
    return _peers.differentiable(call, leaves, t["dy"], off=call, backend=name, parameters=(leaves["pk"], leaves["pv"]))


def _ours(t: dict[str, Tensor], s: Shape) -> Runner:
    leaves = _peers.leaves(t, _NAMES)

    def run() -> Tensor:
        return ops.prefix_attention(**leaves, mask=t.get("mask"), causal=s.kind == "causal")  # type: ignore[arg-type]

    backend = dispatch.choose("prefix_attention", t["q"].device, s.dtype, D=s.d, S=s.s, plain=True)
    return _runner(run, leaves, t, s, backend)


def _floor(t: dict[str, Tensor], s: Shape) -> Runner:
    """The same attention without a prefix."""
    leaves = {name: _peers.leaf(t[name]) for name in ("q", "k", "v")}

    def run() -> Tensor:
        q, k, v = leaves.values()
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=t.get("mask"), is_causal=s.kind == "causal", enable_gqa=s.hq != s.hkv
        )

    if s.s == 1:
        return _peers.inference(run, gated=False)
    return _peers.differentiable(run, leaves, t["dy"])


def _plain(t: dict[str, Tensor], s: Shape, mode: str | None) -> Runner:
    leaves = _peers.leaves(t, _NAMES)

    def run() -> Tensor:
        q, k, v, pk, pv = leaves.values()
        keys, values = (torch.cat([p.expand(s.b, -1, -1, -1), x], 2) for p, x in ((pk, k), (pv, v)))
        mask = t.get("mask")
        if mask is not None:
            mask = F.pad(mask, (s.t, 0), value=True)
        elif s.kind == "causal":
            mask = torch.ones(s.s, s.t + s.length, dtype=torch.bool, device=q.device).tril(s.t)
        if s.s == 1:  # the group's queries as rows of one head: no copies of keys and values
            q = q.reshape(s.b, s.hkv, s.hq // s.hkv, s.d)
            return F.scaled_dot_product_attention(q, keys, values).reshape(s.b, s.hq, 1, s.d)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=s.hq != s.hkv)

    call = _peers.compiled(run, mode)
    return _runner(call, leaves, t, s, "")


def _oracle(t: dict[str, Tensor], s: Shape) -> Values:
    """Batch rows and key heads one at a time: in float64 the scores of all together would fill a GPU."""
    group = s.hq // s.hkv
    found = {name: torch.zeros_like(t[like], dtype=torch.float64) for name, like in _FOUND if s.s > 1 or name == "y"}
    for b, h in itertools.product(range(s.b), range(s.hkv)):
        row, head, queries = slice(b, b + 1), slice(h, h + 1), slice(h * group, (h + 1) * group)
        at = {"q": (row, queries), "k": (row, head), "v": (row, head), "pk": (head,), "pv": (head,)}
        leaves = {name: _peers.leaf(t[name][at[name]].double()) for name in _NAMES}
        y = reference(**leaves, mask=t["mask"][row] if "mask" in t else None, causal=s.kind == "causal")  # type: ignore[arg-type]
        found["y"][row, queries] = y.detach()
        if s.s > 1:
            gradients = torch.autograd.grad(y, list(leaves.values()), t["dy"][row, queries].double())
            for name, gradient in zip(leaves, gradients, strict=True):
                found[f"d {name}"][at[name]] += gradient
    return found


def _cost(s: Shape) -> Mapping[str, Cost]:
    seen = s.t + (s.length / 2 if s.kind == "causal" else s.length)
    product, size = 2 * s.b * s.hq * s.s * seen * s.d, s.dtype.itemsize
    rows = 2 * s.b * s.hq * s.s * s.d * size
    keys = 2 * (s.b * s.hkv * s.length + s.hkv * s.t) * s.d * size
    forward, backward = Cost(2 * product, rows + keys), Cost(5 * product, 2 * (rows + keys))
    return passes(forward, backward)
