"""An adapter's tensors in memory, under PEFT's names, in both directions; and a quantised backbone's preparation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peftkern as pk
from peftkern.errors import AdapterError, CheckpointError, ConfigError
from tests.compat.small import assert_same, batch, build, shake, tensors

KINDS = {
    "lora": ("LoraConfig", "llama", {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}),
    "dora": ("LoraConfig", "llama", {"use_dora": True, "target_modules": ["q_proj"]}),
    "head": ("LoraConfig", "bert-seq", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "bias": ("LoraConfig", "bert", {"target_modules": ["query"], "bias": "lora_only"}),
    "ia3": ("IA3Config", "llama", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "vera": ("VeraConfig", "llama", {"target_modules": ["q_proj"]}),
    "prompt": ("PromptTuningConfig", "llama", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_are_peft_s(peft, kind):
    config, name, fields = KINDS[kind]
    theirs = shake(peft.get_peft_model(build(name), getattr(peft, config)(**fields))).eval()
    ours = shake(pk.get_peft_model(build(name), getattr(pk, config)(**fields)), seed=2).eval()
    given = peft.get_peft_model_state_dict(theirs)
    base = {key for key in given if key.endswith("base_layer.weight")}  # adapted embeddings, repeated
    assert pk.get_peft_model_state_dict(ours).keys() == given.keys() - base
    result = pk.set_peft_model_state_dict(ours, given)
    assert result.missing_keys == [] and set(result.unexpected_keys) == base
    assert_same(tensors(ours(**batch(name))), tensors(theirs(**batch(name))), atol=1e-5)
    assert_same(pk.get_peft_model_state_dict(ours), {key: t for key, t in given.items() if key not in base})
    back = peft.get_peft_model(build(name), getattr(peft, config)(**fields)).eval()
    peft.set_peft_model_state_dict(back, pk.get_peft_model_state_dict(ours))
    assert_same(tensors(back(**batch(name))), tensors(theirs(**batch(name))), atol=1e-5)


def lora(**changes):
    return pk.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False} | changes)


def test_whatever_is_wrapped_around_the_model():
    model = build("llama")
    pk.attach(model, lora(), "default")
    plain = pk.get_peft_model_state_dict(model)
    facade = pk.get_peft_model(build("llama"), lora())

    class Parallel(nn.Module):  # as DistributedDataParallel holds it
        def __init__(self, module):
            super().__init__()
            self.module = module

    for wrapped in (torch.compile(model), Parallel(model), torch.compile(Parallel(model))):
        assert_same(pk.get_peft_model_state_dict(wrapped), plain)
    for wrapped in (facade, torch.compile(facade), Parallel(facade)):
        result = pk.set_peft_model_state_dict(wrapped, plain)
        assert not result.missing_keys and not result.unexpected_keys
        assert_same(pk.get_peft_model_state_dict(wrapped), plain)
    gathered = {key: value + 1 for key, value in facade.state_dict().items()}
    shifted = pk.get_peft_model_state_dict(facade, gathered)
    assert_same(shifted, {key: value + 1 for key, value in plain.items()})
    with pytest.raises(CheckpointError, match="lacks 6 tensors of adapter 'default'"):
        pk.get_peft_model_state_dict(facade, {})
    with pytest.raises(AdapterError, match="nothing is attached"):
        pk.get_peft_model_state_dict(build("llama"))
    with pytest.raises(AdapterError, match="no adapter 'defualt'; did you mean 'default'"):
        pk.get_peft_model_state_dict(facade, adapter_name="defualt")


def test_what_does_not_fit():
    ours = pk.get_peft_model(build("llama"), lora())
    before = {key: value.clone() for key, value in pk.get_peft_model_state_dict(ours).items()}
    given = {key: value + 1 for key, value in before.items()}
    first, second, *_ = given
    given[second] = given[second][:1]
    with pytest.raises(CheckpointError, match=r"tensor base_model\.model\..* is \(1, 4\), wanted \(24, 4\)"):
        pk.set_peft_model_state_dict(ours, given)
    assert_same(pk.get_peft_model_state_dict(ours), before)
    result = pk.set_peft_model_state_dict(ours, given | {"other": torch.ones(1)}, ignore_mismatched_sizes=True)
    assert result == ([second], ["other"])
    after = pk.get_peft_model_state_dict(ours)
    assert torch.equal(after[first], given[first]) and torch.equal(after[second], before[second])


def test_embeddings_when_they_are_asked_for(peft, tmp_path):
    ours = pk.get_peft_model(build("llama"), lora())
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    for which in (True, False, "auto"):
        mine = pk.get_peft_model_state_dict(ours, save_embedding_layers=which)
        assert mine.keys() == peft.get_peft_model_state_dict(theirs, save_embedding_layers=which).keys()
    ours.save_pretrained(tmp_path, save_embedding_layers=True)
    back = pk.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert_same(tensors(back(**batch("llama"))), tensors(ours(**batch("llama"))))
    result = ours.load_adapter(tmp_path, "default")
    assert result.missing_keys == [] and result.unexpected_keys == []
    with pytest.raises(ConfigError, match="save_embedding_layers='yes'"):
        pk.get_peft_model_state_dict(ours, save_embedding_layers="yes")


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": False}, {"use_reentrant": True}])
def test_a_quantised_backbone_made_ready(peft, checkpointing):
    """As PEFT's function of this name leaves it: what trains, in what dtypes, and with what gradients."""
    steps, given = [], {}
    for library in (peft, pk):
        model = build("llama", torch.bfloat16)
        model.is_loaded_in_4bit = True
        prepared = library.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=checkpointing or None)
        assert prepared is model and model.is_gradient_checkpointing
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not [p for p in model.parameters() if p.requires_grad]
        tuned = library.get_peft_model(model, library.LoraConfig(r=4, target_modules=["q_proj"])).train()
        given = given or peft.get_peft_model_state_dict(shake(tuned))
        library.set_peft_model_state_dict(tuned, given)
        tuned(**batch("llama")).loss.backward()
        steps.append({str(i): p.grad for i, p in enumerate(p for p in tuned.parameters() if p.requires_grad)})
    assert steps[0] and all(grad.any() for grad in steps[0].values())
    assert_same(steps[1], steps[0])


def test_a_plain_backbone_made_ready():
    model = pk.prepare_model_for_kbit_training(build("llama", torch.bfloat16))
    assert not model.is_gradient_checkpointing
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model = build("llama", torch.bfloat16)
    model.quantization_method = "gptq"
    pk.prepare_model_for_kbit_training(model)
    assert model.is_gradient_checkpointing and {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_s_own_functions_say_so(peft, kind):
    """They look for PEFT's classes inside: an empty result would be an empty checkpoint of accelerate's."""
    config, name, fields = KINDS[kind]
    ours = pk.get_peft_model(build(name), getattr(pk, config)(**fields))
    with pytest.raises(AttributeError, match="import them from peftkern"):
        peft.get_peft_model_state_dict(ours)
    with pytest.raises((AttributeError, ValueError), match=r"import them from peftkern|vera_A"):
        peft.set_peft_model_state_dict(ours, pk.get_peft_model_state_dict(ours))
