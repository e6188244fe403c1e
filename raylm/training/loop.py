"""The training loop that every worker runs: global batches in, checkpoints and metrics out."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raylm import models
from raylm.errors import TrainingError
from raylm.metrics import perplexity
from raylm.settings import FinetuneSettings, PretrainSettings
from raylm.storage import StoragePath
from raylm.training import checkpoint as checkpoints
from raylm.training.average import WeightAverage
from raylm.training.batches import micro_batches_for
from raylm.training.checkpoint import Checkpoint
from raylm.training.control import Attention
from raylm.training.examples import Batches, Split, open_split, open_training, sequence_length
from raylm.training.guard import Patience, SpikeGuard
from raylm.training.job import TrainingJob
from raylm.training.kernels import attention_for, fuse
from raylm.training.objectives import objective_for
from raylm.training.record import DataRecord
from raylm.training.runs import corpus_fingerprint
from raylm.training.schedule import learning_rate
from raylm.training.scoring import Scorer
from raylm.training.steps import StepResult, train_step, validate
from raylm.training.telemetry import MetricsLog, Reporter, Window
from raylm.training.throughput import ModelFlops, dtype_of, group_peak, model_flops
from raylm.training.zero import (
    agreed_precision,
    born_sharded,
    build_engine,
    deepspeed_config,
    prepare_backend,
    stage_of,
)

if TYPE_CHECKING:
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine
    from numpy.typing import NDArray
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


def train_worker(job: TrainingJob, report: Reporter, attention: Attention | None = None) -> bool:
    """Whether training has come to its end, from the newest sound checkpoint where there is one.

    Runs on every worker of a group whose process group exists.

    :param attention: says when to pause before that: a checkpoint is written then.
    """
    return _Worker(job, report, attention or Attention()).train()


class _Worker:
    """One worker's part in a training; all workers do the same, and rank 0 writes the log besides."""

    def __init__(self, job: TrainingJob, report: Reporter, attention: Attention) -> None:
        import ray.train.torch
        import torch
        import torch.distributed as dist

        settings, run = job.settings, StoragePath(job.run)
        self._settings, self._report, self._attention = settings, report, attention
        self._rank, world_size = dist.get_rank(), dist.get_world_size()
        self._device = ray.train.torch.get_device()
        if self._device.type == "cpu":
            cpus = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
            torch.set_num_threads(max(min(cpus, os.cpu_count() or 1), 1))
            # Adam's moments of rarely seen tokens decay to numbers that a CPU computes with a hundred times slower.
            torch.set_flush_denormal(True)
        if job.corpus and corpus_fingerprint(StoragePath(job.tokens)) != job.corpus:
            raise TrainingError(f"corpus {StoragePath(job.tokens)}: was prepared anew while run {run} trains on it")

        leads = self._rank == 0
        found: list[Any] = [checkpoints.newest_sound(run, lambda text: report({"note": text})) if leads else None]
        dist.broadcast_object_list(found, src=0)
        checkpoint: Checkpoint | None = found[0]
        precision = agreed_precision(settings.precision, self._device)
        if checkpoint and settings.precision == "auto":
            begun, here = checkpoint.manifest.settings.get("computed_in", precision), precision
            if begun != here and leads:
                report({"note": f"training goes on in {begun}, as it began; these machines would take {here}"})
            precision = begun
        self._peak = group_peak(self._device, dtype_of(precision))
        self._setup = setup(job, world_size, self._device, checkpoint, precision)
        self._place = (self._rank, world_size, self._setup.micro_batches)
        self._guard = SpikeGuard(settings.spike_sigma, settings.section)
        self._patience = Patience(settings.early_stopping)
        if checkpoint:
            self._guard.restore(checkpoint.manifest.metrics["guard"])
            self._patience.restore(checkpoint.manifest.metrics["patience"])
        self._first_step = checkpoint.step if checkpoint else 0
        plain_settings = settings.model_dump(mode="json")
        self._log = MetricsLog(run, self._first_step, report, plain_settings) if leads else None
        self._record = DataRecord(run, self._first_step) if leads and settings.verify_data else None
        resolved = {"zero_stage": stage_of(settings, precision), "computed_in": precision}
        self._writer = checkpoints.Writer(run, plain_settings | resolved, settings.keep_last)
        report({"step": self._first_step, "world_size": world_size})

    def train(self) -> bool:
        """Whether the end is reached, or training was asked to pause before."""
        settings = self._settings
        self._window = Window(self._device, self._peak)
        for step in range(self._first_step, settings.steps):
            result = self._step(step)
            done = step + 1
            is_last = done == settings.steps
            pause = None if is_last else self._attention.reason(result.tally[0])
            if done % settings.log_every == 0 or is_last:
                self._note_window(step)
            is_saving = is_last or done % settings.checkpoint_every == 0
            noted: dict[str, Any] = {"step": done}
            # A machine that will be taken away leaves time for a checkpoint, perhaps, and not for more.
            if pause is None and (is_saving or done % settings.validate_every == 0):
                noted |= self._validate(done)
                if self._patience.is_over(noted["validation_loss"]) and not is_last:
                    is_last = True
                    if done % settings.log_every:
                        self._note_window(step)
            if is_saving or is_last or pause is not None:
                self._save(noted)
            if pause is not None:
                self._end(is_finished=False)
                self._report({"note": f"step {done}: training pauses ({pause}), with a checkpoint"})
                return False
            if is_last:
                break
        self._end(is_finished=True)
        return True

    def _step(self, step: int) -> StepResult:
        import torch

        settings, window = self._settings, self._window
        started = time.monotonic()
        batch = self._setup.training.micro_batches(step, *self._place)
        window.data_wait_s += time.monotonic() - started
        hashes = [number for micro_batch in batch for number in micro_batch.hashes()] if settings.verify_data else []
        # Of step and rank alone, so that a run that continues draws the same dropout.
        torch.manual_seed(int(np.random.SeedSequence((settings.seed, step, self._rank)).generate_state(1)[0]))
        result = train_step(
            self._setup.engine,
            batch,
            learning_rate(step, settings),
            settings.label_smoothing,
            self._device,
            self._guard,
            (int(self._attention.vote()), len(hashes), sum(hashes)),
            self._setup.flops,
        )
        if self._setup.average:
            self._setup.average.update(step + 1)
        if self._record:
            self._record.add(step + 1, *result.tally[1:])
        window.add(result)
        return result

    def _note_window(self, step: int) -> None:
        measured = self._window.metrics()
        if self._record:
            self._record.publish()
        if self._log:
            norm = self._setup.engine.get_global_grad_norm()
            gradient = {"gradient_norm": round(float(norm), 5)} if norm is not None else {}
            rate = learning_rate(step, self._settings)
            self._log.add({"step": step + 1, "learning_rate": rate, **measured, **gradient})
        self._window = Window(self._device, self._peak)

    def _validate(self, done: int) -> dict[str, float]:
        started = time.monotonic()
        use, batches = self._setup, self._settings.validation_batches
        with use.average.in_place() if use.average else nullcontext():
            found = validate(use.engine, use.validation, batches, self._place, self._device, use.token_bytes)
            scores = use.scorer.scores(use.engine) if use.scorer else {}
        self._window.validation_s += time.monotonic() - started
        measured = {"validation_loss": found.loss, "validation_perplexity": perplexity(found.loss), **scores}
        if found.bits_per_byte is not None:
            measured["validation_bits_per_byte"] = found.bits_per_byte
        if self._log:
            self._log.add({"step": done, **measured})
        return measured

    def _save(self, noted: dict[str, Any]) -> None:
        started = time.monotonic()
        state = {"guard": self._guard.state(), "patience": self._patience.state()}
        noted = noted | self._setup.training.position(self._device) | state
        # First, so that no checkpoint is there without the rows of the steps before it.
        if self._record:
            self._record.publish()
        if self._log:
            self._log.publish()
        self._writer.save(self._setup.engine, self._setup.average, noted)
        self._window.checkpoint_s += time.monotonic() - started

    def _end(self, is_finished: bool) -> None:
        self._writer.finish()
        if self._log:
            self._log.close(is_finished=is_finished)


class Setup(NamedTuple):
    """What a worker trains with."""

    engine: DeepSpeedEngine
    average: WeightAverage | None
    training: Batches
    validation: Split
    token_bytes: NDArray[np.int64] | None
    """Bytes of text that each token stands for, where bits per byte are to be told."""
    scorer: Scorer | None
    micro_batches: int
    """Of a step, on each worker."""
    flops: ModelFlops | None
    """What the model costs; None where nobody knows."""


def setup(
    job: TrainingJob, world_size: int, device: torch.device, checkpoint: Checkpoint | None, precision: str
) -> Setup:
    """What a worker of a group trains with.

    :param checkpoint: what the engine holds afterwards, unless it is None.
    :param precision: `fp32`, `bf16` or `fp16`.
    """
    settings = job.settings
    prepare_backend(device)
    tokenizer = models.load_tokenizer(job.model)
    config = models.load_config(job.model)
    objective = objective_for(settings.objective, models.architecture(config), settings.section)
    # A compiled model would be compiled anew for each number of documents.
    chosen = attention_for(config, objective, precision, device) if settings.kernels == "auto" else None
    if chosen and not settings.compile:
        config._attn_implementation = chosen
    validation = open_split(job, "validation", config, tokenizer)
    training = open_training(job, world_size, config, tokenizer)
    length = sequence_length(StoragePath(job.tokens)) if isinstance(settings, PretrainSettings) else 1
    micro_batches = micro_batches_for(settings.global_batch_tokens, settings.micro_batch_tokens, world_size, length)
    converted = checkpoint is not None and checkpoints.needs_conversion(checkpoint, world_size)
    if checkpoint and converted and settings.optimizer == "muon":
        raise TrainingError(
            f"{checkpoint.directory}: written by {checkpoint.world_size} workers with {settings.section}.optimizer: "
            f"muon, whose state DeepSpeed does not convert for {world_size}; set {settings.section}.workers="
            f"{checkpoint.world_size}"
        )
    zero_config = deepspeed_config(settings, world_size, micro_batches, precision, load_universal=converted)
    model = _model(job, config, zero_config, device)
    flops = model_flops(model)
    engine = build_engine(model, settings, zero_config, device)
    average = WeightAverage(engine, settings.ema_decay) if settings.ema_decay else None
    if checkpoint:
        checkpoints.load(engine, average, checkpoint)
    if settings.compile:
        engine.compile()
    return Setup(
        engine=engine,
        average=average,
        training=training,
        validation=validation,
        token_bytes=models.token_bytes(tokenizer) if objective == "causal" else None,
        scorer=_scorer(job, config, tokenizer),
        micro_batches=micro_batches,
        flops=flops,
    )


def _model(
    job: TrainingJob, config: PretrainedConfig, zero_config: dict[str, Any], device: torch.device
) -> PreTrainedModel:
    """The model as it is trained, with the weights that the run starts from."""
    settings, seed = job.settings, job.settings.seed
    with born_sharded(zero_config):
        model = models.load_model(job.start, config, seed) if job.start else models.build_model(config, seed)
    model.config.use_cache = False
    if settings.kernels == "auto":
        fuse(model, device)
    if isinstance(settings, FinetuneSettings) and settings.lora:
        model = models.with_lora(model, settings.lora)
    model.train()
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _scorer(job: TrainingJob, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> Scorer | None:
    if isinstance(job.settings, FinetuneSettings) and job.settings.scored_rows:
        return Scorer(StoragePath(job.tokens), job.settings, config, tokenizer)
    return None
