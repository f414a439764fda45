"""The module that stands where a target stood, with its adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import rows
from peftkern.base import BaseLayer, check_no_replica
from peftkern.errors import MergeError


class AdaptedModule(nn.Module):
    """Stands where the target stood: the base module, its adapters by name, and which of them are active.

    Several active adapters are nested in the order of activation: the base that a later one sees holds the earlier.
    In a mixed batch (`batch.rows`) each row goes through the one adapter that it names, whatever is active.
    """

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.base = BaseLayer(base_layer, path)
        self.active: tuple[str, ...] = ()
        self.unmerged: dict[str, nn.Parameter] | None = None
        self.batch = rows.Batch()
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """The base's output with every active adapter applied."""
        check_no_replica(self)
        mixed = self.batch.rows
        if mixed is not None:
            return rows.forward(self, mixed, x)
        call: Callable[[Tensor], Tensor] = self.base
        if self.unmerged is not None or not self.active:
            return call(x)
        adapters = self._modules["adapters"]._modules  # type: ignore[union-attr]  # attribute look-ups cost microseconds
        for name in self.active[:-1]:
            call = _Adapted(adapters[name], call)  # type: ignore[arg-type]
        y: Tensor = adapters[self.active[-1]](call, x)  # type: ignore[misc]
        return y

    def merged_weights(self) -> dict[str, nn.Parameter]:
        """New base parameters with the active adapters folded in, computed in f32 or wider; nothing is changed."""
        self.base.check_mergeable()
        weight, bias = self.base.weight.detach(), self.base.bias
        dtype = torch.promote_types(weight.dtype, torch.float32)
        weight, bias = weight.to(dtype), None if bias is None else bias.detach().to(dtype)
        with torch.no_grad():
            for name in self.active:
                weight, bias = self.adapters[name].merge(weight, bias)  # type: ignore[operator]
        new = self.base.with_weights(weight, bias)
        if not all(bool(parameter.isfinite().all()) for parameter in new.values()):
            raise MergeError(
                f"{self.base.path}: the merged weight is not finite in {self.base.weight.dtype}; "
                f"look for NaN and large values in {self.active}"
            )
        return new

    def set_base_weights(self, new: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Put parameters into the base module and return those that were there."""
        old = self.base.weights()
        for key, parameter in new.items():
            setattr(self.base_layer, key, parameter)
        return {key: old[key] for key in new}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter in (self.unmerged or {}).values():  # kept aside, and so not a parameter of any module
            parameter.data = fn(parameter.data)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "adapters", "base"):
                raise
            return getattr(super().__getattr__("base_layer"), name)


class _Adapted:
    """A base seen through one more adapter; it has no plain linear inside, so that fused ops use its output."""

    linear = None
    __slots__ = ("_adapter", "_base")

    def __init__(self, adapter: nn.Module, base: Callable[[Tensor], Tensor]) -> None:
        self._adapter, self._base = adapter, base

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._adapter(self._base, x)
        return out
