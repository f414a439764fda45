"""Operands that are halved beforehand, for large calls, give what every program's own halves give."""

from __future__ import annotations

import pytest
import torch

import peftkern as pk
from peftkern.ops._op import Op

from ..ops.conftest import OPS
from .test_common import DEVICE, needs_launch

from peftkern.kernels import _column, _expand, _latent, _row  # isort: skip - test_common asks whether there is Triton

LEAVES = ("x", "a", "b", "down", "up", "down_bias", "up_bias")


@needs_launch
@pytest.mark.parametrize("op", [op for op in OPS if op.name in ("low_rank", "bottleneck")], ids=lambda op: op.name)
def test_halves_made_beforehand(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    names, launch = [], _row.launch

    def noted(kernel: object, *args: object, **keywords: object) -> None:
        names.append((kernel.fn.__name__, keywords.get("PRECISION")))
        launch(kernel, *args, **keywords)

    for module in (_row, _expand, _column):
        monkeypatch.setattr(module, "launch", noted)
    cases = [kwargs for _, kwargs in op.samples(DEVICE, torch.bfloat16) if kwargs["x"].numel()]
    for kwargs in cases:
        found = []
        for least in (1 << 40, 0):
            for module, name in ((_latent, "_HALVED"), (_latent, "_HALVED_RANK"), (_expand, "_KEPT_TILES")):
                monkeypatch.setattr(module, name, least)
            given = {name: kwargs[name] for name in LEAVES if kwargs.get(name) is not None}
            given = {name: t if name == "x" else t.float() for name, t in given.items()}
            leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
            with pk.use_backend("triton"):
                y = op.run(**kwargs | leaves)
            found.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))))
        for one, two in zip(*found, strict=True):
            assert (one - two).norm() <= 4e-3 * two.norm()
    assert {("row_kernel", "pair"), ("column_kernel", "pair"), ("expand_columns_kernel", "split")} <= set(names)
