"""The command: reads arguments, builds, tests, has everything measured, and writes the results."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from . import _checks, _readme, _report
from ._sources import root
from ._supervise import Result, supervise

_BUDGET = {"cuda": 450.0, "cpu": 1500.0}
"""Seconds from the start after which no case is begun. On a GPU everything must fit into eight minutes."""
_GRACE = {"cuda": 12.0, "cpu": 300.0}
"""Seconds that the last case may take beyond it before it is killed."""
_BUILD, _CHECK = 0.18, 0.27
"""Shares of the budget that building and the correctness tests may take; what they leave is measured with."""
_PATIENCE = {"cuda": 60.0, "cpu": 300.0}
"""Seconds without a sign of life (a provider built, a case done) after which the measuring process is killed."""
COMPILE = ("none", "auto", "default", "max-autotune-no-cudagraphs")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Exit code 0 when something was measured, 1 when nothing was, 2 for a user's mistake."""
    arguments = _parser().parse_args(argv)
    if arguments.readme is not None:
        return _readme.main(Path(arguments.readme))
    started = time.time()
    if (message := _checks.missing(arguments.device)) is not None:
        print(f"error: {message}", file=sys.stderr)
        return 2
    result = Result(device=arguments.device)
    job = _job(arguments, started)
    if arguments.build:
        result.build = _checks.build(root(), arguments.device, _BUILD * job["budget"])
    if arguments.tests if arguments.tests is not None else arguments.device == "cuda":
        warm = job if arguments.device == "cuda" else None
        result.tests = _checks.check(root(), arguments.device, _CHECK * job["budget"], warm)
    if (message := supervise(job, result, _PATIENCE[arguments.device])) is not None:
        print(f"error: {message}", file=sys.stderr)
        return 2
    result.seconds = time.time() - started
    result.arguments = {key: job[key] for key in ("device", "only", "match", "method", "quick", "compile", "rounds")}
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
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="folder for CSV, JSON and plots (default: bench/results/DEVICE)")
    parser.add_argument(
        "--only", action="append", default=[], choices=("op", "step", *_ops()), help="what to run; may be repeated"
    )
    parser.add_argument("--match", default="", help="only the cases whose label contains this text")
    parser.add_argument("--method", help="an installed method: its default configuration on the step models")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds, without the slow peers")
    parser.add_argument(
        "--compile", choices=COMPILE,
        help="torch.compile as a further peer: of every case in one mode, or (auto, the default on cuda) in both modes "
        "of the first case of each op and of the steps",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=25, help="most rounds per case")
    parser.add_argument("--budget", type=float, help="seconds after which no further case is started")
    parser.add_argument("--build", action=switch, default=True, help="build the extension where it is missing or old")
    parser.add_argument("--tests", action=switch, help="run the device's correctness tests first (default: on cuda)")
    parser.add_argument(
        "--readme", choices=("write", "check"),
        help="measure nothing: write, or check, README's figures from the committed results",
    )  # fmt: skip
    return parser


def _ops() -> list[str]:
    names = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    return [name for name in names if not name.startswith("test_") and name not in ("step", "conftest")]


def _job(arguments: argparse.Namespace, started: float) -> dict[str, Any]:
    device, quick = arguments.device, arguments.quick
    cuda = device == "cuda"
    budget = arguments.budget if arguments.budget is not None else _BUDGET[device]
    return {
        "device": device,
        "only": arguments.only,
        "match": arguments.match,
        "method": arguments.method,
        "quick": quick,
        "compile": arguments.compile or ("auto" if cuda and not quick else "none"),
        "rounds": min(arguments.rounds, 5) if quick else arguments.rounds,
        "least": 2 if quick else min(7, arguments.rounds),
        "seconds": 0.5 if quick else 2.0 if cuda else 8.0,
        "budget": max(budget, 0.0),
        "deadline": started + budget,
        "end": started + budget + _GRACE[device],
        "start": 0,
        "without": {},
    }


def _default_folder() -> Path:
    return Path("bench/results") if Path("bench/_run.py").is_file() else Path("peftkern-bench")
