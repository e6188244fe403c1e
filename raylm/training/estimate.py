"""What a training run will take, told before it starts: memory of a worker, checkpoints, tokens, FLOPs, time.

Nothing is built or started: the model is made on torch's meta device, which knows shapes and holds no values. Memory
is counted tensor by tensor as PyTorch's autograd and DeepSpeed 0.19.8 hold them, without what the interpreter and its
libraries take themselves.
"""

from __future__ import annotations

import difflib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from raylm import models
from raylm.errors import ArtifactError, SettingsError, TrainingError
from raylm.progress import duration
from raylm.settings import FinetuneSettings, PretrainSettings, Settings, differences
from raylm.storage import METRICS, Manifest, StoragePath
from raylm.summary import rendered, size
from raylm.tasks import CLASSIFY, TASKS
from raylm.training import checkpoint as checkpoints
from raylm.training.batches import micro_batches_for
from raylm.training.loop import TrainingJob, open_split
from raylm.training.objectives import label_names, objective_for
from raylm.training.telemetry import read_metrics
from raylm.training.throughput import model_flops
from raylm.training.trainer import MODEL, RUN_FILE, run_directory
from raylm.training.zero import resolve_precision

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`, and what it reduces at once without ZeRO, in elements."""
LIVE = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters` and `stage3_max_reuse_distance`, in elements."""
HOLES = 1.2
"""Resident over held memory of a process on a CPU. PyTorch aligns its tensors to 64 bytes, and glibc's `posix_memalign`
does not give a freed block below 32 MB to a request of the same size (sourceware bug 14581). Measured with glibc 2.36
where 0.25 to 1.9 GB were held: 1.11 to 1.38; with jemalloc 1.01 to 1.07. See `_leaves_holes` for what is worse."""
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_FP32 = 4
_ADAM = 2 * _FP32
"""Of a weight: two moments (Kingma and Ba 2015), fp32 in every precision."""
_PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "offloaded")
_SCANNED_STEPS = 100
_MOST_PAIRS = 1_000_000
_MULTIPLE = 8
"""`raylm.training.batches.pad_to` rounds lengths up to it."""

# How many tensors of the inner width the activation of a feed-forward layer keeps: its output, which the next product
# reads; its input, but for ReLU; and what is between them, where transformers writes the function in PyTorch.
_KEPT_BY_ACTIVATION = {"relu": 1, "gelu_new": 5}
_KEPT_BY_FUSED_ACTIVATION = 2
_KEPT_BY_GATE = 2
"""The values that the activation is multiplied with, and the product."""


# ------------------------------------------------------------------------------------------ what is held


@dataclass(frozen=True)
class BatchShape:
    """The padded lengths of a micro-batch.

    :param source_tokens: of each sequence; of a model with one stack, all it reads.
    :param target_tokens: what the decoder beside an encoder reads.
    """

    sequences: int
    source_tokens: int
    target_tokens: int = 0

    @property
    def padded_tokens(self) -> int:
        return self.sequences * (self.source_tokens + self.target_tokens)


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker.

    :param activations: what the backward pass needs of the forward pass, and the loss's copies of the logits.
    :param buffers: in which DeepSpeed gathers gradients and, under ZeRO-3, weights.
    :param total: the sum of all these.
    :param offloaded: of these, what lies in the machine's memory or on its disk instead of with the worker.
    :param peak: the most that the worker holds at once: gradients and their buffers come as activations go.
    :param resident: what that takes of a machine's memory; of a GPU's, the same.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    total: int
    offloaded: int
    peak: int
    resident: int


@dataclass(frozen=True)
class Stack:
    """An encoder or a decoder, by what its activations grow with.

    :param attention_width: of all heads together.
    :param norms: layers that normalise the model's width, wherever they stand.
    :param is_rms: they are written in PyTorch, as transformers does with RMS norms, instead of being one operation.
    :param kept_inner: tensors of the inner width that a feed-forward layer keeps.
    :param is_cross: each layer looks at an encoder as well.
    :param is_fused: attention is one operation that keeps no scores.
    :param is_masked: self-attention is given a mask.
    """

    layers: int
    width: int
    heads: int
    attention_width: int
    inner_width: int
    norms: int
    is_rms: bool
    kept_inner: int
    is_cross: bool
    is_fused: bool
    is_masked: bool
    has_dropout: bool
    has_attention_dropout: bool


def stack_bytes(stack: Stack, batch: BatchShape, element: int, on_gpu: bool) -> int:
    """Bytes that autograd keeps of a stack's forward pass.

    Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models", section 4.1) add up what
    a layer keeps to 34 sbh + 5 a s² b bytes, of 16-bit numbers with dropout. The same sum here, with what differs:
    numbers have `element` bytes; dropout keeps its noise only where there is any (one byte on a GPU, a number on a
    CPU); of the scores, fused attention (Dao et al. 2022) keeps their log-sum-exp, and the mask as numbers; the
    feed-forward layer has its own width and perhaps a gate; norms may be RMS norms; a layer may look at an encoder.

    :param batch: source tokens are this stack's; with `is_cross`, the encoder's, and target tokens this stack's.
    :param element: bytes of a number.
    """
    own = batch.target_tokens if stack.is_cross else batch.source_tokens
    positions, seen = batch.sequences * own, batch.sequences * batch.source_tokens
    sublayers = stack.layers * (3 if stack.is_cross else 2)
    # A norm keeps its input, its output for the layer behind it, and an RMS norm what it scales; its input in fp32.
    norm = _FP32 + 2 * element if stack.is_rms else 2 * element
    elements = stack.layers * (
        4 * stack.attention_width + stack.kept_inner * stack.inner_width
    )  # query, key, value, out
    if stack.norms == sublayers:
        elements += stack.width  # the embeddings go into attention as they are
    if stack.has_dropout:
        elements += (sublayers + 1) * stack.width // (element if on_gpu else 1)
    kept = positions * (norm * stack.norms * stack.width + element * elements)

    pairs = positions * own if stack.is_masked or not stack.is_fused else 0
    if stack.is_cross:
        kept += element * stack.layers * 2 * stack.attention_width * (positions + seen)
        pairs += positions * batch.source_tokens
    if stack.is_fused:
        attentions = stack.layers * (2 if stack.is_cross else 1)
        return kept + attentions * _FP32 * stack.heads * positions + stack.layers * element * pairs
    copies = 3 if stack.has_attention_dropout else 1  # probabilities; noise and what it leaves of them
    return kept + stack.layers * element * copies * stack.heads * pairs


def stacks(model: PreTrainedModel, on_gpu: bool) -> list[Stack]:
    """The stacks of a model: its only one, or encoder and decoder.

    :param on_gpu: there, fused attention knows dropout.
    """
    config = model.config
    names = [name for name, _ in model.named_modules()]
    has_bias = any(name.endswith("relative_attention_bias") for name in names)  # learned: no fused attention takes it
    is_gated = any(name.endswith(("gate_proj", "gate_up_proj", "wi_1")) for name in names)
    activation = _value(
        config, "activation_function", "dense_act_fn", "hidden_act", "hidden_activation", default="gelu"
    )
    kept_inner = _KEPT_BY_ACTIVATION.get(activation, _KEPT_BY_FUSED_ACTIVATION) + _KEPT_BY_GATE * is_gated
    dropout = _value(config, "dropout", "dropout_rate", "hidden_dropout_prob", "resid_pdrop", default=0.0)
    attention_dropout = _value(
        config, "attention_dropout", "dropout_rate", "attention_probs_dropout_prob", "attn_pdrop", default=0.0
    )
    encoder = set(model.get_encoder().modules()) if config.is_encoder_decoder else set()
    found = []
    for side in ("encoder", "decoder") if config.is_encoder_decoder else ("",):
        heads = _value(config, f"{side}_attention_heads", "num_attention_heads")
        norms = [
            module
            for module in model.modules()
            if type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
            and (not encoder or (module in encoder) == (side == "encoder"))
            and module.weight.numel() == config.hidden_size  # queries and keys may have norms of their own, small ones
        ]
        found.append(
            Stack(
                layers=_value(config, f"{side}_layers", f"num_{side}_layers", "num_hidden_layers"),
                width=config.hidden_size,
                heads=heads,
                attention_width=heads * _value(config, "head_dim", "d_kv", default=config.hidden_size // heads),
                inner_width=_value(
                    config, f"{side}_ffn_dim", "d_ff", "intermediate_size", "n_inner", default=4 * config.hidden_size
                ),
                norms=len(norms),
                is_rms=any(type(norm).__name__.endswith(("RMSNorm", "T5LayerNorm")) for norm in norms),
                kept_inner=kept_inner,
                is_cross=side == "decoder",
                is_fused=not has_bias and (on_gpu or not attention_dropout),
                is_masked=side != "decoder",  # its mask is a flag of the fused operation
                has_dropout=bool(dropout),
                has_attention_dropout=bool(attention_dropout),
            )
        )
    return found


def kept_bytes(
    model: PreTrainedModel, batch: BatchShape, element: int, on_gpu: bool, recomputes: bool = False
) -> tuple[int, int]:
    """Bytes that the backward pass needs of the forward pass, without the loss's, and those it computes again.

    With `recomputes` (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"), only the inputs of layers
    are kept, and one layer at a time is computed again.
    """
    whole = stacks(model, on_gpu)
    if not recomputes:
        return sum(stack_bytes(stack, batch, element, on_gpu) for stack in whole), 0
    kept = again = 0
    for stack in whole:
        own = batch.target_tokens if stack.is_cross else batch.source_tokens
        sublayers = 3 if stack.is_cross else 2
        around = replace(stack, layers=0, norms=stack.norms - sublayers * stack.layers)
        kept += element * stack.layers * stack.width * batch.sequences * own
        kept += stack_bytes(around, batch, element, on_gpu)
        again = max(again, stack_bytes(replace(stack, layers=1, norms=sublayers), batch, element, on_gpu))
    return kept, again


def loss_bytes(model: PreTrainedModel, batch: BatchShape) -> int:
    """Bytes of the three tensors of logits that the loss holds at once, in fp32.

    In the forward pass, logits, a copy without padding's and their log-softmax; in the backward pass the last of
    these, its gradient, and the gradient of the logits.
    """
    if models.is_classifier(model.config):
        return 0  # a row of a few labels for each text
    scored = batch.sequences * (batch.target_tokens or batch.source_tokens)
    return 3 * _FP32 * scored * int(model.config.vocab_size)


def memory(
    trained: int,
    frozen: int,
    activations: tuple[int, int],
    loss: int,
    zero_stage: int,
    workers: int,
    precision: str,
    accumulates: bool,
    on_gpu: bool,
    offload: Literal["none", "optimizer", "all"] = "none",
) -> Memory:
    """What one worker holds (Rajbhandari et al. 2020, "ZeRO", section 5), in the way that DeepSpeed 0.19.8 does it.

    Its optimizers of stages 1 to 3 keep fp32 weights of their own, in fp32 as well. Gradients of stages 1 and 2 are
    copied to a bucket of `BUCKET` elements, which lives as long as a backward pass, and from there to a worker's share,
    which is copied once more for the optimizer. Of a bucket, a CPU gives only the pages that are written to.

    :param trained: weights that are trained; `frozen` the others.
    :param activations: as `kept_bytes` tells them; `loss` are the loss's, gone when the backward pass reaches weights.
    :param accumulates: a step has several micro-batches, so there are gradients while a forward pass runs.
    :param offload: what lies elsewhere: the optimizer's state, or with ZeRO-3 also the weights.
    """
    kept, again = activations
    element = _BYTES[precision]
    share = trained // workers if zero_stage else trained
    filled = element * min(trained, BUCKET)
    bucket = element * BUCKET if on_gpu else filled
    master = 0 if zero_stage == 0 and precision == "fp32" else _FP32
    weights, optimizer = element * (trained + frozen), (master + _ADAM) * share
    gradients = element * (share if zero_stage >= 2 else trained)
    standing, late = accumulates * gradients, 0  # beside a forward pass; from the start of a backward pass on
    # What is reduced is put together first: all of it, but for stages 1 and 2 with nobody to reduce it with.
    joined = filled if workers > 1 or zero_stage in (0, 3) else 0
    if zero_stage == 0:
        buffers, end = joined, gradients + max(joined, master * trained)
    elif zero_stage == 1:
        buffers, end = bucket + joined, max(bucket, gradients) + element * share + joined
        late = bucket if on_gpu else 0
        if accumulates:  # the bucket stays from a step's first micro-batch to its last
            standing, late = standing + late, 0
    elif zero_stage == 2:
        buffers, end = bucket + joined, bucket + gradients + joined + standing
        late = bucket if on_gpu else 0
    else:
        # Weights are gathered when a layer first needs them and stay for its backward pass; one worker has them all.
        gathered = element * min(trained + frozen, LIVE) if workers > 1 else 0
        weights, buffers = weights // workers, bucket + joined + gathered
        standing = gradients + bucket + gathered
        end = standing + max(joined, _FP32 * share)
    offloaded = {"none": 0, "optimizer": optimizer, "all": optimizer + weights}[offload]
    peak = weights + optimizer - offloaded + max(standing + kept + max(loss, late + again), end)
    if not on_gpu and zero_stage < 3:  # where a model is first made, in fp32; stages 1 and 2 lay it out anew
        peak = max(peak, _FP32 * (trained + frozen) + (element * trained if zero_stage else 0))
    total = weights + gradients + optimizer + kept + again + loss + buffers
    resident = peak if on_gpu else round(HOLES * peak)
    return Memory(weights, gradients, optimizer, kept + again + loss, buffers, total, offloaded, peak, resident)


def checkpoint_bytes(trained: int, frozen: int, zero_stage: int, precision: str) -> int:
    """Bytes of a checkpoint, all workers' files together: weights, and the optimizer's state with its own weights.

    Stage 0 has none of these in fp32, and stage 3 only these.
    """
    master = 0 if zero_stage == 0 and precision == "fp32" else _FP32
    saved = frozen if zero_stage == 3 else trained + frozen
    return _BYTES[precision] * saved + (master + _ADAM) * trained


def _value(config: PretrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of some values of a config that it has."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)


# ------------------------------------------------------------------------------------------- the dry run


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


@dataclass(frozen=True)
class _Start:
    """What a run would begin with, before any weights.

    :param name: how a person calls the model.
    """

    name: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast


def dry_run(settings: Settings, stage: Literal["pretrain", "finetune"]) -> Estimate:
    """What a stage would take, within seconds; nothing is built, started or written.

    :raises RaylmError: it could not run as the settings say.
    """
    training = settings.pretrain if stage == "pretrain" else settings.finetune
    storage, run = StoragePath(settings.storage), run_directory(settings, training.name)
    notes: list[str] = []
    corpus = _corpus(settings, stage, notes)
    tokens = StoragePath(corpus.directory) if corpus else None
    length = int(corpus.settings["corpus"]["sequence_length"] if corpus else settings.corpus.sequence_length)
    _check_training(training, length)
    _check_run(settings, training, run)

    start = _start(settings, training, tokens, notes)
    objective = _check_objective(training, start)
    lengths = _lengths(training, objective, start.config.is_encoder_decoder, length)
    _check_positions(training, start.config, lengths)
    model = _meta_model(settings, training, start, objective, tokens, notes)
    trained = models.parameter_count(model)
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained

    sequences = _step_sequences(training, length)
    on_gpu, precision = _numbers(training, notes)
    layout = _layout(training, sequences, lengths, precision, notes)
    read, scanned = [BatchShape(sequences, *lengths)], 1
    if isinstance(training, FinetuneSettings) and corpus and _is_at_hand(corpus, notes):
        scanned = min(training.steps, _SCANNED_STEPS)
        read = _read_pairs(training, start, corpus.directory, layout, scanned)
        largest = max(read, key=lambda batch: kept_bytes(model, batch, 4, on_gpu)[0] + loss_bytes(model, batch))
        layout, read = replace(layout, batch=largest), read * layout.workers
    held = memory(
        trained,
        frozen,
        kept_bytes(model, layout.batch, _BYTES[precision], on_gpu, training.activation_checkpointing),
        loss_bytes(model, layout.batch),
        training.zero_stage,
        layout.workers,
        precision,
        layout.micro_batches > 1,
        on_gpu,
        training.offload if on_gpu or training.offload_directory else "none",
    )
    saved = Checkpoints(
        bytes=checkpoint_bytes(trained, frozen, training.zero_stage, precision),
        kept=min(-(-training.steps // training.checkpoint_every), training.keep_last + 1),
    )
    if not on_gpu and _leaves_holes(training, layout):
        notes.append(
            "on a CPU, glibc's malloc may keep two to three times the peak here; a worker that runs with "
            "LD_PRELOAD=…/ray/core/libjemalloc.so does not"
        )
    notes += _shortages(storage, held.resident, saved.bytes * saved.kept, on_gpu)
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


def _lengths(
    training: PretrainSettings | FinetuneSettings, objective: str, is_encoder_decoder: bool, length: int
) -> tuple[int, int]:
    """The padded lengths of the longest sequence: all that a single stack reads and 0, or source and target.

    :param length: of a packed sequence.
    """

    def padded(tokens: int) -> int:
        return -(-tokens // _MULTIPLE) * _MULTIPLE

    if isinstance(training, FinetuneSettings):
        source, target = training.max_source_tokens, training.max_target_tokens
        if objective == CLASSIFY.name:
            return padded(source), 0
        return (padded(source), padded(target)) if is_encoder_decoder else (padded(source + target), 0)
    if objective != "denoise":
        return length, 0
    noise = min(max(round(length * training.noise_density), 1), length - 1)  # as `span_mask` draws it
    spans = min(max(round(noise / training.mean_span_tokens), 1), noise, length - noise)
    target = length if training.denoise_target == "text" else noise + spans
    return padded(length - noise + spans + 1), padded(target + 1)


def _step_sequences(training: PretrainSettings | FinetuneSettings, length: int) -> int:
    """How many packed sequences, or pairs of the greatest length, make up a step."""
    if isinstance(training, FinetuneSettings):
        length = training.max_source_tokens + training.max_target_tokens
    return max(training.global_batch_tokens // length, 1)


def _layout(
    training: PretrainSettings | FinetuneSettings,
    sequences: int,
    lengths: tuple[int, int],
    precision: str,
    notes: list[str],
) -> Layout:
    workers = _workers(training, notes)
    micro_batches = micro_batches_for(training.global_batch_tokens, training.micro_batch_tokens, workers)
    if sequences < workers:
        notes.append(
            f"a step has {sequences:,} sequences for {workers:,} workers: raise {training.section}.global_batch_tokens"
        )
    batch = BatchShape(-(-sequences // (workers * micro_batches)), *lengths)
    return Layout(workers, training.zero_stage, precision, micro_batches, batch)


def _leaves_holes(training: PretrainSettings | FinetuneSettings, layout: Layout) -> bool:
    """Whether memory is freed and asked for in an order in which glibc reuses little of it.

    Measured with glibc 2.36: 2.3 to 2.9 times what is held where activations are computed again, 1.7 times under ZeRO-3
    with several micro-batches, 1.4 times under the other stages.
    """
    return training.activation_checkpointing or (training.zero_stage == 3 and layout.micro_batches > 1)


def _is_at_hand(corpus: Manifest, notes: list[str]) -> bool:
    """Whether the pairs of a corpus can be looked at within a second or two."""
    is_local = StoragePath(corpus.directory).is_local
    if is_local and corpus.counts["rows"]["pairs/train"] <= _MOST_PAIRS:
        return True
    notes.append("pairs are taken as long as the settings let them be; the corpus is too large, or too far, to look")
    return False


def _read_pairs(training: FinetuneSettings, start: _Start, tokens: str, layout: Layout, steps: int) -> list[BatchShape]:
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
            shapes.append(BatchShape(sequences, source_tokens, 0 if target is None else target.shape[1]))
    return shapes


def _mean_flops(model: PreTrainedModel, read: list[BatchShape], steps: int) -> int | None:
    """FLOPs of a step, where all workers read some batches in some steps."""
    cost = model_flops(model)
    if cost is None:
        return None
    whole = sum(cost.of_batch(batch.sequences, batch.source_tokens, batch.target_tokens) for batch in read)
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
    seen = 0 if is_streamed or not corpus else corpus.counts["tokens"][_split(training.section, "train")]
    step_tokens = packed_tokens if isinstance(training, PretrainSettings) else training.global_batch_tokens
    return Work(
        steps=training.steps,
        steps_done=min(complete[-1].step, training.steps) if complete else 0,
        tokens_per_step=step_tokens,
        tokens=training.steps * step_tokens,
        epochs=round(training.steps * step_tokens / seen, 2) if seen else None,
        flops=None if step_flops is None else training.steps * step_flops,
    )


def _corpus(settings: Settings, stage: str, notes: list[str]) -> Manifest | None:
    """The manifest of the prepared corpus, if there is one.

    :raises ArtifactError: it has nothing for the stage.
    """
    tokens = StoragePath(settings.storage) / "tokens" / settings.corpus.name
    corpus = Manifest.read(tokens)
    if corpus is None:
        notes.append(f"{tokens} is not prepared: taken as the settings say, with a vocabulary as large as they allow")
        return None
    if changed := list(_changes(corpus.settings["corpus"], settings.corpus.model_dump(mode="json"))):
        what = "; ".join(changed[:3])
        notes.append(f"{tokens} was prepared with other settings ({what}); `raylm prepare` renews it")
    for name in ("train", "validation"):
        if not corpus.counts["rows"].get(_split(stage, name)):
            kind = "documents" if stage == "pretrain" else "pairs"
            raise ArtifactError(f"corpus {tokens}: has no {kind}/{name}; give it corpus.{kind} and prepare it again")
    return corpus


def _start(
    settings: Settings, training: PretrainSettings | FinetuneSettings, tokens: StoragePath | None, notes: list[str]
) -> _Start:
    """Config and tokenizer of the run: those of the pretrained run, of `model.start_from`, or of a preset.

    :param tokens: the prepared corpus, if there is one.
    :raises RaylmError: what the settings name is not there, or `transformers` does not take it.
    """
    parent = run_directory(settings, settings.pretrain.name)
    if isinstance(training, FinetuneSettings) and training.start == "pretrain":
        if Manifest.read(parent) is None:
            notes.append(f"{parent} has not finished: taken as the model that it would train")
        if (parent / MODEL / "config.json").is_file():
            with tempfile.TemporaryDirectory(prefix="raylm-model-") as local:
                (parent / MODEL).download_files(Path(local))
                return _Start(f"run {parent.name}", models.load_config(local), models.load_tokenizer(local))
    path = settings.model.start_from
    if path is None:
        tokenizer = _corpus_tokenizer(settings, tokens)
        name = f"{settings.model.family} {settings.model.size}"
        return _Start(name, _preset(settings, tokenizer), tokenizer)
    if settings.model.config:
        notes.append("model.config has no effect on a model that model.start_from names")
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:  # never an id of a hub, which would be asked for it
        models.check_model_directory(path)
    config, tokenizer = models.load_config(path), models.load_tokenizer(path)
    if tokens and (ids := len(_corpus_tokenizer(settings, tokens))) > config.vocab_size:
        raise SettingsError(
            f"model.start_from: {path} knows {config.vocab_size:,} token ids, corpus {tokens} was prepared with "
            f"{ids:,} of another tokenizer; run `raylm prepare` again"
        )
    return _Start(path, config, tokenizer)


def _corpus_tokenizer(settings: Settings, tokens: StoragePath | None) -> PreTrainedTokenizerFast:
    """The tokenizer of the corpus; before there is one, the one it is to be, or one with as many ids."""
    if tokens:
        with tempfile.TemporaryDirectory(prefix="raylm-tokenizer-") as local:
            (tokens / "tokenizer").download_files(Path(local))
            return models.load_tokenizer(local)
    if settings.corpus.tokenizer.start_from:
        return models.load_tokenizer(settings.corpus.tokenizer.start_from)
    return tokenizer_of_size(settings.corpus.tokenizer.vocab_size)


def tokenizer_of_size(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with so many ids and the special tokens of a prepared one, `<pad>` last: it can size a model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<mask>", "<extra_id_0>"]
    others = [f"<{number}>" for number in range(vocab_size - len(special) - 1)]
    ids = {token: number for number, token in enumerate([*special, *others, "<pad>"])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.add_special_tokens([*special, "<pad>"])
    names = dict(zip(("unk_token", "bos_token", "eos_token", "mask_token"), special, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", **names)


def _preset(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The config of a preset with the overrides of `model.config`.

    :raises SettingsError: one is unknown, or not what `transformers` takes.
    """
    plain = models.build_config(settings.model.model_copy(update={"config": {}}), tokenizer)
    known = plain.to_dict().keys() | plain.attribute_map.keys() | {"rope_theta", "attn_implementation"}
    for key in settings.model.config:
        if key not in known and not hasattr(plain, key):
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
            raise SettingsError(f"model.config: {plain.model_type} has no '{key}'{hint}")
    try:
        return models.build_config(settings.model, tokenizer)
    except Exception as error:  # its validators raise errors of many kinds
        raise SettingsError(_refusal(error)) from error


def _meta_model(
    settings: Settings,
    training: PretrainSettings | FinetuneSettings,
    start: _Start,
    objective: str,
    tokens: StoragePath | None,
    notes: list[str],
) -> PreTrainedModel:
    """The model that the run would train, without values.

    :raises RaylmError: `transformers` does not build it, or the corpus has no labels for a classifier.
    """
    import torch

    labels: list[str] = []
    if objective == CLASSIFY.name:
        labels = label_names(tokens) if tokens else ["0", "1"]
        if not tokens:
            notes.append("how many labels there are is not known yet: taken as two")
    models.with_head(start.config, labels, start.tokenizer.pad_token_id)
    _check_heads(start.config)
    try:
        with torch.device("meta"):
            model = models.build_model(start.config, seed=0)
    except Exception as error:  # constructors raise errors of many kinds
        raise SettingsError(_refusal(error) if not settings.model.start_from else f"{start.name}: {error}") from error
    if isinstance(training, FinetuneSettings) and training.lora:
        with torch.device("meta"):
            model = models.with_lora(model, training.lora)
    return model


def _refusal(error: Exception) -> str:
    """What `transformers` has against `model.config`: its last line, without the kind of error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"model.config: transformers does not take it: {lines[-1].strip().removeprefix('ValueError: ')}"


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
    elif precision == "bf16" and not torch.cuda.is_bf16_supported():
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


def _split(stage: str, name: str) -> str:
    return f"{'documents' if stage == 'pretrain' else 'pairs'}/{name}"


# ----------------------------------------------------------------------------------------- what goes wrong


def _check_training(training: PretrainSettings | FinetuneSettings, length: int) -> None:
    """:raises SettingsError: numbers of the section contradict each other, or the corpus.

    :param length: of a packed sequence.
    """
    section = training.section
    if training.warmup_steps > training.steps:
        raise SettingsError(
            f"{section}.warmup_steps is {training.warmup_steps:,}, longer than {section}.steps, {training.steps:,}: "
            "the learning rate would never reach its peak"
        )
    what = f"a packed sequence has {length:,} tokens"
    if isinstance(training, FinetuneSettings):
        length = training.max_source_tokens + training.max_target_tokens
        what = f"a pair may have {length:,} tokens (max_source_tokens and max_target_tokens)"
        for task in training.task_weights.keys() - TASKS.keys():
            raise SettingsError(f"finetune.task_weights: there is no task '{task}'; known: {', '.join(sorted(TASKS))}")
    for key in ("global_batch_tokens", "micro_batch_tokens"):
        if getattr(training, key) < length:
            raise SettingsError(f"{section}.{key} is {getattr(training, key):,}, but {what}; raise it to that")


def _check_run(settings: Settings, training: PretrainSettings | FinetuneSettings, run: StoragePath) -> None:
    """:raises TrainingError: the run was started with other settings."""
    if not (run / RUN_FILE).is_file():
        return
    before = {key: value for key, value in (run / RUN_FILE).read_json().items() if key in ("model", "training")}
    now = {"model": settings.model.model_dump(mode="json"), "training": training.model_dump(mode="json")}
    if changed := list(_changes(before, now)):
        raise TrainingError(
            f"run {run}: was started with other settings ({'; '.join(changed[:3])}); "
            f"choose another run name, or remove {run}"
        )


def _changes(before: Any, now: Any) -> Iterator[str]:
    """Each value that was another before; keys that there were not are passed over."""

    def common(old: Any, new: Any) -> Any:
        if isinstance(old, dict) and isinstance(new, dict):
            return {key: common(value, new.get(key)) for key, value in old.items()}
        return new

    return differences(before, common(before, now))


def _check_objective(training: PretrainSettings | FinetuneSettings, start: _Start) -> str:
    """The objective of the run.

    :raises SettingsError: the model cannot learn by it, or its tokenizer lacks a token for it.
    """
    try:
        objective = objective_for(training.objective, models.architecture(start.config), training.section)
    except SettingsError as error:
        raise SettingsError(f"{training.section}.objective: {error}") from None
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


def _check_positions(
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


def _check_heads(config: PretrainedConfig) -> None:
    """:raises SettingsError: heads that a model is built with, and fails on at its first step."""
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if shared and heads % shared:
        raise SettingsError(f"model.config: {heads} attention heads cannot share {shared} heads of keys and values")


def _shortages(storage: StoragePath, resident: int, checkpoint_total: int, on_gpu: bool) -> list[str]:
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
