"""What every reader returns: labelled sentences (lists of words) and labelled texts, with the line they came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peftkern.errors import DataError, near


@dataclass(frozen=True)
class Sentence:
    """Words and one tag per word (`O`, `B-TYPE` or `I-TYPE`); `source` is "file, line N" of the first word."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    source: str = ""


@dataclass(frozen=True)
class Text:
    """A text and its class; `source` is "file, line N"."""

    text: str
    label: str
    source: str = ""


def is_bio(tag: str) -> bool:
    """Whether `tag` is `O`, `B-TYPE` or `I-TYPE` with a TYPE that is not empty."""
    return tag == "O" or (tag[:2] in ("B-", "I-") and len(tag) > 2)


def tag_set(sentences: Iterable[Sentence]) -> list[str]:
    """`O`, then `B-` and `I-` of every entity type that occurs, types sorted: a type never lacks its `I-` tag."""
    types = sorted({tag[2:] for sentence in sentences for tag in sentence.tags if tag != "O"})
    return ["O", *(f"{prefix}-{name}" for name in types for prefix in "BI")]


def label_set(texts: Iterable[Text]) -> list[str]:
    """The classes that occur, sorted."""
    return sorted({text.label for text in texts})


def check_labels(records: Sequence[Sentence] | Sequence[Text], labels: Sequence[str], split: str) -> None:
    """Raise DataError, naming file and line, for the first tag or class that is not among `labels`."""
    known = set(labels)
    for record in records:
        found = record.tags if isinstance(record, Sentence) else (record.label,)
        for word, label in enumerate(found):
            if label not in known:
                where = f" ({record.words[word]!r})" if isinstance(record, Sentence) else ""
                raise DataError(
                    f"{record.source or split}: unknown {'tag' if isinstance(record, Sentence) else 'label'} {label!r}"
                    f"{where} in the {split} set; the training set has {', '.join(labels)}{near(label, labels)}"
                )
