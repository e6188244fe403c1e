from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.errors import ArtifactError, SettingsError
from raylm.storage import StoragePath
from raylm.training.batches import GlobalBatch, Shards, TokenLists
from raylm.training.examples import vocabulary_of
from raylm.training.labels import check_labels, label_counts, label_names, label_numbers
from raylm.training.noise import corrupt_spans, infill_spans, span_mask
from raylm.training.objectives import (
    IGNORE,
    LabelledTexts,
    MicroBatch,
    SelfSupervision,
    Vocabulary,
    cut,
    document_mask,
    document_places,
    objective_for,
    pair_weights,
    prefix_batch,
    seq2seq_batch,
)
from raylm.training.steps import token_loss

VOCABULARY = Vocabulary(
    size=100, pad=99, end=2, mask=3, decoder_start=99, sentinels=tuple(range(4, 20)), first_plain=20, plain_stop=99
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
    sources, targets = [np.asarray([30, 2]), np.asarray([31, 32, 2])], [np.asarray([40, 41, 2]), np.asarray([42, 2])]
    batch = seq2seq_batch(sources, targets, VOCABULARY)
    assert batch.labels.tolist() == [[40, 41, 2], [42, 2, IGNORE]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[99, 40, 41], [99, 42, 2]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.target_tokens == 5
    assert batch.unlabelled().target_tokens == 0


def test_documents_of_one_sequence_do_not_see_each_other() -> None:
    documents, positions = document_places([np.asarray([2, 3])], width=6)
    mask = document_mask(documents, causal=True)
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


@pytest.mark.parametrize(("pad", "stop"), [(99, 99), (0, 100)])
def test_hidden_tokens_are_the_mask_a_plain_token_or_as_before(pad: int, stop: int) -> None:
    """With the padding as the last id, and as the first, where BERT has it."""
    vocabulary = replace(VOCABULARY, pad=pad, plain_stop=stop)
    rows = [np.random.default_rng(n).integers(20, stop, 64) for n in range(200)]
    masked = SelfSupervision("masked", vocabulary, 0.15, 3.0)
    batch = masked.micro_batch(rows, [np.asarray([64])] * 200, [(7, n) for n in range(200)])
    hidden, inputs = batch.labels != IGNORE, batch.inputs["input_ids"]
    assert (np.stack(rows) == np.where(hidden, batch.labels, inputs)).all()
    assert hidden.mean() == pytest.approx(0.15, abs=0.01)
    assert (inputs[hidden] == vocabulary.mask).mean() == pytest.approx(0.8, abs=0.03)
    replaced = inputs[hidden & (inputs != vocabulary.mask) & (inputs != batch.labels)]
    assert replaced.min() >= 20
    assert replaced.max() == stop - 1


def test_an_objective_has_to_fit_the_model() -> None:
    assert objective_for("auto", "decoder") == "causal"
    with pytest.raises(SettingsError, match="objective 'masked' does not fit a decoder; use 'causal'"):
        objective_for("masked", "decoder")


def test_finetuning_has_objectives_of_its_own() -> None:
    assert objective_for("auto", "encoder-decoder", "finetune") == "seq2seq"
    assert objective_for("auto", "decoder", "finetune") == "seq2seq"
    assert objective_for("classify", "decoder", "finetune") == "classify"
    assert objective_for("auto", "encoder", "finetune") == "classify"
    with pytest.raises(SettingsError, match="objective 'classify' does not fit an encoder-decoder; use 'seq2seq'"):
        objective_for("classify", "encoder-decoder", "finetune")
    with pytest.raises(SettingsError, match="use 'seq2seq' or 'classify'"):
        objective_for("causal", "decoder", "finetune")


# -------------------------------------------------------------------------------- pairs for a decoder


def test_a_decoder_reads_source_and_target_and_learns_the_target() -> None:
    sources = [np.asarray([30, 31, 2]), np.asarray([32, 2])]
    targets = [np.asarray([40, 2]), np.asarray([41, 42, 43, 2])]
    batch = prefix_batch(sources, targets, VOCABULARY)
    assert batch.inputs["input_ids"].tolist() == [
        [30, 31, 2, 40, 2, 99],
        [32, 2, 41, 42, 43, 2],
    ]
    assert batch.labels.tolist() == [
        [IGNORE, IGNORE, 40, 2, IGNORE, IGNORE],
        [IGNORE, 41, 42, 43, 2, IGNORE],
    ]
    assert batch.inputs["attention_mask"].sum(axis=1).tolist() == [5, 6]
    assert batch.inputs["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 4]
    assert batch.target_tokens == 6
    assert batch.padded_tokens == 12


def test_a_cut_text_still_ends() -> None:
    assert cut(np.arange(5, 10), 5, end=2).tolist() == [5, 6, 7, 8, 9]
    assert cut(np.arange(5, 10), 4, end=2).tolist() == [5, 6, 7, 2]


def small_decoder() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=100, pad_token_id=99, eos_token_id=2, bos_token_id=1, **sizes)
    return LlamaForCausalLM(config).eval()


def test_the_loss_of_a_decoder_is_that_of_its_targets_one_by_one() -> None:
    """Against probabilities taken from each sequence alone; padding and neighbours change nothing."""
    import torch

    model, generator = small_decoder(), np.random.default_rng(3)
    sources = [np.append(generator.integers(20, 99, n), 2) for n in (3, 9, 1)]
    targets = [np.append(generator.integers(20, 99, n), 2) for n in (6, 2, 4)]
    expected = 0.0
    for source, target in zip(sources, targets, strict=True):
        ids = torch.from_numpy(np.concatenate([source, target]))[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :, :-1].float()  # without padding, the last id
        log_probabilities = logits.log_softmax(dim=-1)
        for place, token in enumerate(target.tolist(), len(source)):
            expected -= float(log_probabilities[place - 1, token])
    with torch.no_grad():
        found = token_loss(model, prefix_batch(sources, targets, VOCABULARY), 0.0, torch.device("cpu"))
    assert float(found) == pytest.approx(expected, rel=1e-5)


# -------------------------------------------------------------------------------------- labelled texts


def write_pairs(directory: Path, split: str, rows: list[tuple[str, str, list[int]]]) -> StoragePath:
    """A prepared corpus' shard of rows of task, target and source tokens."""
    folder = directory / "pairs" / split
    folder.mkdir(parents=True)
    tasks, targets, sources = zip(*rows, strict=True)
    table = pa.table({"task": tasks, "target": targets, "source_ids": pa.array(sources, pa.list_(pa.uint16()))})
    with pa.ipc.new_file(str(folder / "shard-00000.arrow"), table.schema) as writer:
        writer.write_table(table)
    return StoragePath(str(directory))


def test_labels_are_those_of_the_training_texts(tmp_path: Path) -> None:
    rows = [("classify", "b", [30, 2]), ("translate", "c", [30, 2]), ("classify", "a", [31, 2])]
    tokens = write_pairs(tmp_path, "train", [*rows, ("classify", "b", [32, 2])])
    write_pairs(tmp_path, "validation", [("classify", "a", [33, 2]), ("translate", "d", [33, 2])])
    assert label_counts(tokens, "train") == Counter(a=1, b=2)
    assert label_names(tokens) == ["a", "b"]
    write_pairs(tmp_path, "test", [("classify", "z", [33, 2]), ("classify", "z", [34, 2])])
    with pytest.raises(ArtifactError, match="pairs/test has 2 times the label 'z', which no training text has.*: a, b"):
        label_names(tokens)


def test_too_few_and_too_many_labels_are_refused(tmp_path: Path) -> None:
    without = write_pairs(tmp_path / "without", "train", [("translate", "c", [30, 2])])
    with pytest.raises(ArtifactError, match="pairs/train has no labelled texts.*`task: classify`"):
        label_names(without)
    one = write_pairs(tmp_path / "one", "train", [("classify", "a", [30, 2])] * 3)
    with pytest.raises(ArtifactError, match="pairs/train has only the label 'a'"):
        label_names(one)
    many = write_pairs(tmp_path / "many", "train", [("classify", f"text {n}", [30, 2]) for n in range(10_001)])
    with pytest.raises(ArtifactError, match="10,001 labels, 10,000 are the most; is `target` the column of the labels"):
        label_names(many)


def test_many_known_labels_are_not_all_listed() -> None:
    with pytest.raises(ArtifactError) as raised:
        check_labels({"new": 1}, [f"label {n}" for n in range(500)], "here")
    assert str(raised.value).endswith("label 8, label 9, …")


def test_a_classifier_reads_texts_and_their_numbers(tmp_path: Path) -> None:
    rows = [("classify", "b", [30, 31, 32, 2]), ("translate", "b b", [7, 2]), ("classify", "a", [33, 2])]
    shards = Shards(write_pairs(tmp_path, "train", rows) / "pairs" / "train")
    labels = label_numbers(shards.table["target"], ["a", "b"])
    assert labels.tolist() == [1, IGNORE, 0]
    source = LabelledTexts(TokenLists(shards, "source_ids"), labels, VOCABULARY, max_source_tokens=3)
    batch = source.micro_batch(GlobalBatch(np.asarray([2, 0]), np.zeros(2, np.int64)))
    assert batch.inputs["input_ids"].tolist() == [[33, 2, 99], [30, 31, 2]]
    assert batch.inputs["attention_mask"].sum(axis=1).tolist() == [2, 3]
    assert batch.labels.tolist() == [0, 1]
    assert batch.target_tokens == 2
    assert batch.unlabelled().target_tokens == 0


def test_an_objective_sees_the_pairs_of_its_kind_alone() -> None:
    tasks = np.asarray(["translate", "classify", "summarize", "classify"], object)
    assert pair_weights(tasks, {"summarize": 0.5, "classify": 2.0}, "seq2seq").tolist() == [1, 0, 0.5, 0]
    assert pair_weights(tasks, {"summarize": 0.5, "classify": 2.0}, "classify").tolist() == [0, 2, 0, 2]


def test_all_labels_of_a_classifier_have_a_loss() -> None:
    """Also where the number of the last label is the id of the padding, which language models leave out."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=100, pad_token_id=1, num_labels=2, **sizes)).eval()
    ids = np.arange(20, 36).reshape(2, 8)
    with torch.no_grad():
        expected = -model(input_ids=torch.from_numpy(ids)).logits.log_softmax(dim=-1)[[0, 1], [1, 0]].sum()
        found = token_loss(model, MicroBatch({"input_ids": ids}, np.asarray([1, 0])), 0.0, torch.device("cpu"))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("end", "answers"), [(2, 99), (99, 100), ([2, 99], 100)])
def test_padding_is_no_answer_unless_it_is_the_end(end: Any, answers: int) -> None:
    import torch

    model = small_decoder()
    model.config.eos_token_id = end
    batch = prefix_batch([np.asarray([30, 2])], [np.asarray([40, 41])], VOCABULARY)
    inputs, labels = batch.tensors(torch.device("cpu"))
    with torch.no_grad():
        logits = model(**inputs).logits[..., :answers]
        expected = torch.nn.functional.cross_entropy(logits[0], labels[0], ignore_index=IGNORE, reduction="sum")
        found = token_loss(model, batch, 0.0, torch.device("cpu"))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(("family", "objective"), [("llama", "causal"), ("bert", "masked")])
def test_editing_one_document_leaves_the_logits_of_its_neighbour(family: str, objective: str, corpus) -> None:  # type: ignore[no-untyped-def]
    import torch

    from raylm import models
    from raylm.settings import ModelSettings

    tokenizer = models.load_tokenizer(str(corpus / "tokenizer"))
    small = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    config = models.build_config(ModelSettings(family=family, config=small), tokenizer)
    model = models.build_model(config, seed=1).eval()
    documents, positions = document_places([np.asarray([5, 7])], width=12)
    mask = document_mask(documents, causal=objective == "causal")
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


def test_positions_begin_where_the_model_begins_them() -> None:
    supervision = SelfSupervision("masked", VOCABULARY, 0.15, 3.0, first_position=2)
    rows = [np.arange(20, 30)]
    batch = supervision.micro_batch(rows, [np.asarray([4, 6])], [(1,)])
    assert batch.inputs["position_ids"].tolist() == [[2, 3, 4, 5, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("last", [["<mask>"], ["<a>", "<mask>"], []])
def test_plain_ids_lie_between_the_special_ones(last: list[str]) -> None:
    """RoBERTa's mask is its last id."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast, RobertaConfig

    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(50)), *last]
    backend = Tokenizer(kinds.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    special |= {"mask_token": "<mask>"} if last else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    if len(last) > 1:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<a>"]})
    assert vocabulary_of(RobertaConfig(decoder_start_token_id=0), tokenizer).decoder_start == 0
    found = vocabulary_of(RobertaConfig(), tokenizer)
    assert found.decoder_start == tokenizer.pad_token_id
    assert (found.first_plain, found.plain_stop) == (4, 54)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "marian"])
def test_a_head_that_computes_what_is_asked_gives_the_loss_and_the_gradients_of_all(kind: str) -> None:
    """Logits of positions without a label are none of the loss's."""
    import torch
    from transformers import AutoConfig

    from raylm import models

    sizes: dict[str, Any] = {
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1},
        "marian": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
                   "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    }.get(kind, {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48})  # fmt: skip
    special = {"vocab_size": 100, "pad_token_id": 99, "eos_token_id": 2, "decoder_start_token_id": 99}
    config = AutoConfig.for_model(kind, num_attention_heads=4, **special, **sizes)
    model = models.build_model(config, seed=1).eval()
    model.config.use_cache = False
    rng = np.random.default_rng(3)
    inputs: dict[str, Any] = {"input_ids": rng.integers(20, 99, (3, 12))}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = rng.integers(20, 99, (3, 12))
    labels = np.where(rng.random((3, 12)) < 0.3, rng.integers(20, 99, (3, 12)), IGNORE)
    few = MicroBatch(inputs, labels)
    assert few.scored is not None and len(few.scored) == few.target_tokens
    loss = token_loss(model, few, 0.1, torch.device("cpu"))
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    all_logits = model(**few.tensors(torch.device("cpu"))[0]).logits
    assert all_logits.shape == (3, 12, 100), "the head is as it was"
    places = labels.ravel() != IGNORE
    kept = all_logits.flatten(0, 1)[torch.from_numpy(places)][:, :99]
    expected = torch.nn.functional.cross_entropy(
        kept, torch.from_numpy(labels.ravel()[places]), label_smoothing=0.1, reduction="sum"
    )
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    others = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_positions_are_left_out_where_most_have_no_label() -> None:
    ids = {"input_ids": np.zeros((2, 4), np.int64)}
    most = np.asarray([[1, 1, 1, IGNORE], [1, 1, 1, 1]])
    none = np.full((2, 4), IGNORE)
    assert MicroBatch(ids, most).scored is None
    assert MicroBatch(ids, none).scored is None, "each rank goes through the head"
    assert MicroBatch(ids, np.asarray([1, 2])).scored is None, "a label for each text"
    one = none.copy()
    one[1, 2] = 5
    assert MicroBatch(ids, one).scored.tolist() == [6]  # type: ignore[union-attr]
