"""Hard prompts: a template around the text, and a verbalizer that turns words at the mask into classes.

Sources: Schick and Schuetze 2021 (arXiv:2001.07676) for pattern and verbalizer; Liu et al. 2021 (arXiv:2107.13586).
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern.errors import ConfigError, near

FIELDS = ("text", "mask")


@dataclass(frozen=True)
class Template:
    """A prompt with `{text}` once and `{mask}` at most once, e.g. ``"{text} The intent is {mask}."``.

    `{{` and `}}` stand for braces. Raises ConfigError for a missing or repeated field, an unknown one, or braces that
    do not match.
    """

    source: str

    def __post_init__(self) -> None:
        fields = [name for _, name, _, _ in self._parts() if name is not None]
        for name in fields:
            if name not in FIELDS:
                raise ConfigError(f"template: unknown field {{{name}}} in {self.source!r}{near(name, FIELDS)}")
            if fields.count(name) > 1:
                raise ConfigError(f"template: {{{name}}} stands more than once in {self.source!r}")
        if "text" not in fields:
            raise ConfigError(f"template: {{text}} is missing in {self.source!r}: the sentence goes there")

    def _parts(self) -> list[tuple[str, str | None, str | None, str | None]]:
        try:
            parts = list(string.Formatter().parse(self.source))
        except ValueError as error:
            raise ConfigError(f"template: {error} in {self.source!r}; write {{{{ for a brace itself") from error
        for _, name, spec, conversion in parts:
            if name is not None and (spec or conversion):
                raise ConfigError(f"template: {{{name}}} takes no format or conversion, in {self.source!r}")
        return parts

    @property
    def has_mask(self) -> bool:
        """Whether `{mask}` stands in the template."""
        return any(name == "mask" for _, name, _, _ in self._parts())

    @property
    def before_mask(self) -> str:
        """What stands in front of `{mask}` (or the whole, without one), `{text}` left out."""
        text = ""
        for literal, name, _, _ in self._parts():
            text += literal
            if name == "mask":
                break
        return text

    @property
    def after_mask(self) -> str:
        """What follows `{mask}`; empty without one."""
        parts = self._parts()
        masks = [index for index, part in enumerate(parts) if part[1] == "mask"]
        if not masks:
            return ""
        return "".join(literal + (f"{{{name}}}" if name else "") for literal, name, _, _ in parts[masks[0] + 1 :])

    def fill(self, text: str, mask: str = "") -> str:
        """The prompt for `text`, with the tokenizer's mask token (or nothing) at `{mask}`."""
        return self.source.format(text=text, mask=mask)


class Verbalizer:
    """Class scores from the log-probabilities of words at one position.

    score(label) = mean over its words w of mean over the sub-tokens t of w of log p(t | position)

    so a word of one sub-token counts as itself, and a longer one by all its pieces, each at that one position.
    log p comes in as [B, V] f32, scores go out as [B, labels] f32. Raises ConfigError when a label has no word, a
    word has no token or is unknown to the tokenizer, a name is no label, or two labels have the same words.
    """

    def __init__(
        self, words: Mapping[str, Sequence[str]], labels: Sequence[str], tokenizer: Any, space_before: bool
    ) -> None:
        check_words(words, labels)
        pieces = {label: [self._tokens(word, tokenizer, space_before) for word in words[label]] for label in labels}
        for label in labels:
            twin = next((other for other in labels if other != label and pieces[other] == pieces[label]), None)
            if twin is not None:
                raise ConfigError(f"verbalizer: {label!r} and {twin!r} come down to the same tokens; use other words")
        width = max(sum(map(len, pieces[label])) for label in labels)
        self.ids = torch.zeros(len(labels), width, dtype=torch.long)
        self.weights = torch.zeros(len(labels), width)
        for row, label in enumerate(labels):
            flat = [(token, 1 / len(word) / len(pieces[label])) for word in pieces[label] for token in word]
            for column, (token, weight) in enumerate(flat):
                self.ids[row, column] = token
                self.weights[row, column] = weight

    @staticmethod
    def _tokens(word: str, tokenizer: Any, space_before: bool) -> list[int]:
        ids: list[int] = tokenizer.encode(" " + word if space_before else word, add_special_tokens=False)
        if not ids or tokenizer.unk_token_id in ids:
            raise ConfigError(f"verbalizer: the tokenizer does not know the word {word!r}; use another")
        return ids

    def scores(self, logits: Tensor) -> Tensor:
        """Class scores [B, labels], f32, from the logits [B, V] at the masked position."""
        log_p = torch.log_softmax(logits.float(), dim=-1)
        return (log_p[:, self.ids.to(logits.device)] * self.weights.to(logits.device)).sum(-1)


def check_words(words: Mapping[str, Sequence[str]], labels: Sequence[str]) -> None:
    """ConfigError unless every label, and nothing else, has a word that is not empty."""
    for name in words:
        if name not in labels:
            raise ConfigError(f"verbalizer: {name!r} is no label ({', '.join(labels)}){near(name, labels)}")
    without = [label for label in labels if not words.get(label) or not all(word.strip() for word in words[label])]
    if without:
        raise ConfigError(f"verbalizer: no word for {', '.join(map(repr, without))}; every label needs one")


def positions(template: Template, input_ids: Tensor, attention_mask: Tensor, mask_token_id: int | None) -> Tensor:
    """Where the answer is read: at the mask token, or, without one (causal heads), at the last real token.

    input_ids, attention_mask [B, S] int64 -> [B] int64.
    """
    if template.has_mask and mask_token_id is not None:
        return (input_ids == mask_token_id).int().argmax(-1)
    last = attention_mask * torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    return last.argmax(-1)
