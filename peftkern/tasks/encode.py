"""From records to token ids: labels on the first sub-word of each word, prompts cut so that the template survives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorWithPadding

from peftkern.errors import ConfigError
from peftkern.tasks.records import Sentence, Text
from peftkern.tasks.templates import Template

IGNORE = -100
PLAIN = "plain_"
"""Prefix of the second, unprompted input in a batch."""


@dataclass
class Encoded:
    """Rows for the Trainer, and what is needed to read its predictions.

    rows: input_ids, attention_mask, labels (and what else the tokenizer makes). words: for token classification, the
    index of the word behind each label that is not -100. gold: the tags of every word, or the class.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    words: list[list[int]] = field(default_factory=list)
    gold: list[Any] = field(default_factory=list)


def encode_sentences(
    sentences: Sequence[Sentence], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_length: int
) -> Encoded:
    """Tokenise words; the first sub-word carries the word's label, every other position -100.

    Words beyond `max_length` sub-words, and words that have no sub-word at all, carry none: they are predicted as O.
    """
    if not tokenizer.is_fast:
        raise ConfigError(f"model: {type(tokenizer).__name__} cannot say which word a sub-word is of: need a fast one")
    number = {label: index for index, label in enumerate(labels)}
    encoded = Encoded()
    batch = tokenizer(
        [list(sentence.words) for sentence in sentences],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
    )
    for index, sentence in enumerate(sentences):
        row_labels: list[int] = []
        words: list[int] = []
        previous = None
        for word in batch.word_ids(index):
            first = word is not None and word != previous
            row_labels.append(number[sentence.tags[word]] if first else IGNORE)
            if first:
                words.append(word)
            previous = word
        encoded.rows.append({name: batch[name][index] for name in batch} | {"labels": row_labels})
        encoded.words.append(words)
        encoded.gold.append(list(sentence.tags))
    return encoded


def word_tags(predicted: npt.NDArray[np.int64], encoded: Encoded, labels: Sequence[str]) -> list[list[str]]:
    """One tag per word, truncated words O; `predicted` [sentences, positions] holds a label number per sub-word."""
    tags = []
    for row, source, words, gold in zip(predicted, encoded.rows, encoded.words, encoded.gold, strict=True):
        sentence = ["O"] * len(gold)
        places = [place for place, label in enumerate(source["labels"]) if label != IGNORE]
        for word, place in zip(words, places, strict=True):
            sentence[word] = labels[row[place]]
        tags.append(sentence)
    return tags


@dataclass(frozen=True)
class Prompting:
    """How texts become inputs: in a template or not, with the mask token of a masked-LM, with the plain text or not."""

    template: Template | None = None
    mask_token: str = ""
    causal: bool = False
    plain_too: bool = False

    def fill(self, text: str) -> str:
        """The prompt of `text`; without a template the text itself. A causal prompt ends where the answer begins."""
        if self.template is None:
            return text
        if self.mask_token:
            text = text.replace(self.mask_token, " ")
        prompt = self.template.fill(text, self.mask_token)
        return prompt.rstrip() if self.causal else prompt


def encode_texts(
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_length: int,
    prompting: Prompting,
) -> Encoded:
    """Tokenise texts, in their prompt if there is one; with `plain_too` the bare text follows under `plain_*` names.

    A prompt longer than `max_length` loses the end of its text, never of its template; ConfigError when the template
    alone does not fit.
    """
    number = {label: index for index, label in enumerate(labels)}
    encoded = Encoded()
    for text in texts:
        row = dict(_fit(text.text, tokenizer, max_length, prompting))
        if prompting.plain_too:
            plain = tokenizer(text.text, truncation=True, max_length=max_length)
            row |= {PLAIN + name: values for name, values in plain.items()}
        encoded.rows.append(row | {"labels": number[text.label]})
        encoded.gold.append(text.label)
    return encoded


def _fit(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int, prompting: Prompting) -> dict[str, Any]:
    if prompting.template is None:
        return dict(tokenizer(text, truncation=True, max_length=max_length))
    while True:
        encoded = dict(tokenizer(prompting.fill(text)))
        overflow = len(encoded["input_ids"]) - max_length
        if overflow <= 0:
            return encoded
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) <= overflow:
            raise ConfigError(
                f"max_length: the template {prompting.template.source!r} leaves no room for a text in {max_length} "
                f"sub-words; raise max_length or shorten the template"
            )
        text = text[: offsets[len(offsets) - overflow - 1][1]]


class PairCollator:
    """Pads the prompted and the plain inputs of a batch, each to its own longest row, and stacks the labels.

    Rows as `encode_texts` makes them -> {input_ids, attention_mask [B, S], ..., plain_input_ids [B, S'], labels [B]}.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad and stack."""
        prompted = [{name: values for name, values in row.items() if not name.startswith(PLAIN)} for row in rows]
        batch = dict(self._pad(prompted))
        if any(name.startswith(PLAIN) for name in rows[0]):
            plain = [{n.removeprefix(PLAIN): v for n, v in row.items() if n.startswith(PLAIN)} for row in rows]
            batch |= {PLAIN + name: values for name, values in self._pad(plain).items()}
        return batch
