"""Triton backend of prompt_concat: prompt rows in front of the first real token of every row, in one pass.

Left padding gives pads, prompt, text; right padding prompt, text, pads. B batch, S tokens, T prompt rows, H hidden.
Every program finds the start of its batch row from the mask itself, so that nothing is launched or synchronised before.
Source of the method: Lester et al. 2021 (arXiv:2104.08691), section 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import INTERPRETED, refuse_common, round_to
from ._device import Device, Source, launch, on_device, sources
from ._plan import planned
from ._tiles import cdiv, next_power_of_2

_IGNORED = tl.constexpr(-100)
_BLOCK_J = 64 if INTERPRETED else 8
_BLOCK_S = 256
_MAX_BLOCK_H = 1024


def refuse(device: torch.device, dtype: torch.dtype, **dims: int) -> str | None:
    """Why this backend cannot run for embeddings of `dtype` on `device` and sizes B, S, T, H; None when it can."""
    return refuse_common(device, dtype, **dims)


@planned
def forward(
    ids: Tensor | None, table: Tensor, prompt: Tensor, mask: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(embeds [B, T+S, H], mask, positions, labels [B, T+S] int64) of table[ids] or embeds with the prompt put in.

    ids [B, S] int64 with table [V, H], or None with embeds [B, S, H]; prompt [T, H] in f32, bf16 or f16; mask [B, S]
    int64 of 0 and 1; labels [B, S] int64, or None for an empty result. The prompt has mask 1 and label -100; positions
    count the ones from 0. An id outside the table cannot raise without a synchronisation: its row becomes NaN.
    """
    (batch, length), (prompt_length, hidden) = mask.shape, prompt.shape
    total = prompt_length + length
    embeds = torch.empty((batch, total, hidden), dtype=table.dtype, device=table.device)
    mask_out = torch.empty((batch, total), dtype=torch.int64, device=mask.device)
    positions = torch.empty_like(mask_out)
    labels_out = torch.empty_like(mask_out) if labels is not None else mask.new_empty(0)
    block_h = min(next_power_of_2(hidden), _MAX_BLOCK_H)
    with on_device(table):
        launch(
            concat_kernel, (cdiv(total, _BLOCK_J) * batch, cdiv(hidden, block_h)),
            ids, table, prompt, mask, labels, embeds, mask_out, positions, labels_out if labels is not None else None,
            table.shape[0], length, prompt_length, hidden,
            BLOCK_J=_BLOCK_J, BLOCK_S=_BLOCK_S, BLOCK_H=block_h, num_warps=4,
        )  # fmt: skip
    return embeds, mask_out, positions, labels_out


@planned
def backward(dout: Tensor, mask: Tensor, prompt_length: int, need_embeds: bool) -> tuple[Tensor, Tensor]:
    """(d_prompt [T, H] f32, d_embeds [B, S, H] in dout's dtype or empty) of dout [B, T+S, H] and mask [B, S].

    d_prompt is summed over the batch in a fixed order.
    """
    (batch, length), hidden = mask.shape, dout.shape[2]
    d_prompt = torch.empty((prompt_length, hidden), dtype=torch.float32, device=dout.device)
    d_embeds = dout.new_empty((batch, length, hidden) if need_embeds else (0,))
    block_h = min(next_power_of_2(hidden), _MAX_BLOCK_H)
    copies = batch * cdiv(length, _BLOCK_J) if need_embeds else 0
    with on_device(dout):
        launch(
            split_kernel, (prompt_length + copies, cdiv(hidden, block_h)),
            dout, mask, d_prompt, d_embeds if need_embeds else None, batch, length, prompt_length, hidden,
            BLOCK_B=min(next_power_of_2(batch), 8), BLOCK_J=_BLOCK_J, BLOCK_S=_BLOCK_S, BLOCK_H=block_h,
            num_warps=4,
        )  # fmt: skip
    return d_prompt, d_embeds


@triton.jit
def first_nonzero(mask_ptr, offs_b, B, S, BLOCK_S: tl.constexpr):
    """[rows] int32: index of the first nonzero of mask[b, :S], 0 where there is none (and outside the batch)."""
    start = tl.where(offs_b < B, S, 0)
    at = 0
    while (at < S) & (tl.max(start, axis=0) == S):
        offs_s = at + tl.arange(0, BLOCK_S)
        inside = (offs_b < B)[:, None] & (offs_s < S)[None, :]
        value = tl.load(mask_ptr + offs_b.to(tl.int64)[:, None] * S + offs_s[None, :], mask=inside, other=0)
        start = tl.minimum(start, tl.min(tl.where(value != 0, offs_s[None, :], S), axis=1))
        at += BLOCK_S
    return tl.where(start == S, 0, start)


@triton.jit
def ones_before(mask_ptr, b, S, end, BLOCK_S: tl.constexpr):
    """sum of mask[b, :end], int64."""
    count = tl.zeros((BLOCK_S,), tl.int64)
    for at in range(0, end, BLOCK_S):
        offs_s = at + tl.arange(0, BLOCK_S)
        count += tl.load(mask_ptr + b.to(tl.int64) * S + offs_s, mask=offs_s < end, other=0)
    return tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["V", "S", "T"])
def concat_kernel(
    ids_ptr,
    source_ptr,
    prompt_ptr,
    mask_ptr,
    labels_ptr,
    embeds_ptr,
    mask_out_ptr,
    positions_ptr,
    labels_out_ptr,
    V,
    S,
    T,
    H,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One tile of output rows j of one batch row: source row j, prompt row j - start or source row j - T."""
    blocks = tl.cdiv(S + T, BLOCK_J)
    b = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_J
    offs_j = first + tl.arange(0, BLOCK_J)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    start = tl.max(first_nonzero(mask_ptr, b + tl.arange(0, 1), b + 1, S, BLOCK_S), axis=0)
    valid = offs_j < S + T
    in_prompt = (offs_j >= start) & (offs_j < start + T)
    token = valid & (offs_j < start) | valid & (offs_j >= start + T)
    at_token = b.to(tl.int64) * S + tl.where(offs_j < start, offs_j, offs_j - T)
    mask_h = (offs_h < H)[None, :]
    if ids_ptr is not None:
        source_row = tl.load(ids_ptr + at_token, mask=token, other=0)
        known = token & (source_row >= 0) & (source_row < V)
    else:
        source_row = at_token
        known = token
    source_tile = source_ptr + source_row[:, None] * H + offs_h[None, :]
    row = tl.load(source_tile, mask=known[:, None] & mask_h, other=float("nan"))
    prompt_tile = prompt_ptr + (offs_j - start).to(tl.int64)[:, None] * H + offs_h[None, :]
    prompt = tl.load(prompt_tile, mask=in_prompt[:, None] & mask_h, other=0.0)
    row = tl.where(in_prompt[:, None], round_to(prompt.to(tl.float32), embeds_ptr.dtype.element_ty), row)
    out_at = b.to(tl.int64) * (S + T) + offs_j
    tl.store(embeds_ptr + out_at[:, None] * H + offs_h[None, :], row, mask=valid[:, None] & mask_h)
    if tl.program_id(1) == 0:
        token_mask = tl.load(mask_ptr + at_token, mask=token, other=0)
        new_mask = tl.where(in_prompt, 1, token_mask)
        # Tokens before the start are all 0, so the ones before this tile are those of the first `first - T` tokens.
        count = ones_before(mask_ptr, b, S, first - T, BLOCK_S) + tl.cumsum(token_mask, axis=0)
        count += tl.minimum(tl.maximum(offs_j - start + 1, 0), T)
        tl.store(mask_out_ptr + out_at, new_mask, mask=valid)
        tl.store(positions_ptr + out_at, tl.maximum(count - 1, 0), mask=valid)
        if labels_ptr is not None:
            label = tl.load(labels_ptr + at_token, mask=token, other=_IGNORED)
            tl.store(labels_out_ptr + out_at, label, mask=valid)


@triton.jit(do_not_specialize=["B", "S", "T"])
def split_kernel(
    dout_ptr,
    mask_ptr,
    d_prompt_ptr,
    d_embeds_ptr,
    B,
    S,
    T,
    H,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The first T programs sum one prompt row over the batch each, the others copy a tile of token rows back."""
    pid = tl.program_id(0)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    if pid < T:
        acc = tl.zeros((BLOCK_H,), tl.float32)
        for batch in range(0, B, BLOCK_B):
            offs_b = batch + tl.arange(0, BLOCK_B)
            at = offs_b.to(tl.int64) * (S + T) + first_nonzero(mask_ptr, offs_b, B, S, BLOCK_S) + pid
            inside = (offs_b < B)[:, None] & mask_h[None, :]
            row = tl.load(dout_ptr + at[:, None] * H + offs_h[None, :], mask=inside, other=0.0)
            acc += tl.sum(row.to(tl.float32), axis=0)
        tl.store(d_prompt_ptr + pid.to(tl.int64) * H + offs_h, acc, mask=mask_h)
    elif d_embeds_ptr is not None:
        blocks = tl.cdiv(S, BLOCK_J)
        b = (pid - T) // blocks
        offs_s = (pid - T) % blocks * BLOCK_J + tl.arange(0, BLOCK_J)
        start = tl.max(first_nonzero(mask_ptr, b + tl.arange(0, 1), b + 1, S, BLOCK_S), axis=0)
        at = b.to(tl.int64) * (S + T) + tl.where(offs_s < start, offs_s, offs_s + T)
        inside = (offs_s < S)[:, None] & mask_h[None, :]
        row = tl.load(dout_ptr + at[:, None] * H + offs_h[None, :], mask=inside, other=0.0)
        to = b.to(tl.int64) * S + offs_s
        tl.store(d_embeds_ptr + to[:, None] * H + offs_h[None, :], row, mask=inside)


def aot_sources(device: Device) -> Iterator[Source]:
    """Kernel variants to compile ahead of time: ids and embeddings, with and without labels, small and odd sizes."""
    return sources(device, _aot_calls())


def _aot_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    f32, bf16 = torch.float32, torch.bfloat16
    cases = [
        (16, 512, 20, 4096, bf16, f32, True),
        (16, 512, 20, 4096, bf16, bf16, False),
        (16, 512, 20, 768, f32, f32, True),
        (3, 5, 4, 33, bf16, f32, False),
    ]
    for batch, length, prompt_length, hidden, dtype, prompt, from_ids in cases:
        source = "ids" if from_ids else "embeds"
        name = f"prompt_concat B{batch} S{length} T{prompt_length} H{hidden} {dtype} {prompt} {source}"
        call = functools.partial(_aot_call, batch, length, prompt_length, hidden, dtype, prompt, from_ids)
        yield name.replace("torch.", ""), call


def _aot_call(
    batch: int, length: int, prompt_length: int, hidden: int, dtype: torch.dtype, prompt: torch.dtype, from_ids: bool
) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens = meta(batch, length)
    source = meta(1000, hidden, dtype=dtype) if from_ids else meta(batch, length, hidden, dtype=dtype)
    ids, labels = (tokens, tokens) if from_ids else (None, None)
    forward(ids, source, meta(prompt_length, hidden, dtype=prompt), tokens, labels)
    backward(meta(batch, length + prompt_length, hidden, dtype=dtype), tokens, prompt_length, not from_ids)
