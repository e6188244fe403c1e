"""What a worker has to know to train."""

from __future__ import annotations

from dataclasses import dataclass

from raylm.settings import FinetuneSettings, PretrainSettings


@dataclass(frozen=True)
class TrainingJob:
    """What a worker needs to know; plain values, so that it travels.

    :param run: the run's directory.
    :param tokens: the prepared corpus' directory.
    :param start: a directory in Hugging Face layout with the weights to start from; None starts afresh.
    :param model: a directory with `config.json` and the tokenizer.
    :param corpus: the corpus' fingerprint, that of what the run was started on; None does not look.
    """

    settings: PretrainSettings | FinetuneSettings
    run: str
    tokens: str
    model: str
    start: str | None
    corpus: str | None = None
