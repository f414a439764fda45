"""The clock's way on a GPU, with torch.cuda played by the CPU: events, graphs, peaks, lost devices, memory given back.

What only a GPU can show (that kernels can be captured, that streams order them) is in tests/gpu.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import time
from types import SimpleNamespace

import pytest
import torch

from bench import _cases, _machine, _run, _worker
from bench._clock import Runner
from bench._measure import Case, Ceilings, Cost, DeviceLost, Gate, Settings, measure

CUDA = torch.device("cuda")
FLUSH = torch.zeros(8)


class Event:
    def __init__(self, enable_timing=False):
        assert enable_timing
        self.at = None

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class Stream:
    def wait_stream(self, other):
        pass


class FakeCuda:
    """Graphs replay nothing; a pass takes 100 bytes."""

    def __init__(self):
        self.log = []
        self.pools = set()
        self.capturing = False

    @contextlib.contextmanager
    def graph(self, graph, pool=None):
        self.pools.add(pool)
        self.log.append("capture")
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def install(self, monkeypatch):
        log = self.log
        fakes = {
            "Event": Event,
            "Stream": Stream,
            "current_stream": lambda *_: Stream(),
            "stream": lambda _: contextlib.nullcontext(),
            "synchronize": lambda *_: None,
            "graph": self.graph,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: log.append("replay")),
            "graph_pool_handle": lambda: (0, len(log)),
            "memory_allocated": lambda *_: 1000,
            "max_memory_allocated": lambda *_: 1100,
            "reset_peak_memory_stats": lambda *_: None,
            "empty_cache": lambda: log.append("empty"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.fixture
def cuda(monkeypatch):
    found = FakeCuda()
    found.install(monkeypatch)
    return found


def runner() -> Runner:
    weight = torch.ones(3, requires_grad=True)

    def forward():
        return (weight * 2).sum()

    def reset():
        weight.grad = None

    return Runner(forward, lambda out: out.backward(), reset=reset, parameters=(weight,))


def case(**providers) -> Case:
    cost = {mode: Cost(10.0, 100.0) for mode in ("forward", "backward", "full")}
    gates = [Gate(1.0, "forward"), Gate(0.8, "full", "peft", "peak")]
    where = ("M", "rows", 3)
    return Case("fake", "3", where, {}, CUDA, torch.float32, providers, None, lambda: cost, gates=gates)


SETTINGS = Settings(rounds=3, least=3, ceilings=Ceilings(1e9, {torch.float32: 1e9}), flush=FLUSH)


def test_eager_and_graph_are_timed_side_by_side(cuda):
    rows = measure(case(floor=runner, peftkern=runner), SETTINGS)
    speed = [row for row in rows if row.metric_name == "speed"]
    assert {row.status for row in rows} == {"ok"}, [row.note for row in rows]
    found = {(row.kernel_provider, row.config["launch"], row.kernel_operation_mode) for row in speed}
    assert len(found) == len(speed) == 2 * 2 * 3
    assert all(row.rounds == 3 and set(row.ratios) <= {"floor", "peftkern"} for row in speed)
    # Two graphs per provider, forward and both, replayed once per round; they share one pool.
    assert cuda.log.count("capture") == 4 and cuda.log.count("replay") == 4 * 3
    assert len(cuda.pools) == 1 and None not in cuda.pools


def test_the_peak_counts_the_weights_and_is_set_against_peers(cuda):
    rows = measure(case(floor=runner, peft=runner, peftkern=runner), SETTINGS)
    (peak,) = [r for r in rows if r.config.get("memory") == "peak" and r.kernel_provider == "peftkern"]
    assert peak.y[0] * 2**20 == 100 + 12
    assert peak.ratios["peft"] == (1.0, 1.0, 1.0) and peak.config["gates"][0]["metric"] == "peak"


def test_what_cannot_be_captured_is_still_timed_eagerly(cuda):
    """A forward that asks the device for a value: capturing raises, as CUDA does."""
    made = runner()

    def forward():
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return made.forward()

    rows = measure(case(floor=runner, picky=lambda: dataclasses.replace(made, forward=forward)), SETTINGS)
    picky = [row for row in rows if row.kernel_provider == "picky" and row.metric_name == "speed"]
    assert {(row.status, row.config.get("launch")) for row in picky} == {("ok", "eager"), ("failed", "graph")}
    assert any("capturing" in row.note for row in picky)


def test_a_lost_device_ends_the_process_and_not_the_run(cuda, monkeypatch):
    def illegal():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def dead(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def bad() -> Runner:
        monkeypatch.setattr(torch.cuda, "synchronize", dead)
        illegal()

    with pytest.raises(DeviceLost, match="bad: CUDA error"):
        measure(case(floor=runner, bad=bad), SETTINGS)


def test_memory_is_given_back_between_cases(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_machine, "ceilings", lambda device, quick: SETTINGS.ceilings)
    monkeypatch.setattr(_machine, "describe", lambda device: {"device": device.type})
    monkeypatch.setattr(_worker.torch, "empty", lambda *size, **_: FLUSH)
    listed = [dataclasses.replace(case(floor=runner), label=str(index)) for index in range(3)]
    monkeypatch.setattr(_cases, "listed", lambda *_: iter(listed))
    job = _run._job(_run._parser().parse_args(["--device", "cuda", "--quick"]), time.time())
    out, threads = io.StringIO(), torch.get_num_threads()
    assert _worker.run(job, out) == 0
    torch.set_num_threads(threads)
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["case"] for event in events if event["event"] == "rows"] == [0, 1, 2]
    assert cuda.log.count("empty") == 3
