"""The work itself: every provider of every case passes the gate; GPU shapes can be listed anywhere."""

import dataclasses

import pytest
import torch

import peftkern as pk
from bench import _models, _worker, step
from bench._measure import Options, Settings, measure, prepare

CPU = Options(torch.device("cpu"), quick=True)
FULL = dataclasses.replace(CPU, quick=False)
TINY = [model for model, _ in _models.models(CPU)]
SETTINGS = Settings(rounds=1, least=1, seconds=0.0)


OPS = list(_worker.listed(CPU, ["op"], None))


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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_labels_tell_cases_apart(device):
    cases = list(_worker.listed(Options(torch.device(device)), [], None))
    labels = [(case.kernel, case.label) for case in cases]
    assert len(labels) == len(set(labels))
    assert {case.kernel for case in cases} == {"step", *_worker.op_names()}


def test_the_gate_on_lora_belongs_to_the_small_bert():
    limits = {case.label: case.limit for case in step.cases(FULL) if case.limit is not None}
    assert limits == {"bert-6x384 lora all p0.1 f32": 1.25, "bert-6x384 lora all p0.1 bf16": 1.35}
