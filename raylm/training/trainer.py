"""`raylm pretrain` and `raylm finetune`: a run's directory, Ray Train around the loop, progress, a manifest."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from raylm import models
from raylm.errors import ArtifactError, TrainingError
from raylm.lease import held
from raylm.progress import Progress, note
from raylm.settings import FinetuneSettings, PretrainSettings, Settings
from raylm.storage import Manifest, Stopwatch, StoragePath, fingerprint
from raylm.tasks import CLASSIFY
from raylm.training import checkpoint as checkpoints
from raylm.training.groups import choose_width, train_in_groups
from raylm.training.job import TrainingJob
from raylm.training.labels import label_names
from raylm.training.refusals import check_start
from raylm.training.runs import (
    MODEL,
    RUN_FILE,
    check_settings,
    corpus_fingerprint,
    fixed_settings,
    prepared_corpus,
    run_directory,
    sources_of,
    started_with,
)
from raylm.training.start import Start
from raylm.training.streaming import PLACE, RECORD, TokenStream
from raylm.training.telemetry import read_metrics
from raylm.training.trained import save_model

_LOCK = "lock.json"
"""Below a run: who trains it; two would remove each other's checkpoints."""


def pretrain(settings: Settings, stream: TokenStream | None = None) -> Manifest:
    """A model trained on the documents; continues where an earlier start of the run ended.

    :param stream: where the documents come from with `pretrain.stream`; otherwise they are those of the prepared
        corpus.
    :raises RaylmError: no prepared corpus, settings that contradict the run's, too few machines, a diverged loss.
    """
    return _run(settings, settings.pretrain, parent=None, stream=stream)


def finetune(settings: Settings) -> Manifest:
    """A model trained on the prepared pairs, from the best pretraining checkpoint unless told otherwise.

    :raises RaylmError: as `pretrain`, and where there is no pretraining run to start from.
    """
    if settings.finetune.start == "scratch":
        return _run(settings, settings.finetune, parent=None)
    parent = run_directory(settings, settings.pretrain.name)
    if Manifest.read(parent) is None:
        raise ArtifactError(
            f"run {parent}: pretraining has not finished; run `raylm pretrain`, or set finetune.start=scratch"
        )
    return _run(settings, settings.finetune, parent)


def _run(
    settings: Settings,
    training: PretrainSettings | FinetuneSettings,
    parent: StoragePath | None,
    stream: TokenStream | None = None,
) -> Manifest:
    """Train to the end, unless that has been done.

    :param parent: the run whose best checkpoint to start from; None starts from `model.start_from`, or afresh.
    """
    stage = training.section
    tokens = prepared_corpus(settings)
    run = run_directory(settings, training.name)
    fixed = _fixed(run, settings, training, tokens, parent, stream)
    _check_inputs(run, fixed, tokens, parent)
    check_settings(run, settings, training)
    earlier = Manifest.read(run)
    if earlier and _is_over(earlier, training):
        early = f" and stopped early; another {stage}.early_stopping has it go on" if _has_stopped(earlier) else ""
        note(f"{stage}: {run} has {earlier.metrics['step']} steps already{early}")
        return earlier
    width = choose_width(training, 1 if stream else 0, settings.topology)
    planned = check_start(settings, training, Manifest.read(tokens)) if started_with(run) is None else None
    for text in planned.notes if planned else ():
        note(f"{stage}: {text}")
    with held(run.mkdir() / _LOCK, f"run {run}: is being trained by {{who}}; wait for its end, or stop it"):
        if planned:
            _publish_model_files(run, planned.start, planned.objective, tokens)
        job = TrainingJob(
            settings=training,
            run=run.address,
            tokens=tokens.address,
            model=(run / MODEL).address,
            start=_publish_start(run, parent or settings.model.start_from),
            corpus=corpus_fingerprint(tokens),
        )
        (run / RUN_FILE).write_json(fixed)
        stopwatch = Stopwatch()
        with Progress(stage, training.steps, "steps") as progress:
            workers = train_in_groups(job, width, progress, stream)
        complete = checkpoints.checkpoints(run)
        places = complete[-1].manifest.metrics.get(PLACE, 0)
        return Manifest(
            stage=stage,
            settings={"model": settings.model.model_dump(mode="json"), stage: training.model_dump(mode="json")},
            inputs={"tokens": str(tokens), "start": str(parent) if parent else settings.model.start_from},
            outputs=[{"name": f"checkpoints/{checkpoint.directory.name}"} for checkpoint in complete],
            counts=stream.counts((run / RECORD).address, places + 1) if stream else {},
            metrics=_reached(run, training) | {"workers": workers, "parameters": _trained_parameters(job)},
            wall_time_s=stopwatch.elapsed_s,
        ).write(run)


def _reached(run: StoragePath, training: PretrainSettings | FinetuneSettings) -> dict[str, Any]:
    """What a run that has ended has come to."""
    best, last = checkpoints.best(run, is_read=False), checkpoints.checkpoints(run)[-1]
    rows = [row for row in read_metrics(run) if "loss" in row]
    return {
        "step": last.step,
        "stopped_early": last.step < training.steps,
        "loss": rows[-1]["loss"],
        "validation_loss": best.validation_loss,
        "validation_perplexity": best.manifest.metrics["validation_perplexity"],
        "best_step": best.step,
        "tokens_per_s": round(statistics.median_high(row["tokens_per_s"] for row in rows), 1),
    }


def _is_over(earlier: Manifest, training: PretrainSettings | FinetuneSettings) -> bool:
    """Whether a finished run has nothing more to do; one that lost patience has, where the patience is another now."""
    is_patient_as_before = earlier.settings[training.section].get("early_stopping") == training.early_stopping
    return earlier.metrics["step"] >= training.steps or (_has_stopped(earlier) and is_patient_as_before)


def _has_stopped(run: Manifest) -> bool:
    return bool(run.metrics.get("stopped_early"))


def _trained_parameters(job: TrainingJob) -> int:
    lora = job.settings.lora if isinstance(job.settings, FinetuneSettings) else None
    return models.parameter_count(models.build_shapes(models.load_config(job.model), lora))


def _fixed(
    run: StoragePath,
    settings: Settings,
    training: PretrainSettings | FinetuneSettings,
    tokens: StoragePath,
    parent: StoragePath | None,
    stream: TokenStream | None,
) -> dict[str, Any]:
    """What a run is started with: settings, corpus and weights, none of which may change."""
    return {
        **fixed_settings(settings, training),
        "sources": sources_of(run, tokens),
        "corpus": corpus_fingerprint(tokens, *([stream.key] if stream else [])),
        "start": fingerprint(checkpoints.best(parent, is_read=False).manifest.outputs) if parent else None,
    }


def _check_inputs(run: StoragePath, fixed: dict[str, Any], tokens: StoragePath, parent: StoragePath | None) -> None:
    """:raises TrainingError: the run exists and was started on something else."""
    before = started_with(run)
    for key, what in (
        ("corpus", f"another preparation of corpus {tokens.name}"),
        ("start", f"other weights of {parent}"),
    ):
        if before and before.get(key) != fixed[key]:
            raise TrainingError(f"run {run}: was started on {what}; choose another run name, or remove {run}")


def _publish_start(run: StoragePath, start: StoragePath | str | None) -> str | None:
    """Where workers on any machine find the weights to start from: those of a run are put below this one.

    :param start: a run, whose best checkpoint it is; or `model.start_from`, None of which starts afresh. What a GGUF
        file holds is put below the run as well, as plain weights.
    """
    if start is None:
        return None
    if isinstance(start, str) and not start.endswith(models.GGUF):
        return models.located(start)
    target = run / "start"
    if (run / RUN_FILE).is_file():  # which comes after it
        return target.address
    with tempfile.TemporaryDirectory(prefix="raylm-start-") as local:
        if isinstance(start, str):
            models.load_model(start).save_pretrained(local)
            models.load_tokenizer(start).save_pretrained(local)
        else:
            save_model(start, Path(local))
        target.upload_files(Path(local))
    return target.address


def _publish_model_files(run: StoragePath, start: Start, objective: str, tokens: StoragePath) -> None:
    """Put the config, with the head that the objective trains, and the tokenizer below the run.

    :raises ArtifactError: the corpus has no labels to learn, or held-out ones that nothing teaches.
    """
    labels = label_names(tokens) if objective == CLASSIFY.name else []
    config = models.with_head(start.config, labels, start.tokenizer.pad_token_id)
    with tempfile.TemporaryDirectory(prefix="raylm-config-") as local:
        start.tokenizer.save_pretrained(local)
        config.save_pretrained(local)
        (run / MODEL).upload_files(Path(local))
