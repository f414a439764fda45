"""The command: reads arguments, watches over the measuring process, writes the results."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from . import _report
from ._row import Row

_MOST_CRASHES = 12
_BUDGET = {"cuda": 460.0, "cpu": 1500.0}
_TEST_SECONDS = 150.0


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Exit code 0 when something was measured, 1 when nothing was, 2 for a user's mistake."""
    arguments = _parser().parse_args(argv)
    started = time.time()
    result = Result(device=arguments.device)
    if arguments.device == "cuda" and not arguments.no_tests:
        result.tests = run_gpu_tests(_root())
    job = _job(arguments, started)
    if (message := supervise(job, result)) is not None:
        print(f"error: {message}", file=sys.stderr)
        return 2
    result.seconds, result.arguments = time.time() - started, {k: v for k, v in job.items() if k != "deadline"}
    out = arguments.out or _default_folder() / _report.slug(result.machine)
    stem = f"method-{arguments.method}" if arguments.method else "-".join(arguments.only or ["all"])
    written = _report.write(result, out, stem + ("-quick" if arguments.quick else ""))
    print(_report.table(result))
    print("wrote " + ", ".join(map(str, written)))
    return 0 if any(row.status == "ok" for row in result.rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench", description="Every op and whole training steps against their peers: correctness first, then time."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="folder for CSV, JSON and plot (default: bench/results/DEVICE)")
    parser.add_argument(
        "--only", action="append", default=[], choices=("op", "step", *_ops()), help="what to run; may be repeated"
    )
    parser.add_argument("--match", default="", help="only the cases whose label contains this text")
    parser.add_argument("--method", help="an installed method: its default configuration on the step models")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds, without Hugging Face PEFT")
    parser.add_argument(
        "--compile", choices=("none", "default", "max-autotune-no-cudagraphs"), default="none",
        help="torch.compile in this mode as a further peer (takes seconds to minutes per case)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=25, help="most rounds per case")
    parser.add_argument("--budget", type=float, help="seconds after which no further case is started")
    parser.add_argument("--no-tests", action="store_true", help="on cuda: do not run the GPU tests first")
    return parser


def _ops() -> list[str]:
    names = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    return [name for name in names if not name.startswith("test_") and name not in ("step", "conftest")]


def _job(arguments: argparse.Namespace, started: float) -> dict[str, Any]:
    quick, cuda = arguments.quick, arguments.device == "cuda"
    return {
        "device": arguments.device,
        "only": arguments.only,
        "match": arguments.match,
        "method": arguments.method,
        "quick": quick,
        "compile": arguments.compile,
        "rounds": min(arguments.rounds, 5) if quick else arguments.rounds,
        "least": 2 if quick else min(7, arguments.rounds),
        "seconds": 0.5 if quick else 2.0 if cuda else 8.0,
        "deadline": started + (arguments.budget or _BUDGET[arguments.device]),
        "start": 0,
        "without": {},
    }


@dataclass
class Result:
    """Everything one run found."""

    device: str
    machine: dict[str, Any] = field(default_factory=dict)
    cases: list[tuple[str, str]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    tests: dict[str, Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    crashes: int = 0
    seconds: float = 0.0


def supervise(
    job: dict[str, Any], result: Result, patience: float = 300.0, worker: Sequence[str] | None = None
) -> str | None:
    """Run measuring processes until all cases are done; the message of a user's mistake, if that is what ended it.

    A process that dies, or is silent for `patience` seconds, costs the provider it was busy with: a row says so, and a
    new process goes on from there. After 12 deaths the rest is given up, which rows say too. `worker` is the command
    to run, given the job as its last argument.
    """
    worker = worker or (sys.executable, "-m", f"{__package__}._worker")
    while True:
        watch = _Watch(result)
        code, words = _spawn([*worker, json.dumps(job)], watch, patience)
        if watch.refused is not None:
            return watch.refused
        if watch.ended:
            return None
        if not result.cases:
            raise RuntimeError(f"the measuring process ended at its start ({_signal(code)}): {words}")
        result.crashes += 1
        reason = watch.lost or (words if code is None else f"{_signal(code)}; {words}".rstrip("; "))
        case = watch.case if watch.case is not None else watch.done + 1
        if case < len(result.cases):
            row = Row(result.cases[case][0], watch.stage or "?", "full", config={"case": result.cases[case][1]})
            row.status, row.note = "failed", f"the measuring process died: {reason}"
            result.rows.append(row)
        if watch.stage in (None, "timing", "oracle"):
            job["start"] = case + 1
        else:
            job["start"] = case
            job["without"].setdefault(str(case), []).append(watch.stage)
        if result.crashes >= _MOST_CRASHES:
            _give_up(result, job["start"])
            return None


class _Watch:
    """What the measuring process has told so far."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.case: int | None = None
        self.stage: str | None = None
        self.done = -1
        self.refused: str | None = None
        self.lost: str | None = None
        self.ended = False

    def event(self, event: dict[str, Any]) -> None:
        """Take in one line of the process."""
        kind = event["event"]
        if kind == "machine":
            self.result.machine = event["machine"]
            self.result.cases = [(kernel, label) for kernel, label in event["cases"]]
        elif kind == "stage":
            if event["case"] != self.case:
                kernel, label = self.result.cases[event["case"]]
                print(f"[{event['case'] + 1}/{len(self.result.cases)}] {kernel} {label}", file=sys.stderr, flush=True)
            self.case, self.stage = event["case"], event["stage"]
        elif kind == "rows":
            self.result.rows += [Row.from_dict(row) for row in event["rows"]]
            self.done, self.case, self.stage = event["case"], None, None
        elif kind == "refused":
            self.refused = event["message"]
        elif kind == "lost":
            self.lost = event["message"]
        elif kind == "end":
            self.ended = True


def _spawn(command: list[str], watch: _Watch, patience: float) -> tuple[int | None, str]:
    """Run one measuring process to its end: its exit code (None when it was killed for silence) and its last words."""
    path = os.pathsep.join(filter(None, [str(_root()), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    lines: queue.Queue[str | None] = queue.Queue()
    tail: list[str] = []
    readers = [
        threading.Thread(target=_read, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(target=_read, args=(process.stderr, lambda line: _keep(tail, line)), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        while (line := lines.get(timeout=patience)) is not None:
            watch.event(json.loads(line))
        code: int | None = process.wait()
    except queue.Empty:
        code = None
        _keep(tail, f"no sign of life for {patience:.0f} s, so it was killed")
    finally:
        process.kill()
        process.wait()
    readers[1].join(timeout=5)
    return code, tail[-1] if tail else ""


def _read(stream: IO[str], take: Any) -> None:
    for line in stream:
        take(line)
    take(None)


def _keep(tail: list[str], line: str | None) -> None:
    if line is not None and line.strip():
        tail.append(line.strip())
        del tail[:-20]


def _signal(code: int | None) -> str:
    if code is None:
        return "killed"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _give_up(result: Result, start: int) -> None:
    for kernel, label in result.cases[start:]:
        row = Row(kernel, "?", "full", config={"case": label}, status="not run")
        row.note = f"given up after {result.crashes} crashes"
        result.rows.append(row)


def run_gpu_tests(root: Path) -> dict[str, Any]:
    """Outcome of `pytest -m gpu tests/` in a process of its own; the benchmark goes on whatever it is."""
    tests = root / "tests"
    if not tests.is_dir() or importlib.util.find_spec("pytest") is None:
        why = "no tests folder here" if not tests.is_dir() else "pytest is not installed"
        return {"outcome": "not run", "summary": why}
    # No addopts: the strictness of the project's own settings would ask for its pytest plugins.
    options = ["-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(tests)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    started = time.time()
    print("GPU tests ...", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=_TEST_SECONDS
        )
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, text = -1, error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
    outcomes = {0: "passed", 1: "failed", 5: "no test is marked gpu", -1: f"stopped after {_TEST_SECONDS:.0f} s"}
    lines = [line for line in text.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:20]
    return {
        "outcome": outcomes.get(code, f"exit code {code}"),
        "summary": lines[-1] if lines else "",
        "failures": failed,
        "seconds": round(time.time() - started, 1),
    }


def _root() -> Path:
    """The folder from which both `bench` and `peftkern` are imported."""
    if __package__ == "bench":
        return Path(__file__).resolve().parents[1]
    spec = importlib.util.find_spec("peftkern")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).resolve().parents[1]


def _default_folder() -> Path:
    return Path("bench/results") if Path("bench/_run.py").is_file() else Path("peftkern-bench")
