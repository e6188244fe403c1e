"""Documents to packed sequences of one length, with the document boundaries kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raylm.settings import PackSettings

Ids = NDArray[np.uint16] | NDArray[np.uint32]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Packed:
    """Sequences of one length, and what packing did to the documents."""

    table: pa.Table
    """`input_ids` (lists of `sequence_length`) and `document_lengths`: the tokens of each document, or part of one, in
    the sequence. What they do not cover is padding, at the sequence's end."""
    tokens: int
    """Without padding."""
    padding: int
    """In tokens."""
    cut_documents: int
    """Documents that continue in another sequence."""
    truncated_documents: int
    truncated_tokens: int
    """Lost by truncation."""


class _Parts(NamedTuple):
    """Documents or parts of them: where each begins in the ids, its tokens, and its sequence."""

    starts: Numbers
    lengths: Numbers
    sequences: Numbers


def token_type(vocab_size: int) -> pa.DataType:
    """The smallest unsigned integer that holds every id."""
    return pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()


def pack(ids: Ids, lengths: Numbers, sequence_length: int, pad: int, settings: PackSettings, end: int) -> Packed:
    """The documents as sequences of `sequence_length` tokens; a function of the arguments alone.

    Sequences come in the order of the first document in each, and documents in a sequence in their own order, so that
    neither is sorted by length.

    :param ids: all documents, one after the other, each with its end token.
    :param lengths: the tokens of each.
    :param pad: fills up sequences.
    :param end: the last token of a truncated document.
    """
    lengths = lengths[lengths > 0]
    total = int(lengths.sum())
    long = np.zeros(0, np.int64)
    if settings.max_document_tokens is not None:
        ids, lengths, long = _truncated(ids, lengths, settings.max_document_tokens, end)
    ends = np.cumsum(lengths)
    if settings.strategy == "concatenate":
        parts = _concatenated(ends, sequence_length)
    else:
        parts = _filled_up(_best_fit(ends, lengths, sequence_length), sequence_length, settings.max_padding)
    table = _table(ids, parts, sequence_length, pad)
    tokens = int(lengths.sum())
    per_document = np.bincount(np.searchsorted(ends, parts.starts, side="right"))
    return Packed(
        table=table,
        tokens=tokens,
        padding=len(table) * sequence_length - tokens,
        cut_documents=int(np.count_nonzero(per_document > 1)),
        truncated_documents=len(long),
        truncated_tokens=total - tokens,
    )


def _truncated(ids: Ids, lengths: Numbers, limit: int, end: int) -> tuple[Ids, Numbers, Numbers]:
    """Ids and lengths with no document beyond the limit, each closed by its end token, and the numbers of those cut."""
    long = np.flatnonzero(lengths > limit)
    if len(long):
        kept = np.minimum(lengths, limit)
        ids = ids[_spread(np.cumsum(lengths) - lengths, kept)]
        ids[np.cumsum(kept)[long] - 1] = end
        lengths = kept
    return ids, lengths, long


def _concatenated(ends: Numbers, sequence_length: int) -> _Parts:
    """Documents one after the other, cut wherever a sequence ends."""
    total = int(ends[-1]) if len(ends) else 0
    starts, lengths = _cut(ends, np.arange(sequence_length, total, sequence_length, dtype=np.int64))
    return _Parts(starts, lengths, starts // sequence_length)


def _best_fit(ends: Numbers, lengths: Numbers, sequence_length: int) -> _Parts:
    """Each document in the fullest sequence that has room for it, longest first (Ding et al. 2024, "Fewer Truncations
    Improve Language Modeling", arXiv:2404.10830); longer ones give full sequences and a remainder.
    """
    full = lengths // sequence_length
    rest = lengths % sequence_length
    within = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    starts = np.repeat(ends - lengths, full) + within * sequence_length
    sequences = len(starts)

    remainders = np.flatnonzero(rest)
    remainders = remainders[np.argsort(-rest[remainders], kind="stable")]
    placed = np.empty(len(remainders), np.int64)
    # Open sequences by their room, in tokens; bit n of `rooms` says that there are some with room n. Documents of one
    # length are placed at once: the best fit for one of them is the best fit for the next until it is full.
    open_by_room: dict[int, list[Numbers]] = {}
    rooms = 0
    sizes, firsts = np.unique(-rest[remainders], return_index=True)
    lasts = np.append(firsts, len(placed))[1:]
    for size, first, last in zip((-sizes).tolist(), firsts.tolist(), lasts.tolist(), strict=True):
        while first < last:
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                chosen = open_by_room[room].pop()
                if not open_by_room[room]:
                    rooms ^= 1 << room
            else:
                room = sequence_length
                needed = -(-(last - first) // (room // size))
                chosen = np.arange(sequences, sequences + needed)
                sequences += needed
            each = room // size
            used = -(-(last - first) // each)
            rooms = _opened(open_by_room, rooms, room, chosen[used:])
            chosen = chosen[:used]
            filled = min(last, first + len(chosen) * each)
            placed[first:filled] = np.repeat(chosen, each)[: filled - first]
            in_last = filled - first - (len(chosen) - 1) * each
            rooms = _opened(open_by_room, rooms, room - each * size, chosen[:-1])
            rooms = _opened(open_by_room, rooms, room - in_last * size, chosen[-1:])
            first = filled
    return _Parts(
        np.concatenate([starts, ends[remainders] - rest[remainders]]),
        np.concatenate([np.full(len(starts), sequence_length, np.int64), rest[remainders]]),
        np.concatenate([np.arange(len(starts)), placed]),
    )


def _opened(open_by_room: dict[int, list[Numbers]], rooms: int, room: int, sequences: Numbers) -> int:
    """The bits of `rooms` after sequences with that room were added."""
    if room and len(sequences):
        open_by_room.setdefault(room, []).append(sequences)
        rooms |= 1 << room
    return rooms


def _filled_up(parts: _Parts, sequence_length: int, max_padding: float) -> _Parts:
    """The parts in so few sequences that at most that share is padding, or less than one sequence is.

    The emptiest sequences are dissolved, and their documents cut to fill the gaps of others, largest gap first.
    """
    fill = np.bincount(parts.sequences, parts.lengths).astype(np.int64)
    wanted = _sequences_within(int(fill.sum()), len(fill), sequence_length, max_padding)
    if wanted == len(fill):
        return parts
    by_fill = np.argsort(fill, kind="stable")
    is_dissolved = np.zeros(len(fill), bool)
    is_dissolved[by_fill[: len(fill) - wanted]] = True
    receivers = by_fill[len(fill) - wanted :]
    stays = ~is_dissolved[parts.sequences]
    loose_starts, loose_lengths = parts.starts[~stays], parts.lengths[~stays]
    # Positions on a line of all loose documents, and of all gaps.
    loose_ends = np.cumsum(loose_lengths)
    gap_ends = np.cumsum(sequence_length - fill[receivers])
    positions, lengths = _cut(loose_ends, gap_ends[gap_ends < loose_ends[-1]])
    document = np.searchsorted(loose_ends, positions, side="right")
    starts = (loose_starts - loose_ends + loose_lengths)[document] + positions
    gap = np.searchsorted(gap_ends, positions, side="right")
    return _Parts(
        np.concatenate([parts.starts[stays], starts]),
        np.concatenate([parts.lengths[stays], lengths]),
        np.concatenate([parts.sequences[stays], receivers[gap]]),
    )


def _sequences_within(tokens: int, sequences: int, sequence_length: int, max_padding: float) -> int:
    """The most sequences, of those there are, with no more padding than wanted, or the fewest that hold the tokens."""
    fewest = -(-tokens // sequence_length)
    while sequences > fewest and sequences * sequence_length - tokens > max_padding * sequences * sequence_length:
        # the closed form may be off by one, by rounding
        sequences = max(fewest, min(sequences - 1, int(tokens / (sequence_length * (1 - max_padding)))))
    return sequences


def _cut(ends: Numbers, cuts: Numbers) -> tuple[Numbers, Numbers]:
    """The starts and lengths of the pieces between ends and cuts, of a line that begins at 0."""
    boundaries = np.union1d(ends, cuts)
    starts = np.concatenate([np.zeros(1, np.int64), boundaries])[:-1]
    return starts, boundaries - starts


def _table(ids: Ids, parts: _Parts, sequence_length: int, pad: int) -> pa.Table:
    order = np.lexsort([parts.starts, parts.sequences])
    starts, lengths, sequences = (column[order] for column in parts)
    # Sequences are numbered anew, by the first document in each.
    firsts = np.flatnonzero(np.diff(sequences, prepend=-1))
    counts = np.diff(firsts, append=len(sequences))
    rank = np.empty(len(firsts), np.int64)
    rank[np.argsort(starts[firsts], kind="stable")] = np.arange(len(firsts))
    order = np.argsort(np.repeat(rank, counts), kind="stable")
    starts, lengths, counts = starts[order], lengths[order], counts[np.argsort(rank)]

    rows = len(counts)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    before = np.cumsum(lengths) - lengths
    in_row = before - np.repeat(before[offsets[:-1]], counts)
    flat = np.full(rows * sequence_length, pad, dtype=ids.dtype)
    flat[_spread(np.repeat(np.arange(rows), counts) * sequence_length + in_row, lengths)] = ids[
        _spread(starts, lengths)
    ]
    return pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(
                pa.array(np.arange(rows + 1) * sequence_length, pa.int32()), pa.array(flat)
            ),
            "document_lengths": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(lengths, pa.int32())),
        }
    )


def _spread(starts: Numbers, lengths: Numbers) -> Numbers:
    """All positions of the runs that begin at `starts`, run after run."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
