"""`pk.trainable`: every number against one worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import peftkern as pk
from peftkern.attachment import state
from peftkern.memory import MemoryReport, saved_bytes
from peftkern.testing import TinyModel, tiny_bert, tiny_gpt2, tiny_llama, token_batch, unchanged

from .conftest import skip_without_kernels

# Width 32, feed-forward 64, 2 blocks, vocabulary 61, 64 positions, 5 labels.
BERT = (61 + 64 + 2) * 32 + 2 * 32 + 2 * (4 * (32 * 32 + 32) + 32 * 64 + 64 + 64 * 32 + 32 + 4 * 32) + 32 * 5 + 5
GPT2 = (61 + 64) * 32 + 2 * (32 * 96 + 96 + 32 * 32 + 32 + 32 * 128 + 128 + 128 * 32 + 32 + 4 * 32) + 2 * 32
LLAMA = 2 * 61 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32


def check(
    model: nn.Module, ours: int, total: int, bytes_each: int = 4, full: int | None = None, full_each: int = 4
) -> None:
    report = pk.trainable(model)
    assert report.trainable == ours
    assert report.total == total
    assert report.gradient_bytes == ours * bytes_each
    assert report.optimizer_bytes == 2 * ours * bytes_each
    assert report.full_gradient_bytes == full * full_each
    assert report.full_optimizer_bytes == 2 * full * full_each
    assert report.share == ours / total
    assert report.activation_bytes is None and report.full_activation_bytes is None


def test_plain_models() -> None:
    check(tiny_bert(), BERT, BERT, full=BERT)
    check(tiny_gpt2(), GPT2, GPT2, full=GPT2)
    check(tiny_llama(), LLAMA, LLAMA, full=LLAMA)
    check(tiny_llama().requires_grad_(False), 0, LLAMA, full=LLAMA)


def test_adapters() -> None:
    lora = 2 * 2 * (8 * 32 + 8 * 32)  # query and value of two blocks
    check(pk.attach(tiny_bert(), pk.LoraConfig()), lora, BERT + lora, full=BERT)
    packed = 2 * (8 * 32 + 8 * 96)  # c_attn: 32 -> 96
    check(pk.attach(tiny_gpt2(), pk.LoraConfig()), packed, GPT2 + packed, full=GPT2)
    grouped = 2 * (8 * 32 + 8 * 32 + 8 * 32 + 8 * 16)  # q_proj 32 -> 32, v_proj 32 -> 16
    check(pk.attach(tiny_llama(), pk.LoraConfig()), grouped, LLAMA + grouped, full=LLAMA)
    bottleneck = 2 * (2 * 32 + 2 + 32 * 2 + 32)
    check(pk.attach(tiny_llama(), pk.BottleneckConfig()), bottleneck, LLAMA + bottleneck, full=LLAMA)
    check(pk.attach(tiny_llama(), pk.PromptTuningConfig(num_virtual_tokens=7)), 7 * 32, LLAMA + 7 * 32, full=LLAMA)


def test_f32_adapters_over_bf16_cost_four_bytes_each() -> None:
    lora = 2 * (8 * 32 + 8 * 32 + 8 * 32 + 8 * 16)
    check(pk.attach(tiny_llama().bfloat16(), pk.LoraConfig()), lora, LLAMA + lora, 4, LLAMA, 2)


def test_parameters_of_the_backbone_that_train_are_not_counted_twice() -> None:
    head = 32 * 5 + 5
    check(pk.attach(tiny_bert(), pk.HeadConfig()), head, BERT, full=BERT)
    check(pk.attach(tiny_gpt2(), pk.FullConfig()), GPT2, GPT2, full=GPT2)
    lora = 2 * 2 * (8 * 32 + 8 * 32)
    both = pk.attach(tiny_bert(), pk.LoraConfig(task_type="TOKEN_CLS"))
    check(both, lora + head, BERT + lora, full=BERT)


def test_only_the_active_adapter_counts() -> None:
    model = pk.attach(tiny_bert(), pk.LoraConfig(), "one")
    pk.attach(model, pk.LoraConfig(r=2), "two")
    one, two = 2 * 2 * 8 * 64, 2 * 2 * 2 * 64
    check(model, one, BERT + one + two, full=BERT)
    pk.set_adapter(model, "two")
    check(model, two, BERT + one + two, full=BERT)
    pk.set_adapter(model, ["one", "two"])
    check(model, one + two, BERT + one + two, full=BERT)


def test_with_a_batch_activations_are_measured(family: TinyModel) -> None:
    model = pk.attach(family.build(), pk.LoraConfig()).train()
    torch.manual_seed(7)
    state_before = torch.get_rng_state()
    with unchanged(model):
        report = pk.trainable(model, family.batch())
    assert torch.equal(torch.get_rng_state(), state_before)
    assert 0 < report.activation_bytes < report.full_activation_bytes
    plain = family.build().train().requires_grad_(True)
    assert report.full_activation_bytes == saved_bytes(lambda: plain(**family.batch()), list(plain.parameters()))
    assert report.activation_bytes == saved_bytes(lambda: model(**family.batch()), list(model.parameters()))
    top = pk.attach(family.build(), pk.LoraConfig(layers_to_transform=[1])).train()
    assert pk.trainable(top, family.batch()).activation_bytes < report.activation_bytes


def test_saved_bytes_by_hand() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    y = torch.randn(3, 5, requires_grad=True)
    assert saved_bytes(lambda: x * y) == 2 * 3 * 5 * 4
    assert saved_bytes(lambda: x * x) == 3 * 5 * 4, "one storage is counted once"
    assert saved_bytes(lambda: (x[:2] * 3.0).sum()) == 0
    assert saved_bytes(lambda: torch.sigmoid(x), [x]) == 3 * 5 * 4
    assert saved_bytes(lambda: x * y, [x, y]) == 0
    layer = nn.Linear(5, 7)
    assert saved_bytes(lambda: layer(x), list(layer.parameters())) == 3 * 5 * 4
    layer.requires_grad_(False)
    assert saved_bytes(lambda: layer(x), list(layer.parameters())) == 0, "a frozen linear map keeps only its weight"


def test_the_report_reads_like_one() -> None:
    text = str(pk.trainable(pk.attach(tiny_llama(), pk.LoraConfig()), token_batch()))
    assert f"trainable params: 1,792 || all params: {LLAMA + 1792:,} || trainable%:" in text
    for word in ("gradients", "optimizer (AdamW)", "saved activations", "full fine-tuning"):
        assert word in text
    assert MemoryReport(0, 0, 0, 0, 0, 0).share == 0


def test_moved_to_half_the_numbers_follow() -> None:
    model = pk.attach(tiny_bert(), pk.LoraConfig()).half()
    assert pk.trainable(model).gradient_bytes == 2 * 2 * 2 * 8 * 64
    assert pk.trainable(model).full_gradient_bytes == 2 * BERT
    assert {p.dtype for p in state(model).parameters_of(model, "default").values()} == {torch.float16}


def test_a_batch_that_fails_leaves_the_model_alone() -> None:
    model = pk.attach(tiny_bert(), pk.LoraConfig())
    with unchanged(model), pytest.raises((IndexError, RuntimeError)):
        pk.trainable(model, {"input_ids": torch.full((1, 3), 1000)})


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama], ids=["bert", "llama"])
def test_an_adapted_model_saves_each_input_once_and_its_latents(build: Callable[[], nn.Module]) -> None:
    """Over a bf16 backbone, dropout on, f32 adapters: per target h [M, 8] in f32 and a seed of 8 bytes, and per block
    those inputs that the frozen model has no need to save: query, key and value share one."""
    skip_without_kernels()
    batch = token_batch(labels=5)
    rows = batch["input_ids"].numel()
    names = ["query", "key", "value"] if build is tiny_bert else ["q_proj", "k_proj", "v_proj"]

    def saved(config: pk.LoraConfig | None) -> int:
        model = build().bfloat16().train().requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.requires_grad_())
        if config is not None:
            pk.attach(model, config)
        return saved_bytes(lambda: model(**batch), list(model.parameters()))

    floor = saved(None)
    one = saved(pk.LoraConfig(target_modules=names[:1], lora_dropout=0.1)) - floor
    three = saved(pk.LoraConfig(target_modules=names, lora_dropout=0.1)) - floor
    without = saved(pk.LoraConfig(target_modules=names, lora_dropout=0.0)) - floor
    blocks, latent, seed, x = 2, rows * 8 * 4, 8, rows * 32 * 2
    assert three - one == blocks * 2 * (latent + seed), "two further targets of the same x save no further x"
    assert one <= blocks * (x + latent + seed)
    assert three - without == blocks * 3 * seed, "dropout saves a seed and nothing else"
