"""Tiny random backbones with real fast tokenizers, saved as transformers saves them, and small data folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from peftkern.tasks.synth import generate

# No deadline: the machine may be busy with other things.
settings.register_profile("tasks", deadline=None, max_examples=40)
settings.load_profile("tasks")

WORDS = "the a good bad great poor film food music play book table weather rain is was in of to and intent it so 好 坏"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'&-#()"


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    # The libraries read their environment when they are imported, which has been.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def wordpiece() -> PreTrainedTokenizerFast:
    words = [*WORDS.split(), *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokens = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=40))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _bert_config(tokenizer: PreTrainedTokenizerFast) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
    )


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory, wordpiece) -> str:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(_bert_config(wordpiece)).save_pretrained(folder)
    wordpiece.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_mlm(tmp_path_factory, wordpiece) -> str:
    folder = tmp_path_factory.mktemp("mlm")
    torch.manual_seed(0)
    BertForMaskedLM(_bert_config(wordpiece)).save_pretrained(folder)
    wordpiece.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("gpt2")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<|endoftext|>", "go", "ba", "Ġgo", "Ġba"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("g", "o"), ("b", "a"), ("Ġ", "go"), ("Ġ", "ba")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    end = fast.eos_token_id
    config = GPT2Config(
        vocab_size=len(fast), n_embd=16, n_layer=2, n_head=2, n_positions=96, eos_token_id=end, bos_token_id=end
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def ner_data(tmp_path_factory) -> str:
    return str(generate(tmp_path_factory.mktemp("ner"), seed=1, sizes={"train": 40, "dev": 12, "test": 12}))


@pytest.fixture(scope="session")
def text_data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for split, count in {"train": 48, "dev": 12, "test": 12}.items():
        rows = []
        for number in range(count):
            label, word = (("pos", "good"), ("neg", "bad"))[number % 2]
            rows.append(f"{label}\tthe film {number // 2} was {word}\n")
        (folder / f"{split}.tsv").write_text("".join(rows), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="session")
def real_data() -> Path:
    root = Path(os.environ.get("PEFTKERN_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real data: set PEFTKERN_DATA ({root} does not exist)")
    return root


@pytest.fixture
def write(tmp_path):
    """Write a file below the test's folder and return its path."""

    def _write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return _write
