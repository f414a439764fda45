"""Watches over the measuring process: what dies costs one provider, and the hour at which everything ends is kept."""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from ._row import Row
from ._sources import root

_MOST_CRASHES = 12
OUT_OF_TIME = "the time budget is used up"


@dataclass
class Result:
    """Everything one run found."""

    device: str
    machine: dict[str, Any] = field(default_factory=dict)
    cases: list[tuple[str, str]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    build: dict[str, Any] | None = None
    tests: dict[str, Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    crashes: int = 0
    seconds: float = 0.0


def supervise(
    job: dict[str, Any], result: Result, patience: float = 300.0, worker: Sequence[str] | None = None
) -> str | None:
    """Run measuring processes until all cases are done; the message of a user's mistake, if that is what ended it.

    A process that dies, or is silent for `patience` seconds, costs the provider it was busy with: a row says so, and a
    new process goes on from there. After 12 deaths the rest is given up, and so it is at job["end"] (seconds since the
    epoch), whatever runs then; rows say that too. `worker` is the command to run, given the job as its last argument.
    """
    worker = worker or (sys.executable, "-m", f"{__package__}._worker")
    end = job.get("end", math.inf)
    while True:
        watch = _Watch(result)
        code, words = _spawn([*worker, json.dumps(job)], watch, patience, end)
        if watch.refused is not None:
            return watch.refused
        if watch.ended:
            return None
        if time.time() >= end:
            _give_up(result, watch.case if watch.case is not None else max(job["start"], watch.done + 1), OUT_OF_TIME)
            return None
        if not result.cases:
            raise RuntimeError(f"the measuring process ended at its start ({_signal(code)}): {words}")
        job["ceilings"] = result.machine.get("ceilings")
        result.crashes += 1
        reason = watch.lost or (words if code is None else f"{_signal(code)}; {words}".rstrip("; "))
        case = watch.case if watch.case is not None else max(job["start"], watch.done + 1)
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
            _give_up(result, job["start"], f"given up after {result.crashes} crashes")
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


def environment() -> dict[str, str]:
    """Of the processes that import `bench` and `peftkern` from where this one did."""
    path = os.pathsep.join(filter(None, [str(root()), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}


def _spawn(command: list[str], watch: _Watch, patience: float, end: float) -> tuple[int | None, str]:
    """Run one measuring process to its end: its exit code (None when it was killed for silence) and its last words."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    lines: queue.Queue[str | None] = queue.Queue()
    tail: list[str] = []
    readers = [
        threading.Thread(target=_read, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(target=_read, args=(process.stderr, lambda line: _keep(tail, line)), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        while (line := lines.get(timeout=max(0.0, min(patience, end - time.time())))) is not None:
            if line.endswith("\n"):  # a process that dies may leave half a line
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


def _give_up(result: Result, start: int, why: str) -> None:
    for kernel, label in result.cases[start:]:
        result.rows.append(Row(kernel, "?", "full", config={"case": label}, status="not run", note=why))
