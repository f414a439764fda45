"""What every reader returns: labelled sentences (lists of words) and labelled texts, with the line they came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peftkern.errors import DataError, near


@dataclass(frozen=True)
class Sentence:
    """Words and one tag per word (`O`, `B-TYPE` or `I-TYPE`).

    `source` says where the sentence is from; in a file with a line per word `lines` has the number of each.
    """

    words: tuple[str, ...]
    tags: tuple[str, ...]
    source: str = ""
    lines: tuple[int, ...] = ()


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
                raise DataError(
                    f"{_place(record, word)} {label!r} in the {split} set; the training set has {', '.join(labels)}"
                    f"{near(label, labels)}"
                )


def _place(record: Sentence | Text, word: int) -> str:
    if isinstance(record, Text):
        return f"{record.source}: unknown label"
    line = f", line {record.lines[word]}" if record.lines else ""
    return f"{record.source}{line}: {record.words[word]!r} has the unknown tag"
