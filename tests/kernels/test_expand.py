"""The expand pass gives the same bits however many blocks of columns a program takes."""

from __future__ import annotations

import pytest
import torch

import peftkern as pk

from .test_common import DEVICE, needs_launch

from peftkern.kernels import _launch  # isort: skip - test_common asks whether there is Triton


@needs_launch
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rank", [5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_a_program(dtype: torch.dtype, rank: int, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    m, k, n = 70 if DEVICE.type == "cpu" else 5000, 304, 720

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)

    weights = {"down": rand(rank, k) / k**0.5, "up": rand(n, rank), "down_bias": rand(rank), "up_bias": rand(n)}
    seed = torch.tensor([77], device=DEVICE)
    counts, launch = [], _launch.launch

    def counted(kernel: object, grid: tuple[int, ...], *args: object, **keywords: object) -> None:
        if kernel is _launch.expand_kernel:
            counts.append(grid[1])
        launch(kernel, grid, *args, **keywords)

    monkeypatch.setattr(_launch, "launch", counted)
    found = []
    for programs in (1 << 40, 1):
        monkeypatch.setattr(_launch, "_EXPAND_PROGRAMS", programs)
        x = rand(m, k).to(dtype).requires_grad_()
        with pk.use_backend("triton"):
            y = pk.ops.bottleneck(x, **weights, residual=rand(m, n).to(dtype), p=p, seed=seed)
        found.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), x)))
    half = len(counts) // 2
    if DEVICE.type == "cpu":  # on a GPU it depends on the number of its processors
        fewer = [few < many for many, few in zip(counts[:half], counts[half:], strict=True)]
        assert all(fewer) if rank <= 16 else not any(fewer)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
