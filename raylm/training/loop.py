"""The training loop that every worker runs: global batches in, checkpoints and metrics out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from raylm.errors import TrainingError
from raylm.metrics import perplexity
from raylm.settings import FinetuneSettings, PretrainSettings
from raylm.storage import Manifest, StoragePath
from raylm.tasks import TASKS
from raylm.training import checkpoint as checkpoints
from raylm.training.batches import (
    BucketedOrder,
    GlobalBatch,
    PackedOrder,
    Shards,
    TokenLists,
    micro_batches_for,
)
from raylm.training.objectives import (
    IGNORE,
    MicroBatch,
    PackedDocuments,
    Pairs,
    SelfSupervision,
    Vocabulary,
    objective_for,
)
from raylm.training.schedule import learning_rate
from raylm.training.streaming import StreamedBatches
from raylm.training.telemetry import MetricsLog, Reporter, Window
from raylm.training.zero import build_engine, deepspeed_config, prepare_backend, resolve_precision

if TYPE_CHECKING:
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine
    from transformers import PretrainedConfig, PreTrainedTokenizerFast


@dataclass(frozen=True)
class TrainingJob:
    """What a worker needs to know; plain values, so that it travels.

    :param run: the run's directory.
    :param tokens: the prepared corpus' directory.
    :param start: a directory in Hugging Face layout with the weights to start from; None starts afresh.
    :param model: a directory with `config.json` and the tokenizer.
    """

    settings: PretrainSettings | FinetuneSettings
    run: str
    tokens: str
    model: str
    start: str | None


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


def train_worker(job: TrainingJob, report: Reporter) -> None:
    """Train to the last step, from the newest sound checkpoint where there is one.

    Runs on every worker of a group whose process group exists.
    """
    import ray.train.torch
    import torch
    import torch.distributed as dist

    settings, run = job.settings, StoragePath(job.run)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)), 1))
    engine, training, validation, micro_batches = setup(job, world_size, device)

    found: list[Any] = [checkpoints.newest_sound(run, lambda text: report({"note": text})) if rank == 0 else None]
    dist.broadcast_object_list(found, src=0)
    first_step = checkpoints.load(engine, found[0]) if found[0] else 0
    log = MetricsLog(run, first_step, report) if rank == 0 else None

    place = (rank, world_size, micro_batches)
    window = Window()
    for step in range(first_step, settings.steps):
        waited = time.monotonic()
        batch = training.micro_batches(step, *place)
        window.data_wait_s += time.monotonic() - waited
        rate = learning_rate(step, settings)
        loss_sum, target_tokens, padded_tokens = train_step(engine, batch, rate, settings.label_smoothing, device)
        window.add(loss_sum, target_tokens, padded_tokens)
        done = step + 1
        if done % settings.log_every == 0 or done == settings.steps:
            measured = window.metrics()
            if not math.isfinite(measured["loss"]):
                raise TrainingError(
                    f"the loss is {measured['loss']} at step {done}; lower {settings.section}.learning_rate"
                )
            if log:
                norm = engine.get_global_grad_norm()
                row = {"step": done, "learning_rate": rate, **measured}
                log.add(row | ({"gradient_norm": round(float(norm), 5)} if norm is not None else {}))
            window = Window()
        saving = done % settings.checkpoint_every == 0 or done == settings.steps
        if saving or done % settings.validate_every == 0:
            paused = time.monotonic()
            loss = validate(engine, validation, settings.validation_batches, place, device)
            row = {"step": done, "validation_loss": loss, "validation_perplexity": perplexity(loss)}
            if log:
                log.add(row)
            if saving:
                noted = row | training.position(device)
                checkpoints.save(engine, run, noted, job.settings.model_dump(mode="json"), settings.keep_last)
                if log:
                    log.publish()
            window.paused_s += time.monotonic() - paused
    if log:
        log.publish()


def setup(job: TrainingJob, world_size: int, device: torch.device) -> tuple[DeepSpeedEngine, Batches, Split, int]:
    """The engine, the training batches, the validation split, and the micro-batches of a step."""
    import torch

    from raylm import models

    settings = job.settings
    prepare_backend(device)
    tokenizer = models.load_tokenizer(job.model)
    config = models.load_config(job.model)
    validation = open_split(job, "validation", config, tokenizer)
    training = open_training(job, world_size, config, tokenizer)
    model = models.load_model(job.start) if job.start else models.build_model(config, settings.seed)
    model.config.use_cache = False
    model.train()
    micro_batches = micro_batches_for(settings.global_batch_tokens, settings.micro_batch_tokens, world_size)
    precision = resolve_precision(settings.precision, device)
    zero_config = deepspeed_config(settings, world_size, micro_batches, precision)
    engine = build_engine(model, settings, zero_config, device)
    if settings.compile:
        engine.compile()
    torch.manual_seed(settings.seed + torch.distributed.get_rank())  # dropout differs by rank
    return engine, training, validation, micro_batches


def open_training(
    job: TrainingJob, world_size: int, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> Batches:
    """The training batches: of the prepared corpus, or of the stream that Ray Train hands to this worker."""
    import ray.train

    settings = job.settings
    if isinstance(settings, FinetuneSettings) or not settings.stream:
        return open_split(job, "train", config, tokenizer)
    shard = ray.train.get_dataset_shard("train")
    sequences = max(step_sequences(settings.global_batch_tokens, StoragePath(job.tokens)) // world_size, 1)
    return StreamedBatches(shard, _self_supervision(settings, config, tokenizer), sequences, settings.seed)


def open_split(job: TrainingJob, split: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> Split:
    """The global order over one split of the prepared corpus, as the objective reads it."""
    settings, tokens = job.settings, StoragePath(job.tokens)
    if isinstance(settings, FinetuneSettings):
        shards = Shards(tokens / "pairs" / split)
        sources, targets = TokenLists(shards, "source_ids"), TokenLists(shards, "target_ids")
        lengths = np.minimum(sources.lengths, settings.max_source_tokens) + np.minimum(
            targets.lengths, settings.max_target_tokens
        )
        tasks = shards.table["task"].to_numpy(zero_copy_only=False)
        weights = np.ones(len(lengths))
        for task in TASKS:
            weights[tasks == task] = settings.task_weights.get(task, 1.0)
        order: Order = BucketedOrder(lengths, weights, settings.global_batch_tokens, settings.seed)
        limits = (settings.max_source_tokens, settings.max_target_tokens)
        return Split(order, Pairs(sources, targets, vocabulary_of(config, tokenizer), *limits))
    shards = Shards(tokens / "documents" / split)
    source = PackedDocuments(
        _self_supervision(settings, config, tokenizer),
        TokenLists(shards, "input_ids"),
        TokenLists(shards, "document_lengths"),
        settings.seed,
    )
    return Split(PackedOrder(len(shards), step_sequences(settings.global_batch_tokens, tokens), settings.seed), source)


def step_sequences(global_batch_tokens: int, tokens: StoragePath) -> int:
    """How many packed sequences make up a step.

    :param tokens: the prepared corpus' directory.
    """
    corpus = Manifest.read(tokens)
    length = corpus.settings["corpus"]["sequence_length"] if corpus else 1
    return max(global_batch_tokens // int(length), 1)


def _self_supervision(
    settings: PretrainSettings, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> SelfSupervision:
    from raylm import models

    return SelfSupervision(
        objective_for(settings.objective, models.architecture(config)),
        vocabulary_of(config, tokenizer),
        settings.noise_density,
        settings.mean_span_tokens,
        settings.denoise_target,
    )


def vocabulary_of(config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """The ids that objectives use, from a tokenizer."""
    added = tokenizer.get_added_vocab()
    sentinels = sorted(
        (token for token in added if token.startswith("<extra_id_")), key=lambda t: int(t[10:].rstrip(">"))
    )
    return Vocabulary(
        size=len(tokenizer),
        pad=tokenizer.pad_token_id,
        end=tokenizer.eos_token_id,
        mask=tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.unk_token_id,
        decoder_start=getattr(config, "decoder_start_token_id", None) or tokenizer.pad_token_id,
        sentinels=tuple(added[token] for token in sentinels),
        first_plain=max((i for i in added.values() if i != tokenizer.pad_token_id), default=-1) + 1,
    )


def train_step(
    engine: DeepSpeedEngine,
    batch: list[MicroBatch],
    rate: float,
    label_smoothing: float,
    device: torch.device,
) -> tuple[float, int, int]:
    """One optimizer step over this rank's part of a global batch.

    The loss is the sum over the global batch's target tokens divided by their number, whatever rank and
    micro-batch they fell to: so its gradient does not depend on how the batch was dealt out.

    :returns: of the global batch: the loss summed over tokens (nats), target tokens, padded tokens.
    """
    import torch
    import torch.distributed as dist

    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    counts = torch.tensor(
        [sum(m.target_tokens for m in batch), sum(m.padded_tokens for m in batch)], dtype=torch.float64
    ).to(device)
    dist.all_reduce(counts)
    target_tokens, padded_tokens = int(counts[0]), int(counts[1])
    # DeepSpeed divides by the micro-batches and averages over the ranks; both are undone here.
    scale = len(batch) * dist.get_world_size() / max(target_tokens, 1)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for micro_batch in batch:
        loss = token_loss(engine, micro_batch, label_smoothing, device)
        engine.backward(loss * scale)
        engine.step()
        total += loss.detach().double()
    dist.all_reduce(total)
    return float(total), target_tokens, padded_tokens


def token_loss(engine: Any, micro_batch: MicroBatch, label_smoothing: float, device: torch.device) -> torch.Tensor:
    """Cross entropy in nats, summed over the target tokens of a micro-batch."""
    import torch

    inputs, labels = micro_batch.tensors(device)
    logits = engine(**inputs).logits  # (B, T, V)
    pad = getattr(engine, "module", engine).config.pad_token_id
    if pad == logits.size(-1) - 1:
        # Padding is no answer. Leaving it out keeps its tied embedding at zero, the start that Marian decodes from.
        logits = logits[..., :-1]
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.size(-1)).float(),
        labels.reshape(-1),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def validate(
    engine: DeepSpeedEngine,
    split: Split,
    batches: int,
    place: tuple[int, int, int],
    device: torch.device,
) -> float:
    """Mean cross entropy, in nats per target token, over the first global batches of a split."""
    import torch
    import torch.distributed as dist

    engine.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad():
        for step in range(batches):
            for micro_batch in split.micro_batches(step, *place):
                loss = token_loss(engine, micro_batch, 0.0, device)
                totals += torch.tensor([float(loss), micro_batch.target_tokens], dtype=torch.float64).to(device)
    engine.train()
    dist.all_reduce(totals)
    return float(totals[0] / totals[1].clamp(min=1))
