"""Several trained adapters as one new adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from peftkern import targets
from peftkern.adapter import LayerAdapter
from peftkern.arithmetic import Recipe
from peftkern.attachment import Attachment, adapted_modules, known
from peftkern.errors import AdapterError, ConfigError
from peftkern.plan import Plan

M = TypeVar("M", bound=nn.Module)


def combine(
    model: M,
    weights: Mapping[str, float],
    name: str,
    *,
    combination_type: str | None = None,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> M:
    """Attach a new adapter that stands for several of one method, each with its weight, and return the model.

    weights: name -> factor, negative to take away what an adapter has learnt. combination_type: by default the method's
    usual one, "svd" for LoRA; the other options are those of `arithmetic.Recipe`. The new adapter covers every target
    of any of them, and waits, frozen, for `set_adapter`. At most one of them may train parameters of the backbone
    itself (biases, heads); those come along. Raises AdapterError or ConfigError before any change.
    """
    if not weights or not all(math.isfinite(weight) for weight in weights.values()):
        raise AdapterError(f"weights={dict(weights)}: want the names of adapters, each with a finite factor")
    for one in weights:
        attachment = known(model, one)
    method = _method(attachment, list(weights))
    recipe = Recipe(
        combination_type=combination_type or method.combinations[0], svd_rank=svd_rank, svd_clamp=svd_clamp,
        svd_driver=svd_driver, density=density, majority_sign_method=majority_sign_method,
    )  # fmt: skip
    if recipe.combination_type not in method.combinations:
        raise ConfigError(
            f"combination_type={combination_type!r}: method {method.name!r} wants {', '.join(method.combinations)}"
        )
    owner = _owner(attachment, list(weights))
    leading = sorted(weights, key=lambda one: one != owner)  # whoever trains more than its layers comes first
    config = method.combined([attachment.configs[one] for one in leading], recipe)
    parts = _parts(model, weights)
    config = replace(
        config, target_modules=targets.short_names(model, parts), exclude_modules=None, layers_to_transform=None,
        layers_pattern=None,
    )  # fmt: skip
    plan = Plan(model, config, name)
    with torch.no_grad():
        for path, adapter in plan.layers.items():
            adapter.combine(parts[path], recipe)
        if plan.selection is not None and owner is not None:
            trained = attachment.selection(owner).trained()
            for key, parameter in plan.selection.trained().items():
                parameter.copy_(trained.get(key, parameter))
    plan.commit(trainable=False)
    return model


def _method(attachment: Attachment, names: Sequence[str]) -> type[LayerAdapter]:
    methods = {attachment.configs[name].method for name in names}
    if len(methods) > 1:
        found = ", ".join(sorted(method.name for method in methods))
        raise AdapterError(f"{', '.join(names)} are of several methods, {found}: want one")
    method = methods.pop()
    if not (issubclass(method, LayerAdapter) and method.combinations):
        raise AdapterError(f"adapters of method {method.name!r} cannot be combined")
    return method


def _owner(attachment: Attachment, names: Sequence[str]) -> str | None:
    """The one adapter that trains parameters of the backbone itself, if there is one."""
    owners = [name for name in names if name in attachment.selections]
    if len(owners) > 1:
        shared = next(iter(attachment.selection(owners[0]).trained()))
        raise AdapterError(f"{', '.join(owners)} train parameters of the backbone, as {shared}: one at most can")
    if any(attachment.carried[name] for name in owners):
        raise AdapterError(f"adapter {owners[0]!r} brings weights of the backbone: it cannot be combined")
    return owners[0] if owners else None


def _parts(model: nn.Module, weights: Mapping[str, float]) -> dict[str, list[tuple[Any, float]]]:
    """Path of a target -> the adapters there, with their weights."""
    found: dict[str, list[tuple[Any, float]]] = {}
    for module in adapted_modules(model):
        here = [(module.adapters[one], weight) for one, weight in weights.items() if one in module.adapters]
        if here:
            found[module.base.path] = here
    return found
