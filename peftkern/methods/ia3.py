"""(IA)³: keys, values and the hidden layer of the feed-forward network, each multiplied by a trained vector."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from peftkern import ops, targets
from peftkern.adapter import LayerAdapter, LayerConfig
from peftkern.arithmetic import Recipe
from peftkern.base import BaseLayer, adapter_dtype
from peftkern.errors import AdapterError, ConfigError, TargetError, near


@dataclass(frozen=True, kw_only=True)
class IA3Config(LayerConfig):
    """Fields as Hugging Face PEFT's IA3Config.

    target_modules: by default, in every transformer block, the key and value projections (a fused projection as a
    whole) and the last projection of the feed-forward network. feedforward_modules: those of them whose input is scaled
    instead of their output: names that a path ends with, or a regular expression; by default the targets that end a
    feed-forward network. init_ia3_weights: True (ones) or False (random: for tests). fan_in_fan_out is read and
    written, but the layout is taken from the module itself.
    """

    peft_type: ClassVar[str | None] = "IA3"
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"runtime_config": (None, {})}
    extensions: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern")

    feedforward_modules: list[str] | str | None = None
    init_ia3_weights: bool = True
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feedforward_modules is not None and not isinstance(self.feedforward_modules, str):
            object.__setattr__(self, "feedforward_modules", sorted(set(self.feedforward_modules)))
        spec = self.feedforward_modules
        self.regular("feedforward_modules", [spec] if isinstance(spec, str) else [])

    def is_feedforward(self, path: str) -> bool:
        """Whether the input of this target is scaled, by Hugging Face PEFT's rule: a name need not end at a dot."""
        spec = self.feedforward_modules
        if isinstance(spec, str):
            return re.fullmatch(spec, path) is not None
        return path.endswith(tuple(spec or ()))

    def resolved(self, model: nn.Module) -> IA3Config:
        """With targets and feed-forward modules by name, so that a file says what was trained to any reader.

        Raises TargetError for feed-forward modules that are no targets.
        """
        config = self
        if config.target_modules is None:
            config = replace(config, target_modules=targets.short_names(model, _default_targets(model, config)))
        config = super(IA3Config, config).resolved(model)
        paths = targets.match(model, config)
        names, spec = config.target_modules, config.feedforward_modules
        if spec is None:
            ends = _feedforward_ends(model)
            inside = [path for path in paths if path in ends]
        else:
            inside = [path for path in paths if config.is_feedforward(path)]
            for name in [spec] if isinstance(spec, str) else spec:
                if not inside or (isinstance(spec, list) and not any(path.endswith(name) for path in inside)):
                    hint = near(name, {path.split(".")[-1] for path in paths})
                    raise TargetError(f"feedforward_modules: {name!r} matches none of the targets{hint}")
        if names == "all-linear":
            names = targets.short_names(model, paths)
        listed = isinstance(names, list)
        if spec is None or (listed and not (isinstance(spec, list) and set(spec) <= set(names or ()))):
            spec = _feedforward_names(model, paths, inside)
            names = sorted({*(names or ()), *spec}) if listed else names  # PEFT wants the one list in the other
        return replace(config, target_modules=names, feedforward_modules=spec)


class IA3(LayerAdapter):
    """y = l ⊙ base(x), or y = base(l ⊙ x) where the target ends a feed-forward network; l starts at one.

    Source: Liu et al. 2022 (arXiv:2205.05638), section 3.3.
    """

    name = "ia3"
    summary = "trained factors on keys, values and the feed-forward network's hidden layer"
    paper = "https://arxiv.org/abs/2205.05638"
    Config = IA3Config
    combinations = ("linear",)
    keys: ClassVar[Mapping[str, str]] = {"scale": "ia3_l"}

    def __init__(self, base: BaseLayer, config: IA3Config) -> None:
        super().__init__(base, config)
        if base.is_embedding:
            raise TargetError(f"{base.path} is an embedding: (IA)³ scales nn.Linear and Conv1D")
        self.feedforward = config.is_feedforward(base.path)
        shape = (1, base.in_features) if self.feedforward else (base.out_features, 1)
        weight = base.weight
        self.scale = nn.Parameter(weight.new_ones(shape, dtype=adapter_dtype(weight.dtype)))
        if not config.init_ia3_weights:
            nn.init.normal_(self.scale)

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:  # type: ignore[override]
        """The base's output for a scaled input, or its output, bias included, scaled."""
        scale = self.scale.view(-1)
        if self.feedforward:
            return base(ops.column_scale(x, scale))
        fresh = base.linear is not None  # no hook and no code of its own that could still hold the output
        return ops.column_scale(base(x), scale, overwrite=fresh)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Columns of the weight scaled, or its rows together with the bias."""
        scale = self.scale.to(weight.dtype)
        if self.feedforward or bias is None:
            return weight * scale, bias
        return weight * scale, bias * scale.view(-1)

    @classmethod
    def combined(cls, configs: Sequence[IA3Config], recipe: Recipe) -> IA3Config:
        """With the feed-forward modules of all; AdapterError where some give them by name and others by pattern."""
        specs = [config.feedforward_modules for config in configs]
        if any(spec != specs[0] for spec in specs) and any(isinstance(spec, str) for spec in specs):
            raise AdapterError(f"feedforward_modules={specs}: want lists of names, or one pattern")
        names = specs[0] if isinstance(specs[0], str) else sorted({name for spec in specs for name in spec or ()})
        return replace(configs[0], feedforward_modules=names)

    def combine(self, parts: Sequence[tuple[IA3, float]], recipe: Recipe) -> None:
        """The weighted sum of the vectors."""
        if any(one.feedforward != self.feedforward for one, _ in parts):
            raise AdapterError("one adapter scales the input of a module and another its output")
        self.scale.copy_(recipe.merged([one.scale for one, _ in parts], [weight for _, weight in parts]))


def _default_targets(model: nn.Module, config: IA3Config) -> list[str]:
    """Key and value projections inside the transformer blocks, and the ends of their feed-forward networks."""
    stacks = tuple(path + "." for path, _ in targets.blocks(model))
    ends = _feedforward_ends(model)
    inside = [path for path in targets.adaptable(model) if path.startswith(stacks)]
    keys = [path for path in inside if targets.matches(path, list(targets.KEY_VALUE_PROJECTIONS))]
    if not keys:
        raise TargetError("found no key and value projections by their usual names: give target_modules by name")
    chosen = [path for path in inside if path in ends or path in keys]
    if chosen := [path for path in chosen if not targets.matches(path, config.exclude_modules)]:
        return chosen
    raise TargetError(f"exclude_modules={config.exclude_modules!r} leaves no target")


def _feedforward_names(model: nn.Module, paths: list[str], inside: list[str]) -> list[str]:
    """Names that say of these targets, and of no other one, that they end a feed-forward network."""
    short = targets.short_names(model, inside)
    return short if [path for path in paths if path.endswith(tuple(short))] == inside else sorted(inside)


def _feedforward_ends(model: nn.Module) -> set[str]:
    try:
        return {part["ffn_output"] for part in targets.block_parts(model)}
    except TargetError as error:
        raise ConfigError(
            f"feedforward_modules=None: {type(model).__name__} has no transformer blocks to find them in; name the "
            "targets whose input is to be scaled, [] for none"
        ) from error
