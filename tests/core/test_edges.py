"""Hooks, patches, copies, offloading, and models and files that are not as most are."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    OPTForSequenceClassification,
    Trainer,
)

import peftkern as pk
from peftkern import registry
from peftkern.adapter import LayerAdapter
from peftkern.errors import CheckpointError, ConfigError, PluginLoadError, TargetError
from peftkern.methods.lora import LoRA
from peftkern.testing import tiny_gpt2, tiny_llama
from tests.core.test_ecosystem import arguments

IDS = torch.arange(1, 9)[None]


def opt(kind: type = OPTForCausalLM, **changes) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 61}
    sizes |= {"word_embed_proj_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0, "dropout": 0.0}
    return kind(OPTConfig(**sizes, **changes)).eval()


def lora(*targets: str, **options) -> pk.LoraConfig:
    return pk.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **options)


@pytest.mark.parametrize(
    "config",
    [lora("0"), lora("0", use_dora=True), pk.VeraConfig(r=4, target_modules=["0"], init_weights=False)],
    ids=["lora", "dora", "vera"],
)
def test_what_a_hook_keeps_stays_as_it_is(config) -> None:
    net, kept = nn.Sequential(nn.Linear(64, 64)), []
    net[0].register_forward_hook(lambda _module, _args, output: kept.append(output))
    pk.attach(net, config)
    x = torch.randn(300, 64)
    with torch.no_grad():
        net(x)
    torch.testing.assert_close(kept[0], nn.functional.linear(x, net[0].weight, net[0].bias))


def test_a_layer_that_returns_a_tensor_of_its_own_again_and_again() -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    cached = torch.randn(300, 64)
    before = cached.clone()
    net[0].register_forward_hook(lambda *_: cached)
    pk.attach(net, lora("0"))
    with torch.no_grad():
        first, second = net(torch.ones(300, 64)), net(torch.ones(300, 64))
    assert torch.equal(first, second) and torch.equal(cached, before) and not torch.equal(first, before)


def test_an_output_may_be_changed_in_place() -> None:
    net = pk.attach(nn.Sequential(nn.Linear(256, 512), nn.ReLU(inplace=True), nn.Linear(512, 4)), lora("0", "2"))
    net(torch.randn(8, 64, 256)).sum().backward()


def test_a_forward_patched_on_the_instance_runs() -> None:
    model = tiny_llama().eval()
    layer = model.model.layers[0].self_attn.q_proj
    own = layer.forward
    layer.forward = lambda x: own(x) * 0
    with torch.no_grad():
        want = model(IDS).logits
        pk.attach(model, pk.LoraConfig(target_modules=["q_proj"]))
        torch.testing.assert_close(model(IDS).logits, want)


@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_layers(when: str, tmp_path: Path) -> None:
    """accelerate keeps weights on the meta device until a layer runs."""
    accelerate = pytest.importorskip("accelerate")
    model = pk.attach(tiny_llama().eval(), lora("q_proj", "down_proj"))
    pk.save(model, tmp_path)
    with torch.no_grad():
        want = model(IDS).logits
        other = tiny_llama().eval()
        if when == "after":
            pk.load(other, tmp_path)
        accelerate.cpu_offload(other, execution_device=torch.device("cpu"))
        if when == "before":
            pk.load(other, tmp_path)
        for _ in range(2):
            torch.testing.assert_close(other(IDS).logits, want)


def test_a_model_without_weights_cannot_take_a_file(tmp_path: Path) -> None:
    pk.save(pk.attach(tiny_llama(), lora("q_proj")), tmp_path)
    with torch.device("meta"):
        empty = tiny_llama()
    with pytest.raises(CheckpointError, match="meta device"):
        pk.load(empty, tmp_path)


def test_what_is_made_trainable_by_hand_stays_so() -> None:
    model = pk.attach(tiny_llama(), pk.LoraConfig())
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    for norm in norms:
        norm.requires_grad_()
    with pk.disabled(model):
        pass
    pk.attach(model, pk.LoraConfig(), name="other")
    pk.set_adapter(model, "other")
    assert norms and all(norm.requires_grad for norm in norms)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("default" in name for name in trained) and any("other" in name for name in trained)


def test_copies_of_data_parallel_say_what_to_do() -> None:
    for config in (pk.LoraConfig(), pk.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")):
        model = pk.attach(tiny_llama(), config)
        for module in model.modules():
            module._is_replica = True
        with pytest.raises(RuntimeError, match="DataParallel"):
            model(IDS)


def test_a_model_of_images_and_text(tmp_path: Path) -> None:
    """It knows no input embedding of its own."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text, vision = sizes | {"vocab_size": 61}, sizes | {"image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    pk.save(pk.attach(model, lora("q_proj")), tmp_path)
    pk.load(pk.detach(model, "default"), tmp_path)
    pk.detach(model, "default")
    pk.attach(model, pk.LoraConfig(target_modules="all-linear"))
    pk.detach(model, "default")
    with pytest.raises(TargetError, match="no token embedding"):
        pk.attach(model, pk.PromptTuningConfig(num_virtual_tokens=2))


@pytest.mark.parametrize("kind", [OPTForCausalLM, OPTForSequenceClassification])
def test_a_backbone_that_only_holds_a_decoder(kind: type) -> None:
    task = "CAUSAL_LM" if kind is OPTForCausalLM else "SEQ_CLS"
    model = opt(kind)
    with torch.no_grad():
        plain = model(IDS).logits
        pk.attach(model, pk.PromptTuningConfig(num_virtual_tokens=3, task_type=task))
        prompted = model(IDS).logits
    if task == "CAUSAL_LM":
        assert prompted.shape[1] == IDS.shape[1] + 3
        assert model(IDS, labels=IDS).loss.isfinite()
        assert model.generate(IDS, max_new_tokens=3).shape == (1, IDS.shape[1] + 3)
    assert not torch.equal(prompted[:, -1], plain[:, -1])
    with pytest.raises(TargetError, match="a mask that does not know of a prefix"):
        pk.attach(opt(kind), pk.PrefixTuningConfig(num_virtual_tokens=3))


def test_a_model_that_goes_round_its_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pk.attach(tiny_llama(), pk.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    monkeypatch.setattr(
        type(model), "forward", lambda self, input_ids: self.lm_head(self.model.embed_tokens(input_ids))
    )
    with pytest.raises(RuntimeError, match="did not call its LlamaModel"):
        model(IDS)


def masked_bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=61, max_position_embeddings=32, **sizes)).eval()
    nn.init.normal_(model.cls.predictions.bias)
    return model


@pytest.mark.parametrize("target", ["decoder", "word_embeddings"])
def test_a_merged_model_keeps_all_that_was_tied(target: str, tmp_path: Path) -> None:
    model = pk.attach(masked_bert(), lora(target))
    with torch.no_grad():
        want = model(IDS).logits
        pk.merge_and_unload(model).save_pretrained(tmp_path)
        again = BertForMaskedLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(IDS).logits, want)


def test_a_tied_head_that_trains_apart_can_be_saved_by_trainer(tmp_path: Path) -> None:
    model = pk.attach(tiny_gpt2(), pk.LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"]))
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    trainer = Trainer(model, arguments(tmp_path, max_steps=2, save_steps=1), train_dataset=rows)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    state = model.state_dict()
    assert model.load_state_dict(state).missing_keys == []
    assert isinstance(model, GPT2LMHeadModel)
    pk.detach(model, "default")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_tokenizer_that_a_file_names_is_not_asked(tmp_path: Path) -> None:
    model = pk.attach(tiny_llama(), pk.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    pk.save(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "/nowhere"}
    path.write_text(json.dumps(json.loads(path.read_text()) | text | {"tokenizer_kwargs": {"trust_remote_code": True}}))
    loaded = pk.load(tiny_llama(), tmp_path, trainable=True)
    assert not pk.adapters(loaded)["default"].inference_mode
    assert any(p.requires_grad for p in loaded.parameters())


def test_a_tokenizers_own_code_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    seen = {}

    def tokenizer(_name, **options):
        seen.update(options)
        return lambda _text: {"input_ids": [3, 4]}

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizer)
    pk.attach(
        tiny_llama(),
        pk.PromptTuningConfig(
            num_virtual_tokens=2, prompt_tuning_init="TEXT", prompt_tuning_init_text="x", tokenizer_name_or_path="any",
            tokenizer_kwargs={"trust_remote_code": True, "use_fast": True},
        ),
    )  # fmt: skip
    assert seen == {"trust_remote_code": False, "use_fast": True}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_pattern", ["x"]), ("alpha_pattern", "x"), ("rank_pattern", {"x": "y"}), ("modules_to_save", [1]),
        ("exclude_modules", 5), ("target_modules", [1]), ("layers_to_transform", "x"), ("use_rslora", "false"),
        ("r", 2.5), ("r", True), ("lora_alpha", None), ("lora_dropout", "0.1"),
    ],
)  # fmt: skip
def test_a_field_of_another_type(field: str, value: object, tmp_path: Path) -> None:
    pk.save(pk.attach(tiny_llama(), pk.LoraConfig(target_modules=["q_proj"])), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ConfigError, match=f"LoraConfig: {field}="):
        pk.load(tiny_llama(), tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"peft_type": "X", "peftkern": "x"}'], ids=["deep", "own"])
def test_a_configuration_file_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="adapter_config"):
        pk.load(tiny_llama(), tmp_path)


def test_a_hint_repeats_no_command_of_a_file(tmp_path: Path) -> None:
    own = {"method": "x", "distribution": "x; rm -rf /"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "X", "peftkern": own}))
    with pytest.raises(pk.errors.UnknownMethodError, match="no distribution is known"):
        pk.load(tiny_llama(), tmp_path)


class Borrows(LoRA):
    """A method that takes another one's Config for its own."""

    name = "borrows"
    Config = pk.LoraConfig


class Bare(LayerAdapter):
    name = "bare"
    Config = dict  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("value", "message"),
    [("Borrows", "belongs to LoRA"), ("Bare", "no subclass of AdapterConfig"), ("exits", "SystemExit")],
)
def test_a_plugin_harms_no_other(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = value.lower()
    points = registry._entry_points()
    module = "tests.core.exits" if value == "exits" else f"{__name__}:{value}"
    monkeypatch.setattr(registry, "_entry_points", lambda: {name: [EntryPoint(name, module, registry.GROUP)], **points})
    with pytest.raises(PluginLoadError, match=message):
        registry.load(name)
    assert message in str(pk.methods()[name].error)
    assert pk.LoraConfig.method is LoRA and registry.by_peft_type("LORA") is LoRA


def test_a_plugin_does_not_take_a_built_in_methods_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may call its Config LoraConfig, and stands before `lora` by its name."""
    own = registry._entry_points()["lora"]
    points = {"a": [EntryPoint("a", "elsewhere:A", registry.GROUP)], "lora": own}
    known = {"a": ("another", "1"), "lora": ("peftkern", "1")}
    monkeypatch.setattr(registry, "_distribution", lambda point: known[point.name])
    monkeypatch.setattr(registry, "_entry_points", lambda: points)
    assert registry._own_first() == ["lora", "a"]
