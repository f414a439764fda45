"""The process that measures: prints one JSON line per event, so that a crash costs one provider and not the run."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pkgutil
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

import torch

from peftkern.errors import PeftkernError

from . import _machine
from ._measure import Case, DeviceLost, Options, Settings, measure

OUT_OF_TIME = "the time budget is used up"


def main(argv: list[str]) -> int:
    """Run the job that the JSON object argv[-1] describes."""
    # Whatever a library prints goes to stderr; stdout carries events alone.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return run(json.loads(argv[-1]), events)


def run(job: dict[str, Any], events: IO[str]) -> int:
    """Measure what is asked for: device, only, match, method, quick, compile, rounds, least, seconds, deadline, start,
    without. Exit code 2 for a user's mistake, 3 when the device was lost."""
    device = torch.device(job["device"])
    try:
        if device.type == "cuda" and not torch.cuda.is_available():
            raise PeftkernError("--device cuda: torch sees no CUDA device")
        options = Options(device, job["quick"], job["compile"])
        cases = [case for case in listed(options, job["only"], job["method"]) if job["match"] in case.label]
        if not cases:
            raise PeftkernError(f"--match {job['match']!r}: no case has this in its label")
    except PeftkernError as error:
        _say(events, event="refused", message=str(error))
        return 2
    torch.set_float32_matmul_precision("highest")
    if job["quick"]:  # a second thread costs tiny work more than it saves, most of all where cores are shared
        torch.set_num_threads(1)
    ceilings = _machine.ceilings(device, job["quick"])
    machine = _machine.describe(device) | {"ceilings": _machine.ceilings_dict(ceilings)}
    _say(events, event="machine", machine=machine, cases=[(case.kernel, case.label) for case in cases])
    settings = Settings(job["rounds"], job["least"], job["seconds"], ceilings=ceilings)
    if device.type == "cuda":
        settings.flush = torch.empty(2**26, dtype=torch.int32, device=device)
    return _measure_all(cases, settings, job, events)


def listed(options: Options, only: list[str], method: str | None) -> Iterator[Case]:
    """The cases asked for, of the steps and every op of this folder in turn, so that a budget cuts the tail of each;
    or those of one installed method on the steps."""
    from . import step

    if method is not None:
        yield from step.method_cases(options, method)
        return
    wanted = [name for name in op_names() if not only or "op" in only or name in only]
    sources = [importlib.import_module(f".{name}", __package__) for name in wanted]
    sources = [step, *sources] if not only or "step" in only else sources
    for turn in itertools.zip_longest(*(source.cases(options) for source in sources)):
        yield from (case for case in turn if case is not None)


def op_names() -> list[str]:
    """Files of this folder that time one op."""
    package = importlib.import_module(__package__)
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if not name.startswith(("_", "test_")) and name not in ("step", "conftest")]


def _measure_all(cases: list[Case], settings: Settings, job: dict[str, Any], events: IO[str]) -> int:
    longest = 0.0
    without = {int(index): frozenset(names) for index, names in job["without"].items()}
    for index, case in enumerate(cases):
        if index < job["start"]:
            continue
        if time.time() + longest > job["deadline"]:
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
        longest = max(longest, time.time() - started)
        _say(events, event="rows", case=index, rows=[row.to_dict() for row in rows])
    _say(events, event="end")
    return 0


def _say(events: IO[str], **event: Any) -> None:
    events.write(json.dumps(event) + "\n")
    events.flush()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
