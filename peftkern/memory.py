"""What training costs in memory, against full fine-tuning: parameters, gradients, optimizer state, activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.attach import disabled
from peftkern.attachment import state

ADAM_STATES = 2


@dataclass(frozen=True)
class MemoryReport:
    """Counts of parameters and bytes; `full_*` is the same for full fine-tuning of the same backbone.

    Optimizer state is AdamW's: two tensors of the parameter's size and dtype. Activations are the bytes that one
    forward saves for backward, parameters not counted; None when no batch was given.
    """

    trainable: int
    total: int
    gradient_bytes: int
    optimizer_bytes: int
    full_gradient_bytes: int
    full_optimizer_bytes: int
    activation_bytes: int | None = None
    full_activation_bytes: int | None = None

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters, 0 to 1."""
        return self.trainable / max(self.total, 1)

    def __str__(self) -> str:
        rows = [
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {100 * self.share:.4f}",
            _row("gradients", self.gradient_bytes, self.full_gradient_bytes),
            _row("optimizer (AdamW)", self.optimizer_bytes, self.full_optimizer_bytes),
        ]
        if self.activation_bytes is not None and self.full_activation_bytes is not None:
            rows.append(_row("saved activations", self.activation_bytes, self.full_activation_bytes))
        return "\n".join(rows)


def trainable(model: nn.Module, batch: Mapping[str, Any] | None = None) -> MemoryReport:
    """Report what trains in `model` and what it costs; with a `batch`, one forward each way measures activations.

    The forwards run in the model's present mode with the random state put back afterwards.
    """
    parameters = [p for name, p in model.named_parameters() if ".spare." not in name]
    ours = [p for p in parameters if p.requires_grad]
    attachment = state(model)
    backbone = backbone_parameters(model) if attachment is not None else parameters
    gradient, full = _bytes(ours), _bytes(backbone)
    activation = full_activation = None
    if batch is not None:
        activation = _forward_bytes(model, batch)
        with disabled(model) if attachment is not None else nullcontext(), _all_trainable(backbone):
            full_activation = _forward_bytes(model, batch)
    return MemoryReport(
        sum(p.numel() for p in ours),
        sum(p.numel() for p in parameters),
        gradient,
        ADAM_STATES * gradient,
        full,
        ADAM_STATES * full,
        activation,
        full_activation,
    )


def backbone_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters the model had before anything was attached."""
    attachment = state(model)
    return list(model.parameters()) if attachment is None else [p for p, _ in attachment.required_grad]


def saved_bytes(run: Callable[[], Any], exclude: Iterator[Tensor] | list[nn.Parameter] | None = None) -> int:
    """Bytes of distinct storages that autograd saves for backward while `run()` runs, without those of `exclude`."""
    excluded = {t.untyped_storage().data_ptr() for t in exclude or ()}
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(storages.values())


def _forward_bytes(model: nn.Module, batch: Mapping[str, Any]) -> int:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        return saved_bytes(lambda: model(**batch), list(model.parameters()))


@contextmanager
def _all_trainable(parameters: list[nn.Parameter]) -> Iterator[None]:
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(p.is_floating_point())
        yield
    finally:
        for p, required in zip(parameters, before, strict=True):
            p.requires_grad_(required)


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _row(name: str, ours: int, full: int) -> str:
    return f"{name}: {ours / 2**20:.2f} MiB (full fine-tuning {full / 2**20:.2f} MiB)"
