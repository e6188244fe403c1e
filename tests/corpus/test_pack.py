from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.corpus.pack import Packed, pack, token_type
from raylm.settings import PackSettings

PAD, END = 0, 1
LENGTHS = st.lists(st.integers(1, 60), max_size=40)
STRATEGIES = st.sampled_from(["best_fit", "concatenate"])
BOUNDS = st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])


def documents_of(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens are all different, but for their end tokens."""
    first, documents = END + 1, []
    for length in lengths:
        documents.append([*range(first, first + length - 1), END])
        first += length
    return documents


def packed_of(documents: list[list[int]], sequence_length: int, settings: PackSettings) -> Packed:
    ids = np.array([token for document in documents for token in document], np.uint32)
    lengths = np.array([len(document) for document in documents], np.int64)
    return pack(ids, lengths, sequence_length, PAD, settings, END)


def parts_of(packed: Packed) -> list[list[tuple[int, ...]]]:
    """The parts of documents in each sequence, after checking that the rest is padding."""
    rows = []
    for row, lengths in zip(
        packed.table["input_ids"].to_pylist(), packed.table["document_lengths"].to_pylist(), strict=True
    ):
        ends = np.cumsum(lengths).tolist()
        assert set(row[ends[-1] :]) <= {PAD} and all(length > 0 for length in lengths)
        rows.append([tuple(row[end - length : end]) for end, length in zip(ends, lengths, strict=True)])
    return rows


@given(LENGTHS, st.integers(2, 30), STRATEGIES, BOUNDS)
def test_every_document_is_there_whole_or_in_parts(
    lengths: list[int], sequence_length: int, strategy: Literal["best_fit", "concatenate"], bound: float
) -> None:
    documents = documents_of(lengths)
    packed = packed_of(documents, sequence_length, PackSettings(strategy=strategy, max_padding=bound))
    # A part with letters beside the end token tells its place; an end token alone may belong to any document.
    parts = sorted(part for row in parts_of(packed) for part in row if part != (END,))
    lone_ends = sum(part == (END,) for row in parts_of(packed) for part in row)
    bodies = [document[:-1] for document in documents if len(document) > 1]
    assert [token for part in parts for token in part if token != END] == [t for body in bodies for t in body]
    assert lone_ends + sum(part[-1] == END for part in parts) == len(documents)
    lasts = {document[-2] for document in documents if len(document) > 1}
    assert all(part[-2] in lasts for part in parts if part[-1] == END)
    assert all(END not in part[:-1] for part in parts)


@given(LENGTHS, st.integers(2, 30), STRATEGIES, BOUNDS)
def test_the_numbers_are_true_and_padding_is_bounded(
    lengths: list[int], sequence_length: int, strategy: Literal["best_fit", "concatenate"], bound: float
) -> None:
    packed = packed_of(documents_of(lengths), sequence_length, PackSettings(strategy=strategy, max_padding=bound))
    size = len(packed.table) * sequence_length
    assert packed.tokens == sum(lengths) == sum(map(sum, packed.table["document_lengths"].to_pylist()))
    assert packed.tokens + packed.padding == size
    assert packed.padding < sequence_length or (strategy == "best_fit" and packed.padding <= bound * size)
    parts = sum(len(row) for row in packed.table["document_lengths"].to_pylist())
    assert packed.cut_documents <= parts - len(lengths)
    assert (packed.cut_documents == 0) == (parts == len(lengths))
    assert (packed.truncated_documents, packed.truncated_tokens) == (0, 0)


@given(LENGTHS.filter(bool), st.integers(2, 30))
def test_best_fit_cuts_only_what_is_longer_than_a_sequence_where_padding_may_be(
    lengths: list[int], sequence_length: int
) -> None:
    packed = packed_of(documents_of(lengths), sequence_length, PackSettings(max_padding=1))
    assert packed.cut_documents == sum(length > sequence_length for length in lengths)
    fill = sorted(map(sum, packed.table["document_lengths"].to_pylist()))
    assert fill == sorted(simple_best_fit(lengths, sequence_length))


def simple_best_fit(lengths: list[int], sequence_length: int) -> list[int]:
    """The fill of each sequence when documents are placed one by one, as the paper says."""
    fill = [sequence_length for length in lengths for _ in range(length // sequence_length)]
    for rest in sorted((length % sequence_length for length in lengths), reverse=True):
        fitting = [n for n, filled in enumerate(fill) if filled + rest <= sequence_length]
        if not rest:
            continue
        if fitting:
            fill[max(fitting, key=fill.__getitem__)] += rest
        else:
            fill.append(rest)
    return fill


@given(LENGTHS, st.integers(2, 30), st.integers(1, 40), STRATEGIES)
def test_truncated_documents_keep_their_end(
    lengths: list[int], sequence_length: int, limit: int, strategy: Literal["best_fit", "concatenate"]
) -> None:
    documents = documents_of(lengths)
    settings = PackSettings(strategy=strategy, max_document_tokens=limit)
    packed = packed_of(documents, sequence_length, settings)
    shorter = [document if len(document) <= limit else [*document[: limit - 1], END] for document in documents]
    expected = packed_of(shorter, sequence_length, PackSettings(strategy=strategy))
    assert packed.table.equals(expected.table)
    assert packed.truncated_documents == sum(length > limit for length in lengths)
    assert packed.truncated_tokens == sum(max(length - limit, 0) for length in lengths)


@given(LENGTHS, st.integers(2, 16))
def test_concatenation_keeps_the_order_and_cuts_where_a_sequence_ends(lengths: list[int], sequence_length: int) -> None:
    documents = documents_of(lengths)
    table = packed_of(documents, sequence_length, PackSettings(strategy="concatenate")).table
    flat = [token for row in table["input_ids"].to_pylist() for token in row]
    total = sum(lengths)
    assert flat[:total] == [token for document in documents for token in document]
    in_rows = table["document_lengths"].to_pylist()
    assert [sum(row) for row in in_rows] == [min(sequence_length, total - s) for s in range(0, total, sequence_length)]
    boundaries = set(np.cumsum([part for row in in_rows for part in row]).tolist())
    assert boundaries >= set(np.cumsum(lengths).tolist())


def test_gaps_are_filled_by_cutting_the_documents_of_the_emptiest_sequences() -> None:
    documents = documents_of([7, 7, 7, 7, 4])
    whole = packed_of(documents, 10, PackSettings(max_padding=1))
    assert (len(whole.table), whole.padding, whole.cut_documents) == (5, 18, 0)
    filled = packed_of(documents, 10, PackSettings(max_padding=0.25))
    assert (len(filled.table), filled.padding, filled.cut_documents) == (4, 8, 1)
    assert filled.table["document_lengths"].to_pylist() == [[7, 3], [7, 1], [7], [7]]
    assert packed_of(documents, 10, PackSettings(max_padding=0.1)).table.num_rows == 4  # 32 tokens need no fewer


def test_best_fit_cuts_far_fewer_documents_than_concatenation() -> None:
    lengths = np.random.default_rng(1).integers(10, 120, 2_000).tolist()
    documents = documents_of(lengths)
    fit = packed_of(documents, 128, PackSettings())
    cut = packed_of(documents, 128, PackSettings(strategy="concatenate"))
    assert fit.padding <= 0.01 * len(fit.table) * 128
    assert fit.cut_documents < cut.cut_documents / 5


@pytest.mark.parametrize("strategy", ["best_fit", "concatenate"])
def test_sequences_are_not_sorted_by_length(strategy: Literal["best_fit", "concatenate"]) -> None:
    lengths = np.random.default_rng(2).integers(10, 120, 1_000).tolist()
    rows = packed_of(documents_of(lengths), 128, PackSettings(strategy=strategy)).table["document_lengths"].to_pylist()
    means = [np.mean([length for row in half for length in row]) for half in (rows[: len(rows) // 2], rows)]
    assert means[0] == pytest.approx(means[1], rel=0.1)


def test_columns_are_what_training_reads() -> None:
    ids = np.array([5, 1, 6, 1], np.uint16)
    table = pack(ids, np.array([2, 2]), 3, PAD, PackSettings(), END).table
    assert table.schema.field("input_ids").type == pa.list_(pa.uint16())
    assert table.schema.field("document_lengths").type == pa.list_(pa.int32())
    nothing = pack(ids[:0], np.zeros(0, np.int64), 3, PAD, PackSettings(), END)
    assert (len(nothing.table), nothing.tokens, nothing.padding) == (0, 0, 0)
    assert nothing.table.schema == table.schema


def test_ids_stay_what_they_are() -> None:
    ids = np.array([70_000, 1, 65_536, 9, 1], np.uint32)
    packed = pack(ids, np.array([2, 3]), 5, PAD, PackSettings(), END)
    assert Counter(packed.table["input_ids"].to_pylist()[0]) == Counter(ids.tolist())


def test_token_type_holds_every_id() -> None:
    assert token_type(65_536) == pa.uint16()
    assert token_type(65_537) == pa.uint32()
