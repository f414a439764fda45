"""Tile sizes by architecture and shape class; nothing is tuned at run time.

sm90: the fastest of up to thirty candidates a row on an H200, x [8192, 4096] with dropout (f32: [2048, 4096]); "both",
and rows of rank 128 where two or three were tried, by registers.
Elsewhere by counting bytes and registers: about 20 kB must be in flight per multiprocessor (latency times bandwidth on
H100), every multiprocessor must own a program, and f32 products without tf32 run on the FMA units, whose operands live
in registers, hence the small f32 tiles.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

#: Largest rank that fits one tile; a larger one is walked in tiles of this size.
MAX_BLOCK_R = 128


class Tile(NamedTuple):
    """Rows (M), columns (K or N) and rank of a tile, and the launch options."""

    block_m: int
    block_c: int
    block_r: int
    num_warps: int
    num_stages: int


# (pass, kind of product) -> rank up to which a row holds: block_m, block_c, block_r at most, warps, stages. Kinds:
# "half" is one 16-bit product, "split" several of them, "float" an f32 product. Registers and spills of every entry are
# in the table that aot.py writes.
_Rows = dict[int, tuple[int, int, int, int, int]]
_TILES: dict[tuple[str, str], _Rows] = {
    ("row", "half"): {32: (64, 128, 32, 4, 4), 64: (64, 128, 64, 4, 3), 128: (64, 64, 128, 4, 4)},
    ("row", "split"): {16: (64, 64, 16, 4, 4), 64: (64, 64, 64, 4, 3), 128: (64, 32, 128, 8, 3)},
    ("row", "pair"): {64: (64, 64, 64, 4, 3), 128: (64, 32, 128, 4, 3)},
    ("row", "float"): {64: (64, 32, 64, 4, 3), 128: (64, 16, 128, 8, 2)},
    ("expand", "half"): {128: (64, 128, 32, 8, 2)},
    ("expand", "split"): {128: (64, 64, 32, 4, 2)},
    ("expand", "float"): {128: (64, 64, 16, 8, 2)},
    ("expand_columns", "half"): {64: (64, 128, 64, 4, 3), 128: (64, 64, 128, 4, 3)},
    ("expand_columns", "split"): {32: (64, 128, 32, 4, 3), 64: (64, 64, 64, 4, 3), 128: (64, 64, 128, 4, 2)},
    ("expand_columns", "float"): {128: (64, 64, 16, 8, 2)},
    ("column", "half"): {
        16: (32, 128, 16, 8, 2),
        32: (32, 64, 32, 4, 2),
        64: (64, 128, 64, 8, 2),
        128: (64, 64, 128, 8, 2),
    },
    ("column", "split"): {32: (32, 64, 32, 4, 2), 128: (64, 64, 128, 8, 2)},
    ("column", "pair"): {64: (64, 64, 64, 4, 3), 128: (64, 64, 128, 4, 2)},
    ("column", "float"): {16: (32, 128, 16, 8, 2), 128: (32, 64, 128, 8, 2)},
    ("dy", "half"): {32: (64, 256, 32, 4, 2)},
    ("dy", "split"): {32: (32, 128, 32, 4, 2)},
    ("x", "half"): {32: (32, 128, 32, 4, 3)},
    ("x", "split"): {32: (32, 128, 32, 4, 3)},
    ("x", "float"): {32: (32, 64, 32, 4, 2)},
    ("both", "half"): {64: (64, 128, 64, 4, 3), 128: (64, 64, 128, 4, 3)},
    ("both", "split"): {32: (64, 64, 32, 4, 3), 64: (64, 64, 64, 4, 2), 128: (32, 64, 128, 8, 2)},
    ("both", "float"): {64: (32, 32, 64, 8, 2)},
}

# Where an architecture's registers or instructions want another row than the one above: with these nothing spills.
_OVERRIDES: dict[tuple[str, str, str], _Rows] = {
    ("sm80", "row", "split"): {64: (64, 32, 64, 4, 3)},
    ("sm80", "expand", "split"): {16: (64, 64, 16, 4, 2), 128: (32, 64, 32, 8, 2)},
    ("sm80", "expand", "float"): {128: (64, 32, 16, 8, 2)},
    ("sm80", "column", "half"): {64: (32, 64, 64, 8, 2), 128: (32, 32, 128, 8, 2)},
    ("sm80", "column", "split"): {64: (32, 32, 64, 4, 2), 128: (16, 32, 128, 8, 2)},
    ("sm80", "column", "float"): {64: (32, 64, 64, 8, 2), 128: (16, 32, 128, 8, 2)},
    ("sm80", "both", "half"): {64: (64, 64, 64, 4, 3)},
    ("sm80", "multi_low_rank/row", "half"): {64: (64, 64, 64, 4, 3)},
    ("sm90", "row", "half"): {32: (128, 128, 32, 4, 3), 64: (64, 64, 64, 4, 3)},
    ("sm90", "row", "split"): {16: (64, 64, 16, 4, 3), 64: (64, 64, 64, 4, 3), 128: (32, 64, 128, 4, 3)},
    ("sm90", "row", "float"): {16: (64, 128, 16, 4, 3), 64: (64, 64, 64, 4, 3)},
    ("sm90", "expand", "half"): {64: (64, 128, 64, 8, 2), 128: (64, 128, 128, 8, 2)},
    ("sm90", "expand", "split"): {64: (64, 64, 64, 4, 2)},
    ("sm90", "column", "half"): {32: (64, 64, 32, 4, 3), 64: (32, 128, 64, 4, 3)},
    ("sm90", "column", "split"): {16: (32, 128, 16, 4, 3), 64: (32, 128, 64, 4, 3), 128: (64, 128, 128, 8, 3)},
    ("sm90", "column", "float"): {16: (32, 64, 16, 8, 2), 64: (32, 32, 64, 4, 2), 128: (32, 32, 128, 8, 2)},
    ("sm90", "bottleneck/column", "split"): {64: (32, 64, 64, 4, 3)},
    ("sm90", "dropout/expand_columns", "split"): {64: (64, 128, 64, 4, 2)},
    ("sm90", "dy", "half"): {32: (64, 256, 32, 8, 3)},
    ("sm90", "dy", "split"): {16: (64, 128, 16, 4, 2)},
    ("sm90", "both", "half"): {64: (32, 64, 64, 8, 3)},
    ("sm90", "both", "split"): {64: (32, 128, 64, 4, 3)},
    ("sm90", "multi_low_rank/expand", "half"): {64: (64, 128, 32, 8, 2), 128: (64, 64, 32, 8, 2)},
    ("sm90", "multi_low_rank/expand", "split"): {64: (64, 64, 32, 4, 2)},
    ("sm90", "weight_norm/row", "split"): {16: (64, 32, 16, 4, 3)},
    ("sm90", "weight_norm/expand", "split"): {16: (64, 64, 16, 4, 3), 64: (64, 64, 32, 4, 2)},
    ("sm80", "weight_norm/expand", "float"): {128: (64, 64, 16, 4, 2)},
    ("sm100", "row", "split"): {16: (64, 32, 16, 4, 4), 64: (64, 64, 64, 8, 3)},
    ("sm100", "expand", "split"): {16: (64, 64, 16, 8, 2)},
    ("sm100", "weight_norm/row", "split"): {16: (64, 16, 16, 4, 4), 128: (64, 32, 128, 8, 2)},
    ("sm100", "row", "float"): {32: (64, 32, 32, 4, 3), 64: (64, 32, 64, 8, 3)},
    ("sm100", "column", "half"): {64: (32, 128, 64, 8, 2)},
    ("sm100", "column", "split"): {16: (32, 32, 16, 8, 2), 32: (32, 32, 32, 4, 2)},
    ("sm100", "column", "float"): {64: (32, 32, 64, 4, 2), 128: (32, 32, 128, 8, 2)},
    ("sm100", "bottleneck/column", "split"): {32: (32, 32, 32, 8, 2)},
    ("sm100", "multi_low_rank/column", "split"): {16: (32, 64, 16, 8, 2)},
    ("sm100", "both", "half"): {64: (64, 128, 64, 8, 3)},
    ("sm100", "multi_low_rank/row", "half"): {64: (64, 64, 64, 4, 3)},
    ("sm100", "multi_low_rank/row", "split"): {16: (64, 32, 16, 8, 4)},
    ("sm100", "multi_low_rank/expand", "half"): {64: (64, 128, 32, 8, 2), 128: (64, 64, 32, 8, 2)},
    ("sm100", "multi_low_rank/expand", "split"): {16: (64, 64, 32, 8, 2)},
    ("gfx942", "row", "split"): {128: (64, 32, 128, 4, 3)},
    ("gfx942", "column", "half"): {128: (32, 32, 128, 4, 2)},
    ("gfx942", "column", "split"): {32: (32, 64, 32, 4, 2), 128: (32, 32, 128, 4, 2)},
}


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own is made for kernels: called by the host it takes as long as a launch."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def _kind(precision: str) -> str:
    kinds = {"bf16": "half", "fp16": "half", "pair": "pair", "sides": "split", "split": "split"}
    return kinds.get(precision.removesuffix("3"), "float")


def padded_rank(rank: int) -> int:
    """Rank as a power of two that tl.dot accepts, at most MAX_BLOCK_R."""
    return min(max(16, next_power_of_2(rank)), MAX_BLOCK_R)


@functools.cache
def tile(name: str, precision: str, rank: int, arch: str) -> Tile:
    """Tile of a pass (those of `_TILES`) for this precision, rank and architecture.

    "OP/PASS": that of the pass, unless the op's own kernel for it has an override.
    """
    padded, kind = padded_rank(rank), _kind(precision)
    shared = name.rpartition("/")[2]
    rows = _TILES[shared, kind] | _OVERRIDES.get((arch, shared, kind), {}) | _OVERRIDES.get((arch, name, kind), {})
    block_m, block_c, block_r, num_warps, num_stages = rows[min(limit for limit in rows if padded <= limit)]
    return Tile(block_m, block_c, min(padded, block_r), num_warps, num_stages)


def row_block_m(rows: int, t: Tile, processors: int) -> int:
    """The tallest block of rows up to the tile's that still gives three programs to four multiprocessors."""
    block_m = t.block_m
    while block_m > 16 and 4 * cdiv(rows, block_m) < 3 * processors:
        block_m //= 2
    return block_m
