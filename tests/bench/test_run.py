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

from bench import _checks, _run, _supervise, _worker
from bench._supervise import Result, supervise

ROOT = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def command(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "peftkern.bench", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_quick_run_of_one_op(tmp_path):
    done = command("--quick", "--no-build", "--only", "prompt_concat", "--out", "out", cwd=tmp_path)
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
    monkeypatch.setattr(_run, "supervise", lambda job, result, patience: "unknown method 'scael'")
    assert _run.main(["--quick", "--no-build", "--method", "scael"]) == 2
    assert capsys.readouterr().err == "error: unknown method 'scael'\n"
    assert list(tmp_path.iterdir()) == []


def test_a_warm_up_runs_every_case_once_and_says_nothing(monkeypatch):
    ran = []
    monkeypatch.setattr(_worker, "one_pass", lambda runner: ran.append(runner.backend))
    job = _run._job(_run._parser().parse_args(["--quick", "--only", "prompt_concat"]), time.time())
    out = io.StringIO()
    for shares, cases in ((1, [2]), (2, [0, 2]), (3, [0, 1, 1])):  # the first of several has the steps, none here
        for share, count in enumerate(cases):
            ran.clear()
            assert _worker.run(job | {"warm": [share, shares]}, out) == 0
            assert ran == ["cpu"] * count
    assert out.getvalue() == ""


@NO_GPU
def test_without_the_device_nothing_is_built_or_tested(monkeypatch, capsys):
    monkeypatch.setattr(_checks, "build", lambda *_: pytest.fail("built"))
    assert _run.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "error: --device cuda: torch sees no CUDA device\n"


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


HALF = """print('{"event": "ro', end="", flush=True); os.abort()"""


@pytest.mark.parametrize(
    ("crash", "said"),
    [
        ("os.abort()", "signal 6; illegal memory access"),
        (HALF, "signal 6; illegal memory access"),
        ("time.sleep(60)", "no sign of life for 3 s"),
    ],
    ids=["crash", "half a line", "hang"],
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
    monkeypatch.setattr(_supervise, "_MOST_CRASHES", 1)
    result = Result("cpu")
    supervise({"start": 0, "without": {}}, result, 30.0, fake(tmp_path, "os._exit(7)"))
    notes = [row.note for row in result.rows if row.status != "ok"]
    assert "exit code 7" in notes[0] and notes[1:] == ["given up after 1 crashes"] * 2


def test_a_process_that_never_starts_is_an_error():
    with pytest.raises(RuntimeError, match="ended at its start"):
        supervise({"start": 0, "without": {}}, Result("cpu"), 30.0, [sys.executable, "-c", "raise SystemExit(9)"])


def test_when_the_time_is_up_the_rest_is_not_run(tmp_path):
    result = Result("cpu")
    job = {"start": 0, "without": {}, "end": time.time() + 3.0}
    started = time.time()
    assert supervise(job, result, 300.0, fake(tmp_path, "time.sleep(60)")) is None
    assert time.time() - started < 30
    late = [row for row in result.rows if row.status == "not run"]
    assert {row.note for row in late} == {"the time budget is used up"}
    assert [row.config["case"] for row in late] == ["second", "third"]


def test_a_new_process_is_given_the_ceilings_of_the_first(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys\njob = json.loads(sys.argv[-1])\nsay = lambda **e: print(json.dumps(e), flush=True)\n"
        "say(event='machine', machine={'ceilings': {'copy_gbps': 7.0}}, cases=[['op', 'first']])\n"
        "say(event='stage', case=0, stage='bad')\n"
        "assert job.get('ceilings') == {'copy_gbps': 7.0}\nsay(event='end')\n"
    )
    result = Result("cpu")
    supervise({"start": 0, "without": {}}, result, 30.0, [sys.executable, str(script)])
    assert result.crashes == 1


SETUP = """
import sys
print("peftkern: building peftkern._C: 1 files", file=sys.stderr)
WHAT
"""


@pytest.mark.parametrize(
    ("script", "outcome", "said"),
    [
        ("", "up to date", ""),
        (SETUP, "built", "building peftkern._C"),
        (SETUP.replace("WHAT", 'print("peftkern: peftkern._C was not built", file=sys.stderr)'), "failed", "not built"),
        (SETUP.replace("WHAT", 'raise SystemExit("no compiler")'), "failed", "no compiler"),
        ("import time; time.sleep(60)", "stopped after 2 s", ""),
        (None, "not run", "installed package"),
    ],
    ids=["up to date", "built", "failed", "broken", "slow", "wheel"],
)
def test_the_extension_is_built_or_it_says_why_not(tmp_path, script, outcome, said):
    if script is not None:
        (tmp_path / "setup.py").write_text(script.replace("WHAT", ""))
    found = _checks.build(tmp_path, "cpu", 2.0 if outcome.startswith("stopped") else 60.0)
    assert (found["outcome"], said in found["summary"]) == (outcome, True)


def test_a_missing_cuda_library_is_told(tmp_path):
    (tmp_path / "setup.py").write_text("")
    assert "needs nvcc" in _checks.build(tmp_path, "cuda", 60.0)["summary"]


TESTS = """
import pytest
@pytest.mark.gpu
def test_gpu():
    assert 1 + 1 == 3, "wrong sum"
@pytest.mark.gpu
def test_many_gpus():
    pytest.skip("one GPU only")
@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu", "reference"])
def test_backend(backend):
    pass
def test_other():
    raise AssertionError("not asked for")
"""


def checked(tmp_path: Path, device: str, tests: str = TESTS, seconds: float = 60.0) -> dict:
    (tmp_path / "tests").mkdir()
    (tmp_path / "setup.py").touch()
    (tmp_path / "tests" / "test_all.py").write_text(tests)
    return _checks.check(tmp_path, device, seconds)


def test_the_tests_of_a_gpu_report_their_outcome(tmp_path, monkeypatch):
    monkeypatch.setattr(_checks.os, "cpu_count", lambda: 3)  # two processes share the tests
    found = checked(tmp_path, "cuda")
    assert (found["outcome"], found["summary"]) == ("failed", "2 passed, 1 failed, 1 skipped of 4")
    assert len(found["failures"]) == 1 and "test_gpu: AssertionError: wrong sum" in found["failures"][0]
    assert found["skipped"] == {"one GPU only": 1}


def test_the_tests_of_a_cpu_are_those_of_its_backend(tmp_path):
    assert checked(tmp_path, "cpu")["summary"] == "1 passed, 0 failed, 0 skipped of 1"


def test_tests_that_take_too_long_are_stopped_and_what_is_known_is_kept(tmp_path):
    slow = "import pytest, time\n@pytest.mark.gpu\ndef test_slow():\n    time.sleep(60)\n"
    assert checked(tmp_path, "cuda", slow, 3.0)["outcome"] == "stopped after 3 s"
    known = [{"collected": 2}, {"test": "a", "outcome": "passed", "why": ""}]
    found = _checks._verdict([known, []], [None, None], 3.0)
    assert (found["outcome"], found["summary"]) == ("stopped after 3 s", "1 passed, 0 failed, 0 skipped of 2")
    known.append({"test": "b", "outcome": "failed", "why": "wrong"})
    assert _checks._verdict([known], [None], 3.0)["outcome"] == "failed"


def test_what_cannot_be_collected_is_told_and_the_rest_runs(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "setup.py").touch()
    (tmp_path / "tests" / "test_needs.py").write_text("import there_is_no_such_module\n")
    (tmp_path / "tests" / "test_all.py").write_text(TESTS.replace("== 3", "== 2"))
    found = _checks.check(tmp_path, "cuda", 60.0)
    assert (found["outcome"], found["failures"]) == ("passed", [])
    assert "3 passed" in found["summary"] and "1 files could not be collected" in found["summary"]
    assert "there_is_no_such_module" in found["uncollected"]["tests/test_needs.py"]
    (tmp_path / "tests" / "test_all.py").unlink()
    assert _checks.check(tmp_path, "cuda", 60.0)["outcome"] == "no test ran"


def test_a_pytest_that_cannot_start_is_a_failure():
    assert _checks._verdict([[]], [4], 9.0)["outcome"] == "failed: pytest ended with exit code 4"


def test_without_a_checkout_no_test_runs(tmp_path):
    (tmp_path / "tests").mkdir()  # somebody else's, in site-packages
    assert _checks.check(tmp_path, "cuda", 10.0)["outcome"] == "not run"


def test_everything_fits_into_eight_minutes():
    """By construction: what may run last, and the grace it gets, end before 480 s, with time to write the files."""
    job = _run._job(_run._parser().parse_args(["--device", "cuda"]), 0.0)
    assert job["end"] + 15 <= 480
    assert (_run._BUILD + _run._CHECK) * job["budget"] <= 0.5 * job["deadline"]
    assert job["compile"] == "auto"
