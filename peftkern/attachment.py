"""What is attached to a model, and which of it is active."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from torch import Tensor, nn

from peftkern import frozen, prompting
from peftkern.adapted import AdaptedModule
from peftkern.adapter import AdapterConfig, LayerAdapter, Method, PromptAdapter
from peftkern.errors import AdapterError, near
from peftkern.rows import Batch
from peftkern.selection import SelectedParameters

STATE = "_peftkern"


class Attachment(nn.Module):
    """Everything that is attached to one model; registered as its submodule `_peftkern`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.configs: dict[str, AdapterConfig] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.trainable: set[str] = set()
        self.carried: dict[str, set[str]] = {}
        self.selections = nn.ModuleDict()
        self.taps = nn.ModuleDict()
        self.shared = nn.ModuleDict()
        self.hooks: prompting.PromptHooks | None = None
        self.plan: frozen.FrozenPrefix | None = None
        self.tap_handles: dict[str, Any] = {}
        self.batch = Batch()
        self.required_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def forward(self, *args: Any) -> Any:
        """Pass through, for a container such as nn.Sequential that runs its children in turn."""
        return args[0] if len(args) == 1 else args

    def parameters_of(self, model: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """Checkpoint key, without prefix -> parameter of one adapter."""
        shared = self.shared_of(name).items()
        keys: dict[str, nn.Parameter] = {key: p for key, p in shared if isinstance(p, nn.Parameter)}
        wrapped: set[str] = set()
        for module in adapted_modules(model):
            if name in module.adapters:
                wrapped.add(module.base.path)
                adapter: LayerAdapter = module.adapters[name]  # type: ignore[assignment]
                keys |= {f"{module.base.path}.{key}": p for key, p in adapter.state_keys().items()}
        if (prompt := self.prompt(name)) is not None:
            keys |= prompt.state_keys()
        if name in self.selections:
            keys |= {stored_key(key, wrapped): p for key, p in self.selection(name).trained().items()}
        return keys

    def tensors_of(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """The same, with the frozen tensors that are saved beside them."""
        return {**self.shared_of(name), **self.parameters_of(model, name)}

    def shared_of(self, name: str) -> dict[str, Tensor]:
        """Checkpoint key -> what all layers of one adapter share."""
        return shared_state(self.configs[name].method, self.shared[name]) if name in self.shared else {}

    def prompt(self, name: str) -> PromptAdapter | None:
        """The prompt or prefix of one adapter, if it has one."""
        if self.hooks is None or name not in self.hooks.prompts:
            return None
        return self.hooks.prompts[name]  # type: ignore[return-value]

    def selection(self, name: str) -> SelectedParameters:
        """The backbone's own parameters that one adapter trains."""
        return self.selections[name]  # type: ignore[return-value]

    def selected(self) -> list[SelectedParameters]:
        """Those of all adapters."""
        return [self.selection(name) for name in self.selections]


def state(model: nn.Module) -> Attachment | None:
    """What is attached to the model, or None."""
    found = model._modules.get(STATE)
    return found if isinstance(found, Attachment) else None


def attached(model: nn.Module) -> Attachment:
    """What is attached to the model; AdapterError where nothing is."""
    check_bare(model)
    attachment = state(model)
    if attachment is None:
        raise AdapterError(f"nothing is attached to this {type(model).__name__}: attach or load an adapter first")
    return attachment


def known(model: nn.Module, name: str) -> Attachment:
    """The same, for an adapter that must be there: AdapterError, with near names, where it is not."""
    attachment = attached(model)
    if name not in attachment.configs:
        have = ", ".join(attachment.configs)
        raise AdapterError(f"no adapter {name!r}{near(name, attachment.configs)} is attached (attached: {have})")
    return attachment


def check_bare(model: nn.Module) -> None:
    """Raise AdapterError for a wrapper around the model."""
    if hasattr(type(model), "get_base_model"):
        kind = type(model).__name__
        raise AdapterError(f"{kind} is a wrapper: use its own methods, or give the model that get_base_model() returns")


def adapted_modules(model: nn.Module) -> Iterator[AdaptedModule]:
    """All wrapped targets."""
    return (module for module in model.modules() if isinstance(module, AdaptedModule))


def activate(model: nn.Module, names: tuple[str, ...]) -> None:
    """Make these the active adapters; AdapterError, before any change, for two that train the same parameter."""
    attachment = attached(model)
    chosen: list[tuple[str, SelectedParameters]] = []
    for name in names:
        if name not in attachment.selections:
            continue
        selection = attachment.selection(name)
        for other_name, other in chosen:
            if shared := other.overlaps(selection):
                raise AdapterError(f"adapters {other_name!r} and {name!r} both train {shared[0]}: activate one of them")
        chosen.append((name, selection))
    leaving = [selection for selection in attachment.selected() if selection.active]
    for selection in [*leaving, *(selection for _, selection in chosen)]:
        selection.check_movable()
    for selection in leaving:
        selection.swap()
    for _, selection in chosen:
        selection.swap()
    for module in adapted_modules(model):
        module.active = tuple(name for name in names if name in module.adapters)
    for tap in attachment.taps.values():
        tap.readers = 0  # type: ignore[assignment]
    for module in adapted_modules(model):
        for name in module.active:
            if getattr(module.adapters[name], "tap", None) is not None:
                module.adapters[name].tap.readers += 1  # type: ignore[union-attr, operator]
    if attachment.hooks is not None:
        attachment.hooks.activate(names)
    attachment.active = names
    for name in attachment.configs:
        for parameter in attachment.parameters_of(model, name).values():
            parameter.requires_grad_(False)
    for name in names:
        if name in attachment.trainable:
            for key, parameter in attachment.parameters_of(model, name).items():
                parameter.requires_grad_(parameter.is_floating_point() and key not in attachment.carried[name])
    if attachment.plan is not None:
        attachment.plan.refresh()


def shared_state(method: type[Method], shared: nn.Module | None) -> dict[str, Tensor]:
    """Checkpoint key -> tensor of what all layers of one adapter share."""
    return method.shared_state(shared) if issubclass(method, LayerAdapter) else {}


def stored_key(name: str, wrapped: Container[str]) -> str:
    """Checkpoint key of a selected parameter: in a wrapped module it stands behind `base_layer`, as in PEFT's files."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.base_layer.{leaf}" if path in wrapped else name


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands, in every parent that holds it."""
    for parent in list(model.modules()):
        if parent is new or parent is old:
            continue
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
