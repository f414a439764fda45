"""Writes a distribution with one method: what `peftkern new-method NAME` does.

The method as written is a per-channel scale, y = s · base(x); it trains, saves, loads, merges and passes its tests, and
waits to be replaced by the author's own.
"""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from peftkern.errors import ConfigError

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "The method $name for peftkern."
readme = "README.md"
requires-python = ">=3.10"
dependencies = ["peftkern"]

[project.optional-dependencies]
test = ["pytest"]

# This line is all that peftkern needs to find the method.
[project.entry-points."peftkern.methods"]
$name = "$package:$cls"

[tool.setuptools]
packages = ["$package"]
"""

_MODULE = '''\
"""A per-channel scale of a frozen layer: y = s · base(x)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peftkern.adapter import LayerAdapter, LayerConfig
from peftkern.base import BaseLayer
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ${cls}Config(LayerConfig):
    """Which modules are scaled; fields of the method go here, and are checked in `__post_init__` with `require`."""


class $cls(LayerAdapter):
    """y = s · base(x), s [N] f32, for base(x) [..., N]; one factor per output channel.

    A method that adds to the base overrides `delta` and `delta_weight` instead of `forward` and `merge`.
    """

    name = "$name"
    summary = "a learned factor per output channel"
    paper = "https://arxiv.org/abs/2205.05638"
    Config = ${cls}Config

    def __init__(self, base: BaseLayer, config: ${cls}Config) -> None:
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
'''
