"""Rows hashed once for all tiles drop what rows hashed in each tile do."""

from __future__ import annotations

import pytest
import torch

import peftkern as pk
from peftkern.ops._op import Op

from ..ops.conftest import OPS
from .test_common import DEVICE, needs_launch

from peftkern.kernels import _dropout  # isort: skip - test_common asks whether there is Triton


@needs_launch
@pytest.mark.parametrize("op", [op for op in OPS if op.name in ("low_rank", "bottleneck")], ids=lambda op: op.name)
def test_the_mask_does_not_depend_on_where_rows_are_hashed(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [kwargs for _, kwargs in op.samples(DEVICE, torch.float32) if kwargs.get("p")]
    assert cases
    for kwargs in cases:
        found = []
        for least in (1, 1 << 40):
            monkeypatch.setattr(_dropout, "_HASH_ROWS", least)
            x = kwargs["x"].clone().requires_grad_()
            with pk.use_backend("triton"):
                y = op.run(**kwargs | {"x": x})
            found.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
