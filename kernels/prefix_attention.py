"""Triton backend of prefix_attention: one walk over the prefix, then over the text, with online softmax.

The queries of all heads that share keys are rows of one matrix, so that a decoding step reads its keys once; where few
rows are too few programs for the device, the text is split among several, whose results are merged.

q [B, Hq, S, D], k and v [B, Hkv, L, D], pk and pv [B, Hkv, T, D] (expanded over the batch), D <= 256, unit stride
along D; products and sums in f32. Backward makes the weights again from each query's highest score and sum: a pass over
queries (dq), one over keys (dk, dv), and the same over the prefix of each batch row, whose sum over the batch is left
to the caller.
Source of the method: Dao 2023 (arXiv:2307.08691), algorithms 1 and 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention import Tile, keys_kernel, mask_at, tile, walk, walk_back
from ._common import load_rows, precision, refuse_common, round_to
from ._device import Device, Source, device_of, launch, on_device, sources
from ._dropout import Dropout, dropout_args, row_keys
from ._plan import planned
from ._tiles import cdiv, next_power_of_2

MAX_WIDTH = 256


#: Size of a grid in its second dimension.
_MOST_HEADS = 65535


def refuse(device: torch.device, dtype: torch.dtype, **dims: int) -> str | None:
    """Why this backend cannot run for heads of width D on `device` with `dtype`; None when it can."""
    if dims.get("D", 0) > MAX_WIDTH:
        return f"D = {dims['D']}: heads are at most {MAX_WIDTH} wide"
    if (heads := dims.get("rows", 0) // max(dims.get("S", 1), 1)) > _MOST_HEADS:
        return f"{heads} heads in the batch: a grid has room for {_MOST_HEADS}"
    return refuse_common(device, dtype, **dims)


#: Blocks of keys that a split of the text has at least, and rows that a program merges.
_SPLIT_BLOCKS, _MERGED_ROWS = 4, 4


def _tile(name: str, q: Tensor) -> Tile:
    return tile(name, q.dtype != torch.float32, q.shape[3], device_of(q).arch)


def _width(q: Tensor) -> int:
    return max(16, next_power_of_2(q.shape[3]))


@triton.jit(do_not_specialize=["S", "L", "T", "keys_per_split", "threshold"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    pk_ptr,
    pv_ptr,
    mask_ptr,
    out_ptr,
    top_ptr,
    sum_ptr,
    seed_ptr,
    Hkv,
    GROUP,
    S,
    L,
    T,
    D,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_pkb,
    stride_pkh,
    stride_pkn,
    stride_pvb,
    stride_pvh,
    stride_pvn,
    stride_mb,
    stride_mh,
    stride_ms,
    keys_per_split,
    scale,
    inv_keep,
    threshold,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out [B, Hq, S, D], top and sum [B, Hq, S], all contiguous, of one block of the queries of one key head.

    SPLIT: each of these [splits, ...], of keys_per_split keys, the first split with the prefix; out in f32, not divided
    by the sum.
    """
    first = tl.program_id(0) * BLOCK_M
    offs = first + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    b = (tl.program_id(1) // Hkv).to(tl.int64)
    kvh = (tl.program_id(1) % Hkv).to(tl.int64)
    inside = offs < GROUP * S
    h = kvh * GROUP + offs // S
    offs_m = tl.where(inside, offs % S, S)
    row = tl.program_id(1).to(tl.int64) * GROUP * S + offs
    q = load_rows(q_ptr + b * stride_qb, 1, h * stride_qh + offs_m.to(tl.int64) * stride_qs, inside, offs_d, D)
    key1, key2 = row_keys(seed_ptr, row, DROPOUT)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    begin = 0
    end = L
    prefix_end = T
    if CAUSAL:
        end = min(S, first % S + BLOCK_M) + L - S
    if SPLIT:
        begin = tl.program_id(2) * keys_per_split
        end = min(end, begin + keys_per_split)
        prefix_end = tl.where(tl.program_id(2) == 0, T, 0)
    # The prefix comes first: its scores are finite, so that a query without text never subtracts -inf from -inf.
    acc, top, total = walk(
        q, pk_ptr + b * stride_pkb + kvh * stride_pkh, pv_ptr + b * stride_pvb + kvh * stride_pvh, mask_ptr,
        acc, top, total, key1, key2, offs_m, offs_d, S, T, D, 0, prefix_end, 0, stride_pkn, stride_pvn, scale,
        threshold, False, 0, DROPOUT, False, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    mask_rows = mask_at(mask_ptr, b, h, offs_m, stride_mb, stride_mh, stride_ms, MASK)
    acc, top, total = walk(
        q, k_ptr + b * stride_kb + kvh * stride_kh, v_ptr + b * stride_vb + kvh * stride_vh, mask_rows,
        acc, top, total, key1, key2, offs_m, offs_d, S, L, D, begin, end, T, stride_kn, stride_vn, scale,
        threshold, CAUSAL, MASK, DROPOUT, SPLIT, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if SPLIT:
        row += tl.program_id(2).to(tl.int64) * tl.num_programs(1) * GROUP * S
        acc *= inv_keep
    else:
        acc *= (inv_keep / total)[:, None]
    mask_md = inside[:, None] & (offs_d < D)[None, :]
    tl.store(out_ptr + row[:, None] * D + offs_d[None, :], round_to(acc, out_ptr.dtype.element_ty), mask=mask_md)
    # Apart: exp(score - log-sum-exp) would lose the digits that the score has before the point.
    tl.store(top_ptr + row, top, mask=inside)
    tl.store(sum_ptr + row, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "splits"])
def merge_kernel(
    parts_ptr, tops_ptr, sums_ptr, out_ptr, top_ptr, sum_ptr, rows, D, splits, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [rows, D], top and sum [rows] of what `forward_kernel` left of every split, in the order of the splits."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    inside = row < rows
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for split in range(splits):
        top = tl.maximum(top, tl.load(tops_ptr + split * rows + row, mask=inside, other=0.0))
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for split in range(splits):
        at = split * rows + row
        share = tl.exp(tl.load(tops_ptr + at, mask=inside, other=0.0) - top)
        total += share * tl.load(sums_ptr + at, mask=inside, other=1.0)
        acc += share[:, None] * load_rows(parts_ptr, D, at, inside, offs_d, D)
    out = round_to(acc / total[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * D + offs_d[None, :], out, mask=inside[:, None] & (offs_d < D)[None, :])
    tl.store(top_ptr + row, top, mask=inside)
    tl.store(sum_ptr + row, total, mask=inside)


@triton.jit(do_not_specialize=["S", "L", "T", "threshold"])
def queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    pk_ptr,
    pv_ptr,
    mask_ptr,
    out_ptr,
    top_ptr,
    sum_ptr,
    dout_ptr,
    dq_ptr,
    delta_ptr,
    seed_ptr,
    Hq,
    GROUP,
    S,
    L,
    T,
    D,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_pkb,
    stride_pkh,
    stride_pkn,
    stride_pvb,
    stride_pvh,
    stride_pvn,
    stride_mb,
    stride_mh,
    stride_ms,
    stride_dob,
    stride_doh,
    stride_dos,
    scale,
    inv_keep,
    threshold,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq and delta = sum(dout * out) [B, Hq, S] of one block of queries of one head; out and dq are contiguous."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    b = (tl.program_id(1) // Hq).to(tl.int64)
    h = (tl.program_id(1) % Hq).to(tl.int64)
    kvh = h // GROUP
    row = (b * Hq + h) * S + offs_m
    q = load_rows(q_ptr + b * stride_qb + h * stride_qh, stride_qs, offs_m, offs_m < S, offs_d, D)
    dout = load_rows(dout_ptr + b * stride_dob + h * stride_doh, stride_dos, offs_m, offs_m < S, offs_d, D)
    out = load_rows(out_ptr, D, row, offs_m < S, offs_d, D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=offs_m < S)
    top = tl.load(top_ptr + row, mask=offs_m < S, other=float("inf"))
    inv_sum = 1.0 / tl.load(sum_ptr + row, mask=offs_m < S, other=1.0)
    key1, key2 = row_keys(seed_ptr, row, DROPOUT)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq = walk_back(
        q, dout, dq, top, inv_sum, delta, pk_ptr + b * stride_pkb + kvh * stride_pkh,
        pv_ptr + b * stride_pvb + kvh * stride_pvh, mask_ptr, key1, key2, offs_m, offs_d, S, T, D, T, 0,
        stride_pkn, stride_pvn, scale, inv_keep, threshold,
        False, 0, DROPOUT, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    end = L
    if CAUSAL:
        end = min(L, (tl.program_id(0) + 1) * BLOCK_M + L - S)
    mask_rows = mask_at(mask_ptr, b, h, offs_m, stride_mb, stride_mh, stride_ms, MASK)
    dq = walk_back(
        q, dout, dq, top, inv_sum, delta,
        k_ptr + b * stride_kb + kvh * stride_kh, v_ptr + b * stride_vb + kvh * stride_vh,
        mask_rows, key1, key2, offs_m, offs_d, S, L, D, end, T, stride_kn, stride_vn, scale, inv_keep, threshold,
        CAUSAL, MASK, DROPOUT, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    mask_md = (offs_m < S)[:, None] & (offs_d < D)[None, :]
    tl.store(dq_ptr + row[:, None] * D + offs_d[None, :], round_to(dq * scale, dq_ptr.dtype.element_ty), mask=mask_md)


class _Mask(NamedTuple):
    """What queries see: causal or not; the mask's kind (0 none, 1 bool, 2 additive), data, strides of B, H and S."""

    causal: bool
    kind: int
    data: Tensor | None
    strides: tuple[int, int, int]


_ALL_SEEN = _Mask(False, 0, None, (0, 0, 0))


def _mask_of(causal: bool, mask: Tensor | None) -> _Mask:
    if mask is None:
        return _ALL_SEEN._replace(causal=causal)
    if mask.stride(3) != 1 and mask.shape[3] > 1:
        mask = mask.contiguous()
    kind = 1 if mask.dtype == torch.bool else 2
    return _Mask(causal, kind, mask.view(torch.uint8) if kind == 1 else mask, mask.stride()[:3])


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


def _launch(
    kernel: Any, grid: tuple[int, ...], t: Tile, q: Tensor, m: _Mask, drop: Dropout, scale: float, *args: Any,
    **own: bool,
) -> None:  # fmt: skip
    """With the arguments that all passes end with, and constexprs that are this one's own."""
    launch(
        kernel, grid, *args, float(scale), drop.inv_keep, drop.threshold,
        CAUSAL=m.causal, MASK=m.kind, DROPOUT=drop.mode, PRECISION=precision(q.dtype, q.dtype), **own,
        BLOCK_M=t.block_m, BLOCK_N=t.block_n, BLOCK_D=_width(q), num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip


@planned
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pk: Tensor,
    pv: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, S, D] in q's dtype; highest score and sum of exp(score - it) of each query, [2, B, Hq, S] f32)."""
    (b, hq, s, d), (hkv, length) = q.shape, k.shape[1:3]
    out = torch.empty((b, hq, s, d), dtype=q.dtype, device=q.device)
    norm = torch.empty((2, b, hq, s), dtype=torch.float32, device=q.device)
    drop, m, rows = dropout_args(p, seed), _mask_of(causal, mask), hq // hkv * s
    t, per_split = _tile("few", q), max(length, 1)
    if rows > t.block_m:
        t = _tile("forward", q)
    else:
        wanted = cdiv(device_of(q).processors, b * hkv)
        per_split = t.block_n * max(_SPLIT_BLOCKS, cdiv(length, t.block_n * wanted))
    splits = max(1, cdiv(length, per_split))
    parts, tops, sums = out, norm[0], norm[1]
    if splits > 1:
        parts = torch.empty((splits, b, hq, s, d), dtype=torch.float32, device=q.device)
        tops, sums = torch.empty((2, splits, b, hq, s), dtype=torch.float32, device=q.device)
    with on_device(q):
        _launch(
            forward_kernel, (cdiv(rows, t.block_m), b * hkv, splits), t, q, m, drop, scale,
            q, k, v, pk, pv, m.data, parts, tops, sums, drop.seed,
            hkv, hq // hkv, s, length, pk.shape[2], d, *_strides(q, k, v, pk, pv), *m.strides, per_split,
            SPLIT=splits > 1,
        )  # fmt: skip
        if splits > 1:
            launch(
                merge_kernel, (cdiv(b * hq * s, _MERGED_ROWS),),
                parts, tops, sums, out, norm[0], norm[1], b * hq * s, d, splits,
                BLOCK_M=_MERGED_ROWS, BLOCK_D=_width(q), num_warps=4,
            )  # fmt: skip
    return out, norm


@planned
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pk: Tensor,
    pv: Tensor,
    mask: Tensor | None,
    out: Tensor,
    norm: Tensor,
    causal: bool,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv in q's dtype, dpk and dpv [B, Hkv, T, D] in f32, one for each batch row)."""
    (b, hq, s, d), (hkv, length), prefix = q.shape, k.shape[1:3], pk.shape[2]
    drop, m, t = dropout_args(p, seed), _mask_of(causal, mask), _tile("queries", q)
    dq = torch.empty((b, hq, s, d), dtype=q.dtype, device=q.device)
    delta = torch.empty_like(norm[0])
    dk, dv = (torch.empty((b, hkv, length, d), dtype=q.dtype, device=q.device) for _ in range(2))
    dpk, dpv = (torch.empty((b, hkv, prefix, d), dtype=torch.float32, device=q.device) for _ in range(2))
    with on_device(q):
        _launch(
            queries_kernel, (cdiv(s, t.block_m), b * hq), t, q, m, drop, scale,
            q, k, v, pk, pv, m.data, out, norm[0], norm[1], dout, dq, delta, drop.seed,
            hq, hq // hkv, s, length, prefix, d, *_strides(q, k, v, pk, pv), *m.strides, *_strides(dout),
        )  # fmt: skip
        t = _tile("keys", q)
        for keys, values, dkeys, dvalues, first, seen in ((k, v, dk, dv, prefix, m), (pk, pv, dpk, dpv, 0, _ALL_SEEN)):
            n = keys.shape[2]
            _launch(
                keys_kernel, (cdiv(n, t.block_n), b * hkv), t, q, seen, drop, scale,
                q, keys, values, seen.data, norm[0], norm[1], delta, dout, dkeys, dvalues, drop.seed,
                hq, hq // hkv, s, n, d, first, *_strides(q, keys, values), *seen.strides, *_strides(dout),
            )  # fmt: skip
    return dq, dk, dv, dpk, dpv


def aot_sources(device: Device) -> Iterator[Source]:
    """Kernel variants to compile ahead of time: widths, dtypes, masks, grouped queries, decoding."""
    return sources(device, _aot_calls())


def _aot_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    cases = [
        (8, 32, 8, 1024, 1024, 20, 128, bf16, "causal", 0.0),
        (8, 12, 12, 512, 512, 20, 64, bf16, "bool", 0.1),
        (8, 16, 16, 1024, 1024, 30, 64, bf16, "causal", 0.0),
        (2, 8, 4, 512, 512, 20, 256, bf16, "causal", 0.0),
        (4, 16, 16, 512, 512, 20, 128, f16, "bool", 0.1),
        (2, 8, 8, 128, 128, 20, 64, f32, "bool", 0.1),
        (2, 8, 8, 128, 128, 20, 128, f32, "causal", 0.0),
        (1, 4, 2, 33, 35, 5, 40, bf16, "float", 0.0),
        (32, 32, 8, 1, 2048, 20, 128, bf16, "causal", 0.0),
        (1, 32, 8, 1, 2048, 20, 128, bf16, "bool", 0.0),
        (1, 16, 16, 4, 2048, 20, 64, f16, "causal", 0.1),
        (1, 8, 4, 1, 2048, 20, 256, bf16, "causal", 0.0),
        (1, 8, 4, 1, 2048, 20, 128, f32, "causal", 0.0),
    ]
    for b, hq, hkv, s, length, t, d, dtype, mask, p in cases:
        name = f"prefix_attention B{b} H{hq}/{hkv} S{s} L{length} T{t} D{d} {dtype} {mask} p{p}".replace("torch.", "")
        yield name, functools.partial(_aot_call, b, hq, hkv, s, length, t, d, dtype, mask, p)


def _aot_call(
    b: int, hq: int, hkv: int, s: int, length: int, t: int, d: int, dtype: torch.dtype, kind: str, p: float
) -> None:
    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = meta(b, s, hq, d).transpose(1, 2), *(meta(b, length, hkv, d).transpose(1, 2) for _ in range(2))
    pk, pv = (meta(hkv, t, d).expand(b, -1, -1, -1) for _ in range(2))
    mask = None
    if kind != "causal":
        mask = meta(b, 1, s, length, dtype=torch.bool if kind == "bool" else torch.float32).expand(b, hq, s, length)
    seed = meta(1, dtype=torch.int64) if p else None
    out, norm = forward(q, k, v, pk, pv, mask, kind == "causal", d**-0.5, p, seed)
    if s > 1:  # a decoding step has no backward
        backward(meta(b, hq, s, d), q, k, v, pk, pv, mask, out, norm, kind == "causal", d**-0.5, p, seed)
