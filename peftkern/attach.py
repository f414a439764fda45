"""Attach, switch, disable, merge and detach adapters, in place: the model stays the object and the class it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from peftkern.adapter import AdapterConfig
from peftkern.attachment import STATE, Attachment, activate, adapted_modules, attached, known, replace_module, state
from peftkern.base import is_pretrained, token_embeddings
from peftkern.errors import AdapterError, ConfigError, MergeError
from peftkern.plan import Plan

M = TypeVar("M", bound=nn.Module)


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
    attachment = known(model, name)
    _check_not_mixed(attachment)
    _check_way_back(attachment, (name,))
    if attachment.merged:
        unmerge(model)
    attachment.batch.forget()
    activate(model, tuple(n for n in attachment.active if n != name))
    for module in list(adapted_modules(model)):
        if name in module.adapters:
            del module.adapters[name]
            if not module.adapters:
                replace_module(model, module, module.base_layer)
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
        known(model, name)
    if len(set(chosen)) != len(chosen):
        raise AdapterError(f"names={list(chosen)}: each adapter can be active once")
    if merged := attached(model).merged:
        raise AdapterError(f"adapters {list(merged)} are merged: unmerge before switching")
    _check_not_mixed(attached(model))
    activate(model, chosen)


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
    attachment = attached(model)
    active, merged = attachment.active, attachment.merged
    _check_way_back(attachment, active)
    if merged:
        unmerge(model)
    activate(model, ())
    try:
        with attachment.batch.set(None, off=True):
            yield model
    finally:
        activate(model, active)
        if merged:
            merge(model)


def merge(model: M) -> M:
    """Fold the active adapters into the backbone's weights, in f32, each into the module's own dtype.

    The original weights are kept aside, so that `unmerge` is exact; a tied weight is replaced in the adapted module
    only. Raises MergeError, before any weight moves, when merged already, when a method cannot be merged, when a
    weight is quantised, and when the result is not finite.
    """
    attachment = attached(model)
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
    attachment = attached(model)
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
    attachment = attached(model)
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


def _note_untied(model: nn.Module) -> None:
    """A saved model is tied again when it is loaded, unless its configuration says that it no longer is.

    It says so of all that is tied at once: what still is gets copies, which are then saved.
    """
    config = getattr(model, "config", None)
    if is_pretrained(model) and getattr(config, "tie_word_embeddings", False):
        first, last = token_embeddings(model)
        if first is not None and last is not None and first.weight is not last.weight:
            model.config.tie_word_embeddings = False
            _copy_tied(model)


def _copy_tied(model: nn.Module) -> None:
    """Give every parameter memory of its own: what shares any is saved once, under one name."""
    seen: set[int] = set()
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None or parameter.numel() == 0:
                continue
            memory = parameter.untyped_storage().data_ptr()
            if memory in seen:
                setattr(module, key, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            seen.add(memory)


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
