"""One decode step of a Llama-like model: a new token per row over a filled cache, without grad, LoRA unmerged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import dispatch

from ._adapters import METHODS, PROVIDERS, adapted
from ._clock import Runner, Values
from ._measure import FLOOR, OURS, SHORT, YARDSTICK, Case, Cost, Options
from ._models import Model, decoder


def cases(options: Options) -> Iterator[Case]:
    """LoRA on all linear layers."""
    model, dtype = decoder(options), torch.bfloat16
    providers: dict[str, Callable[[], Runner]] = {
        FLOOR: functools.partial(_runner, options, model, dtype, "floor"),
        YARDSTICK: functools.partial(_runner, options, model, dtype, "plain"),
        OURS: functools.partial(_runner, options, model, dtype, "ours"),
    }
    if not options.quick:
        providers["addmm"] = functools.partial(_runner, options, model, dtype, "addmm")
        providers["peft"] = functools.partial(_runner, options, model, dtype, "peft")
    config = {"model": model.name, "batch": model.batch, "past": model.past, "method": "lora", "grad": False}
    label = f"{model.name} decode {model.batch} rows lora all {SHORT[dtype]} no grad"
    yield Case(
        "step", label, ("rows", "rows, one new token each", model.batch), config, options.device, dtype, providers,
        functools.partial(_reference, options, model, dtype), functools.partial(_cost, options, model, dtype),
    )  # fmt: skip


class _Decode:
    """The model with a cache that every call finds as it was: `reset` gives it back its length."""

    def __init__(self, model: Model, module: nn.Module, past: list[tuple[Tensor, Tensor]]) -> None:
        self.module, self.past = module.eval(), past
        device = next(module.parameters()).device
        self.ids = model.inputs(device)["input_ids"]
        self.cache: Any = None

    def reset(self) -> None:
        """A cache of the past tokens again; the tensors themselves are never written."""
        from transformers import DynamicCache

        self.cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.past):
            self.cache.update(keys, values, layer)

    def forward(self) -> Tensor:
        """Logits of the new tokens [rows, vocabulary]."""
        with torch.no_grad():
            logits: Tensor = self.module(input_ids=self.ids, past_key_values=self.cache, use_cache=True).logits[:, -1]
        return logits

    def check(self) -> Values:
        """The logits."""
        self.reset()
        return {"y": self.forward()}


def _decode(options: Options, model: Model, dtype: torch.dtype, kind: str, wide: bool = False) -> _Decode:
    base = model.build(options.device, dtype)
    module = base if kind == "floor" else adapted(model, METHODS[2], base, PROVIDERS[kind])[0]
    past = _past(model, options.device, dtype)
    if wide:
        module, past = module.double(), [(k.double(), v.double()) for k, v in past]
    return _Decode(model, module, past)


def _past(model: Model, device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [rows, heads, past, width] of every layer, the same at every call."""
    sizes = model.sizes
    width = sizes["hidden_size"] // sizes["num_attention_heads"]
    shape = (model.batch, sizes["num_key_value_heads"], model.past, width)
    generator = torch.Generator(device).manual_seed(2)

    def rand() -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return [(rand(), rand()) for _ in range(sizes["num_hidden_layers"])]


def _runner(options: Options, model: Model, dtype: torch.dtype, kind: str) -> Runner:
    step = _decode(options, model, dtype, kind)
    backend = dispatch.choose("low_rank", options.device, dtype) if kind == "ours" else ""
    gated = None if kind == "floor" else step.check
    return Runner(step.forward, None, gated, step.reset, backend, tuple(step.module.parameters()))


def _reference(options: Options, model: Model, dtype: torch.dtype) -> Values:
    """Plain PyTorch in float64, on weights rounded to the dtype under test."""
    return _decode(options, model, dtype, "plain", wide=True).check()


@functools.cache
def _cost(options: Options, model: Model, dtype: torch.dtype) -> Mapping[str, Cost]:
    """Every weight and the cache read once; two operations per weight and row."""
    step = _decode(options, model, dtype, "floor")
    embedding = step.module.get_input_embeddings().weight  # type: ignore[operator]
    weights = sum(p.numel() for p in step.module.parameters()) - embedding.numel()
    cache = sum(k.numel() + v.numel() for k, v in step.past)
    return {"forward": Cost(2.0 * weights * model.batch, float((weights + cache) * dtype.itemsize))}
