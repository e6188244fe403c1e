"""What a model is asked to do: a task names what it reads of a row, its result column and its scores."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

SUMMARY_TOKEN, ANSWER_TOKEN = ">>summary<<", ">>answer<<"


def language_token(to: str) -> str:
    """The token that asks for a language: `>>de<<`, as multilingual OPUS-MT models use it."""
    return f">>{to.replace('-', '_')}<<"


@dataclass(frozen=True)
class Task:
    """Text in, text or label out.

    :param name: as in `raylm batch-<name>`.
    :param column: where a batch job writes the answer.
    :param done: the participle for an output file's name: `input.translated.parquet`.
    :param metrics: the scores of `raylm.metrics` that suit it, the most telling one first.
    :param fields: what it reads of a row.
    :param token: what stands before the text for models that raylm makes; of `translate` it depends on the language.
    :param template: how several fields become one text.
    """

    name: str
    column: str
    done: str
    metrics: tuple[str, ...]
    fields: tuple[str, ...] = ("text",)
    token: str | None = None
    template: str | None = None

    def text(self, fields: Sequence[str]) -> str:
        """What it reads of a row as one text."""
        return self.template.format_map(dict(zip(self.fields, fields, strict=True))) if self.template else fields[0]

    def parted(self, source: str) -> tuple[str, ...]:
        """What it read of a row, of the one text that `text` made of it."""
        words = (re.escape(literal) for literal, *_ in Formatter().parse(self.template or ""))
        match = re.fullmatch("".join(f"{one}(.*?)" for one in words), source, re.DOTALL)
        return match.groups() if match and self.template else (source,) * len(self.fields)

    def prompt_token(self, to: str | None = None) -> str | None:
        """The task token that stands before the text, for models that raylm makes; None where nothing does.

        :param to: the target language, for `translate`.
        :raises ValueError: `translate` without a language.
        """
        if self != TRANSLATE:
            return self.token
        if not to:
            raise ValueError("translate needs a target language, such as 'de'")
        return language_token(to)


TRANSLATE = Task("translate", column="translation", done="translated", metrics=("chrf", "bleu", "exact_match"))
SUMMARIZE = Task(
    "summarize",
    column="summary",
    done="summarized",
    metrics=("rougeL", "rouge1", "rouge2"),
    token=SUMMARY_TOKEN,
)
CLASSIFY = Task("classify", column="label", done="classified", metrics=("accuracy", "macro_f1"))
GENERATE = Task("generate", column="generated", done="generated", metrics=("exact_match", "rougeL"))
ANSWER = Task(
    "answer",
    column="answer",
    done="answered",
    metrics=("f1", "exact_match"),
    fields=("question", "context"),
    token=ANSWER_TOKEN,
    template="question: {question} context: {context}",  # as T5 has learned it (Raffel et al. 2020, appendix D.15)
)

TASKS = {task.name: task for task in (TRANSLATE, SUMMARIZE, CLASSIFY, GENERATE, ANSWER)}
LEARNED = {task.name: task for task in (TRANSLATE, SUMMARIZE, ANSWER, CLASSIFY)}
"""What labelled pairs teach a model of raylm's own."""
