"""`fuse`: models that Hugging Face PEFT has built, on our ops; the same numbers, the same files, and a way back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import peftkern as pk
from peftkern import fusing, ops
from tests.compat.small import (
    assert_same,
    assert_same_step,
    batch,
    build,
    gradients,
    shake,
    stored,
    tensors,
    their_parameters,
)

CASES = {
    "llama": ("llama", {"target_modules": "all-linear"}),
    "llama-rslora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "llama-bias": ("llama-bias", {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "llama-dora": ("llama-bias", {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "lora_dropout": 0.3}),
    "gpt2-dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
    "bert": ("bert-seq", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
}


def theirs(peft, name="llama", adapter="default", dtype=torch.float32, **changes):
    changes = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]} | changes
    return shake(peft.get_peft_model(build(name, dtype), peft.LoraConfig(**changes), adapter_name=adapter)).eval()


@pytest.fixture()
def calls(monkeypatch):
    """Counts the fused calls."""
    count = []
    real = ops.low_rank

    def counted(*args, **kwargs):
        count.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "low_rank", counted)
    return count


@pytest.mark.parametrize("case", CASES)
def test_same_step_same_file_and_back(peft, case, calls, tmp_path):
    name, changes = CASES[case]
    model = theirs(peft, name, **changes)
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "before")
    keys = list(model.state_dict())
    report = pk.fuse(model)
    layers = [path for path, m in model.named_modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A")]
    assert list(report.fused) == layers and not report.not_fused and layers
    out, grads = gradients(model, their_parameters(model), batch(name))
    assert len(calls) == len(layers)
    want_out, want_grads = gradients(twin, their_parameters(twin), batch(name))
    assert_same(out, want_out)
    assert_same(grads, want_grads)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "after")
    assert (tmp_path / "after/adapter_model.safetensors").read_bytes() == (
        tmp_path / "before/adapter_model.safetensors"
    ).read_bytes()
    assert stored(tmp_path / "after") == stored(tmp_path / "before")
    assert pk.unfuse(model) == report.fused and pk.unfuse(model) == ()
    assert not [m for m in model.modules() if "forward" in vars(m)]
    assert_same(tensors(model(**batch(name))), want_out, rtol=0, atol=0)


def test_f32_adapters_over_a_bf16_base(peft):
    model, exact = theirs(peft, dtype=torch.bfloat16), theirs(peft, dtype=torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    exact.float()
    inputs = batch("llama")
    want = gradients(exact, their_parameters(exact), inputs)
    peer = gradients(model, their_parameters(model), inputs)
    assert len(pk.fuse(model).fused) == 6
    mine = gradients(model, their_parameters(model), inputs)
    for got, reference, other in zip(mine, want, peer, strict=True):
        for key, truth in reference.items():
            budget = 2 * (other[key].float() - truth).norm() + 1e-3 * truth.norm()
            assert (got[key].float() - truth).norm() <= budget, key


def test_dropout_in_training(peft, calls):
    """Its own masks, with PEFT's mean; none in eval."""
    model = theirs(peft, lora_dropout=0.5, target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(4000, 24)
    pk.fuse(model)
    base, full = layer.base_layer(x), layer(x) - layer.base_layer(x)
    assert calls[-1]["p"] == 0.0
    layer.train()
    one, two = layer(x) - base, layer(x) - base
    assert calls[-1]["p"] == 0.5 and not torch.equal(one, two)
    spread = (one - full).std() / 4000**0.5
    assert ((one - full).mean(0).abs() < 6 * spread).all()


def test_every_change_of_state_falls_back(peft, calls):
    model, twin = theirs(peft), theirs(peft)
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(3)
    other = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    for each in model, twin:
        torch.manual_seed(3)
        each.add_adapter("other", other)
        each.eval()
    pk.fuse(model)
    inputs = batch("llama")

    def same(fused: bool, **more) -> None:
        calls.clear()
        torch.testing.assert_close(model(**inputs, **more).logits, twin(**inputs, **more).logits, rtol=1e-4, atol=1e-6)
        assert bool(calls) is fused

    same(True)
    with model.disable_adapter(), twin.disable_adapter():
        same(False)
    same(True)
    for each in model, twin:
        each.set_adapter("other")
    same(True)
    same(False, adapter_names=["default", "other", "__base__"])
    for each in model, twin:
        each.base_model.set_adapter(["default", "other"])
    same(False)
    for each in model, twin:
        each.set_adapter("default")
        each.merge_adapter()
    same(False)
    for each in model, twin:
        each.unmerge_adapter()
    same(True)
    for each in model, twin:
        each.delete_adapter("default")
    same(True)
    plain, peer = model.merge_and_unload(), twin.merge_and_unload()
    assert_same(dict(plain.state_dict()), dict(peer.state_dict()))


def test_a_weight_that_trains_gets_its_gradient(peft):
    model = theirs(peft, target_modules=["q_proj"])
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    want = torch.autograd.grad(model(**batch("llama")).loss, weight)[0]
    pk.fuse(model)
    torch.testing.assert_close(torch.autograd.grad(model(**batch("llama")).loss, weight)[0], want, rtol=1e-4, atol=1e-6)


def hook(module, *_):
    module.seen = True


def reasons(report: fusing.FuseReport) -> str:
    return " ".join(sorted(set(report.not_fused.values())))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": ["embed_tokens"]}, "Embedding computes in its own way"),
    ],
)
def test_what_is_not_fused_is_reported_and_still_right(peft, calls, changes, said):
    model = theirs(peft, **changes)
    want = model(**batch("llama")).logits
    report = pk.fuse(model)
    assert not report.fused and said in reasons(report) and said in str(report)
    assert torch.equal(model(**batch("llama")).logits, want) and not calls


def test_dora_is_fused_where_nothing_is_dropped(peft, calls):
    """In training PEFT drops the input of the frozen product too, which is another computation."""
    model = theirs(peft, use_dora=True, lora_dropout=0.3)
    twin = copy.deepcopy(model)
    assert len(pk.fuse(model).fused) == 6
    for training in (True, False):
        model.train(training), twin.train(training)
        assert ("dropout" in reasons(pk.fuse(model))) == training
        torch.manual_seed(0)
        got = model(**batch("llama")).logits
        torch.manual_seed(0)
        torch.testing.assert_close(got, twin(**batch("llama")).logits)
        assert bool(calls) == (not training)


def test_dora_follows_its_weights(peft, calls):
    """The norm that a fused layer remembers is of the weights as they are."""
    model = theirs(peft, use_dora=True)
    twin = copy.deepcopy(model)
    pk.fuse(model)
    for step in range(3):
        for one in (model, twin):
            optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.05 * step)
            one(**batch("llama")).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same(tensors(model(**batch("llama"))), tensors(twin(**batch("llama"))))


def test_transient_reasons(peft, calls):
    model = theirs(peft)
    model.merge_adapter()
    assert "merged: default" in reasons(pk.fuse(model))
    model.unmerge_adapter()
    assert len(pk.fuse(model).fused) == 6 and "6 layers fused, 0 not" in str(pk.fuse(model))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    report = pk.fuse(model)
    assert len(report.fused) == 3 and "2 active adapters: default, other" in reasons(report)
    with model.disable_adapter():
        assert "disabled" in reasons(pk.fuse(model))


def test_hooks_go_on_running(peft, calls):
    model = theirs(peft, target_modules=["q_proj"])
    first, second, third = (layer.self_attn.q_proj for layer in model.base_model.model.model.layers)
    pk.fuse(model)
    want = model(**batch("llama")).logits
    calls.clear()
    first.base_layer.register_forward_hook(hook)
    second.register_forward_hook(hook)
    third.lora_A["default"].register_forward_hook(hook)
    torch.testing.assert_close(model(**batch("llama")).logits, want, rtol=1e-4, atol=1e-6)
    assert first.base_layer.seen and second.seen and third.lora_A["default"].seen
    assert len(calls) == 2 and calls[0]["base_out"] is not None
    assert "hooks on lora_A" in reasons(pk.fuse(model))


def test_a_replaced_forward_is_left_alone(peft):
    model = theirs(peft, target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    original = layer.forward
    layer.forward = lambda x: original(x)
    report = pk.fuse(model)
    assert len(report.fused) == 2 and "forward has been replaced" in reasons(report)
    pk.unfuse(model)
    assert "forward" in vars(layer)


class QuantisedTensor(torch.Tensor):
    """Stands for the tensor subclasses of quantisation libraries."""


def test_a_quantised_base_is_not_fused(peft, calls):
    model = theirs(peft, target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight.as_subclass(QuantisedTensor)
    report = pk.fuse(model)
    assert len(report.fused) == 2 and "quantised or sharded (QuantisedTensor" in reasons(report)
    model(**batch("llama"))
    assert len(calls) == 2


def test_other_methods_and_models(peft):
    model = peft.get_peft_model(build("llama"), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    assert "ia3.Linear is not a LoRA layer" in reasons(pk.fuse(model))
    for unfit in (build("llama"), pk.get_peft_model(build("llama"), pk.LoraConfig()), nn.Linear(2, 2)):
        with pytest.raises(pk.errors.AdapterError, match="no layer of Hugging Face PEFT"):
            pk.fuse(unfit)


def test_a_transformers_model_with_injected_layers(peft, calls):
    model = build("llama")
    torch.manual_seed(2)
    # transformers' own add_adapter does this, once it has found the version of peft that it wants.
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), model)
    want = model(**batch("llama")).logits
    report = pk.fuse(model)
    assert len(report.fused) == 3
    torch.testing.assert_close(model(**batch("llama")).logits, want, rtol=1e-4, atol=1e-6)
    assert len(calls) == 3
    for layer in model.modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            layer.enable_adapters(False)
    calls.clear()
    model(**batch("llama"))
    assert not calls


def test_copies_and_pickles_stay_fused(peft, calls):
    model = theirs(peft)
    pk.fuse(model)
    want = model(**batch("llama")).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False):
        calls.clear()
        assert torch.equal(twin(**batch("llama")).logits, want) and len(calls) == 6
        shake(twin, seed=5)
        assert not torch.equal(twin(**batch("llama")).logits, want), "it computes with weights of its own"
        assert len(pk.unfuse(twin)) == 6
    assert torch.equal(model(**batch("llama")).logits, want)


def test_merging_by_peft_uses_and_restores_the_weights(peft):
    model = theirs(peft)
    pk.fuse(model)
    want = model(**batch("llama")).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**batch("llama")).logits, want, rtol=1e-4, atol=1e-6)
    model.unmerge_adapter()
    assert_same_step(theirs_as_ours(model), model, batch("llama"))


def theirs_as_ours(model):
    """The same adapter attached here."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return pk.load(build("llama"), folder, trainable=True)
