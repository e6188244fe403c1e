"""Checkpoints that are complete or invisible: every rank's shards first, a manifest of all files last.

A checkpoint is `<run>/checkpoints/step-00000100/` with what DeepSpeed saved and our manifest: each file's size and
hash. One whose files do not fit is refused, and the one before it is used instead.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from raylm.errors import ArtifactError, OutputError, TrainingError, first_line
from raylm.storage import MANIFEST, Manifest, StoragePath, fingerprint, persistently
from raylm.training.average import AVERAGE, WeightAverage
from raylm.training.zero import load_engine, to_universal

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

TAG = "zero"
_STAGING = "staging"
_PARTS = "parts"
"""Below a checkpoint: a list from each rank of the files that it has published."""
_POLL_S = 0.1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on storage."""

    directory: StoragePath
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimizer steps that had been taken."""
        return int(self.manifest.metrics["step"])

    @property
    def world_size(self) -> int:
        return int(self.manifest.metrics["world_size"])

    @property
    def validation_loss(self) -> float | None:
        """None where it was written in haste, before a machine went."""
        loss = self.manifest.metrics.get("validation_loss")
        return None if loss is None else float(loss)

    def fault(self) -> str | None:
        """What is wrong with its files, or None where all are there with the right sizes and hashes."""
        for entry in self.manifest.outputs:
            file = self.directory / entry["name"]
            info = file.info()
            if info.size != entry["bytes"]:
                return f"{file} has {info.size} bytes, the manifest says {entry['bytes']}"
            if file.content_hash() != entry["xxh3_128"]:
                return f"{file} does not have the hash that the manifest says"
        return None

    def localize(self) -> Path:
        """A local directory with its files: itself, or a temporary copy that the caller removes."""
        if self.directory.is_local:
            return self.directory.local()
        local = Path(tempfile.mkdtemp(prefix="raylm-checkpoint-"))
        for entry in self.manifest.outputs:
            (self.directory / entry["name"]).download(local / entry["name"])
        return local


# -------------------------------------------------------------------------------------------- finding


def checkpoints(run: StoragePath, say: Callable[[str], None] = lambda _: None) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first; directories without a manifest are passed over.

    :param say: told of each whose manifest is damaged.
    """
    found = []
    for directory, info in (run / "checkpoints").list():
        if info.type != pa.fs.FileType.Directory or not directory.name.startswith("step-"):
            continue
        try:
            manifest = Manifest.read(directory)
        except ArtifactError as error:
            say(f"checkpoint {directory.name} is damaged and not used: {error}")
            continue
        if manifest is None:
            continue
        if manifest.stage == "checkpoint" and manifest.seal:
            found.append(Checkpoint(directory, manifest))
        else:
            say(f"checkpoint {directory.name} is not used: {directory / MANIFEST} is not a checkpoint's")
    return found


def newest_sound(run: StoragePath, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are what its manifest says; damaged ones are named and passed over."""
    for checkpoint in reversed(checkpoints(run, say)):
        fault = checkpoint.fault()
        if fault is None:
            return checkpoint
        say(f"checkpoint {checkpoint.directory.name} is damaged and not used: {fault}")
    return None


def best(run: StoragePath, is_read: bool = True) -> Checkpoint:
    """The checkpoint with the lowest validation loss, the newer one of equals.

    :param is_read: hold its files against its manifest, which reads them all; false for what the manifest says alone.
    :raises ArtifactError: the run has none, none that was validated, or its files are damaged.
    """
    candidates = checkpoints(run)
    if not candidates:
        raise ArtifactError(f"run {run}: no complete checkpoint; start or continue this training first")
    chosen = _best_of(candidates)
    if chosen.validation_loss is None:
        raise ArtifactError(f"run {run}: paused before its first validation; continue this training first")
    fault = chosen.fault() if is_read else None
    if fault is not None:
        raise ArtifactError(
            f"checkpoint {chosen.directory}: damaged: {fault}; remove it, and the best of the others is taken"
        )
    return chosen


def _best_of(candidates: list[Checkpoint]) -> Checkpoint:
    def loss(checkpoint: Checkpoint) -> float:
        return float("inf") if checkpoint.validation_loss is None else checkpoint.validation_loss

    return min(reversed(candidates), key=loss)


# -------------------------------------------------------------------------------------------- writing


class Writer:
    """Writes a run's checkpoints; each is published while training goes on, one at a time.

    :param settings: of the training; noted in each checkpoint.
    :param keep_last: how many of the newest stay, besides the best.
    """

    def __init__(self, run: StoragePath, settings: dict[str, Any], keep_last: int) -> None:
        self._run, self._settings, self._keep_last = run, settings, keep_last
        self._upload: _Task | None = None
        """Of this rank's files."""
        self._commit: _Task | None = None
        """Of the manifest, on rank 0."""
        self._step = 0
        """That of the checkpoint in flight."""

    def save(self, engine: DeepSpeedEngine, average: WeightAverage | None, metrics: dict[str, Any]) -> None:
        """Write this rank's shards to local disk, and begin to publish them. A collective of all ranks.

        :param average: of the weights, where one is kept.
        :param metrics: of the step that was taken last, with its number as `step`.
        :raises RaylmError: as `finish`, of the checkpoint before; or the local disk is full.
        """
        import torch.distributed as dist

        self.finish()
        self._step = metrics["step"]
        rank, world_size = dist.get_rank(), dist.get_world_size()
        directory = self._run / "checkpoints" / f"step-{metrics['step']:08d}"
        if rank == 0:
            directory.delete()  # what a killed start left there
            directory.mkdir()
        dist.barrier()
        local = _staging(directory, rank)
        try:
            engine.save_checkpoint(str(local), tag=TAG, client_state={"step": metrics["step"]}, save_latest=False)
            if average:
                average.save(local)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(local, ignore_errors=True)
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise  # not of writing the file
            raise OutputError(f"checkpoint {directory}: {local} cannot be written: {first_line(error)}") from error
        self._upload = _Task(lambda _: _publish(local, directory, rank))
        if rank == 0:
            manifest = Manifest("checkpoint", settings=self._settings, metrics={**metrics, "world_size": world_size})
            self._commit = _Task(lambda abandoned: _complete(directory, manifest, world_size, abandoned))

    def finish(self) -> None:
        """Wait until the checkpoint in flight is complete, and remove those that need not stay. A collective.

        :raises RaylmError: a rank could not publish its part, which leaves the checkpoint invisible.
        """
        import torch.distributed as dist

        if self._upload is None:
            return
        failure = self._upload.result()
        failures: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, str(failure) if failure else None)
        commit, self._upload, self._commit = self._commit, None, None
        for rank, text in enumerate(failures):
            if text:
                if commit:
                    commit.abandon()
                raise TrainingError(f"worker {rank} could not save its part of a checkpoint: {text}")
        if commit:
            failure = commit.result()
            if failure:
                raise failure
            _prune(self._run, self._keep_last, self._step)
        dist.barrier()


class _Task:
    """Work on a thread; it is told when nobody wants its result any more."""

    def __init__(self, work: Callable[[threading.Event], None]) -> None:
        self._abandoned = threading.Event()
        self._failure: Exception | None = None

        def run() -> None:
            try:
                work(self._abandoned)
            except Exception as error:  # raised by whoever waits for it
                self._failure = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def result(self) -> Exception | None:
        """What it failed with, after its end."""
        self._thread.join()
        return self._failure

    def abandon(self) -> None:
        self._abandoned.set()


def _staging(directory: StoragePath, rank: int) -> Path:
    """A local directory for a rank's shards: on a local storage beside their destination, to rename and not to copy."""
    if not directory.is_local:
        return Path(tempfile.mkdtemp(prefix="raylm-checkpoint-"))
    local = directory.local() / f"{_STAGING}-{rank:05d}"
    local.mkdir()
    return local


def _publish(local: Path, directory: StoragePath, rank: int) -> None:
    """Move a rank's files to their places, then say which they are.

    :raises OutputError: storage is full or read-only.
    """
    try:
        files = []
        for file in sorted(path for path in local.rglob("*") if path.is_file()):
            target = directory / file.relative_to(local).as_posix()
            entry = {
                "name": file.relative_to(local).as_posix(),
                "bytes": file.stat().st_size,
                "xxh3_128": StoragePath(str(file)).content_hash(),
            }
            if directory.is_local:
                target.local().parent.mkdir(exist_ok=True)
                file.replace(target.local())
            else:
                persistently(directory, partial(target.upload, file))
            files.append(entry)
        persistently(directory, partial(_part(directory, rank).write_json, files))
    finally:
        shutil.rmtree(local, ignore_errors=True)


def _part(directory: StoragePath, rank: int) -> StoragePath:
    return directory / _PARTS / f"rank-{rank:05d}.json"


def _complete(directory: StoragePath, manifest: Manifest, world_size: int, abandoned: threading.Event) -> None:
    """Write the manifest as soon as every rank has published its part, unless that is given up."""
    missing = {_part(directory, rank).name for rank in range(world_size)}
    while missing := missing - {file.name for file, _ in (directory / _PARTS).list()}:
        if abandoned.wait(_POLL_S):
            return
    parts = [_part(directory, rank) for rank in range(world_size)]
    manifest.outputs = sorted((file for part in parts for file in part.read_json()), key=lambda file: str(file["name"]))
    persistently(directory, partial(manifest.write, directory))


def _prune(run: StoragePath, keep_last: int, step: int) -> None:
    """Remove the checkpoints that are neither among the newest nor the best, and what is left of unfinished ones.

    :param step: of the last one; any beyond it was passed over as damaged when the run continued.
    """
    complete = [checkpoint for checkpoint in checkpoints(run) if checkpoint.step <= step]
    kept = {checkpoint.step for checkpoint in complete[-keep_last:]} | {_best_of(complete).step}
    for checkpoint in complete:
        if checkpoint.step not in kept:
            (checkpoint.directory / MANIFEST).delete()  # invisible first, then gone
    whole = {checkpoint.directory.name for checkpoint in complete if checkpoint.step in kept}
    for directory, _ in (run / "checkpoints").list():
        if directory.name not in whole:
            directory.delete()


# -------------------------------------------------------------------------------------------- reading


def load(engine: DeepSpeedEngine, average: WeightAverage | None, checkpoint: Checkpoint) -> None:
    """Put a checkpoint into an engine, also of another world size than it was saved by. A collective of all ranks.

    The engine has to be built for it: see `needs_conversion`. Files are copied, and converted, once on each machine.

    :param average: where one of the weights is kept; the checkpoint has it too.
    """
    import ray.train
    import torch.distributed as dist

    leads = ray.train.get_context().get_local_rank() == 0
    place = Path(tempfile.gettempdir())
    # By its address, as Ray Train tells machines apart when it counts local ranks: they may be processes on one disk.
    key = [str(checkpoint.directory), checkpoint.manifest.seal, ray.util.get_node_ip_address()]
    place /= f"raylm-load-{fingerprint(key)}"
    try:
        if leads:
            shutil.rmtree(place, ignore_errors=True)
            _prepare(checkpoint, place, needs_conversion(checkpoint, dist.get_world_size()))
        dist.barrier()
        load_engine(engine, place, TAG)
        if average:
            average.load(place)
        dist.barrier()
    finally:
        if leads:
            shutil.rmtree(place, ignore_errors=True)


def needs_conversion(checkpoint: Checkpoint, world_size: int) -> bool:
    """Whether the shards have to be cut anew: ZeRO deals them out to the ranks, its stage 0 does not."""
    return checkpoint.world_size != world_size and checkpoint.manifest.settings["zero_stage"] > 0


def _prepare(checkpoint: Checkpoint, place: Path, convert: bool) -> None:
    """Put the files that DeepSpeed loads below a local directory."""
    local = checkpoint.localize()
    try:
        place.mkdir()
        for part in (TAG, AVERAGE):
            if part == TAG and convert:
                to_universal(local / TAG, place / TAG)
            elif (local / part).is_dir() and checkpoint.directory.is_local:
                (place / part).symlink_to(local / part)
            elif (local / part).is_dir():
                shutil.move(local / part, place / part)
    finally:
        if not checkpoint.directory.is_local:
            shutil.rmtree(local, ignore_errors=True)
