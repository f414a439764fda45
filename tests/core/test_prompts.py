"""Prompts in front of the text: rows, masks, positions, labels and generation, whichever side is padded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import peftkern as pk
from peftkern.attachment import state
from peftkern.errors import ConfigError, TargetError
from peftkern.testing import tiny_bert, tiny_gpt2, tiny_llama, token_batch, unchanged

T = 4
CAUSAL = {"gpt2": tiny_gpt2, "llama": tiny_llama}


def prompted(model: nn.Module, name: str = "default", length: int = T, **fields) -> nn.Module:
    return pk.attach(model, pk.PromptTuningConfig(num_virtual_tokens=length, **fields), name)


def rows_of(model: nn.Module, name: str = "default") -> Tensor:
    (rows,) = state(model).parameters_of(model, name).values()
    return rows


def one_by_one(plain: nn.Module, prompt: Tensor, batch: dict[str, Tensor]) -> list[Tensor]:
    """Logits [T + real, V] of each row alone, without padding, prompt and text embedded by hand."""
    out = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        text = plain.get_input_embeddings()(ids[mask.bool()])
        out.append(plain(inputs_embeds=torch.cat([prompt, text])[None]).logits[0])
    return out


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_model_against_rows_by_hand(name: str, pad: str) -> None:
    plain, model = CAUSAL[name](), prompted(CAUSAL[name]())
    batch = token_batch(rows=4, length=7, pad=pad)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(0)
    out = model(**batch, position_ids=positions)
    assert out.logits.shape[1] == T + 7
    losses = []
    for row, want in enumerate(one_by_one(plain, rows_of(model), batch)):
        start = row if pad == "left" else 0
        torch.testing.assert_close(out.logits[row, start : start + len(want)], want, rtol=1e-4, atol=1e-5)
        labels = batch["labels"][row][batch["attention_mask"][row].bool()]
        # The last prompt row predicts the first token of the text: rows T-1 .. end against the whole text.
        losses.append(F.cross_entropy(want[T - 1 : -1], labels, reduction="none"))
    torch.testing.assert_close(out.loss, torch.cat(losses).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_encoder_against_rows_by_hand(pad: str) -> None:
    plain, model = tiny_bert(), prompted(tiny_bert())
    batch = token_batch(rows=4, length=7, labels=5, pad=pad)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(0)
    out = model(**batch, position_ids=positions, output_hidden_states=True)
    assert out.logits.shape[:2] == (4, 7), "the rows of the prompt are taken off"
    assert {h.shape[1] for h in out.hidden_states} == {7}
    kept = []
    for row, want in enumerate(one_by_one(plain, rows_of(model), batch)):
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(out.logits[row][real], want[T:], rtol=1e-4, atol=1e-5)
        kept.append(F.cross_entropy(want[T:], batch["labels"][row][real], reduction="none"))
    torch.testing.assert_close(out.loss, torch.cat(kept).mean(), rtol=1e-4, atol=1e-5)


def test_token_types_follow_their_tokens() -> None:
    plain, model = tiny_bert(), prompted(tiny_bert())
    ids, types = torch.tensor([[0, 5, 6, 7]]), torch.tensor([[1, 1, 1, 0]])
    mask = (ids > 0).long()
    embeds = torch.cat(
        [torch.zeros(1, 1, 32), rows_of(model)[None], plain.bert.embeddings.word_embeddings(ids[:, 1:])], 1
    )
    want = plain(
        inputs_embeds=embeds,
        attention_mask=torch.tensor([[0] + [1] * (T + 3)]),
        token_type_ids=torch.tensor([[1] + [0] * T + [1, 1, 0]]),
    ).logits[:, 1 + T :]
    torch.testing.assert_close(model(ids, mask, types).logits[:, 1:], want)


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_of_padded_rows_is_that_of_single_rows(name: str) -> None:
    """Greedy, left-padded as generation wants it, with the cache and without; against each row alone."""
    model = prompted(CAUSAL[name]())
    batch = token_batch(rows=4, length=7, pad="left")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for use_cache in (True, False):
        got = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=use_cache, **options)
        assert got.shape == (4, 7 + 8), "the ids of the prompt do not exist, and the text comes back in front"
        for row in range(4):
            alone = model.generate(batch["input_ids"][row : row + 1, row:], use_cache=use_cache, **options)
            assert torch.equal(got[row, 7:], alone[0, -8:]), (use_cache, row)


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_is_the_argmax_of_the_forward(name: str) -> None:
    """An oracle without generate: one token at a time, embedded by hand, on the plain model."""
    plain, model = CAUSAL[name](), prompted(CAUSAL[name]())
    ids = torch.tensor([[7, 8, 9]])
    text = ids
    for _ in range(6):
        embeds = torch.cat([rows_of(model)[None], plain.get_input_embeddings()(text)], 1)
        text = torch.cat([text, plain(inputs_embeds=embeds).logits[:, -1:].argmax(-1)], 1)
    got = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(got, text)
    assert not torch.equal(got, plain.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None))


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5},
        {"prefill_chunk_size": 3},
    ],
    ids=str,
)
def test_ways_to_generate(name: str, options: dict) -> None:
    model = prompted(CAUSAL[name]())
    batch = token_batch(rows=3, length=5, pad="left")
    kwargs = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None} | options
    inputs = {"attention_mask": batch["attention_mask"]}
    torch.manual_seed(0)
    got = model.generate(batch["input_ids"], **inputs, **kwargs)
    torch.manual_seed(0)
    plain_way = {k: v for k, v in kwargs.items() if k != "prefill_chunk_size"}
    want = model.generate(batch["input_ids"], **inputs, **(plain_way | {"use_cache": False}))
    assert torch.equal(got, want)


def test_ways_to_generate_that_cannot_be_right() -> None:
    model = prompted(tiny_llama())
    batch = token_batch(rows=3, length=5, pad="left")
    inputs = {"inputs": batch["input_ids"], "attention_mask": batch["attention_mask"], "max_new_tokens": 2}
    with pytest.raises(ValueError, match="a static cache makes such masks"):
        model.generate(**inputs, cache_implementation="static")
    with pytest.raises(ValueError, match="generate without prefill_chunk_size"):
        model.generate(**inputs, prefill_chunk_size=2)


def test_a_conversation_continues_on_its_cache() -> None:
    model = prompted(tiny_llama())
    ids = torch.tensor([[7, 8, 9]])
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(ids, max_new_tokens=3, **options)
    longer = torch.cat([first.sequences, torch.tensor([[11, 12]])], 1)
    got = model.generate(longer, past_key_values=first.past_key_values, max_new_tokens=4, **options).sequences
    assert torch.equal(got, model.generate(longer, max_new_tokens=4, **options).sequences)


@pytest.mark.parametrize("how", ["positional", "bool mask", "int32 mask", "embeds", "no mask"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_ways_to_call(name: str, how: str) -> None:
    model = prompted(tiny_bert() if name == "bert" else tiny_llama())
    batch = token_batch(rows=3, length=5, labels=5, pad="right" if how == "no mask" else "left")
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    if how == "no mask":
        want, got = model(ids, attention_mask=torch.ones_like(ids), labels=labels), model(ids, labels=labels)
    else:
        want = model(**batch)
        got = {
            "positional": lambda: model(ids, mask, labels=labels),
            "bool mask": lambda: model(ids, attention_mask=mask.bool(), labels=labels),
            "int32 mask": lambda: model(ids, attention_mask=mask.int(), labels=labels),
            "embeds": lambda: model(
                inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, labels=labels
            ),
        }[how]()
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.loss, want.loss)


def test_tuple_output() -> None:
    model = prompted(tiny_bert())
    batch = token_batch(labels=5)
    want = model(**batch)
    loss, logits = model(**batch, return_dict=False)
    assert torch.equal(loss, want.loss) and torch.equal(logits, want.logits)


def test_several_prompts_stand_in_the_order_of_activation() -> None:
    plain, model = tiny_llama(), prompted(prompted(tiny_llama(), "one", 2), "two", 3)
    ids = torch.tensor([[7, 8, 9]])
    for names in (["one", "two"], ["two", "one"], ["two"]):
        pk.set_adapter(model, names)
        front = torch.cat([rows_of(model, name) for name in names])
        want = plain(inputs_embeds=torch.cat([front[None], plain.get_input_embeddings()(ids)], 1)).logits
        torch.testing.assert_close(model(ids).logits, want)


def test_prompt_over_an_adapted_embedding() -> None:
    model = prompted(tiny_llama())
    pk.attach(model, pk.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False), "lora")
    pk.set_adapter(model, ["default", "lora"])
    ids = torch.tensor([[7, 8, 9]])
    embeds = torch.cat([rows_of(model)[None], model.model.embed_tokens(ids)], 1)
    want = pk.attach(tiny_llama(), pk.LoraConfig())(inputs_embeds=embeds).logits
    torch.testing.assert_close(model(ids).logits, want)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in (*state(model).parameters_of(model, "lora").values(),))


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_sequence_classification_takes_the_last_real_token(kind: str, pad: str) -> None:
    common = {"vocab_size": 61, "pad_token_id": 0, "num_labels": 3}
    torch.manual_seed(2)
    if kind == "gpt2":
        model = GPT2ForSequenceClassification(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common)
        ).eval()
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        model = LlamaForSequenceClassification(LlamaConfig(**sizes, **common)).eval()
    batch = token_batch(rows=3, length=6, pad=pad)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    prompted(model, task_type="SEQ_CLS")
    got = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits
    for row in range(3):
        torch.testing.assert_close(got[row : row + 1], model(ids[row : row + 1, mask[row].bool()]).logits)
    assert {name for name, p in model.named_parameters() if p.requires_grad} >= {"score.weight"}


def test_pooler_of_an_encoder_sees_the_first_row() -> None:
    """As in Hugging Face PEFT: the pooled row is the prompt's."""
    config = BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    torch.manual_seed(2)
    model = BertForSequenceClassification(config).eval()
    plain = BertForSequenceClassification(config).eval()
    plain.load_state_dict(model.state_dict())
    prompted(model, task_type="SEQ_CLS")
    ids = torch.tensor([[7, 8, 9]])
    embeds = torch.cat([rows_of_prompt(model)[None], plain.bert.embeddings.word_embeddings(ids)], 1)
    torch.testing.assert_close(model(ids).logits, plain(inputs_embeds=embeds).logits)


def rows_of_prompt(model: nn.Module) -> Tensor:
    return state(model).hooks.prompt()


def test_bare_backbone() -> None:
    torch.manual_seed(2)
    config = BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = prompted(BertModel(config).eval())
    out = model(torch.tensor([[7, 8, 9], [7, 8, 0]]), attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert out.last_hidden_state.shape == (2, 3, 32)


def test_rows_that_are_all_padding() -> None:
    model = prompted(tiny_llama())
    ids = torch.tensor([[7, 8], [0, 0]])
    out = model(ids, attention_mask=torch.tensor([[1, 1], [0, 0]]))
    assert out.logits.shape == (2, T + 2, 61) and out.logits[0].isfinite().all()


def test_text_of_length_zero() -> None:
    model = prompted(tiny_llama())
    assert model(torch.zeros(2, 0, dtype=torch.int64)).logits.shape == (2, T, 61)


def test_too_long_for_learned_positions() -> None:
    model = prompted(tiny_gpt2(), length=10)
    with pytest.raises(
        ValueError, match=r"together are 66 tokens, and the backbone has 64 positions: shorten the text by 2"
    ):
        model(torch.ones(1, 56, dtype=torch.int64))
    assert prompted(tiny_llama(), length=10)(torch.ones(1, 60, dtype=torch.int64)).logits.shape[1] == 70


def test_wrong_inputs_say_so() -> None:
    model = prompted(tiny_llama())
    with pytest.raises(ValueError, match="wants input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask \(1, 1, 3, 3\): a prompted model wants \[batch, length\]"):
        model(torch.ones(1, 3, dtype=torch.int64), attention_mask=torch.ones(1, 1, 3, 3))


def test_after_an_error_inside_the_backbone() -> None:
    """What one forward remembered does not reach the next."""
    model = prompted(tiny_bert())
    handle = model.bert.encoder.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(3, 9, dtype=torch.int64))
    handle.remove()
    pk.set_adapter(model, [])
    assert model(torch.ones(2, 9, dtype=torch.int64)).logits.shape == (2, 9, 5)


def test_models_that_cannot_be_prompted() -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    with unchanged(plain), pytest.raises(TargetError, match="Sequential has no token embedding"):
        prompted(plain)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4))
    with unchanged(t5), pytest.raises(TargetError, match="encoder-decoder"):
        prompted(t5)
    model = tiny_bert()
    with unchanged(model), pytest.raises((TargetError, ConfigError), match="32"):
        prompted(model, token_dim=64)


def test_initialisation_from_the_vocabulary() -> None:
    model = prompted(tiny_llama(), prompt_tuning_init="SAMPLE_VOCAB")
    table = model.model.embed_tokens.weight
    assert all((row == table).all(1).any() for row in rows_of(model))
    assert rows_of(model).data_ptr() != table.data_ptr()
    half = prompted(tiny_llama().bfloat16(), prompt_tuning_init="SAMPLE_VOCAB")
    assert rows_of(half).dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
        ({"prompt_tuning_init": "TXT"}, "did you mean 'TEXT'"),
        ({"prompt_tuning_init": "TEXT"}, "prompt_tuning_init_text"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules=2"),
    ],
    ids=str,
)
def test_values_out_of_range(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pk.PromptTuningConfig(**fields)


def test_gradients_against_rows_by_hand() -> None:
    plain, model = tiny_llama(), prompted(tiny_llama())
    batch = token_batch(rows=2, length=5, pad="left")
    rows = rows_of(model).detach().clone().requires_grad_(True)
    total = torch.zeros(())
    for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
        embeds = torch.cat([rows, plain.get_input_embeddings()(ids[mask.bool()])])[None]
        total = total + F.cross_entropy(
            plain(inputs_embeds=embeds).logits[0, T - 1 : -1], labels[mask.bool()], reduction="sum"
        )
    (want,) = torch.autograd.grad(total / int(batch["attention_mask"].sum()), rows)
    model(**batch).loss.backward()
    torch.testing.assert_close(rows_of(model).grad, want, rtol=1e-3, atol=1e-6)
