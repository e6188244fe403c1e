"""Sections that say what is trained, and how it is scored."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raylm.settings.section import Section, Workers


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
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` (Jordan et al. 2024) orthogonalises the updates of the matrices between embeddings and output head; all
    other weights are AdamW's. Its checkpoints are for the number of workers that wrote them."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """The peak."""
    muon_learning_rate: float = Field(default=0.02, gt=0)
    """The peak for the matrices of Muon, on the same schedule."""
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
    spike_sigma: float | None = Field(default=None, gt=0)
    """Leave out, and count, micro-batches whose loss is so many standard deviations above that of the last ones, such
    as 6; ten in a row end training."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Validate and export an exponential moving average of the weights instead of the last ones: `0.999` averages over
    about the last thousand steps."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What the workers share out instead of holding it each: nothing, which is fastest where a model is small; the
    optimizer's state; gradients as well; weights as well."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 where the GPU has it, else fp32."""
    workers: Workers = "auto"
    """`auto`: one for each GPU that the cluster has or may get, or without GPUs one for four CPUs, and four at most,
    which share all CPUs. `[1, 4]`: as many of these as there are machines for, more when some come and fewer when some
    go."""
    seed: int = 1
    log_every: int = Field(default=10, ge=1)
    validate_every: int = Field(default=100, ge=1)
    validation_batches: int = Field(default=16, ge=1)
    """Global batches of one validation."""
    early_stopping: int | None = Field(default=None, ge=1)
    """End training after so many validations in a row without a lower loss."""
    checkpoint_every: int = Field(default=200, ge=1)
    keep_last: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay, besides the best one."""
    max_failures: int = Field(default=3, ge=0)
    """How often lost workers are replaced, continuing from the newest checkpoint; machines that were taken away do not
    count."""
    collective_timeout_s: float = Field(default=1_800, gt=0)
    """How long workers wait for one that does not answer before they give it up."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: a third more work, far less memory."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep the optimizer's state in the machine's memory instead of the GPU's, or with ZeRO-3 also the weights."""
    kernels: Literal["auto", "torch"] = "auto"
    """`auto`: on GPUs, FlashAttention and Liger's kernels where `raylm[gpu]` is installed and the model has them; on
    CPUs, attention that goes through packed sequences document by document. `torch`: PyTorch's own."""
    compile: bool = False
    """`torch.compile` the model: pays on long runs only."""
    verify_data: bool = False
    """Keep a hash of what each step reads, in the run's `data.jsonl`: the same for any number of workers. A step that
    comes again after a restart and reads something else ends training."""

    @model_validator(mode="after")
    def _offloadable(self) -> Self:
        needed = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload: {self.offload} needs zero_stage {needed} or more, it is {self.zero_stage}")
        return self

    @model_validator(mode="after")
    def _of_fixed_width(self) -> Self:
        if self.optimizer == "muon" and isinstance(self.workers, tuple):
            raise ValueError(f"optimizer: muon needs a fixed number of workers, not {list(self.workers)}")
        return self


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

    @model_validator(mode="after")
    def _verifiable(self) -> Self:
        if self.stream and self.verify_data:
            raise ValueError("verify_data has no effect with stream: true, whose batches are not the same in every run")
        return self


class LoraSettings(Section):
    """Low-rank adapters (Hu et al. 2021): small matrices that are trained beside frozen weights, then added to them."""

    rank: int = Field(default=8, ge=1)
    """The inner width of an adapter."""
    alpha: int = Field(default=16, ge=1)
    """What an adapter gives is multiplied by `alpha / rank`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["auto"] | tuple[str, ...] = "auto"
    """The layers that get one, by the last part of their names, such as `[q_proj, v_proj]`; `auto`: all linear ones but
    the output head."""


class FinetuneSettings(TrainingSettings):
    """Supervised training on the labelled pairs; all tasks that write text together give one model."""

    section = "finetune"

    name: str = "finetune"
    objective: Literal["auto", "seq2seq", "classify"] = "auto"
    """`seq2seq` learns to write the targets of pairs, `classify` to choose the label of a text (pairs of the task
    `classify`, and those alone). `auto`: `seq2seq`, or `classify` for an encoder."""
    start: Literal["pretrain", "scratch"] = "pretrain"
    """`pretrain`: from the best checkpoint of the pretraining run."""
    max_source_tokens: int = Field(default=256, ge=8)
    """Longer sources are cut to this many tokens, and counted."""
    max_target_tokens: int = Field(default=128, ge=8)
    task_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """How often a task's pairs are seen in an epoch, such as `{summarize: 0.5}`; 1 where not named."""
    scored_rows: int = Field(default=0, ge=0)
    """At each validation, answer so many validation pairs of each task and language, and log how good the answers are:
    chrF of translations, ROUGE-L of summaries, accuracy of labels."""
    lora: LoraSettings | None = None
    """Train adapters instead of all weights: `{}` for the values below."""


class EvaluateSettings(Section):
    """Scores on the held-out pairs, beside a baseline."""

    rows_per_task: int = Field(default=500, ge=1)
    beam_size: int = Field(default=1, ge=1)
