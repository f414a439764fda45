"""Rows of a batch sorted by their adapter, in one kernel: the host neither waits nor launches a sort of many."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import launch
from ._tiles import next_power_of_2

#: Elements of a tile, and rows of one entry in it at most.
_TILE, _MOST_ROWS = 1024, 128


@triton.jit(do_not_specialize=["entries", "rows_per_entry"])
def sort_kernel(index_ptr, order_ptr, ends_ptr, entries, rows_per_entry, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr):
    """Of one adapter: its rows' numbers, rising, at their places among all, and the place where they end."""
    adapter = tl.program_id(0)
    before = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, entries, BLOCK_E):
        offs_e = first + tl.arange(0, BLOCK_E)
        index = tl.load(index_ptr + offs_e, mask=offs_e < entries, other=-1)
        before += ((index >= 0) & (index < adapter)).to(tl.int32)
    place = tl.sum(before, axis=0)
    for first in range(0, entries, BLOCK_E):
        offs_e = first + tl.arange(0, BLOCK_E)
        mine = (tl.load(index_ptr + offs_e, mask=offs_e < entries, other=-1) == adapter).to(tl.int32)
        places = (place + tl.cumsum(mine, axis=0) - mine).to(tl.int64) * rows_per_entry
        rows = offs_e.to(tl.int64) * rows_per_entry
        for j in range(0, rows_per_entry, BLOCK_J):
            offs_j = j + tl.arange(0, BLOCK_J)
            mask = (mine > 0)[:, None] & (offs_j < rows_per_entry)[None, :]
            tl.store(order_ptr + places[:, None] + offs_j[None, :], rows[:, None] + offs_j[None, :], mask=mask)
        place += tl.sum(mine, axis=0)
    tl.store(ends_ptr + adapter, place.to(tl.int64) * rows_per_entry)


def sort_rows(index: Tensor, rows: int, count: int) -> tuple[Tensor, Tensor]:
    """(order [rows], ends [count]), both int64: row numbers sorted by adapter, and where those of each adapter end.

    index [entries] int64: the adapter of rows / entries rows each, one entry's behind the other's. Rows of an adapter
    keep their order. A number outside [0, count) is no adapter: behind the last end, order is not written.
    """
    rows_per_entry = rows // index.numel()
    block_j = min(next_power_of_2(rows_per_entry), _MOST_ROWS)
    order = torch.empty(rows, dtype=torch.int64, device=index.device)
    ends = torch.empty(count, dtype=torch.int64, device=index.device)
    launch(
        sort_kernel, (count,), index, order, ends, index.numel(), rows_per_entry,
        BLOCK_E=_TILE // block_j, BLOCK_J=block_j, num_warps=4,
    )  # fmt: skip
    return order, ends
