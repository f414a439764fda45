"""The command: a run from end to end on tiny shapes, and processes that die."""

import io
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from bench import _run, _worker
from bench._run import Result, supervise

ROOT = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def command(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "peftkern.bench", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_quick_run_of_one_op(tmp_path):
    done = command("--quick", "--only", "prompt_concat", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "prompt_concat" in done.stdout
    whole = json.loads((tmp_path / "out" / "prompt_concat-quick.json").read_text())
    ours = [row for row in whole["rows"] if row["kernel_provider"] == "peftkern" and row["metric_name"] == "speed"]
    assert ours and {row["status"] for row in ours} == {"ok"}
    assert all(row["backend"] for row in ours)
    assert len(whole["machine"]["kernel_sources_sha256"]) == 64
    assert whole["machine"]["versions"]["torch"] and whole["machine"]["ceilings"]["copy_gbps"] > 0
    assert (tmp_path / "out" / "prompt_concat-quick.csv").is_file()


def events(*arguments: str) -> "tuple[int, list[dict]]":
    job = _run._job(_run._parser().parse_args(["--quick", *arguments]), time.time())
    out = io.StringIO()
    threads = torch.get_num_threads()
    try:
        return _worker.run(job, out), [json.loads(line) for line in out.getvalue().splitlines()]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--method", "scael"), "unknown method 'scael'"),
        (("--match", "nothing like it"), "no case has this in its label"),
        pytest.param(("--device", "cuda"), "torch sees no CUDA device", marks=NO_GPU),
    ],
    ids=["method", "match", "device"],
)
def test_a_mistake_is_refused_before_anything_is_measured(arguments, said):
    code, (event,) = events(*arguments)
    assert code == 2 and event["event"] == "refused" and said in event["message"]


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_run, "supervise", lambda job, result: "unknown method 'scael'")
    assert _run.main(["--quick", "--method", "scael"]) == 2
    assert capsys.readouterr().err == "error: unknown method 'scael'\n"
    assert list(tmp_path.iterdir()) == []


def test_used_up_budget_says_so():
    code, found = events("--only", "prompt_concat", "--budget", "-1")
    rows = [row for event in found if event["event"] == "rows" for row in event["rows"]]
    assert code == 0 and found[-1] == {"event": "end"}
    assert {(row["status"], row["note"]) for row in rows} == {("not run", "the time budget is used up")}


FAKE = """
import json, os, sys, time
job = json.loads(sys.argv[-1])
say = lambda **event: print(json.dumps(event), flush=True)
say(event="machine", machine={}, cases=[["op", "first"], ["op", "second"], ["op", "third"]])
for index in range(job["start"], 3):
    left_out = job["without"].get(str(index), [])
    for stage in ("floor", "bad", "timing"):
        if stage in left_out:
            continue
        say(event="stage", case=index, stage=stage)
        if stage == "bad" and index == 1:
            print("illegal memory access", file=sys.stderr, flush=True)
            CRASH
    row = {"kernel_name": "op", "kernel_provider": "floor", "kernel_operation_mode": "full"}
    row |= {"config": {"case": str(index), "without": left_out}, "y": [1, 1, 1], "ratios": {}, "x_value": None}
    say(event="rows", case=index, rows=[row | dict.fromkeys(("gbps", "tflops", "percent_of_floor"))])
say(event="end")
"""


def fake(tmp_path: Path, crash: str) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(FAKE).replace("CRASH", crash))
    return [sys.executable, str(script)]


@pytest.mark.parametrize(
    ("crash", "said"),
    [("os.abort()", "signal 6; illegal memory access"), ("time.sleep(60)", "no sign of life for 3 s")],
    ids=["crash", "hang"],
)
def test_a_process_that_dies_costs_one_provider(tmp_path, crash, said):
    result = Result("cpu")
    assert supervise({"start": 0, "without": {}}, result, 3.0, fake(tmp_path, crash)) is None
    assert [row.config["case"] for row in result.rows if row.status == "ok"] == ["0", "1", "2"]
    (died,) = [row for row in result.rows if row.status == "failed"]
    assert (died.kernel_provider, died.config["case"]) == ("bad", "second")
    assert said in died.note
    assert next(row for row in result.rows if row.config["case"] == "1").config["without"] == ["bad"]


def test_gives_up_after_many_deaths(tmp_path, monkeypatch):
    monkeypatch.setattr(_run, "_MOST_CRASHES", 1)
    result = Result("cpu")
    supervise({"start": 0, "without": {}}, result, 30.0, fake(tmp_path, "os._exit(7)"))
    notes = [row.note for row in result.rows if row.status != "ok"]
    assert "exit code 7" in notes[0] and notes[1:] == ["given up after 1 crashes"] * 2


def test_a_process_that_never_starts_is_an_error():
    with pytest.raises(RuntimeError, match="ended at its start"):
        supervise({"start": 0, "without": {}}, Result("cpu"), 30.0, [sys.executable, "-c", "raise SystemExit(9)"])


def test_gpu_tests_report_their_outcome(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_a():\n    assert False\ndef test_b():\n    pass\n"
    )
    found = _run.run_gpu_tests(tmp_path)
    assert found["outcome"] == "failed" and len(found["failures"]) == 1 and "1 failed" in found["summary"]
    assert _run.run_gpu_tests(tmp_path / "elsewhere")["outcome"] == "not run"
