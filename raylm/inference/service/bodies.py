"""The bodies of requests and responses."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from raylm.inference.answers import Output

Stop = Annotated[str, Field(min_length=1)]
Stops = Annotated[list[Stop], Field(max_length=4)]


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextRequest(Asked):
    text: str | list[str]


class TranslateRequest(TextRequest):
    to: str | None = None
    """The target language; may be left out where the model has one."""
    source_language: str | None = Field(default=None, alias="from")
    """For models that know several."""


class Sampling(BaseModel):
    """How a text is to be written otherwise than the service is set."""

    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    seed: int | None = Field(default=None, ge=0)
    """Of what is drawn; CTranslate2, which shares one source of chance, does not keep to it."""

    def decode(self, max_output_tokens: int | None) -> dict[str, Any]:
        """What of it is said, as values of `serve.decode`; an answer is drawn without beams."""
        said = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "seed")}
        said |= {"max_output_tokens": max_output_tokens, "beam_size": 1 if self.temperature else None}
        return {name: value for name, value in said.items() if value is not None}


class GenerateRequest(TextRequest, Sampling):
    max_output_tokens: int | None = Field(default=None, ge=1)
    stop: Stop | Stops = []
    """The answer ends before the first of these."""
    stream: bool = False
    """Whether to answer one text piece by piece, as server-sent events: `{"text": "…"}` each, and at last
    `{"done": true, "truncated": …, "error": …}`."""


class AnswerRequest(Asked):
    question: str | list[str]
    context: str | list[str]
    """As many as there are questions, or one for all."""


class Answer(BaseModel):
    text: str | None
    truncated: bool
    error: str | None

    @classmethod
    def of(cls, output: Output) -> Answer:
        return cls(text=output.text, truncated=output.truncated, error=output.error)


class Label(BaseModel):
    label: str | None
    score: float | None
    truncated: bool
    error: str | None

    @classmethod
    def of(cls, output: Output) -> Label:
        return cls(label=output.text, score=output.score, truncated=output.truncated, error=output.error)


class TranslateResponse(BaseModel):
    model: str
    translations: list[Answer]


class SummarizeResponse(BaseModel):
    model: str
    summaries: list[Answer]


class GenerateResponse(BaseModel):
    model: str
    generated: list[Answer]


class ClassifyResponse(BaseModel):
    model: str
    labels: list[Label]


class AnswerResponse(BaseModel):
    model: str
    answers: list[Answer]


def listed(text: str | list[str]) -> list[str]:
    """What may be said as one text or as several."""
    return [text] if isinstance(text, str) else text
