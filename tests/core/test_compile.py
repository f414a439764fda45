"""torch.compile: no graph break, no recompilation when the batch grows, dropout, switching and merging."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import peftkern as pk
from peftkern import registry
from peftkern.adapter import AdapterConfig, LayerAdapter
from peftkern.attachment import state
from peftkern.testing import relative_error, tiny_bert, tiny_gpt2, tiny_llama, token_batch
from peftkern.testing.case import move, own_parameters, switch_checkpointing

CASES = {
    "lora-llama": (
        lambda: tiny_llama(num_hidden_layers=1),
        lambda: pk.LoraConfig(target_modules="all-linear", lora_dropout=0.1, init_lora_weights=False),
    ),
    "adapter-bert": (
        lambda: tiny_bert(num_hidden_layers=1),
        lambda: pk.BottleneckConfig(placement="parallel", dropout=0.1),
    ),
    "prompt-gpt2": (lambda: tiny_gpt2(n_layer=1), lambda: pk.PromptTuningConfig(num_virtual_tokens=3)),
}
FAMILIES = {"bert": (tiny_bert, 5), "llama": (tiny_llama, 61)}
"""Builders and the number of labels of their batches."""
LAYERED = {name: {} for name in registry.names() if issubclass(registry.load(name), LayerAdapter)}
LAYERED |= {"dora": {"use_dora": True}}
"""Every method that runs inside the layers, by name; and forms of them."""
FORM_OF = {"dora": "lora"}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def counted(model: nn.Module, dynamic: bool | None = None):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic), counter


@pytest.mark.parametrize("case", CASES)
def test_one_graph_for_all_batch_sizes(case: str) -> None:
    """Compiled once, and once more when the first change of size makes sizes symbolic; then never again."""
    build, config = CASES[case]
    model = pk.attach(build(), config()).eval()
    compiled, counter = counted(model)
    # PyTorch compiles the hooks of the outermost module apart; that of prompts, for labels, has tensors in it.
    graphs = 2 if case.startswith("prompt") else 1
    for rows, length in ((2, 6), (3, 7), (5, 9), (4, 12), (7, 5)):
        batch = token_batch(rows, length, labels=5)
        want = model(**batch)
        got = compiled(**batch)
        assert relative_error(got.logits, want.logits) < 1e-5
    assert counter.frame_count <= 2 * graphs, f"{counter.frame_count} graphs for five batch sizes"


def with_dropout(name: str) -> AdapterConfig:
    """The configuration of a method, or a form of one, with every dropout it has at 0.1."""
    kind = registry.load(FORM_OF.get(name, name)).Config
    dropouts = [field.name for field in fields(kind) if field.name.endswith("dropout")]
    return kind(**dict.fromkeys(dropouts, 0.1) | LAYERED[name])


def step(model: nn.Module, run: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one training step, its masks drawn from a fixed seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    loss = run(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", LAYERED)
def test_one_graph_trains_on_batches_of_every_size(method: str, family: str) -> None:
    """Forward and backward with dropout: no break, compiled once for all batch sizes and lengths, equal to eager."""
    build, labels = FAMILIES[family]
    model = pk.attach(build(num_hidden_layers=1), with_dropout(method)).train()
    move(own_parameters(model).values(), 1)
    compiled, counter = counted(model)
    for rows, length in ((2, 6), (3, 7), (4, 12)):
        batch = token_batch(rows, length, labels=labels)
        loss, gradients = step(model, model, batch)
        for value in batch.values():
            for dim in (0, 1):
                torch._dynamo.mark_dynamic(value, dim)
        got_loss, got = step(model, compiled, batch)
        torch.testing.assert_close(got_loss, loss)
        assert set(got) == set(gradients) and gradients, "trained parameters"
        for name, want in gradients.items():
            assert relative_error(got[name], want) < 1e-4, f"{rows} x {length}: {name}"
    assert counter.frame_count == 1, f"{counter.frame_count} graphs for three batch sizes"


def test_dropout_in_a_compiled_layer() -> None:
    """Masks change from call to call and repeat with the seed; backward uses the mask of its own forward."""
    model = nn.ModuleDict({"it": nn.Linear(64, 16, bias=False)})
    pk.attach(model, pk.LoraConfig(target_modules=["it"], r=16, lora_alpha=16, lora_dropout=0.5)).train()
    a, b = state(model).parameters_of(model, "default").values()
    with torch.no_grad():
        model["it"].base_layer.weight.zero_()
        b.copy_(torch.eye(16))  # so that y is h = A drop(x) itself
    compiled, counter = counted(model["it"])
    x = torch.randn(5, 64)

    def run() -> tuple[Tensor, Tensor]:
        b.grad = None
        y = compiled(x)
        y.sum().backward()
        return y.detach(), b.grad

    torch.manual_seed(1)
    (y1, d1), (y2, _) = run(), run()
    torch.manual_seed(1)
    y3, d3 = run()
    assert not torch.equal(y1, y2)
    assert torch.equal(y1, y3) and torch.equal(d1, d3)
    torch.testing.assert_close(d1, y1.sum(0).expand(16, -1))
    mean = torch.stack([compiled(x).detach() for _ in range(1000)]).mean(0)
    assert relative_error(mean, x @ a.T) < 0.15
    assert counter.frame_count == 1


def test_switching_disabling_and_merging_a_compiled_model() -> None:
    model = tiny_bert(num_hidden_layers=1)
    for name in ("one", "two"):
        pk.attach(model, pk.LoraConfig(init_lora_weights=False), name)
    compiled, _ = counted(model)
    batch = token_batch(labels=5)

    def same(what: str) -> None:
        with torch.no_grad():
            assert relative_error(compiled(**batch).logits, model(**batch).logits) < 1e-5, what

    same("first")
    for names in ("two", ["one", "two"]):
        pk.set_adapter(model, names)
        same(str(names))
    pk.set_adapter(model, "one")
    with pk.disabled(model):
        same("disabled")
    pk.merge(model)
    same("merged")
    pk.unmerge(model)
    same("unmerged")
    pk.detach(model, "two")
    pk.detach(model, "one")
    same("detached")


def test_gradient_checkpointing_in_a_compiled_model() -> None:
    model = pk.attach(tiny_llama(), pk.LoraConfig(init_lora_weights=False, layers_to_transform=[1])).train()
    batch = token_batch()
    model(**batch).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    switch_checkpointing(model, False)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batch).loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(got) == set(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_autocast_in_a_compiled_model() -> None:
    model = pk.attach(tiny_llama(num_hidden_layers=1), pk.LoraConfig(init_lora_weights=False)).train()
    compiled, _ = counted(model)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(**token_batch())
        got = compiled(**token_batch())
    assert got.logits.dtype == torch.bfloat16
    assert relative_error(got.logits, want.logits) < 0.02
    got.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_inductor() -> None:
    """The default backend, once, on one layer: its code calls the op and gets the same numbers."""
    model = nn.ModuleDict({"it": nn.Linear(33, 17)})
    pk.attach(model, pk.LoraConfig(target_modules=["it"], r=4, init_lora_weights=False)).train()
    x = torch.randn(6, 33, requires_grad=True)
    results = []
    for call in (model["it"], torch.compile(model["it"], fullgraph=True)):
        model.zero_grad()
        x.grad = None
        y = call(x)
        torch.tanh(y).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
