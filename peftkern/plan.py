"""An adapter that is built and checked before anything of the model changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor, nn

from peftkern import frozen, prompting, registry, targets
from peftkern.adapted import AdaptedModule
from peftkern.adapter import AdapterConfig, InputTap, KeyValueAdapter, LayerAdapter, PromptAdapter, Selection
from peftkern.attachment import (
    STATE,
    Attachment,
    activate,
    attached,
    check_bare,
    replace_module,
    shared_state,
    state,
    stored_key,
)
from peftkern.base import BaseLayer, adapter_dtype
from peftkern.errors import AdapterError, TargetError
from peftkern.selection import SelectedParameters

N = TypeVar("N", bound="nn.Module | None")


class Plan:
    """An adapter that is built and checked but not yet part of the model; nothing has changed until `commit`.

    `carried` names parameters of the backbone that the adapter brings along, frozen, in place of the model's own.
    """

    def __init__(self, model: nn.Module, config: AdapterConfig, name: str, carried: Iterable[str] = ()) -> None:
        self.method = registry.by_config(config)
        config = config.resolved(model)
        self.model, self.config, self.name = model, config, name
        self.layers: dict[str, LayerAdapter] = {}
        self.sources: dict[str, str] = {}
        self.shared: nn.Module | None = None
        self.prompt: PromptAdapter | None = None
        self.carried = list(carried)
        apart = [*_saved_parameters(model, config), *self.carried]
        self.selected: list[str] = list(apart)
        _check_name(model, name)
        if issubclass(self.method, LayerAdapter):
            modules = targets.adaptable(model)
            sites = self.method.sites(model, config)
            bases = {site.path: BaseLayer(modules[site.path], site.path) for site in sites}
            if bases:
                first = next(iter(bases.values()))
                with first.in_place():
                    self.shared = _like(self.method.share(bases, config), first)
            for site in sites:
                base = bases[site.path]
                with base.in_place():
                    own = config.for_target(site.path) if hasattr(config, "for_target") else config
                    adapter = _like(self.method(base, own), base)
                adapter.__dict__["shared"] = self.shared
                self.layers[site.path] = adapter
                if site.source is not None:
                    self.sources[site.path] = site.source
        if issubclass(self.method, PromptAdapter):
            prompt_site = prompting.site(model)
            if issubclass(self.method, KeyValueAdapter):
                from peftkern import prefixing  # imports transformers

                prefixing.check(model, prompt_site.key_value_shape[0])
            weight = prompt_site.embedding.weight
            self.prompt = self.method(prompt_site, config).to(weight.device, adapter_dtype(weight.dtype))
        if issubclass(self.method, Selection) or hasattr(self.method, "select"):
            self.selected += self.method.select(model, config)
        keep = bool(getattr(config, "keep_original", True))
        self.selection = _select(model, self.selected, keep, apart) if self.selected else None
        if not (self.layers or self.prompt or self.selection):
            raise TargetError(f"method {self.method.name!r} found nothing to train in {type(model).__name__}")

    def tensors(self) -> dict[str, Tensor]:
        """Checkpoint key, without prefix -> parameter or shared tensor."""
        keys = shared_state(self.method, self.shared)
        keys |= {f"{path}.{key}": p for path, a in self.layers.items() for key, p in a.state_keys().items()}
        if self.prompt is not None:
            keys |= self.prompt.state_keys()
        trained = self.selection.trained() if self.selection else {}
        return keys | {stored_key(key, self.layers): p for key, p in trained.items()}

    def commit(self, trainable: bool = True) -> None:
        """Make the adapter part of the model; the first one attached becomes the active one."""
        model, name = self.model, self.name
        first = state(model) is None
        if first:
            model.add_module(STATE, Attachment(model))
            model.requires_grad_(False)  # once: what is made trainable by hand later stays so
        attachment = attached(model)
        attachment.batch.forget()
        if self.shared is not None:
            attachment.shared[name] = self.shared.train(model.training)
        for path, adapter in self.layers.items():
            module = _wrapper(model, path)
            module.batch = attachment.batch
            module.adapters[name] = adapter.train(module.training)
            if path in self.sources:
                _tap(model, attachment, self.sources[path], adapter)
        if self.prompt is not None:
            if attachment.hooks is None:
                attachment.hooks = prompting.PromptHooks(model)
            attachment.hooks.prompts[name] = self.prompt
            if self.config.task_type == "SEQ_CLS":
                attachment.hooks.pools.add(name)
        if self.selection is not None:
            attachment.selections[name] = self.selection
        attachment.configs[name] = self.config
        attachment.carried[name] = {stored_key(key, self.layers) for key in self.carried}
        if trainable:
            attachment.trainable.add(name)
        if attachment.plan is None:
            attachment.plan = frozen.FrozenPrefix(model)
        activate(model, (name,) if first else attachment.active)


def _check_name(model: nn.Module, name: str) -> None:
    check_bare(model)
    attachment = state(model)
    if not isinstance(name, str) or not name or "." in name:
        raise AdapterError(f"adapter name {name!r}: want a non-empty string without a dot")
    if hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"adapter name {name!r} is an attribute of nn.ModuleDict: choose another name")
    if attachment is not None and name in attachment.configs:
        raise AdapterError(f"an adapter {name!r} is attached already: detach it first, or choose another name")
    if attachment is not None and attachment.merged:
        raise AdapterError(f"adapters {list(attachment.merged)} are merged: unmerge before attaching another")


def _saved_parameters(model: nn.Module, config: AdapterConfig) -> list[str]:
    paths = tuple(path + "." for path in targets.saved_modules(model, config))
    return [name for name, _ in targets.named_parameters(model) if name.startswith(paths)]


def _select(model: nn.Module, names: list[str], keep: bool, apart: list[str]) -> SelectedParameters:
    """Copies of the backbone's own parameters, not of what another adapter has made of them."""
    attachment = state(model)
    active = [] if attachment is None else [selection for selection in attachment.selected() if selection.active]
    for selection in active:
        selection.swap()
    try:
        return SelectedParameters(model, names, keep, apart)
    finally:
        for selection in active:
            selection.swap()


def _like(module: N, base: BaseLayer) -> N:
    """The module on the base's device, in the dtype that adapters over it have."""
    if module is not None:
        module.to(base.weight.device, adapter_dtype(base.weight.dtype))
    return module


def _wrapper(model: nn.Module, path: str) -> AdaptedModule:
    module = model.get_submodule(path)
    if isinstance(module, AdaptedModule):
        return module
    wrapper = AdaptedModule(module, path)
    replace_module(model, module, wrapper)
    return wrapper


def _tap(model: nn.Module, attachment: Attachment, path: str, adapter: LayerAdapter) -> None:
    key = path.replace(".", "/")
    if key not in attachment.taps:
        attachment.taps[key] = InputTap()
        attachment.taps[key].batch = attachment.batch  # type: ignore[assignment]
        module = dict(targets.named_modules(model))[path]  # not the wrapper, which goes when its adapters go
        attachment.tap_handles[key] = module.register_forward_pre_hook(attachment.taps[key].hook)  # type: ignore[arg-type]
    adapter.tap = attachment.taps[key]
