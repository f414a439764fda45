"""The fused layers as plain modules, for people who write their own models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftkern import ops
from peftkern.adapter import kaiming_
from peftkern.ops.bottleneck import ACTIVATIONS


class LowRankLinear(nn.Module):
    """y = x Wᵀ + bias + (alpha / r) · B A drop(x) with W frozen; computed by one fused op.

    x [..., in_features] -> [..., out_features]. `from_linear` takes over an existing layer's weight without a copy.
    Source: Hu et al. 2021 (arXiv:2106.09685).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._start(nn.Linear(in_features, out_features, bias, device, dtype), r, alpha, dropout, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> LowRankLinear:
        """Wrap a linear layer, which is frozen and shared."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._start(linear, r, alpha, dropout, adapter_dtype)
        return layer

    def _start(
        self, linear: nn.Linear, r: int, alpha: float | None, dropout: float, adapter_dtype: torch.dtype | None
    ) -> None:
        if r < 1 or not 0.0 <= dropout < 1.0:
            raise ValueError(f"r={r}, dropout={dropout}: want r >= 1 and 0 <= dropout < 1")
        weight = linear.weight
        self.linear = linear.requires_grad_(False)
        dtype = adapter_dtype or weight.dtype
        self.a = nn.Parameter(kaiming_(weight.new_empty(r, linear.in_features, dtype=dtype)))
        self.b = nn.Parameter(weight.new_zeros(linear.out_features, r, dtype=dtype))
        self.scale = (r if alpha is None else alpha) / r
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype."""
        p = self.dropout if self.training else 0.0
        w, bias = self.linear.weight, self.linear.bias
        return ops.low_rank(x, self.a, self.b, scale=self.scale, weight=w, bias=bias, p=p)


class Bottleneck(nn.Module):
    """y = residual + drop(scale · (U · act(D · norm(x) + b_d) + b_u)); U and b_u start at zero.

    x [..., features] -> [..., features]. The residual is x unless another is given.
    Source: Houlsby et al. 2019 (arXiv:1902.00751); parallel form He et al. 2022 (arXiv:2110.04366).
    """

    def __init__(
        self,
        features: int,
        r: int,
        *,
        activation: str = "relu",
        dropout: float = 0.0,
        layer_norm: bool = False,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if r < 1 or not 0.0 <= dropout < 1.0 or activation not in ACTIVATIONS:
            raise ValueError(f"r={r}, dropout={dropout}, activation={activation!r}: want r >= 1, 0 <= dropout < 1 and "
                             f"one of {', '.join(ACTIVATIONS)}")  # fmt: skip
        self.down = nn.Parameter(kaiming_(torch.empty(r, features, device=device, dtype=dtype)))
        self.down_bias = nn.Parameter(torch.zeros(r, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(features, r, device=device, dtype=dtype))
        self.up_bias = nn.Parameter(torch.zeros(features, device=device, dtype=dtype))
        self.norm_weight = nn.Parameter(torch.ones(features, device=device, dtype=dtype)) if layer_norm else None
        self.norm_bias = nn.Parameter(torch.zeros(features, device=device, dtype=dtype)) if layer_norm else None
        self.activation, self.dropout, self.scale = activation, dropout, scale

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., features], residual [..., features] or None for x itself -> [..., features]."""
        return ops.bottleneck(
            x,
            self.down,
            self.up,
            down_bias=self.down_bias,
            up_bias=self.up_bias,
            residual=x if residual is None else residual,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            activation=self.activation,
            scale=self.scale,
            p=self.dropout if self.training else 0.0,
        )


class SoftPrompt(nn.Module):
    """T trained rows in front of embedded text. Source: Lester et al. 2021 (arXiv:2104.08691)."""

    def __init__(
        self,
        length: int,
        features: int,
        *,
        std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(length, features, device=device, dtype=dtype) * std)

    def forward(
        self,
        ids: Tensor | None = None,
        table: Tensor | None = None,
        *,
        embeds: Tensor | None = None,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ops.Prompted:
        """ids [B, S] with table [V, H], or embeds [B, S, H] -> embeddings, mask, positions, labels of length T + S."""
        return ops.prompt_concat(self.rows, ids=ids, table=table, embeds=embeds, mask=mask, labels=labels)
