"""adapter_names as Hugging Face PEFT has it: the same outputs and the same generated text, row by row."""

from __future__ import annotations

import pytest
import torch

import peftkern as pk
from tests.compat.small import assert_same, batch, build, shake, tensors

CASES = {
    "llama": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True, "lora_alpha": 20}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "bert": ("bert", {"target_modules": ["query", "dense"]}),
}
NAMES = ["two", "__base__", "one"]


def twins(peft, tmp_path, name: str, options: dict):
    """Ours and theirs with the same two adapters, of different ranks."""
    common = {"init_lora_weights": False, "target_modules": "all-linear"} | options
    theirs = peft.get_peft_model(build(name), peft.LoraConfig(r=3, **common), "one")
    theirs.add_adapter("two", peft.LoraConfig(r=5, **common))
    theirs.save_pretrained(tmp_path)
    ours = pk.PeftModel.from_pretrained(build(name), tmp_path / "one", "one")
    ours.load_adapter(tmp_path / "two", "two")
    return ours, theirs.eval()


@pytest.mark.parametrize("case", CASES)
def test_forward(peft, tmp_path, case: str) -> None:
    name, options = CASES[case]
    ours, theirs = twins(peft, tmp_path, name, options)
    inputs = batch(name)
    plain = tensors(ours(**inputs))
    got = tensors(ours(**inputs, adapter_names=NAMES))
    # f32 through three layers, whose updates are summed in another order than PEFT's: 16 eps of the largest logit.
    assert_same(got, tensors(theirs(**inputs, adapter_names=NAMES)), atol=2e-6)
    assert_same(tensors(ours(**inputs)), plain)
    assert not all(torch.allclose(got[key], plain[key]) for key in got)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generate(peft, tmp_path, name: str, beams: int) -> None:
    options = {"fan_in_fan_out": True} if name == "gpt2" else {}
    ours, theirs = twins(peft, tmp_path, name, options)
    inputs = {key: batch(name, padding="left")[key] for key in ("input_ids", "attention_mask")}
    arguments = inputs | {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "adapter_names": NAMES}
    assert torch.equal(ours.generate(**arguments), theirs.generate(**arguments))


def test_names_that_peft_ignores_in_silence(peft) -> None:
    """For IA3 PEFT runs the active adapter whatever is asked; here every layer method mixes, or says why not."""
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    theirs = shake(peft.get_peft_model(build("llama"), config, "one"))
    inputs = batch("llama")
    asked = theirs(**inputs, adapter_names=["__base__", "no such adapter", "one"]).logits
    assert torch.equal(asked, theirs(**inputs).logits), "PEFT has mended it: say so in PEFT-FACTS and in this test"

    model = pk.attach(build("llama"), pk.BottleneckConfig(r=2), "one")
    shake(model)
    with pk.disabled(model):
        base = model(**inputs).logits
    with pk.mixed(model, ["__base__", "one", "__base__"]):
        mixed = model(**inputs).logits
    torch.testing.assert_close(mixed[[0, 2]], base[[0, 2]])
    assert not torch.allclose(mixed[1], base[1])
    with pytest.raises(pk.errors.AdapterError, match="no adapter 'no such adapter'"):
        with pk.mixed(model, ["__base__", "no such adapter", "one"]):
            pass
