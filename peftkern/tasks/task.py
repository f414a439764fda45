"""The two tasks: how each reads, encodes, models, scores and decodes. Everything else is the same for both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from transformers import (
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peftkern import registry
from peftkern.errors import ConfigError
from peftkern.tasks import backbone, data, metrics
from peftkern.tasks.encode import Encoded, PairCollator, Prompting, encode_sentences, encode_texts, word_tags
from peftkern.tasks.objective import FINETUNE_HEAD, PromptObjective
from peftkern.tasks.records import Sentence, Text
from peftkern.tasks.settings import TrainSettings
from peftkern.tasks.templates import Template, Verbalizer, check_words

Numbers = npt.NDArray[np.int64]


class Task(ABC):
    """One task under given settings; `labels` are those of the training set, or of a saved run."""

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.labels: list[str] = []
        self.objective: PromptObjective | None = None

    @abstractmethod
    def load(self, labels: Sequence[str] = (), **source: Any) -> data.Splits[Any]:
        """Read the data (other than the settings say, if `source` says so) and fix the labels."""

    @abstractmethod
    def prepare(self) -> None:
        """Read config and tokenizer, and raise ConfigError for whatever does not fit, before any weight is loaded."""

    @abstractmethod
    def encode(self, records: Sequence[Any]) -> Encoded:
        """Rows for the Trainer."""

    @abstractmethod
    def decode(self, predicted: Numbers, encoded: Encoded) -> list[Any]:
        """The tags of every word, or the class, of every record."""

    @abstractmethod
    def score(self, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, float]:
        """The task's metrics."""

    @abstractmethod
    def report(self, gold: Sequence[Any], predicted: Sequence[Any]) -> str:
        """The metrics per label, as a text table."""

    @property
    @abstractmethod
    def collator(self) -> Any:
        """Rows to a batch."""

    def build(self) -> tuple[PreTrainedModel, list[str]]:
        """(model with its head, paths of the modules that are new and must train)."""
        return backbone.build(self.settings.model, self.kind, self.tokenizer, self.labels)

    def scorer(self, encoded: Encoded) -> Callable[[EvalPrediction], dict[str, float]]:
        """A `compute_metrics` for the Trainer over one encoded set."""

        def compute(prediction: EvalPrediction) -> dict[str, float]:
            return self.score(encoded.gold, self.decode(np.asarray(prediction.predictions), encoded))

        return compute

    def _read_backbone(self, words: bool) -> Any:
        config = backbone.read_config(self.settings.model)
        self.tokenizer: PreTrainedTokenizerBase = backbone.read_tokenizer(self.settings.model, words)
        self.kind = self.settings.task
        limit = getattr(config, "max_position_embeddings", None)
        prompt = 0
        if self.settings.method != "none":
            method_config = registry.load(self.settings.method).Config.from_dict(self.settings.options)
            prompt = getattr(method_config, "num_virtual_tokens", 0)
        if limit and self.settings.max_length + prompt > limit:
            raise ConfigError(
                f"max_length: {self.settings.max_length} sub-words"
                f"{f' and {prompt} virtual tokens' if prompt else ''} do not fit the {limit} positions of the backbone"
            )
        return config


class TokenTask(Task):
    """Token classification: a tag for every word."""

    def load(self, labels: Sequence[str] = (), **source: Any) -> data.Splits[Sentence]:
        """CoNLL files, JSON lines or a `datasets` id."""
        splits = data.load_sentences(_changed(self.settings, source), labels)
        self.labels = splits.labels
        return splits

    def prepare(self) -> None:
        """Token classification takes any backbone with a fast tokenizer."""
        self._read_backbone(words=True)
        if not self.tokenizer.is_fast:
            encode_sentences([], self.tokenizer, self.labels, self.settings.max_length)

    def encode(self, records: Sequence[Sentence]) -> Encoded:
        """Labels on first sub-words."""
        return encode_sentences(records, self.tokenizer, self.labels, self.settings.max_length)

    def decode(self, predicted: Numbers, encoded: Encoded) -> list[list[str]]:
        """One tag per word."""
        return word_tags(predicted, encoded, self.labels)

    def score(self, gold: Sequence[list[str]], predicted: Sequence[list[str]]) -> dict[str, float]:
        """Entity metrics over all words."""
        return metrics.entity_metrics(gold, predicted)

    def report(self, gold: Sequence[list[str]], predicted: Sequence[list[str]]) -> str:
        """Per entity type."""
        return metrics.entity_report(gold, predicted)

    @property
    def collator(self) -> Any:
        """Pads labels with -100."""
        return DataCollatorForTokenClassification(self.tokenizer)


class TextTask(Task):
    """Text classification, prompted or not."""

    def load(self, labels: Sequence[str] = (), **source: Any) -> data.Splits[Text]:
        """CSV, TSV, JSON lines, snips or a `datasets` id."""
        splits = data.load_texts(_changed(self.settings, source), labels)
        self.labels = splits.labels
        return splits

    def prepare(self) -> None:
        """Template, verbalizer and backbone must fit each other."""
        config = self._read_backbone(words=False)
        settings, tokenizer = self.settings, self.tokenizer
        template = Template(settings.template) if settings.template else None
        verbalizer = None
        if settings.verbalizer and template is not None:
            check_words(settings.verbalizer, self.labels)
            self.kind = backbone.language_head(config, settings.model)
            if self.kind == backbone.MASKED and not template.has_mask:
                raise ConfigError(f"template: a masked-LM head needs {{mask}} in {settings.template!r}")
            if self.kind == backbone.CAUSAL and template.after_mask.strip():
                raise ConfigError(
                    f"template: a causal-LM head answers at the end: {settings.template!r} must end on {{mask}}"
                )
            space = template.before_mask[-1:].isspace() or self.kind == backbone.CAUSAL
            verbalizer = Verbalizer(settings.verbalizer, self.labels, tokenizer, space)
        causal = self.kind == backbone.CAUSAL
        mask = tokenizer.mask_token if template is not None and template.has_mask and not causal else None
        if template is not None and template.has_mask and not causal and mask is None:
            raise ConfigError(f"template: the tokenizer of {settings.model!r} has no mask token for {{mask}}")
        self.prompting = Prompting(template, str(mask or ""), causal, settings.lambda_ > 0)
        if template is not None:
            self.encode([Text("word " * settings.max_length, self.labels[0])])
        if template is not None or settings.lambda_:
            mask_id = tokenizer.mask_token_id if mask else None
            self.objective = PromptObjective(settings.lambda_, template, verbalizer, mask_id)

    def build(self) -> tuple[PreTrainedModel, list[str]]:
        """As in Task; a language model whose loss has an L_finetune gets a linear head for it."""
        model, new = super().build()
        if self.kind in (backbone.MASKED, backbone.CAUSAL):
            if new:
                raise ConfigError(f"verbalizer: {self.settings.model!r} has no weights for its head ({', '.join(new)})")
            if self.settings.lambda_:
                hidden = model.config.get_text_config().hidden_size
                model.add_module(FINETUNE_HEAD, nn.Linear(hidden, len(self.labels), dtype=model.dtype))
                new = [FINETUNE_HEAD]
        return model, new

    def encode(self, records: Sequence[Text]) -> Encoded:
        """In the prompt, and plain beside it where the loss needs both."""
        return encode_texts(records, self.tokenizer, self.labels, self.settings.max_length, self.prompting)

    def decode(self, predicted: Numbers, encoded: Encoded) -> list[str]:
        """The class of every text."""
        return [self.labels[number] for number in predicted]

    def score(self, gold: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
        """Accuracy, precision, recall, F1."""
        return metrics.class_metrics(gold, predicted)

    def report(self, gold: Sequence[str], predicted: Sequence[str]) -> str:
        """Per class."""
        return metrics.class_report(gold, predicted)

    @property
    def collator(self) -> Any:
        """Pads one or two inputs."""
        return PairCollator(self.tokenizer)


def task_for(settings: TrainSettings) -> Task:
    """The task that the settings name."""
    return TokenTask(settings) if settings.task == "token-classification" else TextTask(settings)


def _changed(settings: TrainSettings, source: dict[str, Any]) -> data.Source:
    return settings.with_changes(**source).source if source else settings.source
