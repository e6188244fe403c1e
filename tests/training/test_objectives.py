from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.errors import SettingsError
from raylm.training.objectives import (
    IGNORE,
    Vocabulary,
    corrupt_spans,
    document_mask,
    infill_spans,
    objective_for,
    seq2seq_batch,
    span_mask,
)

VOCABULARY = Vocabulary(
    size=100, pad=99, end=2, mask=3, decoder_start=99, sentinels=tuple(range(4, 20)), first_plain=20
)


@given(st.integers(2, 300), st.floats(0.05, 0.6), st.floats(1, 6), st.integers(0, 2**31))
def test_span_masks_hide_the_wanted_share_in_separate_spans(
    length: int, density: float, mean: float, seed: int
) -> None:
    mask = span_mask(length, density, mean, np.random.default_rng(seed))
    assert len(mask) == length
    assert mask.sum() == min(max(round(length * density), 1), length - 1)
    assert not mask[0]


@given(st.lists(st.integers(20, 98), min_size=2, max_size=120), st.integers(0, 2**31))
def test_corrupted_text_and_its_target_give_the_text_back(tokens: list[int], seed: int) -> None:
    row = np.asarray(tokens)
    source, target = corrupt_spans(
        row, span_mask(len(row), 0.3, 2, np.random.default_rng(seed)), VOCABULARY.sentinels, VOCABULARY.end
    )
    assert source[-1] == target[-1] == VOCABULARY.end
    spans: dict[int, list[int]] = {}
    for token in target[:-1].tolist():
        if token in VOCABULARY.sentinels:
            spans[token] = current = []
        else:
            current.append(token)
    restored = [x for token in source[:-1].tolist() for x in spans.get(token, [token])]
    assert restored == tokens
    assert list(spans) == list(VOCABULARY.sentinels[: len(spans)])


def test_corruption_is_what_the_docstring_says() -> None:
    noise = np.asarray([False, False, True, True, False])
    source, target = corrupt_spans(np.asarray([50, 51, 52, 53, 54]), noise, (4, 5), 2)
    assert source.tolist() == [50, 51, 4, 54, 2]
    assert target.tolist() == [4, 52, 53, 2]


def test_infilling_is_what_the_docstring_says() -> None:
    noise = np.asarray([False, False, True, True, False])
    source, target = infill_spans(np.asarray([50, 51, 52, 53, 54]), noise, mask=3, end=2)
    assert source.tolist() == [50, 51, 3, 54, 2]
    assert target.tolist() == [50, 51, 52, 53, 54, 2]


def test_the_decoder_reads_labels_shifted_right() -> None:
    batch = seq2seq_batch([np.asarray([30, 2])], [np.asarray([40, 41, 2])], VOCABULARY)
    assert batch.labels[0, :3].tolist() == [40, 41, 2]
    assert set(batch.labels[0, 3:]) == {IGNORE}
    assert batch.inputs["decoder_input_ids"][0, :3].tolist() == [99, 40, 41]
    assert batch.inputs["attention_mask"].sum() == 2
    assert batch.target_tokens == 3
    assert batch.unlabelled().target_tokens == 0


def test_documents_of_one_sequence_do_not_see_each_other() -> None:
    mask, positions = document_mask([np.asarray([2, 3])], width=6, causal=True)
    assert mask.shape == (1, 1, 6, 6)
    assert mask[0, 0, :5, :5].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert positions[0].tolist() == [0, 1, 0, 1, 2, 0]
    assert not mask[0, 0, 5, :5].any()
    assert mask[0, 0, 5, 5]


def test_an_objective_has_to_fit_the_model() -> None:
    assert objective_for("auto", "decoder") == "causal"
    assert objective_for("seq2seq", "encoder-decoder") == "seq2seq"
    with pytest.raises(SettingsError, match="objective 'masked' does not fit a decoder; use 'causal'"):
        objective_for("masked", "decoder")


@pytest.mark.parametrize(("family", "objective"), [("llama", "causal"), ("bert", "masked")])
def test_editing_one_document_leaves_the_logits_of_its_neighbour(family: str, objective: str, corpus) -> None:  # type: ignore[no-untyped-def]
    import torch

    from raylm import models
    from raylm.settings import ModelSettings

    tokenizer = models.load_tokenizer(str(corpus / "tokenizer"))
    small = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    config = models.build_config(ModelSettings(family=family, config=small), tokenizer)
    model = models.build_model(config, seed=1).eval()
    mask, positions = document_mask([np.asarray([5, 7])], width=12, causal=objective == "causal")
    ids = np.arange(200, 212)[None]
    edited = ids.copy()
    edited[0, 2] = 300

    def logits(tokens: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return model(
                input_ids=torch.from_numpy(tokens),
                attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(positions),
            ).logits

    before, after = logits(ids), logits(edited)
    assert torch.equal(before[0, 5:], after[0, 5:])
    assert not torch.equal(before[0, 2:5], after[0, 2:5])
