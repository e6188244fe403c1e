"""What transformers' Trainer makes of the same model, tokens and settings; prints what it reached, as JSON.

Run in raylm's environment: its torch and transformers are the very ones that raylm trains with. What is not asked for
is left at Trainer's defaults.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from raylm import metrics, models
from raylm.storage import StoragePath
from raylm.training.batches import Shards, TokenLists
from raylm.training.generation import generate, read_held_out
from raylm.training.objectives import cut


class Rows(Dataset[dict[str, Any]]):
    """A dataset that can be gone through as well."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))


class PairsDataset(Rows):
    """The training pairs of a prepared corpus."""

    def __init__(self, tokens: str, end: int, max_source_tokens: int, max_target_tokens: int) -> None:
        shards = Shards(StoragePath(tokens) / "pairs" / "train")
        self._sources, self._targets = TokenLists(shards, "source_ids"), TokenLists(shards, "target_ids")
        self._end, self._limits = end, (max_source_tokens, max_target_tokens)

    def __len__(self) -> int:
        return len(self._sources.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        source = cut(self._sources[index], self._limits[0], self._end)
        target = cut(self._targets[index], self._limits[1], self._end)
        return {"input_ids": source.tolist(), "labels": target.tolist()}


class PackedDataset(Rows):
    """The packed sequences, as `run_clm.py` of transformers' examples makes them by joining texts and cutting."""

    def __init__(self, tokens: str) -> None:
        self._rows = TokenLists(Shards(StoragePath(tokens) / "documents" / "train"), "input_ids")

    def __len__(self) -> int:
        return len(self._rows.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._rows[index]}


class DocumentsDataset(Rows):
    """The documents of the packed sequences one by one, for the collator to pad."""

    def __init__(self, tokens: str) -> None:
        shards = Shards(StoragePath(tokens) / "documents" / "train")
        self._rows, lengths = TokenLists(shards, "input_ids"), TokenLists(shards, "document_lengths")
        self._places = [
            (row, start, start + length)
            for row in range(len(shards))
            for start, length in zip(np.cumsum(lengths[row]) - lengths[row], lengths[row], strict=True)
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, start, stop = self._places[index]
        return {"input_ids": self._rows[row][start:stop]}


@dataclass
class Measured(TrainerCallback):  # type: ignore[misc]
    """When each step ended, and how many real tokens it had; ends training at a time."""

    seconds: float | None = None
    tokens: int = 0
    ends: list[tuple[float, int]] = field(default_factory=list)
    start: float = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()
        self.ends.append((self.start, 0))

    def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
        now = time.perf_counter()
        self.ends.append((now, self.tokens))
        control.should_training_stop |= self.seconds is not None and now - self.start >= self.seconds

    def counted(self, inputs: dict[str, torch.Tensor]) -> None:
        """Source and target tokens of a batch of pairs; of a batch of documents, its tokens."""
        self.tokens += int(inputs["attention_mask"].sum())
        if "decoder_input_ids" in inputs:
            self.tokens += int((inputs["labels"] != -100).sum())

    def rate(self, warmup: int) -> dict[str, float]:
        (begin, before), (end, after) = self.ends[warmup], self.ends[-1]
        return {"tokens_per_s": (after - before) / (end - begin), "step_s": (end - begin) / (len(self.ends) - warmup)}


def counting(kind: type[Trainer], measured: Measured) -> type[Trainer]:
    """A trainer that tells of its batches."""

    class Counting(kind):  # type: ignore[misc, valid-type]
        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
            measured.counted(inputs)
            return super().training_step(model, inputs, *rest)

    return Counting


def arguments(asked: dict[str, Any], directory: str) -> dict[str, Any]:
    """What both kinds of trainer are told: raylm's settings in their words."""
    settings = asked["settings"]
    return {
        "output_dir": directory,
        "per_device_train_batch_size": asked["batch_size"],
        "max_steps": settings["steps"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": settings["schedule"],
        "warmup_steps": settings["warmup_steps"],
        "weight_decay": settings["weight_decay"],
        "adam_beta1": settings["beta1"],
        "adam_beta2": settings["beta2"],
        "adam_epsilon": settings["epsilon"],
        "max_grad_norm": settings["gradient_clip"],
        "seed": settings["seed"],
        "train_sampling_strategy": asked["sampling"],
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }


def train_pairs(asked: dict[str, Any], directory: str) -> dict[str, Any]:
    """The speed of fine-tuning on pairs and, where asked for, how well the model then translates."""
    config, tokenizer = models.load_config(asked["model"]), models.load_tokenizer(asked["model"])
    model, settings = models.build_model(config, asked["settings"]["seed"]), asked["settings"]
    limits = settings["max_source_tokens"], settings["max_target_tokens"]
    measured = Measured(asked.get("seconds"))
    trainer = counting(Seq2SeqTrainer, measured)(
        model=model,
        args=Seq2SeqTrainingArguments(**arguments(asked, directory)),
        train_dataset=PairsDataset(asked["tokens"], tokenizer.eos_token_id, *limits),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        callbacks=[measured],
    )
    trainer.train()
    result: dict[str, Any] = measured.rate(asked["warmup"])
    if asked.get("rows"):
        result["train_s"] = measured.ends[-1][0] - measured.start
        [test] = read_held_out(StoragePath(asked["tokens"]), "test", asked["rows"], labelled=False)
        sources = [cut(ids, limits[0], tokenizer.eos_token_id) for ids in test.source_ids]
        model.config.use_cache = True
        texts = generate(model.eval(), tokenizer, sources, limits[1], 1)
        result |= metrics.score(("chrf", "bleu"), texts, test.targets, test.to)
    return result


def train_documents(asked: dict[str, Any], directory: str) -> dict[str, Any]:
    """The speed of causal pretraining, on packed sequences or on padded documents."""
    config, tokenizer = models.load_config(asked["model"]), models.load_tokenizer(asked["model"])
    model = models.build_model(config, asked["settings"]["seed"])
    measured = Measured()
    dataset = PackedDataset(asked["tokens"]) if asked["packed"] else DocumentsDataset(asked["tokens"])
    trainer = counting(Trainer, measured)(
        model=model,
        args=TrainingArguments(**arguments(asked, directory)),
        train_dataset=dataset,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[measured],
    )
    trainer.train()
    return measured.rate(asked["warmup"])


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(asked["cpus"])
    with tempfile.TemporaryDirectory() as place:
        work = {"pairs": train_pairs, "documents": train_documents}[asked["work"]]
        sys.stdout.write("\n" + json.dumps(work(asked, str(Path(place) / "trainer"))) + "\n")
