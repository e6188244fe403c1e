from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raylm.errors import TrainingError
from raylm.settings import PretrainSettings
from raylm.storage import StoragePath
from raylm.training.objectives import IGNORE, MicroBatch, Vocabulary, seq2seq_batch
from raylm.training.record import DataRecord

VOCABULARY = Vocabulary(size=100, pad=99, end=2, mask=3, decoder_start=99, sentinels=(), first_plain=4, plain_stop=99)


def test_a_step_that_comes_again_has_to_read_the_same(tmp_path: Path) -> None:
    run = StoragePath(str(tmp_path))
    record = DataRecord(run, first_step=0)
    for step in (1, 2, 3):
        record.add(step, examples=8, digest=step * 1_000)
    record.publish()
    again = DataRecord(run, first_step=1)
    again.add(2, examples=8, digest=2_000)
    with pytest.raises(TrainingError, match=r"data\.jsonl: step 3 read 8 examples with the hash 00000000000bb8 before"):
        again.add(3, examples=8, digest=3_001)
    again.publish()
    once_more = DataRecord(run, first_step=2)
    with pytest.raises(TrainingError, match="step 3 read 8 examples"):
        once_more.add(3, examples=8, digest=3_001)


def test_a_hash_is_of_the_text_and_not_of_its_padding() -> None:
    short, long = (np.asarray([30, 2]), np.asarray([40, 41, 2])), (np.arange(4, 40), np.arange(4, 60))
    together = seq2seq_batch([short[0], long[0]], [short[1], long[1]], VOCABULARY)
    alone = [seq2seq_batch([source], [target], VOCABULARY) for source, target in (short, long)]
    assert together.hashes() == [number for batch in alone for number in batch.hashes()]
    assert len(set(together.hashes())) == 2
    assert together.unlabelled().hashes() == []
    edited = seq2seq_batch([np.asarray([31, 2])], [short[1]], VOCABULARY)
    assert edited.hashes() != alone[0].hashes()


def test_labels_and_packed_sequences_count_too() -> None:
    def packed(labels: list[int]) -> MicroBatch:
        mask = np.ones((1, 1, 3, 3), dtype=bool)
        return MicroBatch({"input_ids": np.asarray([[5, 6, 7]]), "attention_mask": mask}, np.asarray([labels]))

    assert packed([6, 7, IGNORE]).hashes() != packed([6, 8, IGNORE]).hashes()

    def labelled(number: int) -> MicroBatch:
        inputs = {"input_ids": np.asarray([[5, 6]]), "attention_mask": np.asarray([[1, 1]])}
        return MicroBatch(inputs, np.asarray([number]))

    assert labelled(0).hashes() != labelled(1).hashes()


def test_a_stream_has_no_order_to_verify() -> None:
    with pytest.raises(ValueError, match="verify_data has no effect with stream: true"):
        PretrainSettings(stream=True, verify_data=True)
