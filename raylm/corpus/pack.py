"""Token lists to packed sequences of one length, with the document boundaries kept."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa


def token_type(vocab_size: int) -> pa.DataType:
    """The smallest unsigned integer that holds every id."""
    return pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()


def pack(documents: Iterable[list[int]], sequence_length: int, pad: int, ids: pa.DataType) -> pa.Table:
    """Documents one after the other, cut into sequences; only the last sequence is filled up with padding.

    :param documents: the ids of each, its end token included.
    :returns: `input_ids` (lists of `sequence_length`) and `document_lengths`: the tokens of each document, or part
        of one, in the sequence. What they do not cover is padding.
    """
    tokens: list[int] = []
    ends: list[int] = []
    for document in documents:
        tokens += document
        ends.append(len(tokens))
    total = len(tokens)
    rows = -(-total // sequence_length)
    flat = np.full(rows * sequence_length, pad, dtype=ids.to_pandas_dtype())
    flat[:total] = tokens

    # A boundary is a document's end or a sequence's end; lengths are the distances between boundaries.
    sequence_ends = np.minimum(np.arange(1, rows + 1) * sequence_length, total)
    boundaries = np.unique(np.concatenate([np.asarray(ends, dtype=np.int64), sequence_ends]))
    boundaries = boundaries[boundaries > 0]
    lengths = np.diff(np.concatenate([[0], boundaries])).astype(np.int32)
    offsets = np.concatenate([[0], np.searchsorted(boundaries, sequence_ends, side="right")]).astype(np.int32)
    return pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(
                pa.array(np.arange(rows + 1, dtype=np.int32) * sequence_length), pa.array(flat, ids)
            ),
            "document_lengths": pa.ListArray.from_arrays(pa.array(offsets), pa.array(lengths)),
        }
    )
