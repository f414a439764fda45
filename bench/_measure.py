"""Correctness gate first, then interleaved timing: the providers of a case take turns, so that noise hits all alike."""

from __future__ import annotations

import gc
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from peftkern.testing.accuracy import MIXED

from ._clock import Runner, TooSlow, Values, peak, timer
from ._row import Quantiles, Row, quantiles

OURS, FLOOR, YARDSTICK = "peftkern", "floor", "torch"
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
MODES = ("forward", "backward", "full")
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Whoever errs more does other work. Gradients at the bottom of six layers in bf16 are off by 3e-2 in plain PyTorch."""


class DeviceLost(RuntimeError):
    """After this error the device answers nothing any more; only a new process can go on."""


@dataclass(frozen=True)
class Options:
    """What the files of ops and steps need to know to list their cases. compile: "none" or a mode of torch.compile."""

    device: torch.device
    quick: bool = False
    compile: str = "none"


@dataclass(frozen=True)
class Cost:
    """Least work of one pass: floating-point operations, and bytes (inputs read once, outputs written once)."""

    flops: float
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def passes(forward: Cost, backward: Cost) -> dict[str, Cost]:
    """By mode."""
    return {"forward": forward, "backward": backward, "full": forward + backward}


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of the machine: copy in bytes/s (read plus written), matrix products in flop/s by dtype."""

    copy: float
    products: Mapping[torch.dtype, float]

    def floor(self, cost: Cost, dtype: torch.dtype) -> float:
        """Seconds below which no implementation gets: the larger of what the bytes and the operations take."""
        return max(cost.bytes / self.copy, cost.flops / self.products[dtype])


@dataclass(frozen=True)
class Gate:
    """A mark that peftkern's time (or, with metric "peak", its peak memory) is held against: reported, never asserted.

    limit is a ratio to the provider `against`, or microseconds where that is "". mode: forward, backward or full.
    """

    limit: float
    mode: str = "full"
    against: str = FLOOR
    metric: str = "speed"


@dataclass(frozen=True)
class Case:
    """Identical work for several providers.

    x is (name, label, value) of the swept size. oracle() is the float64 reference of check(). cost() is the least
    work per mode. limit is short for Gate(limit): the full pass over the floor's. A light case is one cell of the heat
    map: a few rounds and no memory. config may hold "hidden", "tokens" and "rank", the heat map's axes.
    """

    kernel: str
    label: str
    x: tuple[str, str, float]
    config: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype
    providers: Mapping[str, Callable[[], Runner]]
    oracle: Callable[[], Values] | None = None
    cost: Callable[[], Mapping[str, Cost]] = dict
    limit: float | None = None
    gates: Sequence[Gate] = ()
    light: bool = False

    def row(self, provider: str, mode: str = "full", **more: Any) -> Row:
        """An empty row of this case; peftkern's own carries the gates on its mode, a failed one all of them."""
        name, label, value = self.x
        config = {"case": self.label, "dtype": str(self.dtype).removeprefix("torch."), **self.config}
        config |= ({"light": True} if self.light else {}) | more.pop("config", {})
        if provider == OURS:
            metric = "peak" if config.get("memory") == "peak" else more.get("metric_name", "speed")
            failed = more.get("status", "ok") != "ok"
            marks = [*self.gates, *([] if self.limit is None else [Gate(self.limit)])]
            found = [vars(gate) for gate in marks if failed or (gate.mode, gate.metric) == (mode, metric)]
            config |= {"gates": found} if found else {}
        return Row(self.kernel, provider, mode, x_name=name, x_label=label, x_value=value, config=config, **more)


@dataclass
class Settings:
    """At most `rounds` and at least `least` rounds, about `seconds` per case, without the providers in `without`.

    A provider of which one pass takes longer than `longest` seconds is not timed. announce(stage) is told what is about
    to run, so that whoever watches knows what died. A light case has a third of the rounds, and no memory rows. On a
    CPU a case with a gate has at least twice as many: the median of seven ratios of whole steps errs by up to a tenth.
    """

    rounds: int = 25
    least: int = 5
    seconds: float = 4.0
    longest: float = 4.0
    graphs: bool = True
    ceilings: Ceilings | None = None
    without: frozenset[str] = frozenset()
    announce: Callable[[str], None] = lambda stage: None
    flush: Tensor | None = field(default=None, repr=False)


def measure(case: Case, settings: Settings) -> list[Row]:
    """Gate and time every provider of a case; whatever fails becomes a row that says so."""
    if case.light:
        settings = replace(settings, rounds=max(settings.least, settings.rounds // 3), seconds=settings.seconds / 3)
    elif case.device.type == "cpu" and (case.gates or case.limit is not None):
        settings = replace(settings, least=2 * settings.least)
    runners, rows = prepare(case, settings)
    timers: dict[tuple[str, str], Callable[[], tuple[float, float]]] = {}
    launches = ("eager", "graph") if case.device.type == "cuda" and settings.graphs else ("eager",)
    pool = torch.cuda.graph_pool_handle() if "graph" in launches else None
    for name, runner in list(runners.items()):
        settings.announce(name)
        for launch in launches:
            try:
                timers[name, launch] = timer(runner, case.device, launch, settings.flush, pool, settings.longest)
            except Exception as error:
                rows.append(_failed(case, name, error, launch))
    settings.announce("timing")
    samples, failures = _rounds(case, timers, settings)
    for launch in ("eager", "graph"):
        group = {name: taken for (name, kind), taken in samples.items() if kind == launch}
        rows += _speed_rows(case, group, runners, launch, settings.ceilings)
    died = {row.kernel_provider for row in failures}
    whole = {name: runner for name, runner in runners.items() if name not in died and not case.light}
    return rows + failures + _memory_rows(case, whole)


def prepare(case: Case, settings: Settings) -> tuple[dict[str, Runner], list[Row]]:
    """Build every provider and pass it through the gate: those that may be timed, and a row for each that may not."""
    rows: list[Row] = []
    runners: dict[str, Runner] = {}
    values: dict[str, Values] = {}
    for name, build in case.providers.items():
        if name in settings.without:
            continue
        settings.announce(name)
        try:
            runners[name] = build()
            values[name] = (runners[name].check or dict)()
        except Exception as error:
            runners.pop(name, None)
            rows.append(_failed(case, name, error))
    settings.announce("oracle")
    return runners, rows + _gate(case, runners, values)


def _gate(case: Case, runners: dict[str, Runner], values: dict[str, Values]) -> list[Row]:
    """Compare with the float64 reference; who fails leaves `runners`, and a row says by how much.

    peftkern may err twice as much as plain PyTorch does in the same dtypes; peers, which may compute in a lower
    precision by design, need only do the same work.
    """
    rows: list[Row] = []
    if case.oracle is None:
        return rows
    try:
        want = case.oracle()
    except Exception as error:
        row = _failed(case, "float64 reference", error)
        runners.clear()
        return [row]
    own = {key: relative_error(v, want[key]) for key, v in values.get(YARDSTICK, {}).items() if key in want}
    for name in list(runners):
        if runners[name].check is None:
            continue
        if wrong := verdict(values[name], want, own, case.dtype, strict=name == OURS):
            del runners[name]
            rows.append(case.row(name, status="wrong", note="correctness gate: " + "; ".join(wrong)))
    return rows


def verdict(
    got: Values, want: Values, own: Mapping[str, float], dtype: torch.dtype, strict: bool
) -> list[str]:
    """What is wrong with `got`, one line per tensor; `own` is plain PyTorch's error by name (a name with "/..." is
    judged by the one before the slash)."""
    if not got or not set(got) <= set(want) or not {key for key in want if "/" not in key} <= set(got):
        return [f"computes {sorted(got)}, wanted {sorted(want)}"]
    wrong = []
    for key, value in got.items():
        error, loose = relative_error(value, want[key]), _TOLERANCE[dtype]
        budget = own.get(key, own.get(key.split("/")[0], math.inf))
        # A single number may be right in plain PyTorch by chance, so that its error says little.
        rounding = torch.finfo(dtype if value.numel() == 1 else value.dtype).eps
        slack = 8 * torch.finfo(torch.float32).eps + 0.25 * rounding  # sums over thousands of rows, in another order
        slack += MIXED if dtype.itemsize == 2 else 0.0  # f32 adapters of a 16-bit model
        budget = min(2 * budget + slack, loose) if strict else loose
        if not error <= budget:
            wrong.append(f"{key} is off by {error:.1e}, budget {budget:.1e}")
    return wrong


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖ in float64; infinite for another shape, NaN where a NaN is."""
    if got.shape != want.shape:
        return math.inf
    want = want.double()
    return float((got.to(want.device, torch.float64) - want).norm() / want.norm().clamp_min(1e-30))


def _failed(case: Case, name: str, error: Exception, launch: str = "") -> Row:
    """The row of a provider that raised; a device that has died with it is passed on."""
    kinds = {ImportError: "missing", TooSlow: "not run"}
    status = next((status for kind, status in kinds.items() if isinstance(error, kind)), "failed")
    lines = str(error).strip().splitlines() or [""]
    row = case.row(name, status=status, note=f"{type(error).__name__}: {lines[0][:300]}")
    if launch == "graph":
        row.config["launch"] = launch
    error.__traceback__ = None
    _free(case.device, name)
    return row


def _free(device: torch.device, name: str) -> None:
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as lost:
            raise DeviceLost(f"{name}: {lost}") from lost
        torch.cuda.empty_cache()


Samples = dict[tuple[str, str], list[tuple[float, float]]]


def _rounds(
    case: Case, timers: dict[tuple[str, str], Callable[[], tuple[float, float]]], settings: Settings
) -> tuple[Samples, list[Row]]:
    """In each round every provider takes one sample, in an order drawn anew: ratios are formed within a round."""
    samples: Samples = {key: [] for key in timers}
    failures: list[Row] = []
    order, draw = list(timers), random.Random(0)
    started = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for done in range(settings.rounds):
            if done >= settings.least and time.perf_counter() - started > settings.seconds:
                break
            draw.shuffle(order)
            for key in list(order):
                try:
                    samples[key].append(timers[key]())
                except Exception as error:
                    order.remove(key)
                    del samples[key]
                    failures.append(_failed(case, key[0], error, key[1]))
    finally:
        gc.enable()
    return samples, failures


def _speed_rows(
    case: Case,
    samples: dict[str, list[tuple[float, float]]],
    runners: dict[str, Runner],
    launch: str,
    ceilings: Ceilings | None,
) -> list[Row]:
    rows: list[Row] = []
    costs = _costs(case) if samples else {}
    inference = all(runner.backward is None for runner in runners.values())
    for mode in MODES[:1] if inference else MODES:
        times = {name: [_of_mode(sample, mode) for sample in taken] for name, taken in samples.items()}
        for name, taken in times.items():
            others = {other: _ratio(taken, theirs) for other, theirs in times.items() if other != name}
            row = case.row(name, mode, y=quantiles([1e3 * t for t in taken]), ratios=others)
            row.backend, row.rounds = runners[name].backend, len(taken)
            if inference:
                row.config["grad"] = False
            if case.device.type == "cuda":
                row.config["launch"] = launch
            cost = costs.get(mode)
            if cost is not None and row.y[0]:
                seconds = row.y[0] / 1e3
                row.gbps, row.tflops = cost.bytes / seconds / 1e9, cost.flops / seconds / 1e12
                if ceilings is not None:
                    row.percent_of_floor = 100 * ceilings.floor(cost, case.dtype) / seconds
            rows.append(row)
    return rows


def _costs(case: Case) -> Mapping[str, Cost]:
    """The least work by mode; nothing where it cannot be counted, which says nothing about the times."""
    try:
        return case.cost()
    except Exception as error:
        print(f"{case.label}: work not counted: {error}", file=sys.stderr)
        return {}


def _of_mode(sample: tuple[float, float], mode: str) -> float:
    return sum(sample) if mode == "full" else sample[MODES.index(mode)]


def _ratio(taken: list[float], theirs: list[float]) -> Quantiles:
    return quantiles([mine / other for mine, other in zip(taken, theirs, strict=True) if other > 0])


def _memory_rows(case: Case, runners: dict[str, Runner]) -> list[Row]:
    """Bytes that forward saves for backward, parameters not counted, and on CUDA the peak above what lies there."""
    from peftkern.memory import saved_bytes

    rows: list[Row] = []
    for name, runner in runners.items():
        if runner.backward is None:
            continue
        try:
            taken = {"saved for backward": ("forward", saved_bytes(runner.forward, list(runner.parameters)))}
            if case.device.type == "cuda":
                taken["peak"] = ("full", peak(runner))
        except Exception as error:
            rows.append(_failed(case, name, error))
            continue
        for what, (mode, size) in taken.items():
            row = case.row(name, mode, metric_name="memory", metric_unit="MiB", config={"memory": what})
            row.y, row.backend = (size / 2**20,) * 3, runner.backend
            rows.append(row)
    for row in rows:
        others = [o for o in rows if o.config.get("memory") == row.config.get("memory") and o is not row]
        row.ratios = {o.kernel_provider: (row.y[0] / o.y[0],) * 3 for o in others if row.y[0] >= 0 and o.y[0] > 0}
    return rows
