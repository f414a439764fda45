"""LoRA against its formula, y = W x + b + s · B A x, on every kind of base layer and in every option."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftkern as pk
from peftkern.adapted import AdaptedModule
from peftkern.attachment import adapted_modules, state
from peftkern.errors import ConfigError, MergeError, TargetError
from peftkern.testing import relative_error, tiny_bert, tiny_gpt2, tiny_llama, token_batch

from .conftest import conv


def lora_on(module: nn.Module, **fields) -> tuple[AdaptedModule, torch.Tensor, torch.Tensor]:
    """The module with a random LoRA on it, and its A [R, K] and B [N, R]."""
    holder = nn.ModuleDict({"it": module})
    pk.attach(holder, pk.LoraConfig(target_modules=["it"], **({"init_lora_weights": False} | fields)))
    a, b = state(holder).parameters_of(holder, "default").values()
    return holder["it"], a, b


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "make", [nn.Linear, conv, lambda k, n: nn.Linear(k, n, bias=False)], ids=["linear", "conv1d", "no bias"]
)
def test_formula(make, rslora: bool) -> None:
    module = make(7, 5)
    x = torch.randn(2, 3, 7)
    base = module(x)
    adapted, a, b = lora_on(module, r=4, lora_alpha=6, use_rslora=rslora)
    assert a.shape == (4, 7) and b.shape == (5, 4)
    want = base + (6 / math.sqrt(4) if rslora else 6 / 4) * x @ a.T @ b.T
    torch.testing.assert_close(adapted(x), want)


def test_gradients_are_those_of_the_formula() -> None:
    for module in (nn.Linear(7, 5), conv(7, 5)):
        x = torch.randn(3, 7, requires_grad=True)
        adapted, a, b = lora_on(module, r=2)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        want = torch.autograd.grad(F.linear(x, weight + 4.0 * b @ a, module.bias).square().sum(), (x, a, b))
        got = torch.autograd.grad(adapted(x).square().sum(), (x, a, b))
        torch.testing.assert_close(got, want)


def test_embedding() -> None:
    module = nn.Embedding(11, 5, padding_idx=0)
    ids = torch.tensor([[1, 4, 0], [10, 1, 0]])
    adapted, a, b = lora_on(module, r=2)
    assert a.shape == (2, 11) and b.shape == (5, 2)
    torch.testing.assert_close(adapted(ids), F.embedding(ids, module.weight + 4.0 * (b @ a).T))
    adapted(ids).sum().backward()
    assert a.grad[:, [1, 4, 10]].any() and not a.grad[:, [2, 3, 5]].any()
    assert not a.grad[:, 0].any(), "the padding row of an embedding gets no gradient"


def test_embedding_starts_as_identity_and_scales_as_the_model_does() -> None:
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    ids = torch.tensor([1, 2, 3])
    module = Scaled(8, 4)
    adapted, _, _ = lora_on(module, r=2, init_lora_weights=True)
    assert torch.equal(adapted(ids), module(ids))
    adapted, a, b = lora_on(Scaled(8, 4), r=2)
    torch.testing.assert_close(adapted(ids), 3 * F.embedding(ids, adapted.base_layer.weight + 4.0 * (b @ a).T))


def test_bias_of_the_base() -> None:
    """A bias is added once, and with bias="lora_only" or "all" trains as a copy that the adapter owns."""
    module = nn.Linear(4, 3)
    adapted, _, _ = lora_on(module, init_lora_weights=True)
    x = torch.randn(2, 4)
    assert torch.equal(adapted(x), F.linear(x, module.weight, module.bias))
    for bias, count in (("none", 0), ("lora_only", 4), ("all", 18)):
        model = tiny_bert()
        biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
        pk.attach(model, pk.LoraConfig(bias=bias))
        trained = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
        assert len(trained) == count
        assert not any(p.requires_grad for p in biases.values())
        model(**token_batch(labels=5)).loss.backward()
        assert all(p.grad is None for p in biases.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [nn.Linear, conv, nn.Embedding], ids=["linear", "conv1d", "embedding"])
def test_f32_adapters_over_a_half_base(make, dtype: torch.dtype) -> None:
    """A and B are f32, the output is the base's dtype, and the update is not rounded on the way."""
    module = make(40, 24).to(dtype)
    x = torch.randint(0, 40, (9,)) if make is nn.Embedding else torch.randn(9, 40).to(dtype)
    adapted, a, b = lora_on(module, r=4)
    assert a.dtype == b.dtype == torch.float32
    got = adapted(x)
    assert got.dtype == dtype
    if make is nn.Embedding:
        exact = (module.weight.double() + 2.0 * (b @ a).T.double())[x]
    else:
        weight = (module.weight.T if isinstance(module, Conv1D) else module.weight).double()
        exact = F.linear(x.double(), weight + 2.0 * (b.double() @ a.double()), module.bias.double())
    # Base and update are each rounded once to the base's dtype, and so is their sum: u = eps/2 three times over.
    assert relative_error(got, exact) < 1.5 * torch.finfo(dtype).eps
    got.float().sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32


def test_a_small_update_survives_a_bf16_base() -> None:
    """An update of 1e-4 per step would be lost in bf16 weights near 1; f32 adapters keep it."""
    module = nn.Linear(8, 8).bfloat16()
    _, a, _ = lora_on(module, r=2)
    before = a.detach().clone().fill_(1.0)
    with torch.no_grad():
        a.copy_(before).add_(1e-4)
    assert torch.allclose(a - before, torch.tensor(1e-4), rtol=1e-2)


def test_dropout_acts_on_the_input_of_a_only() -> None:
    module = nn.Linear(64, 6)
    x = torch.randn(5, 64)
    adapted, a, b = lora_on(module, r=3, lora_dropout=0.5)
    adapted.eval()
    exact = module(x) + 8 / 3 * x @ a.T @ b.T
    torch.testing.assert_close(adapted(x), exact)
    adapted.train()
    with torch.no_grad():
        b.zero_()
    assert torch.equal(adapted(x), module(x)), "the base sees no dropout"
    with torch.no_grad():
        b.normal_()
    torch.manual_seed(1)
    one, two = adapted(x), adapted(x)
    assert not torch.equal(one, two), "each call draws a new mask"
    torch.manual_seed(1)
    assert torch.equal(adapted(x), one), "the global seed decides"
    mean = torch.stack([adapted(x) for _ in range(3000)]).mean(0)
    assert relative_error(mean, module(x) + 8 / 3 * x @ a.T @ b.T) < 0.05, "kept values are scaled up"


def test_layers_draw_different_masks() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).train()
    pk.attach(model, pk.LoraConfig(target_modules=["0", "1"], r=64, lora_alpha=64, lora_dropout=0.5))
    x = torch.ones(1, 64)
    masks = []
    with torch.no_grad():
        for module in adapted_modules(model):
            module.base_layer.weight.zero_()
            module.adapters["default"].a.copy_(torch.eye(64))
            module.adapters["default"].b.copy_(torch.eye(64))
            masks.append(module(x) > 0)
    assert not torch.equal(*masks)
    assert all(16 < int(mask.sum()) < 48 for mask in masks)


def test_rank_and_alpha_patterns() -> None:
    config = pk.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["query", "value", "output.dense"],
        rank_pattern={"query": 2, r"layer\.1\.output\.dense": 6, "attention.output.dense": 3},
        alpha_pattern={r"layer.0.attention.self.value": 1},
    )
    model = pk.attach(tiny_bert(), config)
    found = {m.base.path.removeprefix("bert.encoder."): m.adapters["default"] for m in adapted_modules(model)}
    ranks = {path: adapter.a.shape[0] for path, adapter in found.items()}
    assert ranks == {
        "layer.0.attention.self.query": 2,
        "layer.0.attention.self.value": 4,
        "layer.0.attention.output.dense": 3,
        "layer.0.output.dense": 4,
        "layer.1.attention.self.query": 2,
        "layer.1.attention.self.value": 4,
        "layer.1.attention.output.dense": 3,
        "layer.1.output.dense": 6,
    }
    assert found["layer.0.attention.self.value"].scale == 1 / 4
    assert found["layer.1.attention.self.value"].scale == 8 / 4
    assert found["layer.1.output.dense"].scale == 8 / 6


def test_initialisation() -> None:
    for init, std in ((True, 1 / math.sqrt(3 * 512)), ("gaussian", 1 / 16)):
        _, a, b = lora_on(nn.Linear(512, 64), r=16, init_lora_weights=init)
        assert not b.any()
        assert a.std().item() == pytest.approx(std, rel=0.05)
    _, a, b = lora_on(nn.Linear(512, 64), r=16, init_lora_weights=False)
    assert a.any() and b.any()


@pytest.mark.parametrize("batch", [(0,), (1,), (0, 3), (2, 0), (2, 3, 4)], ids=str)
def test_leading_shapes_and_empty_batches(batch: tuple[int, ...]) -> None:
    module = nn.Linear(7, 5)
    adapted, a, b = lora_on(module, r=2)
    x = torch.randn(*batch, 7, requires_grad=True)
    y = adapted(x)
    assert y.shape == (*batch, 5)
    torch.testing.assert_close(y, module(x) + 4.0 * x @ a.T @ b.T)
    y.sum().backward()
    assert a.grad.shape == a.shape and x.grad.shape == x.shape


def test_non_contiguous_input() -> None:
    module = nn.Linear(6, 5)
    adapted, a, b = lora_on(module, r=2)
    for x in (torch.randn(6, 4).T, torch.randn(3, 4, 12)[..., ::2], torch.randn(1, 6).expand(4, 6)):
        torch.testing.assert_close(adapted(x), module(x) + 4.0 * x @ a.T @ b.T)


def test_a_rank_larger_than_the_layer() -> None:
    adapted, a, b = lora_on(nn.Linear(3, 2), r=9)
    x = torch.randn(4, 3)
    torch.testing.assert_close(adapted(x), adapted.base_layer(x) + 8 / 9 * x @ a.T @ b.T)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r=0: want an integer > 0"),
        ({"r": 2.5}, "r=2.5"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"bias": "al"}, "did you mean 'all'"),
        ({"init_lora_weights": "guassian"}, "init_lora_weights='guassian'"),
        ({"lora_bias": True, "use_dora": True}, "use_dora=True: want False with lora_bias"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "init_lora_weights='gaussian'"),
        ({"rank_pattern": {"query": 0}}, "rank_pattern"),
        ({"target_modules": []}, "target_modules"),
        ({"task_type": "TOKEN_CSL"}, "did you mean 'TOKEN_CLS'"),
        ({"modules_to_save": "classifier"}, "want a list"),
    ],
    ids=str,
)
def test_values_out_of_range(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pk.LoraConfig(**fields)


def test_bias_of_b() -> None:
    module = nn.Linear(7, 5)
    holder = nn.ModuleDict({"it": module})
    pk.attach(holder, pk.LoraConfig(target_modules=["it"], lora_bias=True, r=2, lora_alpha=3, init_lora_weights=False))
    parameters = state(holder).parameters_of(holder, "default")
    assert [key.removeprefix("it.") for key in parameters] == ["lora_A.weight", "lora_B.weight", "lora_B.bias"]
    a, b, c = parameters.values()
    x = torch.randn(3, 4, 7)
    want = module(x) + 1.5 * (F.linear(x @ a.T, b, c))
    torch.testing.assert_close(holder["it"](x), want)
    with pk.mixed(holder, ["default", "__base__", "default"]):
        torch.testing.assert_close(holder["it"](x), torch.stack([want[0], module(x[1]), want[2]]))
    torch.testing.assert_close(pk.merge(holder)["it"](x), want)
    pk.unmerge(holder)
    upstream = torch.randn_like(want)
    got = torch.autograd.grad(holder["it"](x), (a, b, c), upstream)
    torch.testing.assert_close(got, torch.autograd.grad(want, (a, b, c), upstream))


def test_bias_of_b_over_a_half_base_starts_as_identity() -> None:
    module = nn.Linear(7, 5).bfloat16()
    x = torch.randn(3, 7).bfloat16()
    want = module(x)
    holder = pk.attach(nn.ModuleDict({"it": module}), pk.LoraConfig(target_modules=["it"], lora_bias=True))
    assert torch.equal(holder["it"](x), want)
    assert {p.dtype for p in state(holder).parameters_of(holder, "default").values()} == {torch.float32}


def test_bias_of_b_where_it_has_no_place() -> None:
    holder = nn.ModuleDict({"it": nn.Linear(7, 5, bias=False), "rows": nn.Embedding(7, 5)})
    with pytest.raises(TargetError, match="rows is an embedding: lora_bias=True"):
        pk.attach(holder, pk.LoraConfig(target_modules=["rows"], lora_bias=True))
    pk.attach(holder, pk.LoraConfig(target_modules=["it"], lora_bias=True, init_lora_weights=False))
    weight = holder["it"].base_layer.weight.clone()
    with pytest.raises(MergeError, match="it: the adapter has a bias and the base layer has none"):
        pk.merge(holder)
    assert torch.equal(holder["it"].base_layer.weight, weight)


@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2, tiny_llama])
def test_autocast_runs_in_bf16_with_f32_gradients(build) -> None:
    model = pk.attach(build(), pk.LoraConfig(target_modules="all-linear", init_lora_weights=False)).train()
    batch = token_batch(labels=5)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    own = state(model).parameters_of(model, "default").values()
    assert {p.grad.dtype for p in own} == {torch.float32}
    full = model(**batch).logits
    assert relative_error(out.logits, full) < 0.05
