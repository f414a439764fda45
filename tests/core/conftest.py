from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftkern as pk


@pytest.fixture(autouse=True)
def _kernels(kernels_at_any_size: None) -> None:
    """What holds for an attached model is to hold with the kernels."""


def skip_without_kernels() -> None:
    """For bytes that only a kernel keeps to."""
    if pk.explain("low_rank", torch.ones(1, 1)).backend == "reference":
        pytest.skip("only the reference runs: plain PyTorch saves what it likes")


def conv(k: int, n: int) -> Conv1D:
    """GPT-2's linear layer from K to N, with a bias that is not zero."""
    module = Conv1D(n, k)
    nn.init.normal_(module.bias)
    return module
