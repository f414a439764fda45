"""Put a soft prompt in front of the first real token of every row, in one pass over ids or embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.ops._draw import Draw
from peftkern.ops._op import Op, autograd, cast, choose, kernel

IGNORED = -100


class Prompted(NamedTuple):
    """embeds [B, T+S, H], mask [B, T+S] int64, positions [B, T+S] int64, labels [B, T+S] int64 or None."""

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor | None


def source_index(mask: Tensor, prompt_length: int) -> Tensor:
    """For each output position the input position it is copied from, or -1 - t where prompt row t stands.

    mask [B, S] -> int64 [B, T+S]. The prompt starts at the first 1 of each row of the mask.
    """
    batch, length = mask.shape
    start = _start(mask)[:, None]
    position = torch.arange(length + prompt_length, device=mask.device).expand(batch, -1)
    after = torch.where(position < start + prompt_length, start - position - 1, position - prompt_length)
    return torch.where(position < start, position, after)


def reference(
    prompt: Tensor,
    *,
    ids: Tensor | None = None,
    table: Tensor | None = None,
    embeds: Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Prompted:
    """[pads; P; x] for left padding, [P; x; pads] for right padding.

    prompt [T, H] · ids [B, S] with table [V, H], or embeds [B, S, H] · mask [B, S] of 0 and 1 (None: all ones)
    · labels [B, S]. The prompt gets mask 1 and label -100; positions count the ones of the mask from 0.
    Source: Lester et al. 2021 (arXiv:2104.08691), section 2. The oracle: never optimise it.
    """
    mask = _check(prompt, ids, table, embeds, mask, labels)
    if embeds is None:
        embeds = F.embedding(_required(ids), _required(table))
    length, hidden = embeds.shape[1:]
    source = source_index(mask, prompt.shape[0])
    if prompt.shape[0] == 0:
        out = embeds
    else:
        rows = prompt.to(embeds.dtype)[(-1 - source).clamp(0)]
        index = source.clamp(0, max(length - 1, 0))[..., None].expand(-1, -1, hidden)
        out = torch.where(source[..., None] < 0, rows, embeds.gather(1, index) if length else rows)
    clamped = source.clamp(0)
    ones = torch.ones_like(source)
    new_mask = torch.where(source < 0, ones, mask.gather(1, clamped) if length else ones)
    positions = (new_mask.cumsum(1) - 1).clamp(0)
    if labels is not None:
        labels = labels.to(torch.int64)
        labels = torch.where(source < 0, IGNORED, labels.gather(1, clamped) if length else ones)
    return Prompted(out, new_mask, positions, labels)


def prompt_concat(
    prompt: Tensor,
    *,
    ids: Tensor | None = None,
    table: Tensor | None = None,
    embeds: Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Prompted:
    """Fused embedding look-up and prompt concatenation; arguments and result as `reference`.

    ids and labels may be of any integer dtype. The embedding table is frozen here: a table that requires grad goes
    through F.embedding first. Saves the mask only. Raises ValueError for shapes that do not fit and unless one of ids
    and embeds is given.
    """
    mask = _check(prompt, ids, table, embeds, mask, labels)
    ids = None if ids is None else cast(ids, torch.int64)
    labels = None if labels is None else cast(labels, torch.int64)
    if ids is not None and _required(table).requires_grad:
        embeds, ids, table = F.embedding(ids, _required(table)), None, None
    source = _required(table if embeds is None else embeds)
    sizes = {"B": mask.shape[0], "S": mask.shape[1], "T": prompt.shape[0], "H": prompt.shape[1]}
    backend = choose("prompt_concat", source, prompt, **sizes)
    if backend == "reference" or prompt.numel() == 0 or mask.numel() == 0:
        return reference(prompt, ids=ids, table=table, embeds=embeds, mask=mask, labels=labels)
    out = _differentiable(ids, source, prompt, mask, labels, backend)
    return Prompted(out[0], out[1], out[2], None if labels is None else out[3])


def _start(mask: Tensor) -> Tensor:
    """Index of the first 1 of each row of the mask [B, S], 0 where there is none -> int64 [B]."""
    return mask.argmax(1) if mask.shape[1] else mask.new_zeros(mask.shape[0])


def _forward(
    ids: Tensor | None, source: Tensor, prompt: Tensor, mask: Tensor, labels: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out: tuple[Tensor, Tensor, Tensor, Tensor] = kernel(backend, "prompt_concat").forward(
        None if ids is None else ids.contiguous(),
        source.contiguous(),
        prompt.contiguous(),
        mask.contiguous(),
        None if labels is None else labels.contiguous(),
    )
    return out


def _backward(
    dout: Tensor, mask: Tensor, prompt_length: int, prompt_dtype: torch.dtype, backend: str, need_embeds: bool
) -> tuple[Tensor, Tensor]:
    d_prompt, d_embeds = kernel(backend, "prompt_concat").backward(
        dout.contiguous(), mask.contiguous(), prompt_length, need_embeds
    )
    return d_prompt.to(prompt_dtype), d_embeds


def _fake(
    ids: Tensor | None, source: Tensor, prompt: Tensor, mask: Tensor, labels: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length = mask.shape[0], mask.shape[1] + prompt.shape[0]
    return (
        source.new_empty(batch, length, prompt.shape[1]),
        mask.new_empty(batch, length),
        mask.new_empty(batch, length),
        mask.new_empty(0) if labels is None else mask.new_empty(batch, length),
    )


def _backward_fake(
    dout: Tensor, mask: Tensor, prompt_length: int, prompt_dtype: torch.dtype, backend: str, need_embeds: bool
) -> tuple[Tensor, Tensor]:
    d_embeds = dout.new_empty(*mask.shape, dout.shape[2]) if need_embeds else dout.new_empty(0)
    return dout.new_empty(prompt_length, dout.shape[2], dtype=prompt_dtype), d_embeds


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ids, _, prompt, mask, _, ctx.backend = inputs
    ctx.from_table, ctx.prompt_length, ctx.prompt_dtype = ids is not None, prompt.shape[0], prompt.dtype
    ctx.save_for_backward(mask)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(backward: Any, ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    (mask,) = ctx.saved_tensors
    need_embeds = ctx.needs_input_grad[1] and not ctx.from_table
    d_prompt, d_embeds = backward(dout, mask, ctx.prompt_length, ctx.prompt_dtype, ctx.backend, need_embeds)
    return None, d_embeds if need_embeds else None, d_prompt if ctx.needs_input_grad[2] else None, None, None, None


_differentiable = autograd(
    "prompt_concat",
    "(Tensor? ids, Tensor source, Tensor prompt, Tensor mask, Tensor? labels, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    "(Tensor dout, Tensor mask, int prompt_length, ScalarType prompt_dtype, str backend, bool need_embeds) "
    "-> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    _setup_context,
    _gradients,
)


def _required(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("give ids with table, or embeds: exactly one of the two")
    return tensor


def _check(
    prompt: Tensor,
    ids: Tensor | None,
    table: Tensor | None,
    embeds: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
) -> Tensor:
    """Validate the shapes and return the mask as int64 [B, S]."""
    if (ids is None) == (embeds is None) or (ids is None) != (table is None):
        raise ValueError("give ids with table, or embeds: exactly one of the two")
    tokens = _required(ids if embeds is None else embeds)
    source = _required(table if embeds is None else embeds)
    if prompt.dim() != 2 or prompt.shape[1] != source.shape[-1]:
        raise ValueError(f"prompt {tuple(prompt.shape)}: want [T, H] with H = {source.shape[-1]}")
    if tokens.dim() != (2 if embeds is None else 3):
        raise ValueError(f"ids or embeds {tuple(tokens.shape)}: want ids [B, S] or embeds [B, S, H]")
    shape = tokens.shape[:2]
    for name, tensor in (("mask", mask), ("labels", labels)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)}: want [B, S] = {tuple(shape)}")
    return torch.ones(shape, dtype=torch.int64, device=tokens.device) if mask is None else mask.to(torch.int64)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cases for tests and benchmarks: (readable id, keyword arguments)."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int, dt: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dt)

    def ints(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator).to(device)

    left = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]], device=device)
    ids = {"ids": ints(11, 3, 5), "table": rand(11, 33)}
    yield "ids-right", ids | {"prompt": rand(4, 33), "mask": left.flip(1), "labels": ints(9, 3, 5)}
    yield "ids-left", ids | {"prompt": rand(4, 33), "mask": left, "labels": ints(9, 3, 5)}
    yield "ids-no-mask", ids | {"prompt": rand(1, 33)}
    yield "embeds-left", {"embeds": rand(3, 5, 64), "prompt": rand(7, 64), "mask": left}
    yield "embeds-h1", {"embeds": rand(1, 1, 1), "prompt": rand(2, 1)}
    yield (
        "hole-and-empty-row",
        {
            "embeds": rand(2, 4, 8),
            "prompt": rand(3, 8),
            "mask": torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]], device=device),
        },
    )
    yield "zero-tokens", {"embeds": rand(2, 0, 8), "prompt": rand(3, 8)}
    yield "zero-batch", {"embeds": rand(0, 4, 8), "prompt": rand(3, 8)}
    yield "strided", {"embeds": rand(3, 5, 66)[..., ::2], "prompt": rand(4, 33)}
    late = torch.arange(2309, device=device) >= torch.tensor([[2100], [300]], device=device)
    yield "long-left", {"ids": ints(11, 2, 2309), "table": rand(11, 8), "prompt": rand(5, 8), "mask": late}
    yield "wide-batch", {"embeds": rand(65, 9, 2100), "prompt": rand(3, 2100)}
    if dtype in (torch.bfloat16, torch.float16):
        yield "f32-prompt", ids | {"prompt": rand(4, 33, dt=torch.float32), "mask": left}


def draw(draw: Draw) -> dict[str, Any]:
    """A random case."""
    batch, length, hidden, prompt_length = draw.one_of([0, 1, 2, 3, 5]), draw.size(33), draw.size(), draw.size(17)
    shape = (batch, length)
    masks = {
        "none": None,
        "left": torch.arange(length, device=draw.device) >= draw.randint(length + 1, batch, 1),
        "right": torch.arange(length, device=draw.device) < draw.randint(length + 1, batch, 1),
        "holes": draw.randint(2, *shape),
    }
    mask = masks[draw.one_of(list(masks))]
    case = {
        "prompt": draw.randn(prompt_length, hidden, dtype=draw.adapter_dtype()),
        "mask": None if mask is None else mask.to(draw.one_of([torch.int64, torch.int32, torch.bool])),
        "labels": draw.maybe(draw.randint(9, *shape)),
    }
    if draw.one_of(["ids", "embeds"]) == "embeds":
        return case | {"embeds": draw.randn(*shape, hidden)}
    return case | {"ids": draw.randint(11, *shape), "table": draw.randn(11, hidden)}


OP = Op(
    "prompt_concat", prompt_concat, reference, samples, draw=draw,
    frozen=("table",), rows=("ids", "embeds", "mask", "labels"), compiled=("ids-left", "embeds-left"),
)  # fmt: skip
