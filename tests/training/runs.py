"""What tests of training share: settings with changes, the losses of a run, work on a group of workers."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from raylm.settings import Settings
from raylm.storage import StoragePath
from raylm.training.job import TrainingJob
from raylm.training.telemetry import read_metrics


def changed(settings: Settings, **sections: dict[str, Any]) -> Settings:
    """The settings with other values in some sections."""
    values = settings.model_dump()
    for section, update in sections.items():
        values[section] |= update
    return Settings.model_validate(values)


def losses(run: StoragePath) -> list[float]:
    """The training losses that a run has logged."""
    return [row["loss"] for row in read_metrics(run) if "loss" in row]


def gradient_norms(run: StoragePath) -> list[float]:
    """The norms of the gradients, before they were clipped, that a run has logged."""
    return [row["gradient_norm"] for row in read_metrics(run) if "gradient_norm" in row]


def worker_processes() -> list[psutil.Process]:
    """The workers of a training that this process has begun."""
    return [process for process in psutil.process_iter(["cmdline"]) if _is_worker(process)]


def _is_worker(process: psutil.Process) -> bool:
    command = " ".join(process.info["cmdline"] or [])
    return "RayTrainWorker" in command and any(parent.pid == os.getpid() for parent in _parents(process))


def _parents(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.parents()
    except psutil.NoSuchProcess:
        return []


def on_workers(workers: int, work: Callable[[dict[str, Any]], None], storage: Path, **config: Any) -> None:
    """Let each of a group of workers do some work, with a process group of gloo.

    :param work: is given `config`; defined inside a function, so that it travels by value.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        work,
        train_loop_config=config,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(name=f"group-{uuid.uuid4()}", storage_path=str(storage / "ray")),
    ).fit()


def train_jobs(workers: int, jobs: list[TrainingJob], storage: Path) -> None:
    """Train all jobs, one after the other, on a group of workers."""

    def train_all(config: dict[str, Any]) -> None:
        from raylm.training.loop import train_worker

        for job in config["jobs"]:
            train_worker(job, lambda _: None)

    on_workers(workers, train_all, storage, jobs=jobs)


def damage(directory: Path, kind: str, chance: random.Random) -> None:
    """Do one of four kinds of harm to a checkpoint: `truncate`, `drop` or `flip` a file, or `die` while writing."""
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file.parent.name != "parts")
    victim = chance.choice(files)
    data = victim.read_bytes()
    if kind == "truncate":
        victim.write_bytes(data[: chance.randrange(len(data))])
    elif kind == "drop":
        victim.unlink()
    elif kind == "flip":
        changed_data = bytearray(data)
        changed_data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        victim.write_bytes(bytes(changed_data))
    else:  # died between two files: the manifest and some of the files were never written
        for file in chance.sample(files, chance.randint(1, len(files) - 1)):
            file.unlink()
        (directory / "manifest.json").unlink(missing_ok=True)
