"""Sections of batch jobs and of the service."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raylm.settings.section import Ascending, Section, ShareOrNumber, Workers


class DecodeSettings(Section):
    """How text is generated: shared by batch jobs, evaluation and the service."""

    engine: Literal["auto", "ctranslate2", "vllm", "transformers"] = "auto"
    """`auto`: vLLM for decoders on GPUs where it is installed, CTranslate2 for all it knows, else transformers."""
    compute_type: Literal[
        "auto", "int8", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16", "float32"
    ] = "auto"
    """`auto`: int8 on CPUs and half precision on GPUs; in PyTorch float32 on CPUs."""
    beam_size: int = Field(default=1, ge=1)
    length_penalty: float = 1.0
    repetition_penalty: float = Field(default=1.0, gt=0)
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    temperature: float = Field(default=0.0, ge=0)
    """Above 0, answers are drawn: from the `top_k` likeliest tokens (0: all), up to the probability `top_p`."""
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0)
    """Of what is drawn."""
    min_output_tokens: int = Field(default=0, ge=0)
    max_output_tokens: int = Field(default=256, ge=1)
    max_input_tokens: int | None = Field(default=None, ge=1)
    """Longer segments are cut and flagged `truncated`; default: what the model was made for."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Padded source tokens of one engine batch; default: 4,096 on GPUs, 1,024 on CPUs, whose caches hold no more."""
    scores: bool = False
    """Whether each answer has a score: the mean log probability of its tokens. Labels always have a probability."""

    @model_validator(mode="after")
    def _check(self) -> DecodeSettings:
        if self.temperature and self.beam_size > 1:
            raise ValueError(f"beam_size is {self.beam_size}, but temperature draws answers: set one of them back")
        if self.min_output_tokens > self.max_output_tokens:
            raise ValueError(f"min_output_tokens {self.min_output_tokens} is more than {self.max_output_tokens}")
        return self

    def batch_tokens_on(self, device: Literal["cpu", "cuda"]) -> int:
        """Padded source tokens of one engine batch on a device."""
        return self.batch_tokens or (4_096 if device == "cuda" else 1_024)


class CheckSettings(Section):
    """What answers have to reach before a batch job publishes them."""

    references: str
    """The column of the input with the right answers."""
    min_chrf: float = Field(ge=0, le=100)
    rows: int = Field(default=1_000, ge=1)
    """How many are looked at."""


class BatchSettings(Section):
    """`raylm batch-translate`, `batch-summarize`, `batch-generate`, `batch-classify`, `batch-answer`."""

    decode: DecodeSettings = DecodeSettings()
    prompt: str | None = None
    """Words of your own, with the names of columns in braces: `Write a title for this: {text}`."""
    system: str | None = None
    """The system message, for models that chat."""
    chunk_rows: int = Field(default=1_024, ge=1)
    """Rows of one unit of work: what a crash can cost a worker. More in very large jobs, which have 50,000 at most."""
    row_limit_s: float = Field(default=300, gt=0, le=86_400)
    """A worker that takes longer for a row, or for a batch of rows in its engine, is ended, and the row an error."""
    max_errors: ShareOrNumber | None = None
    """The most rows that may have an error, as a share (`0.01`, `1%`) or a number (`20`), before the job fails; by
    default it does not."""
    check: CheckSettings | None = None
    workers: Workers = "auto"
    """Engine actors, no more than there are chunks; `auto`: one for each GPU that is up, on clusters without GPUs one
    for each CPU, and where none is up yet as many as may come; `[1, 16]`: more while there is work for them, for which
    an autoscaling cluster grows."""


class ServeSettings(Section):
    """`raylm serve`."""

    host: str = "127.0.0.1"
    port: int = Field(default=8_000, ge=0, le=65_535)
    decode: DecodeSettings = DecodeSettings()
    replicas: Annotated[
        Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]], Ascending
    ] = 1
    """Of the model. `[1, 4]`: as many of these as the requests keep busy; `[0, 4]`: none while nobody asks, so that the
    first request then waits for the model to be loaded."""
    surge: bool = True
    """Whether an update starts new replicas before it stops old ones; false where there is no room for both, so that
    requests wait in between."""
    idle_s: float = Field(default=300, ge=0)
    """How long a replica that is not needed stays."""
    threads: int = Field(default=1, ge=1)
    """CPUs of each replica."""
    max_batch_tokens: int = Field(default=1_024, ge=1)
    """The most source tokens that are decoded at once, of requests that arrive together or of a batch job: the longest
    that one has to wait behind another."""
    batch_wait_s: float = Field(default=0.01, ge=0)
    """How long a request waits for others to be decoded with."""
    batch_share: float = Field(default=0.5, gt=0, le=1)
    """The most of a replica's time that batch jobs get while people ask; after ten seconds without any, all of it."""
    row_limit_s: float = Field(default=300, gt=0)
    """A replica that takes longer for a batch in its engine hangs, and is replaced."""
    max_queued_requests: int = Field(default=256, ge=1)
    """Requests beyond this wait nowhere: they are answered 429 at once."""
    max_request_texts: int = Field(default=1_024, ge=1)
    max_request_bytes: int = Field(default=4_000_000, ge=1)
    request_timeout_s: float = Field(default=120, gt=0)
    """A request that is not answered by then is given up, with 504."""
    keys: str | None = None
    """A file of API keys, on any storage, as `raylm serve-key` writes it; without one, whoever reaches the port may
    ask. It is read again when it changes."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Of each key that has no limit of its own."""
    texts_per_minute: int | None = Field(default=None, ge=1)
    """As `requests_per_minute`."""
