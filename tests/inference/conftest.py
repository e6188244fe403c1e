"""A small model with learned weights, as `raylm` finishes one: it copies its input."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.conftest import DATA

WORDS = (  # noqa: SIM905 - as a list it would take a page
    "the a file window page table cell color document menu option dialog text line field name value list key "
    "open close select insert delete change show hide print save copy move sort filter format number date style "
    "new old first last empty current default selected existing large small simple other next each every in on "
    "for with from to by and or if when you can must will is are has not only also then here there"
).split()
STEPS = 260
BATCH_TOKENS = 800
WINDOW = 10
SUMMARY_TOKENS = 3


def english_sentences(rows: int) -> list[str]:
    """Real documentation sentences, or made-up ones where the real text is absent."""
    file = DATA / "translate.en-de.docs.train.parquet"
    if file.is_file():
        return [text for text in pq.read_table(file, columns=["src"])["src"].to_pylist() if text][:rows]
    chooser = random.Random(7)
    return [" ".join(chooser.choices(WORDS, k=chooser.randint(3, 18))).capitalize() + "." for _ in range(rows)]


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    return english_sentences(4_000)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    """A finished Marian in the layout that export writes."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    build_model_directory(directory, sentences)
    return directory


def build_model_directory(directory: Path, sentences: list[str]) -> None:
    """Train a small Marian to copy the first words of a text, for some seconds, and write it out."""
    import torch

    from raylm.corpus.tokenizer import save_tokenizer, text_encoder, train_tokenizer
    from raylm.models import build_config, build_model, load_tokenizer
    from raylm.settings import ModelSettings, TokenizerSettings

    tokenizer = train_tokenizer(sentences, TokenizerSettings(vocab_size=1_000), ["de", "fr"])
    directory.mkdir(parents=True)
    save_tokenizer(tokenizer, directory, max_length=64)
    small = {
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "init_std": 0.125,  # learns to copy within some hundred steps
    }
    config = build_config(ModelSettings(config=small), load_tokenizer(str(directory)))
    model = build_model(config, seed=1)
    train_to_copy(model, text_encoder(tokenizer), sentences)
    model.generation_config.update(
        bad_words_ids=[[config.pad_token_id]],
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.pad_token_id,
        pad_token_id=config.pad_token_id,
        num_beams=1,
        do_sample=False,
        max_length=None,
    )
    model.save_pretrained(directory)
    (directory / "raylm.json").write_text(
        json.dumps(
            {
                "tasks": ["translate", "summarize"],
                "languages": ["de"],
                "source_language": "en",
                "max_source_tokens": 64,
                "max_target_tokens": 48,
            }
        )
    )
    assert torch.all(model.model.shared.weight[config.pad_token_id] == 0)


def train_to_copy(model: Any, encoder: Any, sentences: list[str]) -> None:
    """A bare loop over short windows of text: `>>de<<` copies one, `>>summary<<` its first tokens.

    The column of the padding is cut off the logits, so that its embedding stays zero.
    """
    import torch

    torch.set_num_threads(1)
    ids = {token: encoder.token_to_id(token) for token in (">>de<<", ">>summary<<", "</s>", "<pad>")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98), weight_decay=0.0)
    chooser = random.Random(1)
    encoded = [encoding.ids for encoding in encoder.encode_batch(sentences)]
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min((step + 1) / 20, 1 - 0.9 * step / STEPS)
        sources, targets, held = [], [], 0
        while held < BATCH_TOKENS:
            whole = chooser.choice(encoded)
            start = chooser.randrange(len(whole))
            text = whole[start : start + chooser.randint(1, WINDOW)]
            task = chooser.choice((">>de<<", ">>summary<<"))
            sources.append([ids[task], *text, ids["</s>"]])
            targets.append([*(text if task == ">>de<<" else text[:SUMMARY_TOKENS]), ids["</s>"]])
            held += len(text) + 2
        input_ids, labels = padded(sources, ids["<pad>"]), padded(targets, ids["<pad>"])  # (B, S), (B, T)
        start = torch.full((len(targets), 1), ids["<pad>"])
        logits = model(
            input_ids=input_ids,
            attention_mask=input_ids != ids["<pad>"],
            decoder_input_ids=torch.cat([start, labels[:, :-1]], dim=1),
        ).logits[..., :-1]  # (B, T, V-1)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ids["<pad>"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def padded(rows: list[list[int]], pad: int) -> Any:
    import torch

    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


@pytest.fixture(scope="session")
def home_of_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache directory of the session's own."""
    patch = pytest.MonkeyPatch()
    cache = tmp_path_factory.mktemp("cache")
    patch.setenv("XDG_CACHE_HOME", str(cache))
    yield cache
    patch.undo()


def wait_for_a_part(output: Path) -> None:
    """Until a batch job has published the first chunk of an output; five minutes at most."""
    deadline = time.monotonic() + 300
    while not list((output.parent / f"{output.name}.raylm" / "parts").glob("*/part-*.arrow")):
        if time.monotonic() > deadline:
            return
        time.sleep(0.005)
