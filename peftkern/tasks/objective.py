"""The loss of prompt-based tuning.

    L = L_prompt + λ · L_finetune

L_prompt: cross-entropy on the prompted input (template, soft prompt or both), by the classifier or, with a verbalizer,
by the words at the mask. L_finetune: cross-entropy on the plain input, without template and soft prompt, by the same
classifier or, with a verbalizer, by a linear head of its own on the first token (the last one in a causal model).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftkern.attachment import state
from peftkern.tasks.encode import PLAIN
from peftkern.tasks.templates import Template, Verbalizer, positions

FINETUNE_HEAD = "finetune_head"
"""The module that is added to a language model for L_finetune."""


class PromptObjective:
    """Loss and class scores of a batch of `encode.PairCollator`.

    template, verbalizer: None for a model with a classifier. mask_token_id: None for a causal model.
    """

    def __init__(
        self,
        weight: float,
        template: Template | None = None,
        verbalizer: Verbalizer | None = None,
        mask_token_id: int | None = None,
    ) -> None:
        self.weight = weight
        self.template = template
        self.verbalizer = verbalizer
        self.mask_token_id = mask_token_id

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], count: Tensor | int | None = None, train: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(loss, scores [B, labels] of the prompted input).

        The loss is a mean over the batch, or a sum divided by `count`, the records of all accumulated batches. Without
        `train` only L_prompt is computed.
        """
        labels = batch["labels"]
        prompted = {n: v for n, v in batch.items() if n != "labels" and not n.startswith(PLAIN)}
        scores = self._prompt_scores(model, prompted)
        loss = _cross_entropy(scores, labels, count)
        if self.weight and train:
            plain = {n.removeprefix(PLAIN): v for n, v in batch.items() if n.startswith(PLAIN)}
            with without_soft_prompts(_unwrapped(model)):
                loss = loss + self.weight * _cross_entropy(self._plain_scores(model, plain), labels, count)
        return loss, scores

    def _prompt_scores(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = model(**inputs).logits
        if self.verbalizer is None or self.template is None:
            return logits
        place = positions(self.template, inputs["input_ids"], inputs["attention_mask"], self.mask_token_id)
        return self.verbalizer.scores(_at(logits, place, inputs["input_ids"]))

    def _plain_scores(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        if self.verbalizer is None:
            logits: Tensor = model(**inputs).logits
            return logits
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        mask = inputs["attention_mask"]
        causal = self.mask_token_id is None
        order = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        place = (mask * (order if causal else order.flip(0))).argmax(-1)
        head = getattr(_unwrapped(model), FINETUNE_HEAD)
        scores: Tensor = head(_at(hidden, place, inputs["input_ids"]))
        return scores


@contextmanager
def without_soft_prompts(model: nn.Module) -> Iterator[None]:
    """Inside the block no prompt adapter puts rows in front; every other adapter and the head stay as they are."""
    attachment = state(model)
    hooks = attachment.hooks if attachment is not None else None
    if hooks is None:
        yield
        return
    active, hooks.active = hooks.active, ()
    try:
        yield
    finally:
        hooks.active = active


def _at(values: Tensor, place: Tensor, input_ids: Tensor) -> Tensor:
    """Values [B, T + S, C] at `place` [B] of the text; the T rows of a soft prompt, if any, stand in front of it."""
    shift = values.shape[1] - input_ids.shape[1]
    return values[torch.arange(len(place), device=place.device), place + shift]


def _cross_entropy(scores: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
    if count is None:
        return functional.cross_entropy(scores.float(), labels)
    return functional.cross_entropy(scores.float(), labels, reduction="sum") / count


def _unwrapped(model: nn.Module) -> Any:
    """The model inside DataParallel and its like, which hide its attributes."""
    return getattr(model, "module", model)
