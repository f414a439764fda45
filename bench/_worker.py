"""The process that measures: prints one JSON line per event, so that a crash costs one provider and not the run."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from typing import IO, Any

import torch

from peftkern.errors import PeftkernError

from . import _cases, _machine
from ._clock import one_pass
from ._measure import OURS, Case, DeviceLost, Options, Settings, measure
from ._supervise import OUT_OF_TIME


def main(argv: list[str]) -> int:
    """Run the job that the JSON object argv[-1] describes."""
    # Whatever a library prints goes to stderr; stdout carries events alone.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return run(json.loads(argv[-1]), events)


def run(job: dict[str, Any], events: IO[str]) -> int:
    """Measure what is asked for: device, only, match, method, quick, compile, rounds, least, seconds, deadline, start,
    without; ceilings, when they are known already. With warm = [INDEX, COUNT] every COUNT-th case runs once, untimed.
    Exit code 2 for a user's mistake, 3 when the device was lost."""
    device = torch.device(job["device"])
    try:
        if device.type == "cuda" and not torch.cuda.is_available():
            raise PeftkernError("--device cuda: torch sees no CUDA device")
        options = Options(device, job["quick"])
        found = _cases.listed(options, job["only"], job["method"], job["compile"])
        cases = [case for case in found if job["match"] in case.label]
        if not cases:
            raise PeftkernError(f"--match {job['match']!r}: no case has this in its label")
    except PeftkernError as error:
        _say(events, event="refused", message=str(error))
        return 2
    torch.set_float32_matmul_precision("highest")
    if job["quick"]:  # a second thread costs tiny work more than it saves, most of all where cores are shared
        torch.set_num_threads(1)
    if "warm" in job:
        return _warm(cases, *job["warm"])
    known = job.get("ceilings")
    ceilings = _machine.ceilings_from(known) if known else _machine.ceilings(device, job["quick"])
    machine = _machine.describe(device) | {"ceilings": known or _machine.ceilings_dict(ceilings)}
    _say(events, event="machine", machine=machine, cases=[(case.kernel, case.label) for case in cases])
    settings = Settings(job["rounds"], job["least"], job["seconds"], ceilings=ceilings)
    if device.type == "cuda":
        settings.flush = torch.empty(2**26, dtype=torch.int32, device=device)
    return _measure_all(cases, settings, job, events)


def _warm(cases: list[Case], index: int, count: int) -> int:
    """Run this process's share of the cases once, ours and torch.compile's: the kernels they need are then on disk."""
    # Whole models go to one process: several beside each other would fill the memory that the tests need.
    steps = [case for case in cases if case.kernel == "step"]
    ops = [case for case in cases if case.kernel != "step"]
    mine = [*steps, *ops] if count == 1 else steps if index == 0 else ops[index - 1 :: count - 1]
    for case in mine:
        for name, build in case.providers.items():
            # Autotuning is left to the clock's own process: here other work would spoil its choice.
            if name in (OURS, f"{OURS}.compile", _cases.COMPILED["default"]):
                with contextlib.suppress(Exception):
                    runner = build()
                    (runner.check or dict)()
                    one_pass(runner)
                    del runner
    return 0


def _measure_all(cases: list[Case | None], settings: Settings, job: dict[str, Any], events: IO[str]) -> int:
    # A case is not begun when the longest one of its kind (steps, ops, cells of the heat map) would not fit any more.
    longest: dict[tuple[bool, bool], float] = {}
    device = torch.device(job["device"])
    without = {int(index): frozenset(names) for index, names in job["without"].items()}
    for index, case in enumerate(cases):
        if case is None or index < job["start"]:
            continue
        kind = (case.kernel == "step", case.light)
        if time.time() + longest.get(kind, 0.0) > job["deadline"]:
            rows = [case.row(name, status="not run", note=OUT_OF_TIME) for name in case.providers]
            _say(events, event="rows", case=index, rows=[row.to_dict() for row in rows])
            continue
        settings.without = without.get(index, frozenset())
        settings.announce = lambda stage, index=index: _say(events, event="stage", case=index, stage=stage)  # type: ignore[misc]
        started = time.time()
        try:
            rows = measure(case, settings)
        except DeviceLost as error:
            _say(events, event="lost", message=str(error))
            return 3
        longest[kind] = max(longest.get(kind, 0.0), time.time() - started)
        cases[index] = case = None  # frees the tensors that all providers of the case share
        _release(device)
        _say(events, event="rows", case=index, rows=[row.to_dict() for row in rows])
    _say(events, event="end")
    return 0


def _release(device: torch.device) -> None:
    """Give the memory of a case, of its graphs above all, back before the next one."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _say(events: IO[str], **event: Any) -> None:
    events.write(json.dumps(event) + "\n")
    events.flush()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
