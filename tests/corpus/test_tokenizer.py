from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from raylm.corpus.tokenizer import (
    END,
    MASK,
    PAD,
    SENTINELS,
    UNKNOWN,
    save_tokenizer,
    special_tokens,
    text_encoder,
    train_tokenizer,
)
from raylm.errors import InputError
from raylm.models import load_tokenizer
from raylm.settings import TokenizerSettings

TEXTS = ["The tensor has 12 rows.", "Der Tensor hat 12 Zeilen.", "张量有 12 行。", "the rows of the tensors"] * 20
KINDS = pytest.mark.parametrize("kind", ["bpe", "unigram"])


def settings(**given: Any) -> TokenizerSettings:
    return TokenizerSettings.model_validate({"vocab_size": 600, **given})


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {kind: train_tokenizer(TEXTS, settings(kind=kind), ["de", "zh"]) for kind in ("bpe", "unigram")}


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """The parts of a text that tokens never cross."""
    return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@KINDS
@given(text=st.text())
def test_any_text_comes_back_as_it_was(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    encoder = text_encoder(tokenizers[kind])
    ids = encoder.encode(text, add_special_tokens=False).ids
    assert encoder.decode(ids, skip_special_tokens=False) == text
    assert encoder.token_to_id(UNKNOWN) not in ids


@KINDS
def test_real_text_comes_back_as_it_was(data: Path, kind: str) -> None:
    texts = []
    for name in ("text.en.tech", "text.zh.mixed"):
        texts += pq.read_table(data / f"{name}.validation.parquet")["text"].to_pylist()
    tokenizer = train_tokenizer([text[:2_000] for text in texts], settings(kind=kind, vocab_size=2_000), ["de"])
    assert tokenizer.get_vocab_size() == 2_000
    encoder = text_encoder(tokenizer)
    encoded = encoder.encode_batch(texts)
    assert [encoder.decode(row.ids, skip_special_tokens=False) for row in encoded] == texts
    size = sum(len(text.encode()) for text in texts)
    assert sum(len(row.ids) for row in encoded) < size / 2.2
    # Whole Chinese words are tokens, though no space sets them apart.
    assert [encoder.decode([id]) for id in encoder.encode("我们使用系统").ids] == ["我们", "使用", "系统"]


@KINDS
def test_special_tokens_inside_a_text_are_plain_text(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    text = "a </s> b >>de<< <pad>"
    tokenizer = tokenizers[kind]
    special = {tokenizer.token_to_id(token) for token in ("</s>", ">>de<<", PAD)}
    assert not special & set(text_encoder(tokenizer).encode(text).ids)
    assert special <= set(tokenizer.encode(text).ids)


@KINDS
def test_a_special_token_that_is_a_word_is_no_token_of_texts(kind: str) -> None:
    tokenizer = train_tokenizer(TEXTS, settings(kind=kind, special_tokens=("rows",)), ["de"])
    rows = tokenizer.token_to_id("rows")
    assert tokenizer.encode("rows").ids == [rows]
    plain = text_encoder(tokenizer)
    assert rows not in plain.encode("rows").ids
    assert plain.decode(plain.encode("rows").ids) == "rows"


@KINDS
def test_digits_stand_alone_or_in_groups_of_three(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    assert text_encoder(tokenizers[kind]).encode("12345").tokens == list("12345")
    grouped = train_tokenizer(["123 456 1234567 "] * 50, settings(kind=kind, single_digits=False), ["de"])
    assert pieces(grouped, "1234567") == ["123", "456", "7"]


def test_words_are_cut_where_scripts_and_punctuation_begin(tokenizers: dict[str, Tokenizer]) -> None:
    cut = {
        "我们使用Python（版本3）编程，非常方便。": [
            *("我们使用", "Python", "（", "版本", "3", "）", "编程", "，", "非常方便", "。"),
        ],
        "ひらがなとカタカナー、漢字": ["ひらがなとカタカナー", "、", "漢字"],
        "don't stop (now)  x": ["don", "'t", " stop", " (", "now", ")", " ", " x"],
        "हिन्दी में": ["हिन्दी", " में"],
        "a=b\n\n  c": ["a", "=b", "\n\n", " ", " c"],
    }
    assert {text: pieces(tokenizers["bpe"], text) for text in cut} == cut


@KINDS
def test_the_vocabulary_is_what_models_expect(tokenizers: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers[kind]
    save_tokenizer(tokenizer, tmp_path, max_length=128)
    loaded = load_tokenizer(str(tmp_path))
    assert len(loaded) <= 600
    assert loaded.pad_token_id == len(loaded) - 1
    first = special_tokens(["zh", "de"])
    assert loaded.convert_tokens_to_ids(first) == list(range(len(first)))
    assert {">>de<<", ">>zh<<", ">>summary<<", SENTINELS[0]} <= set(first)
    assert loaded.model_max_length == 128
    assert loaded(">>de<<The rows")["input_ids"] == tokenizer.encode(">>de<<The rows").ids
    assert loaded.decode(loaded("张量 has 12 rows.")["input_ids"]) == "张量 has 12 rows."


@KINDS
def test_further_special_tokens_follow_the_tasks(kind: str) -> None:
    tokenizer = train_tokenizer(TEXTS, settings(kind=kind, special_tokens=("<|user|>", END, PAD, "[X]")), ["de"])
    order = [MASK, ">>summary<<", ">>answer<<", ">>de<<", "<|user|>", "[X]", SENTINELS[0]]
    assert [tokenizer.token_to_id(token) for token in order] == list(range(3, 10))
    assert tokenizer.token_to_id(PAD) == tokenizer.get_vocab_size() - 1
    assert tokenizer.encode("a[X]b").tokens == ["a", "[X]", "b"]


def test_a_vocabulary_without_room_for_bytes_is_an_error() -> None:
    tokens = tuple(f"<t{n}>" for n in range(300))
    with pytest.raises(
        InputError, match="vocab_size: 600 ids are too few for 256 bytes and 372 special.*628 is the least"
    ):
        train_tokenizer(TEXTS, settings(special_tokens=tokens), ["de"])


def test_no_text_is_an_error_where_nothing_can_be_learned() -> None:
    with pytest.raises(InputError, match="no text to learn from"):
        train_tokenizer([], settings(kind="unigram"), ["de"])


TRAIN = """
import sys
from raylm.corpus.docstrings import python_files
from raylm.corpus.tokenizer import train_tokenizer
from raylm.settings import TokenizerSettings
texts = [path.read_text() for _, path in python_files("email")] + ["张量有行。我们使用系统，非常方便！"] * 9
settings = TokenizerSettings(kind=sys.argv[1], vocab_size=1_500)
sys.stdout.write(train_tokenizer(texts, settings, sys.argv[2:]).to_str())
"""


@KINDS
def test_training_is_deterministic_in_any_process(kind: str) -> None:
    def trained(threads: str, *languages: str) -> bytes:
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", TRAIN, kind, *languages]
        return subprocess.run(command, env=environment, check=True, capture_output=True).stdout

    first = trained("1", "de", "zh")
    assert len(first) > 20_000
    assert trained("2", "zh", "de") == first
    assert trained("3", "de", "zh", "de") == first
