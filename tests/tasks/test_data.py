"""Finding the three sets, cutting and splitting them, and labels that training does not have."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkern.errors import ConfigError, DataError
from peftkern.tasks import hub
from peftkern.tasks.data import Source, load_sentences, load_texts, locate, stratified
from peftkern.tasks.records import Sentence, Text

CONLL = "Rick\tB-PER\nsaw\tO\n\nParis\tB-LOC\n\n"


def test_folder_with_usual_names(write, tmp_path):
    write("d/wnut17train.conll", CONLL)
    write("d/emerging.dev.conll", "Ann\tB-PER\n")
    write("d/emerging.test.annotated", "Rome\tB-LOC\n")
    write("d/SOURCE", "training notes")
    splits = load_sentences(Source(data=str(tmp_path / "d")))
    assert [len(s) for s in (splits.train, splits.dev, splits.test)] == [2, 1, 1]
    assert splits.labels == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_single_file_gives_a_seeded_development_set(write):
    path = write("all.conll", CONLL * 20)
    one, again, other = (load_sentences(Source(data=str(path), data_seed=seed)) for seed in (1, 1, 2))
    assert len(one.dev) == 4 and len(one.train) == 36 and one.test == []
    assert one == again and one.dev != other.dev
    with pytest.raises(DataError, match="the data has no test set"):
        one.named("test")


def test_files_named_by_settings(write, tmp_path):
    write("d/x.conll", CONLL)
    write("d/y.conll", CONLL)
    source = Source(data=str(tmp_path / "d"), train_file="x.conll", dev_file="y.conll")
    assert len(load_sentences(source).dev) == 2
    with pytest.raises(DataError, match=r"dev_file: .*z\.conll does not exist"):
        load_sentences(Source(data=str(tmp_path / "d"), train_file="x.conll", dev_file="z.conll"))


def test_folder_errors(write, tmp_path):
    write("none/notes.conll", CONLL)
    with pytest.raises(DataError, match=r"no training file .* among notes\.conll; set train_file"):
        load_sentences(Source(data=str(tmp_path / "none")))
    write("two/train.conll", CONLL)
    write("two/train.jsonl", "{}")
    with pytest.raises(DataError, match=r"several files could be the train set \(train.conll, train.jsonl\)"):
        load_sentences(Source(data=str(tmp_path / "two")))


def test_a_file_of_the_other_task_is_told_apart(write, tmp_path):
    table = write("table/train.csv", "text,label\na b,x\nc d,y\n")
    for data in (table.parent, table):
        with pytest.raises(DataError, match=r"\.csv files are for the task text-classification$"):
            load_sentences(Source(data=str(data)))
    words = write("words/train.txt", CONLL)
    for data in (words.parent, words):
        with pytest.raises(DataError, match=r"\.txt files are for the task token-classification$"):
            load_texts(Source(data=str(data)))


def test_unknown_tag_in_the_test_set_names_file_line_and_near_tag(write, tmp_path):
    write("d/train.conll", CONLL)
    path = write("d/test.conll", "x\tO\nBo\tB-PR\n")
    message = rf"{path}, line 2: 'Bo' has the unknown tag 'B-PR' in the test set.*did you mean 'B-PER'"
    with pytest.raises(DataError, match=message):
        load_sentences(Source(data=str(tmp_path / "d")))


def test_unknown_class_in_the_test_set(write, tmp_path):
    write("d/train.tsv", "a\tx x\nb\ty y\na\tz z\n")
    write("d/test.tsv", "c\tx\na\ty\nc\tz\n")
    message = r"test\.tsv, line 1: unknown label 'c' in the test set; the training set has a, b"
    with pytest.raises(DataError, match=message):
        load_texts(Source(data=str(tmp_path / "d")))


def test_labels_of_a_saved_run_decide(write):
    path = write("train.tsv", "a\tx x\nb\ty y\na\tz z\n")
    with pytest.raises(DataError, match="unknown label 'a' in the train set"):
        load_texts(Source(data=str(path)), labels=["b", "c"])


def test_one_class_or_one_record_is_too_little(write):
    with pytest.raises(DataError, match="only the label 'a'; two are needed"):
        load_texts(Source(data=str(write("train.tsv", "a\tx x\na\ty y\na\tz z\n"))))
    with pytest.raises(DataError, match="too few to split off"):
        load_sentences(Source(data=str(write("one.conll", "x\tO\n"))))


def test_snips_validation_files_are_the_test_set(write, tmp_path):
    for intent in ("A", "B"):
        for name, count in ((f"train_{intent}_full.json", 20), (f"validate_{intent}.json", 3)):
            write(f"s/{name}", json.dumps({intent: [{"data": [{"text": f"q{number}"}]} for number in range(count)]}))
    splits = load_texts(Source(data=str(tmp_path / "s"), limit=20))
    assert [len(s) for s in (splits.train, splits.dev, splits.test)] == [18, 2, 6]
    assert Counter(r.label for r in splits.train + splits.dev) == {"A": 10, "B": 10}


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=6), data=st.data())
def test_stratified_keeps_proportions(counts, data):
    records = [Text(str(i), str(label)) for label, count in enumerate(counts) for i in range(count)]
    wanted = data.draw(st.integers(0, len(records)))
    chosen, rest = stratified(records, wanted, 3, lambda record: record.label)
    assert len(chosen) == wanted and sorted([*chosen, *rest], key=str) == sorted(records, key=str)
    found = Counter(record.label for record in chosen)
    for label, count in enumerate(counts):
        assert abs(found[str(label)] - wanted * count / len(records)) < 1


def test_column_numbers_of_conll(write):
    with pytest.raises(ConfigError, match="text_column: columns of a CoNLL file are numbered"):
        load_sentences(Source(data=str(write("a.conll", CONLL)), text_column="word"))


def test_path_below_the_data_folder(write, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKERN_DATA", str(tmp_path))
    path = write("mine/train.conll", CONLL)
    assert locate("mine") == path.parent
    assert locate("$PEFTKERN_DATA/mine") == path.parent
    with pytest.raises(DataError, match=r"data: no/such/folder does not exist"):
        load_sentences(Source(data="no/such/folder"))


# --- datasets ids


def _dataset(monkeypatch, **splits):
    import datasets

    loaded = datasets.DatasetDict(splits)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)


def test_hub_tokens(monkeypatch):
    import datasets

    features = datasets.Features(
        tokens=datasets.Sequence(datasets.Value("string")),
        ner_tags=datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER"])),
    )
    table = datasets.Dataset.from_dict({"tokens": [["Ann", "ran"], []], "ner_tags": [[1, 0], []]}, features)
    _dataset(monkeypatch, train=table, validation=table)
    splits = load_sentences(Source(data="owner/name"))
    assert splits.train == [Sentence(("Ann", "ran"), ("B-PER", "O"), "owner/name train, row 0")] and splits.test == []


def test_hub_texts(monkeypatch):
    import datasets

    features = datasets.Features(sentence=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
    table = datasets.Dataset.from_dict({"sentence": ["x", "y"], "label": [1, 0]}, features)
    hidden = datasets.Dataset.from_dict({"sentence": ["x"], "label": [-1]}, features)
    _dataset(monkeypatch, train=table, validation=table)
    assert [r.label for r in load_texts(Source(data="name")).train] == ["good", "bad"]
    _dataset(monkeypatch, train=table, test=hidden)
    with pytest.raises(DataError, match="name test, row 0: the label is -1"):
        load_texts(Source(data="name"))
    _dataset(monkeypatch, train=table)
    with pytest.raises(DataError, match="no column lable among sentence, label; did you mean 'label'"):
        load_texts(Source(data="name", label_column="lable"))
    _dataset(monkeypatch, validation=table)
    with pytest.raises(DataError, match="has no train split among validation"):
        load_texts(Source(data="name"))


def test_hub_id_that_cannot_be_loaded():
    with pytest.raises(DataError, match=r"'no-such-set' is no file or folder.*`datasets` cannot load it"):
        load_texts(Source(data="no-such-set"))
    assert hub.looks_like_id("owner/name") and not hub.looks_like_id("./a/b") and not hub.looks_like_id("a/b/c")
