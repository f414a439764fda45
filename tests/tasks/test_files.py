"""Readers: what each format may look like, and the error, with file and line, for what it may not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkern.errors import ConfigError, DataError
from peftkern.tasks.conll import read_conll, read_conll_words, write_conll
from peftkern.tasks.records import Sentence
from peftkern.tasks.tables import read_jsonl_sentences, read_jsonl_texts, read_snips, read_table
from peftkern.tasks.textfile import decode, read_lines

# --- CoNLL


def test_conll_with_tabs_blank_lines_of_white_space_comments_and_hash_words(write):
    path = write("a.conll", "# sent_id = 1\nRick\tB-PER\nand\tI-PER\n\t\n#\tO\nzz\tO\n\n\n# text = x\tO\nend\tO")
    assert [(s.words, s.tags) for s in read_conll(path)] == [
        (("Rick", "and"), ("B-PER", "I-PER")),
        (("#", "zz"), ("O", "O")),
        (("end",), ("O",)),
    ]
    assert read_conll(path)[1].source == str(path) and read_conll(path)[1].lines == (5, 6)


def test_conll_2003_columns_and_docstart(write):
    path = write("eng.train.txt", "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n# . O O\n")
    (sentence,) = read_conll(path)
    assert sentence.words == ("EU", "rejects", "#") and sentence.tags == ("B-ORG", "O", "O")


def test_conllu_like_iob2_with_ranges(write):
    rows = ["# text = dont go", "1-2\tdont\tO\t-\t-", "1\tdo\tO\t-\t-", "2\tnt\tO\t-\t-", "3\tParis\tB-LOC\t-\t-"]
    path = write("a.iob2", "\n".join(rows))
    (sentence,) = read_conll(path)
    assert sentence.words == ("do", "nt", "Paris") and sentence.tags == ("O", "O", "B-LOC")


def test_conll_columns_given(write):
    path = write("a.conll", "x Paris B-NP B-LOC\n")
    assert read_conll(path, token_column=1, tag_column=2)[0].tags == ("B-NP",)
    with pytest.raises(DataError, match="token column 1 and tag column 9 do not fit a table of 4"):
        read_conll(path, token_column=1, tag_column=9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tO\nb\tO\tx\n", "line 2: 3 columns, but line 1 has 2"),
        ("a\tO\n\nb\n", "line 3: 1 column, but line 1 has 2"),
        ("a\tO\n\tO\n", "line 2: 1 column, but line 1 has 2"),
        ("a\tO\nb\tB_PER\n", "line 2: tag 'B_PER' is not O, B-TYPE or I-TYPE"),
        ("a\tO\nb\tB-\n", "line 2: tag 'B-' is not O"),
        ("a\nb\n", "line 1: 1 column: a tag must follow the word"),
        ("", "the file is empty"),
        (" \n\n\t\n", "the file is empty"),
        ("# only a comment\n", "no sentence in the file"),
    ],
    ids=["ragged", "short", "no word", "no tag name", "no type", "no tags", "empty", "blank", "comment"],
)
def test_conll_errors_name_file_and_line(write, content, message):
    path = write("bad.conll", content)
    with pytest.raises(DataError, match="bad.conll.*" + message):
        read_conll(path)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"no\.conll: cannot be read"):
        read_conll(tmp_path / "no.conll")


def test_words_alone(write):
    assert read_conll_words(write("a.conll", "to\nParis\n\nnow\n")) == [("to", "Paris"), ("now",)]
    assert read_conll_words(write("b.conll", "1\tto\tO\n2\tParis\tB-LOC\n")) == [("to", "Paris")]


_word = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1, max_size=6).filter(
    lambda word: word.strip() == word and word != "-DOCSTART-" and "\t" not in word
)
_tagged = st.lists(st.tuples(_word, st.sampled_from(["O", "B-PER", "I-PER", "B-LOC"])), min_size=1, max_size=6)


@given(sentences=st.lists(_tagged, min_size=1, max_size=5))
def test_conll_round_trip(tmp_path_factory, sentences):
    records = [Sentence(tuple(w for w, _ in s), tuple(t for _, t in s)) for s in sentences]
    path = tmp_path_factory.mktemp("round") / "x.conll"
    write_conll(path, records)
    assert [(s.words, s.tags) for s in read_conll(path)] == [(s.words, s.tags) for s in records]


# --- encodings


def test_wrong_encoding_names_line_byte_and_fix(write):
    path = write("gb.conll", "a\tO\n中文\tO\n".encode("gb18030"))
    with pytest.raises(DataError, match=r"gb\.conll, line 2: byte 0xd6 is not valid utf-8; .*set encoding=gb18030"):
        read_conll(path)
    assert read_conll(path, "gb18030")[0].words == ("a", "中文")
    path = write("latin.conll", "München\tO\na\tO\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"line 1: byte 0xfc .*cp1252.*: set .*whichever reads") as caught:
        read_conll(path)
    assert "utf-16" not in str(caught.value)


def test_surrogates_in_utf8_are_cesu8(write):
    raw = b'{"PlayMusic": [{"data": [{"text": "play \xed\xa0\xbc\xed\xbd\x95"}]}]}'
    path = write("train_PlayMusic_full.json", raw)
    with pytest.raises(DataError, match="line 1: byte 0xed is not valid utf-8; it does decode as cesu-8"):
        read_snips(path)
    assert read_snips(path, "cesu-8")[0].text == "play 🍕"
    with pytest.raises(UnicodeDecodeError):
        decode(b"\xed\xa0\xbc", "cesu-8")


def test_byte_order_mark_and_line_ends(write):
    assert read_lines(write("a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\x0b3\n")) == ["one", "two", "three\x0b3"]


def test_unknown_encoding(write):
    with pytest.raises(ConfigError, match="encoding: 'uft-8' is not a known text encoding; did you mean 'utf-8'"):
        read_lines(write("a.txt", "x"), "uft-8")


# --- tables


def test_tsv_without_header_either_order(write):
    first = write("a.tsv", '餐馆\t这家 "店 怎么样\n景点\t那个景点呢\n餐馆\t还有别的吗\n')
    assert (read_table(first)[0].label, read_table(first)[0].text) == ("餐馆", '这家 "店 怎么样')
    second = write("b.tsv", "one text\tx\nanother\ty\na third\tx\n")
    assert [r.label for r in read_table(second)] == ["x", "y", "x"]


def test_csv_with_header_quotes_and_line_numbers(write):
    path = write("a.csv", 'id,Text,Intent\n1,"one, two\nlines",a\n\n2,three,b\n')
    records = read_table(path)
    assert [(r.text, r.label) for r in records] == [("one, two\nlines", "a"), ("three", "b")]
    assert records[1].source == f"{path}, line 5"


def test_csv_columns_by_name_and_number(write):
    path = write("a.csv", "u,v,w\nx,y,z\n")
    assert read_table(path, text_column="w", label_column="u")[0].text == "z"
    assert [r.label for r in read_table(path, text_column="0", label_column="2")] == ["w", "z"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nx,y\nz\n", "line 3: 1 columns, but line 1 has 2"),
        ("a.tsv", "x\ty\n\tz\n", "line 2: the (text|label) is empty"),
        ("a.csv", "a,b,c\nd,e,f\n", "cannot tell text and label apart among 3 columns"),
        ("a.csv", "text,label\n", "a header and no row"),
        ("a.csv", 'text,label\n"x,y\n', "line 2: .*"),
        ("a.csv", "", "the file is empty"),
    ],
)
def test_table_errors(write, name, content, message):
    with pytest.raises(DataError, match=message):
        read_table(write(name, content))


def test_unknown_column_names_its_neighbours(write):
    with pytest.raises(DataError, match="no column 'labl' among text, label; did you mean 'label'"):
        read_table(write("a.csv", "text,label\nx,y\n"), label_column="labl")


# --- JSON


def test_jsonl(write):
    texts = write("a.jsonl", '{"text": "x", "label": 1}\n\n{"text": "y", "label": "b"}\n')
    assert [(r.text, r.label) for r in read_jsonl_texts(texts)] == [("x", "1"), ("y", "b")]
    words = write("b.jsonl", '{"tokens": ["a", "b"], "tags": ["O", "B-X"]}\n')
    assert read_jsonl_sentences(words)[0].tags == ("O", "B-X")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', "line 2: not JSON"),
        ("[1]", "line 2: want a JSON object"),
        ('{"text": "x", "labels_": "y"}', r"line 2: no field 'label'.*did you mean 'labels_'"),
        ('{"text": 3, "label": "y"}', "line 2: the text must be a string"),
        ('{"text": "x", "label": null}', "line 2: the label must be"),
    ],
)
def test_jsonl_errors(write, line, message):
    path = write("a.jsonl", '{"text": "x", "label": "y"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_jsonl_texts(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "1 words and 2 tags"),
        ({"tokens": [], "tags": []}, "0 words and 0 tags"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "words must be a list of strings, none empty"),
        ({"tokens": ["a"], "tags": ["PER"]}, "tag 'PER' is not O"),
    ],
)
def test_jsonl_sentence_errors(write, row, message):
    with pytest.raises(DataError, match="line 1: " + message):
        read_jsonl_sentences(write("a.jsonl", json.dumps(row)))


@pytest.mark.parametrize("content", ['{"A": [{"x": 1}]}', '["A"]', '{"A": 3}', '{"A": []}', "{"])
def test_snips_errors(write, content):
    with pytest.raises(DataError, match=r"a\.json"):
        read_snips(write("a.json", content))
