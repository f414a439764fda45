"""Bottleneck adapters: a small two-layer network after, or beside, the sublayers of a transformer block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import ops, targets
from peftkern.adapter import InputTap, LayerAdapter, LayerConfig, Site
from peftkern.base import BaseLayer, adapter_dtype
from peftkern.errors import TargetError
from peftkern.ops.bottleneck import ACTIVATIONS

PLACEMENTS = {
    "attention_and_ffn": ("attention_output", "ffn_output"),
    "ffn": ("ffn_output",),
    "parallel": ("ffn_output",),
}


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(LayerConfig):
    """Size and place of the bottleneck.

    reduction_factor: hidden size over bottleneck size; r, when given, is the bottleneck size itself. placement: "ffn"
    (after the feed-forward network), "attention_and_ffn" (after both) or "parallel" (beside the feed-forward network,
    reading its input). activation: relu, gelu, silu or tanh. layer_norm: normalise the adapter's input. scale: factor
    on the adapter's output. target_modules, when given, names the projections whose output is adapted instead.
    """

    r: int | None = None
    reduction_factor: float = 16.0
    placement: str = "ffn"
    activation: str = "relu"
    dropout: float = 0.0
    layer_norm: bool = False
    scale: float = 1.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.r is None or self.r > 0, "r", "an integer > 0, or None")
        self.require(self.reduction_factor > 0, "reduction_factor", "a number > 0")
        self.require(0.0 <= self.dropout < 1.0, "dropout", "0 <= p < 1")
        self.require(self.init_std >= 0, "init_std", "a number >= 0")
        self.one_of("placement", PLACEMENTS)
        self.one_of("activation", ACTIVATIONS)
        parallel_by_name = self.placement == "parallel" and self.target_modules is not None
        self.require(not parallel_by_name, "target_modules", "None with placement='parallel': it follows the blocks")


class Bottleneck(LayerAdapter):
    """y = r + s · (U · act(D · norm(x) + b_d) + b_u), D [R, K], U [N, R]; U and b_u start at zero.

    Sequential: x and r are the sublayer's output. Parallel: x is the feed-forward network's input, r its output.
    Source: Houlsby et al. 2019 (arXiv:1902.00751), after the feed-forward network only: Pfeiffer et al. 2020
    (arXiv:2005.00247), parallel: He et al. 2022 (arXiv:2110.04366).
    """

    name = "adapter"
    summary = "bottleneck adapter, sequential or parallel"
    paper = "https://arxiv.org/abs/1902.00751"
    Config = BottleneckConfig

    def __init__(self, base: BaseLayer, config: BottleneckConfig) -> None:
        super().__init__(base, config)
        width = base.out_features
        r = config.r or max(1, int(width / config.reduction_factor))
        make: dict[str, Any] = {"device": base.weight.device, "dtype": adapter_dtype(base.weight.dtype)}
        self.down = nn.Parameter(torch.randn(r, width, **make) * config.init_std)
        self.down_bias = nn.Parameter(torch.zeros(r, **make))
        self.up = nn.Parameter(torch.zeros(width, r, **make))
        self.up_bias = nn.Parameter(torch.zeros(width, **make))
        self.norm_weight = nn.Parameter(torch.ones(width, **make)) if config.layer_norm else None
        self.norm_bias = nn.Parameter(torch.zeros(width, **make)) if config.layer_norm else None
        self.activation, self.scale, self.p = config.activation, config.scale, config.dropout
        self.tap: InputTap | None = None

    @classmethod
    def sites(cls, model: nn.Module, config: BottleneckConfig) -> list[Site]:
        """The projections that end the sublayers `placement` names, in the blocks `layers_to_transform` keeps."""
        if config.target_modules is not None:
            return [Site(path) for path in targets.match(model, config)]
        layers = config.layers_to_transform
        keep = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
        sites: list[Site] = []
        for part in targets.block_parts(model):
            for role in PLACEMENTS[config.placement]:
                path = part.get(role)
                if path is None or targets.matches(path, config.exclude_modules):
                    continue
                if keep is None or targets.block_index(model, path, config.layers_pattern) in keep:
                    sites.append(Site(path, part["ffn_input"] if config.placement == "parallel" else None))
        if not sites:
            raise TargetError(f"placement={config.placement!r}, layers_to_transform={layers!r}: no place is left")
        return sites

    def forward(self, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The base's output with the bottleneck applied to it, or added beside it."""
        y = base(x)
        return ops.bottleneck(
            y if self.tap is None else self.tap.take(),
            self.down,
            self.up,
            down_bias=self.down_bias,
            up_bias=self.up_bias,
            residual=y,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            activation=self.activation,
            scale=self.scale,
            p=self.p if self.training else 0.0,
        )
