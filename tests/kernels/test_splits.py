"""Passes over splits of the rows: as many programs as fill the device, and no read behind the hashed rows."""

from __future__ import annotations

import pytest
import torch
from peftkern.kernels._column import _PAIR_PROGRAMS
from peftkern.kernels._device import Device, Launch, recording
from torch import Tensor

from peftkern.kernels import low_rank, prefix_attention


def launches(device: Device, rank: int) -> list[Launch]:
    """Of low_rank's backward, 8192 rows of 4096 in bf16, weights in f32, dropout."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    wide = meta(8192, 4096)
    a, b = meta(rank, 4096, dtype=torch.float32), meta(4096, rank, dtype=torch.float32)
    h, seed = meta(8192, rank, dtype=torch.float32), meta(1, dtype=torch.int64)
    with recording(device) as found:
        low_rank.backward(wide, wide, a, b, h, meta(8192, 4096), 0.5, 0.1, seed, True, True)
    return found


@pytest.mark.parametrize("rank", [64, 128])
@pytest.mark.parametrize("device", [Device("sm80", 108, 40 << 20), Device("sm90", 132, 50 << 20)], ids=lambda d: d.arch)
def test_the_gradients_of_halved_products(device: Device, rank: int) -> None:
    passes = [one for one in launches(device, rank) if one.kernel.fn.__name__ == "column_kernel"]
    assert len(passes) == 2
    for one in passes:
        names = dict(zip(one.kernel.arg_names, one.args, strict=False)) | one.keywords
        assert names["PRECISION"] == "pair"
        assert names["rows_per_split"] % names["BLOCK_M"] == 0
        blocks, ranks, splits = one.grid
        assert 0.6 * _PAIR_PROGRAMS * device.processors < blocks * ranks * splits <= _PAIR_PROGRAMS * device.processors


def test_hashes_reach_behind_the_last_tile() -> None:
    found = launches(Device("sm90", 132, 50 << 20), 16)
    (hashes,) = (one.args[1] for one in found if one.kernel.fn.__name__ == "hash_rows_kernel")
    assert hashes.numel() >= 8192 + 255


def test_more_heads_than_a_grid_has_room_for() -> None:
    assert "a grid has room for 65535" in str(
        prefix_attention.refuse(torch.device("meta"), torch.bfloat16, D=64, S=1, rows=2048 * 32)
    )
