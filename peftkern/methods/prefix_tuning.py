"""Prefix tuning: trained rows in front of the keys and values of every layer, [Pk; K] and [Pv; V]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftkern.adapter import KeyValueAdapter, PromptConfig, PromptSite


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(PromptConfig):
    """Fields as Hugging Face PEFT's PrefixTuningConfig.

    prefix_projection: train the prefix through an MLP of encoder_hidden_size (the width of the keys unless given),
    which is dropped on saving. init_weights: None (standard normal) or "zero". token_dim, num_layers and
    num_attention_heads describe the backbone's keys and values; others than the backbone's raise ConfigError.
    """

    peft_type: ClassVar[str | None] = "PREFIX_TUNING"

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.init_weights in (None, "zero"), "init_weights", "None or 'zero'")
        self.require((self.encoder_hidden_size or 1) > 0, "encoder_hidden_size", "None or an integer > 0")

    def stored(self) -> PrefixTuningConfig:
        """A file holds the prefix itself, and what is loaded trains on without the MLP."""
        return replace(self, prefix_projection=False)


class PrefixTuning(KeyValueAdapter):
    """P [T, 2 · layers · d] as one row of keys and values per token. Source: Li & Liang 2021, sections 4.2 and 4.3."""

    name = "prefix_tuning"
    summary = "trained rows in front of the keys and values of every layer"
    paper = "https://arxiv.org/abs/2101.00190"
    Config = PrefixTuningConfig
    keys: ClassVar[Mapping[str, str]] = {"embeddings": "prompt_embeddings"}

    def __init__(self, site: PromptSite, config: PrefixTuningConfig) -> None:
        super().__init__(site, config)
        self.layers, self.heads, self.width = site.key_value_shape
        self.length, d = config.num_virtual_tokens, self.heads * self.width
        known = {
            "num_layers": (self.layers,),
            "num_attention_heads": (self.heads, site.model_config.num_attention_heads),
            "token_dim": (d, site.hidden_size),
        }
        for name, accepted in known.items():
            config.require(getattr(config, name) in (None, *accepted), name, f"{accepted[0]}, the backbone's")
        device, out = site.embedding.weight.device, 2 * self.layers * d
        self.transform: nn.Sequential | None = None
        if config.prefix_projection:
            hidden = config.encoder_hidden_size or d
            self.tokens = nn.Parameter(torch.randn(self.length, d, device=device))
            self.transform = nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, out)).to(device)
            if config.init_weights == "zero":
                nn.init.zeros_(self.transform[2].weight)  # type: ignore[arg-type]
                nn.init.zeros_(self.transform[2].bias)  # type: ignore[arg-type]
        else:
            zero = config.init_weights == "zero" or config.inference_mode
            rows = torch.zeros(self.length, out) if zero else torch.randn(self.length, out)
            self.embeddings = nn.Parameter(rows.to(device))

    def key_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """[H, T, D] each: slices 2 · layer and 2 · layer + 1 of the rows."""
        d = self.heads * self.width
        cut = slice(2 * layer * d, 2 * (layer + 1) * d)
        if self.transform is None:
            rows = self.embeddings[:, cut]
        else:
            *first, last = self.transform
            weight: Tensor = last.weight  # type: ignore[assignment]
            bias: Tensor = last.bias  # type: ignore[assignment]
            rows = nn.functional.linear(nn.Sequential(*first)(self.tokens), weight[cut], bias[cut])
        keys, values = self._split(rows, 1)
        return keys, values

    def every_layer(self) -> list[tuple[Tensor, Tensor]]:
        """All layers in one product and one gradient."""
        parts = self._split(self._rows(), self.layers)
        return list(zip(parts[::2], parts[1::2], strict=True))

    def stored_tensors(self) -> Mapping[str, Tensor]:
        """The prefix itself, [T, 2 · layers · d]."""
        return {"prompt_embeddings": self._rows()}

    def _rows(self) -> Tensor:
        if self.transform is None:
            return self.embeddings
        rows: Tensor = self.transform(self.tokens)
        return rows

    def _split(self, rows: Tensor, layers: int) -> tuple[Tensor, ...]:
        parts = rows.view(self.length, 2 * layers, self.heads, self.width).permute(1, 2, 0, 3)
        return parts.unbind(0)
