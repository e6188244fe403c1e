"""`raylm pretrain` and `raylm finetune`: a run's directory, Ray Train around the loop, progress, a manifest."""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm import models
from raylm.errors import ArtifactError, RaylmError, TrainingError
from raylm.progress import Progress, note
from raylm.settings import FinetuneSettings, PretrainSettings, Settings, differences
from raylm.storage import Manifest, Stopwatch, StoragePath, fingerprint
from raylm.training import checkpoint as checkpoints
from raylm.training.loop import TrainingJob, step_sequences, train_worker
from raylm.training.objectives import objective_for
from raylm.training.streaming import PLACE, RECORD, TokenStream, dataset_from_checkpoint
from raylm.training.telemetry import read_metrics
from raylm.training.zero import whole_weights

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from transformers import PreTrainedModel

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
    "checkpoint_every",
    "keep_last",
    "max_failures",
    "compile",
}
"""What may change between two starts of one run: nothing of it changes what a step computes."""
_MOST_CPU_WORKERS = 4
_READ_AHEAD_BYTES = 32 << 20
"""Of a stream's sequences, for each worker."""


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


def prepared_corpus(settings: Settings) -> StoragePath:
    """The directory of the prepared corpus.

    :raises ArtifactError: it is absent or unfinished.
    """
    tokens = StoragePath(settings.storage) / "tokens" / settings.corpus.name
    if Manifest.read(tokens) is None:
        raise ArtifactError(f"corpus {tokens}: not prepared; run `raylm prepare` first")
    return tokens


def run_directory(settings: Settings, name: str) -> StoragePath:
    return StoragePath(settings.storage) / "runs" / name


def load_trained(run: StoragePath) -> tuple[PreTrainedModel, checkpoints.Checkpoint]:
    """The model of a run's best checkpoint, in fp32 on the CPU, and that checkpoint.

    :raises ArtifactError: the run has no sound checkpoint.
    """
    import torch

    best = checkpoints.best(run)
    with tempfile.TemporaryDirectory(prefix="raylm-model-") as local_model:
        (run / MODEL).download_files(Path(local_model))
        config = models.load_config(local_model)
    local = best.localize()
    try:
        weights = whole_weights(local, best.manifest.settings["zero_stage"])
    finally:
        if not best.directory.is_local:
            shutil.rmtree(local, ignore_errors=True)
    model = models.build_model(config, seed=0)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    # Tied weights are stored once, and fixed ones (sinusoidal positions) follow from the config.
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lost = sorted(learned & set(missing))
    if lost or unexpected:
        raise ArtifactError(
            f"checkpoint {best.directory}: its weights do not fit the run's model: "
            f"missing {lost[:3]}, unexpected {sorted(unexpected)[:3]}"
        )
    model.config.use_cache = True
    return model.to(torch.float32).eval(), best


def save_model(run: StoragePath, directory: Path) -> checkpoints.Checkpoint:
    """Write a run's best checkpoint in Hugging Face layout: weights, config, tokenizer."""
    from transformers.utils import logging

    model, best = load_trained(run)
    logging.disable_progress_bar()  # for a file that is written in a second
    model.save_pretrained(directory)
    for file, _ in (run / MODEL).list():
        if file.name != "config.json":
            file.download(directory / file.name)
    return best


# ------------------------------------------------------------------------------------------- the run


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
    workers, use_gpu = _workers(training, cpus_for_data=1 if stream else 0)
    training = training.model_copy(update={"workers": workers})
    _claim(run, settings, training, tokens, parent, stream)
    earlier = Manifest.read(run)
    if earlier and earlier.metrics["step"] >= training.steps:
        note(f"{stage}: {run} has {earlier.metrics['step']} steps already")
        return earlier

    start = _publish_start(run, parent) if parent else settings.model.start_from
    job = TrainingJob(
        settings=training,
        run=str(run),
        tokens=str(tokens),
        model=_publish_model_files(run, settings, training, start or str(tokens / "tokenizer")),
        start=start,
    )
    stopwatch = Stopwatch()
    with Progress(stage, training.steps, "steps") as progress:
        _fit(job, workers, use_gpu, progress, stream)
    best, rows = checkpoints.best(run), read_metrics(run)
    places = checkpoints.checkpoints(run)[-1].manifest.metrics.get(PLACE, 0)
    losses = [row for row in rows if "loss" in row]
    speeds = [row["tokens_per_s"] for row in losses]
    manifest = Manifest(
        stage=stage,
        settings={"model": settings.model.model_dump(mode="json"), stage: training.model_dump(mode="json")},
        inputs={"tokens": str(tokens), "start": str(parent) if parent else start},
        outputs=[{"name": f"checkpoints/{c.directory.name}"} for c in checkpoints.checkpoints(run)],
        counts=stream.counts(str(run / RECORD), places + 1) if stream else {},
        metrics={
            "step": training.steps,
            "loss": losses[-1]["loss"],
            "validation_loss": best.validation_loss,
            "validation_perplexity": best.manifest.metrics["validation_perplexity"],
            "best_step": best.step,
            "tokens_per_s": round(sorted(speeds)[len(speeds) // 2], 1),
            "workers": workers,
            "parameters": models.parameter_count(models.build_model(models.load_config(job.model), seed=0)),
        },
        wall_time_s=stopwatch.elapsed_s,
    )
    return manifest.write(run)


def _claim(
    run: StoragePath,
    settings: Settings,
    training: PretrainSettings | FinetuneSettings,
    tokens: StoragePath,
    parent: StoragePath | None,
    stream: TokenStream | None,
) -> None:
    """Note what the run is started with, or hold it against what it was started with before.

    :raises TrainingError: the run exists and was something else.
    """
    corpus = Manifest.read(tokens)
    fixed = {
        "model": settings.model.model_dump(mode="json", exclude={"name"}),
        "training": training.model_dump(mode="json", exclude=_FREE),
        "corpus": fingerprint([corpus.outputs, *([stream.key] if stream else [])]) if corpus else None,
        "start": fingerprint(checkpoints.best(parent).manifest.outputs) if parent else None,
    }
    file = run / RUN_FILE
    if not file.is_file():
        file.write_json(fixed)
        return
    before = file.read_json()
    for key, what in (
        ("corpus", f"another preparation of corpus {tokens.name}"),
        ("start", f"other weights of {parent}"),
    ):
        if before.get(key) != fixed[key]:
            raise TrainingError(f"run {run}: was started on {what}; choose another run name, or remove {run}")
    changed = list(differences(before, fixed))
    if changed:
        raise TrainingError(
            f"run {run}: was started with other settings ({'; '.join(changed[:3])}); "
            f"choose another run name, or remove {run}"
        )


def _publish_start(run: StoragePath, parent: StoragePath) -> str:
    """Put the weights of the parent's best checkpoint below the run, for workers on any machine to read."""
    target = run / "start"
    with tempfile.TemporaryDirectory(prefix="raylm-start-") as local:
        save_model(parent, Path(local))
        target.upload_files(Path(local))
    return str(target)


def _publish_model_files(
    run: StoragePath, settings: Settings, training: PretrainSettings | FinetuneSettings, model: str
) -> str:
    """Put the config and the tokenizer below the run; returns where they are.

    :raises SettingsError: the objective does not fit the model.
    """
    target = run / MODEL
    if not (target / "config.json").is_file():
        with tempfile.TemporaryDirectory(prefix="raylm-config-") as local:
            tokenizer = models.load_tokenizer(model)
            is_model = settings.model.start_from or (StoragePath(model) / "config.json").is_file()
            config = models.load_config(model) if is_model else models.build_config(settings.model, tokenizer)
            objective_for(training.objective, models.architecture(config))
            tokenizer.save_pretrained(local)
            config.save_pretrained(local)
            target.upload_files(Path(local))
    return str(target)


def _workers(training: PretrainSettings | FinetuneSettings, cpus_for_data: int) -> tuple[int, bool]:
    """How many workers, and whether each has a GPU, from the live cluster.

    :param cpus_for_data: left to Ray Data, which gets none that a worker has.
    :raises TrainingError: more are wanted than there are machines for.
    """
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    have = min(gpus, cpus - cpus_for_data) if gpus else cpus - cpus_for_data
    most = have if gpus else min(have, _MOST_CPU_WORKERS)
    wanted = max(most, 1) if training.workers == "auto" else training.workers
    if wanted > have:
        kind = "GPUs" if gpus else "CPUs"
        beside = f", {cpus_for_data} CPU of which {training.section}.stream needs" if cpus_for_data else ""
        raise TrainingError(f"{training.section}.workers is {wanted}, the cluster has {gpus or cpus} {kind}{beside}")
    return wanted, bool(gpus)


def _fit(job: TrainingJob, workers: int, use_gpu: bool, progress: Progress, stream: TokenStream | None = None) -> None:
    """Run the loop on a group of workers and follow it.

    :raises TrainingError: it cannot be brought to its end.
    """
    import ray
    from ray.data import ExecutionOptions, ExecutionResources
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    relay = ray.remote(num_cpus=0, scheduling_strategy=here)(Relay).remote()
    run = StoragePath(job.run)
    datasets: dict[str, Any] = {}
    if stream:
        sequences = job.settings.steps * step_sequences(job.settings.global_batch_tokens, StoragePath(job.tokens))
        # Called for each group of workers: one that replaces another goes on behind its last checkpoint.
        datasets["train"] = lambda: dataset_from_checkpoint(stream, run, sequences)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job, "relay": relay},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        datasets=datasets,
        dataset_config=DataConfig(
            execution_options=ExecutionOptions(
                preserve_order=True, resource_limits=ExecutionResources(object_store_memory=_READ_AHEAD_BYTES * workers)
            )
        ),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1, **({"GPU": 1} if use_gpu else {})}
        ),
        run_config=RunConfig(
            # Ray's own record of the attempt; which checkpoint to continue from is our manifests' to say.
            name=f"attempt-{time.time_ns()}",
            storage_path=(run / "ray").path,
            storage_filesystem=run.filesystem,
            failure_config=FailureConfig(max_failures=job.settings.max_failures),
        ),
    )
    failure: BaseException | None = None
    try:
        with _Follower(relay, progress), _interruptible():
            try:
                trainer.fit()
            except TrainingFailedError as error:
                failure = error
    finally:
        (run / "ray").delete()
    fatal = ray.get(relay.failed.remote())
    if fatal:
        raise TrainingError(fatal)
    if failure is not None:
        trace = run / "error.txt"
        trace.write_bytes(str(failure).encode())
        last = [line.strip() for line in str(failure).splitlines() if line.strip()][-1]
        raise TrainingError(f"run {run}: workers failed: {last} (whole trace: {trace})") from failure


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ray Train answers Ctrl-C by ending the process with 0, and keeps its handler: neither is wanted here."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _worker(config: dict[str, Any]) -> None:
    import ray.train

    job, relay = config["job"], config["relay"]
    leads = ray.train.get_context().get_world_rank() == 0

    def report(metrics: dict[str, Any]) -> None:
        relay.push.remote(metrics)

    try:
        train_worker(job, report if leads else lambda _: None)
    except RaylmError as error:
        # Trying again would come to the same end.
        ray.get(relay.fail.remote(str(error)))
    except Exception:
        # A worker that lost another one: ended by an error of ours, or in earnest?
        if not ray.get(relay.failed.remote()):
            raise


class Relay:
    """An actor that carries what the first worker reports to the driver, and what ends the training from any."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._fatal: str | None = None

    def push(self, row: dict[str, Any]) -> None:
        self._rows.append(row)

    def fail(self, reason: str) -> None:
        self._fatal = self._fatal or reason

    def failed(self) -> str | None:
        return self._fatal

    def drain(self) -> list[dict[str, Any]]:
        rows, self._rows = self._rows, []
        return rows


class _Follower:
    """A thread that shows a relay's rows as progress for as long as its context lasts."""

    def __init__(self, relay: ActorHandle, progress: Progress) -> None:
        self._relay, self._progress = relay, progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._started = False
        self._validation = ""

    def __enter__(self) -> _Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        import ray

        finished = False
        while not finished:
            finished = self._stop.wait(0.5)
            try:
                rows = ray.get(self._relay.drain.remote(), timeout=30)
            except ray.exceptions.RayError:  # too busy to answer: training is followed no longer, but goes on
                return
            for row in rows:
                self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        if "note" in row:
            note(row["note"])
        elif "validation_loss" in row:
            self._validation = f"  validation {row['validation_loss']:.3f}"
        else:
            if not self._started:
                self._progress.resume_at(row["step"])
                self._started = True
            detail = f"{row['tokens_per_s']:,.0f} tokens/s  loss {row['loss']:.3f}{self._validation}"
            self._progress.update(row["step"], detail)
