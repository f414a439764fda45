"""`AutoPeftModel...`: a saved adapter brings its backbone."""

from __future__ import annotations

import json

import pytest
import torch

import peftkern as pk
from peftkern.errors import CheckpointError, ConfigError
from tests.compat.small import VOCABULARY, assert_same, batch, build, shake, tensors

TASKS = {
    "CAUSAL_LM": ("llama", "ForCausalLM"),
    "SEQ_CLS": ("bert-seq", "ForSequenceClassification"),
    "TOKEN_CLS": ("bert-token", "ForTokenClassification"),
    "QUESTION_ANS": ("bert-qa", "ForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("bert", "ForFeatureExtraction"),
}


def backbone(name, directory):
    """A model as it comes from a directory, whose name an adapter's file then holds."""
    model = build(name)
    model.save_pretrained(directory)
    return type(model).from_pretrained(directory).eval()


@pytest.fixture
def saved(peft, request, tmp_path):
    """Saved by PEFT: directory of an adapter, and the model that it was saved from."""
    task, changes = getattr(request, "param", ("CAUSAL_LM", {}))
    name = TASKS[task or "FEATURE_EXTRACTION"][0]
    linear = ["q_proj", "v_proj"] if name == "llama" else ["query", "value"]
    config = peft.LoraConfig(r=4, target_modules=linear, task_type=task, **changes)
    theirs = shake(peft.get_peft_model(backbone(name, tmp_path / "backbone"), config)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", theirs


@pytest.mark.parametrize("saved", [(task, {}) for task in TASKS], indirect=True, ids=list(TASKS))
def test_an_adapter_of_a_task(saved):
    directory, theirs = saved
    task = json.loads((directory / "adapter_config.json").read_text())["task_type"]
    name, ending = TASKS[task]
    for auto in (getattr(pk, f"AutoPeftModel{ending}"), pk.AutoPeftModel):
        ours = auto.from_pretrained(directory, dtype=torch.float32)
        assert isinstance(ours, pk.PeftModel) and not ours.training
        assert not [p for p in ours.parameters() if p.requires_grad]
        assert_same(tensors(ours(**batch(name))), tensors(theirs(**batch(name))))
    with pytest.raises(ConfigError, match=f"for {task}, and AutoPeftModelForSeq2SeqLM is for SEQ_2_SEQ_LM"):
        pk.AutoPeftModelForSeq2SeqLM.from_pretrained(directory)


@pytest.mark.parametrize("saved", [(None, {})], indirect=True, ids=["no task"])
def test_without_a_task_the_file_names_the_class(peft, saved, tmp_path):
    """Ours as PEFT's does, so that either reads both."""
    directory, theirs = saved
    want = tensors(theirs(**batch("bert")))
    ours = pk.AutoPeftModel.from_pretrained(directory, "mine", is_trainable=True)
    assert ours.active_adapter == "mine" and [p for p in ours.parameters() if p.requires_grad]
    assert_same(tensors(ours.eval()(**batch("bert"))), want)
    ours.save_pretrained(tmp_path / "again")
    again = tmp_path / "again" / "mine"
    assert json.loads((again / "adapter_config.json").read_text())["auto_mapping"] == {
        "base_model_class": "BertModel",
        "parent_library": "transformers.models.bert.modeling_bert",
    }
    assert_same(tensors(peft.AutoPeftModel.from_pretrained(again).eval()(**batch("bert"))), want)
    by_subfolder = pk.AutoPeftModel.from_pretrained(tmp_path / "again", subfolder="mine")
    assert_same(tensors(by_subfolder(**batch("bert"))), want)


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_had_grown_grows_here(peft, tied, tmp_path):
    grown = backbone("llama-tied" if tied else "llama", tmp_path / "backbone")
    grown.resize_token_embeddings(VOCABULARY + 4)
    grown = pk.get_peft_model(grown, pk.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    shake(grown).save_pretrained(tmp_path / "adapter")
    ids = {"input_ids": torch.tensor([[1, VOCABULARY + 3, 5]])}
    back = pk.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert back.get_input_embeddings().weight.shape[0] == VOCABULARY + 4
    assert torch.equal(back(**ids).logits, grown.eval()(**ids).logits)


MAPPINGS = {
    "another package": ({"base_model_class": "system", "parent_library": "os"}, "wants to import os, which is none of"),
    "no module": ({"base_model_class": "BertModel", "parent_library": "transformers.models.brt"}, "No module named"),
    "no class": ({"base_model_class": "BertMod", "parent_library": "transformers"}, "names transformers.BertMod"),
    "no model": ({"base_model_class": "BertConfig", "parent_library": "transformers"}, "no model of transformers"),
    "nothing": (None, "names no task_type and no class"),
    "empty": ({}, "names no task_type and no class"),
}


@pytest.mark.parametrize("saved", [(None, {})], indirect=True, ids=["no task"])
@pytest.mark.parametrize("case", MAPPINGS)
def test_what_a_file_may_not_name(saved, case):
    """The file is a stranger's: it chooses among the models of transformers, and nothing else runs."""
    directory, _ = saved
    mapping, message = MAPPINGS[case]
    values = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(values | {"auto_mapping": mapping}))
    with pytest.raises(ConfigError, match=message):
        pk.AutoPeftModel.from_pretrained(directory)
    if case == "another package":  # trusted, it is still no model
        with pytest.raises(ConfigError, match="no model of transformers"):
            pk.AutoPeftModel.from_pretrained(directory, import_allowlist=["os"])


def test_what_is_missing(saved, tmp_path):
    directory, _ = saved
    with pytest.raises(TypeError, match="AutoPeftModel makes no instances"):
        pk.AutoPeftModel()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json does not exist"):
        pk.AutoPeftModel.from_pretrained(directory, subfolder="elsewhere")
    values = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="names no base_model_name_or_path"):
        pk.AutoPeftModelForCausalLM.from_pretrained(directory)
