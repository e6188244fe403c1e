"""Sections of batch jobs and of the service."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raylm.settings.section import Section


class DecodeSettings(Section):
    """How text is generated: shared by batch jobs, evaluation and the service."""

    beam_size: int = Field(default=1, ge=1)
    length_penalty: float = 1.0
    max_output_tokens: int = Field(default=256, ge=1)
    max_input_tokens: int | None = Field(default=None, ge=1)
    """Longer segments are cut and flagged `truncated`; default: what the model was made for."""
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    batch_tokens: int = Field(default=4_096, ge=1)
    """Padded source tokens of one engine batch."""
    compute_type: Literal["auto", "int8", "float16", "bfloat16", "float32"] = "auto"
    """`auto`: int8 on CPUs, float16 on GPUs."""


class BatchSettings(Section):
    """`raylm batch-translate`, `batch-summarize`."""

    decode: DecodeSettings = DecodeSettings()
    chunk_rows: int = Field(default=512, ge=1)
    """Rows of one unit of work: what a crash can cost a worker."""
    workers: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Engine actors; `auto`: one for each GPU, else one for each CPU, no more than there are chunks."""


class ServeSettings(Section):
    """`raylm serve`."""

    host: str = "127.0.0.1"
    port: int = Field(default=8_000, ge=0, le=65_535)
    decode: DecodeSettings = DecodeSettings()
    replicas: int = Field(default=1, ge=1)
    max_batch_texts: int = Field(default=64, ge=1)
    """The most texts of concurrent requests that are decoded together."""
    batch_wait_s: float = Field(default=0.01, ge=0)
    max_queued_requests: int = Field(default=256, ge=1)
    """Requests beyond this wait nowhere: they are answered 429 at once."""
    max_request_texts: int = Field(default=1_024, ge=1)
