"""The models of the training steps: random weights, the shapes of BERT and of Llama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ._measure import Options

PROMPT = 20
"""Rows of a soft prompt; positions are left for them."""


@dataclass(frozen=True)
class Model:
    """A random model of one family; `bert` sizes are those of the first table that peers are held against."""

    name: str
    family: str
    batch: int
    length: int
    sizes: Mapping[str, Any] = field(hash=False)
    gate_rows: int | None = None
    """Rows of the batch that the correctness gate runs in float64; None for all."""
    past: int = 0
    """Tokens per row that a decode step finds in its cache."""

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The same weights at every call."""
        from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, BertConfig, LlamaConfig

        positions = self.length + PROMPT
        if self.family == "bert":
            off: Any = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            config: Any = BertConfig(**self.sizes, **off, max_position_embeddings=max(512, positions))
            config.num_labels = 9
            make: Any = AutoModelForTokenClassification
        else:
            config = LlamaConfig(
                **self.sizes, max_position_embeddings=max(2048, positions), use_cache=False, pad_token_id=0
            )
            make = AutoModelForCausalLM
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            model: nn.Module = make.from_config(config, attn_implementation="sdpa")
        return model.to(device, dtype).requires_grad_(False).train()

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """ids, mask of ones and labels [batch, length]."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, self.length)
        ids = torch.randint(1, self.sizes["vocab_size"], shape, generator=generator)
        labels = torch.randint(9, shape, generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return {name: tensor.to(device) for name, tensor in batch.items()}

    @property
    def all_linear(self) -> list[str]:
        """Names of every linear layer in a block."""
        if self.family == "bert":
            return ["query", "key", "value", "dense"]
        return ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    def is_ffn_output(self, path: str) -> bool:
        """Whether this linear layer ends a feed-forward network: where a bottleneck goes."""
        return (path.endswith(".output.dense") and "attention" not in path) or path.endswith(".down_proj")

    @property
    def query_value(self) -> list[str]:
        """Names of the query and value projections."""
        return ["query", "value"] if self.family == "bert" else ["q_proj", "v_proj"]


def models(options: Options) -> list[tuple[Model, tuple[torch.dtype, ...]]]:
    """The models of a device with the dtypes they run in, the most telling ones first."""
    both = (torch.float32, torch.bfloat16)
    if options.quick:
        tiny = (2, 16, 64, 2, 128, 500)
        return [(_bert("bert-tiny", *tiny), both[:1]), (_llama("llama-tiny", *tiny), both[1:])]
    small = _bert("bert-6x384", 8, 128, 384, 6, 1536, 30522)
    if options.device.type == "cpu":
        return [(small, both), (_llama("llama-4x512", 8, 64, 512, 4, 1408, 8192), both)]
    return [
        (replace(_llama("llama-8b-layers", 2, 2048, 4096, 4, 14336, 32000), gate_rows=1), (torch.bfloat16,)),
        (replace(_bert("bert-large", 32, 256, 1024, 24, 4096, 30522), gate_rows=4), (torch.bfloat16,)),
        (replace(_llama("llama-1b", 4, 1024, 2048, 16, 8192, 32000), gate_rows=1), (torch.bfloat16,)),
        (small, both),
    ]


def decoder(options: Options) -> Model:
    """The model of the decode step: many rows, one new token each."""
    if options.quick:
        return replace(_llama("llama-tiny", 2, 1, 64, 2, 128, 500), past=8)
    if options.device.type == "cpu":
        return replace(_llama("llama-4x512", 32, 1, 512, 4, 1408, 8192), past=64)
    return replace(_llama("llama-8b-layers", 32, 1, 4096, 4, 14336, 32000), past=512)


def _bert(name: str, batch: int, length: int, hidden: int, layers: int, inner: int, vocabulary: int) -> Model:
    sizes = {
        "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner, "vocab_size": vocabulary,
        "num_attention_heads": max(hidden // 32 if hidden < 768 else hidden // 64, 1),
    }  # fmt: skip
    return Model(name, "bert", batch, length, sizes)


def _llama(name: str, batch: int, length: int, hidden: int, layers: int, inner: int, vocabulary: int) -> Model:
    heads = max(hidden // 128 if hidden >= 2048 else hidden // 32, 2)
    sizes = {
        "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner, "vocab_size": vocabulary,
        "num_attention_heads": heads, "num_key_value_heads": max(heads // 4, 1),
    }  # fmt: skip
    return Model(name, "llama", batch, length, sizes)
