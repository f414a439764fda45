"""The work itself: every provider of every case passes the gate; GPU shapes can be listed anywhere."""

import dataclasses

import pytest
import torch

import peftkern as pk
from bench import _cases, _decode, _models, step
from bench._measure import Options, Settings, measure, prepare

CPU = Options(torch.device("cpu"), quick=True)
FULL = dataclasses.replace(CPU, quick=False)
TINY = [model for model, _ in _models.models(CPU)]
SETTINGS = Settings(rounds=1, least=1, seconds=0.0)


OPS = list(_cases.listed(CPU, ["op"], None))


@pytest.mark.parametrize("case", OPS, ids=lambda case: f"{case.kernel}-{case.label}")
def test_every_provider_of_an_op_passes_the_gate(case):
    runners, rows = prepare(case, SETTINGS)
    assert not rows, [row.note for row in rows]
    assert set(runners) == set(case.providers)


@pytest.mark.parametrize("model", TINY, ids=lambda model: model.name)
@pytest.mark.parametrize("method", step.METHODS, ids=lambda method: method.label)
def test_every_provider_of_a_step_does_identical_work(model, method):
    pytest.importorskip("peft")
    case = step._case(FULL, model, method, torch.float32)
    runners, rows = prepare(case, SETTINGS)
    rows = [row for row in rows if (row.kernel_provider, row.status) != ("adapterhub", "missing")]
    assert not rows, [(row.kernel_provider, row.note) for row in rows]
    assert {"floor", "torch", "peftkern"} <= set(runners)


def test_bf16_step_passes_the_gate():
    case = step._case(CPU, TINY[1], step.METHODS[0], torch.bfloat16)
    assert not prepare(case, SETTINGS)[1]


def test_the_floor_trains_nothing():
    runner = step._floor(CPU, TINY[0], torch.float32)
    runner.backward(runner.forward())
    assert all(parameter.grad is None for parameter in runner.parameters)


@pytest.mark.parametrize("name", ["bitfit", "head"])
def test_any_method_can_be_timed_by_its_name(name):
    case = next(iter(step.method_cases(CPU, name)))
    rows = measure(case, SETTINGS)
    assert {row.status for row in rows} == {"ok"}, [row.note for row in rows]
    assert any("floor" in row.ratios for row in rows if row.kernel_provider == "peftkern")


def test_unknown_method_raises_before_anything_is_built():
    with pytest.raises(pk.errors.UnknownMethodError, match="bitfti"):
        list(step.method_cases(CPU, "bitfti"))


def test_the_decode_step_passes_the_gate_and_leaves_its_cache_alone():
    pytest.importorskip("peft")
    (case,) = _decode.cases(dataclasses.replace(CPU, quick=False))
    small = dataclasses.replace(_models.decoder(CPU))
    providers = {
        name: (lambda kind=kind: _decode._runner(CPU, small, torch.bfloat16, kind))
        for name, kind in (("torch", "plain"), ("peftkern", "ours"), ("addmm", "addmm"), ("peft", "peft"))
    }
    assert set(providers) | {"floor"} == set(case.providers)
    oracle = lambda: _decode._reference(CPU, small, torch.bfloat16)  # noqa: E731
    runners, rows = prepare(dataclasses.replace(case, providers=providers, oracle=oracle), SETTINGS)
    assert not rows and set(runners) == set(providers), [row.note for row in rows]
    runner = runners["peftkern"]
    first = runner.check()["y"]
    runner.reset()
    runner.forward()
    assert torch.equal(runner.check()["y"], first)
