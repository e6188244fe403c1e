"""Checkpoints: complete or invisible, exact, and for any number of workers."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from raylm.errors import OutputError, TrainingError
from raylm.settings import PretrainSettings, Settings
from raylm.storage import StoragePath
from raylm.training import checkpoint as checkpoints
from raylm.training.job import TrainingJob
from raylm.training.record import DATA
from raylm.training.runs import run_directory
from raylm.training.trainer import pretrain
from tests.training.runs import changed, damage, losses, on_workers, train_jobs

STEPS = 12


@pytest.fixture(scope="module")
def model(small_settings: Settings, corpus: StoragePath, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and a tokenizer to train from."""
    from raylm import models

    directory = tmp_path_factory.mktemp("model")
    tokenizer = models.load_tokenizer(str(corpus / "tokenizer"))
    tokenizer.save_pretrained(directory)
    config = models.build_config(small_settings.model, tokenizer)
    config.dropout = 0.1  # which a run that continues has to draw again
    config.save_pretrained(directory)
    return directory


def training(settings: Settings, **values: Any) -> PretrainSettings:
    fixed = {"log_every": 1, "checkpoint_every": 4, "schedule": "constant", "learning_rate": 1e-3, "warmup_steps": 2}
    return settings.pretrain.model_copy(update=fixed | values)


def test_a_run_goes_from_two_workers_to_one_and_back(
    small_settings: Settings, corpus: StoragePath, model: Path, tmp_path: Path
) -> None:
    """At each stage of ZeRO the losses are those of an undisturbed run, to 1e-5, and so is what each step reads.

    `test_average.py` has stage 0.
    """
    stages = (1, 2, 3)

    def jobs(name: str, steps: int) -> list[TrainingJob]:
        return [
            TrainingJob(
                training(small_settings, zero_stage=stage, steps=steps, verify_data=True),
                str(tmp_path / f"{name}-{stage}"),
                str(corpus), str(tmp_path / "model"), None,
            )
            for stage in stages
        ]  # fmt: skip

    shutil.copytree(model, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    # Dropout differs by rank: another number of workers cannot draw the same.
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"dropout": 0.0}))
    train_jobs(2, [*jobs("whole", STEPS), *jobs("changing", STEPS // 3)], tmp_path)
    train_jobs(1, jobs("changing", 2 * STEPS // 3), tmp_path)
    train_jobs(2, jobs("changing", STEPS), tmp_path)
    for stage in stages:
        whole, changing = (StoragePath(str(tmp_path / f"{name}-{stage}")) for name in ("whole", "changing"))
        assert [c.world_size for c in checkpoints.checkpoints(changing)] == [1, 2]
        assert losses(changing) == pytest.approx(losses(whole), abs=1e-5), f"ZeRO-{stage}"
        assert (changing / DATA).read_jsonl() == (whole / DATA).read_jsonl()
        assert len(losses(whole)) == STEPS
        assert losses(whole)[-1] < losses(whole)[0] - 0.05


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_continues_draws_the_same_dropout(
    small_settings: Settings, corpus: StoragePath, model: Path, tmp_path: Path, workers: int
) -> None:
    def job(name: str, steps: int, stage: int) -> TrainingJob:
        settings = training(small_settings, steps=steps, zero_stage=stage)
        return TrainingJob(settings, str(tmp_path / f"{name}-{stage}"), str(corpus), str(model), None)

    train_jobs(workers, [job(name, steps, stage) for stage in (1, 3) for name, steps in
                     (("whole", 8), ("broken", 4), ("broken", 8))], tmp_path)  # fmt: skip
    for stage in (1, 3):
        whole, broken = (losses(StoragePath(str(tmp_path / f"{name}-{stage}"))) for name in ("whole", "broken"))
        assert broken == pytest.approx(whole, abs=1e-6)
        assert whole[-1] < whole[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parameter_groups_keep_their_settings_through_a_conversion(
    small_settings: Settings, corpus: StoragePath, model: Path, tmp_path: Path, stage: int
) -> None:
    """Biases do not decay, nor do they learn to when a checkpoint of another world size is loaded."""
    settings = training(small_settings, zero_stage=stage, steps=4, weight_decay=0.25)
    job = TrainingJob(settings, str(tmp_path / "run"), str(corpus), str(model), None)
    train_jobs(2, [job], tmp_path)

    def look(config: dict[str, Any]) -> None:
        import ray.train.torch

        from raylm.training.loop import setup

        job = config["job"]
        checkpoint = checkpoints.best(StoragePath(job.run))
        engine, *_ = setup(job, 1, ray.train.torch.get_device(), checkpoint, "fp32")
        decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
        Path(config["file"]).write_text(json.dumps({"decays": decays, "steps": engine.global_steps}))

    on_workers(1, look, tmp_path, job=job, file=str(tmp_path / "seen.json"))
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["decays"] == [0.25, 0.0]
    assert seen["steps"] == 4


# --------------------------------------------------------------------------------------- faults on storage


@pytest.fixture(scope="module")
def two_checkpoints(small_settings: Settings, corpus: StoragePath) -> Path:
    """A run with checkpoints at steps 6 and 12."""
    pretrain(changed(small_settings, pretrain={"workers": 2, "name": "faults"}))
    return Path(run_directory(small_settings, "faults").path)


def test_no_damaged_checkpoint_is_ever_loaded(two_checkpoints: Path, tmp_path: Path) -> None:
    """A hundred faults, each in a copy."""
    chance = random.Random(7)
    for number in range(100):
        run = tmp_path / str(number)
        shutil.copytree(two_checkpoints / "checkpoints", run / "checkpoints")
        kind = ("truncate", "drop", "flip", "die")[number % 4]
        damage(run / "checkpoints/step-00000012", kind, chance)
        said: list[str] = []
        found = checkpoints.newest_sound(StoragePath(str(run)), said.append)
        assert found is not None
        assert found.step == 6, f"{kind} number {number}"
        if (run / "checkpoints/step-00000012/manifest.json").exists():
            assert "step-00000012 is damaged and not used" in said[0]
        shutil.rmtree(run)


def test_a_manifest_that_says_something_else_is_refused(two_checkpoints: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_checkpoints / "checkpoints", run / "checkpoints")
    file = run / "checkpoints/step-00000012/manifest.json"
    manifest = json.loads(file.read_text())
    for part, says in ({"created_at": "2001-01-01"}, "is not as it was written"), ({"seal": ""}, "not a checkpoint's"):
        file.write_text(json.dumps(manifest | part))
        said: list[str] = []
        assert [c.step for c in checkpoints.checkpoints(StoragePath(str(run)), said.append)] == [6]
        assert says in said[0]


def test_a_full_disk_ends_training_with_its_name(
    small_settings: Settings, corpus: StoragePath, small_disk: Path
) -> None:
    run = run_directory(small_settings, "full")
    Path(run.path).parent.mkdir(exist_ok=True)
    Path(run.path).symlink_to(small_disk)
    settings = changed(
        small_settings,
        pretrain={
            "name": "full",
            "workers": 2,
            "steps": 400,
            "checkpoint_every": 2,
            "keep_last": 50,
            "max_failures": 3,
        },
    )
    with pytest.raises(TrainingError, match=r"(?i)step-\d+.*(no space left|cannot be written)"):
        pretrain(settings)
    assert all(found.fault() is None for found in checkpoints.checkpoints(run))


def test_an_object_store_that_refuses_is_asked_again(
    object_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused twice, a rank's files are there in the end; refused for good, the error names the file."""
    monkeypatch.setattr("raylm.storage._RETRY_AFTER_S", (0.0, 0.0, 0.0))
    upload, refusals = StoragePath.upload, [2]

    def refusing(place: StoragePath, file: Path) -> None:
        if refusals[0]:
            refusals[0] -= 1
            raise OutputError(f"cannot write {place}: slow down")
        upload(place, file)

    monkeypatch.setattr(StoragePath, "upload", refusing)
    directory = StoragePath(object_store.format("runs/checkpoints/step-00000001"))
    for name in ("sent", "refused"):
        (tmp_path / name / "zero").mkdir(parents=True)
        (tmp_path / name / "zero" / "shard.pt").write_bytes(b"weights")
    checkpoints._publish(tmp_path / "sent", directory, rank=0)
    assert (directory / "zero/shard.pt").read_bytes() == b"weights"
    [entry] = (directory / "parts/rank-00000.json").read_json()
    assert (entry["name"], entry["bytes"]) == ("zero/shard.pt", 7)
    refusals[0] = 10
    with pytest.raises(OutputError, match=r"zero/shard\.pt.*: slow down"):
        checkpoints._publish(tmp_path / "refused", directory, rank=1)
