"""multi_low_rank: one batch over many adapters, as a decoding step, as a prefill and in training; and a whole model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkern as pk
from peftkern import dispatch, ops
from peftkern.ops.multi_low_rank import reference

from . import _peers
from ._clock import Runner, Values
from ._measure import FLOOR, OURS, SHORT, YARDSTICK, Case, Cost, Options, passes

_SCALE = 2.0
_HALF, _F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Shape:
    """x [rows, tokens, k], W [n, k], `count` adapters of rank r, dealt out row by row; A and B in `adapter`."""

    rows: int
    tokens: int
    k: int
    n: int
    r: int
    count: int
    dtype: torch.dtype
    adapter: torch.dtype = _F32
    train: bool = False

    @property
    def m(self) -> int:
        """Rows of the matrix that the kernels see."""
        return self.rows * self.tokens


def cases(options: Options) -> Iterator[Case]:
    """Decoding, prefill and training of one layer, then a decoding step of a whole model."""
    for shape in _shapes(options):
        yield _case(options, shape)
    for decode in _decodes(options):
        yield _decode_case(options, decode)


def _shapes(options: Options) -> Iterator[Shape]:
    if options.quick:
        yield Shape(6, 1, 64, 96, 4, 3, _F32)
        yield Shape(4, 8, 64, 96, 4, 3, _F32, train=True)
    elif options.device.type == "cpu":
        yield Shape(1, 1, 64, 64, 8, 1, _F32)
        for k, n in ((768, 768), (768, 2048), (2048, 768)):
            yield Shape(32, 1, k, n, 8, 16, _HALF)
        yield Shape(32, 1, 768, 768, 64, 16, _HALF)
        yield Shape(32, 1, 768, 768, 8, 16, _F32)
        yield Shape(32, 32, 768, 768, 8, 16, _HALF)
        for dtype in (_F32, _HALF):
            yield Shape(8, 128, 768, 768, 8, 4, dtype, train=True)
    else:
        for adapter in (_HALF, _F32):
            for count in (1, 16, 64):
                yield Shape(64, 1, 4096, 4096, 16, count, _HALF, adapter)
            yield Shape(64, 1, 4096, 4096, 64, 16, _HALF, adapter)
            yield Shape(32, 256, 4096, 4096, 16, 16, _HALF, adapter)
            yield Shape(32, 256, 4096, 4096, 16, 16, _HALF, adapter, train=True)


def _case(options: Options, shape: Shape) -> Case:
    lead = f"{shape.rows}x{shape.tokens}x{shape.k}->{shape.n}"
    dtypes = f"{SHORT[shape.dtype]}/{SHORT[shape.adapter]}"
    label = f"{lead} {shape.count} of r{shape.r} {dtypes}" + ("" if shape.train else " no grad")
    config = {"M": shape.m, "N": shape.n, "R": shape.r, "adapters": shape.count, "grad": shape.train}
    inputs = functools.cache(lambda: _Inputs(options.device, shape))
    providers: dict[str, Callable[[], Runner]] = {
        FLOOR: lambda: _runner(inputs(), lambda t: F.linear(t.x, t.weight), gated=False),
        YARDSTICK: lambda: _runner(inputs(), _loop),
        OURS: lambda: _runner(inputs(), _ours, backend=_backend(inputs())),
    }
    if not options.quick:
        providers["gather"] = lambda: _runner(inputs(), _gather)
    return Case(
        "multi_low_rank", label, ("K", "input width", shape.k), config, options.device, shape.dtype, providers,
        lambda: _oracle(inputs()), lambda: _cost(shape),
    )  # fmt: skip


class _Inputs:
    """Random tensors, the same for all providers of a case."""

    def __init__(self, device: torch.device, shape: Shape) -> None:
        draw = _peers.normal(device)

        def rand(*size: int, dtype: torch.dtype, by: float = 1.0) -> Tensor:
            return (draw(*size) * by).to(dtype)

        s = self.shape = shape
        self.x, self.dy = (rand(s.rows, s.tokens, c, dtype=s.dtype) for c in (s.k, s.n))
        self.weight = rand(s.n, s.k, dtype=s.dtype, by=s.k**-0.5)
        self.a = [rand(s.r, s.k, dtype=s.adapter, by=s.k**-0.5) for _ in range(s.count)]
        self.b = [rand(s.n, s.r, dtype=s.adapter, by=s.r**-0.5) for _ in range(s.count)]
        self.places = [torch.arange(i, s.rows, s.count, device=device) for i in range(s.count)]
        self.index = torch.arange(s.rows, device=device) % s.count

    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient."""
        named = {f"a{i}": t for i, t in enumerate(self.a)} | {f"b{i}": t for i, t in enumerate(self.b)}
        return {"x": self.x} | named

    def copied(self, dtype: torch.dtype | None = None) -> _Inputs:
        """The same with leaves of its own."""
        twin = object.__new__(_Inputs)
        twin.__dict__.update(self.__dict__)
        for name in ("x", "dy", "weight"):
            setattr(twin, name, getattr(self, name).to(dtype or self.shape.dtype))
        twin.x = _peers.leaf(twin.x)
        twin.a, twin.b = ([_peers.leaf(t.to(dtype or t.dtype)) for t in group] for group in (self.a, self.b))
        return twin


def _runner(t: _Inputs, function: Callable[[_Inputs], Tensor], gated: bool = True, backend: str = "") -> Runner:
    own = t.copied()
    if not t.shape.train:
        return _peers.inference(lambda: function(own), gated, backend)
    leaves = own.leaves() if gated else {"x": own.x}
    off = (lambda: function(own)) if gated else None
    return _peers.differentiable(
        lambda: function(own), leaves, own.dy, off=off, backend=backend, parameters=(own.weight, *own.a, *own.b)
    )


def _ours(t: _Inputs) -> Tensor:
    return ops.multi_low_rank(t.x, t.a, t.b, t.index, scales=[_SCALE] * t.shape.count, weight=t.weight)


def _loop(t: _Inputs) -> Tensor:
    """The base at once, then an adapter at a time on its rows: what PEFT does for adapter_names."""
    y = F.linear(t.x, t.weight)
    for a, b, places in zip(t.a, t.b, t.places, strict=True):
        update = F.linear(F.linear(t.x[places].to(a.dtype), a), b)
        y = y.index_add(0, places, (_SCALE * update).to(y.dtype))
    return y


def _gather(t: _Inputs) -> Tensor:
    """All adapters stacked, each row's own copied out for two batched products."""
    a, b = torch.stack(t.a)[t.index], torch.stack(t.b)[t.index]
    h = torch.bmm(t.x.to(a.dtype), a.transpose(1, 2))
    return F.linear(t.x, t.weight) + (_SCALE * torch.bmm(h, b.transpose(1, 2))).to(t.x.dtype)


def _backend(t: _Inputs) -> str:
    s = t.shape
    return dispatch.choose("multi_low_rank", t.x.device, s.dtype, s.train, M=s.m, K=s.k, N=s.n)


def _oracle(t: _Inputs) -> Values:
    own = t.copied(torch.float64)

    def run() -> Tensor:
        return reference(own.x, own.a, own.b, own.index, scales=[_SCALE] * t.shape.count, weight=own.weight)

    return _peers.evaluate(run, own.leaves(), own.dy) if t.shape.train else {"y": run().detach()}


def _cost(s: Shape) -> Mapping[str, Cost]:
    adapters = min(s.count, s.rows) * s.r * (s.k + s.n) * s.adapter.itemsize
    base, update = 2 * s.m * s.k * s.n, 2 * s.m * s.r * (s.k + s.n)
    moved = (s.m * (s.k + s.n) + s.n * s.k) * s.dtype.itemsize
    forward = Cost(base + update, moved + adapters)
    if not s.train:
        return {"forward": forward, "full": forward}
    backward = Cost(base + 2 * update, moved + s.m * s.k * s.dtype.itemsize + 2 * adapters)
    return passes(forward, backward)


# ---- one decoding step of a whole model


@dataclass(frozen=True)
class Decode:
    """A Llama-like model that decodes one token for each of `rows` texts of `length` tokens over `count` adapters."""

    rows: int
    count: int
    r: int
    length: int
    hidden: int
    layers: int
    inner: int
    vocabulary: int
    targets: tuple[str, ...]
    dtype: torch.dtype = _HALF
    limit: float | None = None

    def build(self, device: torch.device) -> Any:
        """The same weights at every call."""
        from transformers import LlamaConfig, LlamaForCausalLM

        heads = max(self.hidden // 64, 2)
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.inner, pad_token_id=0,
            num_hidden_layers=self.layers, num_attention_heads=heads, num_key_value_heads=heads,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
        return model.to(device, self.dtype).requires_grad_(False).eval()

    @property
    def names(self) -> list[str]:
        """The adapter of each row, round robin."""
        return [f"a{row % self.count}" for row in range(self.rows)]

    def fields(self) -> dict[str, Any]:
        """Of a LoRA configuration, ours or PEFT's."""
        return {"r": self.r, "target_modules": list(self.targets), "init_lora_weights": False}


def _decodes(options: Options) -> Iterator[Decode]:
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    if options.quick:
        yield Decode(6, 3, 4, 5, 64, 2, 128, 300, every, _F32)
    elif options.device.type == "cpu":
        yield Decode(32, 16, 8, 32, 768, 6, 2048, 32000, every, limit=1.35)
        yield Decode(32, 16, 8, 32, 768, 6, 2048, 32000, ("q_proj", "v_proj"), limit=1.35)
    else:
        yield Decode(64, 32, 16, 256, 4096, 4, 14336, 32000, every)


def _decode_case(options: Options, decode: Decode) -> Case:
    which = "all" if len(decode.targets) > 2 else "q,v"
    label = f"decode llama-{decode.layers}x{decode.hidden} {decode.rows} rows {decode.count} of r{decode.r} {which}"
    config = {"rows": decode.rows, "adapters": decode.count, "R": decode.r, "targets": which, "grad": False}
    providers: dict[str, Callable[[], Runner]] = {
        FLOOR: lambda: _step(decode.build(options.device), decode),
        OURS: lambda: _decode_ours(decode, options.device),
        "one adapter": lambda: _decode_one(decode, options.device),
    }
    if not options.quick:
        providers["peft"] = lambda: _decode_peft(decode, options.device)
    return Case(
        "multi_low_rank", f"{label} {SHORT[decode.dtype]}", ("hidden", "hidden size", decode.hidden), config,
        options.device, decode.dtype, providers, lambda: _decode_oracle(decode, options.device), limit=decode.limit,
    )  # fmt: skip


def _step(model: Any, decode: Decode, gated: bool = False, **arguments: Any) -> Runner:
    """One token for every row, on a cache that is cut back to the text each time."""
    device = next(model.parameters()).device
    ids, token = (_tokens(decode, length, device) for length in (decode.length, 1))
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True, **arguments).past_key_values

    def run() -> Tensor:
        out = model(input_ids=token, past_key_values=cache, use_cache=True, **arguments)
        cache.crop(-1)
        logits: Tensor = out.logits
        return logits

    return _peers.inference(run, gated)


def _tokens(decode: Decode, length: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, decode.vocabulary, (decode.rows, length), generator=generator).to(device)


def _with_adapters(model: nn.Module, decode: Decode) -> nn.Module:
    for name in dict.fromkeys(decode.names):
        pk.attach(model, pk.LoraConfig(**decode.fields()), name)
        _fill(name, {key: p for key, p in model.named_parameters() if f".{name}." in key})
    return model


def _fill(name: str, parameters: Mapping[str, nn.Parameter]) -> None:
    """Values that depend on the adapter's number and the order of its parameters: A before B, layer by layer."""
    generator = torch.Generator().manual_seed(int(name[1:]))
    for parameter in parameters.values():
        values = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
        parameter.data.copy_(values)


def _decode_ours(decode: Decode, device: torch.device) -> Runner:
    model = _with_adapters(decode.build(device), decode)
    return _step(_Named(model, decode.names), decode, gated=True)


def _decode_one(decode: Decode, device: torch.device) -> Runner:
    return _step(_with_adapters(decode.build(device), decode), decode)


class _Named(nn.Module):
    """The model with its rows' adapters named anew at every call, as `PeftModel` does."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, **inputs: Any) -> Any:
        with pk.mixed(self.model, self.names):
            return self.model(**inputs)


def _decode_peft(decode: Decode, device: torch.device) -> Runner:
    names = list(dict.fromkeys(decode.names))
    model: Any = _peers.peft_model(decode.build(device), "LoraConfig", **decode.fields(), lora_alpha=8)
    import peft

    for name in names:
        model.add_adapter(name, peft.LoraConfig(**decode.fields(), lora_alpha=8))
        _fill(name, {key: p for key, p in model.named_parameters() if f".{name}." in key})
    return _step(model.eval(), decode, gated=True, adapter_names=decode.names)


def _decode_oracle(decode: Decode, device: torch.device) -> Values:
    """Each adapter alone on the whole batch in float64, its rows picked."""
    model = _with_adapters(decode.build(device), decode).double()
    logits = {}
    for name in dict.fromkeys(decode.names):
        pk.set_adapter(model, name)
        logits[name] = _step(model, decode).forward()
    return {"y": torch.stack([logits[name][row] for row, name in enumerate(decode.names)])}
