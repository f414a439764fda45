"""One batch, many adapters: names given row by row, for any attached model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from peftkern.attachment import Attachment, activate, attached, known
from peftkern.errors import AdapterError, MergeError
from peftkern.rows import BASE, Batch, Rows

M = TypeVar("M", bound=nn.Module)


@contextmanager
def mixed(model: M, adapter_names: Sequence[str], *, expand: Sequence[int] = ()) -> Iterator[M]:
    """Inside the block row m of every batch goes through the adapter adapter_names[m], or through none: "__base__".

    It works for every layer method, in training as well as in inference: gradients reach the adapters of the rows, as
    far as `set_adapter` has made them trainable. The names replace the active adapters for the length of the block.
    Where the model itself is checkpointed by transformers, backward may come after the block; a model that calls
    torch's checkpoint in its own code needs backward inside. expand: how many times generation repeats each row beside
    once, such as the number of beams; PeftModel.generate knows it by itself.
    Raises AdapterError, before anything runs, for an unknown name, for a prompt, whose rows would be longer than the
    others, for an adapter that trains parameters of the backbone itself, and when adapters are merged; in the first
    adapted module when the number of names is not the batch's number of rows.
    """
    attachment = attached(model)
    _check(model, attachment, adapter_names)
    rows = attachment.batch.of(adapter_names, expand)
    active = attachment.active
    kept = tuple(name for name in active if not _is_global(attachment, name))
    if kept != active:
        activate(model, kept)
    try:
        with attachment.batch.set(rows, attachment.batch.off), _checkpointed(model, attachment.batch, rows):
            yield model
    finally:
        for tap in attachment.taps.values():
            tap.value = None  # type: ignore[assignment]
        if kept != active:
            activate(model, active)


def _check(model: nn.Module, attachment: Attachment, names: Sequence[str]) -> None:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"adapter_names={names!r}: want a list with one name per row of the batch")
    if attachment.merged:
        raise MergeError(f"adapter_names: adapters {list(attachment.merged)} are merged: unmerge first")
    for name in dict.fromkeys(names):
        if name == BASE:
            continue
        try:
            known(model, name)
        except AdapterError as error:
            raise AdapterError(f"adapter_names: {error}; {BASE!r} is a row without adapter") from error
        if attachment.hooks is not None and name in attachment.hooks.prompts:
            raise AdapterError(
                f"adapter_names: {name!r} is a prompt, which makes its rows longer: give it a batch of its own"
            )
        if name in attachment.selections:
            trained = attachment.selection(name).names[0]
            raise AdapterError(
                f"adapter_names: {name!r} has its own {trained}, which all rows share: give it a batch of its own"
            )


def _is_global(attachment: Attachment, name: str) -> bool:
    """Whether the adapter, while active, acts on the whole batch from outside the adapted modules."""
    return name in attachment.selections or (attachment.hooks is not None and name in attachment.hooks.prompts)


@contextmanager
def _checkpointed(model: nn.Module, batch: Batch, rows: Rows) -> Iterator[None]:
    """What transformers checkpoints is recomputed in backward, when the block may have ended: with these rows again."""
    with ExitStack() as stack:
        if model.training and torch.is_grad_enabled() and not batch.off:
            for module in model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    func: Any = getattr(module, "_gradient_checkpointing_func", None)
                    if func is not None:
                        module._gradient_checkpointing_func = _Replayed(func, batch, rows)  # type: ignore[assignment]
                        stack.callback(setattr, module, "_gradient_checkpointing_func", func)
        yield


class _Replayed:
    """A checkpoint function whose recomputation sees the rows that its forward saw."""

    def __init__(self, func: Callable[..., Any], batch: Batch, rows: Rows) -> None:
        self.func, self.batch, self.rows = func, batch, rows
        self.keywords = getattr(func, "keywords", {})

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def run(*inputs: Any, **options: Any) -> Any:
            with self.batch.set(self.rows):
                return function(*inputs, **options)

        return self.func(run, *args, **kwargs)
