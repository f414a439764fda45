"""Small random models, built the same way on both sides, and what compares ours with Hugging Face PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

import peftkern as pk
from peftkern import checkpoint

VOCABULARY = 61
HIDDEN = 24


def bert_config(kind: type = BertConfig, **changes):
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 48, "num_labels": 3, "pad_token_id": 0}
    return kind(**(sizes | changes))


def llama_config(**changes):
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 3}
    return LlamaConfig(vocab_size=VOCABULARY, **sizes, **changes)


def gpt2_config(**changes):
    sizes = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2Config(vocab_size=VOCABULARY, **sizes, **tokens, **changes)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertModel(bert_config()),
    "bert-seq": lambda: BertForSequenceClassification(bert_config()),
    "bert-token": lambda: BertForTokenClassification(bert_config()),
    "bert-qa": lambda: BertForQuestionAnswering(bert_config(num_labels=2)),
    "roberta": lambda: RobertaModel(bert_config(RobertaConfig)),
    "roberta-seq": lambda: RobertaForSequenceClassification(bert_config(RobertaConfig)),
    "gpt2": lambda: GPT2LMHeadModel(gpt2_config()),
    "llama": lambda: LlamaForCausalLM(llama_config()),
    "llama-tied": lambda: LlamaForCausalLM(llama_config(tie_word_embeddings=True)),
    "llama-bias": lambda: LlamaForCausalLM(llama_config(attention_bias=True, mlp_bias=True)),
    "llama-seq": lambda: LlamaForSequenceClassification(llama_config()),
}
_built: dict[str, nn.Module] = {}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh copy, with the same weights every time, in eval mode and with biases that are not zero."""
    if name not in _built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            model = MODELS[name]()
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    nn.init.normal_(parameter, std=0.1)
        _built[name] = model.eval()
    return copy.deepcopy(_built[name]).to(dtype)


def batch(name: str, padding: str | None = "right") -> dict[str, Tensor]:
    """Three rows, of different lengths when padded."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 6, 4) if padding else ()):
        mask[row, length:] = 0
    if padding == "left":
        mask = mask.flip(1)
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    if name.endswith("seq"):
        return inputs | {"labels": torch.tensor([0, 2, 1])}
    if name.endswith("qa"):
        return inputs | {"start_positions": torch.tensor([0, 2, 1]), "end_positions": torch.tensor([2, 3, 3])}
    if name.endswith("token"):
        return inputs | {"labels": (ids % 3).masked_fill(mask == 0, -100)}
    return inputs if name in ("bert", "roberta") else inputs | {"labels": ids.masked_fill(mask == 0, -100)}


def tensors(output) -> dict[str, Tensor]:
    """What a model's output is compared by."""
    keys = ("loss", "logits", "last_hidden_state", "start_logits", "end_logits")
    return {key: output[key].float() for key in keys if output.get(key) is not None}


def objective(output) -> Tensor:
    """A scalar that every element of the output takes part in."""
    return sum((t * torch.arange(t.numel()).view(t.shape).cos()).mean() for t in tensors(output).values())


def shake(model: nn.Module, seed: int = 1) -> nn.Module:
    """Move every trainable parameter, so that nothing is at a special value such as zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def saved_by_peft(peft, model: nn.Module, config, directory: Path, adapter: str = "default") -> nn.Module:
    """The model with an adapter built, shaken and saved by PEFT."""
    theirs = shake(peft.get_peft_model(model, config, adapter_name=adapter)).eval()
    theirs.save_pretrained(directory)
    return theirs


def to_peft(
    peft, name: str, directory: Path, adapter: str = "default", dtype: torch.dtype = torch.float32, prompt: bool = False
) -> nn.Module:
    """PEFT's reading of a directory, in which it must find nothing that it does not know.

    PEFT loads prompts and prefixes frozen; for the comparison they train.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*([Uu]nexpected|missing|mismatch)")
        theirs = peft.PeftModel.from_pretrained(
            build(name, dtype), directory, adapter_name=adapter, is_trainable=not prompt
        ).eval()
    if prompt:
        for path, parameter in theirs.named_parameters():
            parameter.requires_grad_(path.startswith("prompt_encoder") or "modules_to_save" in path)
    return theirs


def their_parameters(model: nn.Module, name: str = "default", prompt: bool = False) -> dict[str, nn.Parameter]:
    """Key in a file -> trainable parameter of a model that PEFT built: from PEFT's names, not from its saving."""
    found = {}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            if prompt and path.startswith("prompt_encoder"):
                path = "prompt_embeddings"
            path = path.replace(f".{name}", "").replace(".modules_to_save", "")
            found[path.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = parameter
    return found


def our_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """The same of an attached model."""
    inner = model.get_base_model() if isinstance(model, pk.PeftModel) else model
    return {key: p for key, p in checkpoint.parameters(inner, name).items() if p.requires_grad}


def gradients(model: nn.Module, parameters: dict[str, nn.Parameter], inputs: dict[str, Tensor]):
    """Output tensors, and the gradient of every parameter."""
    output = model(**inputs)
    grads = torch.autograd.grad(objective(output), list(parameters.values()), allow_unused=True)
    return tensors(output), dict(zip(parameters, grads, strict=True))


def assert_same(ours: dict, theirs: dict, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Same keys, same values."""
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        if expected is None:
            assert ours[key] is None or not ours[key].any(), key
        else:
            torch.testing.assert_close(ours[key], expected, rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


def assert_same_step(ours, theirs, inputs, name: str = "default", prompt: bool = False) -> None:
    """One forward and backward on both sides: outputs and the gradient of every adapter parameter."""
    our_out, our_grads = gradients(ours, our_parameters(ours, name), inputs)
    their_out, their_grads = gradients(theirs, their_parameters(theirs, name, prompt), inputs)
    assert_same(our_out, their_out)
    assert_same(our_grads, their_grads)


def assert_as_near_as_peft(ours, theirs, exact, inputs, slack: float = 1e-3, prompt: bool = False) -> None:
    """Outputs and gradients in half precision: against `exact`, in f32, ours may be off by twice what PEFT is."""
    want = gradients(exact, our_parameters(exact), inputs)
    got = gradients(ours, our_parameters(ours), inputs)
    peer = gradients(theirs, their_parameters(theirs, prompt=prompt), inputs)
    for mine, reference, other in zip(got, want, peer, strict=True):
        assert mine.keys() == other.keys()
        for key, truth in reference.items():
            budget = 2 * (other[key].float() - truth).norm() + slack * truth.norm()
            assert (mine[key].float() - truth).norm() <= budget, key


def stored(directory: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape in a checkpoint, without the copies of base weights that PEFT adds for some embeddings."""
    found = {key: tuple(value.shape) for key, value in checkpoint.read_tensors(directory).items()}
    extra = (".original_module.bias", ".modules_to_save.bias")
    return {k: shape for k, shape in found.items() if not k.endswith(("base_layer.weight", *extra))}
