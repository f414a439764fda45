"""Merging: exact back, close forth, in every dtype, and an error before any weight moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peftkern as pk
from peftkern.attachment import adapted_modules, state
from peftkern.errors import AdapterError, MergeError
from peftkern.testing import TinyModel, relative_error, tiny_bert, tiny_gpt2, tiny_llama, token_batch, unchanged

RANDOM = {"r": 3, "init_lora_weights": False}


def test_merge_twice_and_unmerge_twice(family: TinyModel) -> None:
    model = pk.attach(family.build(), pk.LoraConfig(**RANDOM))
    with unchanged(model), pytest.raises(MergeError, match="no adapter is merged"):
        pk.unmerge(model)
    pk.merge(model)
    with unchanged(model), pytest.raises(MergeError, match=r"\['default'\] are merged already: unmerge first"):
        pk.merge(model)
    pk.unmerge(model)
    with unchanged(model), pytest.raises(MergeError, match="no adapter is merged"):
        pk.unmerge(model)


def test_while_merged_nothing_else_is_let_in(tmp_path) -> None:
    model = pk.attach(tiny_bert(), pk.LoraConfig(**RANDOM), "one")
    pk.attach(model, pk.LoraConfig(**RANDOM), "two")
    pk.save(model, tmp_path, "two")
    pk.merge(model)
    for act in (
        lambda: pk.set_adapter(model, "two"),
        lambda: pk.set_adapter(model, []),
        lambda: pk.attach(model, pk.LoraConfig(), "three"),
        lambda: pk.load(model, tmp_path, "three"),
    ):
        with unchanged(model), pytest.raises(AdapterError, match=r"\['one'\] are merged"):
            act()


def test_nothing_active_and_nothing_attached() -> None:
    model = tiny_bert()
    for act in (
        pk.merge,
        pk.unmerge,
        pk.detach,
        lambda m: pk.set_adapter(m, "x"),
        lambda m: pk.disabled(m).__enter__(),
    ):
        with (
            unchanged(model),
            pytest.raises(AdapterError, match="nothing is attached to this BertForTokenClassification"),
        ):
            act(model)
    pk.attach(model, pk.LoraConfig())
    pk.set_adapter(model, [])
    with unchanged(model), pytest.raises(MergeError, match="no adapter is active"):
        pk.merge(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_weight_is_merged_in_f32_and_rounded_once(dtype: torch.dtype) -> None:
    model = pk.attach(tiny_gpt2().to(dtype), pk.LoraConfig(target_modules=["c_attn", "wte"], **RANDOM))
    for module in adapted_modules(model):
        a, b = (p.detach() for p in module.adapters["default"].parameters())
        exact = module.base.weight.float() + 8 / 3 * (b @ a)
        module.want = exact.to(dtype)
    before = {id(m): m.base_layer.weight.clone() for m in adapted_modules(model)}
    unmerged = model(**token_batch()).logits
    pk.merge(model)
    for module in adapted_modules(model):
        assert module.base_layer.weight.dtype == dtype
        # The last bit of the f32 sum may differ with the order of summation; after rounding at most one ulp of a few.
        assert relative_error(module.base.weight, module.want) < torch.finfo(dtype).eps / 16
    # Rounded weights against rounded updates: each differs from the exact sum by up to half an ulp.
    assert relative_error(model(**token_batch()).logits, unmerged) < 8 * torch.finfo(dtype).eps
    pk.unmerge(model)
    assert all(torch.equal(m.base_layer.weight, before[id(m)]) for m in adapted_modules(model))


def test_float64_is_merged_in_float64() -> None:
    model = pk.attach(tiny_llama().double(), pk.LoraConfig(**RANDOM))
    unmerged = model(**token_batch()).logits
    assert relative_error(pk.merge(model)(**token_batch()).logits, unmerged) < 1e-12


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_in_the_last_module_moves_no_weight(poison: float) -> None:
    model = pk.attach(tiny_llama(), pk.LoraConfig(**RANDOM))
    last = list(adapted_modules(model))[-1]
    with torch.no_grad():
        last.adapters["default"].b[0, 0] = poison
    weights = {name: p for name, p in model.named_parameters()}
    with pytest.raises(MergeError, match=r"layers\.1\.self_attn\.v_proj.*not finite"):
        pk.merge(model)
    assert all(p is weights[name] for name, p in model.named_parameters())


def test_overflow_of_a_half_weight_is_seen() -> None:
    model = pk.attach(nn.ModuleDict({"it": nn.Linear(4, 4).half()}), pk.LoraConfig(target_modules=["it"], **RANDOM))
    with torch.no_grad():
        model["it"].adapters["default"].b.fill_(1e5)
    with unchanged(model), pytest.raises(MergeError, match="not finite"):
        pk.merge(model)


def test_a_weight_that_is_not_plain() -> None:
    for module in (nn.Linear(4, 4, device="meta"), _quantised()):
        model = pk.attach(nn.ModuleDict({"it": module}), pk.LoraConfig(target_modules=["it"]))
        with pytest.raises(MergeError, match=r"it: weight of .* is not a plain floating-point tensor"):
            pk.merge(model)


def _quantised() -> nn.Linear:
    """As bitsandbytes and others keep them: an nn.Linear subclass with integers for a weight."""

    class Linear8(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return x @ (self.weight.to(x.dtype) / 127).T

    return Linear8()


def test_an_integer_base_trains_through_its_own_forward() -> None:
    model = pk.attach(nn.ModuleDict({"it": _quantised()}), pk.LoraConfig(target_modules=["it"], **RANDOM))
    x = torch.randn(2, 4)
    a, b = model["it"].adapters["default"].parameters()
    assert a.dtype == torch.float32
    torch.testing.assert_close(model["it"](x), 8 / 3 * x @ a.T @ b.T)
    model["it"](x).sum().backward()
    assert a.grad is not None


def test_several_adapters_merge_into_their_sum(family: TinyModel) -> None:
    model = family.build()
    for name in ("one", "two"):
        pk.attach(model, pk.LoraConfig(target_modules="all-linear", **RANDOM), name)
    pk.set_adapter(model, ["two", "one"])
    unmerged = model(**family.batch()).logits
    with unchanged(model):
        pk.merge(model)
        assert relative_error(model(**family.batch()).logits, unmerged) < 1e-5
        pk.unmerge(model)


def test_disabled_while_merged_is_the_backbone_and_then_merged_again(family: TinyModel) -> None:
    model, want = family.build(), family.build()(**family.batch()).logits
    pk.merge(pk.attach(model, pk.LoraConfig(**RANDOM)))
    merged = model(**family.batch()).logits
    with pk.disabled(model):
        assert torch.equal(model(**family.batch()).logits, want)
    assert torch.equal(model(**family.batch()).logits, merged)
    with pytest.raises(ZeroDivisionError), pk.disabled(model):
        1 / 0  # noqa: B018
    assert torch.equal(model(**family.batch()).logits, merged)


def test_detach_while_merged_restores_the_backbone(family: TinyModel) -> None:
    model = family.build()
    with unchanged(model):
        pk.merge(pk.attach(model, pk.LoraConfig(bias="all", **RANDOM)))
        pk.detach(model)


def test_dtype_changed_while_merged() -> None:
    """What is kept aside follows the model, so that unmerge gives weights that fit it."""
    model, want = tiny_gpt2(), tiny_gpt2().double()(**token_batch()).logits
    pk.merge(pk.attach(model, pk.LoraConfig(target_modules=["wte", "c_attn"], **RANDOM)))
    model.double()
    pk.unmerge(model)
    assert model.transformer.wte.weight is model.lm_head.weight
    with pk.disabled(model):
        assert torch.equal(model(**token_batch()).logits, want)
    assert model(**token_batch()).logits.dtype == torch.float64


def test_merge_with_biases_that_train() -> None:
    model = tiny_bert()
    pk.attach(model, pk.LoraConfig(bias="lora_only", **RANDOM))
    own = state(model).parameters_of(model, "default")
    with torch.no_grad():
        for p in own.values():
            p.add_(0.1)
    unmerged = model(**token_batch(labels=5)).logits
    pk.merge(model)
    torch.testing.assert_close(model(**token_batch(labels=5)).logits, unmerged)
    pk.unmerge(model)
    assert all(p is own[key] for key, p in state(model).parameters_of(model, "default").items())
    plain = pk.merge_and_unload(model)
    torch.testing.assert_close(plain(**token_batch(labels=5)).logits, unmerged)
    assert not [name for name, _ in plain.named_modules() if "peftkern" in name or "base_layer" in name]


def test_methods_that_cannot_merge_say_so(family: TinyModel) -> None:
    for config, message in (
        (pk.BottleneckConfig(), "method 'adapter' cannot be merged"),
        (pk.PromptTuningConfig(num_virtual_tokens=2), "is a prompt"),
    ):
        model = pk.attach(family.build(), config)
        with unchanged(model), pytest.raises(MergeError, match=message):
            pk.merge(model)
        pk.attach(model, pk.LoraConfig(**RANDOM), "lora")
        pk.set_adapter(model, ["lora", "default"])
        with unchanged(model), pytest.raises(MergeError, match=message):
            pk.merge(model)


def test_merged_model_can_be_saved_as_a_plain_one(tmp_path, family: TinyModel) -> None:
    model = pk.attach(family.build(), pk.LoraConfig(target_modules="all-linear", **RANDOM))
    unmerged = model(**family.batch()).logits
    pk.merge_and_unload(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert relative_error(again.eval()(**family.batch()).logits, unmerged) < 1e-5


def test_merge_of_a_tied_embedding_saves_both_ends(tmp_path) -> None:
    model = pk.attach(tiny_gpt2(), pk.LoraConfig(target_modules=["wte"], **RANDOM))
    unmerged = model(**token_batch()).logits
    pk.merge_and_unload(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert relative_error(again.eval()(**token_batch()).logits, unmerged) < 1e-5
