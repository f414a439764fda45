"""Text classification files: CSV and TSV with or without a header, JSON lines, and the intent files of snips."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from peftkern.errors import DataError, near
from peftkern.tasks.records import Sentence, Text, is_bio
from peftkern.tasks.textfile import read_lines, read_text

TEXT_NAMES = ("text", "sentence", "utterance", "content", "query", "document", "review", "question", "tweet")
LABEL_NAMES = ("label", "labels", "class", "category", "intent", "domain", "target", "sentiment", "topic")
WORD_NAMES = ("tokens", "words")
TAG_NAMES = ("tags", "ner_tags", "labels")


def read_table(path: Path, encoding: str = "utf-8", text_column: str = "", label_column: str = "") -> list[Text]:
    """The rows of a CSV (commas, quotes) or TSV (TABs, no quoting) file.

    The first row is a header when both named columns, or a usual name for text and one for label, are in it. Without
    a header the table needs two columns; the one with fewer distinct values is the label. `text_column` and
    `label_column` are header names, or 0-based numbers of a table without header.

    Raises DataError with file and line: ragged rows, an empty text or label, columns that cannot be told apart.
    """
    text = read_text(path, encoding)
    if path.suffix == ".tsv":
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    start = 1
    try:
        for row in reader:
            if any(field.strip() for field in row):
                rows.append((start, row))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    for line, row in rows:
        if len(row) != len(rows[0][1]):
            raise DataError(f"{path}, line {line}: {len(row)} columns, but line {rows[0][0]} has {len(rows[0][1])}")
    (text_at, label_at), header = _columns(path, rows, text_column, label_column)
    records = []
    for line, row in rows[int(header) :]:
        if not row[text_at].strip() or not row[label_at].strip():
            missing = "text" if not row[text_at].strip() else "label"
            raise DataError(f"{path}, line {line}: the {missing} is empty")
        records.append(Text(row[text_at].strip(), row[label_at].strip(), f"{path}, line {line}"))
    if not records:
        raise DataError(f"{path}: a header and no row")
    return records


def _columns(
    path: Path, rows: list[tuple[int, list[str]]], text_column: str, label_column: str
) -> tuple[tuple[int, int], bool]:
    first = [field.strip() for field in rows[0][1]]
    lowered = [field.lower() for field in first]
    found: list[int] = []
    for wanted, usual in ((text_column, TEXT_NAMES), (label_column, LABEL_NAMES)):
        names = [wanted.lower()] if wanted else usual
        found.append(next((lowered.index(name) for name in names if name in lowered), -1))
    if min(found) >= 0 and found[0] != found[1]:
        return (found[0], found[1]), True
    numbers = [int(name) if name.isdecimal() else -1 for name in (text_column, label_column)]
    for name, number in zip((text_column, label_column), numbers, strict=True):
        if name and not 0 <= number < len(first):
            raise DataError(f"{path}, line 1: no column {name!r} among {', '.join(first)}{near(name, first)}")
    if len(first) != 2 and min(numbers) < 0:
        raise DataError(
            f"{path}, line {rows[0][0]}: cannot tell text and label apart among {len(first)} columns "
            f"({', '.join(first)}); set text_column and label_column"
        )
    if max(numbers) >= 0:
        text = numbers[0] if numbers[0] >= 0 else 1 - numbers[1]
        label = numbers[1] if numbers[1] >= 0 else 1 - numbers[0]
        return (text, label), False
    distinct = [len({row[column] for _, row in rows}) for column in (0, 1)]
    label = 0 if distinct[0] < distinct[1] else 1
    return (1 - label, label), False


def read_jsonl_texts(path: Path, encoding: str = "utf-8", text_column: str = "", label_column: str = "") -> list[Text]:
    """JSON lines with a text and a label each; keys by the usual names or as given. DataError with file and line."""
    records = []
    for line, row in _objects(path, encoding):
        text = row[_key(path, line, row, text_column, TEXT_NAMES, "text_column")]
        label = row[_key(path, line, row, label_column, LABEL_NAMES, "label_column")]
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{path}, line {line}: the text must be a string that is not empty, got {text!r}")
        if isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
            raise DataError(f"{path}, line {line}: the label must be a string or a whole number, got {label!r}")
        records.append(Text(text.strip(), str(label), f"{path}, line {line}"))
    return records


def read_jsonl_sentences(
    path: Path, encoding: str = "utf-8", token_column: str = "", tag_column: str = ""
) -> list[Sentence]:
    """JSON lines with a list of words and a list of tags each. DataError with file and line."""
    records = []
    for line, row in _objects(path, encoding):
        words = row[_key(path, line, row, token_column, WORD_NAMES, "text_column")]
        tags = row[_key(path, line, row, tag_column, TAG_NAMES, "label_column")]
        for name, value in (("words", words), ("tags", tags)):
            if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
                raise DataError(f"{path}, line {line}: {name} must be a list of strings, none empty, got {value!r}")
        if len(words) != len(tags) or not words:
            raise DataError(f"{path}, line {line}: {len(words)} words and {len(tags)} tags")
        for tag in tags:
            if not is_bio(tag):
                raise DataError(f"{path}, line {line}: tag {tag!r} is not O, B-TYPE or I-TYPE")
        records.append(Sentence(tuple(words), tuple(tags), f"{path}, line {line}"))
    return records


def _objects(path: Path, encoding: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for line, content in enumerate(read_lines(path, encoding), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {line}: not JSON ({error.msg}, column {error.colno})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {line}: want a JSON object per line, got {type(row).__name__}")
        rows.append((line, row))
    return rows


def _key(path: Path, line: int, row: dict[str, Any], wanted: str, usual: tuple[str, ...], setting: str) -> str:
    names = (wanted,) if wanted else usual
    found = next((name for name in names if name in row), None)
    if found is None:
        raise DataError(
            f"{path}, line {line}: no field {' or '.join(map(repr, names))} among {', '.join(map(repr, row))}"
            f"{near(names[0], row)}; set {setting}"
        )
    return found


def read_snips(path: Path, encoding: str = "utf-8") -> list[Text]:
    """One intent file of snips: {INTENT: [{"data": [{"text": ...}, ...]}, ...]}; the chunks joined are the text."""
    content = read_text(path, encoding)
    try:
        intents = json.loads(content)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    records = []
    try:
        for intent, queries in intents.items():
            for number, query in enumerate(queries, 1):
                text = "".join(chunk["text"] for chunk in query["data"]).strip()
                if text:
                    records.append(Text(text, intent, f"{path}, query {number}"))
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not an intent file of snips ({{INTENT: [{{'data': [{{'text': ..}}]}}]}})") from error
    if not records:
        raise DataError(f"{path}: no query in the file")
    return records
