"""Data named by a `datasets` id instead of a path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

from peftkern.errors import DataError, near
from peftkern.tasks.records import Sentence, Text, is_bio
from peftkern.tasks.tables import LABEL_NAMES, TAG_NAMES, TEXT_NAMES, WORD_NAMES

Record = TypeVar("Record", Sentence, Text)

_SPLIT_NAMES = {"train": ("train",), "dev": ("validation", "valid", "val", "dev"), "test": ("test",)}


def looks_like_id(name: str) -> bool:
    """Whether `name` could be a dataset id: `name` or `owner/name`, and no path."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) is not None


def read_hub(
    name: str, config: str, kind: type[Record], text_column: str = "", label_column: str = ""
) -> dict[str, list[Record]]:
    """The train, dev and test sets of a dataset of the hub (or of its local cache).

    Columns are found by their usual names unless given; class numbers become their names. Raises DataError when the
    dataset cannot be loaded, has no train split, or lacks the columns.
    """
    import datasets  # takes seconds, and local files do not need it

    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # offline, missing, gated, broken script: the library has a class for each
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"data: {name!r} is no file or folder, as it stands or below $PEFTKERN_DATA, and `datasets` cannot load it "
            f"({reason}); check the path, or the id and the network"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        raise DataError(f"data: {name!r} has no splits that can be read")
    if "train" not in loaded:
        raise DataError(f"data: {name!r} has no train split among {', '.join(loaded)}")
    read: Any = _sentences if issubclass(kind, Sentence) else _texts
    sets: dict[str, list[Record]] = {}
    for split, names in _SPLIT_NAMES.items():
        found = next((candidate for candidate in names if candidate in loaded), None)
        sets[split] = read(name, split, loaded[found], text_column, label_column) if found else []
    return sets


def _sentences(name: str, split: str, table: Any, text_column: str, label_column: str) -> list[Sentence]:
    words = table[_column(name, table, text_column, WORD_NAMES, "text_column")]
    label = _column(name, table, label_column, TAG_NAMES, "label_column")
    classes = getattr(getattr(table.features[label], "feature", None), "names", None)
    records = []
    for row, (value, target) in enumerate(zip(words, table[label], strict=True)):
        source = f"{name} {split}, row {row}"
        tags = tuple(classes[tag] if classes else str(tag) for tag in target)
        if len(tags) != len(value) or not all(is_bio(tag) for tag in tags):
            raise DataError(f"{source}: want one tag (O, B-TYPE or I-TYPE) for each of {len(value)} words")
        if value:
            records.append(Sentence(tuple(value), tags, source))
    return records


def _texts(name: str, split: str, table: Any, text_column: str, label_column: str) -> list[Text]:
    texts = table[_column(name, table, text_column, TEXT_NAMES, "text_column")]
    label = _column(name, table, label_column, LABEL_NAMES, "label_column")
    classes = getattr(table.features[label], "names", None)
    records = []
    for row, (value, target) in enumerate(zip(texts, table[label], strict=True)):
        if target == -1:
            raise DataError(f"{name} {split}, row {row}: the label is -1, as in a set whose labels are held back")
        records.append(Text(value, classes[target] if classes else str(target), f"{name} {split}, row {row}"))
    return records


def _column(name: str, table: Any, wanted: str, usual: Sequence[str], setting: str) -> str:
    names = [wanted] if wanted else list(usual)
    columns: list[str] = table.column_names
    found = next((column for column in names if column in columns), None)
    if found is None:
        raise DataError(
            f"data: {name!r} has no column {' or '.join(names)} among {', '.join(columns)}{near(names[0], columns)}; "
            f"set {setting}"
        )
    return found
