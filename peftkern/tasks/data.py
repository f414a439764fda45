"""From a folder, a file or a `datasets` id to training, development and test records with their label set."""

from __future__ import annotations

import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from peftkern.errors import ConfigError, DataError
from peftkern.tasks import conll, tables
from peftkern.tasks.hub import looks_like_id, read_hub
from peftkern.tasks.records import Sentence, Text, check_labels, label_set, tag_set

Record = TypeVar("Record", Sentence, Text)

SPLITS = ("train", "dev", "test")

_NAMES = {
    "train": r"train(ing)?",
    "dev": r"dev|development|val|valid|validate|validation",
    "test": r"test(ing)?|eval|evaluation",
}
_SENTENCE_SUFFIXES = (*conll.SUFFIXES, ".tsv", ".jsonl", ".json")
_TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the data is and how to read it; the fields are those of `TrainSettings` with the same names."""

    data: str
    data_config: str = ""
    train_file: str = ""
    dev_file: str = ""
    test_file: str = ""
    encoding: str = "utf-8"
    text_column: str = ""
    label_column: str = ""
    dev_share: float = 0.1
    limit: int = 0
    data_seed: int = 42


@dataclass(frozen=True)
class Splits(Generic[Record]):
    """The three sets and the labels of the training set; `test` is empty where there is none."""

    train: list[Record]
    dev: list[Record]
    test: list[Record]
    labels: list[str]

    def named(self, split: str) -> list[Record]:
        """The set called `split`; DataError when it is empty."""
        records = {"train": self.train, "dev": self.dev, "test": self.test}.get(split)
        if records is None:
            raise DataError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
        if not records:
            raise DataError(f"the data has no {split} set")
        return records


def locate(data: str) -> Path | None:
    """The file or folder that `data` means: as it stands, or below $PEFTKERN_DATA (default ../shared/data)."""
    path = Path(os.path.expandvars(data)).expanduser()
    below = Path(os.environ.get("PEFTKERN_DATA", "../shared/data")) / path
    return next((candidate for candidate in (path, below) if candidate.exists()), None)


def load_sentences(source: Source, labels: Sequence[str] = ()) -> Splits[Sentence]:
    """Token classification data; `labels` (of a saved run) replaces the tag set found in the training set.

    Raises DataError naming file and line for whatever is malformed, and for tags that training does not have.
    """

    def read(path: Path) -> list[Sentence]:
        if path.suffix in (".jsonl", ".json"):
            return tables.read_jsonl_sentences(path, source.encoding, source.text_column, source.label_column)
        columns = (_number(source.text_column, "text_column"), _number(source.label_column, "label_column"))
        return conll.read_conll(path, source.encoding, *columns)

    sets = _read_sets(source, _SENTENCE_SUFFIXES, read, Sentence, bool(labels))
    return _finish(source, sets, list(labels), tag_set, key=lambda sentence: any(tag != "O" for tag in sentence.tags))


def load_texts(source: Source, labels: Sequence[str] = ()) -> Splits[Text]:
    """Text classification data; `labels` as in `load_sentences`. Raises DataError naming file and line."""

    def read(path: Path) -> list[Text]:
        if path.suffix == ".json":
            return tables.read_snips(path, source.encoding)
        reader = tables.read_jsonl_texts if path.suffix == ".jsonl" else tables.read_table
        return reader(path, source.encoding, source.text_column, source.label_column)

    splits = _finish(
        source,
        _read_sets(source, _TEXT_SUFFIXES, read, Text, bool(labels)),
        list(labels),
        label_set,
        key=lambda text: text.label,
    )
    if len(splits.labels) < 2:
        raise DataError(f"{source.data}: the training set has only the label {splits.labels[0]!r}; two are needed")
    return splits


def stratified(
    records: Sequence[Record], count: int, seed: int, key: Callable[[Record], Hashable]
) -> tuple[list[Record], list[Record]]:
    """(`count` records, the others), both in their old order: seeded, with every class in proportion.

    Shares are rounded by largest remainder, so the classes of the sample differ from proportion by less than one.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        groups[key(record)].append(index)
    generator = random.Random(seed)
    exact = {name: count * len(members) / len(records) for name, members in groups.items()}
    take = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(groups, key=lambda name: take[name] - exact[name])
    for name in by_remainder[: count - sum(take.values())]:
        take[name] += 1
    chosen: set[int] = set()
    for name, members in groups.items():
        chosen.update(generator.sample(members, take[name]))
    return (
        [record for index, record in enumerate(records) if index in chosen],
        [record for index, record in enumerate(records) if index not in chosen],
    )


def _number(column: str, setting: str) -> int:
    if column and not column.isdecimal():
        raise ConfigError(f"{setting}: columns of a CoNLL file are numbered from 0, got {column!r}")
    return int(column) if column else -1


def _read_sets(
    source: Source, suffixes: tuple[str, ...], read: Callable[[Path], list[Record]], kind: type[Record], labelled: bool
) -> dict[str, list[Record]]:
    path = locate(source.data)
    if path is None:
        if looks_like_id(source.data):
            return read_hub(source.data, source.data_config, kind, source.text_column, source.label_column)
        raise DataError(f"data: {source.data} does not exist, as it stands or below $PEFTKERN_DATA")
    files = _files(path, source, suffixes, labelled)

    def read_one(file: Path) -> list[Record]:
        try:
            return read(file)
        except DataError as error:
            if hint := _other_task(file, suffixes):
                raise DataError(f"{error}{hint}") from error
            raise

    return {split: [record for file in files[split] for record in read_one(file)] for split in SPLITS}


def _files(path: Path, source: Source, suffixes: tuple[str, ...], labelled: bool) -> dict[str, list[Path]]:
    """The files of each split: named by the settings, a single file, or found in the folder by their names.

    Only where the labels are known already (`labelled`) there need be no training file.
    """
    given = {"train": source.train_file, "dev": source.dev_file, "test": source.test_file}
    folder = path if path.is_dir() else path.parent
    for split, name in given.items():
        if name and not (folder / name).is_file():
            raise DataError(f"{split}_file: {folder / name} does not exist")
    found: dict[str, list[Path]] = {split: [folder / name] if name else [] for split, name in given.items()}
    if path.is_file():
        found["train"] = found["train"] or ([path] if path.name not in given.values() else [])
        return found
    for file in sorted(path.iterdir()):
        role = _split_of(file)
        if role and file.suffix in suffixes and not given[role]:
            found[role].append(file)
    # The intent files of snips come one per class, and its "validate" files are what everybody tests on.
    snips = all(file.suffix == ".json" for files in found.values() for file in files)
    if snips and not found["test"] and not given["dev"]:
        found["dev"], found["test"] = [], found["dev"]
    for split, files in found.items():
        if len(files) > 1 and not snips:
            names = ", ".join(file.name for file in files)
            raise DataError(f"{path}: several files could be the {split} set ({names}); set {split}_file")
    if not any(found.values()) or not (found["train"] or labelled):
        named = [file for file in sorted(path.iterdir()) if _split_of(file) == "train"]
        hint = next((hint for file in named if (hint := _other_task(file, suffixes))), "")
        raise DataError(
            f"{path}: no training file (a name with 'train' ending in {', '.join(suffixes)}) among "
            f"{', '.join(file.name for file in sorted(path.iterdir())) or 'no files'}; set train_file{hint}"
        )
    return found


def _other_task(file: Path, suffixes: tuple[str, ...]) -> str:
    """A hint for a file of a kind that only the task other than that of `suffixes` reads, else nothing."""
    if file.suffix in suffixes or file.suffix not in (*_SENTENCE_SUFFIXES, *_TEXT_SUFFIXES):
        return ""
    other = "text-classification" if suffixes is _SENTENCE_SUFFIXES else "token-classification"
    return f"; {file.suffix} files are for the task {other}"


def _split_of(file: Path) -> str | None:
    for split, names in _NAMES.items():
        if re.search(rf"(?<![a-z])({names})(set)?(?![a-z])", file.name.lower()):
            return split
    return None


def _finish(
    source: Source,
    sets: dict[str, list[Record]],
    labels: list[str],
    collect: Callable[[list[Record]], list[str]],
    key: Callable[[Record], Hashable],
) -> Splits[Record]:
    labels = labels or collect(sets["train"])
    for split in SPLITS:
        check_labels(sets[split], labels, split)
    train, dev = sets["train"], sets["dev"]
    if source.limit and source.limit < len(train):
        train, _ = stratified(train, source.limit, source.data_seed, key)
    if not dev and (train or not sets["test"]):
        if len(train) < 2:
            raise DataError(f"{source.data}: {len(train)} training record, too few to split off a development set")
        dev, train = stratified(train, max(1, round(source.dev_share * len(train))), source.data_seed, key)
    return Splits(train, dev, sets["test"], labels)
