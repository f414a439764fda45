"""BitFit: only the biases train."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peftkern import targets
from peftkern.adapter import LayerConfig, Selection
from peftkern.errors import TargetError


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(LayerConfig):
    """target_modules, when given, restricts the biases to modules of these names."""


class BitFit(Selection):
    """Every bias of the backbone. Source: Ben Zaken et al. 2022 (arXiv:2106.10199)."""

    name = "bitfit"
    summary = "the biases of the backbone"
    paper = "https://arxiv.org/abs/2106.10199"
    Config = BitFitConfig

    @classmethod
    def select(cls, model: nn.Module, config: BitFitConfig) -> list[str]:
        """Names of the biases."""
        wanted: list[str] = []
        for name, _ in targets.named_parameters(model):
            path, _, attribute = name.rpartition(".")
            if attribute != "bias" or targets.matches(path, config.exclude_modules):
                continue
            layers = config.layers_to_transform
            keep = {layers} if isinstance(layers, int) else layers
            if keep is not None and targets.block_index(model, path, config.layers_pattern) not in keep:
                continue
            if config.target_modules is None or targets.matches(path, config.target_modules):
                wanted.append(name)
        if not wanted:
            spec = config.target_modules
            raise TargetError(f"{type(model).__name__} has no bias that target_modules={spec!r} matches")
        return wanted
