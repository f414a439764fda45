"""L = L_prompt + λ L_finetune, against the two losses computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import peftkern as pk
from peftkern.errors import ConfigError
from peftkern.tasks.objective import FINETUNE_HEAD, PromptObjective
from peftkern.tasks.records import Text
from peftkern.tasks.settings import TrainSettings
from peftkern.tasks.task import TextTask

TEXTS = [Text("the film was good", "pos"), Text("bad", "neg"), Text("so so", "neg")]


def _task(model, text_data, **changes):
    task = TextTask(TrainSettings(data=text_data, model=model, task="text-classification", max_length=40, **changes))
    task.labels = ["neg", "pos"]
    task.prepare()
    network, new = task.build()
    return task, network.eval(), new


def _batch(task, texts=TEXTS):
    return task.collator(task.encode(texts).rows)


def test_classifier_on_both_inputs(tiny_bert, text_data):
    task, model, new = _task(tiny_bert, text_data, template="the weather : {text}", lambda_=0.3)
    assert new == ["classifier"]
    batch = _batch(task)
    loss, scores = task.objective(model, batch)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)

    def logits(texts):
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.double()

    prompted = logits([f"the weather : {text.text}" for text in TEXTS])
    plain = logits([text.text for text in TEXTS])
    labels = torch.tensor([1, 0, 0])
    expected = cross_entropy(prompted, labels) + 0.3 * cross_entropy(plain, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores.double(), prompted, rtol=1e-5, atol=1e-6)
    # Without training there is only L_prompt; over accumulated batches sums are divided by the count of all of them.
    assert task.objective(model, batch, train=False)[0].item() == pytest.approx(cross_entropy(prompted, labels).item())
    assert task.objective(model, batch, count=6)[0].item() == pytest.approx(expected.item() / 2, rel=1e-5)


def test_no_plain_forward_when_lambda_is_zero(tiny_bert, text_data):
    task, model, _ = _task(tiny_bert, text_data, template="the weather : {text}")
    batch = _batch(task)
    assert set(batch) == {"input_ids", "attention_mask", "labels"} | (set(batch) & {"token_type_ids"})
    assert task.objective(model, batch)[0].item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_masked_lm_reads_words_at_the_mask_and_a_head_reads_the_plain_text(tiny_mlm, text_data):
    words = {"pos": ("good", "great"), "neg": ("bad",)}
    task, model, new = _task(tiny_mlm, text_data, template="{text} is {mask} .", verbalizer=words, lambda_=0.5)
    assert new == [FINETUNE_HEAD]
    loss, _ = task.objective(model, _batch(task))
    tokenizer = AutoTokenizer.from_pretrained(tiny_mlm)
    good, great, bad = tokenizer.convert_tokens_to_ids(["good", "great", "bad"])
    total = 0.0
    for text, label in zip(TEXTS, [1, 0, 0], strict=True):
        ids = tokenizer(f"{text.text} is [MASK] .", return_tensors="pt")
        place = ids["input_ids"][0].tolist().index(tokenizer.mask_token_id)
        log_p = model(**ids).logits[0, place].log_softmax(-1)
        scores = torch.stack([log_p[bad], (log_p[good] + log_p[great]) / 2])
        hidden = model.bert(**tokenizer(text.text, return_tensors="pt")).last_hidden_state[0, 0]
        plain = model.finetune_head(hidden)
        total += cross_entropy(scores, torch.tensor(label)) + 0.5 * cross_entropy(plain, torch.tensor(label))
    assert loss.item() == pytest.approx(total.item() / 3, rel=1e-4)


@pytest.mark.parametrize("virtual_tokens", [0, 3])
def test_causal_lm_reads_the_next_word(tiny_gpt2, text_data, virtual_tokens):
    words = {"pos": ("go",), "neg": ("ba",)}
    task, model, _ = _task(tiny_gpt2, text_data, template="{text} is {mask}", verbalizer=words, lambda_=0.5)
    if virtual_tokens:
        pk.attach(model, pk.PromptTuningConfig(num_virtual_tokens=virtual_tokens, modules_to_save=[FINETUNE_HEAD]))
        model.eval()
    loss, scores = task.objective(model, _batch(task))
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    total = 0.0
    for number, (text, label) in enumerate(zip(TEXTS, [1, 0, 0], strict=True)):
        log_p = model(**tokenizer(f"{text.text} is", return_tensors="pt")).logits[0, -1].log_softmax(-1)
        by_word = log_p[tokenizer.convert_tokens_to_ids(["Ġba", "Ġgo"])]
        torch.testing.assert_close(scores[number], by_word, rtol=1e-4, atol=1e-4)
        ids = tokenizer(text.text, return_tensors="pt")
        if virtual_tokens:
            with pk.disabled(model):
                hidden = model.transformer(**ids).last_hidden_state[0, -1]
        else:
            hidden = model.transformer(**ids).last_hidden_state[0, -1]
        plain = model.finetune_head(hidden)
        total += cross_entropy(by_word, torch.tensor(label)) + 0.5 * cross_entropy(plain, torch.tensor(label))
    assert loss.item() == pytest.approx(total.item() / 3, rel=1e-4)


def test_soft_prompt_stands_in_front_of_the_prompted_input_only(tiny_bert, text_data):
    options = {"num_virtual_tokens": 4}
    task, model, _ = _task(tiny_bert, text_data, method="prompt_tuning", options=options, lambda_=1.0)
    plain_model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2).eval()
    plain_model.classifier.load_state_dict(model.classifier.state_dict())
    pk.attach(model, pk.PromptTuningConfig(**options, modules_to_save=["classifier"]))
    model.eval()
    batch = _batch(task)
    main = {name: value for name, value in batch.items() if not name.startswith("plain_")}
    loss, _ = task.objective(model, batch)
    expected = model(**main).loss + plain_model(**main).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert pk.active_adapters(model) == ["default"]
    loss.backward()
    grads = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("prompts" in name for name in grads) and "classifier.weight" in grads and len(grads) == 3


def test_objective_is_used_without_verbalizer_for_a_model_that_only_classifies(tiny_bert, text_data):
    task, model, _ = _task(tiny_bert, text_data, template="{text} the intent is {mask} .")
    assert isinstance(task.objective, PromptObjective) and task.objective.verbalizer is None
    assert task.tokenizer.mask_token_id in _batch(task)["input_ids"]
    assert task.objective(model, _batch(task))[1].shape == (3, 2)


GOOD_BAD = {"pos": "good", "neg": "bad"}


@pytest.mark.parametrize(
    ("fixture", "changes", "message"),
    [
        ("tiny_bert", {"template": "{text} is {mask}", "verbalizer": GOOD_BAD}, "has no masked- or causal-LM head"),
        ("tiny_mlm", {"template": "{text} is", "verbalizer": GOOD_BAD}, r"a masked-LM head needs \{mask\}"),
        ("tiny_mlm", {"template": "{text} {mask}", "verbalizer": {"pos": "good", "bad": "x"}}, "'bad' is no label"),
        ("tiny_gpt2", {"template": "{text} {mask} .", "verbalizer": {"pos": "go", "neg": "ba"}}, "must end on {mask}"),
        ("tiny_gpt2", {"template": "{text} is {mask}"}, "has no mask token"),
        ("tiny_bert", {"template": "the film was so good it is {text}", "max_length": 8}, "no room"),
        ("tiny_bert", {"max_length": 65}, "65 sub-words do not fit the 64 positions"),
        (
            "tiny_bert",
            {"method": "prompt_tuning", "options": {"num_virtual_tokens": 30}},
            "40 sub-words and 30 virtual",
        ),
    ],
)
def test_what_does_not_fit_together_is_told_before_a_model_is_loaded(request, text_data, fixture, changes, message):
    values = {"max_length": 40} | changes
    model = request.getfixturevalue(fixture)
    task = TextTask(TrainSettings(data=text_data, model=model, task="text-classification", **values))
    task.labels = ["neg", "pos"]
    with pytest.raises(ConfigError, match=message):
        task.prepare()
