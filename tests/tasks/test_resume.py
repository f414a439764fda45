"""A run that is killed and resumed ends where an unbroken one ends, to the bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from peftkern.checkpoint import read_tensors
from peftkern.errors import ConfigError
from peftkern.tasks.run import train
from peftkern.tasks.settings import TrainSettings
from peftkern.tasks.trainer import last_checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from peftkern.tasks.run import train
from peftkern.tasks.settings import load_settings
train(load_settings(sys.argv[1]))
"""


def _settings(model, data, output, **changes):
    return TrainSettings(
        data=data, model=model, output=str(output), method="lora", options={"r": 2}, lr=1e-2, max_length=48,
        progress=False, report_to="none", **{"epochs": 12, "batch_size": 8} | changes,
    )  # fmt: skip


def _start(file):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", SCRIPT, str(file)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_and_resumed_equals_unbroken(tiny_bert, ner_data, tmp_path):
    broken = _settings(tiny_bert, ner_data, tmp_path / "broken", epochs=15, eval_steps=2, patience=30)
    broken.save(tmp_path)
    process = _start(tmp_path / "settings.yaml")
    deadline = time.monotonic() + 120
    while process.poll() is None and last_checkpoint(tmp_path / "broken") is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert last_checkpoint(tmp_path / "broken") is not None
    assert not (tmp_path / "broken" / "result.json").exists()

    with pytest.raises(ConfigError, match="holds a run already; set resume to go on"):
        train(broken)
    resumed = train(broken.with_changes(resume=True))
    unbroken = train(broken.with_changes(output=str(tmp_path / "unbroken")))
    assert resumed.steps == unbroken.steps > 20
    assert (resumed.dev, resumed.test) == (unbroken.dev, unbroken.test)
    one, two = (read_tensors(tmp_path / name) for name in ("broken", "unbroken"))
    assert one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one)


def test_checkpoints_hold_only_what_trains(tiny_bert, ner_data, tmp_path):
    settings = _settings(tiny_bert, ner_data, tmp_path / "run", epochs=2, keep_checkpoints=True)
    train(settings)
    checkpoint = last_checkpoint(tmp_path / "run")
    backbone = (Path(tiny_bert) / "model.safetensors").stat().st_size
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < backbone / 4
    assert not list(checkpoint.glob("model*")) and not list(checkpoint.glob("pytorch_model*"))


def test_a_checkpoint_cut_short_is_passed_over(tiny_bert, ner_data, tmp_path):
    settings = _settings(tiny_bert, ner_data, tmp_path / "run", epochs=2, keep_checkpoints=True)
    train(settings)
    whole = last_checkpoint(tmp_path / "run")
    state = (whole / "trainer_state.json").read_text()
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "checkpoint-997").mkdir()
    for number, part in {998: "", 999: state[: len(state) // 2]}.items():
        shutil.copytree(whole, checkpoints / f"checkpoint-{number}")
        (checkpoints / f"checkpoint-{number}" / "trainer_state.json").write_text(part)
    assert last_checkpoint(tmp_path / "run") == whole
    (tmp_path / "run" / "result.json").unlink()
    assert train(settings.with_changes(resume=True)).steps == 10


def test_resume_without_a_checkpoint_begins_anew(tiny_bert, ner_data, tmp_path):
    settings = _settings(tiny_bert, ner_data, tmp_path / "run", epochs=1)
    (tmp_path / "run").mkdir()
    settings.save(tmp_path / "run")
    assert train(settings.with_changes(resume=True)).steps == 5
