"""Prompt tuning: trained rows in front of the embedded text, [P; x]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkern.adapter import PromptAdapter, PromptConfig, PromptSite
from peftkern.base import adapter_dtype


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(PromptConfig):
    """Fields as Hugging Face PEFT's PromptTuningConfig.

    prompt_tuning_init: "RANDOM" (standard normal), "SAMPLE_VOCAB" (embeddings of T random tokens) or "TEXT" (embeddings
    of prompt_tuning_init_text, tokenised by tokenizer_name_or_path, made to fit T; a tokenizer's own code is never run,
    whatever tokenizer_kwargs say). A token_dim that is not the backbone's raises ConfigError.
    """

    peft_type: ClassVar[str | None] = "PROMPT_TUNING"

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(
            self, "prompt_tuning_init", getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)
        )
        self.one_of("prompt_tuning_init", ("RANDOM", "SAMPLE_VOCAB", "TEXT"))
        if self.prompt_tuning_init == "TEXT":
            self.require(bool(self.prompt_tuning_init_text), "prompt_tuning_init_text", "a text for init TEXT")
            self.require(bool(self.tokenizer_name_or_path), "tokenizer_name_or_path", "a tokenizer for init TEXT")


class PromptTuning(PromptAdapter):
    """P [T, H] in front of the first real token. Source: Lester et al. 2021 (arXiv:2104.08691), section 2."""

    name = "prompt_tuning"
    summary = "trained rows in front of the embedded text"
    paper = "https://arxiv.org/abs/2104.08691"
    Config = PromptTuningConfig
    keys: ClassVar[Mapping[str, str]] = {"embeddings": "prompt_embeddings"}

    def __init__(self, site: PromptSite, config: PromptTuningConfig) -> None:
        super().__init__(site, config)
        config.require(config.token_dim in (None, site.hidden_size), "token_dim", f"{site.hidden_size}, the backbone's")
        table = site.embedding.weight.detach()
        rows = _initial(table, config)
        self.embeddings = nn.Parameter(rows.to(adapter_dtype(table.dtype)).clone())

    def prompt(self) -> Tensor:
        """[T, H]."""
        return self.embeddings


def _initial(table: Tensor, config: PromptTuningConfig) -> Tensor:
    length = config.num_virtual_tokens
    if config.prompt_tuning_init == "RANDOM" or config.inference_mode:
        return torch.randn(length, table.shape[1], device=table.device)
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        return table[torch.randint(table.shape[0], (length,)).to(table.device)]
    from transformers import AutoTokenizer

    options = {**(config.tokenizer_kwargs or {}), "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    ids = torch.tensor(tokenizer(config.prompt_tuning_init_text)["input_ids"], device=table.device)
    return table[ids.repeat(-(-length // len(ids)))[:length]]
