"""Several low-rank adapters as kernels see them: a table of addresses, made once for each set; no weight is copied."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Table(NamedTuple):
    """`cells` int64 [G, 5]: address of A, address of B, rank, ranks before it, bits of the f32 scale.

    `sizes` is what the host has to know: largest rank, sum of the ranks, dtype code (0 f32, 1 bf16, 2 f16; one for
    all), and whether all addresses are multiples of 16 bytes.
    """

    cells: Tensor
    sizes: tuple[int, int, int, bool]


def table(a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float]) -> Table:
    """The table of contiguous adapters of one dtype and device, which the caller keeps alive while a kernel runs.

    It holds nothing but addresses and sizes, and these are what it is cached by: it cannot go stale. For a GPU it is
    kept in pinned memory of the host and copied at every call, which a CUDA graph repeats: what is kept on the device
    may not be made while a graph is warmed up or captured, since the graph's pool takes its memory back.
    """
    addresses = tuple([t.data_ptr() for t in a] + [t.data_ptr() for t in b])
    device = a[0].device
    found = _table(device, a[0].dtype, addresses, tuple([t.size(0) for t in a]), tuple(scales))
    if device.type == "cpu":
        return found
    if torch.cuda.is_current_stream_capturing():
        _captured.append(found.cells)
    return found._replace(cells=found.cells.to(device, non_blocking=True))


_captured: list[Tensor] = []
"""Tables that a CUDA graph copies again at every replay, by their addresses alone: never given back."""


@functools.lru_cache(maxsize=4096)
def _table(
    device: torch.device,
    dtype: torch.dtype,
    addresses: tuple[int, ...],
    ranks: tuple[int, ...],
    scales: tuple[float, ...],
) -> Table:
    count, before, rows = len(ranks), 0, []
    for i, (rank, scale) in enumerate(zip(ranks, scales, strict=True)):
        bits = struct.unpack("<i", struct.pack("<f", scale))[0]
        rows.append([_signed(addresses[i]), _signed(addresses[count + i]), rank, before, bits])
        before += rank
    cells = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return Table(cells, (max(ranks), before, _CODES[dtype], all(address % 16 == 0 for address in addresses)))


def _signed(address: int) -> int:
    """The same 64 bits as a signed number: addresses may have the top bit set."""
    return address - (1 << 64) if address >= 1 << 63 else address
