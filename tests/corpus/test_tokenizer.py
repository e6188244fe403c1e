from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from raylm.corpus.tokenizer import PAD, SENTINELS, save_tokenizer, text_encoder, train_tokenizer
from raylm.models import load_tokenizer

TEXTS = ["The tensor has 12 rows.", "Der Tensor hat 12 Zeilen.", "张量有 12 行。", "the rows of the tensors"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=600, languages=["de", "zh"])


@given(st.text())
def test_any_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    encoder = text_encoder(tokenizer)
    ids = encoder.encode(text, add_special_tokens=False).ids
    assert encoder.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_inside_a_text_are_plain_text(tokenizer: Tokenizer) -> None:
    text = "a </s> b >>de<< <pad>"
    special = {tokenizer.token_to_id(token) for token in ("</s>", ">>de<<", PAD)}
    assert not special & set(text_encoder(tokenizer).encode(text).ids)
    assert special <= set(tokenizer.encode(text).ids)


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert text_encoder(tokenizer).encode("12345").tokens == list("12345")


def test_the_vocabulary_is_what_models_expect(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path, max_length=128)
    loaded = load_tokenizer(str(tmp_path))
    assert len(loaded) <= 600
    assert loaded.pad_token_id == len(loaded) - 1
    assert {">>de<<", ">>zh<<", ">>summary<<", SENTINELS[0]} <= set(loaded.get_vocab())
    assert loaded.model_max_length == 128
    assert loaded(">>de<<The rows")["input_ids"] == tokenizer.encode(">>de<<The rows").ids


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(TEXTS, 600, ["zh", "de"]).to_str() == tokenizer.to_str()
