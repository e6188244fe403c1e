from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from raylm.corpus.pack import pack, token_type

DOCUMENTS = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=40), max_size=30)


@given(DOCUMENTS, st.integers(2, 16))
def test_no_token_is_lost_and_only_the_end_is_padded(documents: list[list[int]], length: int) -> None:
    table = pack(documents, length, pad=0, ids=pa.uint16())
    flat = [token for row in table["input_ids"].to_pylist() for token in row]
    tokens = [token for document in documents for token in document]
    assert flat[: len(tokens)] == tokens
    assert set(flat[len(tokens) :]) <= {0}
    assert len(flat) - len(tokens) < length
    assert all(len(row) == length for row in table["input_ids"].to_pylist())


@given(DOCUMENTS, st.integers(2, 16))
def test_boundaries_are_where_documents_and_sequences_end(documents: list[list[int]], length: int) -> None:
    lengths = pack(documents, length, pad=0, ids=pa.uint16())["document_lengths"].to_pylist()
    total = sum(map(len, documents))
    assert [sum(row) for row in lengths] == [min(length, total - start) for start in range(0, total, length)]
    boundaries = set(np.cumsum([part for row in lengths for part in row]).tolist())
    assert boundaries >= set(np.cumsum([len(document) for document in documents]).tolist())
    assert all(part > 0 for row in lengths for part in row)


def test_token_type_holds_every_id() -> None:
    assert token_type(65_536) == pa.uint16()
    assert token_type(65_537) == pa.uint32()
