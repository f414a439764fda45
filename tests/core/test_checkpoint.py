"""Saving is atomic, loading checks everything first, and every way a file can be bad has a message of its own."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import peftkern as pk
from peftkern import checkpoint
from peftkern.attachment import state
from peftkern.errors import AdapterError, CheckpointError, ConfigError, UnknownMethodError
from peftkern.testing import tiny_bert, tiny_gpt2, tiny_llama, token_batch, unchanged

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def lora(**fields) -> pk.LoraConfig:
    return pk.LoraConfig(init_lora_weights=False, **fields)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return pk.save(pk.attach(tiny_bert(), lora()), tmp_path / "adapter")


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def refused(directory: Path, message: str, kind: type[Exception] = CheckpointError, model=None) -> None:
    model = tiny_bert() if model is None else model
    with unchanged(model), pytest.raises(kind, match=message):
        pk.load(model, directory)


def edit(directory: Path, **changes) -> None:
    path = directory / CONFIG
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def test_files(saved: Path) -> None:
    assert set(content(saved)) == {CONFIG, WEIGHTS}
    values = json.loads((saved / CONFIG).read_text("utf-8"))
    assert (values["peft_type"], values["r"], values["inference_mode"]) == ("LORA", 8, True)
    with safe_open(saved / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(saved / WEIGHTS)
    assert set(tensors) == {
        f"base_model.model.bert.encoder.layer.{i}.attention.self.{p}.lora_{ab}.weight"
        for i in (0, 1)
        for p in ("query", "value")
        for ab in "AB"
    }
    umask = os.umask(0)
    os.umask(umask)
    assert (saved / WEIGHTS).stat().st_mode & 0o777 == 0o666 & ~umask


def test_methods_of_our_own_name_their_distribution(tmp_path: Path) -> None:
    pk.save(pk.attach(tiny_bert(), pk.BottleneckConfig()), tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values["peft_type"] == "ADAPTER"
    assert values["peftkern"]["method"] == "adapter" and values["peftkern"]["distribution"] == "peftkern"


def test_saving_leaves_the_model_alone_and_can_be_repeated(saved: Path) -> None:
    model = pk.load(tiny_bert(), saved)
    before = content(saved)
    with unchanged(model):
        pk.save(model, saved)
    assert load_file(saved / WEIGHTS).keys() and content(saved)[WEIGHTS] == before[WEIGHTS]
    with unchanged(model), pytest.raises(AdapterError, match="no adapter 'defualt'; did you mean 'default'"):
        pk.save(model, saved, "defualt")


def test_odd_directories(tmp_path: Path) -> None:
    model = pk.attach(tiny_bert(), lora())
    where = tmp_path / "ä b" / "deeper"
    assert pk.save(model, str(where)) == where
    pk.load(tiny_bert(), where)
    (tmp_path / "file").write_text("x")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with unchanged(model), pytest.raises(CheckpointError, match="cannot write to"):
            pk.save(model, bad)


def test_a_loaded_adapter_is_frozen_unless_asked(saved: Path) -> None:
    frozen, free = pk.load(tiny_bert(), saved), pk.load(tiny_bert(), saved, trainable=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    own = set(state(free).parameters_of(free, "default").values())
    assert own == {p for p in free.parameters() if p.requires_grad}
    assert pk.adapters(frozen)["default"].inference_mode and not pk.adapters(free)["default"].inference_mode
    pk.attach(frozen, lora(), "other")
    pk.set_adapter(frozen, "other")
    pk.set_adapter(frozen, "default")
    assert not any(p.requires_grad for p in frozen.parameters()), "switching thawed it"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_files_in_another_dtype(saved: Path, dtype: torch.dtype) -> None:
    tensors = {k: v.to(dtype) for k, v in load_file(saved / WEIGHTS).items()}
    save_file(tensors, saved / WEIGHTS)
    model = pk.load(tiny_bert(), saved)
    for key, p in state(model).parameters_of(model, "default").items():
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, tensors[f"base_model.model.{key}"].float(), rtol=0, atol=0)


# A disk that is full: the old checkpoint stays, nothing half-written stays beside it.


class Disk:
    """Lets `count` calls through and then has no space left, for good or for `failures` calls."""

    def __init__(self, real, count: int, failures: int = 99) -> None:
        self.real, self.left, self.failures = real, count, failures

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if -self.failures <= self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("call", ["os.fsync", "tempfile.mkstemp", "os.fdopen"])
def test_a_full_disk_leaves_the_old_checkpoint(saved: Path, monkeypatch, call: str, left: int) -> None:
    before = content(saved)
    model = pk.attach(tiny_bert(), lora(r=4))
    module, name = call.split(".")
    real = getattr(getattr(checkpoint, module), name)
    with monkeypatch.context() as patch:
        patch.setattr(f"peftkern.checkpoint.{call}", Disk(real, left))
        with unchanged(model), pytest.raises(CheckpointError, match=r"No space left on device.*before is intact"):
            pk.save(model, saved)
    assert content(saved) == before
    pk.load(tiny_bert(), saved)
    pk.save(model, saved)
    assert content(saved) != before


def test_a_file_that_grows_too_large(saved: Path) -> None:
    """The operating system itself cuts the write off in the middle."""
    before = content(saved)
    model = pk.attach(tiny_bert(), lora(r=64))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with unchanged(model), pytest.raises(CheckpointError, match=r"too large.*before is intact"):
            pk.save(model, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(saved) == before


@pytest.mark.parametrize("left", [0, 1])
def test_a_rename_that_fails(saved: Path, monkeypatch, left: int) -> None:
    before = content(saved)
    disk = Disk(os.replace, left, failures=1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda path, target: disk(path, target))
        with pytest.raises(CheckpointError, match="before is intact"):
            pk.save(pk.attach(tiny_bert(), lora(r=4)), saved)
    assert content(saved) == before


# Files that are bad.


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights(saved: Path, size: int) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:size])
    refused(saved, f"{WEIGHTS} is truncated or not a safetensors file")


def test_weights_of_another_kind(saved: Path) -> None:
    torch.save({"x": torch.ones(1)}, saved / "adapter_model.bin")
    (saved / WEIGHTS).unlink()
    refused(saved, "adapter_model.bin is a pickle, which is never loaded")
    (saved / "adapter_model.bin").unlink()
    refused(saved, f"{WEIGHTS} does not exist")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON file"),
        ('{"r": 8', "not a JSON file"),
        ("[]", "names no peft_type"),
        ('{"r": 8}', "names no peft_type"),
    ],
)
def test_a_configuration_that_is_none(saved: Path, text: str, message: str) -> None:
    (saved / CONFIG).write_text(text)
    refused(saved, message)


def test_a_configuration_that_is_missing(saved: Path) -> None:
    (saved / CONFIG).unlink()
    refused(saved, f"{CONFIG} does not exist")


def test_a_configuration_in_a_wrong_encoding(saved: Path) -> None:
    (saved / CONFIG).write_bytes(b'{"peft_type": "LORA\xff"}')
    refused(saved, "not a JSON file")


def test_options_that_are_unknown_or_not_implemented(saved: Path) -> None:
    edit(saved, lora_alhpa=16)
    refused(saved, "no field 'lora_alhpa'; did you mean 'lora_alpha'", ConfigError)
    edit(saved, lora_alhpa=..., use_qalora=True)
    refused(saved, "use_qalora=True is not implemented and would change the result", ConfigError)
    edit(saved, use_qalora=..., r=-1)
    refused(saved, "r=-1: want an integer > 0", ConfigError)


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    refused(tmp_path / "nothing here", "is no directory, and as a hub repository it cannot be had")
    refused(tmp_path, f"{CONFIG} does not exist: want a directory with {CONFIG}")


def test_a_method_that_is_not_installed(saved: Path) -> None:
    edit(saved, peft_type="SCALE9", peftkern={"method": "scale9", "distribution": "peftkern-scale9", "version": "1"})
    refused(saved, "method 'scale9' is not installed: pip install peftkern-scale9", UnknownMethodError)
    edit(saved, peft_type="SCALE9", peftkern=...)
    refused(saved, "method 'SCALE9' is not installed: no distribution is known", UnknownMethodError)


# Files that are good, for another model.


def test_a_mis_shaped_tensor(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    key = "base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.weight"
    save_file(tensors | {key: torch.zeros(32, 9)}, saved / WEIGHTS)
    refused(saved, rf"tensor {key} is \(32, 9\), wanted \(32, 8\)")
    save_file({k: v for k, v in tensors.items() if k != key}, saved / WEIGHTS)
    refused(saved, rf"tensor {key} \(32, 8\) is missing")
    save_file(tensors | {"base_model.model.extra.lora_A.weight": torch.zeros(1)}, saved / WEIGHTS)
    refused(saved, "1 tensors have no place in it, the first is base_model.model.extra.lora_A.weight")


def test_another_backbone(saved: Path, tmp_path: Path) -> None:
    refused(saved, r"query.lora_A.weight is \(8, 32\), wanted \(8, 48\)", model=tiny_bert(hidden_size=48))
    refused(saved, r"layer\.2\..*is missing", model=tiny_bert(num_hidden_layers=3))
    refused(saved, "2 tensors|4 tensors|have no place", model=tiny_bert(num_hidden_layers=1))
    refused(saved, "adapter does not fit this GPT2LMHeadModel.*matches no module", model=tiny_gpt2())
    prompt = pk.save(pk.attach(tiny_llama(), pk.PromptTuningConfig(num_virtual_tokens=3)), tmp_path / "prompt")
    refused(prompt, r"prompt_embeddings is \(3, 32\), wanted \(3, 48\)", model=tiny_llama(hidden_size=48))
    head = pk.save(pk.attach(tiny_bert(), pk.HeadConfig()), tmp_path / "head")
    refused(head, "classifier", model=tiny_bert(num_labels=7))
    refused(head, "does not fit this GPT2LMHeadModel", model=tiny_gpt2())
    last = pk.save(pk.attach(tiny_bert(), pk.HeadConfig(last_k=2)), tmp_path / "last")
    refused(last, "does not fit this BertForTokenClassification.*last_k", model=tiny_bert(num_hidden_layers=1))


def test_a_name_that_is_taken_and_a_model_that_is_merged(saved: Path) -> None:
    model = pk.load(tiny_bert(), saved)
    with unchanged(model), pytest.raises(AdapterError, match="an adapter 'default' is attached already"):
        pk.load(model, saved)
    pk.merge(model)
    with unchanged(model), pytest.raises(AdapterError, match="are merged"):
        pk.load(model, saved, "two")


def test_restore_into_an_attached_adapter(saved: Path, tmp_path: Path) -> None:
    want = pk.load(tiny_bert(), saved)(**token_batch(labels=5)).logits
    model = pk.attach(tiny_bert(), lora())
    own = list(state(model).parameters_of(model, "default").values())
    checkpoint.restore(model, saved)
    assert torch.equal(model(**token_batch(labels=5)).logits, want)
    assert own == list(state(model).parameters_of(model, "default").values()), "an optimizer would have lost them"
    other = pk.attach(tiny_bert(), lora(r=4))
    with unchanged(other), pytest.raises(CheckpointError, match=r"is \(8, 32\), wanted \(4, 32\)"):
        checkpoint.restore(other, saved)
    third = pk.attach(tiny_bert(), pk.BottleneckConfig())
    with (
        unchanged(third),
        pytest.raises(CheckpointError, match="holds a lora, and adapter 'default' is a adapter"),
    ):
        checkpoint.restore(third, saved)
