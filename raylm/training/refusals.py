"""What is wrong with a training before it starts: settings that contradict each other, the corpus, the model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylm import models
from raylm.errors import ArtifactError, SettingsError
from raylm.settings import FinetuneSettings, PretrainSettings, Settings, differences
from raylm.storage import Manifest, StoragePath, without_passwords
from raylm.summary import size
from raylm.tasks import CLASSIFY, LEARNED
from raylm.training.batches import padded_length
from raylm.training.noise import span_counts
from raylm.training.objectives import objective_for
from raylm.training.runs import corpus_directory
from raylm.training.start import Start, find_start

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Planned:
    """What a run would begin with, and how it would learn.

    :param length: of a packed sequence.
    :param lengths: padded, of the longest sequence: all that a single stack reads and 0, or source and target.
    :param notes: what is hardly meant.
    """

    start: Start
    objective: str
    length: int
    lengths: tuple[int, int]
    notes: tuple[str, ...]


def check_start(settings: Settings, training: PretrainSettings | FinetuneSettings, corpus: Manifest | None) -> Planned:
    """What a run would begin with.

    :param corpus: the manifest of the prepared one, if there is one.
    :raises RaylmError: the run could not learn, or would fail at some step.
    """
    notes = _check_corpus(settings, training.section, corpus) if corpus else []
    length = int(corpus.settings["corpus"]["sequence_length"] if corpus else settings.corpus.sequence_length)
    notes += _check_numbers(training, length)
    start = find_start(settings, training, corpus_directory(settings) if corpus else None)
    objective = _check_objective(training, start)
    lengths = _padded_lengths(training, objective, start.config.is_encoder_decoder, length)
    check_positions(training, start.config, lengths)
    _check_heads(start.config)
    return Planned(start, objective, length, lengths, (*notes, *start.notes))


def shortages(storage: StoragePath, resident: int, checkpoint_total: int, on_gpu: bool) -> list[str]:
    """Notes where this machine's memory or its disk is smaller than what is needed."""
    import torch

    notes = []
    there = torch.cuda.get_device_properties(0).total_memory if on_gpu else _physical_memory()
    if there and resident > there:
        where = "this machine's GPU" if on_gpu else "this machine"
        notes.append(f"a worker needs {size(resident)} of memory, {where} has {size(there)}")
    if storage.is_local:
        place = storage.local()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if checkpoint_total > free:
            notes.append(f"checkpoints need {size(checkpoint_total)}, {place} has {size(free)} free")
    return notes


def split_of(stage: str, name: str) -> str:
    """Which rows of a corpus a stage reads."""
    return f"{'documents' if stage == 'pretrain' else 'pairs'}/{name}"


def _check_corpus(settings: Settings, stage: str, corpus: Manifest) -> list[str]:
    """A note where the corpus is not as the settings say.

    :raises ArtifactError: it has nothing for the stage.
    """
    for name in ("train", "validation"):
        if not corpus.counts["rows"].get(split_of(stage, name)):
            kind = "documents" if stage == "pretrain" else "pairs"
            raise ArtifactError(
                f"corpus {corpus.directory}: has no {kind}/{name}; give it corpus.{kind} and prepare it again"
            )
    changed = list(_changes(corpus.settings["corpus"], without_passwords(settings.corpus.model_dump(mode="json"))))
    what = "; ".join(changed[:3])
    return [f"{corpus.directory} was prepared with other settings ({what}); `raylm prepare` renews it"] * bool(changed)


def _changes(before: Any, now: Any) -> Iterator[str]:
    """Each value that was another before; keys that there were not are passed over."""

    def common(old: Any, new: Any) -> Any:
        if isinstance(old, dict) and isinstance(new, dict):
            return {key: common(value, new.get(key)) for key, value in old.items()}
        return new

    return differences(before, common(before, now))


def _check_numbers(training: PretrainSettings | FinetuneSettings, length: int) -> list[str]:
    """Notes on numbers of the section that are hardly meant.

    :param length: of a packed sequence.
    :raises SettingsError: numbers of the section contradict each other, or the corpus.
    """
    section, notes = training.section, []
    if training.warmup_steps > training.steps:
        notes.append(
            f"{section}.warmup_steps is {training.warmup_steps:,}, longer than {section}.steps, {training.steps:,}: "
            "the learning rate reaches its peak at the last step"
        )
    what = f"a packed sequence has {length:,} tokens"
    if isinstance(training, FinetuneSettings):
        length = training.max_source_tokens + training.max_target_tokens
        what = f"a pair may have {length:,} tokens (max_source_tokens and max_target_tokens)"
        for task in training.task_weights.keys() - LEARNED.keys():
            raise SettingsError(
                f"finetune.task_weights: there is no task '{task}'; known: {', '.join(sorted(LEARNED))}"
            )
    for key in ("global_batch_tokens", "micro_batch_tokens"):
        if getattr(training, key) < length:
            raise SettingsError(f"{section}.{key} is {getattr(training, key):,}, but {what}; raise it to that")
    return notes


def _check_objective(training: PretrainSettings | FinetuneSettings, start: Start) -> str:
    """The objective of the run.

    :raises SettingsError: the model cannot learn by it, or its tokenizer lacks a token for it.
    """
    objective = objective_for(training.objective, models.architecture(start.config), training.section)
    tokenizer = start.tokenizer
    lacking = None
    if tokenizer.eos_token_id is None:
        lacking = "a token that ends texts"
    elif objective == "denoise" and getattr(training, "denoise_target", "") == "spans":
        if not any(token.startswith("<extra_id_") for token in tokenizer.get_added_vocab()):
            lacking = "tokens <extra_id_0>, … for hidden spans"
    elif objective in ("denoise", "masked") and tokenizer.mask_token_id is None and tokenizer.unk_token_id is None:
        lacking = "a mask token, and one for what is unknown"
    if lacking:
        raise SettingsError(
            f"{training.section}.objective '{objective}': the tokenizer of {start.name} lacks {lacking}"
        )
    return objective


def _padded_lengths(
    training: PretrainSettings | FinetuneSettings, objective: str, is_encoder_decoder: bool, length: int
) -> tuple[int, int]:
    """The padded lengths of the longest sequence: all that a single stack reads and 0, or source and target.

    :param length: of a packed sequence.
    """
    if isinstance(training, FinetuneSettings):
        source, target = training.max_source_tokens, training.max_target_tokens
        if objective == CLASSIFY.name:
            return padded_length(source), 0
        if not is_encoder_decoder:
            return padded_length(source + target), 0
        return padded_length(source), padded_length(target)
    if objective != "denoise":
        return length, 0
    noise, spans = span_counts(length, training.noise_density, training.mean_span_tokens)
    target = length if training.denoise_target == "text" else noise + spans
    return padded_length(length - noise + spans + 1), padded_length(target + 1)


def check_positions(
    training: PretrainSettings | FinetuneSettings, config: PretrainedConfig, lengths: tuple[int, int]
) -> None:
    """:raises SettingsError: sequences are longer than the model has positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(training, PretrainSettings):
        keys = ["corpus.sequence_length", "corpus.sequence_length"]
    else:
        keys = ["finetune.max_source_tokens", "finetune.max_target_tokens"]
        if not config.is_encoder_decoder:  # which reads one behind the other
            keys[0] = " + ".join(keys)
    if positions:
        positions -= models.first_position(config)
    for key, length in zip(keys, lengths, strict=True):
        if positions and length > positions:
            raise SettingsError(f"{key} makes sequences of {length:,} positions, the model has {positions:,}")


def _check_heads(config: PretrainedConfig) -> None:
    """:raises SettingsError: heads that a model is built with, and fails on at its first step."""
    heads, shared = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads and shared and heads % shared:
        raise SettingsError(f"model.config: {heads} attention heads cannot share {shared} heads of keys and values")


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0  # an operating system that does not tell
