"""Who puts an adapter into a model of the steps: ours, plain PyTorch, and its peers; all with the same values."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import peftkern as pk

from . import _peers
from ._models import PROMPT, Model

_R, _ALPHA = 8, 16.0


@dataclass(frozen=True)
class Method:
    """What trains: `kind` is lora, dora, adapter, prompt or full; `targets` the linear layers that LoRA adapts."""

    label: str
    kind: str
    p: float = 0.0
    targets: str = ""


METHODS = (
    Method("lora all p0.1", "lora", 0.1, "all_linear"),
    Method("lora q,v p0.1", "lora", 0.1, "query_value"),
    Method("lora all p0", "lora", 0.0, "all_linear"),
    Method("lora q,v p0", "lora", 0.0, "query_value"),
    Method("bottleneck p0", "adapter"),
    Method("bottleneck p0.1", "adapter", 0.1),
    Method("prompt tuning", "prompt"),
    Method("dora all p0.1", "dora", 0.1, "all_linear"),
    Method("dora all p0", "dora", 0.0, "all_linear"),
    Method("full", "full"),
)

Trained = tuple[nn.Module, dict[str, nn.Parameter]]
Build = Callable[[Model, Method, nn.Module], Trained]


def adapted(model: Model, method: Method, base: nn.Module, build: Build) -> Trained:
    """The model with its adapter, whose weights are the same whoever built it, and what trains, by name."""
    module, trained = build(model, method, base)
    if method.kind != "full":
        for name, parameter in trained.items():
            if not name.endswith(":magnitude"):  # it starts as the norm of the weight, with every provider
                parameter.data.copy_(_value(name, parameter.shape))
    return module, trained


def _value(name: str, shape: torch.Size) -> Tensor:
    """Adapter weights drawn from a seed made of their name: nothing at zero, so that every gradient is one."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    spread = 0.1 if len(shape) == 1 else shape[-1] ** -0.5
    return torch.randn(shape, generator=generator) * (0.1 * spread if name.endswith((":b", ":up")) else spread)


def ours(model: Model, method: Method, base: nn.Module) -> Trained:
    """Any kind of method, by this library."""

    def lora() -> pk.LoraConfig:
        targets, dora = getattr(model, method.targets), method.kind == "dora"
        return pk.LoraConfig(r=_R, lora_alpha=_ALPHA, lora_dropout=method.p, target_modules=targets, use_dora=dora)

    configs: dict[str, Callable[[], Any]] = {
        "lora": lora,
        "dora": lora,
        "adapter": lambda: pk.BottleneckConfig(placement="ffn", dropout=method.p),
        "prompt": lambda: pk.PromptTuningConfig(num_virtual_tokens=PROMPT),
        "full": lambda: pk.FullConfig(keep_original=False),
    }
    pk.attach(base, configs[method.kind]())
    if method.kind == "full":
        return base, _whole(base)
    trained = {name: p for name, p in base.named_parameters() if p.requires_grad}
    if method.kind == "prompt":
        return base, {"prompt:prompt": p for p in trained.values()}  # noqa: B035 - it is one
    return base, {name.replace(".adapters.default.", ":"): p for name, p in trained.items()}


def _replaced(kind: type[_peers.LoraLinear], model: Model, method: Method, base: nn.Module) -> Trained:
    trained: dict[str, nn.Parameter] = {}
    names = getattr(model, method.targets)
    for path, linear in _linears(base, lambda path: path.split(".")[-1] in names):
        a, b = torch.empty(_R, linear.in_features), torch.empty(linear.out_features, _R)
        layer = kind(linear, a.to(linear.weight.device), b.to(linear.weight.device), _ALPHA / _R, method.p)
        base.set_submodule(path, layer)
        trained |= {f"{path}:{name}": p for name, p in layer.named_parameters() if not name.startswith("base.")}
    return base, trained


def _plain_bottleneck(model: Model, method: Method, base: nn.Module) -> Trained:
    trained: dict[str, nn.Parameter] = {}
    for path, linear in _linears(base, model.is_ffn_output):
        layer = _peers.BottleneckLinear(linear, linear.out_features // 16, method.p, torch.float32)
        base.set_submodule(path, layer)
        trained |= {f"{path}:{n}": p for n, p in layer.named_parameters() if not n.startswith("base.")}
    return base, trained


def _plain_prompt(model: Model, method: Method, base: nn.Module) -> Trained:
    module = _peers.PromptModel(base, PROMPT)
    return module, {"prompt:prompt": module.prompt}


def _plain_full(model: Model, method: Method, base: nn.Module) -> Trained:
    return base.requires_grad_(True), _whole(base)


def _peft(model: Model, method: Method, base: nn.Module) -> Trained:
    if method.kind == "prompt":
        task = "TOKEN_CLS" if model.family == "bert" else "CAUSAL_LM"
        module = _peers.peft_model(base, "PromptTuningConfig", task_type=task, num_virtual_tokens=PROMPT)
        rows: nn.Parameter = module.get_submodule("prompt_encoder.default.embedding").weight  # type: ignore[assignment]
        module.requires_grad_(False)
        rows.requires_grad_()
        return module, {"prompt:prompt": rows}
    names = getattr(model, method.targets)
    module = _peers.peft_model(
        base, "LoraConfig", r=_R, lora_alpha=_ALPHA, lora_dropout=method.p, target_modules=names, bias="none",
        use_dora=method.kind == "dora",
    )  # fmt: skip
    kinds = {"lora_A.default.weight": "a", "lora_B.default.weight": "b"}
    kinds |= {"lora_magnitude_vector.default.weight": "magnitude"}
    trained = {}
    for name, parameter in module.named_parameters():
        for end, kind in kinds.items():
            if name.endswith(end):
                trained[f"{name.removeprefix('base_model.model.').removesuffix('.' + end)}:{kind}"] = parameter
    return module, trained


def _peft_liger(model: Model, method: Method, base: nn.Module) -> Trained:
    module, trained = _peft(model, method, base)
    return _peers.with_liger(module), trained


def _linears(base: nn.Module, wanted: Callable[[str], bool]) -> list[tuple[str, nn.Linear]]:
    return [(n, m) for n, m in base.named_modules() if isinstance(m, nn.Linear) and wanted(n)]


def _whole(base: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of the model, matrices and vectors as two kinds."""
    return {f"{n}:{'matrix' if p.dim() > 1 else 'vector'}": p for n, p in base.named_parameters()}


PLAIN: Mapping[str, Build] = {
    "lora": functools.partial(_replaced, _peers.LoraLinear),
    "dora": functools.partial(_replaced, _peers.DoraLinear),
    "adapter": _plain_bottleneck,
    "prompt": _plain_prompt,
    "full": _plain_full,
}
"""Who builds a kind of method in plain PyTorch."""

PROVIDERS: Mapping[str, Build] = {
    "plain": PLAIN["lora"],
    "ours": ours,
    "addmm": functools.partial(_replaced, _peers.AddmmLoraLinear),
    "unsloth": functools.partial(_replaced, _peers.UnslothLoraLinear),
    "peft": _peft,
    "peft+liger": _peft_liger,
}
"""Who builds LoRA; ours and peft build whatever they know."""
