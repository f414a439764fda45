"""Prefix tuning files in both directions: the same outputs, losses, gradients and texts as PEFT."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from transformers import LlamaModel

import peftkern as pk
from peftkern import checkpoint
from tests.compat.small import (
    assert_as_near_as_peft,
    assert_same,
    assert_same_step,
    batch,
    build,
    gradients,
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
    "tokens": ("bert-token", "TOKEN_CLS"),
    "questions": ("bert-qa", "QUESTION_ANS"),
    "features": ("bert", "FEATURE_EXTRACTION"),
    "features-roberta": ("roberta", "FEATURE_EXTRACTION"),
    "causal-gpt2": ("gpt2", "CAUSAL_LM"),
    "causal-llama-grouped": ("llama", "CAUSAL_LM"),
    "causal-tied": ("llama-tied", "CAUSAL_LM"),
    "sequence-llama": ("llama-seq", "SEQ_CLS"),
}

# PEFT 0.21 looks for `past_key_values` in the signature of the backbone.
RENAMED = "past_key_values" not in inspect.signature(LlamaModel.forward).parameters


def skip_where_peft_cannot(task: str) -> None:
    if RENAMED and task not in ("CAUSAL_LM", "FEATURE_EXTRACTION"):
        pytest.skip(f"PEFT's prefixes know the cache as past_key_values, and transformers has renamed it ({task})")


def from_peft(peft, name, task, directory, dtype=torch.float32, **changes):
    config = peft.PrefixTuningConfig(num_virtual_tokens=T, task_type=task, **changes)
    return saved_by_peft(peft, build(name, dtype), config, directory)


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("case", CASES)
def test_theirs_loads_here(peft, case, padding, tmp_path):
    name, task = CASES[case]
    skip_where_peft_cannot(task)
    theirs = from_peft(peft, name, task, tmp_path)
    ours = pk.load(build(name), tmp_path, trainable=True)
    assert_same_step(ours, theirs, batch(name, padding), prompt=True)


@pytest.mark.parametrize("case", CASES)
def test_ours_loads_there(peft, case, tmp_path):
    name, task = CASES[case]
    ours = shake(pk.attach(build(name), pk.PrefixTuningConfig(num_virtual_tokens=T, task_type=task)))
    pk.save(ours, tmp_path / "ours")
    theirs = to_peft(peft, name, tmp_path / "ours", prompt=True)
    assert_same(our_parameters(ours), their_parameters(theirs, prompt=True), rtol=0, atol=0)
    from_peft(peft, name, task, tmp_path / "theirs")
    assert stored(tmp_path / "ours") == stored(tmp_path / "theirs")
    skip_where_peft_cannot(task)
    assert_same_step(ours, theirs, batch(name), prompt=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_projection_trains_alike_and_is_dropped_from_files(peft, name, tmp_path):
    """The same MLP on both sides: the same gradients of its weights, and a flat prefix in both files."""
    options = {"prefix_projection": True, "encoder_hidden_size": 7}
    theirs = from_peft(peft, name, "CAUSAL_LM", tmp_path / "theirs", **options)
    ours = pk.attach(build(name), pk.PrefixTuningConfig(num_virtual_tokens=T, task_type="CAUSAL_LM", **options))
    pairs = {"embedding.weight": "tokens"}
    peer = {path.split("default.", 1)[1]: p for path, p in theirs.named_parameters() if "prompt_encoder" in path}
    mine = dict(ours._peftkern.hooks.prompts["default"].named_parameters())
    matched = {key: mine[pairs.get(key, key)] for key in peer}
    with torch.no_grad():
        for key, parameter in matched.items():
            parameter.copy_(peer[key])
    inputs = batch(name, "right")
    our_out, our_grads = gradients(ours, matched, inputs)
    their_out, their_grads = gradients(theirs, peer, inputs)
    assert_same(our_out, their_out)
    assert_same(our_grads, their_grads)
    pk.save(ours, tmp_path / "ours")
    a, b = (checkpoint.read_tensors(tmp_path / side) for side in ("ours", "theirs"))
    assert_same(a, b)
    for directory in ("ours", "theirs"):
        loaded = pk.load(build(name), tmp_path / directory, trainable=True)
        assert_same(gradients(loaded, our_parameters(loaded), inputs)[0], our_out)
    again = to_peft(peft, name, tmp_path / "ours", prompt=True)
    assert_same(gradients(again, their_parameters(again, prompt=True), inputs)[0], our_out)


def test_a_bf16_base(peft, tmp_path):
    theirs = from_peft(peft, "llama", "CAUSAL_LM", tmp_path, torch.bfloat16)
    ours = pk.load(build("llama", torch.bfloat16), tmp_path, trainable=True)
    exact = pk.load(build("llama", torch.bfloat16).float(), tmp_path, trainable=True)
    assert our_parameters(ours)["prompt_embeddings"].dtype == torch.float32
    assert_as_near_as_peft(ours, theirs, exact, batch("llama"), prompt=True)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generates_the_same_text(peft, name, padding, beams, cache, tmp_path):
    """PEFT with its cache against ours with and without: PEFT without one loses the text, or raises."""
    if RENAMED:
        pytest.skip("PEFT fills past_key_values while generating, which transformers has renamed")
    theirs = from_peft(peft, name, "CAUSAL_LM", tmp_path)
    ours = pk.load(build(name), tmp_path)
    inputs = {key: value for key, value in batch(name, padding).items() if key != "labels"}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings["num_beams"] = beams
    assert torch.equal(ours.generate(**inputs, **settings, use_cache=cache), theirs.generate(**inputs, **settings))


def test_initial_prefixes(peft):
    many = {"num_virtual_tokens": 400, "task_type": "CAUSAL_LM"}
    (rows,) = our_parameters(pk.attach(build("llama"), pk.PrefixTuningConfig(**many))).values()
    assert abs(rows.mean()) < 0.05 and abs(rows.std() - 1) < 0.05, "standard normal, as nn.Embedding's"
    for projection in (False, True):
        zero = {"num_virtual_tokens": T, "init_weights": "zero", "prefix_projection": projection}
        ours = pk.attach(build("llama"), pk.PrefixTuningConfig(**zero))
        theirs = peft.get_peft_model(build("llama"), peft.PrefixTuningConfig(**zero, task_type="CAUSAL_LM"))
        assert not any(t.any() for t in checkpoint.tensors(ours).values())
        assert not theirs.get_prompt_embedding_to_save("default").any()


def test_configuration_is_peft_s(peft, tmp_path):
    pk.save(pk.attach(build("llama"), pk.PrefixTuningConfig(num_virtual_tokens=T)), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = peft.PeftConfig.from_pretrained(tmp_path)
    assert config.num_virtual_tokens == T and config.peft_type == "PREFIX_TUNING"


def test_a_prefix_for_another_backbone_is_refused(peft, tmp_path):
    peft.PrefixTuningConfig(num_virtual_tokens=T, num_layers=7).save_pretrained(tmp_path)
    (tmp_path / checkpoint.WEIGHTS_FILE).write_bytes(checkpoint.serialise({"prompt_embeddings": torch.zeros(T, 168)}))
    with pytest.raises(pk.errors.CheckpointError, match="num_layers=7: want 3"):
        pk.load(build("llama"), tmp_path)
