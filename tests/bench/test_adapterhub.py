"""The peer in a process of its own: identical work, its own clock, and a row for whatever goes wrong there."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from bench import _adapterhub, _models, step
from bench._adapterhub import PYTHON, Peer
from bench._measure import Options, Settings, measure, prepare, relative_error

FULL = Options(torch.device("cpu"))
TINY = _models.models(dataclasses.replace(FULL, quick=True))[0][0]
SETTINGS = Settings(rounds=2, least=2, seconds=0.0)
INSTALLED = pytest.mark.skipif(not PYTHON.is_file(), reason=f"{PYTHON} is not there: `make peers`")


def bottleneck(dtype=torch.float32):
    return step._case(FULL, TINY, next(m for m in step.METHODS if m.label == "bottleneck p0.1"), dtype)


@INSTALLED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_it_computes_what_the_others_compute(dtype):
    case = bottleneck(dtype)
    runners, rows = prepare(case, SETTINGS)
    assert not rows and "adapterhub" in runners, [row.note for row in rows]
    peer, want = runners["adapterhub"], case.oracle()
    got = peer.check()
    assert peer.backend == "adapters 1.3.0" and set(got) == set(want)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert all(relative_error(value, want[name]) < limit for name, value in got.items())
    first, second = peer.sample(), peer.sample()
    assert min(*first, *second) > 0
    assert all(torch.equal(value, got[name]) for name, value in peer.check().items())


@INSTALLED
def test_it_takes_turns_and_keeps_its_own_time():
    order = []

    def noted(name, build):
        def build_noted():
            runner = build()
            call = runner.forward
            runner.forward = lambda: order.append(name) or call()
            runner.sample = runner.sample and runner.forward
            return runner

        return build_noted

    case = bottleneck()
    case = dataclasses.replace(case, providers={name: noted(name, build) for name, build in case.providers.items()})
    rows = measure(case, SETTINGS)
    assert {row.status for row in rows} == {"ok"}
    peer = {row.kernel_operation_mode: row for row in rows if row.kernel_provider == "adapterhub"}
    assert peer["full"].rounds == 2 and min(peer[mode].y[0] for mode in ("forward", "backward")) > 0
    assert all("adapterhub" in row.ratios for row in rows if row.kernel_provider == "peftkern" and row.rounds)
    assert not any(row.kernel_provider == "adapterhub" for row in rows if row.metric_name == "memory")
    turns = [name for index, name in enumerate(order) if name != order[index - 1]]
    assert turns.count("adapterhub") == 3, order  # once to warm up, then in both rounds


def test_without_its_environment_a_row_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(step._adapterhub.Peer.__init__, "__defaults__", (tmp_path / "python",))
    runners, (row,) = prepare(bottleneck(), SETTINGS)
    assert (row.kernel_provider, row.status) == ("adapterhub", "missing") and "make peers" in row.note
    assert {"floor", "torch", "peftkern"} == set(runners)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("input(); print('error ValueError: no such thing')", "ValueError: no such thing"),
    ],
    ids=["died", "failed"],
)
def test_what_goes_wrong_in_its_process_is_told(monkeypatch, tmp_path, script, said):
    file = tmp_path / "worker.py"
    file.write_text(script)
    monkeypatch.setattr(_adapterhub, "__file__", str(file))
    with pytest.raises(RuntimeError, match=said):
        Peer({"p": 0.0}, Path(sys.executable))


@INSTALLED
def test_its_process_ends_with_it():
    runner = step._adapterhub_runner(FULL, TINY, step.METHODS[4], torch.float32)
    process = runner.forward.__self__._process
    assert process.poll() is None
    del runner
    assert process.poll() is not None
