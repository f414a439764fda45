"""Which cases there are and when they run: the most telling first, every op and model in turn."""

import dataclasses

import pytest
import torch

from bench import _cases, _models, step
from bench._measure import Options

CPU = Options(torch.device("cpu"), quick=True)
FULL = dataclasses.replace(CPU, quick=False)
GPU = Options(torch.device("cuda"))


def test_gates_belong_to_the_shapes_they_were_set_for():
    found = {case.label: [gate.limit for gate in case.gates] for case in step.cases(FULL) if case.gates}
    assert found == {
        "bert-6x384 lora all p0.1 f32": [1.12], "bert-6x384 lora all p0.1 bf16": [1.20],
        "bert-6x384 lora q,v p0.1 f32": [1.06], "bert-6x384 lora q,v p0.1 bf16": [1.08],
        "bert-6x384 dora all p0.1 f32": [1.20], "bert-6x384 dora all p0.1 bf16": [1.30],
        "bert-6x384 bottleneck p0 f32": [1.0], "bert-6x384 bottleneck p0 bf16": [1.0],
        "bert-6x384 bottleneck p0.1 f32": [1.0], "bert-6x384 bottleneck p0.1 bf16": [1.0],
    }  # fmt: skip
    ((call, gates),) = ((case.label, case.gates) for case in _cases.listed(FULL, ["overhead"], None) if case.gates)
    assert call == "call no grad 1x64->64 r8 f32" and [(gate.limit, gate.against) for gate in gates] == [(25.0, "")]
    gated = {case.label: case.gates for case in _cases.listed(GPU, [], None) if case.gates}
    assert {gate.against for gate in gated["llama-8b-layers lora all p0.1 bf16"]} == {"peft"}
    assert {gate.metric for gate in gated["llama-8b-layers lora all p0.1 bf16"]} == {"speed", "peak"}
    assert [gate.limit for gate in gated["8192x4096->4096 r16 p0.1 bf16/f32"]] == [1.09, 1.18]
    assert [gate.limit for gate in gated["8192x4096-64 p0.1 bf16/f32"]] == [50.0, 66.0]
    assert [gate.limit for gate in gated["4096x4096 r16 bf16"]] == [15.0]


def test_our_rows_carry_their_gates():
    case = next(case for case in _cases.listed(GPU, ["low_rank"], None) if case.gates)
    assert [gate["limit"] for gate in case.row("peftkern", "forward").config["gates"]] == [1.09]
    assert "gates" not in case.row("peftkern", "full").config and "gates" not in case.row("torch", "forward").config
    assert len(case.row("peftkern", status="failed").config["gates"]) == 2


@pytest.mark.parametrize("name", _cases.op_names())
def test_every_op_spans_the_sweep_on_a_gpu(name):
    """What CONTRIBUTING asks of bench/OP.py: gated shapes first, few cases, the heat map's axes."""
    cases = [case for case in _cases.listed(GPU, [name], None) if case.kernel == name]
    assert cases and len(cases) <= 60
    assert "torch" in cases[0].providers
    for case in cases:
        assert {"floor", "peftkern"} <= set(case.providers), case.label
        assert not (case.light and set(case.providers) - {"floor", "torch", "peftkern"}), case.label
    firsts = [index for index, case in enumerate(cases) if case.gates]
    assert not firsts or min(firsts) == 0


@pytest.mark.parametrize("name", ["low_rank", "bottleneck"])
def test_the_heat_map_spans_hidden_tokens_and_rank(name):
    cells = [case.config for case in _cases.listed(GPU, [name], None) if case.light]
    for axis, ends in (("hidden", (768, 8192)), ("tokens", (128, 16384)), ("rank", (16, 256))):
        values = {config[axis] for config in cells}
        assert set(ends) <= values and len(values) >= 3, axis


def test_steps_and_ops_take_turns_and_every_model_comes_before_the_next_method():
    cases = list(_cases.listed(GPU, [], None, "auto"))
    sources = 1 + len(_cases.op_names())
    assert {case.kernel for case in cases[:sources]} == {"step", *_cases.op_names()}
    steps = [case.label for case in cases if case.kernel == "step" and " vs " not in case.label]
    assert "decode" in steps[1]
    *large, small = (model.name for model, _ in _models.models(GPU))
    found = [label.split()[0] for label in (steps[0], *steps[2:])]
    assert found[: len(large)] == large and found[-1] == small
    assert steps[len(large) + 1].startswith(f"{large[0]} lora all p0 ")  # the one with a gate
    light = [index for index, case in enumerate(cases) if case.light]
    assert light[0] >= 3 * 2


def test_compiled_peers_come_as_cases_of_their_own():
    cases = list(_cases.listed(GPU, [], None, "auto"))
    compiled = {case.label: set(case.providers) for case in cases if " vs " in case.label}
    for source in ("8192x4096->4096 r16 p0.1 bf16/f32", "llama-8b-layers lora all p0.1 bf16"):
        assert {"torch", "peftkern", "torch.compile"} <= compiled[f"{source} vs torch.compile"]
        found = compiled[f"{source} vs torch.compile max-autotune"]
        assert "torch.compile max-autotune" in found and "torch.compile" not in found
    assert cases[-1].label == "llama-8b-layers lora all p0.1 bf16 vs torch.compile max-autotune"
    assert not any("vs" in case.label.split() for case in _cases.listed(GPU, [], None, "none"))


def test_one_mode_can_be_asked_for_in_every_case():
    cases = [case for case in _cases.listed(CPU, ["low_rank", "bottleneck"], None, "default") if not case.light]
    assert cases and all("torch.compile" in case.providers for case in cases)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_labels_tell_cases_apart(device):
    cases = list(_cases.listed(Options(torch.device(device)), [], None, "auto"))
    labels = [(case.kernel, case.label) for case in cases]
    assert len(labels) == len(set(labels))
    assert {case.kernel for case in cases} == {"step", *_cases.op_names()}


def test_a_peer_that_patches_others_waits_for_the_end(monkeypatch):
    monkeypatch.setattr(_cases, "_is_installed", lambda package: package == "unsloth")
    cases = list(_cases.listed(GPU, [], None))
    with_it = [index for index, case in enumerate(cases) if "unsloth" in case.providers]
    assert with_it == [len(cases) - 2, len(cases) - 1]
    assert {cases[index].kernel for index in with_it} == {"step", "low_rank"}
    assert {"torch", "peftkern", "unsloth"} <= set(cases[-1].providers)
