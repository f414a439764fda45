"""What attention with a prefix launches: how often its keys are read."""

from __future__ import annotations

import pytest
import torch
from peftkern.kernels._device import Device, recording

from peftkern.kernels import prefix_attention


@pytest.mark.parametrize(
    ("batch", "kv_heads", "group", "queries", "grids"),
    [
        (32, 8, 4, 1, [(1, 256, 1)]),
        (1, 8, 4, 1, [(1, 8, 8), (8, 1, 1)]),
        (1, 2, 4, 4, [(1, 2, 8), (8, 1, 1)]),
        (8, 8, 4, 64, [(2, 64, 1)]),
    ],
)
def test_a_group_of_heads_reads_its_keys_once(
    batch: int, kv_heads: int, group: int, queries: int, grids: list[tuple[int, ...]]
) -> None:
    """Programs: blocks of the group's queries, key heads of the batch, and parts of a text of 2048 keys."""

    def meta(heads: int, rows: int) -> torch.Tensor:
        return torch.empty(batch, heads, rows, 128, dtype=torch.bfloat16, device="meta")

    q, k, prefix = meta(kv_heads * group, queries), meta(kv_heads, 2048), meta(kv_heads, 20)
    with recording(Device("sm90", 132, 50 << 20)) as launches:
        prefix_attention.forward(q, k, k, prefix, prefix, None, True, 0.1, 0.0, None)
    assert [(*one.grid, 1, 1)[:3] for one in launches] == grids
