"""The gate and the clock: what is wrong is not timed, what fails becomes a row, providers take turns.

No test asserts a time.
"""

import math

import pytest
import torch

from bench import _clock, _machine
from bench._clock import Runner
from bench._measure import Case, Ceilings, Cost, Settings, measure, relative_error, verdict
from bench._row import Row, quantiles

WANT = {"y": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}


def runner(values=None, log=None, name="", error=None) -> Runner:
    def forward():
        if log is not None:
            log.append(name)
        if error is not None:
            raise error
        return torch.ones(3, requires_grad=True).exp().sum()

    return Runner(forward, lambda out: out.backward(), None if values is None else lambda: values)


def case(oracle=lambda: WANT, **providers) -> Case:
    cost = {"forward": Cost(10.0, 100.0), "backward": Cost(20.0, 200.0), "full": Cost(30.0, 300.0)}
    config = {"M": 3}
    device = torch.device("cpu")
    return Case("fake", "3", ("M", "rows", 3), config, device, torch.float32, providers, oracle, lambda: cost)


def good() -> Runner:
    return runner({"y": WANT["y"].float()})


SETTINGS = Settings(rounds=3, least=3, ceilings=Ceilings(1e9, {torch.float32: 1e9}))


def by_provider(rows, name):
    return [row for row in rows if row.kernel_provider == name]


def test_measures_every_mode_with_ratios_and_share_of_the_ceiling():
    rows = measure(case(floor=runner, torch=good, peftkern=good), SETTINGS)
    speed = [row for row in by_provider(rows, "peftkern") if row.metric_name == "speed"]
    assert [row.kernel_operation_mode for row in speed] == ["forward", "backward", "full"]
    for row in speed:
        assert row.status == "ok" and row.rounds == 3
        assert set(row.ratios) == {"floor", "torch"}
        assert row.y[1] <= row.y[0] <= row.y[2]
    full = speed[-1]
    assert math.isclose(full.gbps, 300 / (full.y[0] / 1e3) / 1e9)
    assert math.isclose(full.percent_of_floor, 100 * 300 / 1e9 / (full.y[0] / 1e3))


def test_saved_bytes_are_measured():
    rows = measure(case(floor=runner), SETTINGS)
    (saved,) = [row for row in rows if row.metric_name == "memory"]
    assert saved.config["memory"] == "saved for backward" and saved.metric_unit == "MiB"
    assert math.isclose(saved.y[0], 12 / 2**20)


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("out of memory\nmore"), "failed"), (ModuleNotFoundError("No module named 'x'"), "missing")],
)
def test_a_provider_that_cannot_be_built_becomes_a_row(error, status):
    def broken() -> Runner:
        raise error

    rows = measure(case(floor=runner, torch=good, peer=broken, peftkern=good), SETTINGS)
    (row,) = by_provider(rows, "peer")
    assert row.status == status and str(error).splitlines()[0] in row.note and math.isnan(row.y[0])
    assert any(r.status == "ok" and "torch" in r.ratios for r in by_provider(rows, "peftkern"))


def test_a_provider_that_fails_while_it_is_timed_becomes_a_row():
    calls = []

    def fragile() -> Runner:
        def forward():
            calls.append(1)
            if len(calls) > 4:
                raise RuntimeError("kernel failed")
            return torch.ones(1, requires_grad=True).sum()

        return Runner(forward, lambda out: out.backward())

    rows = measure(case(floor=runner, fragile=fragile), SETTINGS)
    assert [row.status for row in by_provider(rows, "fragile") if row.metric_name == "speed"] == ["failed"]
    assert all(row.status == "ok" for row in by_provider(rows, "floor"))


def test_what_fails_the_gate_is_not_timed():
    log: list[str] = []
    wrong = {"y": torch.tensor([1.0, 2.0, 3.1])}
    rows = measure(case(floor=runner, torch=good, peftkern=lambda: runner(wrong, log, "peftkern")), SETTINGS)
    (row,) = by_provider(rows, "peftkern")
    assert row.status == "wrong" and "y is off by" in row.note
    assert log == []


def test_without_a_reference_nothing_is_timed():
    log: list[str] = []

    def broken():
        raise ValueError("no reference")

    rows = measure(case(broken, torch=lambda: runner(WANT, log)), SETTINGS)
    assert [row.status for row in rows] == ["failed"] and log == []


def test_providers_take_turns(monkeypatch):
    monkeypatch.setattr(_clock, "CPU_SAMPLE", 0.0)
    log: list[str] = []
    names = ("floor", "torch", "peftkern")
    providers = {name: lambda name=name: runner(WANT, log, name) for name in names}
    measure(case(**providers), Settings(rounds=6, least=6))
    timed = log[-3 - 18 : -3]  # the last three are the count of saved bytes
    rounds = [timed[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(turn) == sorted(names) for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1


def test_stops_after_its_seconds_but_not_before_the_least_rounds():
    rows = measure(case(floor=runner), Settings(rounds=50, least=2, seconds=0.0))
    assert {row.rounds for row in rows if row.metric_name == "speed"} == {2}


def test_a_provider_that_takes_too_long_is_not_timed():
    rows = measure(case(floor=runner), Settings(rounds=9, longest=0.0))
    (slow,) = [row for row in rows if row.status == "not run"]
    assert slow.kernel_provider == "floor" and "is not timed" in slow.note
    assert not [row for row in rows if row.metric_name == "speed" and row.status == "ok"]


def test_leaves_out_what_it_is_told_to():
    rows = measure(case(floor=runner, torch=good), Settings(rounds=1, least=1, without=frozenset({"torch"})))
    assert not by_provider(rows, "torch")


def test_inference_has_a_forward_only():
    rows = measure(case(floor=lambda: Runner(lambda: torch.ones(2))), SETTINGS)
    assert [(row.kernel_operation_mode, row.config["grad"]) for row in rows] == [("forward", False)]


def test_nan_and_a_missing_value_never_pass():
    nan = {"y": torch.full((3,), math.nan)}
    assert verdict(nan, WANT, {}, torch.float32, strict=False)
    assert verdict({}, WANT, {}, torch.float32, strict=False)
    assert verdict({"y": torch.ones(4)}, WANT, {}, torch.float32, strict=False)
    assert not verdict({"y": WANT["y"].float()}, WANT, {}, torch.float32, strict=True)


def test_our_own_budget_is_twice_the_error_of_pytorch():
    off = {"y": WANT["y"] * (1 + 1e-5)}
    assert verdict(off, WANT, {"y": 1e-6}, torch.float32, strict=True)
    assert not verdict(off, WANT, {"y": 8e-6}, torch.float32, strict=True)
    assert not verdict(off, WANT, {"y": 1e-6}, torch.float32, strict=False)


def test_relative_error():
    assert relative_error(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])) == 1.0


def test_quantiles():
    assert quantiles([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx((3.0, 1.8, 4.2))
    assert quantiles([2.0]) == (2.0, 2.0, 2.0)
    assert all(map(math.isnan, quantiles([])))


def test_rows_survive_json():
    row = Row("k", "p", "full", ratios={"floor": (1.0, 0.9, math.nan)})
    again = Row.from_dict(row.to_dict())
    assert again.ratios["floor"][:2] == (1.0, 0.9) and math.isnan(again.ratios["floor"][2])
    assert math.isnan(again.y[0]) and math.isnan(again.gbps)


@pytest.mark.parametrize(("seconds", "sides"), [(1e-4, [256, 1536]), (1e-2, [256])], ids=["fast", "slow"])
def test_a_product_that_takes_long_is_measured_on_a_small_one(monkeypatch, seconds, sides):
    seen = []
    monkeypatch.setattr(torch, "mm", lambda left, right, out: seen.append(left.shape[0]))
    monkeypatch.setattr(_machine, "_best", lambda run, device: run() or seconds)
    rate = _machine._product_rate(1536, torch.bfloat16, torch.device("cpu"))
    assert list(dict.fromkeys(seen)) == sides and rate == 2 * sides[-1] ** 3 / seconds


@pytest.mark.parametrize("side", [16, 512])
def test_the_ceiling_is_that_of_the_fastest_layout(monkeypatch, side):
    """The large product is measured in that layout alone."""
    seconds = {"NT": 3e-3, "NN": 2e-3, "TN": 4e-3}
    timed = []

    def mm(left, right, out):
        timed.append("".join("N" if matrix.is_contiguous() else "T" for matrix in (left, right)))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(_machine, "_best", lambda run, device: run() or seconds[timed[-1]])
    assert _machine._product_rate(side, torch.float32, torch.device("cpu")) == 2 * side**3 / 2e-3
    assert timed == ["NT", "NN", "TN", *(["NN"] if side == 512 else [])]
