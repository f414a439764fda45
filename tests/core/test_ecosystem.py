"""Attached models under the tools that train models: Trainer, TRL, accelerate, DDP, FSDP2, a GPU."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import peftkern as pk
from peftkern.attachment import state
from peftkern.errors import AdapterError, MergeError
from peftkern.testing import MODELS, TinyModel, relative_error, tiny_gpt2, tiny_llama, token_batch

CONFIGS = {
    "lora": lambda: pk.LoraConfig(target_modules="all-linear", init_lora_weights=False),
    "adapter": lambda: pk.BottleneckConfig(placement="parallel"),
    "prompt": lambda: pk.PromptTuningConfig(num_virtual_tokens=3),
    "last block": lambda: pk.HeadConfig(last_k=1),
}


def rows(family: TinyModel, count: int = 8) -> list[dict]:
    """The first row of the family's batch, and rotations of it."""
    ids = family.batch()["input_ids"][0]
    labels = family.batch()["labels"][0]
    one = torch.ones_like(ids)
    return [{"input_ids": ids.roll(i), "attention_mask": one, "labels": labels.roll(i)} for i in range(count)]


def arguments(directory: Path, **options) -> TrainingArguments:
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "seed": 1,
    }  # fmt: skip
    return TrainingArguments(str(directory), **(defaults | options))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("config", CONFIGS)
def test_trainer_trains_only_the_adapter(family: TinyModel, config: str, tmp_path: Path) -> None:
    model = pk.attach(family.build(), CONFIGS[config]())
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    data = rows(family)
    whole = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    before = float(model(**whole).loss.detach())
    trainer = Trainer(model, arguments(tmp_path, save_strategy="no"), train_dataset=data)
    trainer.train()
    assert float(model.eval()(**whole).loss.detach()) < before
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in frozen.items())
    held = {id(p) for p in trainer.optimizer.optimizer.state if isinstance(p, nn.Parameter)}
    assert held <= {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 2}, {"bf16": True}, {"max_grad_norm": 0.1}], ids=str
)
def test_trainer_options(options: dict, tmp_path: Path) -> None:
    family = MODELS["llama"]
    model = pk.attach(family.build(), CONFIGS["lora"]())
    trainer = Trainer(model, arguments(tmp_path, save_strategy="no", **options), train_dataset=rows(family))
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_trainer_with_gradient_checkpointing_is_the_same_training(reentrant: bool, tmp_path: Path) -> None:
    family, ends = MODELS["llama"], []
    for checkpointing in (False, True):
        torch.manual_seed(4)
        model = pk.attach(family.build(), pk.LoraConfig(init_lora_weights=False, layers_to_transform=[1]))
        # The newer name of the two, where this version of transformers has it.
        fields = {field.name for field in dataclasses.fields(TrainingArguments)}
        name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
        options = {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}} if checkpointing else {}
        chosen = arguments(tmp_path, save_strategy="no", **options)
        trainer = Trainer(model, chosen, train_dataset=rows(family))
        trainer.train()
        ends.append(losses(trainer))
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_trainer_resumes_where_it_was_cut_off(config: str, tmp_path: Path) -> None:
    """The state of the whole attached model is saved and loaded by Trainer itself."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 3

    family = MODELS["bert"]

    def trainer(where: Path, *callbacks: TrainerCallback) -> Trainer:
        torch.manual_seed(5)
        model = pk.attach(family.build(), CONFIGS[config]())
        chosen = arguments(where, save_steps=3, save_strategy="steps")
        return Trainer(model, chosen, train_dataset=rows(family), callbacks=list(callbacks))

    whole = trainer(tmp_path / "whole")
    whole.train()
    trainer(tmp_path / "cut", Stop()).train()
    resumed = trainer(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed)[-3:] == pytest.approx(losses(whole)[-3:], rel=1e-5)
    own = state(whole.model).parameters_of(whole.model, "default")
    for key, p in state(resumed.model).parameters_of(resumed.model, "default").items():
        torch.testing.assert_close(p, own[key])


def test_trl_sft(tmp_path: Path) -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3} | {f"w{i}": i for i in range(4, 61)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    )
    data = Dataset.from_dict({"text": [" ".join(f"w{4 + (i + j) % 50}" for j in range(10)) for i in range(16)]})
    model = pk.attach(tiny_llama(), CONFIGS["lora"]())
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    options = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "bf16": False, "max_length": 16, "save_strategy": "no",
    }  # fmt: skip
    trainer = SFTTrainer(model, SFTConfig(str(tmp_path), **options), train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in frozen.items())


def test_accelerate(family: TinyModel, tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = pk.attach(family.build(), CONFIGS["lora"]()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    found = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = prepared(**family.batch()).loss
        accelerator.backward(loss)
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < found[0]
    plain = accelerator.unwrap_model(prepared)
    assert plain is model
    accelerator.save_state(str(tmp_path))
    want = model.eval()(**family.batch()).logits
    with torch.no_grad():
        for p in state(model).parameters_of(model, "default").values():
            p.zero_()
    accelerator.load_state(str(tmp_path))
    assert torch.equal(model(**family.batch()).logits, want)


def test_state_dict_goes_back_into_a_fresh_model(family: TinyModel) -> None:
    for make in CONFIGS.values():
        model = pk.attach(family.build(), make())
        fresh = pk.attach(family.build(), make())
        fresh.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
        assert torch.equal(fresh(**family.batch()).logits, model(**family.batch()).logits)


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("config", CONFIGS)
def test_ddp(family: TinyModel, config: str) -> None:
    model = pk.attach(family.build(), CONFIGS[config]()).train()
    model(**family.batch()).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(**family.batch()).loss.backward()
    for name, p in model.named_parameters():
        if name in want:
            torch.testing.assert_close(p.grad, want[name])
        else:
            assert p.grad is None


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("config", CONFIGS)
def test_fsdp2(config: str, tmp_path: Path) -> None:
    """fully_shard on each block and the whole: loss and gradients as unsharded, and the adapter is saved whole."""
    torch.manual_seed(1)
    model = pk.attach(tiny_llama(), CONFIGS[config]()).train()
    twin = copy.deepcopy(model)
    want = twin(**token_batch())
    want.loss.backward()
    shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    got = model(**token_batch())
    got.loss.backward()
    torch.testing.assert_close(got.loss, want.loss)
    grads = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    for name, p in model.named_parameters():
        if name in grads:
            assert isinstance(p.grad, DTensor), name
            torch.testing.assert_close(p.grad.full_tensor(), grads[name])
    optimizer.step()
    assert not torch.equal(model(**token_batch()).loss, got.loss)
    torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1).step()
    saved = pk.save(model, tmp_path / "adapter")
    again = pk.load(tiny_llama(), saved)
    assert relative_error(again(**token_batch()).logits, twin.eval()(**token_batch()).logits) < 1e-5


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("config", CONFIGS)
def test_fsdp2_checkpoints_of_accelerate(config: str) -> None:
    """What accelerate asks torch for: the trainable part of a PeftModel, gathered; all shards of an attached model."""

    def made(seed: int, wrap: bool) -> nn.Module:
        torch.manual_seed(seed)
        model = (pk.get_peft_model if wrap else pk.attach)(tiny_llama(), CONFIGS[config]())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) / 20)
        return shard(model).eval()

    for wrap in (True, False):
        one, other = made(1, wrap), made(2, wrap)
        options = StateDictOptions(full_state_dict=wrap, ignore_frozen_params=wrap)
        state = get_model_state_dict(one, options=options)
        trainable = sum(p.requires_grad for p in one.parameters())
        assert len(state) == trainable if wrap else len(state) > trainable
        set_model_state_dict(other, state, options=StateDictOptions(full_state_dict=wrap, strict=not wrap))
        want = one(**token_batch()).logits
        assert torch.equal(other(**token_batch()).logits, want)
        assert not torch.equal(made(2, wrap)(**token_batch()).logits, want)


@pytest.mark.usefixtures("gloo")
def test_fsdp2_what_moves_parameters_is_refused() -> None:
    """FSDP2 puts its own shards back into the modules: a merged or exchanged parameter would be lost without a word."""
    want = tiny_llama()(**token_batch()).logits
    model = shard(pk.attach(tiny_llama(), CONFIGS["lora"]()))
    with pk.disabled(model):
        assert torch.equal(model(**token_batch()).logits, want)
    with pytest.raises(MergeError, match="sharded"):
        pk.merge(model)
    model = shard(pk.attach(tiny_llama(), CONFIGS["last block"]()))
    with pytest.raises(AdapterError, match="sharded"), pk.disabled(model):
        pass
    with pytest.raises(AdapterError, match="sharded"):
        pk.detach(model)
    assert pk.active_adapters(model) == ["default"]
    model(**token_batch()).loss.backward()


def test_generate_with_every_method() -> None:
    for build in (tiny_gpt2, tiny_llama):
        for name, make in CONFIGS.items():
            model = pk.attach(build(), make())
            ids = torch.tensor([[7, 8, 9]])
            options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
            with_cache = model.generate(ids, **options)
            assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options)), name
            static = None if name == "prompt" else model.generate(ids, cache_implementation="static", **options)
            assert static is None or torch.equal(with_cache, static), name


@pytest.mark.parametrize("config", CONFIGS)
def test_a_device(device: torch.device, config: str, tmp_path: Path) -> None:
    """What is attached to a model on a device is on that device, and comes off and back onto it."""
    want = None
    for where in (torch.device("cpu"), device):
        torch.manual_seed(2)
        model = (
            pk.attach(tiny_llama().to(where), CONFIGS[config]())
            if where.type == "cpu"
            else pk.load(tiny_llama().to(where), tmp_path, trainable=True)
        )
        own = state(model).parameters_of(model, "default")
        assert {p.device.type for p in own.values()} == {where.type}
        batch = {key: value.to(where) for key, value in token_batch().items()}
        out = model.train()(**batch)
        out.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in own.values())
        logits = out.logits.detach().cpu()
        want = logits if want is None else want
        assert relative_error(logits, want) < 1e-3
        pk.save(model, tmp_path)
    model.cpu()
    assert relative_error(model.eval()(**token_batch()).logits, want) < 1e-3


def test_the_environment_is_left_alone() -> None:
    """Importing and attaching change neither the threads, nor the environment, nor the default dtype."""
    before = (torch.get_num_threads(), torch.get_default_dtype(), dict(os.environ))
    pk.attach(tiny_llama(), CONFIGS["lora"]())
    assert (torch.get_num_threads(), torch.get_default_dtype(), dict(os.environ)) == before
