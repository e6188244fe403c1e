"""A training loop with nothing around it, over batches that lie ready in memory: plain PyTorch, or DeepSpeed's engine.

The model, its weights and its batches are those that raylm would train with; see `tests/benchmarks/training.py`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from raylm import models
from raylm.settings import FinetuneSettings, PretrainSettings
from raylm.training.examples import open_split
from raylm.training.job import TrainingJob
from raylm.training.objectives import IGNORE
from raylm.training.zero import build_engine, build_optimizer, deepspeed_config, prepare_backend


def loss_of(model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def torch_steps(model: nn.Module, batches: list[Any], settings: Any) -> Iterator[None]:
    optimizer = build_optimizer(model, settings)
    for inputs, labels in batches:
        loss_of(model, inputs, labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        yield


def deepspeed_steps(model: nn.Module, batches: list[Any], settings: Any, world_size: int) -> Iterator[None]:
    device = torch.device("cpu")
    prepare_backend(device)
    engine = build_engine(model, settings, deepspeed_config(settings, world_size, 1, "fp32"), device)
    for inputs, labels in batches:
        engine.backward(loss_of(engine, inputs, labels))
        engine.step()
        yield


def work(rank: int, asked: dict[str, Any], meeting: str) -> None:
    world_size = asked["workers"]
    torch.set_num_threads(max((os.cpu_count() or 1) // world_size, 1))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    kind = FinetuneSettings if asked["section"] == "finetune" else PretrainSettings
    settings = kind.model_validate(asked["settings"])
    config, tokenizer = models.load_config(asked["model"]), models.load_tokenizer(asked["model"])
    split = open_split(TrainingJob(settings, "", asked["tokens"], asked["model"], None), "train", config, tokenizer)
    batches, padded = [], []
    for step in range(settings.steps):
        [micro_batch] = split.micro_batches(step, rank, world_size, 1)
        padded.append(micro_batch.padded_tokens)
        batches.append(micro_batch.tensors(torch.device("cpu")))
    model = models.build_model(config, settings.seed)
    model.config.use_cache = False
    model.train()
    plain = asked["loop"] == "torch"
    steps = torch_steps(model, batches, settings) if plain else deepspeed_steps(model, batches, settings, world_size)
    times = [time.perf_counter()]
    for _ in steps:
        times.append(time.perf_counter())
    seconds = np.diff(times)[asked["warmup"] :]
    if rank == 0:
        tokens = sum(padded[asked["warmup"] :]) * world_size
        result = {"seconds": float(seconds.sum()), "tokens_per_s": tokens / float(seconds.sum())}
        sys.stdout.write(json.dumps(result) + "\n")
    dist.destroy_process_group()


def main() -> None:
    asked = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as directory:
        meeting = f"{directory}/meeting"
        if asked["workers"] == 1:
            work(0, asked, meeting)
        else:
            torch.multiprocessing.spawn(work, (asked, meeting), nprocs=asked["workers"])


if __name__ == "__main__":
    main()
