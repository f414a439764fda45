"""A per-channel scale of a frozen layer: y = s · base(x)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftkern.adapter import LayerAdapter, LayerConfig
from peftkern.base import BaseLayer


@dataclass(frozen=True, kw_only=True)
class ScaleConfig(LayerConfig):
    """Which modules are scaled; fields of the method go here, and are checked in `__post_init__` with `require`."""


class Scale(LayerAdapter):
    """y = s · base(x), s [N] f32, for base(x) [..., N]; one factor per output channel.

    A method that adds to the base overrides `delta` and `delta_weight` instead of `forward` and `merge`.
    """

    name = "scale"
    summary = "a learned factor per output channel"
    paper = "https://arxiv.org/abs/2205.05638"
    Config = ScaleConfig

    def __init__(self, base: BaseLayer, config: ScaleConfig) -> None:
        super().__init__(base, config)
        self.scale = nn.Parameter(torch.ones(base.out_features))

    def forward(self, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """s · base(x), in the dtype of base(x)."""
        y = base(x)
        return y * self.scale.to(y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows of W [N, K] and of the bias [N] times s."""
        scale = self.scale.to(weight.dtype)
        return scale[:, None] * weight, None if bias is None else scale * bias
