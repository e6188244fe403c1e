"""What a model learns from a batch: span denoising, causal and masked language modelling, pairs, labelled texts.

An objective turns examples into the tensors of one micro-batch. Its noise is a pure function of (seed, example,
epoch), so a batch is the same on every worker and after every restart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from numpy.typing import NDArray

from raylm.errors import SettingsError
from raylm.models import Architecture
from raylm.tasks import CLASSIFY
from raylm.training.batches import GlobalBatch, TokenLists, pad_to
from raylm.training.noise import corrupt_spans, infill_spans, span_mask

if TYPE_CHECKING:
    import torch

Tokens = NDArray[np.int64]
IGNORE = -100
"""Label of a position that has no loss."""

# What trains an architecture in a section of the YAML, the usual one first.
_OBJECTIVES: dict[tuple[str, Architecture], tuple[str, ...]] = {
    ("pretrain", "encoder-decoder"): ("denoise",),
    ("pretrain", "decoder"): ("causal",),
    ("pretrain", "encoder"): ("masked",),
    ("finetune", "encoder-decoder"): ("seq2seq",),
    ("finetune", "decoder"): ("seq2seq", CLASSIFY.name),
    ("finetune", "encoder"): (CLASSIFY.name,),
}


MOST_SCORED = 0.75
"""Where more positions have a label, to leave the others out saves nothing."""


@dataclass(frozen=True)
class Vocabulary:
    """The ids that objectives need to know.

    :param sentinels: stand for hidden spans, the first span first.
    :param first_plain: ids from here to `plain_stop` are bytes and merges: what a random replacement draws.
    """

    size: int
    pad: int
    end: int
    mask: int
    decoder_start: int
    sentinels: tuple[int, ...]
    first_plain: int
    plain_stop: int


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of a forward pass as numpy arrays.

    :param inputs: the model's keyword arguments, each (B, T) but for a (B, 1, T, T) `attention_mask`.
    :param labels: (B, T) target ids, or for classification (B,) numbers of labels; `IGNORE` where there is no loss.
    """

    inputs: dict[str, NDArray[np.generic]]
    labels: Tokens
    real_tokens: int = 0
    """Positions of source and target that hold text; none where there is nothing to learn."""
    sequences: int | None = None
    """How many sequences of one length lie one behind the other in each row; None where each has a row."""

    @property
    def target_tokens(self) -> int:
        return int((self.labels != IGNORE).sum())

    @property
    def padded_tokens(self) -> int:
        """Positions the model computes, encoder and decoder together."""
        sequences, source_tokens, target_tokens = self.shape
        return sequences * (source_tokens + target_tokens)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sequences, the positions of each, and those that a decoder beside an encoder reads."""
        ids, decoder = self.inputs["input_ids"], self.inputs.get("decoder_input_ids")
        sequences = self.sequences or len(ids)
        return sequences, ids.size // sequences, 0 if decoder is None else decoder.shape[1]

    @property
    def scored(self) -> Tokens | None:
        """(N,) the places whose logits are wanted, row after row, where most are not; None where all are computed."""
        if self.labels.ndim == 1:
            return None
        places = np.flatnonzero(self.labels != IGNORE)
        return places if 0 < len(places) < MOST_SCORED * self.labels.size else None

    def hashes(self) -> list[int]:
        """For each example that has something to learn, 32 bits of its tokens and labels, however it is padded."""
        sequences, *_ = self.shape
        ids, whole = self.inputs["input_ids"].reshape(sequences, -1), self.labels.reshape(sequences, -1)
        mask = self.inputs.get("attention_mask")
        real_places = mask.astype(bool) if mask is not None and mask.ndim == 2 else np.ones(ids.shape, bool)
        learned = whole != IGNORE
        found = []
        for row in np.flatnonzero(learned.any(axis=1)):
            real = ids[row][real_places[row]]
            labels = whole[row][learned[row]]
            found.append(xxhash.xxh32_intdigest(real.tobytes() + labels.tobytes()))
        return found

    def target_bytes(self, token_bytes: NDArray[np.int64]) -> int:
        """Of the text that the target tokens stand for.

        :param token_bytes: (vocabulary,) of each token.
        """
        return int(token_bytes[self.labels[self.labels != IGNORE]].sum())

    def unlabelled(self) -> MicroBatch:
        """The same inputs with nothing to learn from."""
        return replace(self, labels=np.full_like(self.labels, IGNORE), real_tokens=0)

    def tensors(self, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs and labels on a device."""
        import torch

        inputs = {name: torch.from_numpy(array).to(device) for name, array in self.inputs.items()}
        return inputs, torch.from_numpy(self.labels).to(device)


class SelfSupervision:
    """What is to be learned from packed sequences.

    :param objective: `denoise`, `causal` or `masked`.
    :param is_flat: `causal` sequences lie one behind the other in one row, and positions that start again tell their
        documents apart, as some kernels want it; otherwise a mask does.
    :param has_mask: false where a mask of ours would take the place of windows of the model's own, which then makes
        one for itself, of the positions.
    :param first_position: the number that the model gives to a text's first position.
    """

    def __init__(
        self,
        objective: str,
        vocabulary: Vocabulary,
        noise_density: float,
        mean_span_tokens: float,
        denoise_target: str = "text",
        is_flat: bool = False,
        has_mask: bool = True,
        first_position: int = 0,
    ) -> None:
        self._is_flat, self._has_mask, self._first_position = is_flat, has_mask, first_position
        self._objective, self._denoise_target = objective, denoise_target
        self._vocabulary = vocabulary
        self._noise_density, self._mean_span_tokens = noise_density, mean_span_tokens

    def micro_batch(self, rows: list[Tokens], lengths: list[Tokens], seeds: Sequence[tuple[int, ...]]) -> MicroBatch:
        """
        :param rows: (T,) each, filled up at the right.
        :param lengths: the token counts of each row's documents.
        :param seeds: of each row's noise.
        """
        generators = [np.random.default_rng(seed) for seed in seeds]
        if self._objective == "denoise":
            return self._denoise(rows, generators)
        inputs = np.stack(rows)
        labels = inputs.copy()
        documents, positions = document_places(lengths, inputs.shape[1])
        real_tokens = int(sum(spans.sum() for spans in lengths))
        for row, spans in enumerate(lengths):
            labels[row, spans.sum() :] = IGNORE
        if self._objective == "causal":
            # position t predicts t + 1, but not across the end of a document
            labels = np.concatenate([labels[:, 1:], np.full((len(rows), 1), IGNORE)], axis=1)
            for row, spans in enumerate(lengths):
                labels[row, np.cumsum(spans) - 1] = IGNORE
        else:
            inputs, labels = self._mask(inputs, labels, generators)
        positions += self._first_position
        arrays: dict[str, NDArray[np.generic]] = {"input_ids": inputs, "position_ids": positions}
        if self._is_flat:
            arrays = {name: array.reshape(1, -1) for name, array in arrays.items()}
            return MicroBatch(arrays, labels.reshape(1, -1), real_tokens, sequences=len(rows))
        if self._has_mask:
            arrays["attention_mask"] = document_mask(documents, causal=self._objective == "causal")
        return MicroBatch(arrays, labels, real_tokens)

    def _denoise(self, rows: list[Tokens], generators: list[np.random.Generator]) -> MicroBatch:
        vocabulary = self._vocabulary
        sources, targets = [], []
        for row, generator in zip(rows, generators, strict=True):
            row = row[row != vocabulary.pad]
            noise = span_mask(len(row), self._noise_density, self._mean_span_tokens, generator)
            if self._denoise_target == "text":
                source, target = infill_spans(row, noise, vocabulary.mask, vocabulary.end)
            else:
                source, target = corrupt_spans(row, noise, vocabulary.sentinels, vocabulary.end)
            sources.append(source)
            targets.append(target)
        return seq2seq_batch(sources, targets, vocabulary)

    def _mask(self, inputs: Tokens, labels: Tokens, generators: list[np.random.Generator]) -> tuple[Tokens, Tokens]:
        """Hide tokens as BERT does (Devlin et al. 2019): of those chosen, 80 % become `<mask>`, 10 % a random
        token, 10 % stay as they are."""
        vocabulary = self._vocabulary
        draws = np.stack([generator.random((2, inputs.shape[1])) for generator in generators])  # (B, 2, T)
        randoms = np.stack(
            [g.integers(vocabulary.first_plain, vocabulary.plain_stop, inputs.shape[1]) for g in generators]
        )
        chosen = (draws[:, 0] < self._noise_density) & (labels != IGNORE) & (inputs != vocabulary.end)
        inputs = np.where(chosen & (draws[:, 1] < 0.8), vocabulary.mask, inputs)
        inputs = np.where(chosen & (draws[:, 1] >= 0.9), randoms, inputs)
        return inputs, np.where(chosen, labels, IGNORE)


class PackedDocuments:
    """Self-supervision on the sequences of a prepared corpus."""

    def __init__(
        self, objective: SelfSupervision, input_ids: TokenLists, document_lengths: TokenLists, seed: int
    ) -> None:
        self._objective, self._seed = objective, seed
        self._input_ids, self._document_lengths = input_ids, document_lengths

    def micro_batch(self, batch: GlobalBatch) -> MicroBatch:
        indices = batch.indices.tolist()
        return self._objective.micro_batch(
            [self._input_ids[index] for index in indices],
            [self._document_lengths[index] for index in indices],
            [(self._seed, index, epoch) for index, epoch in zip(indices, batch.epochs.tolist(), strict=True)],
        )


class Pairs:
    """Source to target with teacher forcing."""

    def __init__(
        self,
        source_ids: TokenLists,
        target_ids: TokenLists,
        vocabulary: Vocabulary,
        shape: Architecture,
        max_source_tokens: int,
        max_target_tokens: int,
    ) -> None:
        self._source_ids, self._target_ids, self._vocabulary = source_ids, target_ids, vocabulary
        self._batch = seq2seq_batch if shape == "encoder-decoder" else prefix_batch
        self._max_source_tokens, self._max_target_tokens = max_source_tokens, max_target_tokens

    def micro_batch(self, batch: GlobalBatch) -> MicroBatch:
        end = self._vocabulary.end
        sources = [cut(self._source_ids[int(i)], self._max_source_tokens, end) for i in batch.indices]
        targets = [cut(self._target_ids[int(i)], self._max_target_tokens, end) for i in batch.indices]
        return self._batch(sources, targets, self._vocabulary)


class LabelledTexts:
    """Text to the number of its label.

    :param labels: (N,) as `raylm.training.labels.label_numbers` gives them.
    """

    def __init__(self, source_ids: TokenLists, labels: Tokens, vocabulary: Vocabulary, max_source_tokens: int) -> None:
        self._source_ids, self._labels, self._vocabulary = source_ids, labels, vocabulary
        self._max_source_tokens = max_source_tokens

    def micro_batch(self, batch: GlobalBatch) -> MicroBatch:
        end = self._vocabulary.end
        rows = [cut(self._source_ids[int(i)], self._max_source_tokens, end) for i in batch.indices]
        input_ids = pad_to(rows, self._vocabulary.pad)  # (B, T)
        inputs: dict[str, NDArray[np.generic]] = {
            "input_ids": input_ids,
            "attention_mask": padding_mask(rows, input_ids.shape[1]),
        }
        return MicroBatch(inputs, self._labels[batch.indices], sum(map(len, rows)))


def pair_weights(tasks: NDArray[np.object_], task_weights: Mapping[str, float], objective: str) -> NDArray[np.float64]:
    """(N,) how often an objective sees each pair in an epoch: never one that is not of its kind.

    :param tasks: (N,) names.
    :param task_weights: as `finetune.task_weights`.
    """
    weights = np.ones(len(tasks))
    for task, weight in task_weights.items():
        weights[tasks == task] = weight
    weights[(tasks == CLASSIFY.name) != (objective == CLASSIFY.name)] = 0.0
    return weights


# --------------------------------------------------------------------------------------- pure parts


def padding_mask(rows: Sequence[Tokens], width: int) -> Tokens:
    """(B, T) 1 where a row that was filled up at the right has a token."""
    lengths = np.asarray([len(row) for row in rows])
    return (np.arange(width) < lengths[:, None]).astype(np.int64)


def seq2seq_batch(sources: list[Tokens], targets: list[Tokens], vocabulary: Vocabulary) -> MicroBatch:
    """A padded batch for an encoder-decoder; the decoder reads the labels shifted right."""
    input_ids = pad_to(sources, vocabulary.pad)  # (B, S)
    target_ids = pad_to(targets, vocabulary.pad)  # (B, T)
    start = np.full((len(targets), 1), vocabulary.decoder_start)
    inputs: dict[str, NDArray[np.generic]] = {
        "input_ids": input_ids,
        "attention_mask": padding_mask(sources, input_ids.shape[1]),
        "decoder_input_ids": np.concatenate([start, target_ids[:, :-1]], axis=1),
    }
    labels = np.where(padding_mask(targets, target_ids.shape[1]), target_ids, IGNORE)
    return MicroBatch(inputs, labels, sum(map(len, sources)) + sum(map(len, targets)))


def prefix_batch(sources: list[Tokens], targets: list[Tokens], vocabulary: Vocabulary) -> MicroBatch:
    """A padded batch for a decoder: each source with its target behind it, and a loss on the target alone.

    `a b </s>` and `C D </s>` become `a b </s> C D </s>`: the first `</s>` predicts C, D the last one. Attention stays
    causal over the source as well, so that generating computes what training did.
    """
    rows = [np.concatenate(pair) for pair in zip(sources, targets, strict=True)]
    input_ids = pad_to(rows, vocabulary.pad)  # (B, T)
    labels = np.full_like(input_ids, IGNORE)
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        labels[row, len(source) - 1 : len(source) + len(target) - 1] = target
    mask = padding_mask(rows, input_ids.shape[1])
    inputs: dict[str, NDArray[np.generic]] = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0),
    }
    return MicroBatch(inputs, labels, sum(map(len, sources)) + sum(map(len, targets)))


def document_places(lengths: list[Tokens], width: int) -> tuple[Tokens, Tokens]:
    """Where the documents of packed sequences are.

    :param lengths: the token counts of each row's documents.
    :returns: (B, T) the number of each position's document in its row, -1 for padding, and (B, T) positions that start
        again with each document, and with padding.
    """
    documents = np.full((len(lengths), width), -1, dtype=np.int64)
    positions = np.empty((len(lengths), width), dtype=np.int64)
    for row, spans in enumerate(lengths):
        used = int(spans.sum())
        documents[row, :used] = np.repeat(np.arange(len(spans)), spans)
        starts = np.cumsum(spans) - spans
        positions[row, :used] = np.arange(used) - np.repeat(starts, spans)
        positions[row, used:] = np.arange(width - used)
    return documents, positions


def document_mask(documents: Tokens, causal: bool) -> NDArray[np.bool_]:
    """(B, 1, T, T) what each position of packed sequences may look at, its own document alone: True where it may.

    Padding looks at padding, as a row with nothing to look at would be undefined.

    :param documents: (B, T) as `document_places` gives them.
    """
    mask: NDArray[np.bool_] = documents[:, :, None] == documents[:, None, :]
    if causal:
        mask &= np.tri(documents.shape[1], dtype=bool)
    return mask[:, None]


def cut(tokens: Tokens, limit: int, end: int) -> Tokens:
    """At most so many tokens, with the end token last."""
    if len(tokens) <= limit:
        return tokens
    return np.append(tokens[: limit - 1], end)


def objective_for(wanted: str, shape: Architecture, section: str = "pretrain") -> str:
    """The objective that trains an architecture; `auto` is resolved, a misfit refused.

    :param section: `pretrain` or `finetune`.
    :raises SettingsError: the architecture cannot learn by the wanted objective.
    """
    fitting = _OBJECTIVES[section, shape]
    if wanted == "auto":
        return fitting[0]
    if wanted not in fitting:
        article = "a" if shape == "decoder" else "an"
        instead = " or ".join(f"'{objective}'" for objective in fitting)
        raise SettingsError(f"{section}.objective '{wanted}' does not fit {article} {shape}; use {instead}")
    return wanted
