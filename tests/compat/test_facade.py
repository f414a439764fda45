"""`get_peft_model` and `PeftModel` where PEFT's stood: the same calls, numbers, files and behaviour."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import peftkern as pk
from peftkern import hf
from tests.compat.small import (
    assert_same,
    assert_same_step,
    batch,
    build,
    gradients,
    our_parameters,
    shake,
    stored,
    their_parameters,
)
from tests.compat.test_lora import CASES, options

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def facade(name: str = "llama", **changes) -> hf.PeftModel:
    return pk.get_peft_model(build(name), pk.LoraConfig(**(LORA | changes)))


@pytest.mark.parametrize("case", CASES)
def test_trainable_names_and_numbers_are_peft_s(peft, case, capsys):
    name, changes = options(case)
    theirs = peft.get_peft_model(build(name), peft.LoraConfig(**changes))
    ours = pk.get_peft_model(build(name), pk.LoraConfig(**changes))
    mine, peer = our_parameters(ours), their_parameters(theirs)
    assert {key: p.shape for key, p in mine.items()} == {key: p.shape for key, p in peer.items()}
    assert {key: p.dtype for key, p in mine.items()} == {key: p.dtype for key, p in peer.items()}
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    if "bias" not in changes:  # PEFT trains the backbone's own biases in place, here they are copies
        ours.print_trainable_parameters()
        said = capsys.readouterr().out
        theirs.print_trainable_parameters()
        assert said == capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "task"), [("llama", "CAUSAL_LM"), ("bert-seq", "SEQ_CLS"), ("bert-token", "TOKEN_CLS")]
)
def test_prompts_have_peft_s_names_and_numbers(peft, name, task, capsys):
    config = {"num_virtual_tokens": 5, "task_type": task}
    theirs = peft.get_peft_model(build(name), peft.PromptTuningConfig(**config))
    ours = pk.get_peft_model(build(name), pk.PromptTuningConfig(**config))
    mine, peer = our_parameters(ours), their_parameters(theirs, prompt=True)
    assert {key: p.shape for key, p in mine.items()} == {key: p.shape for key, p in peer.items()}
    ours.print_trainable_parameters()
    said = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert said == capsys.readouterr().out
    assert ours.base_model is ours.get_base_model() and type(ours.base_model) is type(theirs.base_model)


@pytest.mark.parametrize("case", ["plain", "patterns", "sequence-bert", "conv1d", "exclude-regex", "all-linear"])
def test_a_configuration_of_peft_is_taken_over(peft, case):
    name, changes = options(case)
    config = peft.LoraConfig(**changes)
    ours = pk.get_peft_model(build(name), config)
    assert isinstance(ours.peft_config["default"], pk.LoraConfig)
    expected = pk.get_peft_model(build(name), pk.LoraConfig(**changes))
    assert our_parameters(ours).keys() == our_parameters(expected).keys()
    prompt = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    assert our_parameters(pk.get_peft_model(build("llama"), prompt))["prompt_embeddings"].shape == (3, 24)
    with pytest.raises(pk.errors.ConfigError, match="use_qalora"):
        pk.get_peft_model(build("llama"), peft.LoraConfig(use_qalora=True))
    with pytest.raises(pk.errors.UnknownMethodError, match="LOHA"):
        pk.get_peft_model(build("llama"), peft.LoHaConfig())
    with pytest.raises(pk.errors.ConfigError, match="dict"):
        pk.get_peft_model(build("llama"), {"r": 4})


def test_what_it_is_made_of(peft):
    plain = build("llama")
    ours = pk.get_peft_model(plain, pk.LoraConfig(**LORA, task_type=hf.TaskType.CAUSAL_LM))
    assert ours.get_base_model() is plain is ours.base_model.model and type(plain) is type(build("llama"))
    assert isinstance(ours, pk.PeftModel) and isinstance(ours, peft.PeftModel)
    assert ours.config is plain.config and ours.device == plain.device and ours.dtype == torch.float32
    assert ours.base_model.config is plain.config and ours.get_input_embeddings() is plain.get_input_embeddings()
    assert ours.active_adapter == "default" and ours.active_adapters == ["default"]
    assert ours.peft_type == "LORA" and ours.active_peft_config is ours.peft_config["default"]
    assert all(name.startswith("base_model.model.") for name, _ in ours.named_parameters())
    ours.generation_config = copy.deepcopy(ours.generation_config)
    assert ours.generation_config is plain.generation_config
    assert not ours.training and ours.train().get_base_model().training
    for missing in ("no_such_thing", "_no_such_thing"):
        assert not hasattr(ours, missing)
    with pytest.raises(pk.errors.AdapterError, match="PeftModel already"):
        pk.get_peft_model(ours, pk.LoraConfig())
    for call in (pk.merge, pk.detach, lambda model: pk.attach(model, pk.LoraConfig(), "other")):
        with pytest.raises(pk.errors.AdapterError, match=r"get_base_model\(\)"):
            call(ours)
    inputs = batch("llama")
    assert torch.equal(ours(**inputs).logits, plain(**inputs).logits)
    ids = inputs["input_ids"][:1]
    assert torch.equal(
        ours.generate(ids, max_new_tokens=4, do_sample=False), plain.generate(ids, max_new_tokens=4, do_sample=False)
    )


def test_several_adapters(peft, tmp_path):
    """Added, switched, disabled, saved in PEFT's layout, loaded there, deleted."""
    ours = shake(facade())
    ours.add_adapter("second", pk.LoraConfig(**LORA | {"r": 2}))
    inputs, plain = batch("llama"), build("llama")
    first = ours(**inputs).logits
    assert ours.active_adapter == "default" and list(ours.peft_config) == ["default", "second"]
    ours.set_adapter("second")
    second = ours(**inputs).logits
    assert not torch.equal(first, second)
    assert {name.split(".")[-2] for name, p in ours.named_parameters() if p.requires_grad} == {"second"}
    ours.set_adapter("second", inference_mode=True)
    assert not [p for p in ours.parameters() if p.requires_grad]
    with ours.disable_adapter():
        assert torch.equal(ours(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(ours(**inputs).logits, second)
    ours.save_pretrained(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert files == names | {f"second/{name}" for name in names}
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    theirs.load_adapter(tmp_path / "second", "second")
    for name, expected in (("default", first), ("second", second)):
        theirs.set_adapter(name)
        torch.testing.assert_close(theirs(**inputs).logits, expected, rtol=1e-4, atol=1e-6)
    with pytest.warns(UserWarning, match="'default' is active now"):
        ours.delete_adapter("second")
    assert torch.equal(ours(**inputs).logits, first)
    ours.load_adapter(tmp_path / "second", "back", is_trainable=True)
    assert ours.active_adapter == "default"
    ours.set_adapter("back")
    assert torch.equal(ours(**inputs).logits, second)


def test_from_pretrained(peft, tmp_path):
    theirs = shake(peft.get_peft_model(build("llama"), peft.LoraConfig(**LORA))).eval()
    theirs.save_pretrained(tmp_path)
    assert hf.PeftConfig.from_pretrained(tmp_path).r == 4
    frozen = pk.PeftModel.from_pretrained(build("llama").train(), tmp_path)
    assert not frozen.training and not [p for p in frozen.parameters() if p.requires_grad]
    ours = pk.PeftModel.from_pretrained(build("llama"), tmp_path, "mine", is_trainable=True)
    assert ours.active_adapter == "mine"
    got, want = our_parameters(ours, "mine"), their_parameters(theirs)
    assert_same(gradients(ours, got, batch("llama"))[1], gradients(theirs, want, batch("llama"))[1])
    with pytest.raises(pk.errors.CheckpointError, match=r"adapter_config\.json"):
        pk.PeftModel.from_pretrained(build("llama"), tmp_path / "..")


def test_loading_again_replaces_the_weights_in_place(tmp_path):
    ours = shake(facade())
    ours.save_pretrained(tmp_path)
    inputs = batch("llama")
    before, parameters = ours(**inputs).logits, our_parameters(ours)
    shake(ours, seed=2)
    assert not torch.equal(ours(**inputs).logits, before)
    ours.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(ours(**inputs).logits, before)
    assert all(p is parameters[key] and p.requires_grad for key, p in our_parameters(ours).items())
    other = pk.get_peft_model(build("llama"), pk.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(pk.errors.CheckpointError, match="holds a lora"):
        other.load_adapter(tmp_path, "default")
    ours.merge_adapter()
    with pytest.raises(pk.errors.AdapterError, match="merged"):
        ours.load_adapter(tmp_path, "default")


def test_merging(peft, tmp_path):
    theirs = shake(peft.get_peft_model(build("llama"), peft.LoraConfig(**LORA))).eval()
    theirs.save_pretrained(tmp_path)
    ours = pk.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    inputs, weights = batch("llama"), {key: w.clone() for key, w in ours.state_dict().items()}
    before = ours(**inputs).logits
    ours.merge_adapter()
    torch.testing.assert_close(ours(**inputs).logits, before, rtol=1e-4, atol=1e-6)
    with pytest.raises(pk.errors.MergeError, match="already"):
        ours.merge_adapter()
    ours.unmerge_adapter()
    assert all(torch.equal(weights[key], value) for key, value in ours.state_dict().items())
    ours.add_adapter("second", pk.LoraConfig(**LORA))
    ours.merge_adapter(["second"])
    assert not torch.allclose(ours(**inputs).logits, before)
    ours.unmerge_adapter()
    assert ours.active_adapter == "default" and torch.equal(ours(**inputs).logits, before)
    merged = ours.merge_and_unload()
    assert type(merged) is type(build("llama"))
    assert_same(dict(merged.state_dict()), dict(theirs.merge_and_unload().state_dict()))


def test_unload_gives_the_untouched_model_back():
    ours, plain = shake(facade(modules_to_save=["lm_head"])), build("llama").state_dict()
    model = ours.unload()
    assert model.state_dict().keys() == plain.keys()
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_copies_and_pickles(method):
    ours = facade(modules_to_save=["lm_head"]) if method == "lora" else pk.get_peft_model(
        build("llama"), pk.PromptTuningConfig(num_virtual_tokens=4))  # fmt: skip
    shake(ours)
    inputs = batch("llama")
    before = ours(**inputs).logits
    for twin in copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)):
        assert type(twin) is type(ours) and torch.equal(twin(**inputs).logits, before)
        shake(twin, seed=3)
        assert not torch.equal(twin(**inputs).logits, before)
    assert torch.equal(ours(**inputs).logits, before)


def test_saving_from_a_gathered_state_dict(tmp_path):
    """What the Trainer passes for sharded models, whose own parameters hold only a part."""
    ours = shake(facade(modules_to_save=["lm_head"]))
    whole = {key: value.clone() + 1 for key, value in ours.state_dict().items()}
    ours.save_pretrained(tmp_path, state_dict=whole)
    ours.save_pretrained(tmp_path / "not", is_main_process=False)
    assert not (tmp_path / "not").exists()
    expected = {key: p.detach() + 1 for key, p in our_parameters(ours).items()}
    ours.load_adapter(tmp_path, "default")
    assert_same({key: p.detach() for key, p in our_parameters(ours).items()}, expected, rtol=0, atol=0)
    with pytest.raises(pk.errors.CheckpointError, match="lacks"):
        ours.save_pretrained(tmp_path, state_dict={})
    with pytest.raises(pk.errors.ConfigError, match="pickle"):
        ours.save_pretrained(tmp_path, safe_serialization=False)


@pytest.mark.parametrize("cast", [True, False])
def test_dtype_of_the_adapters(peft, cast):
    theirs = peft.get_peft_model(build("llama", torch.bfloat16), peft.LoraConfig(**LORA), autocast_adapter_dtype=cast)
    ours = pk.get_peft_model(build("llama", torch.bfloat16), pk.LoraConfig(**LORA), autocast_adapter_dtype=cast)
    mine, peer = our_parameters(ours), their_parameters(theirs)
    assert {key: p.dtype for key, p in mine.items()} == {key: p.dtype for key, p in peer.items()}
    assert ours(**batch("llama")).logits.isfinite().all()


def test_push_to_hub_uploads_the_adapter_alone(monkeypatch):
    import huggingface_hub

    seen = {}

    class Api:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

        def upload_folder(self, repo_id, folder_path, revision, commit_message):
            seen.update(repo=repo_id, files={path.name for path in Path(folder_path).iterdir()})
            return type("Commit", (), {"commit_url": "https://huggingface.co/me/x/commit/1"})()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert facade().push_to_hub("x", token="t").endswith("commit/1")
    assert seen == {"token": "t", "repo": "me/x", "files": {"adapter_config.json", "adapter_model.safetensors"}}


class Rows(torch.utils.data.Dataset):
    """Sixteen rows of a batch, with a column that no model knows."""

    def __init__(self, name: str) -> None:
        self.columns = batch(name, None) | {"note": torch.zeros(3)}

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int):
        return {key: value[index % 3] for key, value in self.columns.items()}


def trainer(model, folder: Path, steps: int = 4) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, eval_steps=2, eval_strategy="steps", logging_steps=1,
        per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, seed=7,
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Rows("bert-seq"), eval_dataset=Rows("bert-seq"))


CLASSIFY = {
    "lora": lambda: pk.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS", lora_dropout=0.1),
    "prompt": lambda: pk.PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("method", CLASSIFY)
def test_trainer_trains_saves_and_resumes(peft, method, tmp_path):
    """transformers' own Trainer: checkpoints are adapters, and a resumed run ends where an unbroken one does."""

    def fresh():
        torch.manual_seed(1)
        return pk.get_peft_model(build("bert-seq"), CLASSIFY[method]())

    whole = fresh()
    run = trainer(whole, tmp_path / "whole")
    run.train()
    assert "eval_loss" in run.state.log_history[1] or any("eval_loss" in entry for entry in run.state.log_history)
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    resumed = fresh()
    trainer(resumed, tmp_path / "whole").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(our_parameters(resumed), our_parameters(whole), rtol=1e-5, atol=1e-7)
    assert our_parameters(whole)
    backbone = build("bert-seq").bert.state_dict()
    for key, value in whole.unload().bert.state_dict().items():
        assert torch.equal(value, backbone[key]), key
    theirs = peft.PeftModel.from_pretrained(build("bert-seq"), tmp_path / "whole" / "checkpoint-4").eval()
    ours = pk.PeftModel.from_pretrained(build("bert-seq"), tmp_path / "whole" / "checkpoint-4")
    inputs = batch("bert-seq")
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-6)


def test_trainer_resumes_several_adapters(peft, tmp_path):
    def fresh():
        model = pk.get_peft_model(build("bert-seq"), CLASSIFY["lora"](), "one")
        model.add_adapter("two", CLASSIFY["lora"]())
        return model

    run = trainer(shake(fresh()), tmp_path)
    run.train()
    assert stored(tmp_path / "checkpoint-4" / "one") == stored(tmp_path / "checkpoint-4" / "two")
    again = fresh()
    trainer(again, tmp_path, steps=5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.active_adapter == "one"


def test_a_step_with_gradient_checkpointing_is_peft_s(peft, tmp_path):
    theirs = shake(peft.get_peft_model(build("llama"), peft.LoraConfig(**LORA, task_type="CAUSAL_LM")))
    theirs.save_pretrained(tmp_path)
    ours = pk.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    for model in ours, theirs:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_step(ours, theirs, batch("llama"))


def test_without_the_other_library(monkeypatch):
    """`peft` is recognised where it is installed and never needed."""
    monkeypatch.setitem(sys.modules, "peft", None)
    ours = shake(facade())
    assert type(ours) is hf.PeftModel
    assert torch.equal(pickle.loads(pickle.dumps(ours))(**batch("llama")).logits, ours(**batch("llama")).logits)
    assert pk.get_peft_model(build("llama"), pk.PromptTuningConfig(num_virtual_tokens=2)).active_adapter == "default"
    monkeypatch.delitem(sys.modules, "peft.tuners.tuners_utils", raising=False)
    with pytest.raises(pk.errors.AdapterError, match="no layer of Hugging Face PEFT"):
        pk.fuse(build("llama"))
