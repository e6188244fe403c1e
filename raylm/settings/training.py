"""Sections that say what is trained, and how it is scored."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from raylm.settings.section import Section


class ModelSettings(Section):
    """The model to build, or to start from."""

    name: str = "default"
    """Names the finished artifact: `<storage>/models/<name>`."""
    family: Literal["marian", "llama", "bert", "t5"] = "marian"
    size: Literal["tiny", "small", "base", "large"] = "tiny"
    start_from: str | None = None
    """A Hugging Face id or a directory; its architecture, weights and tokenizer replace family and size."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Values of the Hugging Face config to override, such as `{encoder_layers: 6}`."""


class TrainingSettings(Section):
    """What pretraining and fine-tuning share."""

    section: ClassVar[str]
    """What the section is called in the YAML."""

    name: str
    """Names the run: `<storage>/runs/<name>`."""
    steps: int = Field(default=400, ge=1)
    """Optimizer steps."""
    global_batch_tokens: int = Field(default=4_096, ge=32)
    """Padded tokens of one optimizer step over all workers."""
    micro_batch_tokens: int = Field(default=4_096, ge=16)
    """The most padded tokens that one worker holds at once; gradients accumulate to the global batch."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """The peak."""
    schedule: Literal["wsd", "cosine", "linear", "inverse_sqrt", "constant"] = "wsd"
    warmup_steps: int = Field(default=50, ge=0)
    decay_ratio: float = Field(default=0.25, ge=0, le=1)
    """For `wsd`: the last share of the steps, in which the rate falls to its minimum."""
    min_learning_rate_ratio: float = Field(default=0.05, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.98, ge=0, lt=1)
    epsilon: float = Field(default=1e-6, gt=0)
    """Adam's. Well above the rounding noise of gradients that are zero in theory, which 1e-8 would amplify."""
    gradient_clip: float = Field(default=1.0, ge=0)
    """Largest norm of the global gradient; 0 turns clipping off."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 where the GPU has it, else fp32."""
    workers: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """`auto`: one for each GPU of the cluster, or without GPUs one for each CPU, four at most."""
    seed: int = 1
    log_every: int = Field(default=10, ge=1)
    validate_every: int = Field(default=100, ge=1)
    validation_batches: int = Field(default=16, ge=1)
    """Global batches of one validation."""
    checkpoint_every: int = Field(default=200, ge=1)
    keep_last: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay, besides the best one."""
    max_failures: int = Field(default=3, ge=0)
    """How often lost workers are replaced, continuing from the newest checkpoint."""
    compile: bool = False
    """`torch.compile` the model: pays on long runs only."""


class PretrainSettings(TrainingSettings):
    """Self-supervised training on the packed documents."""

    section = "pretrain"

    name: str = "pretrain"
    objective: Literal["auto", "denoise", "causal", "masked"] = "auto"
    """`auto`: what suits the model: `denoise` (encoder-decoder), `causal` (decoder), `masked` (encoder)."""
    noise_density: float = Field(default=0.15, gt=0, lt=1)
    """Share of tokens that `denoise` and `masked` hide."""
    mean_span_tokens: float = Field(default=3.0, ge=1)
    """Mean length of a hidden span, for `denoise`."""
    denoise_target: Literal["text", "spans"] = "text"
    """What `denoise` writes: the whole text (as BART, learned soonest) or only the hidden spans (as T5, cheaper)."""
    stream: bool = False
    """Clean and tokenise the documents while training, on CPUs of its own: for a corpus that is not to be written down.
    `raylm prepare` then prepares a sample of them (`corpus.tokenizer.sample_mb`), for the tokenizer and validation.
    Copies are found within `corpus.shard_mb` alone; a run that continues skips nothing, but reads some text again."""


class FinetuneSettings(TrainingSettings):
    """Supervised training on the labelled pairs; all tasks together give one model."""

    section = "finetune"

    name: str = "finetune"
    objective: Literal["seq2seq"] = "seq2seq"
    start: Literal["pretrain", "scratch"] = "pretrain"
    """`pretrain`: from the best checkpoint of the pretraining run."""
    max_source_tokens: int = Field(default=256, ge=8)
    """Longer sources are cut to this many tokens, and counted."""
    max_target_tokens: int = Field(default=128, ge=8)
    task_weights: dict[str, float] = Field(default_factory=dict)
    """How often a task's pairs are seen in an epoch, such as `{summarize: 0.5}`; 1 where not named."""


class EvaluateSettings(Section):
    """Scores on the held-out pairs, beside a baseline."""

    rows_per_task: int = Field(default=500, ge=1)
    beam_size: int = Field(default=1, ge=1)
