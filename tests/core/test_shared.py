"""Tensors that all layers of one adapter share: one copy, one place in the file, gone with the adapter."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import peftkern as pk
from peftkern import checkpoint, ops
from peftkern.adapter import LayerAdapter, LayerConfig
from peftkern.attachment import adapted_modules, state
from peftkern.memory import saved_bytes
from peftkern.plan import Plan
from peftkern.testing.models import tiny_gpt2, tiny_llama, token_batch

VERA = {"r": 6, "target_modules": ["q_proj", "down_proj"], "init_weights": False}


@dataclass(frozen=True, kw_only=True)
class BankConfig(LayerConfig):
    """One trained vector for all layers."""


class Bank(nn.Module):
    """A trained vector, a frozen one that is saved and one that is not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.ones(width))
        self.register_buffer("frozen", torch.full((width,), 2.0))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


class Banked(LayerAdapter):
    """y = base(x) · vector · frozen / 2 · own, where only `own` belongs to the layer."""

    name, summary, Config = "banked", "for tests", BankConfig

    def __init__(self, base, config) -> None:
        super().__init__(base, config)
        self.own = nn.Parameter(torch.ones(()))

    @classmethod
    def share(cls, layers, config):
        return Bank(max(base.out_features for base in layers.values()))

    def forward(self, base, x):
        y = base(x)
        n = y.shape[-1]
        return y * (self.shared.vector[:n] * self.shared.frozen[:n] / 2 * self.own).to(y.dtype)


def logits(model):
    return model(**{key: value for key, value in token_batch().items() if key != "labels"}).logits


@pytest.fixture
def banked(monkeypatch):
    """The method, known to the registry by its configuration alone."""
    monkeypatch.setattr("peftkern.registry.by_config", lambda config: type(config).method)
    model = tiny_llama()
    return pk.attach(model, BankConfig(target_modules=["q_proj", "v_proj"]))


def test_a_shared_parameter_trains_once_and_is_frozen_with_its_adapter(banked):
    own = state(banked).parameters_of(banked, "default")
    assert [key for key in own if "." not in key] == ["banked_vector"] and len(own) == 5
    vector = state(banked).shared["default"].vector
    assert sum(p is vector for p in banked.parameters()) == 1 and vector.requires_grad
    logits(banked).square().mean().backward()
    assert vector.grad is not None and vector.grad.any()
    pk.attach(banked, BankConfig(target_modules=["k_proj"]), "other")
    pk.set_adapter(banked, "other")
    assert not vector.requires_grad and state(banked).shared["other"].vector.requires_grad


def test_a_file_holds_the_parameter_and_the_persistent_buffer_once(banked):
    keys = checkpoint.parameters(banked)
    top = [key for key in keys if not key.startswith("base_model.model.")]
    assert sorted(top) == ["base_model.banked_frozen", "base_model.banked_vector"]
    assert not keys["base_model.banked_frozen"].requires_grad


def test_vera_has_one_pair_of_matrices_as_large_as_the_largest_layer():
    model = pk.attach(tiny_llama(), pk.VeraConfig(**VERA))
    shared = state(model).shared["default"]
    assert shared.a.shape == (6, 64) and shared.b.shape == (32, 6)
    assert {id(module.adapters["default"].shared) for module in adapted_modules(model)} == {id(shared)}
    slices = [tensor for m in adapted_modules(model) for tensor in m.adapters["default"]._slices(shared.a.device)]
    pointers = {tensor.untyped_storage().data_ptr() for tensor in slices}
    assert pointers == {shared.a.data_ptr(), shared.b.data_ptr()}
    matrices = [key for key in model.state_dict() if key.endswith((".a", ".b"))]
    assert matrices == ["_peftkern.shared.default.a", "_peftkern.shared.default.b"]
    assert not any(p.shape == shared.a.shape for p in model.parameters())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "dump"])
def test_a_copy_shares_among_its_own_layers_only(twin):
    model = pk.attach(tiny_llama(), pk.VeraConfig(**VERA))
    other = twin(model)
    shared = state(other).shared["default"]
    assert shared is not state(model).shared["default"]
    assert {id(module.adapters["default"].shared) for module in adapted_modules(other)} == {id(shared)}
    want = logits(model)
    shared.a.zero_()
    assert torch.equal(logits(model), want) and not torch.equal(logits(other), want)


def test_dtype_and_device_follow_the_model():
    model = pk.attach(tiny_llama().bfloat16(), pk.VeraConfig(**VERA))
    shared = state(model).shared["default"]
    assert {shared.a.dtype, shared.b.dtype} == {torch.float32}
    model.half()
    assert {shared.a.dtype, shared.b.dtype} == {torch.float16}
    whole = pk.get_peft_model(tiny_llama().bfloat16(), pk.VeraConfig(**VERA), autocast_adapter_dtype=False)
    assert state(whole.get_base_model()).shared["default"].a.dtype == torch.bfloat16


def test_each_adapter_has_its_own_and_takes_it_along():
    model = pk.attach(tiny_llama(), pk.VeraConfig(**VERA), "one")
    pk.attach(model, pk.VeraConfig(**VERA | {"projection_prng_key": 3}), "two")
    shared = state(model).shared
    assert list(shared) == ["one", "two"] and not torch.equal(shared["one"].a, shared["two"].a)
    pk.detach(model, "one")
    assert list(shared) == ["two"]
    pk.detach(model, "two")
    assert state(model) is None


def test_a_failed_plan_leaves_nothing():
    model = pk.attach(tiny_llama(), pk.VeraConfig(**VERA))
    Plan(model, pk.VeraConfig(**VERA), "never")
    assert list(state(model).shared) == ["default"]


@pytest.mark.parametrize("saved", [True, False])
def test_projections_come_from_the_file_or_from_the_key(saved, tmp_path):
    config = pk.VeraConfig(**VERA, save_projection=saved, projection_prng_key=9)
    model = pk.attach(tiny_llama(), config)
    state(model).shared["default"].a.mul_(1.5)
    pk.save(model, tmp_path)
    keys = [key for key in checkpoint.read_tensors(tmp_path) if key in ("base_model.vera_A", "base_model.vera_B")]
    assert len(keys) == (2 if saved else 0)
    again = pk.load(tiny_llama(), tmp_path)
    assert torch.equal(logits(again), logits(model)) is saved
    fresh = pk.attach(tiny_llama(), config)
    assert torch.equal(state(again).shared["default"].a, state(fresh).shared["default"].a) is not saved
    pk.checkpoint.restore(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model)) is saved


def test_a_file_without_the_projections_that_it_promises_is_an_error(tmp_path):
    model = pk.attach(tiny_llama(), pk.VeraConfig(**VERA, save_projection=False))
    pk.save(model, tmp_path)
    path = tmp_path / checkpoint.CONFIG_FILE
    path.write_text(path.read_text().replace('"save_projection": false', '"save_projection": true'))
    with pytest.raises(pk.errors.CheckpointError, match=r"base_model\.vera_A .* is missing"):
        pk.load(tiny_llama(), tmp_path)


def test_the_facade_saves_shared_tensors_from_a_state_dict(tmp_path):
    model = pk.get_peft_model(tiny_llama(), pk.VeraConfig(**VERA))
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    stored = checkpoint.read_tensors(tmp_path)
    assert torch.equal(stored["base_model.vera_A"], state(model.get_base_model()).shared["default"].a)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_vera_saves_x_the_latent_and_its_vectors(build, p):
    """Nothing of the size of A or B, and nothing for dropout but the seed."""
    if pk.explain("low_rank", torch.ones(1, 1)).backend == "reference":
        pytest.skip("reference: plain autograd saves what it likes")
    names = ["q_proj", "down_proj"] if build is tiny_llama else ["c_attn", "mlp.c_proj"]
    model = pk.attach(build(), pk.VeraConfig(r=40, target_modules=names, vera_dropout=p)).train()
    for module in adapted_modules(model):
        adapter, base = module.adapters["default"], module.base
        x = torch.randn(2, 7, base.in_features, requires_grad=True)
        known = [*model.parameters(), adapter.shared.a, adapter.shared.b]
        expected = 4 * x.numel() + 4 * 14 * 40 + (8 if p else 0)
        assert saved_bytes(lambda module=module, x=x: module(x), known) == expected


@pytest.mark.parametrize("feedforward", [False, True])
def test_ia3_saves_what_it_scales_and_nothing_without_training(feedforward):
    model = pk.attach(tiny_llama(), pk.IA3Config())
    module = next(m for m in adapted_modules(model) if m.adapters["default"].feedforward is feedforward)
    x = torch.randn(2, 7, module.base.in_features, requires_grad=True)
    width = module.base.in_features if feedforward else module.base.out_features
    known = list(model.parameters())
    assert saved_bytes(lambda: module(x), known) == 4 * 14 * width
    model.requires_grad_(False)
    assert saved_bytes(lambda: module(x), known) == 0


def test_embeddings_are_refused():
    for config in (pk.IA3Config(target_modules=["embed_tokens"], feedforward_modules=[]),
                   pk.VeraConfig(target_modules=["embed_tokens"])):  # fmt: skip
        with pytest.raises(pk.errors.TargetError, match="embedding"):
            pk.attach(tiny_llama(), config)


def test_low_rank_scales_are_checked():
    x, a, b = torch.ones(2, 3), torch.ones(4, 3), torch.ones(5, 4)
    with pytest.raises(ValueError, match=r"rank_scale \(5,\): want \[R\] = \(4,\)"):
        ops.low_rank(x, a, b, rank_scale=torch.ones(5))
    with pytest.raises(ValueError, match=r"update_scale \(4,\): want \[N\] = \(5,\)"):
        ops.low_rank(x, a, b, update_scale=torch.ones(4))
