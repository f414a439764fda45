"""Runs side by side."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from rich.console import Console

from peftkern.errors import ConfigError
from peftkern.tasks.report import compare, labels
from peftkern.tasks.run import RunResult

SCORES = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "accuracy": 0.75}


def _run(folder, task="token-classification", test=SCORES, **changes):
    result = RunResult(
        folder=str(folder), task=task, method="lora", options={"r": 8}, model="m", data="d", seed=1,
        dev=dict.fromkeys(SCORES, 0.125), test=test, trainable=1000, total=100_000, epochs=2.0, steps=20,
        seconds_per_epoch=1.5, peak_bytes=2**20 * 300, peak_kind="resident set of the process", device="CPU",
        versions={"torch": "2"},
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(asdict(result) | changes))
    history = [{"loss": 1.0, "step": 1, "epoch": 0.5}, {"eval_f1": 0.3, "epoch": 1.0, "step": 2}]
    (folder / "history.json").write_text(json.dumps(history))
    return folder


def test_table_markdown_and_pictures(tmp_path):
    runs = [_run(tmp_path / "a"), _run(tmp_path / "b", test={}, method="none", trainable=0, steps=0)]
    table = compare(runs, tmp_path / "out")
    console = Console(width=200, record=True, file=(tmp_path / "console").open("w"))
    console.print(table)
    text = console.export_text()
    assert "0.333" in text and "1.00%" in text and "300" in text and "dev" in text and "0.125" in text
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| a | lora | test | 0.500 | 0.250 | 0.333 | 0.750 | 1,000 | 1.00% | 1.5 | 300 |" in report
    assert "| b | none | dev |" in report and "r=8" in report and "resident set" in report
    for name in ("report.png", "curves.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_resumed_after_its_last_step_has_no_seconds_per_epoch(tmp_path):
    compare([_run(tmp_path / "a", seconds_per_epoch=0.0)], tmp_path / "out")
    assert "| 1.00% | - | 300 |" in (tmp_path / "out" / "report.md").read_text()


def test_table_cuts_no_figure_at_80_columns(tmp_path):
    scores = dict.fromkeys(SCORES, 0.987)
    full = {"method": "prompt_tuning", "trainable": 22_568_071, "total": 22_568_071, "peak_bytes": 1050 * 2**20}
    runs = [_run(tmp_path / "full-fine-tuning-of-everything", test=scores, **full), _run(tmp_path / "b", test=scores)]
    console = Console(width=80, record=True, file=(tmp_path / "console").open("w"))
    console.print(compare(runs, tmp_path / "out"))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for figure in ("prompt_tuning", "0.987", "22,568,071", "100.00%", "1.5", "1,050"):
        assert figure in text, figure


def test_names_tell_runs_apart(tmp_path):
    results = [RunResult.load(_run(tmp_path / name)) for name in ("x/seed-1", "y/seed-1", "z")]
    assert labels(results)[:2] == ["x/seed-1", "y/seed-1"]
    assert [name.split()[-1] for name in labels([results[0], results[0]])] == ["#1", "#2"]


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match="name at least one run"):
        compare([], tmp_path)
    with pytest.raises(ConfigError, match="holds no finished run"):
        compare([tmp_path / "none"], tmp_path)
    with pytest.raises(ConfigError, match="have no metric in common"):
        compare([_run(tmp_path / "a"), _run(tmp_path / "b", task="text-classification")], tmp_path)
