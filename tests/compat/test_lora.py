"""LoRA files in both directions: the same outputs, gradients, keys and merged weights as Hugging Face PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import peftkern as pk
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

LAYER = r"model\.layers\.2\.self_attn\.o_proj"
CASES: dict[str, tuple[str, dict]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "default-targets-llama": ("llama", {}),
    "default-targets-bert": ("bert-seq", {"task_type": "SEQ_CLS"}),
    "default-targets-gpt2": ("gpt2", {"fan_in_fan_out": True}),
    "rslora": ("llama", {"lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    "rslora-patterns": ("llama", {"use_rslora": True, "target_modules": ["v_proj"], "rank_pattern": {"1.*v_proj": 9}}),
    "bias-all": ("llama-bias", {"bias": "all", "target_modules": ["q_proj", "down_proj"]}),
    "bias-lora-only": ("llama-bias", {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]}),
    "bias-all-bert": ("bert-seq", {"bias": "all", "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bias-lora-only-conv1d": ("gpt2", {"bias": "lora_only", "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "lora-bias": ("llama-bias", {"lora_bias": True, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}),
    "lora-bias-all": (
        "llama-bias",
        {"lora_bias": True, "bias": "all", "target_modules": ["q_proj"], "use_rslora": True},
    ),
    "lora-bias-conv1d": ("gpt2", {"lora_bias": True, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "o_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6, LAYER: 3},
            "alpha_pattern": {"v_proj": 5, ".*o_proj": 7},
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-bert": ("bert", {"target_modules": ["word_embeddings", "query"]}),
    "embedding-gpt2": ("gpt2", {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    "embedding-tied": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head-tied": ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    "both-tied": ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all-linear-gpt2": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "all-linear-bert": ("bert-seq", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "all-linear-no-task": ("bert-token", {"target_modules": "all-linear"}),
    "saved-modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "saved-embedding": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "saved-embedding-tied": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "saved-head-tied": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved-both-tied": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "sequence-bert": ("bert-seq", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "sequence-roberta": ("roberta-seq", {"target_modules": ["dense"], "task_type": "SEQ_CLS"}),
    "sequence-llama": ("llama-seq", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    "sequence-and-saved": (
        "bert-seq",
        {"target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["pooler"]},
    ),
    "tokens-bert": ("bert-token", {"target_modules": ["query"], "task_type": "TOKEN_CLS"}),
    "questions-bert": ("bert-qa", {"target_modules": ["query"], "task_type": "QUESTION_ANS"}),
    "causal": ("llama", {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}),
    "features": ("bert", {"target_modules": ["query"], "task_type": "FEATURE_EXTRACTION"}),
    "exclude": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "exclude-regex": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*layers\.1\..*"}),
    "layers": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]}),
    "layers-empty": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": []}),
    "layers-pattern": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    "layers-gpt2": (
        "gpt2",
        {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": ["h"], "fan_in_fan_out": True},
    ),
    "regex": ("llama", {"target_modules": r".*\.(q|k)_proj|.*up_proj"}),
    "regex-bert": ("bert-seq", {"target_modules": r".*attention.*dense", "task_type": "SEQ_CLS"}),
    "full-path": ("llama", {"target_modules": ["model.layers.1.mlp.up_proj"]}),
    "dropout": ("llama", {"target_modules": ["q_proj"], "lora_dropout": 0.3}),
    "dora": ("llama", {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "dora-all-linear": ("llama", {"use_dora": True, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "dora-bias": ("llama-bias", {"use_dora": True, "target_modules": ["q_proj", "up_proj"]}),
    "dora-bias-trained": ("llama-bias", {"use_dora": True, "bias": "lora_only", "target_modules": ["q_proj"]}),
    "dora-bert": ("bert-seq", {"use_dora": True, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "dora-conv1d": ("gpt2", {"use_dora": True, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "dora-embedding": ("bert", {"use_dora": True, "target_modules": ["word_embeddings", "query"]}),
    "dora-dropout": ("llama", {"use_dora": True, "target_modules": ["v_proj"], "lora_dropout": 0.3}),
    "dora-rslora-patterns": (
        "llama",
        {
            "use_dora": True,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 7},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
        },
    ),
    "dora-starts-as-identity": ("llama", {"use_dora": True, "init_lora_weights": True, "target_modules": ["o_proj"]}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
}
CORRUPTED = ("embedding-gpt2", "embedding-tied", "head-tied", "both-tied")
"""Where PEFT's merge moves the other end of a tied weight too; ours is tested in test_known_bugs.py."""


def options(case: str) -> tuple[str, dict]:
    name, changes = CASES[case]
    return name, {"r": 4, "init_lora_weights": False} | changes


def from_peft(peft, name, changes, directory, adapter="default", dtype=torch.float32):
    """A model and its adapter built, shaken and saved by PEFT."""
    return saved_by_peft(peft, build(name, dtype), peft.LoraConfig(**changes), directory, adapter)


@pytest.mark.parametrize("case", CASES)
def test_theirs_loads_here(peft, case, tmp_path):
    name, changes = options(case)
    theirs = from_peft(peft, name, changes, tmp_path)
    ours = pk.load(build(name), tmp_path, trainable=True)
    assert_same_step(ours, theirs, batch(name))


@pytest.mark.parametrize("case", CASES)
def test_ours_loads_there(peft, case, tmp_path):
    name, changes = options(case)
    ours = shake(pk.attach(build(name), pk.LoraConfig(**changes)))
    pk.save(ours, tmp_path / "ours")
    assert_same_step(ours, to_peft(peft, name, tmp_path / "ours"), batch(name))
    from_peft(peft, name, changes, tmp_path / "theirs")
    assert stored(tmp_path / "ours") == stored(tmp_path / "theirs")


@pytest.mark.parametrize("case", [case for case in CASES if case not in CORRUPTED])
def test_merges_to_the_same_weights(peft, case, tmp_path):
    name, changes = options(case)
    theirs = from_peft(peft, name, changes, tmp_path).merge_and_unload()
    ours = pk.merge_and_unload(pk.load(build(name), tmp_path))
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert type(ours) is type(build(name))
    assert not [key for key in ours.state_dict() if "peftkern" in key or "base_layer" in key]


TARGETS = {
    "llama-bias": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "wte"],
    "bert-seq": ["query", "key", "dense", "word_embeddings"],
}


@st.composite
def configurations(draw):
    name = draw(st.sampled_from(sorted(TARGETS)))
    chosen = draw(st.lists(st.sampled_from(TARGETS[name]), min_size=1, unique=True))
    changes = {
        "target_modules": chosen,
        "r": draw(st.integers(1, 9)),
        "lora_alpha": draw(st.integers(1, 32)),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "rank_pattern": draw(st.dictionaries(st.sampled_from(chosen), st.integers(1, 7), max_size=2)),
        "alpha_pattern": draw(st.dictionaries(st.sampled_from(chosen), st.integers(1, 7), max_size=2)),
        "fan_in_fan_out": name == "gpt2",
        "init_lora_weights": False,
    }
    if name == "bert-seq" and draw(st.booleans()):
        changes["task_type"] = "SEQ_CLS"
    if name != "gpt2" and draw(st.booleans()) and set(chosen) - {"embed_tokens", "lm_head", "word_embeddings"}:
        changes["layers_to_transform"] = draw(st.lists(st.integers(0, 1), min_size=1, unique=True))
    return name, changes


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(configurations())
def test_any_configuration_round_trips(peft, tmp_path_factory, drawn):
    name, changes = drawn
    directory = tmp_path_factory.mktemp("any")
    # PEFT adds (c - 1) times the base's output to it: with an update much larger than the weight f32 tells them apart.
    dtype = torch.float64 if changes["use_dora"] else torch.float32
    theirs = from_peft(peft, name, changes, directory / "theirs", dtype=dtype)
    ours = pk.load(build(name, dtype), directory / "theirs", trainable=True)
    assert_same_step(ours, theirs, batch(name))
    pk.save(ours, directory / "ours")
    assert_same_step(ours, to_peft(peft, name, directory / "ours", dtype=dtype), batch(name))


@pytest.mark.parametrize("case", ["rslora", "conv1d", "embedding-bert", "sequence-bert", "dora-bias", "dora-conv1d"])
def test_f32_adapters_over_a_bf16_base(peft, case, tmp_path):
    name, changes = options(case)
    theirs = from_peft(peft, name, changes, tmp_path, dtype=torch.bfloat16)
    ours = pk.load(build(name, torch.bfloat16), tmp_path, trainable=True)
    exact = pk.load(build(name, torch.bfloat16).float(), tmp_path, trainable=True)
    lora = {key: p.dtype for key, p in our_parameters(ours).items() if "lora_" in key}
    assert set(lora.values()) == {torch.float32}
    assert_as_near_as_peft(ours, theirs, exact, batch(name))
    merged = pk.merge_and_unload(ours), theirs.merge_and_unload(), pk.merge_and_unload(exact)
    states = [model.state_dict() for model in merged]
    for key, truth in states[2].items():
        mine, other = ((state[key].float() - truth).norm() for state in states[:2])
        assert mine <= other + 1e-3 * truth.norm(), key


def test_the_name_of_an_adapter_is_not_in_its_file(peft, tmp_path):
    name, changes = options("plain")
    theirs = from_peft(peft, name, changes, tmp_path, adapter="first")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["first"]
    ours = pk.load(build(name), tmp_path / "first", "second", trainable=True)
    for parameters in our_parameters(ours, "second"), their_parameters(theirs, "first"):
        assert not [key for key in parameters if "first" in key or "second" in key]
    pk.save(ours, tmp_path / "again", "second")
    back = to_peft(peft, name, tmp_path / "again", "third")
    assert_same(gradients(ours, our_parameters(ours, "second"), batch(name))[1],
                gradients(back, their_parameters(back, "third"), batch(name))[1])  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_configuration_says_what_servers_read(peft, case, tmp_path):
    """vLLM and others read these keys, and want the targets as a list or a regular expression."""
    name, changes = options(case)
    pk.save(pk.attach(build(name), pk.LoraConfig(**changes)), tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules", "bias", "use_rslora", "peft_type"} <= values.keys()
    assert values["peft_type"] == "LORA" and values["inference_mode"] is True
    assert values["target_modules"] not in (None, "all-linear") and "peftkern" not in values
    known = {*peft.LoraConfig().to_dict(), "runtime_config"}
    assert values.keys() <= known


def test_a_pattern_with_layers_is_written_so_that_peft_accepts_it(peft, tmp_path):
    """PEFT refuses `layers_to_transform` beside a regular expression; here it means what it says."""
    config = pk.LoraConfig(r=4, init_lora_weights=False, target_modules=r".*_proj", layers_to_transform=[1])
    ours = pk.attach(build("llama"), config)
    pk.save(ours, tmp_path)
    assert all(".layers.1." in key for key in stored(tmp_path))
    assert_same_step(ours, to_peft(peft, "llama", tmp_path), batch("llama"))


def test_base_weights_that_come_with_an_adapter_are_used(peft, tmp_path):
    """PEFT saves adapted embeddings whole; after a resize they are not those of the model one loads into."""
    name, changes = options("embedding")
    theirs = peft.get_peft_model(build(name), peft.LoraConfig(**changes)).eval()
    theirs.get_input_embeddings().base_layer.weight.data[5] += 1.0
    shake(theirs).save_pretrained(tmp_path / "theirs")
    plain = build(name)
    before = plain.get_input_embeddings().weight.clone()
    ours = pk.load(plain, tmp_path / "theirs", trainable=True)
    assert_same_step(ours, theirs, batch(name))
    assert len(our_parameters(ours)) == len(their_parameters(theirs)), "what comes along does not train"
    pk.save(ours, tmp_path / "ours")
    assert_same_step(ours, to_peft(peft, name, tmp_path / "ours"), batch(name))
    with pk.disabled(ours):
        assert torch.equal(ours(**batch(name)).logits, build(name)(**batch(name)).logits)
    assert torch.equal(pk.detach(ours).get_input_embeddings().weight, before)


def test_a_resized_embedding_comes_along_too(peft, tmp_path):
    model = build("llama")
    torch.manual_seed(3)
    model.resize_token_embeddings(70, mean_resizing=False)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    fresh = build("llama")
    torch.manual_seed(4)
    fresh.resize_token_embeddings(70, mean_resizing=False)
    inputs = batch("llama") | {"input_ids": batch("llama")["input_ids"] + 8}
    assert_same_step(pk.load(fresh, tmp_path, trainable=True), theirs, inputs)
    with pytest.raises(pk.errors.CheckpointError, match=r"embed_tokens|lm_head.*\(70, 24\)"):
        pk.load(build("llama"), tmp_path)
