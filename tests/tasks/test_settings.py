"""Settings from YAML and flags, and what is refused before anything is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from peftkern.errors import ConfigError, UnknownMethodError
from peftkern.tasks.settings import TrainSettings, load_settings, parse_sets, parse_words

OK = {"data": "d", "model": "m"}
YAML = """
data: d
model: m
lr: 1e-4
method: lora
options: {r: 4, lora_dropout: 0.1}
lambda: 0.5
task: text-classification
template: '{text}'
verbalizer: {a: x, b: [y, z]}
"""


def test_yaml_then_flags_then_sets(write):
    path = write("run.yaml", YAML)
    settings = load_settings(path, {"lr": None, "epochs": 2, "lambda_": 0.25}, ["r=8", "target_modules=query,value"])
    assert (settings.lr, settings.epochs, settings.lambda_) == (1e-4, 2.0, 0.25)
    assert settings.options == {"r": 8, "lora_dropout": 0.1, "target_modules": ["query", "value"]}
    assert settings.verbalizer == {"a": ("x",), "b": ("y", "z")}


def test_options_of_another_method_in_the_file_are_left_out(write):
    path = write("run.yaml", "data: d\nmodel: m\nmethod: lora\noptions: {r: 4}\n")
    assert load_settings(path, {"method": "bitfit"}).options == {}
    assert load_settings(path, {"method": "lora"}).options == {"r": 4}


def test_save_and_load_give_the_same(tmp_path):
    settings = TrainSettings(
        **OK, task="text-classification", options={"r": 2}, seeds="1,2", report_to="none", template="{text} {mask}",
        verbalizer={"饭": ["好"]}, lambda_=0.5,
    )  # fmt: skip
    settings.save(tmp_path)
    assert TrainSettings.load(tmp_path) == settings
    assert settings.seeds == (1, 2) and settings.report_to == ()
    with pytest.raises(ConfigError, match=r"holds no finished run: settings\.yaml is missing"):
        TrainSettings.load(tmp_path / "else")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("2e-3", 2e-3),
        ("true", True),
        ("null", None),
        ("a,b", ["a", "b"]),
        ("[1, 2]", [1, 2]),
        ("x", "x"),
        ("", ""),
        ("1,2", [1, 2]),
        (".*query|.*value", ".*query|.*value"),
    ],
)
def test_set_values_are_typed(text, value):
    parsed = parse_sets([f"name={text}"])["name"]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "data: is missing"),
        ({"model": ""}, "model: is missing"),
        ({"task": "token_classification"}, "task: 'token_classification' is not one of .*did you mean"),
        ({"optimizer": "adam"}, "optimizer: 'adam' is not one of adamw, sgd; did you mean 'adamw'"),
        ({"schedule": "cosinus"}, "did you mean 'cosine'"),
        ({"lr": 0}, "lr: must be positive"),
        ({"lr": "fast"}, "lr: want float, got 'fast'"),
        ({"lr": float("nan")}, "lr: must be positive"),
        ({"batch_size": 1.5}, "batch_size: want int, got 1.5"),
        ({"batch_size": True}, "batch_size: want int, got True"),
        ({"bf16": "yes"}, "bf16: want bool"),
        ({"warmup": -0.1}, "warmup: must not be negative"),
        ({"max_length": 2}, "max_length: must be at least 8"),
        ({"dev_share": 1.0}, "dev_share: must lie between 0 and 1"),
        ({"seeds": [1, 1]}, "seeds: must be different"),
        ({"seeds": "1,x"}, "seeds: want int, got 'x'"),
        ({"report_to": "tensorbord"}, "report_to: 'tensorbord' is not one of tensorboard, wandb; did you mean"),
        ({"encoding": "utf-88"}, "encoding: 'utf-88' is not a known"),
        ({"options": [1]}, "options: want a mapping"),
        ({"verbalizer": {"a": "x"}}, "verbalizer: needs a template"),
        ({"template": "{text}"}, "template: prompts a text-classification task, not token-classification"),
        ({"lambda_": 0.5}, "lambda: weighs two losses of a text-classification task"),
        ({"task": "text-classification", "template": "text"}, r"\{text\} is missing"),
        ({"task": "text-classification", "template": "{text}", "verbalizer": {"a": []}}, "no word for 'a'"),
        ({"task": "text-classification", "template": "{text}", "verbalizer": {"a": 3}}, "want a word or a list"),
        ({"metric": "f2"}, "metric: 'f2' is not one of f1, precision"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_values(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**OK | changes)


def test_unknown_key_and_near_names():
    with pytest.raises(ConfigError, match="settings: unknown key 'bath_size'; did you mean 'batch_size'"):
        TrainSettings.from_dict(OK | {"bath_size": 3})


def test_unknown_method_and_option_before_anything_is_read():
    with pytest.raises(UnknownMethodError, match="unknown method 'lorra'; did you mean 'lora'"):
        load_settings(None, OK | {"method": "lorra"})
    with pytest.raises(ConfigError, match="rr"):
        load_settings(None, OK, ["rr=8"])
    with pytest.raises(ConfigError, match="r=0"):
        load_settings(None, OK, ["r=0"])
    with pytest.raises(ConfigError, match="options: method none takes none"):
        load_settings(None, OK | {"method": "none"}, ["r=1"])
    with pytest.raises(ConfigError, match="needs a template or a method that puts a soft prompt in front"):
        load_settings(None, OK | {"task": "text-classification", "lambda_": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: [", "line 2: not YAML"),
        ("- x\n", "want `name: value` lines, got list"),
        (b"\xff\xfe\x00", "not YAML"),
    ],
)
def test_bad_yaml(write, content, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(write("x.yaml", content))


def test_verbalizer_by_flags():
    flags = {"verbalizer": parse_words(["a=x", "b = y, z", "c=d=w"]), "template": "{text} {mask}"}
    settings = load_settings(None, {**OK, "task": "text-classification", **flags})
    assert settings.verbalizer == {"a": ("x",), "b": ("y", "z"), "c=d": ("w",)}
    for wrong in ("great", "=great"):
        with pytest.raises(ConfigError, match=f"verbalizer: want label=word,word, got '{wrong}'"):
            parse_words([wrong])


def test_missing_yaml_and_bad_set():
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(Path("no.yaml"))
    with pytest.raises(ConfigError, match="set: want name=value, got 'r'"):
        parse_sets(["r"])
    with pytest.raises(ConfigError, match="is not a value"):
        parse_sets(["r=[1"])


def test_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb is not installed; pip install wandb"):
        TrainSettings(**OK, report_to="wandb")


def test_every_setting_has_a_help_text():
    assert all(field.metadata["help"] for field in dataclasses.fields(TrainSettings))


CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_configurations_are_valid(path):
    settings = load_settings(path)
    assert settings.method in ("lora", "adapter", "prompt_tuning")
