"""Held-out pairs and what a model answers to them: texts by greedy or beam search, labels by the likeliest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raylm import models
from raylm.errors import ArtifactError
from raylm.settings import FinetuneSettings
from raylm.storage import StoragePath
from raylm.tasks import CLASSIFY, SUMMARIZE
from raylm.training.batches import Shards, TokenLists, pad_to
from raylm.training.objectives import Tokens, cut, padding_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_BATCH_TOKENS = 8_192


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs of one task and language."""

    task: str
    to: str | None
    sources: list[str]
    targets: list[str]
    source_ids: list[Tokens]

    @property
    def name(self) -> str:
        return f"{self.task}-{self.to}" if self.to else self.task


def read_held_out(tokens: StoragePath, split: str, rows_per_task: int, labelled: bool) -> list[HeldOut]:
    """The first pairs of each task and language in a split, in the shards' order, which is a random one.

    :param tokens: the prepared corpus' directory.
    :param labelled: the texts to classify, or all but those.
    :raises ArtifactError: there are none.
    """
    shards = Shards(tokens / "pairs" / split)
    source_ids = TokenLists(shards, "source_ids")
    chosen: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for row, (task, to) in enumerate(
        zip(shards.table["task"].to_pylist(), shards.table["to"].to_pylist(), strict=True)
    ):
        if (task == CLASSIFY.name) == labelled and len(chosen[task, to]) < rows_per_task:
            chosen[task, to].append(row)
    if not chosen:
        kind = f"labelled {split} texts" if labelled else f"{split} pairs"
        raise ArtifactError(f"corpus {tokens}: has no {kind}; give one pair source `split: {split}`")
    sets = []
    for (task, to), rows in sorted(chosen.items(), key=lambda item: (item[0][0] == SUMMARIZE.name, str(item[0]))):
        table = shards.table.take(rows)
        texts = table["source"].to_pylist(), table["target"].to_pylist()
        sets.append(HeldOut(task, to, *texts, [source_ids[row] for row in rows]))
    return sets


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    source_ids: list[Tokens],
    tuning: FinetuneSettings,
    beam_size: int = 1,
    progress: Callable[[int], None] = lambda _: None,
    in_step: bool = False,
) -> list[str]:
    """What a model writes to each source, or the label that it gives, in the sources' order.

    :param tuning: how long sources and targets may be.
    :param progress: is told how many are done.
    :param in_step: all workers go on until the last has its answers, as they hold the weights together.
    """
    sources = [cut(ids, tuning.max_source_tokens, tokenizer.eos_token_id) for ids in source_ids]
    if models.is_classifier(model.config):
        return classify(model, tokenizer, sources, progress)
    return generate(model, tokenizer, sources, tuning.max_target_tokens, beam_size, progress, in_step)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    source_ids: list[Tokens],
    max_new_tokens: int,
    beam_size: int,
    progress: Callable[[int], None] = lambda _: None,
    in_step: bool = False,
) -> list[str]:
    """A text for each source, in their order; similar lengths are decoded together.

    Padding is no answer: it is never written.
    """
    import torch

    texts = [""] * len(source_ids)
    is_decoder = models.architecture(model.config) == "decoder"
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    done = 0
    for batch in _length_batches(source_ids):
        input_ids, mask = padded([source_ids[i] for i in batch], pad, at_left=is_decoder)
        with torch.no_grad():
            outputs = model.generate(
                input_ids=torch.from_numpy(input_ids).to(model.device),
                attention_mask=torch.from_numpy(mask).to(model.device),
                max_new_tokens=max_new_tokens,
                num_beams=beam_size,
                do_sample=False,
                bad_words_ids=[[pad]] if pad != end else None,
                eos_token_id=end,
                pad_token_id=pad,
                synced_gpus=in_step,
            )
        written = outputs[:, input_ids.shape[1] :] if is_decoder else outputs
        for i, text in zip(batch, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            texts[i] = text
        done += len(batch)
        progress(done)
    return texts


def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    source_ids: list[Tokens],
    progress: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """The likeliest label of each source, in their order."""
    import torch

    names = models.labels_of(model.config)
    labels = [""] * len(source_ids)
    done = 0
    for batch in _length_batches(source_ids):
        input_ids, mask = padded([source_ids[i] for i in batch], tokenizer.pad_token_id)
        with torch.no_grad():
            logits = model(
                input_ids=torch.from_numpy(input_ids).to(model.device),
                attention_mask=torch.from_numpy(mask).to(model.device),
            ).logits
        for i, number in zip(batch, logits.argmax(dim=-1).tolist(), strict=True):  # (B, labels)
            labels[i] = names[number]
        done += len(batch)
        progress(done)
    return labels


def _length_batches(source_ids: list[Tokens]) -> Iterator[list[int]]:
    """The numbers of sources of similar lengths, the longest first, as many as fit into a budget of padded tokens."""
    order = sorted(range(len(source_ids)), key=lambda i: -len(source_ids[i]))
    start = 0
    while start < len(order):
        batch = order[start : start + max(_BATCH_TOKENS // len(source_ids[order[start]]), 1)]
        yield batch
        start += len(batch)


def padded(rows: list[Tokens], pad: int, at_left: bool = False) -> tuple[Tokens, Tokens]:
    """(B, T) ids and (B, T) attention mask.

    :param at_left: a decoder writes on behind the last position, which has to be a token of each row.
    """
    if at_left:
        reversed_ids, reversed_mask = padded([row[::-1] for row in rows], pad)
        return np.ascontiguousarray(reversed_ids[:, ::-1]), np.ascontiguousarray(reversed_mask[:, ::-1])
    input_ids = pad_to(rows, pad)
    return input_ids, padding_mask(rows, input_ids.shape[1])
