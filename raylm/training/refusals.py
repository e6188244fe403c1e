"""What is wrong with a training before it starts: settings that contradict each other, the corpus, the model."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from raylm import models
from raylm.errors import SettingsError
from raylm.settings import FinetuneSettings, PretrainSettings
from raylm.storage import StoragePath
from raylm.summary import size
from raylm.tasks import LEARNED
from raylm.training.objectives import objective_for
from raylm.training.start import Start

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_training(training: PretrainSettings | FinetuneSettings, length: int) -> list[str]:
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


def check_objective(training: PretrainSettings | FinetuneSettings, start: Start) -> str:
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
    for key, length in zip(keys, lengths, strict=True):
        if positions and length > positions:
            raise SettingsError(f"{key} makes sequences of {length:,} positions, the model has {positions:,}")


def check_heads(config: PretrainedConfig) -> None:
    """:raises SettingsError: heads that a model is built with, and fails on at its first step."""
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if shared and heads % shared:
        raise SettingsError(f"model.config: {heads} attention heads cannot share {shared} heads of keys and values")


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


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0  # an operating system that does not tell
