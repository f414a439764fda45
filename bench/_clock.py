"""Taking one sample of one provider: wall clock on the CPU, events and CUDA graphs on a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Values = dict[str, Tensor]
CPU_SAMPLE = 2e-3
"""A sample on the CPU repeats a short call until it lasts about this many seconds."""


@dataclass
class Runner:
    """One provider's work on one case, ready to be called again and again.

    forward() returns what backward() is given; no backward means inference. check() returns outputs and gradients by
    name, with dropout off, for the gate; None where there is nothing to compare (the floor). reset() runs untimed
    before each pass. parameters are not counted in the bytes that are saved for backward. sample(), of a provider in a
    process of its own, takes one sample on that process's own clock.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None
    check: Callable[[], Values] | None = None
    reset: Callable[[], None] = lambda: None
    backend: str = ""
    parameters: Sequence[Any] = ()
    sample: Callable[[], tuple[float, float]] | None = None


class TooSlow(RuntimeError):
    """One pass takes so long that timing it would use up the time of many cases."""


def timer(
    runner: Runner, device: torch.device, launch: str, flush: Tensor | None, pool: Any = None, longest: float = math.inf
) -> Callable[[], tuple[float, float]]:
    """A warmed-up function that takes one sample: seconds of forward and of backward.

    Graphs with the same `pool` share their memory: they run one at a time, and nobody reads what they leave.
    Raises TooSlow where the first pass takes more than `longest` seconds.
    """
    if launch == "graph":
        return _graph_timer(runner, flush, pool)
    started = time.perf_counter()
    one_pass(runner)
    if (seconds := time.perf_counter() - started) > longest:
        raise TooSlow(f"one pass took {seconds:.1f} s; what takes more than {longest:g} s is not timed")
    for _ in range(1 if device.type == "cpu" else 4):
        one_pass(runner)
    if runner.sample is not None:
        return runner.sample
    if device.type == "cuda":
        return lambda: _cuda_sample(runner, flush)
    inner = max(1, min(1000, math.ceil(CPU_SAMPLE / max(sum(_cpu_sample(runner, 1)), 1e-7))))
    return lambda: _cpu_sample(runner, inner)


def one_pass(runner: Runner) -> None:
    """Forward, and backward where there is one."""
    runner.reset()
    out = runner.forward()
    if runner.backward is not None:
        runner.backward(out)


def _cpu_sample(runner: Runner, inner: int) -> tuple[float, float]:
    forward = backward = 0.0
    for _ in range(inner):
        runner.reset()
        start = time.perf_counter()
        out = runner.forward()
        middle = time.perf_counter()
        if runner.backward is not None:
            runner.backward(out)
            backward += time.perf_counter() - middle
        forward += middle - start
        del out
    return forward / inner, backward / inner


def _cuda_sample(runner: Runner, flush: Tensor | None) -> tuple[float, float]:
    """From an idle device with a cold L2 cache, so that the latency of launches counts as it does for a user."""
    runner.reset()
    start, middle, end = (_event() for _ in range(3))
    if flush is not None:
        flush.zero_()
    torch.cuda.synchronize()
    start.record()
    out = runner.forward()
    middle.record()
    if runner.backward is not None:
        runner.backward(out)
    end.record()
    end.synchronize()
    return start.elapsed_time(middle) / 1e3, (middle.elapsed_time(end) / 1e3 if runner.backward is not None else 0.0)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _graph_timer(runner: Runner, flush: Tensor | None, pool: Any) -> Callable[[], tuple[float, float]]:
    """CUDA graphs of forward and of forward with backward; backward is their difference."""
    graphs = [_capture(runner, runner.forward, pool)]
    backward = runner.backward
    if backward is not None:
        graphs.append(_capture(runner, lambda: backward(runner.forward()), pool))

    def sample() -> tuple[float, float]:
        seconds = []
        for graph in graphs:
            start, end = _event(), _event()
            if flush is not None:
                flush.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        return seconds[0], max(seconds[-1] - seconds[0], 0.0)

    return sample


def _capture(runner: Runner, run: Callable[[], Any], pool: Any) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            runner.reset()
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    runner.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    runner.reset()  # gradients are memory of the pool: the next graph may have it
    return graph


def peak(runner: Runner) -> int:
    """Bytes of device memory that one pass needs: the runner's own parameters, and all above what is there already."""
    torch.cuda.synchronize()
    runner.reset()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    one_pass(runner)
    torch.cuda.synchronize()
    weights = {parameter.data_ptr(): parameter.numel() * parameter.element_size() for parameter in runner.parameters}
    return torch.cuda.max_memory_allocated() - before + sum(weights.values())
