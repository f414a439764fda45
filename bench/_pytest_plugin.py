"""pytest plugin of the benchmark's own test run: the tests of one device, a share of them, outcomes as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

_BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peftkern-bench")
    group.addoption("--bench-device", choices=tuple(_BACKENDS), required=True)
    group.addoption("--bench-shard", default="0/1", help="INDEX/COUNT")
    group.addoption("--bench-report", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA or ROCm device")
    config.pluginmanager.register(_Report(config.getoption("--bench-report")), "peftkern-bench-report")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep this process's share of the device's tests; those that fill the memory run one after the other, in one."""
    index, count = map(int, config.getoption("--bench-shard").split("/"))
    device = config.getoption("--bench-device")
    wanted = [item for item in items if _is_wanted(item, device)]
    large = [item for item in wanted if item.path.name == "test_large.py"]
    others = [item for item in wanted if item.path.name != "test_large.py"]
    items[:] = others[index::count] + (large if index == 0 else [])


def _is_wanted(item: pytest.Item, device: str) -> bool:
    """On cuda what is marked gpu, on the CPU what else tests/gpu holds; every op on the device's backends."""
    marked = item.get_closest_marker("gpu") is not None
    parameters: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("backend") in _BACKENDS[device]:
        return True
    folder = item.path.parent.name
    if device == "cuda":
        return marked or (folder == "kernels" and item.path.name != "test_aot.py")
    return folder == "gpu" and not marked


class _Report:
    """One line for what was collected and one per test, written at once: a killed process leaves what it knew."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._say(collected=len(session.items))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._say(uncollected=report.nodeid, why=_words(report.longrepr))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        why = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            why = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            why = _words(report.longrepr)
        self._say(test=report.nodeid, outcome=report.outcome, why=why, seconds=round(report.duration, 2))

    def _say(self, **line: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _words(representation: Any) -> str:
    """The lines of a traceback that say what went wrong."""
    lines = str(representation).splitlines()
    told = [line.removeprefix("E").strip() for line in lines if line.startswith("E")]
    return " / ".join((told or lines[-1:])[:4])[:400]
