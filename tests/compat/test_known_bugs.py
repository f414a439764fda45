"""What the field's libraries get wrong or let pass in silence, and peftkern does not."""

from __future__ import annotations

import json

import pytest
import torch

import peftkern as pk
from peftkern import checkpoint, dispatch
from tests.compat.small import batch, build, shake, tensors

PROMPT = {"num_virtual_tokens": 5}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_on_the_left_gives_pads_prompt_text(name):
    """Each row's text gets what it gets alone, without any padding; PEFT puts the prompt before the pads."""
    ours = shake(pk.attach(build(name), pk.PromptTuningConfig(**PROMPT)))
    inputs = {key: value for key, value in batch(name, "left").items() if key != "labels"}
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(0)
    padded = ours(**inputs, position_ids=positions).logits
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = ours(input_ids=inputs["input_ids"][row : row + 1, -length:]).logits[0]
        torch.testing.assert_close(padded[row, -length - 5 :], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_with_padding_on_the_left_is_that_of_each_row_alone(name):
    ours = shake(pk.attach(build(name), pk.PromptTuningConfig(**PROMPT)))
    inputs = {key: value for key, value in batch(name, "left").items() if key != "labels"}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = ours.generate(**inputs, **settings)[:, -6:]
    for row, mask in enumerate(inputs["attention_mask"]):
        alone = ours.generate(input_ids=inputs["input_ids"][row : row + 1, -int(mask.sum()) :], **settings)
        assert torch.equal(together[row], alone[0, -6:])


def test_token_classification_returns_one_row_per_token():
    ours = pk.attach(build("bert-token"), pk.PromptTuningConfig(**PROMPT, task_type="TOKEN_CLS"))
    output = ours(**batch("bert-token"))
    assert output.logits.shape == (3, 9, 3) and output.loss.isfinite()


def test_sequence_classification_pools_the_last_token_not_a_pad():
    ours = shake(pk.attach(build("llama-seq"), pk.PromptTuningConfig(**PROMPT, task_type="SEQ_CLS")))
    inputs = batch("llama-seq", "right")
    padded = ours(**inputs).logits
    for row, mask in enumerate(inputs["attention_mask"]):
        alone = ours(input_ids=inputs["input_ids"][row : row + 1, : int(mask.sum())]).logits[0]
        torch.testing.assert_close(padded[row], alone, rtol=1e-4, atol=1e-5)


TIED = [("llama-tied", ["embed_tokens"]), ("llama-tied", ["lm_head"]), ("llama-tied", ["embed_tokens", "lm_head"]),
        ("gpt2", ["wte"])]  # fmt: skip


@pytest.mark.parametrize(("name", "targets"), TIED)
def test_a_merge_moves_only_its_own_end_of_a_tied_weight(name, targets, tmp_path):
    config = pk.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    ours = pk.attach(build(name), config)
    before = tensors(ours(**batch(name)))
    tied = build(name).get_input_embeddings().weight
    merged = pk.merge_and_unload(ours)
    for key, value in tensors(merged(**batch(name))).items():
        torch.testing.assert_close(value, before[key], rtol=1e-4, atol=1e-5)
    for end, touched in (
        (merged.get_input_embeddings(), {"embed_tokens", "wte"} & set(targets)),
        (merged.get_output_embeddings(), {"lm_head"} & set(targets)),
    ):
        assert torch.equal(end.weight, tied) is not bool(touched)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch(name)).logits, merged(**batch(name)).logits)


def test_a_saved_copy_starts_from_the_backbone_not_from_another_adapter():
    model = pk.attach(build("bert-seq"), pk.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]), "a")
    shake(model)
    pk.attach(model, pk.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["key"]), "b")
    pk.set_adapter(model, "b")
    assert torch.equal(model.classifier.weight, build("bert-seq").classifier.weight)


def test_full_tuning_keeps_tied_weights_tied():
    model = pk.attach(build("llama-tied"), pk.FullConfig())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def written(directory, config, **changes):
    """A PEFT configuration as a file, changed."""
    config.save_pretrained(directory)
    path = directory / checkpoint.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_qalora", True),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("target_parameters", ["mlp.weight"]),
        ("trainable_token_indices", [3]),
        ("alora_invocation_tokens", [1, 2]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("megatron_config", {"a": 1}),
        ("arrow_config", {"top_k": 1}),
        ("kasa_config", {"beta": 1}),
        ("ensure_weight_tying", True),
        ("bias", "some"),
        ("lora_dropout", 1.5),
        ("not_a_field", 1),
        ("lora_alhpa", 1),
    ],
)
def test_an_option_that_is_not_implemented_is_an_error(peft, key, value, tmp_path):
    directory = written(tmp_path, peft.LoraConfig(target_modules=["q_proj"]), **{key: value})
    with pytest.raises(pk.errors.ConfigError, match=key):
        pk.load(build("llama"), directory)
    with pytest.raises(pk.errors.ConfigError, match=key):
        pk.LoraConfig.from_dict({key: value})


def test_a_module_to_save_that_is_not_there_is_an_error(peft, tmp_path):
    directory = written(tmp_path, peft.LoraConfig(target_modules=["q_proj"]), modules_to_save=["lm_heat"])
    (directory / checkpoint.WEIGHTS_FILE).write_bytes(checkpoint.serialise({"x": torch.zeros(1)}))
    with pytest.raises(pk.errors.CheckpointError, match="did you mean 'lm_head'"):
        pk.load(build("llama"), directory)


def test_a_misspelt_key_names_the_right_one(peft, tmp_path):
    directory = written(tmp_path, peft.PromptTuningConfig(num_virtual_tokens=3), num_virtual_token=3)
    with pytest.raises(pk.errors.ConfigError, match="did you mean 'num_virtual_tokens'"):
        pk.load(build("llama"), directory)


def test_every_field_of_peft_is_known(peft):
    """A field that a later PEFT adds must be judged here, neither refused nor ignored by accident."""
    prompt = peft.PromptTuningConfig(num_virtual_tokens=1)
    pairs = [(peft.LoraConfig(), pk.LoraConfig), (prompt, pk.PromptTuningConfig)]
    pairs += [(peft.IA3Config(), pk.IA3Config), (peft.VeraConfig(), pk.VeraConfig)]
    for theirs, ours in pairs:
        assert ours.from_dict({k: getattr(v, "value", v) for k, v in theirs.to_dict().items()})


def test_an_unknown_name_is_an_error(tmp_path):
    model = pk.get_peft_model(build("llama"), pk.LoraConfig(target_modules=["q_proj"]))
    wrong = "defualt"
    for call in (
        lambda: model.set_adapter(wrong),
        lambda: model.set_adapter(["default", wrong]),
        lambda: model.delete_adapter(wrong),
        lambda: model.merge_adapter([wrong]),
        lambda: model.save_pretrained(tmp_path / "out", selected_adapters=[wrong]),
    ):
        with pytest.raises(pk.errors.AdapterError, match="did you mean 'default'"):
            call()
    with pytest.raises(pk.errors.AdapterError, match=r"adapter_names: .* did you mean 'default'"):
        model(**batch("llama"), adapter_names=["default", wrong, "default"])
    with pytest.raises(pk.errors.AdapterError, match=r"adapter_names: .* did you mean 'default'"):
        model.generate(input_ids=batch("llama")["input_ids"], adapter_names=[wrong] * 3)
    assert model.active_adapter == "default" and not (tmp_path / "out").exists()


def test_an_adapter_name_that_is_in_a_module_s_name_is_stored_right(tmp_path):
    """PEFT takes the adapter's name out of keys by its spelling."""
    config = pk.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False)
    for name in ("weight", "lora_A", "model", "q_proj"):
        model = pk.attach(build("llama"), config, name)
        pk.save(model, tmp_path / name, name)
        back = pk.load(build("llama"), tmp_path / name, "other")
        assert torch.equal(back(**batch("llama")).logits, model(**batch("llama")).logits)


def test_several_active_adapters_merge_to_what_they_compute():
    model = build("llama")
    for index, name in enumerate(("a", "b")):
        torch.manual_seed(index)
        pk.attach(model, pk.LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False), name)
    pk.set_adapter(model, ["a", "b"])
    before = model(**batch("llama")).logits
    pk.merge(model)
    torch.testing.assert_close(model(**batch("llama")).logits, before, rtol=1e-4, atol=1e-5)
    pk.unmerge(model)
    assert torch.equal(model(**batch("llama")).logits, before)


def test_unmerging_ia3_is_exact_also_where_a_factor_is_zero():
    """PEFT divides by the factors plus 1e-8, which neither a zero nor half precision survives."""
    for dtype in (torch.float32, torch.bfloat16):
        model = shake(pk.attach(build("llama-bias", dtype), pk.IA3Config()))
        with torch.no_grad():
            for key, p in model.named_parameters():
                if key.endswith("scale"):
                    p.view(-1)[:3] = torch.tensor([0.0, -1e-8, 1e-20])
        before = {key: value.clone() for key, value in model.state_dict().items()}
        logits = model(**batch("llama-bias")).logits
        pk.merge(model)
        if dtype == torch.float32:
            torch.testing.assert_close(model(**batch("llama-bias")).logits, logits, rtol=1e-4, atol=1e-5)
        pk.unmerge(model)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_scaling_in_place_leaves_what_a_hook_has_kept():
    """Without a graph the scaled output takes the place of the base's, unless somebody may still look at that."""
    model, kept = build("llama"), []
    target = model.model.layers[0].self_attn.k_proj
    target.register_forward_hook(lambda _module, _args, out: kept.append((out, out.clone())))
    shake(pk.attach(model, pk.IA3Config()))
    if isinstance(reason := dispatch.load("cpu", "column_scale"), str):
        pytest.skip(reason)
    with torch.no_grad(), pk.use_backend("cpu"):  # left to itself, so small a tensor goes to plain PyTorch
        model(**batch("llama"))
    assert torch.equal(*kept[0])


@pytest.mark.parametrize(("kind", "key", "value"), [
    ("IA3Config", "feedforward_modules", ["down_prj"]), ("IA3Config", "feedforward_modules", "down_prj"),
])  # fmt: skip
def test_feedforward_modules_that_are_no_targets_are_an_error(kind, key, value):
    config = getattr(pk, kind)(target_modules=["k_proj", "down_proj"], **{key: value})
    with pytest.raises(pk.errors.TargetError, match=r"down_prj.*did you mean 'down_proj'"):
        pk.attach(build("llama"), config)


@pytest.mark.parametrize(("kind", "key", "value"), [
    ("IA3", "ia3_alpha", 1), ("IA3", "feedforward_module", ["x"]), ("VERA", "r_", 4), ("VERA", "vera_dropout", 1.0),
    ("VERA", "bias", "lora_only"), ("VERA", "r", 0),
])  # fmt: skip
def test_an_option_of_ia3_or_vera_that_is_not_known_is_an_error(peft, kind, key, value, tmp_path):
    theirs = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]) if kind == "IA3" else peft.VeraConfig()
    with pytest.raises(pk.errors.ConfigError, match=key):
        pk.load(build("llama"), written(tmp_path, theirs, **{key: value}))


@pytest.mark.parametrize("kind", ["IA3Config", "VeraConfig"])
def test_two_active_adapters_merge_to_what_they_compute(kind):
    model, off = build("llama-bias"), {"IA3Config": "init_ia3_weights", "VeraConfig": "init_weights"}
    for index, name in enumerate(("a", "b")):
        torch.manual_seed(index)
        more = {"r": 3 + index, "projection_prng_key": index} if kind == "VeraConfig" else {}
        pk.attach(model, getattr(pk, kind)(target_modules="all-linear", **{off[kind]: False}, **more), name)
    pk.set_adapter(model, ["a", "b"])
    before = model(**batch("llama-bias")).logits
    pk.merge(model)
    torch.testing.assert_close(model(**batch("llama-bias")).logits, before, rtol=1e-3, atol=1e-4)
    pk.unmerge(model)
    assert torch.equal(model(**batch("llama-bias")).logits, before)
