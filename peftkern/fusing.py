"""Our forward and backward inside LoRA layers that Hugging Face PEFT has built: in place and reversible."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from peftkern import ops
from peftkern.base import BaseLayer, is_supported
from peftkern.errors import AdapterError


@dataclass(frozen=True)
class FuseReport:
    """fused: paths of layers that now run on peftkern's ops. not_fused: path -> why its own forward goes on running.

    This is the state of things now. Every fused layer looks again at each call: one that is merged, disabled or given a
    second adapter later runs its own forward until that is over, and a layer that is refused for such a reason now is
    fused as soon as it is over.
    """

    fused: tuple[str, ...] = ()
    not_fused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} layers fused, {len(self.not_fused)} not"]
        return "\n".join(lines + [f"  {path}: {reason}" for path, reason in self.not_fused.items()])


def fuse(model: nn.Module) -> FuseReport:
    """Give the LoRA layers of a model built by Hugging Face PEFT a fused forward and backward, and report on each.

    The model may be a `peft.PeftModel` or a transformers model with injected adapters. Only instances change: classes,
    parameters, checkpoints and everything else PEFT does with the layers stay as they are. Calling it again is harmless
    and takes in layers added since. Raises AdapterError when the model has no layer of PEFT's.
    """
    fused: list[str] = []
    refused: dict[str, str] = {}
    for path, layer in _tuner_layers(model):
        reason = _never(layer)
        if reason is None and "forward" not in vars(layer):
            layer.forward = _FusedForward(layer)
        reason = reason or _not_now(layer)
        if reason is None:
            fused.append(path)
        else:
            refused[path] = reason
    if not fused and not refused:
        raise AdapterError(
            f"this {type(model).__name__} has no layer of Hugging Face PEFT to fuse; our own are fused already"
        )
    return FuseReport(tuple(fused), refused)


def unfuse(model: nn.Module) -> tuple[str, ...]:
    """Give every fused layer its own forward back; returns their paths."""
    layers = [(path, m) for path, m in model.named_modules() if isinstance(vars(m).get("forward"), _FusedForward)]
    for _, layer in layers:
        del layer.forward
    return tuple(path for path, _ in layers)


class _FusedForward:
    """Stands as `forward` on one layer; a class of its own so that the model still pickles and deep-copies."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.base = BaseLayer(layer.base_layer)
        self.norms, self.trained = ops.NormCache(), layer.training

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """base(x) + s · B A drop(x) in one op, or the layer's own forward where that would not be the same.

        With DoRA all but the base's bias is multiplied by m / ‖W + s · B A‖.
        """
        layer = self.layer
        if args or kwargs or layer.base_layer is not self.base.module or _not_now(layer) is not None:
            out: Tensor = type(layer).forward(layer, x, *args, **kwargs)
            return out
        name = _active(layer)[0]
        a, b, drop = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_dropout[name]
        p = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
        c = self._column_scale(name, a, b) if name in layer.lora_variant else None
        linear = self.base.linear
        if linear is None:
            bias = None if c is None else self.base.bias
            return ops.low_rank(
                x, a, b, scale=layer.scaling[name], base_out=self.base(x), bias=bias, column_scale=c, p=p
            )  # fmt: skip
        weight, bias = linear
        return ops.low_rank(x, a, b, scale=layer.scaling[name], weight=weight, bias=bias, column_scale=c, p=p)

    def _column_scale(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """DoRA's m / ‖W + s · B A‖, [N]. Where the mode changes, weights may have been swapped: the norm is dropped."""
        layer = self.layer
        if layer.training != self.trained:
            self.norms.clear()
            self.trained = layer.training
        magnitude: Tensor = layer.lora_magnitude_vector[name].weight
        return magnitude / self.norms(self.base.weight, a, b, scale=layer.scaling[name])


def _tuner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Path and module of every layer of PEFT's; its module is only looked up, never imported."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return []
    return [(path, module) for path, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)]


def _never(layer: Any) -> str | None:
    """Why the layer cannot be fused whatever its adapters do, or None."""
    lora = sys.modules.get("peft.tuners.lora.layer")
    kind = type(layer)
    if lora is None or not isinstance(layer, lora.LoraLayer):
        return f"{kind.__module__.split('.')[-2]}.{kind.__name__} is not a LoRA layer"
    if kind.forward is not lora.Linear.forward:
        return f"{kind.__name__} computes in its own way: only LoRA on nn.Linear and Conv1D is fused"
    base = layer.base_layer
    if not is_supported(base) or isinstance(base, nn.Embedding):
        return f"its base layer is a {type(base).__name__}: want nn.Linear or Conv1D"
    if type(base.weight) not in (nn.Parameter, Tensor) or not base.weight.is_floating_point():
        return f"its base weight is quantised or sharded ({type(base.weight).__name__}, {base.weight.dtype})"
    if not isinstance(vars(layer).get("forward"), (_FusedForward, type(None))):
        return "its forward has been replaced already, by accelerate's hooks or another library"
    return None


def _not_now(layer: Any) -> str | None:
    """Why the layer must run its own forward in its present state, or None."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return f"merged: {', '.join(layer.merged_adapters)}"
    names = _active(layer)
    if len(names) != 1:
        return f"{len(names)} active adapters: {', '.join(names)}" if names else "none of its adapters is active"
    name = names[0]
    a, b, drop = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if name in layer.lora_variant and (reason := _variant(layer, name, drop)) is not None:
        return reason
    if a.bias is not None or b.bias is not None:
        return f"adapter {name!r} has a bias (lora_bias)"
    if type(drop) not in (nn.Identity, nn.Dropout) or type(a) is not nn.Linear or type(b) is not nn.Linear:
        return f"adapter {name!r} is built of {type(a).__name__}, {type(b).__name__} and {type(drop).__name__}"
    if isinstance(drop, nn.Dropout) and not 0.0 <= drop.p < 1.0:
        return f"adapter {name!r} drops everything (p = {drop.p})"
    if not layer.cast_input_dtype_enabled:
        return "cast_input_dtype is turned off"
    if any(_hooked(module) for module in (a, b, drop)):
        return f"adapter {name!r} has hooks on lora_A, lora_B or its dropout"
    return None


def _variant(layer: Any, name: str, drop: Any) -> str | None:
    """Why a variant of LoRA is not what the op computes, or None: DoRA is, where nothing is dropped."""
    variants = sys.modules.get("peft.tuners.lora.variants")
    variant = layer.lora_variant[name]
    if variants is None or type(variant) is not variants.DoraLinearVariant:
        return f"adapter {name!r} is a LoRA variant: {type(variant).__name__}"
    if layer.training and not isinstance(drop, nn.Identity):
        return f"adapter {name!r} is DoRA with dropout, which PEFT applies to the input of the frozen product as well"
    magnitude = layer.lora_magnitude_vector[name]
    if _hooked(magnitude) or magnitude.weight.device != layer.base_layer.weight.device:
        return f"adapter {name!r} has its magnitude elsewhere, or hooks on it"
    return None


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
