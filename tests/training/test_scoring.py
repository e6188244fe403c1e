"""What validation says besides a loss: scores of answers, and bits for each byte of text."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from raylm import metrics, models
from raylm.plots import run_charts
from raylm.settings import Settings
from raylm.storage import StoragePath
from raylm.tasks import TASKS
from raylm.training.batches import Shards, TokenLists
from raylm.training.generation import answers, read_held_out
from raylm.training.runs import run_directory
from raylm.training.telemetry import read_metrics
from raylm.training.trained import load_trained
from raylm.training.trainer import finetune, pretrain
from tests.training.runs import changed


@pytest.mark.parametrize("stage", [1, 3])
def test_answers_are_scored_while_training(small_settings: Settings, corpus: StoragePath, stage: int) -> None:
    """By two workers, as the model of the same step scores afterwards."""
    name = f"scored-{stage}"
    tuning = {"name": name, "start": "scratch", "scored_rows": 9, "zero_stage": stage, "workers": 2}
    steps = {"steps": 40, "validate_every": 40, "checkpoint_every": 40}
    settings = changed(small_settings, finetune=tuning | steps)
    finetune(settings)
    run = run_directory(settings, name)
    [said] = [row for row in read_metrics(run) if "validation_loss" in row]
    model, _ = load_trained(run)
    tokenizer = models.load_tokenizer(str(corpus / "tokenizer"))
    held_out = read_held_out(corpus, "validation", 9, labelled=False)
    assert [found.name for found in held_out] == ["translate-de", "summarize"]
    for found in held_out:
        texts = answers(model, tokenizer, found.source_ids, settings.finetune)
        score = TASKS[found.task].metrics[0]
        expected = metrics.score((score,), texts, found.targets, found.to)[score]
        key = {"translate-de": "score_chrf_translate_de", "summarize": "score_rougel_summarize"}[found.name]
        assert said[key] == pytest.approx(expected, abs=0.01)
    assert said["score_chrf_translate_de"] > 0


def test_bits_per_byte_are_those_of_the_text(small_settings: Settings, corpus: StoragePath) -> None:
    shards = Shards(corpus / "documents" / "validation")
    model = {"family": "llama", "config": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}}
    # As many batches as there are sequences read each of these equally often.
    values = {"name": "bits", "workers": 2, "steps": 4, "validation_batches": len(shards)}
    settings = changed(small_settings, model=model, pretrain=values)
    pretrain(settings)
    [said] = [row for row in read_metrics(run_directory(settings, "bits")) if "validation_loss" in row]
    tokenizer = models.load_tokenizer(str(corpus / "tokenizer"))
    ids, lengths = TokenLists(shards, "input_ids"), TokenLists(shards, "document_lengths")
    tokens = size = 0
    for row in range(len(shards)):
        for start, length in zip(np.cumsum(lengths[row]) - lengths[row], lengths[row], strict=True):
            predicted = ids[row][start + 1 : start + length]  # all but a document's first token
            tokens += len(predicted)
            texts = tokenizer.convert_ids_to_tokens(predicted[predicted != tokenizer.eos_token_id].tolist())
            size += sum(map(len, texts))  # of a byte-level tokenizer, a character for each byte
    expected = said["validation_loss"] / math.log(2) * tokens / size
    assert said["validation_bits_per_byte"] == pytest.approx(expected, rel=1e-4)


def test_every_token_has_its_bytes(corpus: StoragePath, tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(str(corpus / "tokenizer"))
    sizes = models.token_bytes(tokenizer)
    text = "Grüße, 世界!\n\tdef f(x): return x"
    assert sizes[tokenizer(text, add_special_tokens=False)["input_ids"]].sum() == len(text.encode())
    assert sizes[[tokenizer.pad_token_id, tokenizer.eos_token_id]].tolist() == [0, 0]

    pieces = {"<unk>": 0, "▁Hello": 1, "<0x0A>": 2, "世": 3, "▁": 4}
    backend = Tokenizer(tokenizer_models.WordLevel(pieces, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    metaspace = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert models.token_bytes(metaspace).tolist() == [0, 6, 1, 3, 1, 0]


def test_scores_and_bits_have_curves_in_the_report() -> None:
    rows = [
        {"step": 10, "validation_loss": 2.0, "score_chrf_translate_de": 20.0, "validation_bits_per_byte": 3.0},
        {"step": 20, "validation_loss": 1.0, "score_chrf_translate_de": 40.0, "validation_bits_per_byte": 2.5},
    ]
    shown = [what for what, _ in run_charts("run", rows)]
    assert "chrf of validation rows: translate de over steps, from 20 to 40" in shown
    assert "bits per byte of validation text over steps, from 3 to 2.5" in shown
