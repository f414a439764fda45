"""Key-value prefixes: padding, positions, caches, recomputation and what must not be lost in silence."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import peftkern as pk
from peftkern.attachment import state
from peftkern.errors import ConfigError, TargetError
from peftkern.prefixing import ATTENTION, PrefixedCache, cache_name
from peftkern.targets import CACHE_NAMES
from peftkern.testing.case import switch_checkpointing, unchanged
from peftkern.testing.models import tiny_bert, tiny_gpt2, tiny_llama, token_batch

T = 4
CAUSAL = {"gpt2": tiny_gpt2, "llama": tiny_llama}
MODELS = CAUSAL | {"bert": tiny_bert}


def prefixed(model: nn.Module, name: str = "default", length: int = T, seed: int = 1, **fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return pk.attach(model, pk.PrefixTuningConfig(num_virtual_tokens=length, **fields), name)


def prefix_cache(model: nn.Module, rows: int, names: tuple[str, ...] = ("default",)) -> DynamicCache:
    """The prefixes by hand: from the flat rows, as the paper lays them out, into an ordinary cache."""
    cache, config = DynamicCache(), model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    flat = [state(model).parameters_of(model, name)["prompt_embeddings"] for name in names]
    parts = [p.view(len(p), config.num_hidden_layers, 2, heads, -1).permute(1, 2, 3, 0, 4) for p in flat]
    for layer in range(config.num_hidden_layers):
        keys, values = torch.cat([part[layer] for part in parts], 2).unbind(0)
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
    return cache


def by_hand(plain: nn.Module, model: nn.Module, batch: dict[str, Tensor], names: tuple[str, ...] = ("default",)):
    """What the plain model gives for a prefilled cache and a mask with ones in front."""
    cache = prefix_cache(model, len(batch["input_ids"]), names)
    mask = F.pad(batch["attention_mask"], (cache.get_seq_length(), 0), value=1)
    return plain(
        batch["input_ids"],
        attention_mask=mask,
        labels=batch.get("labels"),
        **{cache_name(plain.base_model, {}): cache},
    )


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_model_against_a_prefilled_cache(name: str, pad: str) -> None:
    plain, model = CAUSAL[name](), prefixed(CAUSAL[name]())
    batch = token_batch(rows=4, length=7, pad=pad)
    got, want = model(**batch), by_hand(plain, model, batch)
    real = batch["attention_mask"].bool()
    assert got.logits.shape == (4, 7, 61), "the prefix has no rows in the output, and labels are the text's"
    torch.testing.assert_close(got.logits[real], want.logits[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-5)
    rows = state(model).parameters_of(model, "default")["prompt_embeddings"]
    torch.testing.assert_close(*(torch.autograd.grad(o.loss, rows)[0] for o in (got, want)), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_encoder_against_one_row_at_a_time(pad: str) -> None:
    """Padding on either side changes nothing for the real tokens, given their positions."""
    model = prefixed(tiny_bert())
    batch = token_batch(rows=4, length=7, labels=5, pad=pad)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(0)
    got = model(**batch, position_ids=positions).logits
    for row, real in enumerate(batch["attention_mask"].bool()):
        alone = model(batch["input_ids"][row, real][None]).logits[0]
        torch.testing.assert_close(got[row][real], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_positions_start_behind_the_prefix(name: str) -> None:
    """Given or not, the text's positions count from T."""
    model, ids = prefixed(MODELS[name]()), torch.tensor([[7, 8, 9, 10]])
    seen: list[Tensor] = []
    place = next(
        (m for path, m in model.named_modules() if path.endswith(("wpe", "position_embeddings", "rotary_emb"))), None
    )
    place.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(kwargs.get("position_ids", args[-1] if args else None)), with_kwargs=True
    )
    model(ids)
    model(ids, position_ids=torch.arange(4)[None])
    assert [p.flatten().tolist() for p in seen] == [[4, 5, 6, 7]] * 2


def test_roberta_counts_positions_from_its_ids() -> None:
    """Its positions come from the ids and skip padding, which nobody outside can do for it."""
    config = RobertaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)
    config.intermediate_size, config.max_position_embeddings = 64, 40
    torch.manual_seed(0)
    model = prefixed(RobertaModel(config).eval())
    padded = model(torch.tensor([[7, 8, 9, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0]])).last_hidden_state
    alone = model(torch.tensor([[7, 8, 9]])).last_hidden_state
    torch.testing.assert_close(padded[:, :3], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fields", [{}, {"prefix_projection": True, "encoder_hidden_size": 5}], ids=["flat", "mlp"])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing(name: str, fields: dict, reentrant: bool) -> None:
    model = prefixed(MODELS[name](), **fields).train()
    batch = token_batch(labels=5)
    trained = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(**batch).loss, trained)
    switch_checkpointing(model, reentrant)
    model(**batch).loss.backward()
    for parameter, gradient in zip(trained, want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "sampling", "static"],
)
def test_generation_with_and_without_cache(name: str, options: dict) -> None:
    model = prefixed(CAUSAL[name]())
    batch = token_batch(rows=3, length=5, pad="left")
    kwargs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None} | options
    inputs = {"attention_mask": batch["attention_mask"]}
    torch.manual_seed(0)
    got = model.generate(batch["input_ids"], **inputs, **kwargs)
    kwargs.pop("cache_implementation", None)
    torch.manual_seed(0)
    want = model.generate(batch["input_ids"], **inputs, **(kwargs | {"use_cache": False}))
    assert torch.equal(got, want)
    with pk.disabled(model):
        assert not torch.equal(got, model.generate(batch["input_ids"], **inputs, **kwargs))


@pytest.mark.parametrize("name", CAUSAL)
def test_cache_holds_the_text_alone(name: str) -> None:
    model = prefixed(CAUSAL[name]())
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    whole = model(ids).logits
    first = model(ids[:, :3], use_cache=True)
    key = next(name for name in CACHE_NAMES if first.get(name) is not None)
    cache = first[key]
    assert type(cache) is DynamicCache and cache.get_seq_length() == 3
    second = model(ids[:, 3:], **{key: cache})
    torch.testing.assert_close(second.logits, whole[:, 3:], rtol=1e-4, atol=1e-5)
    assert second[key] is cache and cache.get_seq_length() == 5
    assert not any(isinstance(value, PrefixedCache) for value in model(ids, use_cache=False).values())


def test_a_conversation_continues_on_its_cache() -> None:
    model = prefixed(tiny_llama())
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=3, **options)
    longer = torch.cat([first.sequences, torch.tensor([[11, 12]])], 1)
    key = next(name for name in CACHE_NAMES if first.get(name) is not None)
    got = model.generate(longer, max_new_tokens=4, **{key: first[key]}, **options).sequences
    assert torch.equal(got, model.generate(longer, max_new_tokens=4, **options).sequences)


def test_several_prefixes_and_a_prompt() -> None:
    plain = tiny_llama()
    model = prefixed(prefixed(tiny_llama(), "one", 2), "two", 3, seed=2)
    batch = token_batch(rows=2, length=5)
    for names in (("one", "two"), ("two", "one"), ("two",)):
        pk.set_adapter(model, list(names))
        torch.testing.assert_close(model(**batch).loss, by_hand(plain, model, batch, names).loss, rtol=1e-4, atol=1e-5)
    pk.attach(model, pk.PromptTuningConfig(num_virtual_tokens=2), "prompt")
    ids = torch.tensor([[7, 8, 9]])
    rows = state(model).parameters_of(model, "prompt")["prompt_embeddings"]
    embeds = torch.cat([rows[None], model.get_input_embeddings()(ids)], 1)
    pk.set_adapter(model, "one")
    want = model(inputs_embeds=embeds).logits
    for names in (["one", "prompt"], ["prompt", "one"]):
        pk.set_adapter(model, names)
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_detach_restores_everything(name: str) -> None:
    model = MODELS[name]()
    before = model(**token_batch(labels=5)).logits
    attention = model.config._attn_implementation
    with unchanged(model):
        prefixed(model)
        assert model.config._attn_implementation == ATTENTION
        with pk.disabled(model):
            assert model.config._attn_implementation == attention
            assert torch.equal(model(**token_batch(labels=5)).logits, before)
        pk.detach(model)
    assert model.config._attn_implementation == attention
    assert torch.equal(model(**token_batch(labels=5)).logits, before)
    assert not any("prefix" in key for module in model.modules() for key in module.__dict__)


def test_a_copy_has_prefixes_of_its_own() -> None:
    model = prefixed(tiny_llama())
    batch = token_batch()
    want = model(**batch).loss
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    assert torch.equal(model(**batch).loss, want) and not torch.equal(twin(**batch).loss, want)


def test_a_plain_model_with_the_same_configuration_is_left_alone() -> None:
    model = tiny_llama()
    other = LlamaForCausalLM(model.config).eval()
    batch = token_batch()
    want = other(**batch).logits
    prefixed(model)
    torch.testing.assert_close(other(**batch).logits, want)


def test_joined_where_attention_is_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that refuses another attention function: the same results by concatenation, told in a warning."""
    for build in (tiny_llama, tiny_bert):
        fused, batch = prefixed(build()), token_batch(rows=3, length=6, labels=5, pad="left")
        monkeypatch.setattr(type(fused), "set_attn_implementation", lambda self, name: None)
        model = build()
        with pytest.warns(UserWarning, match="concatenated with keys and values"):
            prefixed(model)
        monkeypatch.undo()
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(model(**batch).logits[real], fused(**batch).logits[real], rtol=1e-4, atol=1e-5)
        if model.can_generate():
            options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": batch["attention_mask"]}
            texts = [m.generate(batch["input_ids"], **options) for m in (model, fused)]
            assert torch.equal(*texts)
        switch_checkpointing(model.train(), False)
        with pytest.raises(ValueError, match="gradient checkpointing would lose the prefix"):
            model(**batch)


def test_a_prefix_is_never_lost_in_silence() -> None:
    model = prefixed(tiny_llama())
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention was set to 'sdpa'"):
        model(**token_batch())
    model = prefixed(tiny_llama())
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(RuntimeError, match=r"layers \[1\] did not attend"):
        model(**token_batch())


def test_too_long_for_learned_positions() -> None:
    with pytest.raises(ValueError, match="together are 66 tokens, and the backbone has 64 positions"):
        prefixed(tiny_gpt2(), length=10)(torch.ones(1, 56, dtype=torch.int64))


def test_models_that_cannot_have_a_prefix() -> None:
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    decoder = BertLMHeadModel(BertConfig(**sizes, is_decoder=True, add_cross_attention=True, intermediate_size=32))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4))
    for model, why in ((decoder, "cross-attention"), (t5, "encoder-decoder")):
        with unchanged(model), pytest.raises(TargetError, match=why):
            prefixed(model)
    model = tiny_llama()
    with unchanged(model), pytest.raises(ConfigError, match="num_layers=7: want 2"):
        prefixed(model, num_layers=7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules=2"),
        ({"init_weights": "ones"}, "init_weights='ones'"),
        ({"encoder_hidden_size": -1}, "encoder_hidden_size=-1"),
    ],
    ids=str,
)
def test_values_out_of_range(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pk.PrefixTuningConfig(**fields)
