"""Templates, verbalizers and the place of the answer."""

from __future__ import annotations

import math

import pytest
import torch

from peftkern.errors import ConfigError
from peftkern.tasks.templates import Template, Verbalizer, positions


def test_fill():
    assert Template("给定一个句子，判断其类别：{text}").fill("好") == "给定一个句子，判断其类别：好"
    template = Template("{text} The intent is {mask}.")
    assert template.fill("play {it}", "[MASK]") == "play {it} The intent is [MASK]."
    assert template.has_mask and template.before_mask == " The intent is " and template.after_mask == "."
    assert Template("{mask}: {text}").after_mask == ": {text}"
    assert Template("{{ {text} }}").fill("x") == "{ x }" and not Template("{text}").has_mask


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no field", r"\{text\} is missing"),
        ("{mask}", r"\{text\} is missing"),
        ("{txt}", r"unknown field \{txt\}.*did you mean 'text'"),
        ("{text} {}", r"unknown field \{\}"),
        ("{text} {text}", r"\{text\} stands more than once"),
        ("{text} {mask} {mask}", r"\{mask\} stands more than once"),
        ("{text", "expected '}'"),
        ("{text!r}", "takes no format"),
        ("{text:>5}", "takes no format"),
    ],
)
def test_template_errors(source, message):
    with pytest.raises(ConfigError, match=message):
        Template(source)


def test_scores_by_hand(wordpiece):
    # "good" and "bad" are one token, "zoo" is z ##o ##o: a word is the mean of its pieces, a label that of its words.
    verbalizer = Verbalizer({"n": ["bad", "zoo"], "p": ["good"]}, ["p", "n"], wordpiece, space_before=False)
    logits = torch.randn(3, len(wordpiece), generator=torch.Generator().manual_seed(0))
    number = wordpiece.convert_tokens_to_ids
    log_p = logits.double().log_softmax(-1)
    zoo = (log_p[:, number("z")] + 2 * log_p[:, number("##o")]) / 3
    expected = torch.stack([log_p[:, number("good")], (log_p[:, number("bad")] + zoo) / 2], -1)
    torch.testing.assert_close(verbalizer.scores(logits).double(), expected, rtol=1e-5, atol=1e-6)
    uniform = verbalizer.scores(torch.zeros(1, len(wordpiece)))
    torch.testing.assert_close(uniform, torch.full((1, 2), -math.log(len(wordpiece))))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"p": ["good"]}, "no word for 'n'"),
        ({"p": ["good"], "n": []}, "no word for 'n'"),
        ({"p": ["good"], "n": [" "]}, "no word for 'n'"),
        ({"p": ["good"], "n": ["bad"], "N": ["x"]}, "'N' is no label"),
        ({"p": ["good"], "n": ["龘"]}, "the tokenizer does not know the word '龘'"),
        ({"p": ["good"], "n": ["Good"]}, "'p' and 'n' come down to the same tokens"),
    ],
)
def test_verbalizer_errors(wordpiece, words, message):
    with pytest.raises(ConfigError, match=message):
        Verbalizer(words, ["p", "n"], wordpiece, space_before=False)


def test_positions():
    template = Template("{text} {mask}")
    ids = torch.tensor([[2, 9, 4, 3, 0], [2, 4, 9, 9, 3]])
    assert positions(template, ids, (ids != 0).long(), 4).tolist() == [2, 1]
    assert positions(template, ids, (ids != 0).long(), None).tolist() == [3, 4]
    left = torch.tensor([[0, 0, 1, 1, 1]])
    assert positions(Template("{text}"), ids[:1], left, None).tolist() == [4]
