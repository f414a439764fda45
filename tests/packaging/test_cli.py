"""Every command, through typer's runner, on a tiny backbone with a tokenizer of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, BertTokenizerFast
from typer.testing import CliRunner, Result

import peftkern as pk
from peftkern.cli import app
from peftkern.tasks.synth import generate
from peftkern.testing import tiny_bert, token_batch
from tests.packaging.conftest import run

COMMANDS = (
    "methods", "doctor", "train", "evaluate", "predict", "report", "merge", "convert", "bench", "demo", "new-method",
)  # fmt: skip


def invoke(*arguments: str | Path, code: int = 0) -> Result:
    """Run one command; `code` is the exit code wanted."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exit_code != code and result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny backbone, generated data and two runs that `peftkern train` made of them."""
    folder = tmp_path_factory.mktemp("cli")
    data = generate(folder / "data", sizes={"train": 24, "dev": 8, "test": 8})
    words = sorted({line.split("\t")[0].lower() for line in (data / "train.conll").read_text().splitlines() if line})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "backbone")
    tiny_bert(vocab_size=len(vocabulary)).bert.save_pretrained(folder / "backbone")
    (folder / "run.yaml").write_text(
        f"data: {data}\nmodel: {folder / 'backbone'}\nepochs: 1\nmax_length: 32\nprogress: false\nreport_to: none\n"
    )
    common = ("train", "--config", folder / "run.yaml")
    options = ("--method", "lora", "--set", "r=4", "--set", "target_modules=query,value")
    lora = invoke(*common, *options, "--output", folder / "lora")
    assert "lora" in lora.output
    invoke(*common, "--method", "head", "--lr", "1e-2", "--output", folder / "head")
    return {"data": data} | {name: folder / name for name in ("backbone", "lora", "head")}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    assert "Usage" in invoke(command, "--help").output.replace("usage", "Usage")


def test_help_lists_every_command() -> None:
    output = invoke("--help").output
    assert all(command in output for command in COMMANDS)


def test_train_takes_every_setting_as_a_flag() -> None:
    output = invoke("train", "--help").output
    for flag in ("--lr", "--seeds", "--template", "--lambda", "--resume", "--set", "--config", "--weight-decay"):
        assert flag in output
    assert "(default: 0.002)" in output


def test_evaluate_predict_and_report(trained: dict[str, Path], tmp_path: Path) -> None:
    assert "f1" in invoke("evaluate", trained["lora"]).output
    assert "f1" in invoke("evaluate", trained["lora"], "--split", "dev", "--data", trained["data"]).output
    tagged = invoke("predict", trained["lora"], "She moved to Talvona .", "--json").output
    assert json.loads(tagged.splitlines()[-1])["words"] == ["She", "moved", "to", "Talvona", "."]
    assert "She moved to Talvona" in invoke("predict", trained["lora"], "She moved to Talvona .").output
    compared = invoke("report", trained["lora"], trained["head"], "--out", tmp_path / "report").output
    assert "lora" in compared and "head" in compared
    assert {"report.md", "report.png"} <= {file.name for file in (tmp_path / "report").iterdir()}


def test_merge_writes_a_plain_model(trained: dict[str, Path], tmp_path: Path) -> None:
    invoke("merge", trained["lora"], tmp_path / "merged")
    merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    adapted = AutoModelForTokenClassification.from_pretrained(trained["backbone"], num_labels=merged.num_labels)
    pk.load(adapted, trained["lora"])
    batch = {key: value for key, value in token_batch().items() if key != "labels"}
    torch.testing.assert_close(merged.eval()(**batch).logits, adapted.eval()(**batch).logits, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()
    assert "not empty" in invoke("merge", trained["lora"], tmp_path / "merged", code=2).output


def test_merge_of_a_bare_adapter_needs_no_run(trained: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForTokenClassification.from_pretrained(trained["backbone"], num_labels=5)
    pk.save(pk.attach(model, pk.LoraConfig(task_type="TOKEN_CLS")), tmp_path / "adapter")
    invoke("merge", tmp_path / "adapter", tmp_path / "merged")
    assert AutoModelForTokenClassification.from_pretrained(tmp_path / "merged").num_labels == 5


def test_merge_of_what_cannot_be_merged(trained: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForTokenClassification.from_pretrained(trained["backbone"])
    pk.save(pk.attach(model, pk.PromptTuningConfig(num_virtual_tokens=3)), tmp_path / "prompt")
    output = invoke("merge", tmp_path / "prompt", tmp_path / "merged", "--model", trained["backbone"], code=2).output
    assert "prompt" in output and not (tmp_path / "merged").exists()


def test_convert_to_half(trained: dict[str, Path], tmp_path: Path) -> None:
    output = invoke("convert", trained["lora"], tmp_path / "half", "--dtype", "bf16").output
    assert "lora" in output
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (trained["lora"], tmp_path / "half"))
    assert list(before) == list(after)
    assert all(torch.equal(after[key], before[key].bfloat16()) for key in before)
    assert "already" in invoke("convert", trained["lora"], tmp_path / "half", code=2).output
    assert "want one of f32" in invoke("convert", trained["lora"], tmp_path / "x", "--dtype", "fp8", code=2).output


def test_convert_folds_rslora(tmp_path: Path) -> None:
    ranks = {"r": 4, "rank_pattern": {"key": 9}, "target_modules": ["key", "value"]}
    config = pk.LoraConfig(use_rslora=True, init_lora_weights=False, **ranks)
    model = pk.attach(tiny_bert(), config).eval()
    pk.save(model, tmp_path / "rs")
    invoke("convert", tmp_path / "rs", tmp_path / "plain", "--fold-rslora")
    folded = pk.load(tiny_bert(), tmp_path / "plain").eval()
    assert not pk.adapters(folded)["default"].use_rslora
    torch.testing.assert_close(folded(**token_batch(labels=5)).logits, model(**token_batch(labels=5)).logits)
    again = invoke("convert", tmp_path / "plain", tmp_path / "x", "--fold-rslora", code=2)
    assert "does not use rsLoRA" in again.output


def test_convert_refuses_what_f16_cannot_hold(tmp_path: Path) -> None:
    model = pk.attach(tiny_bert(), pk.LoraConfig(target_modules=["value"]))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(1e6)
    pk.save(model, tmp_path / "large")
    refused = invoke("convert", tmp_path / "large", tmp_path / "half", "--dtype", "f16", code=2)
    assert "not finite in f16" in refused.output
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--data", "x", "--model", "y", "--method", "lara"), "did you mean 'lora'"),
        (("train", "--data", "x", "--model", "y", "--set", "rank=4"), "rank"),
        (("train", "--data", "x", "--model", "y", "--lr", "-1"), "lr: must be positive"),
        (("train",), "data: is missing"),
        (("evaluate", "nowhere"), "holds no finished run"),
        (("convert", ".", "out"), "adapter_config.json"),
        (("new-method", "lora"), "choose another name"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = invoke(*arguments, code=2).output.strip()
    assert output.startswith("error: ") and words in output
    assert "\n" not in output


def test_without_typer_it_says_how_to_get_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['typer'] = None; from peftkern.__main__ import main; raise SystemExit(main())"
    done = run(sys.executable, "-c", code, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "pip install 'peftkern[cli]'" in done.stderr and "Traceback" not in done.stderr
