"""Train, evaluate and predict: from settings to a folder with adapter, labels, tokenizer, settings and results."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import set_seed

import peftkern as pk
from peftkern import registry
from peftkern.errors import ConfigError, DataError
from peftkern.tasks import conll
from peftkern.tasks.curves import plot_curves
from peftkern.tasks.data import SPLITS, locate
from peftkern.tasks.encode import Encoded
from peftkern.tasks.memory import PeakMemory
from peftkern.tasks.records import Sentence, Text
from peftkern.tasks.settings import FILE, METRICS, TrainSettings
from peftkern.tasks.task import Task, task_for
from peftkern.tasks.textfile import read_lines
from peftkern.tasks.trainer import CHECKPOINTS, AdapterTrainer, StepClock, last_checkpoint, make_trainer, tracked

RESULT, LABELS, HISTORY, CURVES = "result.json", "labels.json", "history.json", "curves.png"
_HEAD_TASK = {"token-classification": "TOKEN_CLS", "text-classification": "SEQ_CLS"}
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:[-'’][^\W{_CJK}]+)*|\S")
_MAY_CHANGE = {"resume", "progress", "report_to", "overwrite"}


@dataclass(frozen=True)
class RunResult:
    """What a finished run measured; saved as result.json.

    dev, test: metrics, test empty where there is no test set. trainable, total: parameters. seconds_per_epoch: in
    training steps only. peak_bytes: what `peak_kind` counts, over training and its evaluations.
    """

    folder: str
    task: str
    method: str
    options: dict[str, Any]
    model: str
    data: str
    seed: int
    dev: dict[str, float]
    test: dict[str, float]
    trainable: int
    total: int
    epochs: float
    steps: int
    seconds_per_epoch: float
    peak_bytes: int
    peak_kind: str
    device: str
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters."""
        return self.trainable / self.total

    @classmethod
    def load(cls, folder: Path | str) -> RunResult:
        """The result of a finished run; ConfigError when there is none."""
        path = Path(folder) / RESULT
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")) | {"folder": str(folder)})
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{folder} holds no finished run: {RESULT} is missing or not readable ({error})"
            ) from error


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a saved run on one set, and the same per label as a text table."""

    metrics: dict[str, float]
    table: str


@dataclass(frozen=True)
class Prediction:
    """One text with what was predicted: a class, or a tag for each word."""

    text: str
    label: str = ""
    words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def entities(self) -> list[tuple[str, str]]:
        """(type, words) of every entity, from the tags."""
        found: list[tuple[str, list[str]]] = []
        previous = "O"
        for word, tag in zip(self.words, self.tags, strict=True):
            if tag == "O":
                pass
            elif tag.startswith("I-") and previous != "O" and previous[2:] == tag[2:]:
                found[-1][1].append(word)
            else:
                found.append((tag[2:], [word]))
            previous = tag
        return [(kind, " ".join(words)) for kind, words in found]


def train(settings: TrainSettings) -> RunResult:
    """One run. Data, settings and backbone are checked against each other before any weight is loaded.

    Raises ConfigError, DataError, RegistryError or TargetError before anything is written.
    """
    settings.check_method()
    folder = Path(settings.output)
    finished = _check_folder(settings, folder)
    if finished is not None:
        return finished
    task = task_for(settings)
    splits = task.load()
    task.prepare()
    sets = {name: task.encode(splits.named(name)) for name in SPLITS if name != "test" or splits.test}
    set_seed(settings.seed)
    model, new = task.build()
    if settings.method != "none":
        _attach(model, settings, new)
    run = _Run(settings, folder, task, sets, _trainable(model) if settings.method != "none" else 0)
    run.write_setup()
    trainer, clock = make_trainer(settings, task, model, sets["train"] if run.trains else None, sets["dev"], folder)
    memory = PeakMemory()
    with tracked(settings):
        if run.trains:
            checkpoint = last_checkpoint(folder) if settings.resume else None
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            pk.save(model, folder)
        return run.finish(trainer, clock, memory)


def train_all(settings: TrainSettings) -> list[RunResult]:
    """`train` for each of `settings.seeds` in a folder of its own below output; without any, just once."""
    if not settings.seeds:
        return [train(settings)]
    output = Path(settings.output)
    return [
        train(settings.with_changes(seed=seed, seeds=(), output=str(output / f"seed-{seed}")))
        for seed in settings.seeds
    ]


def evaluate(run: Path | str, split: str = "test", **source: Any) -> Evaluation:
    """Metrics of a saved run on a split of its own data, or of other data (`data=...`, `encoding=...`).

    Other data that is a single file is taken whole, whatever `split`. Raises DataError for tags or classes that the
    run does not know, ConfigError for a folder without a run.
    """
    task = _open(Path(run))
    if "data" in source:
        source = {"train_file": "", "dev_file": "", "test_file": "", "limit": 0} | source
        path = locate(str(source["data"]))
        if path is not None and path.is_file():
            source |= {"data": str(path), "test_file": path.name}
            split = "test"
    records = task.load(task.labels, **source).named(split)
    trainer = _restore(Path(run), task)
    encoded = task.encode(records)
    predicted = _predict(trainer, task, encoded)
    return Evaluation(task.score(encoded.gold, predicted), task.report(encoded.gold, predicted))


def predict(run: Path | str, texts: Sequence[str] = (), file: Path | str | None = None) -> list[Prediction]:
    """Tags or classes for texts, or for the lines of a file (for the sentences of a CoNLL file).

    Raises DataError for an empty file or text and for a table, ConfigError for a folder without a run.
    """
    return Predictor(run)(texts, file)


class Predictor:
    """A saved run, loaded once, to predict with as often as wanted."""

    def __init__(self, run: Path | str) -> None:
        self.task = _open(Path(run))
        self.trainer = _restore(Path(run), self.task)

    def __call__(self, texts: Sequence[str] = (), file: Path | str | None = None) -> list[Prediction]:
        """As `predict`."""
        encoding = self.task.settings.encoding
        path = Path(file) if file else None
        if self.task.settings.task == "token-classification":
            sentences = [split_words(text) for text in texts]
            if path and conll.holds_conll(path, encoding):
                sentences += conll.read_conll_words(path, encoding)
            elif path:
                sentences += [split_words(line) for line in _texts_of(path, encoding)]
            sentences = [words for words in sentences if words]
            pairs = zip(sentences, self.tags(sentences), strict=True)
            return [Prediction(" ".join(words), words=words, tags=tuple(tags)) for words, tags in pairs]
        lines = [*texts, *(_texts_of(path, encoding) if path else ())]
        lines = [line for line in lines if line.strip()]
        return [Prediction(line, label=label) for line, label in zip(lines, self.classes(lines), strict=True)]

    def tags(self, sentences: Sequence[Sequence[str]]) -> list[list[str]]:
        """A tag for every word of every sentence."""
        return self._predict([Sentence(tuple(words), ("O",) * len(words)) for words in sentences])

    def classes(self, texts: Sequence[str]) -> list[str]:
        """A class for every text."""
        return self._predict([Text(text, self.task.labels[0]) for text in texts])

    def _predict(self, records: Sequence[Any]) -> list[Any]:
        if not records:
            raise DataError("predict: there is no text")
        return _predict(self.trainer, self.task, self.task.encode(records))


def _texts_of(path: Path, encoding: str) -> list[str]:
    """The lines of a file of texts; the rows of a table would be taken for texts, label and all."""
    if path.suffix in (".csv", ".tsv", ".jsonl", ".json"):
        raise DataError(
            f"{path}: predict wants one text per line and no {path.suffix} table; evaluate scores labelled files"
        )
    return read_lines(path, encoding)


def split_words(text: str) -> tuple[str, ...]:
    """Words and punctuation marks of a running text; every Chinese or Japanese character is a word."""
    return tuple(_WORD.findall(text))


def _check_folder(settings: TrainSettings, folder: Path) -> RunResult | None:
    """A finished run to resume is returned as it is; a folder with a run is never overwritten unasked."""
    if not (folder / FILE).is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"output: {folder} is there already and holds no run; it is not overwritten")
        return None
    if not settings.resume:
        if settings.overwrite:
            return None
        raise ConfigError(f"output: {folder} holds a run already; set resume to go on, overwrite, or another output")
    before, now = TrainSettings.load(folder).to_dict(), settings.to_dict()
    changed = [name for name in now if now[name] != before[name] and name not in _MAY_CHANGE]
    if changed:
        raise ConfigError(
            f"resume: {', '.join(f'{n}: {before[n]!r} then, {now[n]!r} now' for n in changed)}; "
            f"a run goes on with the settings it began with"
        )
    return RunResult.load(folder) if (folder / RESULT).is_file() else None


def _attach(model: Any, settings: TrainSettings, new: list[str]) -> None:
    """The method, with every module that the backbone's files lack trained and saved beside it."""
    values = dict(settings.options)
    values["modules_to_save"] = sorted({*(values.get("modules_to_save") or ()), *new}) or None
    values.setdefault("task_type", _HEAD_TASK[settings.task])
    pk.attach(model, registry.load(settings.method).Config.from_dict(values))
    if not _trainable(model):
        raise ConfigError(f"method {settings.method}: nothing is trainable with {dict(settings.options)}")


@dataclass(frozen=True)
class _Run:
    """A run on its way from settings to result. `sets` holds train, dev and, where there is one, test."""

    settings: TrainSettings
    folder: Path
    task: Task
    sets: dict[str, Encoded]
    trainable: int

    @property
    def trains(self) -> bool:
        return self.settings.method != "none"

    def write_setup(self) -> None:
        """What evaluation and resuming need, before the first step."""
        if self.settings.overwrite and not self.settings.resume and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings.save(self.folder)
        _write_json(self.folder / LABELS, self.task.labels)
        self.task.tokenizer.save_pretrained(self.folder)

    def finish(self, trainer: AdapterTrainer, clock: StepClock, memory: PeakMemory) -> RunResult:
        """Evaluate; write predictions, curves and, last, the result. The checkpoints have served."""
        settings, task = self.settings, self.task
        peak = memory.bytes()
        scores: dict[str, dict[str, float]] = {"dev": {}, "test": {}}
        for name in ("dev", "test"):
            if name in self.sets:
                predicted = _predict(trainer, task, self.sets[name], "eval" if name == "dev" else name)
                scores[name] = task.score(self.sets[name].gold, predicted)
                _write_json(self.folder / f"{name}-predictions.json", predicted)
        steps, epochs = trainer.state.global_step, trainer.state.epoch or 0.0
        per_step = clock.seconds / clock.steps if clock.steps else 0.0
        model: Any = trainer.model
        result = RunResult(
            folder=str(self.folder),
            task=settings.task,
            method=settings.method,
            options=dict(settings.options),
            model=settings.model,
            data=settings.data,
            seed=settings.seed,
            dev=scores["dev"],
            test=scores["test"],
            trainable=self.trainable,
            total=sum(p.numel() for name, p in model.named_parameters() if not _is_spare(name)),
            epochs=epochs,
            steps=steps,
            seconds_per_epoch=per_step * steps / epochs if epochs else 0.0,
            peak_bytes=peak,
            peak_kind=memory.kind,
            device=_device(),
            versions={"torch": torch.__version__, "transformers": transformers.__version__, "peftkern": pk.__version__},
        )
        _write_json(self.folder / HISTORY, trainer.state.log_history)
        if self.trains:
            metric = settings.metric or METRICS[settings.task][0]
            plot_curves({settings.method: trainer.state.log_history}, metric, self.folder / CURVES)
        if not settings.keep_checkpoints:
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        _write_json(self.folder / RESULT, asdict(result))
        return result


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")


def _open(run: Path) -> Task:
    """The task of a saved run, with its labels and tokenizer, before any weight is loaded."""
    settings = TrainSettings.load(run)
    task = task_for(settings)
    try:
        task.labels = list(json.loads((run / LABELS).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run} holds no run: {LABELS} is missing or not readable") from error
    task.prepare()
    return task


def _restore(run: Path, task: Task) -> AdapterTrainer:
    settings = task.settings
    set_seed(settings.seed)
    model, _ = task.build()
    if settings.method != "none":
        pk.load(model, run)
    trainer, _ = make_trainer(settings, task, model, None, Encoded(), run)
    return trainer


def _trainable(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _predict(trainer: AdapterTrainer, task: Task, encoded: Encoded, prefix: str = "test") -> list[Any]:
    """Tags or classes; `prefix` is what a tracker lists the loss under."""
    trainer.compute_metrics = None
    rows: Any = encoded.rows
    return task.decode(np.asarray(trainer.predict(rows, metric_key_prefix=prefix).predictions), encoded)


def _is_spare(name: str) -> bool:
    """Originals that a selection keeps aside are no parameters of the model that runs."""
    return ".spare." in name
