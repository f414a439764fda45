"""The settings of a training run: from YAML and flags, checked before any model is loaded, saved beside the result."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from peftkern import registry
from peftkern.adapter import PromptAdapter
from peftkern.errors import ConfigError, near
from peftkern.tasks.data import Source
from peftkern.tasks.templates import Template, check_words
from peftkern.tasks.textfile import check_encoding

TASKS = ("token-classification", "text-classification")
OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd"}
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb"}
METRICS = {
    "token-classification": ("f1", "precision", "recall", "accuracy"),
    "text-classification": (
        "accuracy",
        "precision",
        "recall",
        "f1",
        "precision_weighted",
        "recall_weighted",
        "f1_weighted",
    ),
}
"""The metrics of each task; the first decides which checkpoint is best unless `metric` says otherwise."""

FILE = "settings.yaml"


def _f(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that decides a run. In YAML and on the command line `lambda_` is written `lambda`.

    Raises ConfigError, naming the field and what is allowed, on construction.
    """

    data: str = _f("", "folder, file, name below $PEFTKERN_DATA, or `datasets` id")
    model: str = _f("", "folder or hub id of the backbone, or package:NAME for one that a package ships")
    task: str = _f("token-classification", " or ".join(TASKS))
    method: str = _f("lora", "a name that `peftkern methods` lists, or none: no training, only evaluation")
    options: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "fields of the method's config"})
    output: str = _f("runs/run", "folder for the result")

    data_config: str = _f("", "configuration name of a `datasets` id")
    train_file: str = _f("", "training file inside the data folder, where names do not tell")
    dev_file: str = _f("", "development file inside the data folder")
    test_file: str = _f("", "test file inside the data folder")
    encoding: str = _f("utf-8", "encoding of the data files")
    text_column: str = _f("", "column of the text (of the word, by number, in CoNLL files)")
    label_column: str = _f("", "column of the label (of the tag, by number, in CoNLL files)")
    dev_share: float = _f(0.1, "share of the training set split off where there is no development set")
    limit: int = _f(0, "use only this many labelled training records, classes in proportion; 0: all")
    data_seed: int = _f(42, "seed of limit and split: the same data for every `seed`")

    epochs: float = _f(3.0, "passes over the training set")
    batch_size: int = _f(16, "records per step")
    eval_batch_size: int = _f(32, "records per step of evaluation")
    accumulate: int = _f(1, "steps whose gradients are added up before the optimizer moves")
    lr: float = _f(2e-3, "learning rate")
    optimizer: str = _f("adamw", " or ".join(OPTIMIZERS))
    weight_decay: float = _f(0.0, "weight decay, not on biases and norms")
    warmup: float = _f(0.1, "share of all steps if below 1, else a number of steps")
    schedule: str = _f("linear", ", ".join(SCHEDULES))
    max_grad_norm: float = _f(1.0, "gradients are scaled down to this norm")
    max_length: int = _f(128, "sub-words per input; what is longer is cut (its words count as O)")
    patience: int = _f(0, "stop after this many evaluations without improvement; 0: never")
    metric: str = _f("", "development metric that picks the best checkpoint; default f1 or accuracy")
    eval_steps: int = _f(0, "evaluate and save every so many steps; 0: after every epoch")
    seed: int = _f(42, "seed of initial weights, dropout and order")
    seeds: tuple[int, ...] = _f((), "train once for each of these seeds, in seed-N below output")
    bf16: bool = _f(False, "autocast to bfloat16")
    gradient_checkpointing: bool = _f(False, "recompute activations in backward")
    report_to: tuple[str, ...] = _f(("tensorboard",), "tensorboard, wandb, both or none")
    progress: bool = _f(True, "show progress bars")
    resume: bool = _f(False, "go on from the last checkpoint in output")
    overwrite: bool = _f(False, "replace a run that is in output already")
    keep_checkpoints: bool = _f(False, "keep the Trainer's checkpoints after the run has finished")

    template: str = _f("", 'hard prompt, e.g. "{text} The intent is {mask}."')
    verbalizer: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict, metadata={"help": "label: [words] read at {mask} by a masked- or causal-LM head"}
    )
    lambda_: float = _f(0.0, "L = L_prompt + lambda L_finetune, the second on the plain input")

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _typed(name.rstrip("_"), getattr(self, name), hint))
        for name in ("data", "model", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: is missing")
        _choice("task", self.task, TASKS)
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        _choice("schedule", self.schedule, SCHEDULES)
        if self.metric:
            _choice("metric", self.metric, METRICS[self.task])
        check_encoding(self.encoding)
        for name in ("epochs", "batch_size", "eval_batch_size", "accumulate", "lr", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup", "limit", "patience", "eval_steps", "seed", "data_seed", "lambda_"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name.rstrip('_')}: must not be negative, got {getattr(self, name)}")
        if self.max_length < 8:
            raise ConfigError(f"max_length: must be at least 8, got {self.max_length}")
        if not 0 < self.dev_share < 1:
            raise ConfigError(f"dev_share: must lie between 0 and 1, got {self.dev_share}")
        if any(seed < 0 for seed in self.seeds) or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds: must be different and not negative, got {list(self.seeds)}")
        self._check_prompting()
        self._check_trackers()

    def _check_prompting(self) -> None:
        if self.template:
            if self.task != "text-classification":
                raise ConfigError(f"template: prompts a text-classification task, not {self.task}")
            Template(self.template)
        if self.verbalizer:
            if not self.template:
                raise ConfigError("verbalizer: needs a template that says where the answer stands")
            check_words(self.verbalizer, tuple(self.verbalizer))
        if self.lambda_ and self.task != "text-classification":
            raise ConfigError(f"lambda: weighs two losses of a text-classification task, not of {self.task}")

    def _check_trackers(self) -> None:
        for tracker in self.report_to:
            _choice("report_to", tracker, TRACKERS)
            if importlib.util.find_spec(TRACKERS[tracker]) is None:
                raise ConfigError(f"report_to: {tracker} is not installed; pip install {TRACKERS[tracker]}")

    def check_method(self) -> None:
        """Raise ConfigError or RegistryError for a method that is not installed or options that it does not take."""
        if self.method == "none":
            if self.options:
                raise ConfigError(f"options: method none takes none, got {', '.join(self.options)}")
            return
        method = registry.load(self.method)
        method.Config.from_dict(dict(self.options))
        if self.lambda_ and not self.template and not issubclass(method, PromptAdapter):
            raise ConfigError(
                "lambda: weighs the loss on the plain input against that on the prompted: needs a template or a method "
                "that puts a soft prompt in front"
            )

    @property
    def source(self) -> Source:
        """The part that says where the data is and how to read it."""
        return Source(**{part.name: getattr(self, part.name) for part in fields(Source)})

    def with_changes(self, **changes: Any) -> TrainSettings:
        """A checked copy with other values."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names used in YAML."""
        values = {name.rstrip("_"): value for name, value in asdict(self).items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()} | {
            "verbalizer": {label: list(words) for label, words in self.verbalizer.items()}
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainSettings:
        """Checked settings from plain values; ConfigError names an unknown key and its near ones."""
        known = {setting.name.rstrip("_"): setting.name for setting in fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"settings: unknown key {name!r}{near(str(name), known)}")
        return cls(**{known[name]: value for name, value in values.items()})

    def save(self, folder: Path) -> None:
        """Write `settings.yaml` into `folder`."""
        import yaml

        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        (folder / FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TrainSettings:
        """The settings saved in a run's folder."""
        if not (folder / FILE).is_file():
            raise ConfigError(f"{folder} holds no finished run: {FILE} is missing")
        return cls.from_dict(read_yaml(folder / FILE))


def load_settings(
    file: Path | str | None = None, flags: Mapping[str, Any] | None = None, sets: Iterable[str] = ()
) -> TrainSettings:
    """Settings from a YAML file (if any), then flags (None means not given), then `name=value` method options.

    Everything is checked, the method and its options too. Raises ConfigError or RegistryError.
    """
    written = read_yaml(Path(file)) if file else {}
    given = {name.rstrip("_"): value for name, value in (flags or {}).items() if value is not None}
    # Options written for the file's own method say nothing about another one.
    same = given.get("method", written.get("method")) == written.get("method")
    options = dict((written.get("options") or {}) if same else {}) | parse_sets(sets)
    values = written | given | {"options": options}
    settings = TrainSettings.from_dict(values)
    settings.check_method()
    return settings


def parse_sets(sets: Iterable[str]) -> dict[str, Any]:
    """`["r=8", "target_modules=query,value"]` -> {"r": 8, "target_modules": ["query", "value"]}.

    A value is read as YAML; a number may be written `2e-3`, a list `a,b`.
    """
    options: dict[str, Any] = {}
    for item in sets:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"set: want name=value, got {item!r}")
        options[name.strip()] = _parse(text)
    return options


def parse_words(items: Iterable[str]) -> dict[str, list[str]]:
    """`["good=great,fine", "bad=awful"]` -> {"good": ["great", "fine"], "bad": ["awful"]}, a verbalizer."""
    words: dict[str, list[str]] = {}
    for item in items:
        label, equals, text = item.rpartition("=")
        if not equals or not label.strip():
            raise ConfigError(f"verbalizer: want label=word,word, got {item!r}")
        words[label.strip()] = [word.strip() for word in text.split(",")]
    return words


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError with the line where it is none."""
    import yaml  # here, so that commands which read no settings run without it

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not YAML ({getattr(error, 'problem', None) or error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: want `name: value` lines, got {type(values).__name__}")
    return values


def _parse(text: str) -> Any:
    import yaml

    if re.fullmatch(r"[\w.-]+(,[\w.-]+)+", text):
        return [_parse(part) for part in text.split(",")]
    try:
        value = yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"set: {text!r} is not a value ({getattr(error, 'problem', error)})") from error
    return _as_number(value) if isinstance(value, str) else value


def _as_number(text: str) -> float | str:
    """YAML 1.1 reads 2e-3 as a string; people mean the number."""
    return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text) else text


def _choice(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(allowed)}{near(value, allowed)}")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type of its field where nothing is lost by it, else ConfigError."""
    if hint in (int, float, str, bool):
        return _scalar(name, value, hint)
    if name == "report_to":
        names = value.split(",") if isinstance(value, str) else list(value or ())
        return tuple(tracker.strip() for tracker in names if tracker.strip() != "none")
    if name == "seeds":
        numbers = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
        return tuple(_scalar(name, int(n) if isinstance(n, str) and n.strip().isdecimal() else n, int) for n in numbers)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: want a mapping, got {value!r}")
    if name != "verbalizer":
        return dict(value)
    words = {str(label): [found] if isinstance(found, str) else found for label, found in value.items()}
    for label, found in words.items():
        if not isinstance(found, (list, tuple)) or not all(isinstance(word, str) for word in found):
            raise ConfigError(f"verbalizer: want a word or a list of words for {label!r}, got {found!r}")
    return {label: tuple(found) for label, found in words.items()}


def _scalar(name: str, value: Any, kind: type) -> Any:
    if kind is str and isinstance(value, Path):
        return str(value)
    if kind is str and type(value) is int and name.endswith("_column"):
        return str(value)
    if kind in (int, float) and isinstance(value, str) and re.fullmatch(r"\s*[+-]?[\d.]+([eE][+-]?\d+)?\s*", value):
        with suppress(ValueError):
            value = float(value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not kind:
        raise ConfigError(f"{name}: want {kind.__name__}, got {value!r}")
    return value
