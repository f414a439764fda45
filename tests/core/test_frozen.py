"""The frozen backbone costs nothing below the first trainable module, whoever checkpoints: all is counted."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import peftkern as pk
from peftkern.attachment import state
from peftkern.memory import saved_bytes
from peftkern.testing import tiny_bert, tiny_gpt2, tiny_llama, token_batch
from peftkern.testing.case import switch_checkpointing

from .conftest import skip_without_kernels

BLOCKS = 4
BUILD = {
    "bert": lambda: tiny_bert(num_hidden_layers=BLOCKS),
    "gpt2": lambda: tiny_gpt2(n_layer=BLOCKS),
    "llama": lambda: tiny_llama(num_hidden_layers=BLOCKS),
}
STACK = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers"}
TOP = [2, 3]
CONFIGS = {
    "lora top": (lambda: pk.LoraConfig(layers_to_transform=TOP, init_lora_weights=False), 2),
    "lora all": (lambda: pk.LoraConfig(target_modules="all-linear", init_lora_weights=False), 0),
    "adapter top": (lambda: pk.BottleneckConfig(layers_to_transform=TOP), 2),
    "parallel top": (lambda: pk.BottleneckConfig(layers_to_transform=TOP, placement="parallel"), 2),
    "adapter all": (lambda: pk.BottleneckConfig(), 0),
    "last block": (lambda: pk.HeadConfig(last_k=1), 3),
    "head only": (lambda: pk.HeadConfig(), BLOCKS),
}
CHECKPOINTING = {"plain": None, "non-reentrant": False, "reentrant": True}


def skip_headless(family: str, config: str) -> None:
    if (family, config) == ("gpt2", "head only"):
        pytest.skip("GPT-2's head is tied to its embedding: there is no head to train alone")


def trained(family: str, config: str) -> tuple[nn.Module, list[nn.Module], int]:
    """A model in training mode with the adapter moved away from its start, its blocks, and the first that trains."""
    make, first = CONFIGS[config]
    model = pk.attach(BUILD[family](), make()).train()
    torch.manual_seed(3)
    with torch.no_grad():
        for p in state(model).parameters_of(model, "default").values():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model, list(model.get_submodule(STACK[family])), first


def batch_of(family: str) -> dict[str, Tensor]:
    return token_batch(rows=3, length=6, labels=5)


class Probe:
    """Counts, for each block, how often its inside runs and what is saved for backward while it does."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.runs: Counter[int] = Counter()
        self.saved: Counter[int] = Counter()
        self.inside: list[int] = []
        self.graph: dict[int, bool] = {}
        for index, block in enumerate(blocks):
            forward = type(block).forward
            block.register_forward_pre_hook(lambda *_, i=index: self.inside.append(i))
            block.register_forward_hook(lambda _m, args, out, i=index: self.left(i, args, out))
            inner = next(m for path, m in block.named_modules() if "att" in path)
            inner.register_forward_pre_hook(lambda *_, i=index: self.runs.update([i]))
            assert forward is type(block).forward

    def left(self, index: int, args: tuple, out: Tensor | tuple) -> None:
        self.inside.remove(index)
        # Where transformers runs the hooks inside a reentrant checkpoint, only the input tells that there is a graph.
        seen = out if torch.is_grad_enabled() else args
        self.graph[index] = (seen[0] if isinstance(seen, tuple) else seen).requires_grad

    @contextmanager
    def counting(self) -> Iterator[None]:
        def pack(tensor: Tensor) -> Tensor:
            for index in self.inside:
                self.saved[index] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", BUILD)
def test_no_graph_below_the_first_trainable_block(family: str, config: str, kind: str) -> None:
    skip_headless(family, config)
    model, blocks, first = trained(family, config)
    batch = batch_of(family)
    model(**batch).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    if CHECKPOINTING[kind] is not None:
        switch_checkpointing(model, CHECKPOINTING[kind])
    probe = Probe(blocks)
    for _ in range(2):  # what the first step arranges must hold for the second
        probe.runs.clear(), probe.saved.clear()
        model.zero_grad(set_to_none=True)
        with probe.counting():
            loss = model(**batch).loss
        assert [probe.graph[i] for i in range(BLOCKS)] == [i >= first for i in range(BLOCKS)]
        assert all(probe.saved[i] == 0 for i in range(first)), f"saved in frozen blocks: {probe.saved}"
        loss.backward()
        often = 1 if kind == "plain" else 2
        assert [probe.runs[i] for i in range(BLOCKS)] == [1 if i < first else often for i in range(BLOCKS)]
        got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert set(got) == set(want) == {name for name, p in model.named_parameters() if p.requires_grad}
        for name in want:
            torch.testing.assert_close(got[name], want[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("family", BUILD)
def test_frozen_parameters_own_nothing(family: str, kind: str) -> None:
    """No gradient, no optimizer state, no second copy, for adapters on the top and on all layers."""
    for config in ("lora top", "lora all", "adapter top"):
        model, _, _ = trained(family, config)
        model.bfloat16()
        pk.detach(model)
        pk.attach(model, CONFIGS[config][0]())
        frozen = [p for p in model.parameters() if not p.requires_grad]
        owned = {p.data_ptr() for p in BUILD[family]().parameters()}
        assert len(frozen) == len(owned)
        if CHECKPOINTING[kind] is not None:
            switch_checkpointing(model, CHECKPOINTING[kind])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(2):
            model(**batch_of(family)).loss.backward()
            optimizer.step()
        assert all(p.grad is None and p.dtype == torch.bfloat16 for p in frozen)
        assert set(optimizer.state) == {p for p in model.parameters() if p.requires_grad}
        own = state(model).parameters_of(model, "default").values()
        held = sum(p.numel() for p in model.state_dict().values()) - sum(p.numel() for p in own)
        assert held == sum(p.numel() for p in BUILD[family]().state_dict().values())


def test_without_the_plan_the_prefix_does_cost() -> None:
    """The measurement measures: transformers' own way makes a graph in every block and recomputes it."""
    model, blocks, first = trained("llama", "lora top")
    state(model).plan.remove()
    switch_checkpointing(model, False)
    probe = Probe(blocks)
    model(**batch_of("llama")).loss.backward()
    assert [probe.runs[i] for i in range(BLOCKS)] == [2] * BLOCKS
    assert all(probe.graph.values()) and first == 2


@pytest.mark.parametrize("family", BUILD)
def test_input_gradients_alone_make_no_graph_either(family: str) -> None:
    """Other libraries call `enable_input_require_grads` without checkpointing."""
    model, blocks, first = trained(family, "lora top")
    model.enable_input_require_grads()
    probe = Probe(blocks)
    model(**batch_of(family)).loss.backward()
    assert [probe.graph[i] for i in range(BLOCKS)] == [i >= first for i in range(BLOCKS)]


def test_checkpointing_follows_the_active_adapter() -> None:
    """The prefix ends where the adapter that is active begins; off is off, and detach gives everything back."""
    model, blocks, _ = trained("llama", "lora top")
    pk.attach(model, pk.LoraConfig(), "all")
    plain = [getattr(b, "_gradient_checkpointing_func", None) for b in blocks]
    assert plain == [None] * BLOCKS
    probe = Probe(blocks)
    for kind in (False, True):
        switch_checkpointing(model, kind)
        for name, first in (("default", 2), ("all", 0), ("default", 2)):
            pk.set_adapter(model, name)
            probe.runs.clear()
            model(**batch_of("llama")).loss.backward()
            assert [probe.runs[i] for i in range(BLOCKS)] == [1 if i < first else 2 for i in range(BLOCKS)]
        assert all(b.gradient_checkpointing for b in blocks)
        switch_checkpointing(model, None)
        for name in ("all", "default"):
            pk.set_adapter(model, name)
            assert not any(b.gradient_checkpointing for b in blocks), "turned on again by itself"
            probe.runs.clear()
            model(**batch_of("llama")).loss.backward()
            assert set(probe.runs.values()) == {1}
    switch_checkpointing(model, True)
    model(**batch_of("llama"))
    pk.detach(model, "all")
    pk.detach(model, "default")
    assert all(b.gradient_checkpointing for b in blocks)
    assert {type(b._gradient_checkpointing_func).__name__ for b in blocks} == {"partial"}


def test_every_second_block_checkpointed() -> None:
    model, blocks, first = trained("llama", "lora top")
    for index, block in enumerate(blocks):
        switch_checkpointing(model, True) if index == 0 else None
        block.gradient_checkpointing = index % 2 == 1
    probe = Probe(blocks)
    model(**batch_of("llama")).loss.backward()
    assert [probe.runs[i] for i in range(BLOCKS)] == [1, 1, 1, 2]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad) and first == 2


@pytest.mark.parametrize("config", ["embedding", "prompt", "biases"])
def test_what_trains_below_the_blocks_gets_its_gradient(config: str) -> None:
    configs = {
        "embedding": pk.LoraConfig(target_modules=["word_embeddings"], init_lora_weights=False),
        "prompt": pk.PromptTuningConfig(num_virtual_tokens=3),
        "biases": pk.BitFitConfig(),
    }
    grads = []
    for kind in (None, False, True):
        torch.manual_seed(1)
        model = pk.attach(BUILD["bert"](), configs[config]).train()
        if kind is not None:
            switch_checkpointing(model, kind)
        probe = Probe(list(model.bert.encoder.layer))
        model(**batch_of("bert")).loss.backward()
        assert list(probe.runs.values()) == [1 if kind is None else 2] * BLOCKS, "all blocks have something to gain"
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for other in grads[1:]:
        for name, want in grads[0].items():
            torch.testing.assert_close(other[name], want, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", [False, True])
def test_dropout_is_replayed_by_both_kinds(kind: bool) -> None:
    """Dropout of the adapters and of the backbone's own blocks: the same masks in the recomputation."""
    for config in (
        pk.LoraConfig(lora_dropout=0.4, init_lora_weights=False),
        pk.BottleneckConfig(dropout=0.4, init_std=0.5),
        pk.BottleneckConfig(dropout=0.4, init_std=0.5, placement="parallel"),
    ):
        torch.manual_seed(1)
        model = pk.attach(tiny_bert(num_hidden_layers=2, hidden_dropout_prob=0.3), config).train()
        with torch.no_grad():
            for p in state(model).parameters_of(model, "default").values():
                p.add_(0.1)
        grads = []
        for checkpointed in (None, kind):
            switch_checkpointing(model, checkpointed)
            model.zero_grad()
            torch.manual_seed(9)
            model(**batch_of("bert")).loss.backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("family", BUILD)
def test_saved_bytes_by_layer(family: str) -> None:
    """Each frozen block less saves as many bytes as every other; the head alone saves next to nothing."""
    batch = batch_of(family)

    def saved(layers: list[int]) -> int:
        model = pk.attach(
            BUILD[family](), pk.LoraConfig(target_modules="all-linear", layers_to_transform=layers)
        ).train()
        return saved_bytes(lambda: model(**batch).loss, list(model.parameters()))

    costs = [saved(list(range(first, BLOCKS))) for first in range(BLOCKS)]
    steps = [high - low for high, low in pairwise(costs)]
    assert all(step > 0 for step in steps)
    # The second block and those above it are alike; the first one also keeps its input alive.
    assert len(set(steps[1:])) == 1, costs


def test_saved_bytes_of_a_lora_by_hand() -> None:
    """One linear map [M, K] -> N with rank R saves x, h = A x in f32, and the seed: nothing of size N, no f32 copy."""
    m, k, n, r = 48, 32, 64, 4
    skip_without_kernels()
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.ModuleDict({"it": nn.Linear(k, n).to(dtype)})
        pk.attach(model, pk.LoraConfig(target_modules=["it"], r=r, lora_dropout=0.1)).train()
        x = torch.randn(m, k).to(dtype).requires_grad_(True)
        got = saved_bytes(lambda model=model, x=x: model["it"](x), list(model.parameters()))
        assert got == x.nbytes + 4 * m * r + 8, dtype


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_plan_for_themselves(how: str) -> None:
    model, _, _ = trained("llama", "lora top")
    switch_checkpointing(model, True)
    model(**batch_of("llama")).loss.backward()
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert state(twin).plan.model is twin
    assert state(twin).plan.stack[0] is twin.model.layers[0]
    probe = Probe(list(twin.model.layers))
    twin(**batch_of("llama")).loss.backward()
    assert [probe.runs[i] for i in range(BLOCKS)] == [1, 1, 2, 2]


def test_evaluation_is_left_alone() -> None:
    model, blocks, _ = trained("llama", "lora top")
    switch_checkpointing(model, True)
    model.eval()
    with torch.no_grad():
        model(**batch_of("llama"))
    assert not any(type(b._gradient_checkpointing_func).__module__.startswith("peftkern") for b in blocks)
