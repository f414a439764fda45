"""One method on one tiny model, and what checks and tests say about it: equal, close, unchanged, raises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import registry
from peftkern.adapter import AdapterConfig, Method
from peftkern.attach import active_adapters, adapters, attach
from peftkern.attachment import state
from peftkern.errors import TargetError
from peftkern.testing.models import TinyModel


class NotApplicable(Exception):
    """A check does not apply to this method on this model; the message says by which fact."""


@dataclass(frozen=True)
class Case:
    """One method with one configuration on one model; each call of `plain` or `attached` gives a fresh one."""

    method: str
    config: AdapterConfig
    model: TinyModel
    directory: Path

    @property
    def kind(self) -> type[Method]:
        """The class of the method."""
        return registry.load(self.method)

    def plain(self) -> nn.Module:
        """The backbone, the same weights each time."""
        return self.model.build()

    def attached(self, name: str = "default", to: nn.Module | None = None, moved: int | None = 1) -> nn.Module:
        """A fresh backbone, or `to`, with the method attached.

        `moved` is the seed of its start, and by which what trains is then moved away, so that the adapter does
        something; None leaves it at its start. Raises NotApplicable when the configuration matches nothing.
        """
        model = self.plain() if to is None else to
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(moved or 0)
                attach(model, self.config, name)
        except TargetError as error:
            raise NotApplicable(f"{self.method} does not apply to {self.model.name}: {error}") from error
        if moved is not None:
            move(own_parameters(model, name).values(), moved)
        return model

    def logits(self, model: nn.Module) -> Tensor:
        """Output for the model's batch, without labels, in eval mode and without a graph."""
        training = model.training
        inputs = {key: value for key, value in self.model.batch().items() if key != "labels"}
        with torch.no_grad():
            logits: Tensor = model.eval()(**inputs).logits
        model.train(training)
        return logits

    def loss(self, model: nn.Module) -> Tensor:
        """The model's own loss on its batch."""
        loss: Tensor = model(**self.model.batch()).loss
        return loss

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Name -> gradient of one backward pass in training mode, for what requires a gradient."""
        model.train()
        model.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            torch.autograd.backward(self.loss(model))
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expect(ok: bool, message: str) -> None:
    """Raise AssertionError with the message unless `ok`."""
    if not ok:
        raise AssertionError(message)


def expect_close(got: Tensor, want: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Raise AssertionError unless ‖got - want‖ <= tolerance · ‖want‖ and the shapes agree."""
    expect(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}")
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    expect(error <= tolerance, f"{what}: off by {error:.3g} of the norm, allowed {tolerance:.3g}")


def expect_equal(got: Tensor, want: Tensor, what: str) -> None:
    """Raise AssertionError unless the tensors are the same to the bit."""
    same = got.shape == want.shape and got.dtype == want.dtype and torch.equal(got, want)
    expect(same, f"{what}: not equal to the bit")


def own_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """Checkpoint key -> parameter of one attached adapter."""
    attachment = state(model)
    return {} if attachment is None else attachment.parameters_of(model, name)


def move(parameters: Iterable[nn.Parameter], seed: int, by: float = 0.05) -> None:
    """Add normal noise of deviation `by`, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator).to(p.device, p.dtype), alpha=by)


def switch_checkpointing(model: nn.Module, use_reentrant: bool | None) -> None:
    """Turn on gradient checkpointing of one kind, or off (None), under the name this version of transformers has."""
    end = "disable" if use_reentrant is None else "enable"
    switch = getattr(model, f"activation_checkpointing_{end}", None) or getattr(model, f"gradient_checkpointing_{end}")
    switch(*([] if use_reentrant is None else [{"use_reentrant": use_reentrant}]))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that an error, or attaching and detaching, must leave as it was."""
    modules = list(model.named_modules())
    return {
        "state_dict": {key: value.detach().clone() for key, value in model.state_dict().items()},
        "modules": [(path, id(module), type(module), module.training) for path, module in modules],
        "parameters": [(path, id(p), p.requires_grad) for path, p in model.named_parameters(remove_duplicate=False)],
        "hooks": [(path, len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in modules],
        "adapters": (list(adapters(model)), active_adapters(model)),
    }


def expect_same(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Raise AssertionError unless the model is as `snapshot` saw it: tensors to the bit, modules, hooks, grad flags."""
    after = snapshot(model)
    for key in ("modules", "parameters", "hooks", "adapters"):
        expect(after[key] == before[key], f"{key} of the model changed: {_difference(before[key], after[key])}")
    expect(list(after["state_dict"]) == list(before["state_dict"]), "names in the state_dict changed")
    for key, value in before["state_dict"].items():
        expect_equal(after["state_dict"][key], value, f"state_dict entry {key}")


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside the block the model may be worked on; at its end it must be as it was at its start."""
    before = snapshot(model)
    yield
    expect_same(model, before)


@contextmanager
def raises(kind: type[Exception], what: str) -> Iterator[list[Exception]]:
    """Expect an error of this class inside the block; the list holds it afterwards."""
    caught: list[Exception] = []
    try:
        yield caught
    except kind as error:
        caught.append(error)
        return
    except Exception as error:
        raise AssertionError(f"{what}: raised {type(error).__name__} ({error}), wanted {kind.__name__}") from error
    raise AssertionError(f"{what}: raised nothing, wanted {kind.__name__}")


def _difference(before: Any, after: Any) -> str:
    gone = [item for item in before if item not in after]
    new = [item for item in after if item not in before]
    return f"gone {gone[:3]}, new {new[:3]}"
