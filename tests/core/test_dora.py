"""DoRA against its formula, y = bias + m ⊙ (W + s · B A) x / ‖W + s · B A‖, the norm taken as a constant."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftkern as pk
from peftkern.adapted import AdaptedModule
from peftkern.attachment import adapted_modules, state
from peftkern.testing import relative_error, tiny_bert, token_batch

from .conftest import conv


def dora_on(module: nn.Module, **fields) -> tuple[AdaptedModule, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The module with a random DoRA on it, its A [R, K], B [N, R] and a magnitude [N] that is not the norm any more."""
    holder = nn.ModuleDict({"it": module})
    config = pk.LoraConfig(target_modules=["it"], use_dora=True, **({"init_lora_weights": False} | fields))
    pk.attach(holder, config)
    a, b, m = state(holder).parameters_of(holder, "default").values()
    with torch.no_grad():
        m.mul_(torch.linspace(0.5, 1.5, len(m)))
    return holder["it"], a, b, m


def dora_weight(base: nn.Module, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor, scale: float) -> torch.Tensor:
    """m ⊙ (W + s B A) / ‖W + s B A‖ [N, K], the norm detached."""
    weight = base.weight.T if isinstance(base, (Conv1D, nn.Embedding)) else base.weight
    summed = weight + scale * b @ a
    return m[:, None] * summed / summed.detach().norm(dim=1, keepdim=True)


@pytest.mark.parametrize(
    "make", [nn.Linear, conv, lambda k, n: nn.Linear(k, n, bias=False)], ids=["linear", "conv1d", "no bias"]
)
def test_formula_with_gradients(make) -> None:
    module = make(7, 5)
    x = torch.randn(2, 3, 7, requires_grad=True)
    adapted, a, b, m = dora_on(module, r=4, lora_alpha=6)
    want = F.linear(x, dora_weight(module, a, b, m, 6 / 4), module.bias)
    got = adapted(x)
    torch.testing.assert_close(got, want)
    leaves = (x, a, b, m)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream))


def test_on_an_embedding() -> None:
    module = nn.Embedding(11, 5)
    ids = torch.tensor([[1, 4, 0], [10, 1, 0]])
    adapted, a, b, m = dora_on(module, r=2)
    want = F.embedding(ids, dora_weight(module, a, b, m, 4.0).T)
    torch.testing.assert_close(adapted(ids), want)
    upstream = torch.randn_like(want)
    got = torch.autograd.grad(adapted(ids), (a, b, m), upstream)
    torch.testing.assert_close(got, torch.autograd.grad(want, (a, b, m), upstream))


@pytest.mark.parametrize("make", [nn.Linear, conv, nn.Embedding], ids=["linear", "conv1d", "embedding"])
def test_starts_as_identity_and_merges_exactly(make) -> None:
    module = make(7, 5)
    x = torch.randint(0, 7, (4,)) if make is nn.Embedding else torch.randn(4, 7)
    before, weight = module(x), module.weight.detach().clone()
    holder = nn.ModuleDict({"it": module})
    pk.attach(holder, pk.LoraConfig(target_modules=["it"], use_dora=True))
    torch.testing.assert_close(holder["it"](x), before)
    with torch.no_grad():
        for parameter in state(holder).parameters_of(holder, "default").values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    want = holder["it"](x)
    pk.merge(holder)
    torch.testing.assert_close(holder["it"](x), want)
    pk.unmerge(holder)
    assert torch.equal(module.weight, weight)
    torch.testing.assert_close(holder["it"](x), want)
    with pk.disabled(holder):
        assert torch.equal(holder["it"](x), before)


@pytest.mark.parametrize("hooked", [False, True])
def test_over_another_adapter_takes_the_norm_of_the_base_and_leaves_its_bias(hooked: bool) -> None:
    module = nn.Linear(7, 5)
    if hooked:
        module.register_forward_hook(lambda *_: None)
    x = torch.randn(4, 7)
    holder = nn.ModuleDict({"it": module})
    for name, dora in (("one", False), ("two", True)):
        config = pk.LoraConfig(target_modules=["it"], use_dora=dora, init_lora_weights=False, r=2, lora_alpha=2)
        pk.attach(holder, config, name)
    pk.set_adapter(holder, ["one", "two"])
    one, two = (holder["it"].adapters[name] for name in ("one", "two"))
    with torch.no_grad():
        two.magnitude.mul_(1.5)
    c = two.magnitude / (module.weight + two.b @ two.a).norm(dim=1)
    want = module.bias + c * (x @ (module.weight + one.b @ one.a + two.b @ two.a).T)
    torch.testing.assert_close(holder["it"](x), want)
    pk.merge(holder)
    torch.testing.assert_close(holder["it"](x), want)


def test_in_training_drops_the_input_of_a_only() -> None:
    module = nn.Linear(64, 6)
    x = torch.randn(5, 64)
    adapted, a, b, m = dora_on(module, r=3, lora_dropout=0.5)
    adapted.train()
    exact = F.linear(x, dora_weight(module, a, b, m, 8 / 3), module.bias)
    mean = torch.stack([adapted(x) for _ in range(3000)]).mean(0)
    assert relative_error(mean, exact) < 0.05
    with torch.no_grad():
        b.zero_()
    torch.testing.assert_close(adapted(x), F.linear(x, dora_weight(module, a, b, m, 8 / 3), module.bias))


def test_copies_and_saves_its_own_base(tmp_path) -> None:
    model = pk.attach(tiny_bert(), pk.LoraConfig(use_dora=True, init_lora_weights=False)).eval()
    batch = token_batch(labels=5)
    want = model(**batch).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(**batch).logits, want)
        for module in adapted_modules(other):
            assert module.adapters["default"].base.module is module.base_layer
        with torch.no_grad():
            next(iter(adapted_modules(other))).base_layer.weight.mul_(2.0)
        assert not torch.allclose(other(**batch).logits, want)
    assert torch.equal(model(**batch).logits, want)


def test_survives_a_row_of_zeros() -> None:
    module = nn.Linear(7, 5)
    with torch.no_grad():
        module.weight[2] = 0.0
    adapted, *leaves = dora_on(module, r=2, init_lora_weights=True)
    y = adapted(torch.randn(3, 7))
    y.sum().backward()
    assert y.isfinite().all() and all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("make", [nn.Linear, conv, nn.Embedding], ids=["linear", "conv1d", "embedding"])
def test_over_a_half_base_keeps_f32(make) -> None:
    module = make(40, 24).bfloat16()
    x = torch.randint(0, 40, (9,)) if make is nn.Embedding else torch.randn(9, 40).bfloat16()
    adapted, a, b, m = dora_on(module, r=4)
    assert {t.dtype for t in (a, b, m)} == {torch.float32}
    wide = make(40, 24).double()
    wide.load_state_dict(module.state_dict())
    weight = dora_weight(wide, a.double(), b.double(), m.double(), 2.0)
    exact = F.embedding(x, weight.T) if make is nn.Embedding else F.linear(x.double(), weight, wide.bias)
    got = adapted(x)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, exact) < 1.5 * torch.finfo(torch.bfloat16).eps
