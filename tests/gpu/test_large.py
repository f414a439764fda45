"""More than 2^31 elements: offsets are 64-bit. On a CPU the same bodies run on small sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import peftkern as pk
from peftkern.testing import relative_error

from .conftest import Place, skip_unless_runs

_LIMIT = 2**31
_CHUNK = 1 << 16


def rows_of(place: Place, width: int, gib: float) -> int:
    """So many rows of `width` columns that their elements pass 2^31; skips where `gib` GiB are not free."""
    if place.device.type == "cpu":
        return 333
    free = torch.cuda.mem_get_info(place.device)[0] / 2**30
    if free < gib:
        pytest.skip(f"{free:.0f} GiB of GPU memory are free: this needs {gib:.0f}")
    return _LIMIT // width + 5


def places(rows: int, width: int) -> list[slice]:
    """A few rows at the start, on both sides of element 2^31, and at the end."""
    edge = min(_LIMIT // width, rows - 2)
    return [slice(0, 3), slice(edge - 2, edge + 2), slice(rows - 3, rows)]


def half(*shape: int, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()


def chunks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _CHUNK):
        yield slice(start, min(start + _CHUNK, rows))


def near(got: Tensor, want: Tensor, what: str) -> None:
    error = relative_error(got, want)
    assert error < (1e-2 if got.dtype == torch.bfloat16 else 1e-4), f"{what} is off by {error:.1e}"


@pytest.mark.parametrize("wide", ["x", "y"])
def test_low_rank(place: Place, wide: str) -> None:
    skip_unless_runs("low_rank", place, torch.bfloat16)
    k, n = (2048, 16) if wide == "x" else (16, 2048)
    m, r = rows_of(place, 2048, 24), 8
    x, dy = half(m, k, device=place.device).requires_grad_(), half(m, n, device=place.device)
    a, b = torch.randn(r, k, device=x.device) / k**0.5, torch.randn(n, r, device=x.device)
    a.requires_grad_()
    b.requires_grad_()
    y = pk.ops.low_rank(x, a, b, scale=0.5)
    y.backward(dy)
    with torch.no_grad():
        for rows in places(m, 2048):
            near(y[rows], 0.5 * (x[rows].float() @ a.T) @ b.T, f"y[{rows}]")
            near(x.grad[rows], 0.5 * (dy[rows].float() @ b) @ a, f"dx[{rows}]")
        da, db = torch.zeros_like(a, dtype=torch.float64), torch.zeros_like(b, dtype=torch.float64)
        for rows in chunks(m):
            wide_x, wide_dy = x[rows].float(), dy[rows].float()
            da += 0.5 * ((wide_dy @ b).T @ wide_x).double()
            db += 0.5 * (wide_dy.T @ (wide_x @ a.T)).double()
    near(a.grad, da, "da")
    near(b.grad, db, "db")


def test_low_rank_dropout(place: Place) -> None:
    """B = 1, A = 1, x = 1 and K = R = 1 wide: every output is a kept x, by the mask of its own row."""
    from peftkern.ops.dropout import dropout

    skip_unless_runs("low_rank", place, torch.bfloat16)
    k, seed = 2048, torch.tensor([77], device=place.device)
    m = rows_of(place, k, 16)
    x = torch.ones((), dtype=torch.bfloat16, device=place.device).expand(m, k).contiguous()
    a, b = torch.ones(1, k, device=x.device), torch.ones(1, 1, device=x.device)
    with torch.no_grad():
        kept = pk.ops.low_rank(x, a, b, p=0.5, seed=seed)[:, 0].float() * 0.5 / k
        first = dropout(x[:64].float(), 0.5, seed).sum(1) * 0.5 / k
    near(kept[:64].bfloat16(), first.bfloat16(), "share kept in the first rows")
    # The hash is one of the row's index: rows that lie 2^31 elements apart must not repeat each other.
    period = _LIMIT // k
    for rows in places(m, k)[1:]:
        assert 0.4 < float(kept[rows].mean()) < 0.6
    if m > period + 4:
        assert not torch.equal(kept[:4], kept[period : period + 4])


def test_bottleneck(place: Place) -> None:
    skip_unless_runs("bottleneck", place, torch.bfloat16)
    k, r = 2048, 16
    m = rows_of(place, k, 32)
    x, dy = half(m, k, device=place.device).requires_grad_(), half(m, k, device=place.device)
    down = (torch.randn(r, k, device=x.device) / k**0.5).requires_grad_()
    up = torch.randn(k, r, device=x.device).requires_grad_()
    y = pk.ops.bottleneck(x, down, up, residual=x, activation="relu")
    y.backward(dy)
    with torch.no_grad():
        for rows in places(m, k):
            pre = x[rows].float() @ down.T
            near(y[rows], x[rows].float() + pre.relu() @ up.T, f"y[{rows}]")
            dpre = (dy[rows].float() @ up) * (pre > 0)
            near(x.grad[rows], dy[rows].float() + dpre @ down, f"dx[{rows}]")
        d_up = torch.zeros_like(up, dtype=torch.float64)
        for rows in chunks(m):
            d_up += (dy[rows].float().T @ (x[rows].float() @ down.T).relu()).double()
    near(up.grad, d_up, "d_up")


def test_prompt_concat(place: Place) -> None:
    skip_unless_runs("prompt_concat", place, torch.bfloat16)
    batch, width, t = 8, 2048, 5
    length = math.ceil(rows_of(place, width, 16) / batch)
    ids = torch.randint(11, (batch, length), device=place.device)
    table = half(11, width, device=place.device)
    prompt = torch.randn(t, width, device=place.device).requires_grad_()
    embeds, mask, positions, _ = pk.ops.prompt_concat(prompt, ids=ids, table=table)
    assert embeds.shape == (batch, t + length, width)
    with torch.no_grad():
        for row in (0, batch - 1):
            assert torch.equal(embeds[row, :t], prompt.bfloat16()), f"prompt of row {row}"
            assert torch.equal(embeds[row, t : t + 3], table[ids[row, :3]]), f"first tokens of row {row}"
            assert torch.equal(embeds[row, -3:], table[ids[row, -3:]]), f"last tokens of row {row}"
    assert int(mask.sum()) == batch * (t + length) and int(positions[-1, -1]) == t + length - 1
    (gradient,) = torch.autograd.grad(embeds, prompt, torch.ones_like(embeds))
    assert torch.equal(gradient, torch.full_like(gradient, batch))
