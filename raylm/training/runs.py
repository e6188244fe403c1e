"""A run's directory, the corpus that it reads, and what it was started with."""

from __future__ import annotations

from typing import Any

from raylm.errors import ArtifactError, TrainingError
from raylm.settings import FinetuneSettings, ModelSettings, PretrainSettings, Settings, differences
from raylm.storage import Manifest, StoragePath, fingerprint

MODEL = "model"
"""Below a run: config and tokenizer, from which its checkpoints become models."""
RUN_FILE = "run.json"
"""Below a run: what it was started with."""

_FREE = {
    "name",
    "steps",
    "micro_batch_tokens",
    "workers",
    "log_every",
    "validate_every",
    "validation_batches",
    "early_stopping",
    "checkpoint_every",
    "keep_last",
    "max_failures",
    "collective_timeout_s",
    "activation_checkpointing",
    "offload",
    "kernels",
    "compile",
    "scored_rows",
    "verify_data",
}
"""What may change between two starts of one run: of the same step it changes nothing but, by `steps`, the rate."""


def corpus_directory(settings: Settings) -> StoragePath:
    """Where the corpus is, or will be."""
    return StoragePath(settings.storage) / "tokens" / settings.corpus.name


def prepared_corpus(settings: Settings) -> StoragePath:
    """The directory of the prepared corpus.

    :raises ArtifactError: it is absent or unfinished.
    """
    tokens = corpus_directory(settings)
    corpus_manifest(tokens)
    return tokens


def corpus_manifest(tokens: StoragePath) -> Manifest:
    """
    :param tokens: the directory of a prepared corpus.
    :raises ArtifactError: it is absent or unfinished.
    """
    corpus = Manifest.read(tokens)
    if corpus is None:
        raise ArtifactError(f"corpus {tokens}: not prepared; run `raylm prepare` first")
    return corpus


def corpus_fingerprint(tokens: StoragePath, *beside: str) -> str | None:
    """Of what a prepared corpus holds, and of what else is given; None where it is not prepared."""
    corpus = Manifest.read(tokens)
    return fingerprint([corpus.outputs, *beside]) if corpus else None


def run_directory(settings: Settings, name: str) -> StoragePath:
    return StoragePath(settings.storage) / "runs" / name


def fixed_settings(settings: Settings, training: PretrainSettings | FinetuneSettings) -> dict[str, Any]:
    """The settings that may not change between two starts of one run."""
    return {
        "model": settings.model.model_dump(mode="json", exclude={"name"}),
        "training": training.model_dump(mode="json", exclude=_FREE),
    }


def settings_of(run: StoragePath, settings: Settings, training: PretrainSettings | FinetuneSettings) -> Settings:
    """The settings with those that a run was started with in the place of what may not change meanwhile."""
    before = started_with(run)
    if before is None:
        return settings
    its_own = {
        "model": ModelSettings.model_validate({"name": settings.model.name, **before["model"]}),
        training.section: type(training).model_validate({**training.model_dump(include=_FREE), **before["training"]}),
    }
    return settings.model_copy(update=its_own)


def check_settings(run: StoragePath, settings: Settings, training: PretrainSettings | FinetuneSettings) -> None:
    """:raises TrainingError: the run exists and was started with other settings."""
    started = settings_of(run, settings, training)
    before, now = fixed_settings(started, getattr(started, training.section)), fixed_settings(settings, training)
    if changed := list(differences(before, now)):
        raise TrainingError(
            f"run {run}: was started with other settings ({'; '.join(changed[:3])}); "
            f"choose another run name, or remove {run}"
        )


def sources_of(run: StoragePath, tokens: StoragePath) -> dict[str, list[dict[str, Any]]]:
    """The `documents` and `pairs` that a run learns from, as the settings of its corpus have them.

    :param tokens: the prepared corpus, which may be another by now; of a run of old, nothing else is known.
    """
    known = (started_with(run) or {}).get("sources") or corpus_manifest(tokens).settings["corpus"]
    return {kind: known.get(kind, []) for kind in ("documents", "pairs")}


def started_with(run: StoragePath) -> dict[str, Any] | None:
    """What a run was started with, or None where it was not."""
    file = run / RUN_FILE
    if not file.is_file():
        return None
    before: dict[str, Any] = file.read_json()
    return before
