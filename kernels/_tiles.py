"""Tile sizes by architecture and shape class, chosen by counting bytes and registers; nothing is tuned at run time.

Every pass is bound by memory: about 20 kB must be in flight per multiprocessor (latency times bandwidth on H100) and
every multiprocessor must own a program. f32 products without tf32 run on the FMA units, whose operands live in
registers, hence the small f32 tiles.
"""

from __future__ import annotations

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


# (pass, kind of product, block of the rank) -> block_m, block_c, warps, stages. Kind: "half" is one 16-bit product,
# "split" several of them, "float" an f32 product.
_TILES: dict[tuple[str, str, int], tuple[int, int, int, int]] = {
    ("row", "half", 16): (64, 128, 4, 4),
    ("row", "half", 32): (64, 128, 4, 4),
    ("row", "half", 64): (64, 128, 4, 3),
    ("row", "half", 128): (64, 64, 4, 4),
    ("row", "split", 16): (64, 64, 4, 4),
    ("row", "split", 32): (64, 64, 4, 3),
    ("row", "split", 64): (64, 64, 4, 3),
    ("row", "split", 128): (64, 32, 4, 3),
    ("row", "float", 16): (64, 32, 4, 3),
    ("row", "float", 32): (64, 32, 4, 3),
    ("row", "float", 64): (64, 32, 4, 3),
    ("row", "float", 128): (64, 32, 8, 2),
    ("expand", "half", 16): (64, 128, 4, 1),
    ("expand", "half", 32): (64, 128, 4, 1),
    ("expand", "half", 64): (64, 128, 4, 1),
    ("expand", "half", 128): (64, 128, 4, 1),
    ("expand", "split", 16): (64, 128, 4, 1),
    ("expand", "split", 32): (64, 128, 4, 1),
    ("expand", "split", 64): (64, 64, 4, 1),
    ("expand", "split", 128): (64, 64, 4, 1),
    ("expand", "float", 16): (64, 64, 4, 1),
    ("expand", "float", 32): (64, 64, 4, 1),
    ("expand", "float", 64): (32, 64, 4, 1),
    ("expand", "float", 128): (32, 64, 4, 1),
    ("column", "half", 16): (64, 128, 4, 2),
    ("column", "half", 32): (64, 128, 4, 2),
    ("column", "half", 64): (64, 64, 4, 2),
    ("column", "half", 128): (64, 64, 4, 2),
    ("column", "split", 16): (64, 64, 4, 2),
    ("column", "split", 32): (64, 64, 4, 2),
    ("column", "split", 64): (64, 64, 4, 2),
    ("column", "split", 128): (32, 64, 8, 2),
    ("column", "float", 16): (32, 64, 4, 2),
    ("column", "float", 32): (32, 64, 4, 2),
    ("column", "float", 64): (32, 64, 4, 2),
    ("column", "float", 128): (32, 64, 8, 2),
    ("dy", "half", 16): (64, 256, 4, 2),
    ("dy", "half", 32): (64, 256, 4, 2),
    ("dy", "split", 16): (64, 128, 4, 2),
    ("dy", "split", 32): (64, 128, 4, 2),
}


def _kind(precision: str) -> str:
    return {"bf16": "half", "fp16": "half", "split2": "split", "split3": "split"}.get(precision, "float")


def block_r(rank: int) -> int:
    """Rank padded to a power of two that tl.dot accepts, at most MAX_BLOCK_R."""
    return min(max(16, 1 << (rank - 1).bit_length()), MAX_BLOCK_R)


def tile(name: str, precision: str, rank: int) -> Tile:
    """Tile of a pass ("row", "expand", "column") for this precision and rank."""
    padded = block_r(rank)
    block_m, block_c, num_warps, num_stages = _TILES[name, _kind(precision), padded]
    return Tile(block_m, block_c, padded, num_warps, num_stages)


def row_block_m(rows: int, t: Tile, processors: int) -> int:
    """The tallest block of rows up to the tile's that still gives three programs to four multiprocessors."""
    block_m = t.block_m
    while block_m > 16 and 4 * -(-rows // block_m) < 3 * processors:
        block_m //= 2
    return block_m
