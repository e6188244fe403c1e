"""What a training run will take, told before it starts: memory of a worker, checkpoints, tokens, FLOPs, time.

Nothing is built or started: the model is made on torch's meta device, which knows shapes and holds no values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from raylm import models
from raylm.errors import SettingsError
from raylm.progress import duration
from raylm.settings import FinetuneSettings, PretrainSettings, Settings
from raylm.storage import METRICS, Manifest, StoragePath
from raylm.summary import rendered, size
from raylm.tasks import CLASSIFY
from raylm.training import checkpoint as checkpoints
from raylm.training.batches import micro_batches_for
from raylm.training.examples import open_split, step_sequences
from raylm.training.job import TrainingJob
from raylm.training.labels import label_names
from raylm.training.memory import BYTES, BatchShape, Memory, checkpoint_bytes, kept_bytes, loss_bytes, memory
from raylm.training.objectives import MOST_SCORED
from raylm.training.refusals import check_start, shortages, split_of
from raylm.training.runs import MODEL, check_settings, corpus_directory, run_directory
from raylm.training.start import Start, refusal
from raylm.training.telemetry import read_metrics
from raylm.training.throughput import model_flops
from raylm.training.zero import resolve_precision, stage_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "offloaded")
_SCANNED_STEPS = 100
_MOST_PAIRS = 1_000_000


@dataclass(frozen=True)
class ModelFacts:
    """The model that would be trained."""

    name: str
    architecture: str
    objective: str
    parameters: int
    trained_parameters: int


@dataclass(frozen=True)
class Layout:
    """How a step is dealt out.

    :param micro_batches: of each worker in a step.
    :param batch: the largest micro-batch: of pairs, in the first steps; where those are not at hand, one of the longest
        that the settings let through.
    """

    workers: int
    zero_stage: int
    precision: str
    micro_batches: int
    batch: BatchShape


@dataclass(frozen=True)
class Checkpoints:
    """What stays on storage at the most: the newest ones, and the best.

    :param bytes: of each.
    """

    bytes: int
    kept: int


@dataclass(frozen=True)
class Work:
    """What the whole training computes.

    :param steps_done: what an earlier start of the run has a checkpoint of.
    :param tokens_per_step: packed tokens; of pairs the most that a step may hold, padding included.
    :param epochs: over the prepared corpus; None where there is none yet, or a stream is read.
    :param flops: of all steps; None for a model that is more than attention and dense matrices.
    """

    steps: int
    steps_done: int
    tokens_per_step: int
    tokens: int
    epochs: float | None
    flops: int | None


@dataclass(frozen=True)
class Time:
    """How long the steps that are left would take, without validation and checkpoints.

    :param tokens_per_s: positions per second that a run of the same model has measured.
    :param measured_by: that run.
    """

    tokens_per_s: float
    measured_by: str
    predicted_s: float


@dataclass(frozen=True)
class Estimate:
    """A training run before it starts.

    :param time: None where no run of this model below the storage has measured a speed.
    :param notes: what was assumed, and what may go wrong.
    """

    stage: str
    model: ModelFacts
    layout: Layout
    memory: Memory
    checkpoints: Checkpoints
    work: Work
    time: Time | None
    notes: tuple[str, ...]


def dry_run(settings: Settings, stage: Literal["pretrain", "finetune"]) -> Estimate:
    """What a stage would take, within seconds; nothing is built, started or written.

    :raises RaylmError: it could not run as the settings say.
    """
    training = settings.pretrain if stage == "pretrain" else settings.finetune
    storage, run = StoragePath(settings.storage), run_directory(settings, training.name)
    notes: list[str] = []
    check_settings(run, settings, training)
    tokens = corpus_directory(settings)
    corpus = Manifest.read(tokens)
    if corpus is None:
        notes.append(f"{tokens} is not prepared: taken as the settings say, with a vocabulary as large as they allow")
    planned = check_start(settings, training, corpus)
    notes += planned.notes
    objective, length, lengths = planned.objective, planned.length, planned.lengths
    start = _headed(planned.start, objective, tokens if corpus else None, notes)
    model = _model(settings, training, start)
    trained = models.parameter_count(model)
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained

    longest = length
    if isinstance(training, FinetuneSettings):
        longest = training.max_source_tokens + training.max_target_tokens
    sequences = step_sequences(training.global_batch_tokens, longest)
    on_gpu, precision = _numbers(training, notes)
    scored = _scored_share(training, objective, lengths)
    layout = _layout(training, length, sequences, lengths, scored, precision, notes)
    read, scanned = [_batch(sequences, lengths, scored)], 1
    if isinstance(training, FinetuneSettings) and corpus and _is_at_hand(tokens, corpus, notes):
        scanned = min(training.steps, _SCANNED_STEPS)
        read = _read_pairs(training, start, tokens.address, layout, scanned)

        def held_of(batch: BatchShape) -> int:
            return kept_bytes(model, batch, BYTES[precision], on_gpu)[0] + loss_bytes(model, batch, precision)

        largest = max(read, key=held_of)
        layout, read = replace(layout, batch=largest), read * layout.workers
    averages = training.ema_decay is not None
    held = memory(
        trained,
        frozen,
        activations=kept_bytes(model, layout.batch, BYTES[precision], on_gpu, training.activation_checkpointing),
        loss=loss_bytes(model, layout.batch, precision),
        zero_stage=layout.zero_stage,
        workers=layout.workers,
        precision=precision,
        accumulates=layout.micro_batches > 1,
        on_gpu=on_gpu,
        offload=training.offload if on_gpu else "none",
        averages=averages,
    )
    saved = Checkpoints(
        bytes=checkpoint_bytes(trained, frozen, layout.zero_stage, precision, averages),
        kept=min(-(-training.steps // training.checkpoint_every), training.keep_last + 1),
    )
    if not on_gpu and _leaves_holes(training):
        notes.append(
            "on a CPU, glibc's malloc may keep up to three times the peak with these settings; jemalloc does not "
            "(LD_PRELOAD=…/ray/core/libjemalloc.so)"
        )
    notes += shortages(storage, held.resident, saved.bytes * saved.kept, on_gpu)
    work = _work(training, corpus, run, sequences * length, _mean_flops(model, read, scanned))
    positions = (work.steps - work.steps_done) * sum(batch.padded_tokens for batch in read) / scanned
    return Estimate(
        stage=stage,
        model=ModelFacts(start.name, models.architecture(start.config), objective, trained + frozen, trained),
        layout=layout,
        memory=held,
        checkpoints=saved,
        work=work,
        time=_time(storage, start.config, layout.workers, positions),
        notes=tuple(notes),
    )


def _scored_share(training: PretrainSettings | FinetuneSettings, objective: str, lengths: tuple[int, int]) -> float:
    """Of the positions that a model writes at, those whose logits are wanted: what is hidden, what is the answer."""
    if isinstance(training, PretrainSettings):
        return training.noise_density if objective == "masked" else 1.0
    if objective == CLASSIFY.name or lengths[1]:
        return 1.0
    return training.max_target_tokens / (training.max_source_tokens + training.max_target_tokens)


def _batch(sequences: int, lengths: tuple[int, int], scored_share: float) -> BatchShape:
    positions = sequences * (lengths[1] or lengths[0])
    return BatchShape(sequences, *lengths, round(scored_share * positions) if scored_share < MOST_SCORED else None)


def _layout(
    training: PretrainSettings | FinetuneSettings,
    length: int,
    sequences: int,
    lengths: tuple[int, int],
    scored_share: float,
    precision: str,
    notes: list[str],
) -> Layout:
    """:param length: of a packed sequence."""
    workers = _workers(training, notes)
    packed = length if isinstance(training, PretrainSettings) else 1
    micro_batches = micro_batches_for(training.global_batch_tokens, training.micro_batch_tokens, workers, packed)
    if sequences < workers:
        notes.append(
            f"a step has {sequences:,} sequences for {workers:,} workers: raise {training.section}.global_batch_tokens"
        )
    batch = _batch(-(-sequences // (workers * micro_batches)), lengths, scored_share)
    return Layout(workers, stage_of(training, precision), precision, micro_batches, batch)


def _leaves_holes(training: PretrainSettings | FinetuneSettings) -> bool:
    """Whether memory is freed and asked for in an order in which glibc reuses little of it.

    Measured with glibc 2.36, over what is held: 1.1 to 1.7 under ZeRO-3, another number in every run, and 2.3 to 2.9
    where activations are computed again.
    """
    return training.activation_checkpointing or training.zero_stage == 3


def _is_at_hand(tokens: StoragePath, corpus: Manifest, notes: list[str]) -> bool:
    """Whether the pairs of a corpus can be looked at within a second or two."""
    if tokens.is_local and corpus.counts["rows"]["pairs/train"] <= _MOST_PAIRS:
        return True
    notes.append("pairs are taken as long as the settings let them be; the corpus is too large, or too far, to look")
    return False


def _read_pairs(training: FinetuneSettings, start: Start, tokens: str, layout: Layout, steps: int) -> list[BatchShape]:
    """What the first worker reads in the first steps.

    :param tokens: the prepared corpus' directory.
    """
    job = TrainingJob(training, run="", tokens=tokens, model="", start=None)
    split = open_split(job, "train", start.config, start.tokenizer)
    shapes = []
    for step in range(steps):
        for batch in split.micro_batches(step, 0, layout.workers, layout.micro_batches):
            sequences, source_tokens = batch.inputs["input_ids"].shape
            target = batch.inputs.get("decoder_input_ids")
            scored = None if batch.scored is None else len(batch.scored)
            shapes.append(BatchShape(sequences, source_tokens, 0 if target is None else target.shape[1], scored))
    return shapes


def _mean_flops(model: PreTrainedModel, read: list[BatchShape], steps: int) -> int | None:
    """FLOPs of a step, where all workers read some batches in some steps."""
    cost = model_flops(model)
    if cost is None:
        return None
    whole = sum(cost.of_batch(b.sequences, b.source_tokens, b.target_tokens, b.scored_tokens) for b in read)
    return round(whole / steps)


def _work(
    training: PretrainSettings | FinetuneSettings,
    corpus: Manifest | None,
    run: StoragePath,
    packed_tokens: int,
    step_flops: int | None,
) -> Work:
    """:param packed_tokens: of a step of pretraining."""
    complete = checkpoints.checkpoints(run)
    is_streamed = isinstance(training, PretrainSettings) and training.stream
    seen = 0 if is_streamed or not corpus else corpus.counts["tokens"][split_of(training.section, "train")]
    step_tokens = packed_tokens if isinstance(training, PretrainSettings) else training.global_batch_tokens
    return Work(
        steps=training.steps,
        steps_done=min(complete[-1].step, training.steps) if complete else 0,
        tokens_per_step=step_tokens,
        tokens=training.steps * step_tokens,
        epochs=round(training.steps * step_tokens / seen, 2) if seen else None,
        flops=None if step_flops is None else training.steps * step_flops,
    )


def _headed(start: Start, objective: str, tokens: StoragePath | None, notes: list[str]) -> Start:
    """The start with the head that its objective trains.

    :raises RaylmError: there is no such classifier, or the corpus has no labels for it.
    """
    labels: list[str] = []
    if objective == CLASSIFY.name:
        labels = label_names(tokens) if tokens else ["0", "1"]
        if not tokens:
            notes.append("how many labels there are is not known yet: taken as two")
    return replace(start, config=models.with_head(start.config, labels, start.tokenizer.pad_token_id))


def _model(settings: Settings, training: PretrainSettings | FinetuneSettings, start: Start) -> PreTrainedModel:
    """The model that the run would train, without values.

    :raises SettingsError: `transformers` does not build it, or adapters fit none of its layers.
    """
    try:
        return models.build_shapes(start.config, training.lora if isinstance(training, FinetuneSettings) else None)
    except SettingsError:
        raise
    except Exception as error:  # constructors raise errors of many kinds
        raise SettingsError(refusal(error) if not settings.model.start_from else f"{start.name}: {error}") from error


def _workers(training: PretrainSettings | FinetuneSettings, notes: list[str]) -> int:
    """How many workers to count with: those of the settings, of a range the fewest, as each then holds the most."""
    if isinstance(training.workers, tuple):
        least, most = training.workers
        notes.append(f"told for {least:,} of {least:,} to {most:,} workers; with more, each holds less")
        return least
    if training.workers == "auto":
        notes.append(f"told for one worker, as `auto` depends on the cluster; --set {training.section}.workers=8")
        return 1
    return training.workers


def _numbers(training: PretrainSettings | FinetuneSettings, notes: list[str]) -> tuple[bool, str]:
    """Whether training would run on GPUs, as this machine does, and in which precision."""
    import torch

    on_gpu = torch.cuda.is_available()
    precision = resolve_precision(training.precision, torch.device("cuda" if on_gpu else "cpu"))
    if precision != "fp32" and not on_gpu:
        notes.append(f"{training.section}.precision is {precision}, and this machine has no GPU: CPUs are slow in it")
    elif precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        notes.append(f"{training.section}.precision is bf16, which this machine's GPU does not have; fp16 is there")
    return on_gpu, precision


def _time(storage: StoragePath, config: PretrainedConfig, workers: int, positions: float) -> Time | None:
    """The time for some positions, by the newest run of the same model, or one with as many workers if there is."""
    found = []
    wanted = _comparable(config.to_diff_dict())
    for run, _ in (storage / "runs").list():
        file = run / MODEL / "config.json"
        if not file.is_file() or _comparable(file.read_json()) != wanted:
            continue
        speeds = [row["tokens_per_s"] for row in read_metrics(run) if "tokens_per_s" in row]
        complete = checkpoints.checkpoints(run)
        width = complete[-1].world_size if complete else 0
        if speeds:
            name = f"run {run.name}" + f", {width:,} worker{'s' * (width != 1)}" * bool(width)
            found.append((width == workers, (run / METRICS).info().mtime_ns or 0, median(speeds), name))
    if not found:
        return None
    *_, speed, name = max(found)
    return Time(speed, name, round(positions / speed, 1))


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what says nothing of the model."""
    ignored = ("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures")
    return {key: value for key, value in config.items() if key not in ignored}


# ---------------------------------------------------------------------------------------- for the terminal


def estimate_table(estimate: Estimate) -> str:
    """An estimate as lines of labels and values."""
    from rich.text import Text

    facts = _facts(estimate)
    width = max(len(label) for label, _ in facts)
    lines = [Text(f"{estimate.stage}: estimate", style="bold")]
    lines += [Text.assemble((f"  {label:<{width}}", "cyan"), "  ", value) for label, value in facts]
    lines += [Text.assemble(("  note  ", "yellow"), note) for note in estimate.notes]
    return rendered(lines)


def _facts(estimate: Estimate) -> list[tuple[str, str]]:
    model, layout, held = estimate.model, estimate.layout, estimate.memory
    saved, work, batch = estimate.checkpoints, estimate.work, layout.batch
    trained = f", {model.trained_parameters:,} trained" * (model.trained_parameters != model.parameters)
    resident = f"; resident {size(held.resident)}, beside interpreter and libraries" * (held.resident != held.peak)
    lengths = f"{batch.source_tokens:,}" + f" + {batch.target_tokens:,}" * bool(batch.target_tokens)
    facts = [
        ("model", f"{model.name}, {model.architecture}, {model.parameters:,} parameters{trained}"),
        ("objective", model.objective),
        ("workers", f"{layout.workers:,}, ZeRO stage {layout.zero_stage}, {layout.precision}"),
        ("micro-batch", f"{batch.sequences:,} × {lengths} tokens, {layout.micro_batches:,} a step on each worker"),
        ("memory", f"{size(held.peak)} on each worker at the peak{resident}"),
        *((f"  {part}", size(getattr(held, part))) for part in _PARTS if getattr(held, part)),
        ("checkpoints", f"{size(saved.bytes)} each, {saved.kept:,} kept: {size(saved.bytes * saved.kept)}"),
        ("steps", f"{work.steps:,}" + f", {work.steps_done:,} of them taken" * bool(work.steps_done)),
        ("tokens", f"{work.tokens:,}, {work.tokens_per_step:,} a step"),
    ]
    if work.epochs is not None:
        facts.append(("epochs", f"{work.epochs:,.2f}"))
    if work.flops is not None:
        formula = "6 N D and attention: Kaplan et al. 2020, Chowdhery et al. 2022"
        facts.append(("compute", f"{work.flops:.2e} FLOPs ({formula})"))
    if estimate.time is None:
        facts.append(("time", "unknown: no run of this model below the storage has measured a speed"))
    else:
        took = f"{estimate.time.tokens_per_s:,.0f} positions/s of {estimate.time.measured_by}"
        facts.append(("time", f"{duration(estimate.time.predicted_s)} at the {took}"))
    return facts
