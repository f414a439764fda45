"""The bottleneck adapter against its formula, in each placement, found by structure in each kind of model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peftkern as pk
from peftkern.attachment import adapted_modules, state
from peftkern.errors import ConfigError, TargetError
from peftkern.testing import TinyModel, tiny_bert, tiny_gpt2, tiny_llama, token_batch, unchanged

PLACES = {
    "bert": ("bert.encoder.layer.{}.", "attention.output.dense", "intermediate.dense", "output.dense"),
    "gpt2": ("transformer.h.{}.", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "llama": ("model.layers.{}.", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"),
}
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def moved(model: nn.Module, name: str = "default") -> nn.Module:
    with torch.no_grad():
        for p in state(model).parameters_of(model, name).values():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


@pytest.mark.parametrize("placement", ["ffn", "attention_and_ffn", "parallel"])
def test_places(family: TinyModel, placement: str) -> None:
    prefix, attention, ffn_input, ffn_output = PLACES[family.name]
    model = pk.attach(family.build(), pk.BottleneckConfig(placement=placement))
    want = {prefix.format(i) + ffn_output for i in (0, 1)}
    if placement == "attention_and_ffn":
        want |= {prefix.format(i) + attention for i in (0, 1)}
    assert {module.base.path for module in adapted_modules(model)} == want
    taps = {key.replace("/", ".") for key in state(model).taps}
    assert taps == ({prefix.format(i) + ffn_input for i in (0, 1)} if placement == "parallel" else set())


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sequential_formula(activation: str, norm: bool) -> None:
    model = nn.ModuleDict({"it": nn.Linear(6, 8)})
    config = pk.BottleneckConfig(target_modules=["it"], r=3, activation=activation, layer_norm=norm, scale=0.5)
    a = moved(pk.attach(model, config))["it"].adapters["default"]
    x = torch.randn(4, 6)
    h = model["it"].base_layer(x)
    inner = F.layer_norm(h, (8,), a.norm_weight, a.norm_bias) if norm else h
    want = h + 0.5 * (F.linear(ACTIVATIONS[activation](F.linear(inner, a.down, a.down_bias)), a.up, a.up_bias))
    torch.testing.assert_close(model["it"](x), want)


def test_parallel_reads_the_input_of_the_feed_forward_network(family: TinyModel) -> None:
    prefix, _, ffn_input, ffn_output = PLACES[family.name]
    model = moved(pk.attach(family.build(), pk.BottleneckConfig(placement="parallel", scale=4.0)))
    seen: dict[str, torch.Tensor] = {}
    module = model.get_submodule(prefix.format(1) + ffn_output)
    model.get_submodule(prefix.format(1) + ffn_input).register_forward_pre_hook(lambda _m, a: seen.update(x=a[0]))
    module.base_layer.register_forward_hook(lambda _m, _a, out: seen.update(r=out.clone()))
    module.register_forward_hook(lambda _m, _a, out: seen.update(y=out))
    model(**family.batch())
    a = module.adapters["default"]
    want = seen["r"] + 4 * F.linear(F.relu(F.linear(seen["x"], a.down, a.down_bias)), a.up, a.up_bias)
    torch.testing.assert_close(seen["y"], want)


def test_parallel_beside_others_that_come_and_go() -> None:
    """The tap stays on the projection, whoever else wraps and leaves it."""
    batch = token_batch()
    for order in (["lora", "par", "lora2"], ["par", "lora", "lora2"]):
        model = tiny_llama()
        for name in order:
            lora = pk.LoraConfig(target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
            pk.attach(model, pk.BottleneckConfig(placement="parallel") if name == "par" else lora, name)
        torch.manual_seed(4)
        moved(model, "par")
        pk.set_adapter(model, "par")
        alone = model(**batch).logits
        pk.set_adapter(model, ["par", "lora"])
        both = model(**batch).logits
        assert not torch.allclose(alone, both)
        for name in ("lora", "lora2"):
            pk.detach(model, name)
        assert torch.equal(model(**batch).logits, alone)
        pk.detach(model, "par")
        assert torch.equal(model(**batch).logits, tiny_llama()(**batch).logits)


def test_two_parallel_adapters_share_a_tap() -> None:
    model = tiny_gpt2()
    for name in ("one", "two"):
        pk.attach(model, pk.BottleneckConfig(placement="parallel"), name)
        moved(model, name)
    pk.set_adapter(model, ["one", "two"])
    both = model(**token_batch()).logits
    pk.detach(model, "two")
    one = model(**token_batch()).logits
    assert not torch.allclose(one, both)
    assert all(tap.value is None for tap in state(model).taps.values()), "the tap keeps an activation alive"


def test_a_tap_that_nobody_reads_is_gone() -> None:
    model = pk.attach(tiny_llama(), pk.LoraConfig(), "lora")
    pk.attach(model, pk.BottleneckConfig(placement="parallel"), "par")
    hooked = model.model.layers[0].mlp.gate_proj
    assert hooked._forward_pre_hooks
    pk.detach(model, "par")
    assert not hooked._forward_pre_hooks and not state(model).taps


def test_width_of_the_bottleneck() -> None:
    for fields, width in (({"reduction_factor": 8}, 4), ({"r": 5}, 5), ({"reduction_factor": 1000}, 1), ({}, 2)):
        model = pk.attach(tiny_bert(), pk.BottleneckConfig(**fields))
        assert {m.adapters["default"].down.shape[0] for m in adapted_modules(model)} == {width}


def test_layers_and_exclusions() -> None:
    def paths(**fields) -> list[str]:
        return [m.base.path[19:] for m in adapted_modules(pk.attach(tiny_bert(), pk.BottleneckConfig(**fields)))]

    assert paths(layers_to_transform=1) == ["1.output.dense"]
    assert paths(layers_to_transform=[0], placement="attention_and_ffn") == [
        "0.attention.output.dense",
        "0.output.dense",
    ]
    assert paths(placement="attention_and_ffn", exclude_modules=["attention.output.dense"]) == [
        "0.output.dense",
        "1.output.dense",
    ]
    assert paths(target_modules=["value"], layers_to_transform=[0]) == ["0.attention.self.value"]
    model = tiny_bert()
    with unchanged(model), pytest.raises(TargetError, match="no place is left"):
        pk.attach(model, pk.BottleneckConfig(layers_to_transform=[7]))


def test_a_model_without_blocks() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with unchanged(model), pytest.raises(TargetError, match="give target_modules by name"):
        pk.attach(model, pk.BottleneckConfig())
    pk.attach(model, pk.BottleneckConfig(target_modules=["0"]))


def test_dropout_is_off_in_eval_and_drops_the_update_only() -> None:
    model = nn.ModuleDict({"it": nn.Linear(6, 400)})
    moved(pk.attach(model, pk.BottleneckConfig(target_modules=["it"], r=3, dropout=0.5)))
    x = torch.randn(1, 6)
    h = model["it"].base_layer(x)
    update = model.eval()["it"](x) - h
    dropped = model.train()["it"](x) - h
    kept = dropped.abs() > 1e-6
    assert 140 < int(kept.sum()) < 260
    torch.testing.assert_close(dropped[kept], 2 * update[kept], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"reduction_factor": 0}, "reduction_factor=0"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"placement": "paralel"}, "did you mean 'parallel'"),
        ({"activation": "selu"}, "did you mean 'silu' or 'gelu' or 'relu'|did you mean"),
        ({"placement": "parallel", "target_modules": ["dense"]}, "target_modules"),
        ({"init_std": -1}, "init_std"),
    ],
    ids=str,
)
def test_values_out_of_range(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pk.BottleneckConfig(**fields)
