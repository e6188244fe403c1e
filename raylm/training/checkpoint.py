"""Checkpoints that are complete or invisible: every rank's shards first, a manifest of all files last.

A checkpoint is `<run>/checkpoints/step-00000100/` with what DeepSpeed saved and our manifest: each file's size and
hash. Reading one whose files do not fit its manifest is refused, and the one before it is used instead.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from raylm.errors import ArtifactError, TrainingError
from raylm.storage import MANIFEST, Manifest, StoragePath

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

TAG = "zero"


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
    def validation_loss(self) -> float:
        return float(self.manifest.metrics["validation_loss"])

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


def checkpoints(run: StoragePath) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first; directories without a manifest are passed over."""
    found = []
    for directory, info in (run / "checkpoints").list():
        if info.type == pa.fs.FileType.Directory and directory.name.startswith("step-"):
            with suppress(ArtifactError):
                manifest = Manifest.read(directory)
                if manifest is not None:
                    found.append(Checkpoint(directory, manifest))
    return found


def newest_sound(run: StoragePath, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are what its manifest says; damaged ones are named and passed over."""
    for checkpoint in reversed(checkpoints(run)):
        fault = checkpoint.fault()
        if fault is None:
            return checkpoint
        say(f"checkpoint {checkpoint.directory.name} is damaged and not used: {fault}")
    return None


def best(run: StoragePath) -> Checkpoint:
    """The checkpoint with the lowest validation loss, the newer one of equals.

    :raises ArtifactError: the run has none, or its files are damaged.
    """
    candidates = checkpoints(run)
    if not candidates:
        raise ArtifactError(f"run {run}: no complete checkpoint; start or continue this training first")
    chosen = min(reversed(candidates), key=lambda checkpoint: checkpoint.validation_loss)
    fault = chosen.fault()
    if fault is not None:
        raise ArtifactError(f"checkpoint {chosen.directory}: damaged: {fault}")
    return chosen


def save(
    engine: DeepSpeedEngine, run: StoragePath, metrics: dict[str, Any], settings: dict[str, Any], keep_last: int
) -> None:
    """Publish a checkpoint; called by every rank, and complete when it returns.

    Each rank writes its shards to local disk, copies them to storage and says what they are; rank 0 writes the
    manifest when all have said so, and then removes checkpoints that are neither among the newest nor the best.

    :raises OutputError: storage is full or read-only; the unfinished checkpoint stays invisible.
    """
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    directory = run / "checkpoints" / f"step-{metrics['step']:08d}"
    local = Path(tempfile.mkdtemp(prefix="raylm-checkpoint-"))
    failure: Exception | None = None
    mine: list[dict[str, Any]] = []
    try:
        engine.save_checkpoint(str(local), tag=TAG, client_state={"step": metrics["step"]}, save_latest=False)
        try:
            mine = [_publish(file, local, directory) for file in sorted(local.rglob("*")) if file.is_file()]
        except Exception as error:
            failure = error
    finally:
        shutil.rmtree(local, ignore_errors=True)
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, (mine, str(failure) if failure else None))
    if failure is not None:
        raise failure
    for other, (_, other_failure) in enumerate(everyone):
        if other_failure:
            raise TrainingError(f"worker {other} could not save its part of {directory}: {other_failure}")
    if rank == 0:
        outputs = sorted((entry for part, _ in everyone for entry in part), key=lambda entry: str(entry["name"]))
        whole = {**metrics, "world_size": world_size}
        Manifest(stage="checkpoint", settings=settings, outputs=outputs, metrics=whole).write(directory)
        _prune(run, keep_last)
    dist.barrier()


def load(engine: DeepSpeedEngine, checkpoint: Checkpoint) -> int:
    """Put a checkpoint into an engine of the same world size; returns the number of steps taken.

    :raises TrainingError: it was saved by another number of workers.
    """
    import torch.distributed as dist

    if checkpoint.world_size != dist.get_world_size():
        raise TrainingError(
            f"checkpoint {checkpoint.directory}: saved by {checkpoint.world_size} workers, this run has "
            f"{dist.get_world_size()}; continue with workers={checkpoint.world_size}"
        )
    local = checkpoint.localize()
    try:
        engine.load_checkpoint(str(local), tag=TAG)
    finally:
        if not checkpoint.directory.is_local:
            shutil.rmtree(local, ignore_errors=True)
    return checkpoint.step


def _publish(file: Path, root: Path, directory: StoragePath) -> dict[str, Any]:
    name = file.relative_to(root).as_posix()
    (directory / name).upload(file)
    return {"name": name, "bytes": file.stat().st_size, "xxh3_128": StoragePath(str(file)).content_hash()}


def _prune(run: StoragePath, keep_last: int) -> None:
    complete = checkpoints(run)
    kept = {checkpoint.step for checkpoint in complete[-keep_last:]}
    kept.add(min(reversed(complete), key=lambda checkpoint: checkpoint.validation_loss).step)
    for checkpoint in complete:
        if checkpoint.step not in kept:
            (checkpoint.directory / MANIFEST).delete()  # invisible first, then gone
            checkpoint.directory.delete()
