"""The training loop that every worker runs: global batches in, checkpoints and metrics out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from raylm.errors import ArtifactError
from raylm.metrics import perplexity
from raylm.settings import FinetuneSettings, PretrainSettings
from raylm.storage import Manifest, StoragePath
from raylm.tasks import CLASSIFY
from raylm.training import checkpoint as checkpoints
from raylm.training.batches import (
    BucketedOrder,
    GlobalBatch,
    PackedOrder,
    Shards,
    TokenLists,
    micro_batches_for,
)
from raylm.training.control import Attention
from raylm.training.guard import Patience, SpikeGuard
from raylm.training.objectives import (
    IGNORE,
    LabelledTexts,
    MicroBatch,
    PackedDocuments,
    Pairs,
    SelfSupervision,
    Vocabulary,
    label_numbers,
    objective_for,
    pair_weights,
)
from raylm.training.schedule import learning_rate
from raylm.training.streaming import StreamedBatches
from raylm.training.telemetry import MetricsLog, Reporter, Window
from raylm.training.throughput import ModelFlops, dtype_of, group_peak, model_flops
from raylm.training.zero import born_sharded, build_engine, deepspeed_config, prepare_backend, resolve_precision

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


def train_worker(job: TrainingJob, report: Reporter, attention: Attention | None = None) -> bool:
    """Whether training has come to its last step, from the newest sound checkpoint where there is one.

    Runs on every worker of a group whose process group exists.

    :param attention: says when to pause before that: a checkpoint is written then.
    """
    import ray.train.torch
    import torch
    import torch.distributed as dist

    settings, run = job.settings, StoragePath(job.run)
    attention = attention or Attention()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)), 1))
    found: list[Any] = [checkpoints.newest_sound(run, lambda text: report({"note": text})) if rank == 0 else None]
    dist.broadcast_object_list(found, src=0)
    checkpoint: checkpoints.Checkpoint | None = found[0]
    peak = group_peak(device, dtype_of(resolve_precision(settings.precision, device)))
    engine, training, validation, micro_batches, flops = setup(job, world_size, device, checkpoint)
    first_step = checkpoint.step if checkpoint else 0
    log = MetricsLog(run, first_step, report, settings.model_dump(mode="json")) if rank == 0 else None
    guard, patience = SpikeGuard(settings.spike_sigma, settings.section), Patience(settings.early_stopping)
    if checkpoint:
        guard.restore(checkpoint.manifest.metrics["guard"])
        patience.restore(checkpoint.manifest.metrics["patience"])
    writer = checkpoints.Writer(run, settings.model_dump(mode="json"), settings.keep_last)
    report({"step": first_step, "world_size": world_size})

    place = (rank, world_size, micro_batches)
    window = Window(device, peak)
    for step in range(first_step, settings.steps):
        waited = time.monotonic()
        batch = training.micro_batches(step, *place)
        window.data_wait_s += time.monotonic() - waited
        # Of step and rank alone, so that a run that continues draws the same dropout.
        torch.manual_seed(int(np.random.SeedSequence((settings.seed, step, rank)).generate_state(1)[0]))
        rate = learning_rate(step, settings)
        result = train_step(engine, batch, rate, settings.label_smoothing, device, guard, attention.votes(), flops)
        window.add(result.loss_sum, result.target_tokens, result.padded_tokens, result.real_tokens, result.flops)
        done = step + 1
        is_last = done == settings.steps
        pause = None if is_last else attention.reason(*result.votes)
        if done % settings.log_every == 0 or is_last:
            measured = window.metrics()
            if log:
                norm = engine.get_global_grad_norm()
                row = {"step": done, "learning_rate": rate, **measured}
                log.add(row | ({"gradient_norm": round(float(norm), 5)} if norm is not None else {}))
            window = Window(device, peak)
        is_saving = done % settings.checkpoint_every == 0 or is_last or pause is not None
        noted: dict[str, Any] = {"step": done}
        # A machine that will be taken away leaves time for a checkpoint, perhaps, and not for more.
        if pause is None and (is_saving or done % settings.validate_every == 0):
            started = time.monotonic()
            loss = validate(engine, validation, settings.validation_batches, place, device)
            window.validation_s += time.monotonic() - started
            noted |= {"validation_loss": loss, "validation_perplexity": perplexity(loss)}
            if log:
                log.add(noted.copy())
            is_last |= patience.is_over(loss)
        if is_saving or is_last:
            started = time.monotonic()
            state = {"guard": guard.state(), "patience": patience.state()}
            writer.save(engine, noted | training.position(device) | state)
            if log:
                log.publish()
            window.checkpoint_s += time.monotonic() - started
        if pause is not None:
            writer.finish()
            if log:
                log.close(is_finished=False)
            report({"note": f"step {done}: training pauses ({pause}), with a checkpoint"})
            return False
        if is_last:
            break
    writer.finish()
    if log:
        log.close()
    return True


def setup(
    job: TrainingJob, world_size: int, device: torch.device, checkpoint: checkpoints.Checkpoint | None
) -> tuple[DeepSpeedEngine, Batches, Split, int, ModelFlops | None]:
    """The engine, the training batches, the validation split, the micro-batches of a step, what the model costs.

    :param checkpoint: what the engine holds afterwards, unless it is None.
    """
    from raylm import models

    settings = job.settings
    prepare_backend(device)
    tokenizer = models.load_tokenizer(job.model)
    config = models.load_config(job.model)
    validation = open_split(job, "validation", config, tokenizer)
    training = open_training(job, world_size, config, tokenizer)
    micro_batches = micro_batches_for(settings.global_batch_tokens, settings.micro_batch_tokens, world_size)
    precision = resolve_precision(settings.precision, device)
    converted = checkpoint is not None and checkpoints.needs_conversion(checkpoint, world_size)
    zero_config = deepspeed_config(settings, world_size, micro_batches, precision, load_universal=converted)
    seed = settings.seed
    with born_sharded(zero_config):
        model = models.load_model(job.start, config, seed) if job.start else models.build_model(config, seed)
    model.config.use_cache = False
    if isinstance(settings, FinetuneSettings) and settings.lora:
        model = models.with_lora(model, settings.lora)
    model.train()
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    flops = model_flops(model)
    engine = build_engine(model, settings, zero_config, device)
    if checkpoint:
        checkpoints.load(engine, checkpoint)
    if settings.compile:
        engine.compile()
    return engine, training, validation, micro_batches, flops


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
        lengths = np.minimum(sources.lengths, limits[0]) + np.minimum(targets.lengths, limits[1])
        tasks = shards.table["task"].to_numpy(zero_copy_only=False)
        weights = pair_weights(tasks, settings.task_weights, objective)
        if not weights.any():
            raise ArtifactError(f"corpus {tokens}: pairs/{split} has nothing to learn '{objective}' from")
        order: Order = BucketedOrder(lengths, weights, settings.global_batch_tokens, settings.seed)
        vocabulary = vocabulary_of(config, tokenizer)
        if objective == CLASSIFY.name:
            labels = label_numbers(shards.table["target"], models.labels_of(config))
            return Split(order, LabelledTexts(sources, labels, vocabulary, limits[0]))
        return Split(order, Pairs(sources, targets, vocabulary, shape, *limits))
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


@dataclass(frozen=True)
class StepResult:
    """Of the whole global batch."""

    loss_sum: float
    """In nats, over the target tokens of the micro-batches that were not left out."""
    target_tokens: int
    """Of these."""
    padded_tokens: int
    real_tokens: int
    flops: int | None
    """Of the model, forward and backward; None where nobody knows."""
    skipped: int
    """Micro-batches that were left out as spikes."""
    votes: tuple[int, ...]
    """For each question, how many ranks said yes."""


def train_step(
    engine: DeepSpeedEngine,
    batch: list[MicroBatch],
    rate: float,
    label_smoothing: float,
    device: torch.device,
    guard: SpikeGuard,
    votes: Sequence[bool] = (),
    flops: ModelFlops | None = None,
) -> StepResult:
    """One optimizer step over this rank's part of a global batch.

    The loss is the sum over the global batch's target tokens divided by their number, whatever rank and
    micro-batch they fell to: so its gradient does not depend on how the batch was dealt out.

    :param votes: this rank's answers to questions that all ranks have to agree on.
    :raises TrainingError: training has diverged.
    """
    import torch
    import torch.distributed as dist

    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    targets = [micro_batch.target_tokens for micro_batch in batch]
    padded = sum(micro_batch.padded_tokens for micro_batch in batch)
    real = sum(micro_batch.real_tokens for micro_batch in batch)
    cost = sum(flops.of_inputs(micro_batch.inputs) for micro_batch in batch) if flops else 0
    counted = [*targets, padded, real, cost, *map(int, votes)]
    counts = torch.tensor(counted, dtype=torch.float64).to(device)
    dist.all_reduce(counts)
    whole = [int(count) for count in counts.tolist()]
    targets, (padded, real, cost, *said) = whole[: len(batch)], whole[len(batch) :]
    # DeepSpeed divides by the micro-batches and averages over the ranks; both are undone here.
    scale = len(batch) * dist.get_world_size() / max(sum(targets), 1)
    losses = torch.zeros(len(batch), dtype=torch.float64, device=device)
    skipped = []
    for number, micro_batch in enumerate(batch):
        loss = token_loss(engine, micro_batch, label_smoothing, device)
        losses[number] = loss.detach()
        if guard.sigma is not None:
            dist.all_reduce(losses[number])
            if guard.is_spike(float(losses[number]) / max(targets[number], 1)):
                skipped.append(number)
        engine.backward(loss * (0.0 if number in skipped else scale))
        engine.step()
    if guard.sigma is None:
        dist.all_reduce(losses)
        guard.is_spike(float(losses.sum()) / max(sum(targets), 1))
    losses[skipped] = 0.0
    trained = sum(count for number, count in enumerate(targets) if number not in skipped)
    return StepResult(float(losses.sum()), trained, padded, real, cost if flops else None, len(skipped), tuple(said))


def token_loss(engine: Any, micro_batch: MicroBatch, label_smoothing: float, device: torch.device) -> torch.Tensor:
    """Cross entropy in nats, summed over the target tokens, or labelled texts, of a micro-batch."""
    import torch

    inputs, labels = micro_batch.tensors(device)
    logits = engine(**inputs).logits  # (B, T, V), or of a classifier (B, labels)
    config = getattr(engine, "module", engine).config
    pad, end = config.pad_token_id, config.eos_token_id
    if labels.dim() > 1 and pad == logits.size(-1) - 1 and pad not in (end if isinstance(end, list) else [end]):
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
