"""Prompt tuning files in both directions: the same initial prompts, outputs, losses, gradients and texts as PEFT."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import peftkern as pk
from peftkern import checkpoint
from tests.compat.small import (
    assert_as_near_as_peft,
    assert_same,
    assert_same_step,
    batch,
    build,
    our_parameters,
    saved_by_peft,
    shake,
    stored,
    their_parameters,
    to_peft,
)

T = 5
CASES = {
    "sequence": ("bert-seq", "SEQ_CLS"),
    "sequence-roberta": ("roberta-seq", "SEQ_CLS"),
    "causal-llama": ("llama", "CAUSAL_LM"),
    "causal-gpt2": ("gpt2", "CAUSAL_LM"),
    "causal-tied": ("llama-tied", "CAUSAL_LM"),
}
STRIPPED = {"tokens": ("bert-token", "TOKEN_CLS"), "features": ("bert", "FEATURE_EXTRACTION")}


def from_peft(peft, name, task, directory, dtype=torch.float32, **changes):
    config = peft.PromptTuningConfig(num_virtual_tokens=T, task_type=task, **changes)
    return saved_by_peft(peft, build(name, dtype), config, directory)


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("case", CASES)
def test_theirs_loads_here(peft, case, padding, tmp_path):
    name, task = CASES[case]
    theirs = from_peft(peft, name, task, tmp_path)
    ours = pk.load(build(name), tmp_path, trainable=True)
    assert_same_step(ours, theirs, batch(name, padding), prompt=True)


@pytest.mark.parametrize("case", CASES | STRIPPED)
def test_ours_loads_there(peft, case, tmp_path):
    name, task = (CASES | STRIPPED)[case]
    ours = shake(pk.attach(build(name), pk.PromptTuningConfig(num_virtual_tokens=T, task_type=task)))
    pk.save(ours, tmp_path / "ours")
    theirs = to_peft(peft, name, tmp_path / "ours", prompt=True)
    if case in CASES:
        assert_same_step(ours, theirs, batch(name), prompt=True)
    assert_same(our_parameters(ours), their_parameters(theirs, prompt=True), rtol=0, atol=0)
    from_peft(peft, name, task, tmp_path / "theirs")
    assert stored(tmp_path / "ours") == stored(tmp_path / "theirs")


@pytest.mark.parametrize("case", STRIPPED)
def test_encoders_return_the_rows_of_the_text(peft, case, tmp_path):
    """PEFT returns the prompt's rows as well, and fails when there are labels for the text."""
    name, task = STRIPPED[case]
    theirs = from_peft(peft, name, task, tmp_path)
    ours = pk.load(build(name), tmp_path, trainable=True)
    inputs = batch(name)
    labels = inputs.pop("labels", None)
    key = "last_hidden_state" if labels is None else "logits"
    text = theirs(**inputs)[key][:, T:]
    torch.testing.assert_close(ours(**inputs)[key], text, rtol=1e-4, atol=1e-6)
    if labels is not None:
        loss = F.cross_entropy(text.flatten(0, 1), labels.flatten())
        ours_loss = ours(**inputs, labels=labels).loss
        torch.testing.assert_close(ours_loss, loss, rtol=1e-4, atol=1e-6)
        mine, peer = our_parameters(ours), their_parameters(theirs, prompt=True)
        got = dict(zip(mine, torch.autograd.grad(ours_loss, list(mine.values())), strict=True))
        assert_same(got, dict(zip(peer, torch.autograd.grad(loss, list(peer.values())), strict=True)))


def test_sequence_classification_with_a_decoder(peft, tmp_path):
    """Without padding: with it PEFT pools the last column, whatever stands there (see test_known_bugs.py)."""
    theirs = from_peft(peft, "llama-seq", "SEQ_CLS", tmp_path)
    ours = pk.load(build("llama-seq"), tmp_path, trainable=True)
    assert_same_step(ours, theirs, batch("llama-seq", None), prompt=True)


def test_a_bf16_base(peft, tmp_path):
    theirs = from_peft(peft, "llama", "CAUSAL_LM", tmp_path, torch.bfloat16)
    ours = pk.load(build("llama", torch.bfloat16), tmp_path, trainable=True)
    exact = pk.load(build("llama", torch.bfloat16).float(), tmp_path, trainable=True)
    assert our_parameters(ours)["prompt_embeddings"].dtype == torch.float32
    assert_as_near_as_peft(ours, theirs, exact, batch("llama"), prompt=True)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generates_the_same_text(peft, name, cache, tmp_path):
    theirs = from_peft(peft, name, "CAUSAL_LM", tmp_path)
    ours = pk.load(build(name), tmp_path)
    inputs = {key: value for key, value in batch(name, None).items() if key != "labels"}
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": cache, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(**inputs, **settings), theirs.generate(**inputs, **settings))


def test_initial_prompts(peft, tmp_path):
    words = {word: index for index, word in enumerate(["[UNK]", "is", "this", "good", "or", "bad"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    for length in (3, 13):
        text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "is this good or bad"}
        text |= {"tokenizer_name_or_path": str(tmp_path), "num_virtual_tokens": length, "task_type": "CAUSAL_LM"}
        theirs = peft.get_peft_model(build("llama"), peft.PromptTuningConfig(**text))
        ours = pk.attach(build("llama"), pk.PromptTuningConfig(**text))
        assert_same(our_parameters(ours), their_parameters(theirs, prompt=True), rtol=0, atol=0)
    sampled = pk.PromptTuningConfig(num_virtual_tokens=T, prompt_tuning_init="SAMPLE_VOCAB")
    (rows,) = our_parameters(pk.attach(build("llama"), sampled)).values()
    table = build("llama").get_input_embeddings().weight
    assert bool((rows[:, None] == table[None]).all(2).any(1).all())
    many = pk.PromptTuningConfig(num_virtual_tokens=400, prompt_tuning_init="RANDOM")
    (rows,) = our_parameters(pk.attach(build("llama"), many)).values()
    assert abs(rows.mean()) < 0.05 and abs(rows.std() - 1) < 0.05, "standard normal, as nn.Embedding's"


def test_configuration_is_peft_s(peft, tmp_path):
    pk.save(pk.attach(build("llama"), pk.PromptTuningConfig(num_virtual_tokens=T)), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = peft.PeftConfig.from_pretrained(tmp_path)
    assert config.num_virtual_tokens == T and config.peft_type == "PROMPT_TUNING"
    assert not hasattr(checkpoint.read_config(tmp_path), "peftkern")


def test_a_prompt_for_another_backbone_is_refused(peft, tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=T, task_type="CAUSAL_LM", token_dim=32)
    config.save_pretrained(tmp_path)
    (tmp_path / checkpoint.WEIGHTS_FILE).write_bytes(checkpoint.serialise({"prompt_embeddings": torch.zeros(T, 32)}))
    with pytest.raises(pk.errors.CheckpointError, match="token_dim=32: want 24"):
        pk.load(build("llama"), tmp_path)
