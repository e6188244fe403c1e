"""What a model is asked to do: a task names what it reads of a row, its result column and its scores."""

from __future__ import annotations

from dataclasses import dataclass

SUMMARY_TOKEN = ">>summary<<"


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
    """

    name: str
    column: str
    done: str
    metrics: tuple[str, ...]
    fields: tuple[str, ...] = ("text",)

    def prompt_token(self, to: str | None = None) -> str:
        """The task token that stands before the text, for models that raylm makes.

        :param to: the target language, for `translate`.
        :raises ValueError: `translate` without a language, or a task that no token asks for.
        """
        if self == SUMMARIZE:
            return SUMMARY_TOKEN
        if self != TRANSLATE:
            raise ValueError(f"{self.name} has no task token")
        if not to:
            raise ValueError("translate needs a target language, such as 'de'")
        return language_token(to)


TRANSLATE = Task("translate", column="translation", done="translated", metrics=("chrf", "bleu", "exact_match"))
SUMMARIZE = Task("summarize", column="summary", done="summarized", metrics=("rougeL", "rouge1", "rouge2"))
CLASSIFY = Task("classify", column="label", done="classified", metrics=("accuracy", "macro_f1"))
GENERATE = Task("generate", column="generated", done="generated", metrics=("exact_match", "rougeL"))
ANSWER = Task(
    "answer", column="answer", done="answered", metrics=("exact_match", "rouge1"), fields=("question", "context")
)

TASKS = {task.name: task for task in (TRANSLATE, SUMMARIZE, CLASSIFY, GENERATE, ANSWER)}
LEARNED = {task.name: task for task in (TRANSLATE, SUMMARIZE, CLASSIFY)}
"""What raylm trains a model of its own for."""
