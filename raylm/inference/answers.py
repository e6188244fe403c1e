"""Rows answered one by one with their errors: long texts go by parts, and are put together again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from raylm.errors import RaylmError, first_line
from raylm.inference.markers import are_kept, around_markers, split_keeping_markers
from raylm.inference.prompts import Fields, Prompt
from raylm.sentences import Segments, split_text
from raylm.tasks import SUMMARIZE, TRANSLATE

NULL_TEXT = "null text"
EMPTY_TEXT = "empty text"
_SHORTER = 0.8
"""Of a long text's tokens, at most so many may be left in the summaries of its parts for these to be summarised."""

Row = tuple[str | None, ...]
"""What a row of a table says in the columns that a prompt reads."""


@dataclass(frozen=True)
class Output:
    """The answer to one row, or why there is none."""

    text: str | None
    error: str | None = None
    truncated: bool = False
    """The input was cut to the longest the model reads, or the answer stopped at the longest it may be."""
    source_tokens: int = 0
    output_tokens: int = 0
    score: float | None = None
    """Of a label or of a span, its probability; of a text, the mean log probability of its tokens."""


class Decoder(Protocol):
    """What answers single texts: an engine, or one that remembers answers."""

    def decode(self, rows: Sequence[Fields], prompt: Prompt) -> list[Output]:
        """One output for each row, in the order of the rows; a row that fails has an error of its own."""
        ...

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without what a prompt puts around it."""
        ...

    def room(self, prompt: Prompt) -> int:
        """The most tokens of a text that a prompt leaves room for."""
        ...


Answer = Callable[[Sequence[Row], Prompt], list[Output]]
"""Rows and a prompt to their outputs, in order: `answer_rows` of an engine here, or of one that a service hosts."""


def answer_rows(engine: Decoder, rows: Sequence[Row], prompt: Prompt) -> list[Output]:
    """One output for each row, in order; null and empty texts are errors.

    A text to be translated goes by its sentences, which are put together with what stood between them; each keeps its
    markers. One to be summarised that is longer than the model reads goes by parts that are not, and so does the text
    of their summaries, until one is left. A text's answer is truncated when any of its parts is; its error is the
    first of theirs.
    """
    problems = [_problem(row) for row in rows]
    asked = [tuple(value or "" for value in row) for row, problem in zip(rows, problems, strict=True) if not problem]
    is_whole_text = len(prompt.fields) == 1
    if is_whole_text and prompt.task == TRANSLATE.name:
        answered = _translated(engine, [text for (text,) in asked], prompt)
    elif is_whole_text and prompt.task == SUMMARIZE.name:
        answered = _summarized(engine, [text for (text,) in asked], prompt)
    else:
        answered = [_trimmed(output) for output in engine.decode(asked, prompt)] if asked else []
    outputs = iter(answered)
    return [Output(None, problem) if problem else next(outputs) for problem in problems]


def answer_each(answer: Answer, rows: Sequence[Row], prompt: Prompt) -> list[Output]:
    """The outputs of rows; where something fails that nobody foresaw, it is the error of its row alone."""
    try:
        return answer(rows, prompt)
    except RaylmError:
        raise
    except Exception as error:
        if len(rows) == 1:
            return [Output(None, f"failed: {type(error).__name__}: {first_line(error)}")]
        return [output for row in rows for output in answer_each(answer, [row], prompt)]


def _problem(row: Row) -> str | None:
    """Why a row cannot be asked about: a field is null, or all of them are blank."""
    if any(value is None for value in row):
        return NULL_TEXT
    return None if any(value and value.strip() for value in row) else EMPTY_TEXT


def _trimmed(output: Output) -> Output:
    return output if output.text is None else replace(output, text=output.text.strip())


def _joined(document: Segments, parts: Sequence[Output]) -> Output:
    """The output of a text whose sentences have these."""
    error = next((part.error for part in parts if part.error), None)
    scored = [(part.score, max(part.output_tokens, 1)) for part in parts if part.score is not None]
    return Output(
        text=None if error else document.join([(part.text or "").strip() for part in parts]),
        error=error,
        truncated=any(part.truncated for part in parts),
        source_tokens=sum(part.source_tokens for part in parts),
        output_tokens=sum(part.output_tokens for part in parts),
        score=sum(score * tokens for score, tokens in scored) / sum(n for _, n in scored) if scored else None,
    )


# ------------------------------------------------------------------------------------------ translating


def _translated(engine: Decoder, texts: Sequence[str], prompt: Prompt) -> list[Output]:
    documents = [split_keeping_markers(text) for text in texts]
    sentences = [sentence for document in documents for sentence in document.sentences]
    outputs = iter(_with_markers(engine, sentences, prompt))
    return [_joined(document, list(islice(outputs, len(document.sentences)))) for document in documents]


def _with_markers(engine: Decoder, sentences: Sequence[str], prompt: Prompt) -> list[Output]:
    """The outputs of sentences; of one whose markers the model lost, of the words around them."""
    if not sentences:
        return []
    outputs = engine.decode([(sentence,) for sentence in sentences], prompt)
    lost = [
        number
        for number, (sentence, output) in enumerate(zip(sentences, outputs, strict=True))
        if output.text is not None and not are_kept(sentence, output.text)
    ]
    parted = [around_markers(sentences[number]) for number in lost]
    words = [(piece,) for document in parted for piece in document.sentences]
    again = iter(engine.decode(words, prompt) if words else [])
    for number, document in zip(lost, parted, strict=True):
        first = outputs[number]
        joined = _joined(document, list(islice(again, len(document.sentences))))
        spent = joined.source_tokens + first.source_tokens, joined.output_tokens + first.output_tokens
        outputs[number] = replace(joined, source_tokens=spent[0], output_tokens=spent[1])
    return outputs


# ----------------------------------------------------------------------------------------- summarising


def _summarized(engine: Decoder, texts: Sequence[str], prompt: Prompt) -> list[Output]:
    room = engine.room(prompt)
    parts = [_parts(engine, text, room) for text in texts]
    outputs = iter(engine.decode([(part,) for pieces in parts for part in pieces], prompt) if texts else [])
    summaries = []
    for text, pieces in zip(texts, parts, strict=True):
        found = [_trimmed(next(outputs)) for _ in pieces]
        summaries.append(found[0] if len(found) == 1 else _summary_of(engine, text, found, prompt))
    return summaries


def _summary_of(engine: Decoder, text: str, parts: Sequence[Output], prompt: Prompt) -> Output:
    """The summary of what the parts of a text were summarised to, one line each."""
    lines = _joined(Segments(("",) * len(parts), ("", *["\n"] * (len(parts) - 1), "")), parts)
    # A model that does not summarise would be asked for ever: what it made of the parts is all there is.
    if lines.text is None or engine.count_tokens(lines.text) > _SHORTER * engine.count_tokens(text):
        return lines
    [summary] = _summarized(engine, [lines.text], prompt)
    return replace(
        summary,
        truncated=summary.truncated or lines.truncated,
        source_tokens=summary.source_tokens + lines.source_tokens,
        output_tokens=summary.output_tokens + lines.output_tokens,
    )


def _parts(engine: Decoder, text: str, room: int) -> list[str]:
    """A text in runs of whole sentences that the model can read, each as long as may be; a longer sentence is one."""
    if len(text.encode(errors="replace")) <= room or engine.count_tokens(text) <= room:
        return [text]
    document = split_text(text)
    if len(document.sentences) < 2:
        return [text]
    parts, part, held = [], "", 0
    for gap, sentence in zip(document.separators, document.sentences, strict=False):
        tokens = engine.count_tokens(sentence) + 1  # what stands between them
        if part and held + tokens > room:
            parts.append(part)
            part, held = sentence, tokens
        else:
            part, held = part + gap * bool(part) + sentence, held + tokens
    return [*parts, part]
