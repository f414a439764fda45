"""Rows sorted by adapter against torch's stable sort."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peftkern.kernels import _common, _sort

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (_common.INTERPRETED or torch.cuda.is_available()),
        reason="no CUDA or ROCm device, and TRITON_INTERPRET is not 1",
    ),
]
DEVICE = torch.device("cpu" if _common.INTERPRETED else "cuda")


# Around a tile of 1024 entries of one row, of 8 entries of 128 rows, and several of either.
@pytest.mark.parametrize(
    ("entries", "rows_per_entry"),
    [(1, 1), (7, 1), (1023, 1), (1024, 1), (2500, 1), (1, 300), (9, 127), (8, 128), (17, 129), (3, 2)],
)
@pytest.mark.parametrize("count", [1, 5])
def test_sorted_as_torch_sorts(entries: int, rows_per_entry: int, count: int) -> None:
    generator = torch.Generator().manual_seed(entries)
    index = torch.randint(-2, count + 2, (entries,), generator=generator)
    rows = index.repeat_interleave(rows_per_entry)
    adapter = torch.where((rows >= 0) & (rows < count), rows, count)
    known = int((adapter < count).sum())
    order, ends = _sort.sort_rows(index.to(DEVICE), len(rows), count)
    assert ends.tolist() == torch.bincount(adapter, minlength=count + 1)[:count].cumsum(0).tolist()
    assert torch.equal(order.cpu()[:known], torch.sort(adapter, stable=True).indices[:known])
    assert order.shape == rows.shape and order.dtype == ends.dtype == torch.int64
