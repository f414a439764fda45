"""Attach, switch, disable, merge and detach adapters, in place: the model stays the object and the class it was."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from peftkern import frozen, prefixing, prompting, registry, targets
from peftkern.adapter import (
    AdaptedModule,
    AdapterConfig,
    InputTap,
    KeyValueAdapter,
    LayerAdapter,
    Method,
    PromptAdapter,
    Selection,
)
from peftkern.base import BaseLayer, adapter_dtype
from peftkern.errors import AdapterError, ConfigError, MergeError, TargetError, near
from peftkern.rows import Batch
from peftkern.selection import SelectedParameters

M = TypeVar("M", bound=nn.Module)
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
            keys |= {_stored(key, wrapped): p for key, p in self.selection(name).trained().items()}
        return keys

    def tensors_of(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """The same, with the frozen tensors that are saved beside them."""
        return {**self.shared_of(name), **self.parameters_of(model, name)}

    def shared_of(self, name: str) -> dict[str, Tensor]:
        """Checkpoint key -> what all layers of one adapter share."""
        return _shared_state(self.configs[name].method, self.shared[name]) if name in self.shared else {}

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
            self.shared = _like(self.method.share(bases, config), next(iter(bases.values()), None))
            for site in sites:
                base = bases[site.path]
                adapter = self.method(base, config.for_target(site.path) if hasattr(config, "for_target") else config)
                adapter.__dict__["shared"] = self.shared
                self.layers[site.path] = _like(adapter, base)
                if site.source is not None:
                    self.sources[site.path] = site.source
        if issubclass(self.method, PromptAdapter):
            prompt_site = prompting.site(model)
            if issubclass(self.method, KeyValueAdapter):
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
        keys = _shared_state(self.method, self.shared)
        keys |= {f"{path}.{key}": p for path, a in self.layers.items() for key, p in a.state_keys().items()}
        if self.prompt is not None:
            keys |= self.prompt.state_keys()
        trained = self.selection.trained() if self.selection else {}
        return keys | {_stored(key, self.layers): p for key, p in trained.items()}

    def commit(self, trainable: bool = True) -> None:
        """Make the adapter part of the model; the first one attached becomes the active one."""
        model, name = self.model, self.name
        first = state(model) is None
        if first:
            model.add_module(STATE, Attachment(model))
        attachment = _state(model)
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
        attachment.carried[name] = {_stored(key, self.layers) for key in self.carried}
        if trainable:
            attachment.trainable.add(name)
        if attachment.plan is None:
            attachment.plan = frozen.FrozenPrefix(model)
        _activate(model, (name,) if first else attachment.active)


def attach(model: M, config: AdapterConfig, name: str = "default") -> M:
    """Attach an adapter in place and return the same model.

    The backbone is frozen. The first adapter becomes active, later ones wait for `set_adapter`. Raises AdapterError
    for a name that is taken, TargetError when nothing matches, ConfigError for a bad configuration, before any change.
    """
    if not isinstance(config, AdapterConfig):
        raise ConfigError(f"config is a {type(config).__name__}: want a configuration such as pk.LoraConfig(r=8)")
    Plan(model, config, name).commit()
    return model


def detach(model: M, name: str = "default") -> M:
    """Remove an adapter; removing the last one restores the untouched model to the bit, hooks and flags included."""
    attachment = _known(model, name)
    _check_not_mixed(attachment)
    _check_way_back(attachment, (name,))
    if attachment.merged:
        unmerge(model)
    attachment.batch.forget()
    _activate(model, tuple(n for n in attachment.active if n != name))
    for module in list(adapted_modules(model)):
        if name in module.adapters:
            del module.adapters[name]
            if not module.adapters:
                _replace(model, module, module.base_layer)
    _drop_taps(model, attachment)
    if attachment.hooks is not None and name in attachment.hooks.prompts:
        del attachment.hooks.prompts[name]
        attachment.hooks.pools.discard(name)
        if not attachment.hooks.prompts:
            attachment.hooks.remove()
            attachment.hooks = None
    if name in attachment.selections:
        del attachment.selections[name]
    if name in attachment.shared:
        del attachment.shared[name]
    attachment.trainable.discard(name)
    del attachment.configs[name], attachment.carried[name]
    if not attachment.configs:
        if attachment.plan is not None:
            attachment.plan.remove()
        delattr(model, STATE)
        for parameter, required in attachment.required_grad:
            parameter.requires_grad_(required)
    return model


def set_adapter(model: nn.Module, names: str | list[str]) -> None:
    """Make these adapters, and no others, active and trainable; several act in the order given.

    Raises AdapterError for an unknown name, and for two that train the same parameter of the backbone.
    """
    chosen = (names,) if isinstance(names, str) else tuple(names)
    for name in chosen:
        _known(model, name)
    if len(set(chosen)) != len(chosen):
        raise AdapterError(f"names={list(chosen)}: each adapter can be active once")
    if merged := _state(model).merged:
        raise AdapterError(f"adapters {list(merged)} are merged: unmerge before switching")
    _check_not_mixed(_state(model))
    _activate(model, chosen)


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the active adapters, in the order in which they act."""
    attachment = state(model)
    return [] if attachment is None else list(attachment.active)


def adapters(model: nn.Module) -> dict[str, AdapterConfig]:
    """Name -> configuration of everything that is attached."""
    attachment = state(model)
    return {} if attachment is None else dict(attachment.configs)


@contextmanager
def disabled(model: M) -> Iterator[M]:
    """Inside the block the model is the frozen backbone, selected parameters and prompts included."""
    attachment = _state(model)
    active, merged = attachment.active, attachment.merged
    _check_way_back(attachment, active)
    if merged:
        unmerge(model)
    _activate(model, ())
    try:
        with attachment.batch.set(None, off=True):
            yield model
    finally:
        _activate(model, active)
        if merged:
            merge(model)


def merge(model: M) -> M:
    """Fold the active adapters into the backbone's weights, in f32, each into the module's own dtype.

    The original weights are kept aside, so that `unmerge` is exact; a tied weight is replaced in the adapted module
    only. Raises MergeError, before any weight moves, when merged already, when a method cannot be merged, when a
    weight is quantised, and when the result is not finite.
    """
    attachment = _state(model)
    _check_not_mixed(attachment)
    if attachment.merged:
        raise MergeError(f"adapters {list(attachment.merged)} are merged already: unmerge first")
    if not attachment.active:
        raise MergeError("no adapter is active: set_adapter first")
    for name in attachment.active:
        if attachment.hooks is not None and name in attachment.hooks.prompts:
            raise MergeError(f"adapter {name!r} is a prompt: it has no weight to merge into")
    new = [(module, module.merged_weights()) for module in adapted_modules(model) if module.active]
    for module, weights in new:
        module.unmerged = module.set_base_weights(weights)
    attachment.merged = attachment.active
    return model


def unmerge(model: M) -> M:
    """Put the original weights back, to the bit. Raises MergeError when nothing is merged."""
    attachment = _state(model)
    if not attachment.merged:
        raise MergeError("no adapter is merged")
    for module in adapted_modules(model):
        if module.unmerged is not None:
            module.set_base_weights(module.unmerged)
            module.unmerged = None
    attachment.merged = ()
    return model


def merge_and_unload(model: M) -> M:
    """Merge the active adapters for good and return the plain model without a trace of peftkern."""
    attachment = _state(model)
    _check_way_back(attachment, tuple(attachment.configs))
    merge(model)
    for adapted in adapted_modules(model):
        adapted.unmerged = None
        adapted.active = ()
    attachment.merged = ()
    kept = [pair for selection in attachment.selected() if selection.active for pair in selection.placed()]
    for name in list(attachment.configs):
        detach(model, name)
    for (module, attribute), parameter in kept:
        setattr(module, attribute, parameter)
    _note_untied(model)
    return model


def state(model: nn.Module) -> Attachment | None:
    """What is attached to the model, or None."""
    found = model._modules.get(STATE)
    return found if isinstance(found, Attachment) else None


def adapted_modules(model: nn.Module) -> Iterator[AdaptedModule]:
    """All wrapped targets."""
    return (module for module in model.modules() if isinstance(module, AdaptedModule))


def _activate(model: nn.Module, names: tuple[str, ...]) -> None:
    attachment = _state(model)
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
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in names:
        if name in attachment.trainable:
            for key, parameter in attachment.parameters_of(model, name).items():
                parameter.requires_grad_(parameter.is_floating_point() and key not in attachment.carried[name])
    if attachment.plan is not None:
        attachment.plan.refresh()


def _note_untied(model: nn.Module) -> None:
    """A saved model is tied again when it is loaded, unless its configuration says that it no longer is."""
    config = getattr(model, "config", None)
    if isinstance(model, PreTrainedModel) and getattr(config, "tie_word_embeddings", False):
        ends = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if None not in ends and ends[0].weight is not ends[1].weight:
            model.config.tie_word_embeddings = False


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


N = TypeVar("N", bound="nn.Module | None")


def _like(module: N, base: BaseLayer | None) -> N:
    """The module on the base's device, in the dtype that adapters over it have."""
    if module is not None and base is not None:
        module.to(base.weight.device, adapter_dtype(base.weight.dtype))
    return module


def _shared_state(method: type[Method], shared: nn.Module | None) -> dict[str, Tensor]:
    return method.shared_state(shared) if issubclass(method, LayerAdapter) else {}


def _stored(name: str, wrapped: Container[str]) -> str:
    """Checkpoint key of a selected parameter: in a wrapped module it stands behind `base_layer`, as in PEFT's files."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.base_layer.{leaf}" if path in wrapped else name


def _wrapper(model: nn.Module, path: str) -> AdaptedModule:
    module = model.get_submodule(path)
    if isinstance(module, AdaptedModule):
        return module
    wrapper = AdaptedModule(module, path)
    _replace(model, module, wrapper)
    return wrapper


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands, in every parent that holds it."""
    for parent in list(model.modules()):
        if parent is new or parent is old:
            continue
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def _tap(model: nn.Module, attachment: Attachment, path: str, adapter: LayerAdapter) -> None:
    key = path.replace(".", "/")
    if key not in attachment.taps:
        attachment.taps[key] = InputTap()
        attachment.taps[key].batch = attachment.batch  # type: ignore[assignment]
        module = dict(targets.named_modules(model))[path]  # not the wrapper, which goes when its adapters go
        attachment.tap_handles[key] = module.register_forward_pre_hook(attachment.taps[key].hook)  # type: ignore[arg-type]
    adapter.tap = attachment.taps[key]


def _drop_taps(model: nn.Module, attachment: Attachment) -> None:
    """Take away the hooks that no adapter reads any more: they keep others from running fused."""
    adapters = [adapter for module in adapted_modules(model) for adapter in module.adapters.values()]
    used = {id(getattr(adapter, "tap", None)) for adapter in adapters}
    for key in [key for key, tap in attachment.taps.items() if id(tap) not in used]:
        attachment.tap_handles.pop(key).remove()
        del attachment.taps[key]


def _check_way_back(attachment: Attachment, names: tuple[str, ...]) -> None:
    for name in names:
        if name not in attachment.selections:
            continue
        attachment.selection(name).check_movable()
        if not attachment.selection(name).keep_original:
            raise AdapterError(
                f"adapter {name!r} trains the backbone in place (keep_original=False): there is no way back"
            )


def _check_not_mixed(attachment: Attachment) -> None:
    if attachment.batch.rows is not None:
        raise AdapterError("a mixed batch is under way: adapters are switched, merged and detached outside of it")


def _check_name(model: nn.Module, name: str) -> None:
    _check_bare(model)
    attachment = state(model)
    if not isinstance(name, str) or not name or "." in name:
        raise AdapterError(f"adapter name {name!r}: want a non-empty string without a dot")
    if hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"adapter name {name!r} is an attribute of nn.ModuleDict: choose another name")
    if attachment is not None and name in attachment.configs:
        raise AdapterError(f"an adapter {name!r} is attached already: detach it first, or choose another name")
    if attachment is not None and attachment.merged:
        raise AdapterError(f"adapters {list(attachment.merged)} are merged: unmerge before attaching another")


def _check_bare(model: nn.Module) -> None:
    if hasattr(type(model), "get_base_model"):
        kind = type(model).__name__
        raise AdapterError(f"{kind} is a wrapper: use its own methods, or give the model that get_base_model() returns")


def _state(model: nn.Module) -> Attachment:
    _check_bare(model)
    attachment = state(model)
    if attachment is None:
        raise AdapterError(f"nothing is attached to this {type(model).__name__}: attach or load an adapter first")
    return attachment


def _known(model: nn.Module, name: str) -> Attachment:
    attachment = _state(model)
    if name not in attachment.configs:
        have = ", ".join(attachment.configs)
        raise AdapterError(f"no adapter {name!r}{near(name, attachment.configs)} is attached (attached: {have})")
    return attachment
