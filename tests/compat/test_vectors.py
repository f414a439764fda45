"""(IA)³ and VeRA files in both directions: outputs, gradients, keys and merged weights as in Hugging Face PEFT."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

import peftkern as pk
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
    to_peft,
)

FF = {"init_ia3_weights": False, "feedforward_modules": ["down_proj"]}
VERA = {"r": 6, "init_weights": False}
CASES: dict[str, tuple[str, str, dict]] = {
    "ia3-plain": ("IA3", "llama", FF | {"target_modules": ["k_proj", "down_proj"]}),
    "ia3-default-llama": ("IA3", "llama", {"init_ia3_weights": False}),
    "ia3-default-gpt2": ("IA3", "gpt2", {"init_ia3_weights": False, "fan_in_fan_out": True}),
    "ia3-ones": ("IA3", "llama", {}),
    "ia3-bias": ("IA3", "llama-bias", FF | {"target_modules": ["v_proj", "up_proj", "down_proj"]}),
    "ia3-conv1d": (
        "IA3", "gpt2",
        {"init_ia3_weights": False, "target_modules": ["c_attn", "mlp.c_fc", "mlp.c_proj"], "fan_in_fan_out": True,
         "feedforward_modules": ["mlp.c_proj"]},
    ),
    "ia3-all-outputs": ("IA3", "llama", {"target_modules": ["q_proj"], "feedforward_modules": []}),
    "ia3-pattern": (
        "IA3", "llama", {"target_modules": r".*(v|down)_proj", "feedforward_modules": r".*\.down_proj"},
    ),
    "ia3-all-linear": ("IA3", "llama-bias", FF | {"target_modules": "all-linear"}),
    "ia3-exclude": ("IA3", "llama", FF | {"target_modules": ["k_proj", "down_proj"], "exclude_modules": r".*\.0\..*"}),
    "ia3-output-dense": (
        "IA3", "bert-seq",
        {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"], "task_type": "SEQ_CLS"},
    ),
    "ia3-saved": ("IA3", "llama", FF | {"target_modules": ["down_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "vera-plain": ("Vera", "llama", VERA | {"target_modules": ["q_proj", "v_proj"]}),
    "vera-default-start": ("Vera", "llama", {"r": 5, "target_modules": ["q_proj"]}),
    "vera-many-shapes": ("Vera", "llama-bias", VERA | {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}),
    "vera-conv1d": ("Vera", "gpt2", VERA | {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "vera-key": ("Vera", "llama", VERA | {"target_modules": ["q_proj", "down_proj"], "projection_prng_key": 77}),
    "vera-not-saved": (
        "Vera", "llama",
        VERA | {"target_modules": ["q_proj", "down_proj"], "projection_prng_key": 5, "save_projection": False},
    ),
    "vera-all-linear": ("Vera", "bert-seq", VERA | {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "vera-bias-all": ("Vera", "llama-bias", VERA | {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "vera-bias-own": ("Vera", "llama-bias", VERA | {"target_modules": ["q_proj"], "bias": "vera_only"}),
    "vera-layers": ("Vera", "llama", VERA | {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    "vera-dropout": ("Vera", "llama", VERA | {"target_modules": ["q_proj"], "vera_dropout": 0.3}),
    "vera-d-initial": ("Vera", "llama", {"r": 5, "d_initial": 0.7, "target_modules": ["q_proj"]}),
    "vera-saved": ("Vera", "llama", VERA | {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}  # fmt: skip


def configuration(library, case):
    kind, name, changes = CASES[case]
    return name, getattr(library, f"{kind}Config")(**changes)


def from_peft(peft, case, directory):
    """A model and its adapter built, shaken and saved by PEFT."""
    name, config = configuration(peft, case)
    return saved_by_peft(peft, build(name), config, directory)


@pytest.fixture(autouse=True)
def _without_what_peft_says_of_itself():
    with warnings.catch_warnings():
        for message in ("Specified to not", "Unmerge result can be inaccurate", "fan_in_fan_out is set to"):
            warnings.filterwarnings("ignore", message=message)
        yield


@pytest.mark.parametrize("case", CASES)
def test_theirs_loads_here(peft, case, tmp_path):
    theirs = from_peft(peft, case, tmp_path)
    name = CASES[case][1]
    assert_same_step(pk.load(build(name), tmp_path, trainable=True), theirs, batch(name))


@pytest.mark.parametrize("case", CASES)
def test_ours_loads_there(peft, case, tmp_path):
    name, config = configuration(pk, case)
    ours = shake(pk.attach(build(name), config))
    pk.save(ours, tmp_path / "ours")
    assert_same_step(ours, to_peft(peft, name, tmp_path / "ours"), batch(name))
    from_peft(peft, case, tmp_path / "theirs")
    assert stored(tmp_path / "ours") == stored(tmp_path / "theirs")


@pytest.mark.parametrize("case", CASES)
def test_merges_to_the_same_weights(peft, case, tmp_path):
    theirs = from_peft(peft, case, tmp_path).merge_and_unload()
    ours = pk.merge_and_unload(pk.load(build(CASES[case][1]), tmp_path))
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("case", ["ia3-plain", "ia3-conv1d", "vera-many-shapes", "vera-conv1d"])
def test_a_bf16_backbone_is_at_least_as_near_to_f32_as_theirs(peft, case, tmp_path):
    theirs = from_peft(peft, case, tmp_path)
    name = CASES[case][1]
    theirs = peft.PeftModel.from_pretrained(build(name, torch.bfloat16), tmp_path, is_trainable=True).eval()
    ours = pk.load(build(name, torch.bfloat16), tmp_path, trainable=True)
    exact = pk.load(build(name, torch.bfloat16).float(), tmp_path, trainable=True)
    assert {p.dtype for p in our_parameters(ours).values()} == {torch.float32}
    assert_as_near_as_peft(ours, theirs, exact, batch(name), slack=2e-2)


@pytest.mark.parametrize("case", CASES)
def test_configuration_has_only_keys_that_peft_knows(peft, case, tmp_path):
    name, config = configuration(pk, case)
    pk.save(pk.attach(build(name), config), tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    known = {*configuration(peft, case)[1].to_dict(), "runtime_config"}
    assert values.keys() <= known, values.keys() - known
    assert values["target_modules"] and "peftkern" not in values


def test_exclusions_that_peft_cannot_express_are_written_by_name(peft, tmp_path):
    config = pk.VeraConfig(**VERA, target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.q_proj"])
    ours = pk.attach(build("llama"), config)
    pk.save(ours, tmp_path)
    assert len([key for key in stored(tmp_path) if "lambda_b" in key]) == 5
    assert_same_step(ours, to_peft(peft, "llama", tmp_path), batch("llama"))


def test_layers_that_peft_cannot_express_are_written_by_name(peft, tmp_path):
    config = pk.IA3Config(target_modules=["k_proj", "down_proj"], layers_to_transform=[1], init_ia3_weights=False)
    ours = pk.attach(build("llama"), config)
    pk.save(ours, tmp_path)
    assert all(".layers.1." in key for key in stored(tmp_path)) and len(stored(tmp_path)) == 2
    assert_same_step(ours, to_peft(peft, "llama", tmp_path), batch("llama"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-seq"])
def test_default_targets_of_ia3_load_there(peft, name, tmp_path):
    """PEFT has a table of model types; by structure the attention's output projection of BERT is left out."""
    ours = shake(pk.attach(build(name), pk.IA3Config(init_ia3_weights=False)))
    pk.save(ours, tmp_path)
    assert_same_step(ours, to_peft(peft, name, tmp_path), batch(name))


def test_every_layer_of_peft_s_vera_reads_the_same_matrices(peft, tmp_path):
    theirs = from_peft(peft, "vera-many-shapes", tmp_path)
    ours = pk.load(build("llama-bias"), tmp_path)
    found = pk.attach(build("llama-bias"), configuration(pk, "vera-many-shapes")[1])
    for model in (ours, found):
        shared = model._peftkern.shared["default"]
        assert torch.equal(shared.a, theirs.base_model.vera_A["default"])
        assert torch.equal(shared.b, theirs.base_model.vera_B["default"])
