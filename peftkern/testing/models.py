"""Tiny random models of the three families that every method is tried on: BERT-, GPT-2- and Llama-like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

# Imported where a model is built: the pytest plugin is beside this file, and every pytest that finds it would pay.
if TYPE_CHECKING:
    from transformers import BertForTokenClassification, GPT2LMHeadModel, LlamaForCausalLM

M = TypeVar("M", bound=nn.Module)
VOCABULARY, WIDTH, LAYERS, LABELS, POSITIONS = 61, 32, 2, 5, 64


@dataclass(frozen=True)
class TinyModel:
    """A model to try a method on: `build()` gives the same random weights each time, `batch()` inputs with labels."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]


def tiny_bert(**overrides: Any) -> BertForTokenClassification:
    """An encoder with a token-classification head; biases everywhere, learned positions, post-norm."""
    from transformers import BertConfig, BertForTokenClassification

    config = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "intermediate_size": 2 * WIDTH, "max_position_embeddings": POSITIONS, "num_labels": LABELS,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
    }  # fmt: skip
    return _build(BertForTokenClassification, BertConfig(**config | overrides))


def tiny_gpt2(**overrides: Any) -> GPT2LMHeadModel:
    """A causal language model with Conv1D projections (weights transposed) and a head tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = {
        "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": POSITIONS,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    model = _build(GPT2LMHeadModel, GPT2Config(**config | overrides))
    model.loss_type = "ForCausalLM"  # not derived from the class name; without it a warning breaks the graph in compile
    return model


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """A causal language model without any bias, with rotary positions, grouped queries and a head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 2 * WIDTH, "max_position_embeddings": POSITIONS,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    return _build(LlamaForCausalLM, LlamaConfig(**config | overrides))


def token_batch(rows: int = 2, length: int = 9, labels: int = VOCABULARY, pad: str = "right") -> dict[str, Tensor]:
    """ids, mask and labels [rows, length]; every row but the first is padded by its index, on the side named."""
    generator = torch.Generator().manual_seed(rows * 1000 + length)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    target = torch.randint(0, labels, (rows, length), generator=generator)
    real = torch.arange(length) < (length - torch.arange(rows).clamp(max=length - 1))[:, None]
    real = real.flip(1) if pad == "left" else real
    return {
        "input_ids": ids.masked_fill(~real, 0),
        "attention_mask": real.to(torch.int64),
        "labels": target.masked_fill(~real, -100),
    }


MODELS: Mapping[str, TinyModel] = {
    model.name: model
    for model in (
        TinyModel("bert", tiny_bert, lambda: token_batch(labels=LABELS)),
        TinyModel("gpt2", tiny_gpt2, token_batch),
        TinyModel("llama", tiny_llama, token_batch),
    )
}
"""What a method is tried on when nothing else is said."""


def chosen(models: Iterable[str | TinyModel] | None) -> list[TinyModel]:
    """Models by name or as they are; None means all of `MODELS`. Raises ValueError for an unknown name."""
    if unknown := [m for m in models or () if isinstance(m, str) and m not in MODELS]:
        raise ValueError(f"unknown model {unknown[0]!r}: want one of {', '.join(MODELS)}, or a TinyModel")
    return [MODELS[m] if isinstance(m, str) else m for m in (MODELS if models is None else models)]


def _build(kind: Callable[[Any], M], config: Any) -> M:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
        # transformers initialises with a deviation of 0.02 and zero biases: too near to nothing to tell a wrong result.
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()
