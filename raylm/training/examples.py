"""From the prepared corpus, or a stream, to the micro-batches of each step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np

from raylm.errors import ArtifactError
from raylm.settings import FinetuneSettings, PretrainSettings
from raylm.storage import StoragePath
from raylm.tasks import CLASSIFY
from raylm.training.batches import BucketedOrder, GlobalBatch, PackedOrder, Shards, TokenLists
from raylm.training.job import TrainingJob
from raylm.training.kernels import BY_DOCUMENT, FLASH
from raylm.training.labels import label_numbers
from raylm.training.objectives import (
    LabelledTexts,
    MicroBatch,
    PackedDocuments,
    Pairs,
    SelfSupervision,
    Vocabulary,
    objective_for,
    pair_weights,
)
from raylm.training.runs import corpus_manifest
from raylm.training.streaming import StreamedBatches

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerFast


class Batches(Protocol):
    """Where the examples of each step come from."""

    def micro_batches(self, step: int, rank: int, world_size: int, count: int) -> list[MicroBatch]: ...

    def position(self, device: torch.device) -> dict[str, int]:
        """What a checkpoint has to note besides its step, for a run to continue. A collective of all workers."""
        ...


class Order(Protocol):
    def batch(self, step: int) -> GlobalBatch: ...


class Source(Protocol):
    def micro_batch(self, batch: GlobalBatch) -> MicroBatch: ...


@dataclass(frozen=True)
class Split:
    """A global order and what makes tensors of it."""

    order: Order
    source: Source

    def micro_batches(self, step: int, rank: int, world_size: int, count: int) -> list[MicroBatch]:
        """A rank's share of a global batch.

        Where there are fewer examples than places, a place gets an example without labels: each forward and
        backward pass is a collective that every rank has to join.
        """
        batch = self.order.batch(step)
        parts = batch.slice(rank, world_size, count)
        spare = GlobalBatch(batch.indices[-1:], batch.epochs[-1:])
        return [
            self.source.micro_batch(part) if len(part.indices) else self.source.micro_batch(spare).unlabelled()
            for part in parts
        ]

    def position(self, device: torch.device) -> dict[str, int]:
        """Nothing: the number of the step says which batch comes next."""
        return {}


def open_training(
    job: TrainingJob, world_size: int, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> Batches:
    """The training batches: of the prepared corpus, or of the stream that Ray Train hands to this worker."""
    import ray.train

    settings = job.settings
    if isinstance(settings, FinetuneSettings) or not settings.stream:
        return open_split(job, "train", config, tokenizer)
    shard = ray.train.get_dataset_shard("train")
    length = sequence_length(StoragePath(job.tokens))
    sequences = max(step_sequences(settings.global_batch_tokens, length) // world_size, 1)
    return StreamedBatches(shard, _self_supervision(settings, config, tokenizer), sequences, settings.seed)


def open_split(job: TrainingJob, split: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> Split:
    """The global order over one split of the prepared corpus, as the objective reads it.

    :raises ArtifactError: the split has no examples for it.
    """
    from raylm import models

    settings, tokens = job.settings, StoragePath(job.tokens)
    if isinstance(settings, FinetuneSettings):
        shape = models.architecture(config)
        objective = objective_for(settings.objective, shape, settings.section)
        shards = Shards(tokens / "pairs" / split)
        sources, targets = TokenLists(shards, "source_ids"), TokenLists(shards, "target_ids")
        limits = (settings.max_source_tokens, settings.max_target_tokens)
        sides = [np.minimum(sources.lengths, limits[0]), np.minimum(targets.lengths, limits[1])]
        tasks = shards.table["task"].to_numpy(zero_copy_only=False)
        weights = pair_weights(tasks, settings.task_weights, objective)
        if not weights.any():
            raise ArtifactError(f"corpus {tokens}: pairs/{split} has nothing to learn '{objective}' from")
        if objective == CLASSIFY.name:
            sides = sides[:1]
        elif shape != "encoder-decoder":  # which reads both in one row
            sides = [sides[0] + sides[1]]
        order: Order = BucketedOrder(sides, weights, settings.global_batch_tokens, settings.seed)
        vocabulary = vocabulary_of(config, tokenizer)
        if objective == CLASSIFY.name:
            labels = label_numbers(shards.table["target"], models.labels_of(config))
            return Split(order, LabelledTexts(sources, labels, vocabulary, limits[0]))
        return Split(order, Pairs(sources, targets, vocabulary, shape, *limits))
    shards = Shards(tokens / "documents" / split)
    input_ids, document_lengths = TokenLists(shards, "input_ids"), TokenLists(shards, "document_lengths")
    sequences = step_sequences(settings.global_batch_tokens, int(input_ids.lengths[0]))
    supervision = _self_supervision(settings, config, tokenizer)
    source = PackedDocuments(supervision, input_ids, document_lengths, settings.seed)
    return Split(PackedOrder(len(shards), sequences, settings.seed), source)


def step_sequences(global_batch_tokens: int, length: int) -> int:
    """How many packed sequences of a length in tokens make up a step."""
    return max(global_batch_tokens // length, 1)


def sequence_length(tokens: StoragePath) -> int:
    """Tokens of a packed sequence of a prepared corpus.

    :param tokens: its directory.
    :raises ArtifactError: it is absent or unfinished.
    """
    return int(corpus_manifest(tokens).settings["corpus"]["sequence_length"])


def _self_supervision(
    settings: PretrainSettings, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> SelfSupervision:
    from raylm import models

    objective = objective_for(settings.objective, models.architecture(config))
    return SelfSupervision(
        objective,
        vocabulary_of(config, tokenizer),
        settings.noise_density,
        settings.mean_span_tokens,
        settings.denoise_target,
        is_flat=objective == "causal" and config._attn_implementation in (FLASH, BY_DOCUMENT),
        has_mask=objective != "causal" or not models.has_windows(config),
        first_position=models.first_position(config),
    )


def vocabulary_of(config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """The ids that objectives use, from a tokenizer."""
    added = tokenizer.get_added_vocab()
    special = sorted({-1, *added.values(), len(tokenizer)})
    last_special, plain_stop = max(pairwise(special), key=lambda run: run[1] - run[0])
    sentinels = sorted(
        (token for token in added if token.startswith("<extra_id_")), key=lambda t: int(t[10:].rstrip(">"))
    )
    start = getattr(config, "decoder_start_token_id", None)
    return Vocabulary(
        size=len(tokenizer),
        pad=tokenizer.pad_token_id,
        end=tokenizer.eos_token_id,
        mask=tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.unk_token_id,
        decoder_start=tokenizer.pad_token_id if start is None else start,
        sentinels=tuple(added[token] for token in sentinels),
        first_plain=last_special + 1,
        plain_stop=plain_stop,
    )
