"""The expand pass gives the same whether a program makes one tile or keeps its columns and walks down the rows."""

from __future__ import annotations

import pytest
import torch

import peftkern as pk

from .test_common import DEVICE, needs_launch

from peftkern.kernels import _expand  # isort: skip - test_common asks whether there is Triton


@needs_launch
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rank", [5, 64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_walking_down_the_rows(dtype: torch.dtype, rank: int, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    m, k, n = 150 if DEVICE.type == "cpu" else 5000, 304, 704

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)

    weights = {"down": rand(rank, k) / k**0.5, "up": rand(n, rank), "down_bias": rand(rank), "up_bias": rand(n)}
    seed = torch.tensor([77], device=DEVICE)
    walked, launch = [], _expand.launch

    def counted(kernel: object, grid: tuple[int, ...], *args: object, **keywords: object) -> None:
        walked[-1] += kernel is _expand.expand_columns_kernel
        launch(kernel, grid, *args, **keywords)

    monkeypatch.setattr(_expand, "launch", counted)
    monkeypatch.setattr("peftkern.kernels.bottleneck.one_kernel", lambda *_: False)
    found = []
    # A program for each tile; a program for each tile, which keeps its columns; one for all rows of its columns.
    for least, columns in ((1 << 40, 256), (0, 1 << 20), (0, 64)):
        monkeypatch.setattr(_expand, "_KEPT_TILES", least)
        monkeypatch.setattr(_expand, "_KEPT_COLUMNS", columns)
        walked.append(0)
        x = rand(m, k).to(dtype).requires_grad_()
        with pk.use_backend("triton"):
            y = pk.ops.bottleneck(x, **weights, residual=rand(m, n).to(dtype), p=p, seed=seed)
        found.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), x)))
    assert walked == ([0, 0, 0] if dtype == torch.float32 and rank > 16 else [0, 2, 2])
    assert all((one - two).norm() <= 4e-3 * two.norm() for one, two in zip(found[1], found[0], strict=True))
    assert all(torch.equal(one, two) for one, two in zip(found[1], found[2], strict=True))
