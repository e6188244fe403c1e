"""OpenAI's completions and models, as far as a model of one's own can answer them.

https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from raylm.inference.answers import Output
from raylm.inference.service.bodies import Sampling, Stop, Stops, listed
from raylm.inference.service.door import Turned
from raylm.inference.service.questions import Question
from raylm.tasks import GENERATE

_UNKNOWN = {"best_of": 1, "echo": False, "logprobs": None, "n": 1, "suffix": None}
"""What is not done, by what may be said of it all the same."""


class CompletionRequest(Sampling):
    """As OpenAI's; what it does not name, such as `user`, is let pass.

    `max_tokens` is by default what `serve.decode.max_output_tokens` allows; OpenAI's is 16.
    """

    model_config = ConfigDict(extra="ignore")

    model: str
    prompt: str | Annotated[list[str], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1)
    stop: Stop | Stops | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    n: int | None = None
    suffix: str | None = None

    def question(self) -> Question:
        """What is asked of the model: to write on.

        :raises Turned: for something that is not done.
        """
        for name, usual in _UNKNOWN.items():
            if getattr(self, name) not in (None, usual):
                raise Turned(400, f"{name}: found {getattr(self, name)!r}; only {usual!r} is supported")
        prompts = listed(self.prompt)
        if self.stream and len(prompts) > 1:
            raise Turned(400, "stream: one prompt at a time can be streamed")
        return Question(
            GENERATE.name,
            tuple((prompt,) for prompt in prompts),
            is_plain=True,
            decode=self.decode(self.max_tokens),
            stop=tuple(listed(self.stop or [])),
        )


class Completion:
    """One answer to a completion request, in one piece or in several."""

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The response to a request that is not streamed.

        :raises Turned: a prompt has no answer.
        """
        for number, output in enumerate(outputs):
            if output.error is not None:
                raise Turned(400, f"prompt {number}: {output.error}")
        choices = [_choice(number, output.text or "", output) for number, output in enumerate(outputs)]
        return self._head | {"choices": choices, "usage": _usage(outputs)}

    def piece(self, text: str) -> dict[str, Any]:
        """A part of a streamed answer."""
        return self._head | {"choices": [_choice(0, text, None)]}

    def end(self, output: Output) -> dict[str, Any]:
        """The part that says why a streamed answer is over."""
        return self._head | {"choices": [_choice(0, "", output)]}

    def usage(self, output: Output) -> dict[str, Any]:
        """The part with the numbers of tokens."""
        return self._head | {"choices": [], "usage": _usage([output])}


def _choice(number: int, text: str, output: Output | None) -> dict[str, Any]:
    reason = None if output is None else "length" if output.truncated else "stop"
    return {"index": number, "text": text, "logprobs": None, "finish_reason": reason}


def _usage(outputs: Sequence[Output]) -> dict[str, int]:
    read, written = (
        sum(output.source_tokens for output in outputs),
        sum(output.output_tokens for output in outputs),
    )
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
