"""Methods that train the backbone's own parameters: head, bitfit, full, and modules_to_save."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, BertModel

import peftkern as pk
from peftkern.attachment import state
from peftkern.errors import AdapterError, ConfigError, TargetError
from peftkern.testing import TinyModel, tiny_bert, tiny_gpt2, tiny_llama, token_batch, unchanged


def training(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def step(model: nn.Module, batch: dict) -> None:
    model.train()
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(own, lr=0.5)
    model(**batch).loss.backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    model.eval()


def test_head_is_what_lies_outside_the_backbone() -> None:
    assert training(pk.attach(tiny_bert(), pk.HeadConfig())) == {"classifier.weight", "classifier.bias"}
    assert training(pk.attach(tiny_llama(), pk.HeadConfig())) == {"lm_head.weight"}
    config = tiny_bert().config
    pooled = pk.attach(BertForSequenceClassification(config), pk.HeadConfig())
    assert training(pooled) == {"classifier.weight", "classifier.bias"}
    model = tiny_gpt2()
    with unchanged(model), pytest.raises(TargetError, match="has no task head outside its backbone"):
        pk.attach(model, pk.HeadConfig())
    bare = BertModel(config)
    with unchanged(bare), pytest.raises(TargetError, match="BertModel has no task head"):
        pk.attach(bare, pk.HeadConfig())


def test_last_k_blocks(family: TinyModel) -> None:
    model = pk.attach(family.build(), pk.HeadConfig(last_k=1))
    blocks = {name for name in training(model) if ".1." in name}
    assert blocks == {name for name, _ in model.named_parameters() if ".1." in name and "_peftkern" not in name}
    assert not any(".0." in name for name in training(model))
    plain = family.build()
    with unchanged(plain), pytest.raises(ConfigError, match="last_k=3: want at most 2"):
        pk.attach(plain, pk.HeadConfig(last_k=3))
    with pytest.raises(ConfigError, match="last_k=-1"):
        pk.HeadConfig(last_k=-1)


def test_bitfit() -> None:
    model = tiny_bert()
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert training(pk.attach(tiny_bert(), pk.BitFitConfig())) == biases
    query = training(pk.attach(tiny_bert(), pk.BitFitConfig(target_modules=["query"], layers_to_transform=[1])))
    assert query == {"bert.encoder.layer.1.attention.self.query.bias"}
    rest = training(pk.attach(tiny_bert(), pk.BitFitConfig(exclude_modules=["LayerNorm", "classifier"])))
    assert rest == {name for name in biases if "LayerNorm" not in name and "classifier" not in name}
    llama = tiny_llama()
    with unchanged(llama), pytest.raises(TargetError, match="LlamaForCausalLM has no bias"):
        pk.attach(llama, pk.BitFitConfig())
    with unchanged(model), pytest.raises(TargetError, match="no bias that target_modules=\\['quary'\\]"):
        pk.attach(model, pk.BitFitConfig(target_modules=["quary"]))


def test_full_in_place_has_no_second_copy_and_no_way_back(tmp_path) -> None:
    model = tiny_bert()
    mine = {id(p) for p in model.parameters()}
    pk.attach(model, pk.FullConfig(keep_original=False))
    assert {id(p) for p in model.parameters() if p.requires_grad} == mine
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tiny_bert().parameters())
    step(model, token_batch(labels=5))
    for act in (pk.detach, lambda m: pk.disabled(m).__enter__()):
        with unchanged(model), pytest.raises(AdapterError, match="keep_original=False"):
            act(model)
    pk.save(model, tmp_path)
    again = pk.load(tiny_bert(), tmp_path)
    assert torch.equal(again(**token_batch(labels=5)).logits, model(**token_batch(labels=5)).logits)


def test_full_is_plain_fine_tuning(family: TinyModel) -> None:
    """The same step as on a plain model, to the bit."""
    plain, model = family.build(), pk.attach(family.build(), pk.FullConfig())
    for one in (plain, model):
        step(one, family.batch())
    assert torch.equal(plain(**family.batch()).logits, model(**family.batch()).logits)


def test_trained_copies_leave_the_original_alone() -> None:
    model, want = tiny_bert(), tiny_bert()(**token_batch(labels=5)).logits
    pk.attach(model, pk.HeadConfig(last_k=1))
    step(model, token_batch(labels=5))
    assert not torch.equal(model(**token_batch(labels=5)).logits, want)
    with pk.disabled(model):
        assert torch.equal(model(**token_batch(labels=5)).logits, want)
    pk.detach(model)
    assert torch.equal(model(**token_batch(labels=5)).logits, want)


def test_a_second_adapter_starts_from_the_backbone_not_from_the_first() -> None:
    model = pk.attach(tiny_bert(), pk.HeadConfig(), "one")
    step(model, token_batch(labels=5))
    pk.attach(model, pk.HeadConfig(), "two")
    pk.set_adapter(model, "two")
    assert torch.equal(model(**token_batch(labels=5)).logits, tiny_bert()(**token_batch(labels=5)).logits)


def test_full_beside_others_takes_only_the_backbone() -> None:
    """Neither what other adapters added, nor the halves they keep aside."""
    names = {name for name, _ in tiny_bert().named_parameters()}
    model = tiny_bert()
    for name, config in (
        ("lora", pk.LoraConfig()),
        ("prompt", pk.PromptTuningConfig(num_virtual_tokens=2)),
        ("parallel", pk.BottleneckConfig(placement="parallel")),
        ("head", pk.HeadConfig(last_k=1)),
    ):
        pk.attach(model, config, name)
    pk.attach(model, pk.FullConfig(), "full")
    keys = {key.replace(".base_layer", "") for key in state(model).parameters_of(model, "full")}
    assert keys == names
    pk.attach(model, pk.LoraConfig(target_modules="all-linear", bias="all"), "biases")
    biases = {key for key in state(model).parameters_of(model, "biases") if key.endswith("bias")}
    assert {key.replace(".base_layer", "") for key in biases} == {name for name in names if name.endswith("bias")}


def test_modules_to_save(tmp_path) -> None:
    model = pk.attach(tiny_bert(), pk.LoraConfig(modules_to_save=["classifier", "LayerNorm"]))
    whole = {name for name in training(model) if ".adapters." not in name}
    assert whole == {name for name, _ in tiny_bert().named_parameters() if "LayerNorm" in name or "classifier" in name}
    step(model, token_batch(labels=5))
    pk.save(model, tmp_path)
    again = pk.load(tiny_bert(), tmp_path)
    assert torch.equal(again(**token_batch(labels=5)).logits, model(**token_batch(labels=5)).logits)
    plain = tiny_bert()
    with (
        unchanged(plain),
        pytest.raises(TargetError, match="modules_to_save: no module is called 'clasifier'; did you mean 'classifier'"),
    ):
        pk.attach(plain, pk.LoraConfig(modules_to_save=["clasifier"]))


def test_modules_to_save_wins_over_target_modules() -> None:
    model = pk.attach(
        tiny_bert(), pk.LoraConfig(target_modules=["query", "classifier"], modules_to_save=["classifier"])
    )
    assert not hasattr(model.classifier, "base_layer")
    assert "classifier.weight" in training(model)


def test_task_type_trains_the_head() -> None:
    for config in (pk.LoraConfig, pk.BottleneckConfig, pk.PromptTuningConfig, pk.BitFitConfig):
        model = pk.attach(tiny_bert(), config(task_type="TOKEN_CLS"))
        assert "classifier.weight" in training(model), config
        assert "classifier.weight" not in training(pk.attach(tiny_bert(), config())), config
        pk.detach(model)
        assert model.classifier.weight.requires_grad


def test_integer_parameters_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("table", nn.Parameter(torch.arange(3), requires_grad=False))
    pk.attach(model, pk.FullConfig())
    assert training(model) == {"0.weight", "0.bias"}


def test_selected_and_wrapped_module_at_once(tmp_path) -> None:
    """LoRA on the layers of a block that another adapter trains in full, both active, both saved."""
    model = pk.attach(tiny_bert(), pk.LoraConfig(target_modules=["query"], init_lora_weights=False), "lora")
    pk.attach(model, pk.HeadConfig(last_k=2), "last")
    pk.set_adapter(model, ["lora", "last"])
    step(model, token_batch(labels=5))
    want = model(**token_batch(labels=5)).logits
    again = tiny_bert()
    for name in ("last", "lora"):
        pk.save(model, tmp_path / name, name)
        pk.load(again, tmp_path / name, name)
    pk.set_adapter(again, ["lora", "last"])
    torch.testing.assert_close(again(**token_batch(labels=5)).logits, want)
    keys = set(state(model).parameters_of(model, "last"))
    assert "bert.encoder.layer.0.attention.self.query.weight" in keys
