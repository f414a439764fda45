"""Before anything is measured: the extension is built, the correctness tests of the device run, caches are warmed."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ._supervise import environment

_MOST_FAILURES = 20
_COMPILING = 0.5
"""Share of the time for the tests that compiling for them may take."""


def missing(device: str) -> str | None:
    """Why there is nothing to measure on, asked in another process: this one never loads torch."""
    if device == "cpu":
        return None
    script = "import torch; raise SystemExit(0 if torch.cuda.is_available() else 9)"
    code = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True).returncode
    return "--device cuda: torch sees no CUDA device" if code == 9 else None


def build(folder: Path, device: str, seconds: float) -> dict[str, Any]:
    """Compile what is missing or older than its sources (setup.py decides): outcome, what it said, seconds.

    outcome: "built", "up to date", "failed", "stopped after N s" or "not run". The benchmark goes on whatever it is.
    """
    if not (folder / "setup.py").is_file():
        return {"outcome": "not run", "summary": "an installed package, not a checkout", "seconds": 0.0}
    print("building the extension ...", file=sys.stderr, flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    begin = time.time()
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds)
        outcome, text = "failed" if done.returncode else "up to date", done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        outcome, text = f"stopped after {seconds:.0f} s", ""
    said = [line.removeprefix("peftkern: ") for line in text.splitlines() if line.startswith("peftkern: ")]
    if any("was not built" in line for line in said):
        outcome = "failed"
    elif outcome == "up to date" and any(line.startswith("building") for line in said):
        outcome = "built"
    elif outcome == "failed":
        said += [line for line in text.splitlines() if line.strip()][-1:]
    if device == "cuda" and not list((folder / "peftkern").glob("_cuda*.so")):
        said.append("peftkern/_cuda is not there (it needs nvcc and a CUDA build of torch): Triton serves its ops")
    return {"outcome": outcome, "summary": "; ".join(said), "seconds": round(time.time() - begin, 1)}


def check(folder: Path, device: str, seconds: float, job: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the device's correctness tests of a checkout in several processes, for `seconds` at most.

    On "cuda": what is marked gpu, and every op on the triton and cuda backends, after all cores have compiled what they
    launch; on "cpu" every op on the cpu backend and what of the GPU tests runs there. With `job`, further processes
    meanwhile run every case of the benchmark once, so that Triton and torch.compile find their caches filled when the
    clock runs.
    """
    tests = folder / "tests"
    # site-packages may hold a folder named tests that is somebody else's.
    checkout = tests.is_dir() and (folder / "setup.py").is_file()
    if not checkout or importlib.util.find_spec("pytest") is None:
        why = "pytest is not installed" if checkout else "an installed package, not a checkout"
        return {"outcome": "not run", "summary": why, "failures": [], "seconds": 0.0}
    print("correctness tests ...", file=sys.stderr, flush=True)
    begin = time.time()
    cores = os.cpu_count() or 1
    shards = max(1, min(10, cores * 2 // 3)) if device == "cuda" else 1
    compilers = [_helper("_compile", f"{index}/{cores}") for index in range(cores if device == "cuda" else 0)]
    for process in compilers:
        _wait(process, begin + _COMPILING * seconds)
    with tempfile.TemporaryDirectory() as scratch:
        reports = [Path(scratch) / f"{index}.jsonl" for index in range(shards)]
        processes = [_pytest(folder, device, f"{index}/{shards}", report) for index, report in enumerate(reports)]
        count = -(-shards // 2) if job is not None else 0
        helpers = [_helper("_worker", json.dumps(job | {"warm": [index, count]})) for index in range(count)]
        codes = [_wait(process, begin + seconds) for process in processes]
        for process in helpers:
            _wait(process, begin + seconds)
        found = [_read(report) for report in reports]
    return _verdict(found, codes, seconds) | {"seconds": round(time.time() - begin, 1)}


def _pytest(folder: Path, device: str, shard: str, report: Path) -> subprocess.Popen[bytes]:
    # No addopts: the strictness of the project's own settings would ask for its pytest plugins.
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", f"{__package__}._pytest_plugin"]
    # A machine that is lent has seldom everything that the other tests import.
    options += ["--continue-on-collection-errors"]
    options += [f"--bench-device={device}", f"--bench-shard={shard}", f"--bench-report={report}"]
    command = [sys.executable, "-m", "pytest", *options, str(folder / "tests")]
    path = os.pathsep.join([str(folder), environment()["PYTHONPATH"]])
    return subprocess.Popen(
        command, cwd=folder, env=environment() | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _helper(module: str, argument: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"{__package__}.{module}", argument]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _wait(process: subprocess.Popen[bytes], until: float) -> int | None:
    """Exit code, or None when the time was up and the process was killed."""
    try:
        return process.wait(timeout=max(0.0, until - time.time()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def _read(report: Path) -> list[dict[str, Any]]:
    """The report's lines; the last one may have been cut off."""
    lines = report.read_text("utf-8").splitlines(keepends=True) if report.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _verdict(found: list[list[dict[str, Any]]], codes: list[int | None], seconds: float) -> dict[str, Any]:
    collected = sum(line["collected"] for lines in found for line in lines if "collected" in line)
    tests = [line for lines in found for line in lines if "test" in line]
    counts = collections.Counter(line["outcome"] for line in tests)
    reasons = collections.Counter(line["why"] for line in tests if line["outcome"] == "skipped")
    uncollected = {line["uncollected"]: line["why"] for lines in found for line in lines if "uncollected" in line}
    failures = [f"{line['test']}: {line['why']}" for line in tests if line["outcome"] == "failed"]
    if failures:
        outcome = "failed"
    elif None in codes:
        outcome = f"stopped after {seconds:.0f} s"
    elif any(code not in (0, 1, 5) for code in codes):
        outcome = "failed: pytest ended with exit code " + ", ".join(str(code) for code in codes if code not in (0, 5))
    else:
        outcome = "passed" if counts["passed"] else "no test ran"
    return {
        "outcome": outcome,
        "summary": ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
        + f" of {collected}"
        + (f"; {len(uncollected)} files could not be collected" if uncollected else ""),
        "failures": failures[:_MOST_FAILURES],
        "skipped": dict(reasons.most_common(10)),
        "uncollected": uncollected,
    }
