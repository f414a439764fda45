"""Files and models at the edges, both ways: what Hugging Face PEFT does with them, ours does."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import peftkern as pk
from peftkern import convert
from tests.compat.small import (
    HIDDEN,
    VOCABULARY,
    batch,
    bert_config,
    build,
    llama_config,
    saved_by_peft,
    shake,
    tensors,
)

IDS = torch.arange(3, 12)[None]


def made(kind, config):
    torch.manual_seed(7)
    return kind(config).eval()


def opt():
    sizes = {"hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2}
    return made(OPTForCausalLM, OPTConfig(vocab_size=VOCABULARY, ffn_dim=40, max_position_embeddings=64, **sizes))


def bart():
    sizes = {"d_model": HIDDEN, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 40}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_encoder_decoder": False}
    return made(BartForCausalLM, BartConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes, **tokens))


@pytest.mark.parametrize("build_model", [opt, bart])
def test_prompts_of_decoders_inside_a_wrapper(peft, build_model, tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    theirs = saved_by_peft(peft, build_model(), config, tmp_path)
    ours = pk.load(build_model(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [None, "right"])
def test_biases_beside_a_container_that_is_saved_in_full(peft, padding, tmp_path):
    config = peft.LoraConfig(target_modules=["query"], bias="all", modules_to_save=["pooler"])
    theirs = saved_by_peft(peft, build("bert-seq"), config, tmp_path)
    ours = pk.load(build("bert-seq"), tmp_path)
    assert isinstance(ours, BertForSequenceClassification)
    inputs = batch("bert-seq", padding)
    with torch.no_grad():
        torch.testing.assert_close(tensors(ours(**inputs)), tensors(theirs(**inputs)), rtol=1e-4, atol=1e-5)


def test_a_tied_bias_that_is_stored_twice(peft, tmp_path):
    config = peft.LoraConfig(target_modules=["query"], bias="all")
    theirs = saved_by_peft(peft, made(BertForMaskedLM, bert_config()), config, tmp_path)
    ours = pk.load(made(BertForMaskedLM, bert_config()), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["orthogonal"])
def test_a_start_that_leaves_the_backbone_as_it_is(peft, init, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
    theirs = saved_by_peft(peft, build("llama"), config, tmp_path)
    ours = pk.load(build("llama"), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)


def test_rslora_is_folded_into_the_bias_as_well(peft, tmp_path):
    model = shake(
        pk.attach(build("llama-bias"), pk.LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True, lora_bias=True))
    )
    pk.save(model, tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b", fold_rslora=True)
    with torch.no_grad():
        want = model(IDS).logits
        torch.testing.assert_close(pk.load(build("llama-bias"), tmp_path / "b")(IDS).logits, want, rtol=1e-4, atol=1e-5)


def t5():
    sizes = {"d_model": HIDDEN, "d_kv": 12, "d_ff": 40, "num_layers": 1, "num_heads": 2}
    return made(T5ForConditionalGeneration, T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))


def deberta():
    return made(DebertaV2Model, bert_config(DebertaV2Config))


@pytest.mark.parametrize("build_model", [t5, deberta])
def test_default_targets(peft, build_model):
    theirs = peft.get_peft_model(build_model(), peft.LoraConfig())
    ours = pk.attach(build_model(), pk.LoraConfig())
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert counts[0] == counts[1]


def test_a_module_saved_in_full_by_a_path_of_several_words(peft, tmp_path):
    config = pk.LoraConfig(target_modules=["q_proj"], modules_to_save=["layers.1"])
    model = pk.attach(build("llama"), config)
    assert llama_config().num_hidden_layers == 3
    pk.save(model, tmp_path)
    pk.load(build("llama"), tmp_path)


def test_what_is_merged_already_is_unloaded_as_it_is(peft):
    for get in (peft.get_peft_model, pk.get_peft_model):
        model = shake(get(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))).eval()
        with torch.no_grad():
            want = model(input_ids=IDS).logits
            model.merge_adapter()
            torch.testing.assert_close(model.merge_and_unload()(IDS).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]], ids=["linear", "embedding"])
@pytest.mark.parametrize("saver", ["ours", "theirs"])
def test_a_vocabulary_that_has_grown(peft, saver, targets, tmp_path):
    """The new rows, frozen, are in the file; whoever loads it has made room for them."""

    def resized():
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
        model.resize_token_embeddings(VOCABULARY + 9)  # rows of its own each time
        return model

    build("llama").save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=targets)
    kept = shake((pk if saver == "ours" else peft).get_peft_model(resized(), config)).eval()
    kept.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[3, VOCABULARY + 2, VOCABULARY + 8, 5]])
    with torch.no_grad():
        want = kept(input_ids=ids).logits
        for other in (pk, peft):
            loaded = other.PeftModel.from_pretrained(resized(), tmp_path / "adapter").eval()
            torch.testing.assert_close(loaded(input_ids=ids).logits, want, rtol=1e-3, atol=1e-4)
