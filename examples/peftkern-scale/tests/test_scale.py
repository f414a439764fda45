"""The method under peftkern's conformance kit, and its formula."""

from __future__ import annotations

import torch

import peftkern as pk
from peftkern.testing import conformance_tests, tiny_bert
from peftkern_scale import ScaleConfig

test_conformance = conformance_tests("scale")


def test_scales_every_channel_of_the_base() -> None:
    model = tiny_bert()
    target = "bert.encoder.layer.0.intermediate.dense"
    x = torch.randn(3, model.config.hidden_size)
    base = model.get_submodule(target)(x)
    pk.attach(model, ScaleConfig(target_modules=[target]))
    layer = model.get_submodule(target)
    factors = torch.rand(base.shape[-1]) + 0.5
    with torch.no_grad():
        layer.adapters["default"].scale.copy_(factors)
    torch.testing.assert_close(layer(x), base * factors)
