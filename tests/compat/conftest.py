"""Fixtures: the peer library, and quiet."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

# What PEFT says about itself, about transformers, or in general about tied weights.
NOISE = (
    "Setting `save_embedding_layers`",
    "Could not find a config file",
    "Model has `tie_word_embeddings=True`",
    "`is_gradient_checkpointing` is deprecated",
    "unclosed file",
    "Unable to fetch remote file",
    "`gradient_checkpointing_enable` is deprecated",
    "Position ids are not supported",
    "Adapter default was active",
    "Input and output embeddings are no longer tied",
    "`lora_bias=True` was passed",
    "Adapter .* LoRA tensor.* have invalid shape",  # a bias is 1-D
)


@pytest.fixture(autouse=True)
def _kernels(kernels_at_any_size: None) -> None:
    """It is the kernels that are compared."""


@pytest.fixture(scope="session")
def peft():
    """The real library; everything here is skipped without it."""
    return pytest.importorskip("peft", reason="Hugging Face PEFT is not installed: there is nothing to compare with")


@pytest.fixture(autouse=True)
def _quiet_and_seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message=message)
        yield
