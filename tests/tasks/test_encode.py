"""Labels on first sub-words, truncated words as O, prompts whose template survives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkern.errors import ConfigError
from peftkern.tasks.encode import IGNORE, PairCollator, Prompting, encode_sentences, encode_texts, word_tags
from peftkern.tasks.records import Sentence, Text
from peftkern.tasks.templates import Template

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]

# White space, control characters and what BERT's normaliser drops: words without any sub-word.
_odd = st.sampled_from(["\u200b", "\ufeff", "\x00", "\u00ad", "\u0301", "好坏", "don't", "e\u0301", "😂", "x" * 50])
_words = st.one_of(st.text("abcdefghij", min_size=1, max_size=7), _odd)
_sentences = st.lists(
    st.lists(st.tuples(_words, st.sampled_from(LABELS)), min_size=1, max_size=12), min_size=1, max_size=4
)


@given(drawn=_sentences, max_length=st.integers(4, 30))
def test_labels_stand_on_the_first_sub_word_and_come_back(wordpiece, drawn, max_length):
    sentences = [Sentence(tuple(w for w, _ in s), tuple(t for _, t in s)) for s in drawn]
    encoded = encode_sentences(sentences, wordpiece, LABELS, max_length)
    for sentence, row, words, gold in zip(sentences, encoded.rows, encoded.words, encoded.gold, strict=True):
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"]) <= max_length
        assert row["labels"][0] == IGNORE and row["labels"][-1] == IGNORE  # [CLS], [SEP]
        assert sorted(set(words)) == words and gold == list(sentence.tags)
        # The labels, in order, are those of exactly the words that have a sub-word within the length.
        assert [label for label in row["labels"] if label != IGNORE] == [LABELS.index(gold[word]) for word in words]
        room = max_length - 2
        expected = []
        for index, word in enumerate(sentence.words):
            pieces = len(wordpiece.encode(word, add_special_tokens=False))
            if pieces and room > 0:
                expected.append(index)
            room -= pieces
        assert words == expected
    width = max(len(row["labels"]) for row in encoded.rows)
    perfect = np.zeros((len(sentences), width), dtype=np.int64)
    for number, row in enumerate(encoded.rows):
        perfect[number, : len(row["labels"])] = [max(label, 0) for label in row["labels"]]
    for tags, words, gold in zip(word_tags(perfect, encoded, LABELS), encoded.words, encoded.gold, strict=True):
        assert tags == [tag if index in words else "O" for index, tag in enumerate(gold)]


def test_truncated_words_are_o(wordpiece):
    encoded = encode_sentences([Sentence(("good",) * 10, ("B-PER",) * 10)], wordpiece, LABELS, 6)
    assert word_tags(np.ones((1, 6), dtype=np.int64), encoded, LABELS) == [["B-PER"] * 4 + ["O"] * 6]


def test_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="Slow cannot say which word"):
        encode_sentences([], Slow(), LABELS, 8)


@given(text=st.text("abc good", min_size=0, max_size=80), max_length=st.integers(14, 40))
def test_a_long_text_is_cut_and_its_template_is_not(wordpiece, text, max_length):
    prompting = Prompting(Template("{text} the intent is {mask} ."), wordpiece.mask_token)
    row = encode_texts([Text(text, "a")], wordpiece, ["a", "b"], max_length, prompting).rows[0]
    tail = wordpiece.encode("the intent is [MASK] .", add_special_tokens=False)
    assert len(row["input_ids"]) <= max_length
    assert row["input_ids"][-len(tail) - 1 : -1] == tail
    assert row["input_ids"].count(wordpiece.mask_token_id) == 1


def test_mask_token_inside_the_text_is_not_the_answer(wordpiece):
    prompting = Prompting(Template("{text} is {mask}"), wordpiece.mask_token)
    row = encode_texts([Text("a [MASK] b", "a")], wordpiece, ["a"], 30, prompting).rows[0]
    assert row["input_ids"].count(wordpiece.mask_token_id) == 1


def test_template_longer_than_the_limit(wordpiece):
    with pytest.raises(ConfigError, match="leaves no room for a text in 8 sub-words"):
        encode_texts([Text("good", "a")], wordpiece, ["a"], 8, Prompting(Template("the film is so so good {text}")))


def test_two_inputs_in_one_batch(wordpiece):
    prompting = Prompting(Template("the film : {text}"), plain_too=True)
    encoded = encode_texts([Text("good", "a"), Text("so so bad", "b")], wordpiece, ["a", "b"], 30, prompting)
    batch = PairCollator(wordpiece)(encoded.rows)
    plain = wordpiece(["good", "so so bad"], padding=True, return_tensors="pt")
    prompted = wordpiece(["the film : good", "the film : so so bad"], padding=True, return_tensors="pt")
    assert batch["plain_input_ids"].equal(plain["input_ids"])
    assert batch["plain_attention_mask"].equal(plain["attention_mask"])
    assert batch["input_ids"].equal(prompted["input_ids"])
    assert batch["labels"].tolist() == [0, 1]
