"""CoNLL files: one word per line with its tag, an empty line between sentences; also CoNLL-U-like `iob2` files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from peftkern.errors import DataError
from peftkern.tasks.records import Sentence, is_bio
from peftkern.tasks.textfile import read_lines

SUFFIXES = (".conll", ".iob2", ".iob", ".bio", ".annotated", ".conllu", ".txt")

_INDEX = re.compile(r"\d+([-.]\d+)?")


@dataclass(frozen=True)
class _Row:
    line: int
    fields: list[str]


def read_conll(path: Path, encoding: str = "utf-8", token_column: int = -1, tag_column: int = -1) -> list[Sentence]:
    """The sentences of a CoNLL file.

    Columns are separated by TABs where the file has any, else by spaces. A line of white space ends a sentence; a line
    that starts with `#` and is no row of the table is a comment. Left at -1, `token_column` is 0, or 1 where column 0
    numbers the words, and `tag_column` is the last column that holds nothing but `O`, `B-TYPE` and `I-TYPE`
    (0-based otherwise). Words whose number is a range (`3-4`) or a fraction are skipped, as CoNLL-U has it.

    Raises DataError with file and line: an empty file, ragged lines, an empty word, a tag outside the scheme.
    """
    blocks = list(_blocks(path, read_lines(path, encoding)))
    if not blocks:
        raise DataError(f"{path}: no sentence in the file, only comments")
    width = len(blocks[0][0].fields)
    for row in (row for block in blocks for row in block):
        if len(row.fields) != width or not all(field.strip() for field in row.fields):
            raise DataError(
                f"{path}, line {row.line}: {_columns(row.fields)}, but line {blocks[0][0].line} has {width}: "
                f"every line needs a word and its tag in the same columns, empty lines go between sentences"
            )
    numbered = width > 2 and all(_INDEX.fullmatch(row.fields[0]) for block in blocks for row in block)
    word = token_column if token_column >= 0 else int(numbered)
    tag = tag_column if tag_column >= 0 else _tag_column(path, blocks, word, width)
    if max(word, tag) >= width or word == tag:
        raise DataError(f"{path}: token column {word} and tag column {tag} do not fit a table of {width} columns")
    sentences = []
    for block in blocks:
        rows = [row for row in block if not (numbered and not row.fields[0].isdigit())]
        for row in rows:
            if not is_bio(row.fields[tag]):
                raise DataError(f"{path}, line {row.line}: tag {row.fields[tag]!r} is not O, B-TYPE or I-TYPE")
        if rows and rows[0].fields[word] != "-DOCSTART-":
            words, tags = (tuple(row.fields[column] for row in rows) for column in (word, tag))
            sentences.append(Sentence(words, tags, str(path), tuple(row.line for row in rows)))
    return sentences


def holds_conll(path: Path, encoding: str = "utf-8") -> bool:
    """Whether a file is CoNLL: by its suffix, or, as `.txt` may hold running text too, by a tag on every line."""
    if path.suffix != ".txt":
        return path.suffix in (*SUFFIXES, ".tsv")
    try:
        return bool(read_conll(path, encoding))
    except DataError:
        return False


def read_conll_words(path: Path, encoding: str = "utf-8") -> list[tuple[str, ...]]:
    """Only the words of a CoNLL file, tagged or not: what there is to predict on. Errors as in `read_conll`."""
    blocks = list(_blocks(path, read_lines(path, encoding)))
    numbered = all(len(row.fields) > 1 and _INDEX.fullmatch(row.fields[0]) for block in blocks for row in block)
    for row in (row for block in blocks for row in block):
        if not row.fields[int(numbered)].strip():
            raise DataError(f"{path}, line {row.line}: the word is empty")
    return [tuple(row.fields[int(numbered)] for row in block) for block in blocks]


def write_conll(path: Path, sentences: Iterable[Sentence]) -> None:
    """Write `word TAB tag` lines with an empty line after every sentence, in UTF-8."""
    lines = ("".join(f"{w}\t{t}\n" for w, t in zip(s.words, s.tags, strict=True)) + "\n" for s in sentences)
    path.write_text("".join(lines), encoding="utf-8")


def _blocks(path: Path, lines: list[str]) -> Iterator[list[_Row]]:
    separator = "\t" if any("\t" in line for line in lines if line.strip() and not line.startswith("# ")) else None
    block: list[_Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            if block:
                yield block
            block = []
        elif not _is_comment(line, separator):
            # A stray space at the end of a TAB-separated line belongs to no tag.
            fields = [field.strip() for field in line.split("\t")] if separator else line.split()
            block.append(_Row(number, fields))
    if block:
        yield block


def _is_comment(line: str, separator: str | None) -> bool:
    """`# text = ...` is a comment; `#` as a word (`# TAB O`, or `# O` between spaces) is not."""
    if not line.startswith("#"):
        return False
    if separator:
        return line.startswith("# ") or "\t" not in line
    fields = line.split()
    return len(fields) < 2 or not is_bio(fields[-1])


def _tag_column(path: Path, blocks: list[list[_Row]], word: int, width: int) -> int:
    if width < word + 2:
        raise DataError(
            f"{path}, line {blocks[0][0].line}: {_columns(blocks[0][0].fields)}: a tag must follow the word"
        )
    rows = [row for block in blocks for row in block]
    valid = {column: sum(is_bio(row.fields[column]) for row in rows) for column in range(word + 1, width)}
    return max(valid, key=lambda column: (valid[column], column))


def _columns(fields: list[str]) -> str:
    filled = sum(bool(field.strip()) for field in fields)
    return f"{filled} column{'s' if filled != 1 else ''}"
